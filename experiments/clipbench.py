"""Compares clipping rules, each at every threshold of a grid, and says who wins where.

  python -m experiments.clipbench --quick --rules=fedavg,celgc,episode
  python -m experiments.clipbench --tracks=quartic,three_numbers,heavy_tails,client_sampling
  python -m experiments.clipbench

The working directory gets results.jsonl (a line for each track and rule, with its whole grid), report.md, and a picture
of each track. Stopped in any way, the same command goes on where it was. What has changed since runs again by itself: a
rule that another program comes of (its entry changed, or the library under it, or JAX), a problem of another program,
start, data or cohorts, a grid, a number of seeds.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax
import tqdm
from absl import flags

import fedjax_clip as fc
from experiments import binary, rundir
from experiments.clipbench_lanes import fingerprint, probe, run
from experiments.clipbench_report import Standing, draw, file_name, report
from experiments.clipbench_tracks import TRACKS, Track
from experiments.rules import RULES, Rule
from fedjax_clip import checks, files
from fedjax_clip.typing import InvalidInput

Entry = dict[str, Any]
PLAIN = Rule(lambda loss, threshold, client_lr, num_clients: fc.fedavg(loss, optax.sgd(client_lr)))


def define_flags() -> None:
    """Defines the flags; not on import, for other binaries have flags of the same names."""
    flags.DEFINE_list("tracks", None, "Problems to compare on; by default all whose data are here.")
    flags.DEFINE_list("rules", None, "Rules to compare; by default all.")
    flags.DEFINE_integer("seeds", 3, "Seeds of each threshold; a track may take more, or one if nothing is random.")
    flags.DEFINE_string("workdir", "runs/clipbench", "Where results and report are written.")
    flags.DEFINE_boolean("quick", False, "Few rounds, two thresholds and two seeds: to see that it runs.")


def main() -> None:
    """Runs what the flags say."""
    values = flags.FLAGS
    # Else the second run would report how long it takes to read a program, and not to compile it.
    binary.configure_jax(1)
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    stopping = binary.Stopping()
    rules = list(RULES) if values.rules is None else values.rules
    bench(values.tracks, rules, values.seeds, values.workdir, values.quick, stopping)
    stopping.leave()


def bench(
    tracks: Sequence[str] | None,
    rules: Sequence[str],
    seeds: int,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Runs each rule on each track, unless the working directory has it already, and writes the report.

    Tracks of ``None`` are all that can be had; a line says of each other one what it lacks.

    Returns:
      How many pairs of a track and a rule were run.

    Raises:
      InvalidInput: an unknown track or rule, no seeds, or a directory that cannot be written.
    """
    if tracks is not None:
        check_names("--tracks", "track", tracks, TRACKS)
    check_names("--rules", "rule", rules, RULES)
    checks.count("--seeds", seeds)
    found = _build_all() if tracks is None else [t for name in dict.fromkeys(tracks) for t in TRACKS[name]()]
    chosen = [t.quick() if quick else t for t in found]
    results = Results(files.expanded(workdir))
    names = tqdm.tqdm(dict.fromkeys(rules), desc="reading rules", unit="rule", leave=False, dynamic_ncols=True)
    programs = {name: fingerprint(probe(), RULES[name]) for name in names}
    problems = {t.name: fingerprint(t, PLAIN) for t in chosen}
    pairs = [
        (t, name, _config(t, RULES[name], seeds, quick) | {"rule": program, "problem": problems[t.name]})
        for t in chosen
        for name, program in programs.items()
    ]
    todo = [pair for pair in pairs if results.find(*pair) is None]
    bar = tqdm.tqdm(total=len(pairs), initial=len(pairs) - len(todo), unit="entry", dynamic_ncols=True)
    done = 0
    for track, name, config in todo:
        if should_stop():
            break
        bar.set_postfix_str(f"{track.name}: {name}")
        outcome = run(track, RULES[name], [math.inf if g is None else g for g in config["grid"]], config["seeds"])
        entry = {"track": track.name, "rule": name, "config": config, "diverged": outcome.diverged.tolist()}
        entry["measured"] = {k: numbers(x) for k, x in outcome.measured.items()}
        entry |= {"compile_seconds": outcome.compile_seconds, "run_seconds": outcome.run_seconds}
        results.add(entry)
        bar.update()
        done += 1
    bar.close()
    standings = []
    for track in chosen:
        entries = {name: results.find(t, name, config) for t, name, config in pairs if t is track}
        rows = [Standing.of(track, name, RULES[name], entry) for name, entry in entries.items() if entry]
        if rows:  # none yet, if it was stopped before
            standings.append((track, sorted(rows, key=lambda row: row.rank)))
    for track, rows in standings:
        picture = results.path / f"{file_name(track)}.png"
        rundir.save_picture(picture, draw(track, rows))
    files.write(results.path / "report.md", report(standings, quick))
    print(f"{done} run, {len(pairs) - len(todo)} found; see {results.path / 'report.md'}")
    return done


