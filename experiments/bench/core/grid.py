"""The grid of tracks and rules: runs every pair that the results lack, after tuning each rule on the track."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from matplotlib.figure import Figure

import fedjax_clip as fc
from experiments.bench.core import picture, tuning
from experiments.bench.core.lanes import Bank, fingerprint, plan, probe, run
from experiments.bench.core.problem import Track
from experiments.bench.core.results import Entry, Results, numbers
from experiments.bench.core.rule import PLAIN, Rule
from experiments.bench.core.standing import Standing
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput

Standings = Sequence[tuple[Track, Sequence[Standing]]]  # of each track the rules, the best one first


class Cell(NamedTuple):
    """A pair of a track and a rule.

    Attributes:
      track, rule: the pair.
      name: the rule's, in the results.
      config: everything that the pair's result depends on; if it changes, the pair runs again.
    """

    track: Track
    name: str
    rule: Rule
    config: Mapping[str, Any]


class Found(NamedTuple):
    """The results of a grid's cells.

    Attributes:
      entries: of each cell; ``None`` where it has not been run.
      done: how many cells ran now.
    """

    entries: list[Entry | None]
    done: int


def cells(tracks: Sequence[Track], rules: Mapping[str, Rule]) -> list[Cell]:
    """Every rule on every track. A result depends on their numbers and on the programs that come of them."""
    small, programs = probe(), {}
    known: dict[Any, str] = {}
    for name, rule in tqdm.tqdm(rules.items(), desc="reading rules", unit="rule", leave=False, dynamic_ncols=True):
        key = rule.build, rule.fresh, rule.knobs, tuple(rule.fixed)  # fixed numbers change no program
        if key not in known:
            known[key] = _fingerprint(small, name, rule)
        programs[name] = known[key]
    found = []
    for track in tracks:
        problem = fingerprint(track, PLAIN)
        for name, program in programs.items():
            config = _config(track, rules[name]) | {"rule": program, "problem": problem}
            found.append(Cell(track, name, rules[name], config))
    return found


def fill(results: Results, grid: Sequence[Cell], should_stop: Callable[[], bool] = lambda: False) -> Found:
    """Runs the cells that the results lack, in order, and adds each to the results as soon as it is done.

    Args:
      results: of the working directory.
      grid: the cells, ordered by track, so that each track is planned once.
      should_stop: asked before each cell.
    """
    lacking = [cell for cell in grid if results.find(cell.track.name, cell.name, cell.config) is None]
    bar = tqdm.tqdm(total=len(grid), initial=len(grid) - len(lacking), unit="entry", dynamic_ncols=True)
    done, banks = 0, Banks()
    for track, name, rule, config in lacking:
        if should_stop():
            break
        bar.set_postfix_str(f"{track.name}: {name}")
        results.add({"track": track.name, "rule": name, "config": config, **play(track, rule, banks)})
        bar.update()
        done += 1
    bar.close()
    print(f"{done} run, {len(grid) - len(lacking)} found; see {results.path / 'report.md'}")
    return Found([results.find(cell.track.name, cell.name, cell.config) for cell in grid], done)


def standings(grid: Sequence[Cell], found: Found) -> Standings:
    """The rules on each track that have been run, the best one first; a track of none is left out."""
    rows: dict[int, tuple[Track, list[Standing]]] = {}
    for cell, entry in zip(grid, found.entries, strict=True):
        if entry:
            _, some = rows.setdefault(id(cell.track), (cell.track, []))
            some.append(Standing(cell.track, cell.name, cell.rule, entry))
    return [(track, sorted(some, key=lambda row: row.order)) for track, some in rows.values()]


def compare(
    tracks: Sequence[Track],
    rules: Mapping[str, Rule],
    workdir: files.PathLike,
    report: Callable[[Standings], str],
    draw: Callable[[Track, Sequence[Standing]], Figure],
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Runs every rule on every track, unless the working directory has it already, and writes the report.

    Args:
      tracks, rules: the grid.
      workdir: of the results and the report.
      report: what the standings look like in Markdown.
      draw: the picture of one track.
      should_stop: asked before each pair.

    Returns:
      The number of pairs that ran.

    Raises:
      InvalidInput: a directory that cannot be written, or that holds something else.
    """
    results = Results(workdir)  # first, so that an unwritable directory fails at once
    grid = cells(tracks, rules)
    found = fill(results, grid, should_stop)
    ranked = standings(grid, found)
    pictures = {picture.file_name(track.name): draw(track, rows) for track, rows in ranked}
    results.publish(report(ranked), pictures)
    return found.done


