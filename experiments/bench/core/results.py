"""Results on disk: a killed benchmark loses at most the pair that it was running."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.config import rundir
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput

Entry = dict[str, Any]


class Results:
    """``results.jsonl``, a line for each entry; an entry is on disk as soon as ``add`` returns.

    Args:
      workdir: the directory of the file; made where it is missing.

    Attributes:
      path, file: the directory and the file.
      entries: what the file holds.

    Raises:
      InvalidInput: a directory that cannot be written, or a file of something else.
    """

    def __init__(self, workdir: files.PathLike):
        self.path = path = files.expanded(workdir)
        self.file = path / "results.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            text = files.regular(self.file).read_text() if self.file.exists() else ""
            whole = text[: text.rfind("\n") + 1]  # a kill may have come in the middle of the last line
            files.write(self.file, whole)
            self.entries: list[Entry] = [json.loads(line) for line in whole.splitlines()]
        except OSError as error:
            raise InvalidInput(f"--workdir: {path} cannot be written: {error.strerror}.") from None
        except ValueError:
            raise InvalidInput(f"--workdir: {self.file} holds something else than results; choose another.") from None

    def find(self, track: str, rule: str, config: Mapping[str, Any]) -> Entry | None:
        """The entry of this configuration, if it is there."""
        same = (e for e in reversed(self.entries) if (e["track"], e["rule"], e["config"]) == (track, rule, config))
        return next(same, None)

    def add(self, entry: Entry) -> None:
        """Appends an entry."""
        line = json.dumps(entry, allow_nan=False)
        with rundir.appending(self.file) as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(json.loads(line))

    def publish(self, report: str, pictures: Mapping[str, Figure]) -> None:
        """Writes ``report.md``, and each picture under its name."""
        for name, figure in pictures.items():
            rundir.save_picture(self.path / f"{name}.png", figure)
        files.write(self.path / "report.md", report)


def numbers(values: np.ndarray) -> Any:
    """An array as JSON has it: null for what is not finite."""
    if values.ndim:
        return [numbers(row) for row in values]
    return float(values) if np.isfinite(values) else None
