"""Makes one page of one run directory, or compares several: an HTML file that needs nothing else.

  python -m experiments.report runs/digits-fedavg-1a2b3c                          writes report.html into it
  python -m experiments.report runs/clipped runs/unclipped --out=compared.html    writes compared.html

Without --out the page is report.html: in the directory of the one run, or here. The
directories are those that experiments.run writes; it makes the page of its own at the end.
"""

import pathlib

from absl import flags

from experiments.config import binary
from experiments.page import page
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput

FLAGS = flags.FLAGS

flags.DEFINE_string("out", None, "Where to write; by default report.html, in the directory if it is one run.")


def main(*directories: str) -> None:
    """Reads the run directories and writes their page."""
    if not directories:
        raise InvalidInput("Name one run directory or more: python -m experiments.report RUN_DIRECTORY ...")
    paths = [files.expanded(directory) for directory in directories]
    if len(set(paths)) < len(paths):
        raise InvalidInput(f"{next(p for p in paths if paths.count(p) > 1)} is named twice.")
    default = paths[0] / "report.html" if len(paths) == 1 else pathlib.Path("report.html")
    out = files.expanded(FLAGS.out or default)
    page.write(out, paths)
    print(f"wrote {out}")


if __name__ == "__main__":
    binary.run(main, __doc__ or "", operands=True)