class Banks:
    """Planned runs, those of tuning first, of the last track that was asked for."""

    def __init__(self) -> None:
        self.track: Track | None = None
        self.found: dict[int, Bank] = {}

    def of(self, track: Track, fresh: int) -> Bank:
        """The track's runs, with this number of fresh batches."""
        if track is not self.track:
            self.track, self.found = track, {}
        if fresh not in self.found:
            self.found[fresh] = plan(track, [*track.tuning, *track.measuring], fresh)
        return self.found[fresh]


def play(track: Track, rule: Rule, banks: Banks) -> Entry:
    """Tunes a rule on the track's tuning runs, and measures its best point on the measuring runs.

    A rule with ``points`` is measured at all of them; ``"measured"`` then has an axis of points before that of runs.
    """
    bank, tuned = banks.of(track, rule.fresh), range(len(track.tuning))
    measured = range(len(tuned), bank.size)
    if rule.points:
        outcome = run(track, rule, rule.points, bank, measured)
        seconds = {"compile_seconds": outcome.compile_seconds, "run_seconds": outcome.run_seconds}
        return {"measured": {k: numbers(x) for k, x in outcome.measured.items()}, **seconds}
    lanes = max(track.trials // 2 * len(tuned), len(measured))
    spent = []

    def evaluate(points: Sequence[tuning.Point]) -> np.ndarray:
        outcome = run(track, rule, points, bank, tuned, lanes)
        spent.append(outcome)
        costs = track.cost(next(iter(outcome.measured.values())))
        return np.where(outcome.diverged, np.inf, costs).mean(axis=1)

    points, costs = tuning.search(rule.space(track.ranges), track.trials, evaluate)
    best = points[tuning.best(costs)]
    outcome = run(track, rule, [best], bank, measured, lanes)
    return {
        "trials": [{**point, "cost": cost} for point, cost in zip(points, numbers(costs), strict=True)],
        "best": dict(best),
        "measured": {k: numbers(x[0]) for k, x in outcome.measured.items()},
        "diverged": outcome.diverged[0].tolist(),
        "traffic": {k: numbers(x[0]) for k, x in outcome.traffic.items()},
        "compile_seconds": outcome.compile_seconds,
        "tune_seconds": sum(x.run_seconds for x in spent),
        "run_seconds": outcome.run_seconds / outcome.lanes,
    }


def _fingerprint(track: Track, name: str, rule: Rule) -> str:
    try:
        return fingerprint(track, rule)
    except (jax.errors.ConcretizationTypeError, InvalidInput) as error:
        causes = error, error.__cause__  # a function of --import's says itself what was raised in it
        if not any(isinstance(cause, jax.errors.ConcretizationTypeError) for cause in causes):
            raise
        raise InvalidInput(
            f"{name} makes a Python number of a knob: compute with jax.numpy, for all trials of a rule are one program."
        ) from error


def _config(track: Track, rule: Rule) -> dict[str, Any]:
    """All that an entry depends on, except programs and data."""
    space = rule.space(track.ranges)
    return {
        "version": fc.__version__,
        "rounds": track.rounds,
        "cohort_size": track.cohort_size,
        "work": dataclasses.asdict(track.work),
        "runs": [len(track.tuning), len(track.measuring)],
        "trials": track.trials,
        "space": {k: [r.low, r.high, r.log] for k, r in space.items()},
    } | ({"fixed": dict(rule.fixed)} if rule.fixed else {})
