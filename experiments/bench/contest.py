"""Tunes every rule on every track with the same number of trials, then measures it on other runs."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

import fedjax_clip as fc
from experiments.bench import tuning
from experiments.bench.entries import Entry, Results, numbers
from experiments.bench.lanes import Bank, fingerprint, plan, probe, run
from experiments.bench.rules import RULES, Rule
from experiments.bench.standings import Standing
from experiments.bench.tracks import Track
from fedjax_clip.core import checks, files
from fedjax_clip.core.types import InvalidInput


class Found(NamedTuple):
    """What a contest found.

    Attributes:
      path: the working directory, made.
      standings: of each track, the best rule first.
      done: pairs of a track and a rule that were run.
    """

    path: pathlib.Path
    standings: list[tuple[Track, list[Standing]]]
    done: int


def contest(
    tracks: Sequence[Track],
    rules: Mapping[str, Rule],
    trials: int | None,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Found:
    """Runs each rule on each track, unless the working directory has it already.

    Args:
      tracks, rules: what meets what.
      trials: points of its knobs that each rule may try; ``None``: as many as the track says.
      workdir: of ``results.jsonl``; what is there of the same programs, data and numbers is not run again.
      quick: few rounds, seeds and trials.
      should_stop: asked before each pair.

    Raises:
      InvalidInput: a number of trials that is no even one, a directory that cannot be written.
    """
    if trials is not None and checks.count("--trials", trials, 2) % 2:
        raise InvalidInput(
            f"--trials must be an even number of at least 2, not {trials}: they are tried in two stages."
        )
    chosen = [t if trials is None else dataclasses.replace(t, trials=trials) for t in tracks]
    chosen = [t.quick() if quick else t for t in chosen]
    results = Results(files.expanded(workdir))
    names = tqdm.tqdm(rules, desc="reading rules", unit="rule", leave=False, dynamic_ncols=True)
    programs = {name: fingerprint(probe(), rules[name]) for name in names}
    problems = {t.name: fingerprint(t, RULES["fedavg"]) for t in chosen}
    pairs = [
        (t, name, _config(t, rules[name]) | {"rule": program, "problem": problems[t.name]})
        for t in chosen
        for name, program in programs.items()
    ]
    todo = [pair for pair in pairs if results.find(*pair) is None]
    bar = tqdm.tqdm(total=len(pairs), initial=len(pairs) - len(todo), unit="entry", dynamic_ncols=True)
    done, banks = 0, Banks()
    for track, name, config in todo:
        if should_stop():
            break
        bar.set_postfix_str(f"{track.name}: {name}")
        results.add({"track": track.name, "rule": name, "config": config, **play(track, rules[name], banks)})
        bar.update()
        done += 1
    bar.close()
    standings = []
    for track in chosen:
        entries = {name: results.find(t, name, config) for t, name, config in pairs if t is track}
        rows = [Standing(track, name, rules[name], entry) for name, entry in entries.items() if entry]
        if rows:  # none yet, if it was stopped before
            standings.append((track, sorted(rows, key=lambda row: row.order)))
    print(f"{done} run, {len(pairs) - len(todo)} found; see {results.path / 'report.md'}")
    return Found(results.path, standings, done)


class Banks:
    """Planned runs, those of tuning first, of the last track that was asked for."""

    def __init__(self) -> None:
        self.track: Track | None = None
        self.found: dict[int, Bank] = {}

    def of(self, track: Track, fresh: int) -> Bank:
        """The track's runs, with so many fresh batches."""
        if track is not self.track:
            self.track, self.found = track, {}
        if fresh not in self.found:
            self.found[fresh] = plan(track, [*track.tuning, *track.measuring], fresh)
        return self.found[fresh]


def play(track: Track, rule: Rule, banks: Banks) -> Entry:
    """Tunes a rule on the track's runs for that, and measures its best point on the others."""
    bank, tuned = banks.of(track, rule.fresh), range(len(track.tuning))
    measured = range(len(tuned), bank.size)
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


def _config(track: Track, rule: Rule) -> dict[str, Any]:
    """What an entry depends on, but for programs and data."""
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


def build_tracks(names: Sequence[str] | None, registry: Mapping[str, Callable[[], list[Track]]]) -> list[Track]:
    """The tracks of these names; of ``None`` all that can be had, and a line for each other one says what it lacks."""
    if names is not None:
        return [t for name in dict.fromkeys(names) for t in registry[name]()]
    tracks = []
    for name, build in registry.items():
        try:
            tracks += build()
        except InvalidInput as error:
            print(f"Without the track {name}: {error}", file=sys.stderr)
    return tracks
