"""Compares clipping rules, each tuned with the same number of trials, and says who wins where.

  python -m experiments.bench.clip --quick --rules=fedavg,celgc,episode
  python -m experiments.bench.clip --tracks=quartic,quartic_far,three_numbers,heavy_tails,client_sampling
  python -m experiments.bench.clip

The working directory gets results.jsonl (a line for each track and rule, with all its trials), report.md, and a picture
of each track. Stopped in any way, the same command goes on where it was. What has changed since runs again by itself: a
rule that another program comes of (its entry changed, or the library under it, or JAX), a problem of another program,
start, data or cohorts, a range, a number of seeds or trials.
"""

import pathlib
from collections.abc import Callable, Sequence

from absl import flags

from experiments.bench.contest import build_tracks, contest
from experiments.bench.entries import check_names
from experiments.bench.report import draw, file_name, report
from experiments.bench.rules import RULES
from experiments.bench.tracks import TRACKS
from experiments.config import binary, rundir
from fedjax_clip.core import files


def define_flags() -> None:
    """Defines the flags; not on import, for other binaries have flags of the same names."""
    flags.DEFINE_list("tracks", None, "Problems to compare on; by default all whose data are here.")
    flags.DEFINE_list("rules", None, "Rules to compare; by default all.")
    flags.DEFINE_integer(
        "trials", None, "Points of its knobs that each rule may try, an even number; by default the track's."
    )
    flags.DEFINE_string("workdir", "runs/clipbench", "Where results and report are written.")
    flags.DEFINE_boolean("quick", False, "Few rounds, seeds and trials: to see that it runs.")


def main() -> None:
    """Runs what the flags say."""
    values = flags.FLAGS
    # Else the second run would report how long it takes to read a program, and not to compile it.
    binary.configure_jax(1)
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    stopping = binary.Stopping()
    rules = list(RULES) if values.rules is None else values.rules
    bench(values.tracks, rules, values.trials, values.workdir, values.quick, stopping)
    stopping.leave()


def bench(
    tracks: Sequence[str] | None,
    rules: Sequence[str],
    trials: int | None,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Runs each rule on each track, unless the working directory has it already, and writes the report.

    Tracks of ``None`` are all that can be had; a line says of each other one what it lacks.

    Returns:
      How many pairs of a track and a rule were run.

    Raises:
      InvalidInput: an unknown track or rule, no even number of trials, or a directory that cannot be written.
    """
    if tracks is not None:
        check_names("--tracks", "track", tracks, TRACKS)
    check_names("--rules", "rule", rules, RULES)
    chosen = {name: RULES[name] for name in rules}
    found = contest(build_tracks(tracks, TRACKS), chosen, trials, workdir, quick, should_stop)
    for track, rows in found.standings:
        rundir.save_picture(found.path / f"{file_name(track)}.png", draw(track, rows))
    files.write(found.path / "report.md", report(found.standings, quick))
    return found.done


def describe() -> str:
    """All tracks and rules, for ``--help``."""
    rules = [f"    {name:<18} {rule.note}" for name, rule in RULES.items()]
    return "\n".join(["Tracks:", f"    {', '.join(TRACKS)}", "Rules:", *rules])


if __name__ == "__main__":
    define_flags()
    binary.run(main, __doc__ or "", describe)
