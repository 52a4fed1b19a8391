"""Compares federated methods: algorithms x problems x seeds, each tuned with one budget, on one page.

  python -m experiments.bench.leaderboard --quick
  python -m experiments.bench.leaderboard
  python -m experiments.bench.leaderboard --problems="digits rotated" --methods="fedavg,ditto,ifca of 4"
  python -m experiments.bench.leaderboard --again=5

Each method tries as many points of its numbers as any other, drawn alike, on folds of the training examples. The best
is measured with other seeds, on examples and on clients that no trial has seen; each client's examples are judged by
the model that it uses. The working directory gets results.jsonl (a line for each method and problem, with a digest of
what was measured) and report.md. Stopped in any way, the same command goes on where it was. --again=N runs N of the
lines once more and compares digests.
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

import fedjax_clip as fc
from experiments.bench.contests import CONTESTS, Contest, start
from experiments.bench.core import command
from experiments.bench.core.results import Entry, Results, numbers
from experiments.bench.core.standing import LEVEL, interval
from experiments.bench.core.table import table
from experiments.bench.methods import METHODS, Method
from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput

TRIALS, FOLDS, TUNING, MEASURING = 8, 2, (1000,), (0, 1, 2, 3, 4)
MEASURES = ("examples/accuracy", "examples/accuracy_worst_tenth", "clients/accuracy")
BASE = "fedavg"


def define_flags() -> None:
    """Defines the flags."""
    command.define_flags("runs/leaderboard", "Few rounds, seeds and trials")
    command.define_names("problems", None, "Problems; by default all.")
    command.define_names("methods", None, "Methods; by default all.")
    flags.DEFINE_integer("trials", TRIALS, "Points that each method may try.")
    flags.DEFINE_integer("again", 0, "Of the lines that are there, how many to run again and compare.")


def main(values: flags.FlagValues, should_stop: command.ShouldStop) -> None:
    """Runs what the flags say."""
    problems = list(CONTESTS) if values.problems is None else values.problems
    methods = list(METHODS) if values.methods is None else values.methods
    if values.again:
        again(values.workdir, checks.count("--again", values.again))
        return
    bench(problems, methods, values.trials, values.workdir, values.quick, should_stop)


def bench(
    problems: Sequence[str],
    methods: Sequence[str],
    trials: int,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: command.ShouldStop = lambda: False,
) -> int:
    """Runs each method on each problem, unless the working directory has it already, and writes the report.

    Returns:
      The number of pairs that ran.

    Raises:
      InvalidInput: an unknown problem or method, no number of trials, a directory that cannot be written.
    """
    command.check_names("--problems", "problem", problems, CONTESTS)
    command.check_names("--methods", "method", methods, METHODS)
    checks.count("--trials", trials)
    results, ran, notes = Results(workdir), 0, {}
    settings = configuration(trials, quick)
    for problem in problems:
        contest = CONTESTS[problem]()
        notes[problem] = contest.note
        for name in methods:
            method = METHODS[name]
            if method.classifies and contest.calibrated is None:
                continue
            if should_stop():
                break
            if results.find(problem, name, settings) is None:
                results.add(run(problem, name, contest, method, settings))
                ran += 1
                told = results.entries[-1]
                print(f"{problem}: {name}: {_mean(told, MEASURES[0]):.4f} ({told['seconds']:.0f} s)", flush=True)
    found = {p: [e for m in methods if (e := results.find(p, m, settings))] for p in problems}
    results.publish(report(found, notes, settings), {})
    print(f"wrote {results.path / 'report.md'}")
    return ran


def configuration(trials: int, quick: bool) -> dict[str, Any]:
    """What a line depends on, besides the code."""
    if quick:
        return {"trials": min(trials, 2), "rounds": 2, "tuning": list(TUNING), "measuring": list(MEASURING[:2])}
    return {"trials": trials, "rounds": None, "tuning": list(TUNING), "measuring": list(MEASURING)}


def run(problem: str, name: str, contest: Contest, method: Method, settings: Mapping[str, Any]) -> Entry:
    """Tunes and measures a method on a problem; a line of the results."""
    began, rounds = time.perf_counter(), settings["rounds"] or contest.rounds
    work: dict[str, Any] = {"rounds": rounds, "batch_size": contest.batch_size, "local_steps": contest.steps}
    tried = fc.sweeping.random(settings["trials"], 0, **method.knobs)

    def sweep(points, **options):
        return fc.sweep(
            lambda hyper: method.build(contest, hyper),
            points,
            contest.data,
            lambda seed: start(contest, seed, method.several),
            contest.loss,
            **work,
            cohort_size=contest.cohort,
            summarise=fc.tasks.OverClients(lambda values, data: {}, ("accuracy",)),
            **options,
        )

    folds, score = fc.data.folds.examples(contest.data, FOLDS), "eval/fold/accuracy"
    trials = sweep(tried, seeds=settings["tuning"], folds=folds, score=score)
    best = fc.sweeping.rank(trials, score)[0]
    point = {k: float(x[best]) for k, x in tried.items()}
    ends = sweep({k: [x] for k, x in point.items()}, seeds=settings["measuring"], evaluation=contest.evaluation)
    measured = {m: [t.metrics[f"eval/{m}"] for t in ends] for m in MEASURES if f"eval/{m}" in ends[0].metrics}
    tuned = {point: float(np.mean(x)) for point, x in fc.sweeping.values(trials, score).items()}
    entry = {
        "track": problem,
        "rule": name,
        "config": settings,
        "best": point,
        "trials": numbers(np.array([tuned[p] for p in range(len(tuned))])),
        "measured": {k: numbers(np.array(x)) for k, x in measured.items()},
        "traffic": {
            k: float(np.mean([t.metrics[k] for t in ends])) / contest.cohort for k in ("bytes_up", "bytes_down")
        },
    }
    seconds = time.perf_counter() - began
    return entry | {"digest": digest(entry), "seconds": seconds}


def digest(entry: Mapping[str, Any]) -> str:
    """A hash of what was chosen and measured."""
    told = json.dumps({k: entry[k] for k in ("best", "trials", "measured", "traffic")}, sort_keys=True)
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def again(workdir: str | pathlib.Path, count: int) -> None:
    """Runs some of the lines once more, drawn at random, and says which digests differ.

    Raises:
      InvalidInput: a directory without lines; a digest that differs.
    """
    entries = Results(workdir).entries
    if not entries:
        raise InvalidInput(f"--again: {workdir} has no results: run the leaderboard first, without --again.")
    chosen = np.random.default_rng().permutation(len(entries))[:count]
    wrong = []
    for entry in (entries[i] for i in chosen):
        contest, method = CONTESTS[entry["track"]](), METHODS[entry["rule"]]
        new = run(entry["track"], entry["rule"], contest, method, entry["config"])
        same = new["digest"] == entry["digest"]
        print(f"{entry['track']}: {entry['rule']}: {'the same' if same else 'another'} digest", flush=True)
        wrong += [] if same else [entry]
    if wrong:
        raise InvalidInput(
            f"--again: {len(wrong)} of {len(chosen)} lines gave another digest: this is another version of the code, "
            "or another processor. Begin with a new --workdir to compare."
        )


def _values(entry: Entry, measure: str) -> np.ndarray:
    return np.array(entry["measured"].get(measure, [None]), float)


def _mean(entry: Entry, measure: str) -> float:
    return float(np.mean(_values(entry, measure)))


def report(found: Mapping[str, Sequence[Entry]], notes: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """The page in Markdown: a table for each problem, and the methods by their mean rank."""
    lines = ["# Leaderboard", "", *_how(settings)]
    if missing := [problem for problem in CONTESTS if not found.get(problem)]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    places: dict[str, list[float]] = {}
    for problem, entries in found.items():
        if not entries:
            continue
        rows = sorted(entries, key=lambda e: -np.nan_to_num(_mean(e, MEASURES[0]), nan=-1.0))
        for place, entry in enumerate(rows):
            places.setdefault(entry["rule"], []).append(place + 1)
        lines += ["", f"## {problem}", "", f"The clients: {notes[problem]}.", "", *_table(rows)]
    if len([entries for entries in found.values() if entries]) < 2:
        return "\n".join(lines) + "\n"
    whole = {name: of for name, of in places.items() if len(of) == max(map(len, places.values()))}
    ranked = sorted(whole, key=lambda name: float(np.mean(whole[name])))
    told = [[name, f"{np.mean(whole[name]):.1f}", ", ".join(f"{x:.0f}" for x in whole[name])] for name in ranked]
    lines += ["", "## Ranks over the problems", "", *table(["method", "mean rank", "by problem"], told)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Entry]) -> list[str]:
    """A row for each method, the best first."""
    base = next((e for e in rows if e["rule"] == BASE), None)
    head = [
        "",
        "method",
        "accuracy",
        f"minus {BASE}",
        "worst tenth",
        "new clients",
        "gradients",
        "up, B",
        "down, B",
        "s",
    ]
    shown = []
    for place, entry in enumerate(rows):
        centre, low, high = interval(_values(entry, MEASURES[0]))
        cells = [f"{place + 1}", entry["rule"], f"{centre:.4f} [{low:.4f}, {high:.4f}]"]
        cells += [_difference(entry, base, len(rows) - 1)]
        cells += [f"{_mean(entry, m):.4f}" if m in entry["measured"] else "–" for m in MEASURES[1:]]
        cells += [f"{METHODS[entry['rule']].gradients:g}"]
        cells += [f"{entry['traffic'][k]:,.0f}" for k in ("bytes_up", "bytes_down")]
        shown.append([*cells, f"{entry['seconds']:.0f}"])
    return table(head, shown)


def _difference(entry: Entry, base: Entry | None, comparisons: int) -> str:
    """The mean difference on the same seeds, with its corrected interval."""
    if base is None or entry is base:
        return "–"
    gain = _values(entry, MEASURES[0]) - _values(base, MEASURES[0])
    mean, low, high = interval(gain, LEVEL / max(1, comparisons))
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _how(settings: Mapping[str, Any]) -> list[str]:
    rounds = f"{settings['rounds']} rounds: too few to say" if settings["rounds"] else f"{Contest.rounds} rounds"
    tuning = ", ".join(map(str, settings["tuning"]))
    return [
        f"Each method tries {settings['trials']} points of its own numbers, drawn alike, on {FOLDS} folds of the "
        f"training examples with seed {tuning}. The best is measured with {len(settings['measuring'])} other seeds "
        f"({rounds}).",
        "",
        "**Accuracy** is that of examples which were held out of the training clients, each judged by the model that "
        "its client uses: the mean over seeds with its 95% interval. *Minus fedavg*: the difference on the same seeds. "
        "Its interval is corrected by Bonferroni for all methods of the table. *Worst tenth*: the mean accuracy of the "
        "worst tenth of the clients, at least one. *New clients* never trained, and use the server's model. "
        "*Gradients*: of a round, FedAvg's being 1; a pass without gradients counts a third. Bytes are of a client and "
        "round. Seconds are of tuning and measuring together, on a machine with other work.",
    ]


def describe() -> str:
    """All problems and methods, for ``--help``."""
    rows = [f"    {name:<24} {(make.__doc__ or '').splitlines()[0]}" for name, make in CONTESTS.items()]
    knobs = [f"    {name:<24} tunes {', '.join(method.knobs)}; {method.note}" for name, method in METHODS.items()]
    return "\n".join(["Problems:", *rows, "Methods:", *knobs])


if __name__ == "__main__":
    define_flags()
    command.run(main, __doc__ or "", describe)