class Results:
    """``results.jsonl``: a line for each entry, on the disk as soon as it is there."""

    def __init__(self, path: pathlib.Path):
        self.path, self.file = path, path / "results.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            text = self.file.read_text() if self.file.exists() else ""
            whole = text[: text.rfind("\n") + 1]  # a kill may have come in the middle of the last line
            files.write(self.file, whole)
            self.entries: list[Entry] = [json.loads(line) for line in whole.splitlines()]
        except OSError as error:
            raise InvalidInput(f"--workdir: {path} cannot be written: {error.strerror}.") from None
        except ValueError:
            raise InvalidInput(f"--workdir: {self.file} holds something else than results; choose another.") from None

    def find(self, track: Track, rule: str, config: Mapping[str, Any]) -> Entry | None:
        """The entry of this configuration, if it is there."""
        same = (e for e in reversed(self.entries) if (e["track"], e["rule"], e["config"]) == (track.name, rule, config))
        return next(same, None)

    def add(self, entry: Entry) -> None:
        """Appends an entry."""
        line = json.dumps(entry, allow_nan=False)
        with rundir.appending(self.file) as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(json.loads(line))


def _build_all() -> list[Track]:
    tracks = []
    for name, build in TRACKS.items():
        try:
            tracks += build()
        except InvalidInput as error:
            print(f"Without the track {name}: {error}", file=sys.stderr)
    return tracks


def _config(track: Track, rule: Rule, seeds: int, quick: bool) -> dict[str, Any]:
    """What an entry depends on."""
    grid = list(track.thresholds if rule.grid is None else rule.grid)
    if quick:
        grid = [grid[len(grid) // 3], grid[2 * len(grid) // 3]] if len(grid) > 2 else grid
    fewest = 1 if quick else track.fewest_seeds
    return {
        "version": fc.__version__,
        "rounds": track.rounds,
        "cohort_size": track.cohort_size,
        "client_lr": track.client_lr,
        "work": dataclasses.asdict(track.work),
        "seeds": max(min(seeds, 2) if quick else seeds, fewest) if track.random else 1,
        "grid": [g if math.isfinite(g) else None for g in grid],
    }


def check_names(flag: str, kind: str, names: Sequence[str], valid: Mapping[str, Any]) -> None:
    """Refuses names that none has, and none at all."""
    if not names:
        raise InvalidInput(f"{flag}: give at least one {kind} of {', '.join(valid)}.")
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidInput(f"{flag}: unknown {kind} {name!r}{hint} (valid: {', '.join(valid)}).")


def numbers(values: np.ndarray) -> list[list[float | None]]:
    """``[T, S]`` as JSON has it: null for what is not finite."""
    return [[float(x) if np.isfinite(x) else None for x in row] for row in values]


def describe() -> str:
    """All tracks and rules, for ``--help``."""
    rules = [f"    {name:<18} {rule.note}" for name, rule in RULES.items()]
    return "\n".join(["Tracks:", f"    {', '.join(TRACKS)}", "Rules:", *rules])


if __name__ == "__main__":
    define_flags()
    binary.run(main, __doc__ or "", describe)
