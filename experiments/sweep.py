"""Trains a grid or a random set of hyper-parameters, with every seed and on every fold, as one compiled program.

  python -m experiments.sweep --client="clip_by_global_norm({clip})|sgd({lr})" \\
    --points="grid(lr=log(0.01, 10, 7), clip=(0.1, 1, inf))" --rounds=100
  python -m experiments.sweep --server="sgd({rate}, momentum={momentum})" --folds=5 \\
    --points="random(30, rate=log(0.1, 10), momentum=linear(0, 0.95))"

The flags are those of experiments.run; a number in --algorithm, --client, --server or --uplink may be {name}. The run
directory gets results.jsonl (a line for each training), table.md, sweep.png and best.flags, which experiments.run takes
as --flagfile. If a sweep is stopped in any way, the same command runs the missing trainings.
"""

import dataclasses
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.stats
import tqdm
from absl import flags

import fedjax_clip as fc
from experiments.config import binary, outside, privacy, problem, registry, rundir, spec, terminal
from fedjax_clip import tasks
from fedjax_clip.core import checks, files
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.folds import Fold
from fedjax_clip.training import sweeping
from fedjax_clip.training.metric import named
from fedjax_clip.training.processes import Processes
from fedjax_clip.training.sweeping import Range, Trial

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "points", None, "What to try: grid(lr=log(0.01, 1, 8), clip=(1, inf)) or random(30, lr=log(0.01, 1))."
)
flags.DEFINE_integer("seeds", 1, "Seeds of each point: --seed and those that follow it.")
flags.DEFINE_integer("folds", 0, "Folds of cross-validation; without, points are compared on the task's held-out sets.")
flags.DEFINE_enum(
    "fold_over", "clients", ["clients", "examples"], "What is held out in a fold: clients, or examples of all."
)
flags.DEFINE_integer("halving", None, "Successive halving: after a few rounds the best 1/halving of the points go on.")
flags.DEFINE_integer("points_per_chunk", None, "Points that a device trains at once; by default what fits.")

MOST_POINTS = 10_000
SWEPT = ("algorithm", "client", "server", "uplink", "downlink")
PROBLEM = (
    *("task", *SWEPT, "local_epochs", "local_steps", "batch_size", "reducer", "sampler", "cohort_size"),
    *("compute_dtype", "rounds", "seed"),
)
IDENTITY = (*PROBLEM, "points", "seeds", "folds", "fold_over", "halving", "metric")
UNUSED = (
    *("eval_every", "checkpoint_every", "rounds_per_dispatch", "clients_per_chunk"),
    *("delta", "target_epsilon", "private_seed", "private_metrics"),
)


def log(low: float, high: float, num: int | None = None) -> Any:
    """``num`` numbers with equal ratios, to three digits; or a range for ``random`` with a uniform logarithm."""
    if not 0 < low < high < math.inf:
        raise InvalidInput(f"log needs 0 < low < high, not {low} and {high}")
    return Range(low, high, log=True) if num is None else _rounded(np.geomspace(low, high, _points(num)))


def linear(low: float, high: float, num: int | None = None) -> Any:
    """``num`` numbers at equal distances, to three digits; or a range for ``random`` to draw from uniformly."""
    return Range(low, high) if num is None else _rounded(np.linspace(low, high, _points(num)))


def grid(**values: Any) -> dict[str, np.ndarray]:
    """All combinations."""
    if ranges := [name for name, x in values.items() if isinstance(x, Range)]:
        raise InvalidInput(f"a grid needs values: how many of {ranges[0]}, as in log(0.01, 1, 8)")
    columns = {name: np.atleast_1d(np.asarray(x, np.float64)) for name, x in values.items()}
    if wrong := [name for name, x in columns.items() if x.ndim > 1 or not x.size]:
        raise InvalidInput(f"a grid needs one value or more of {wrong[0]}, as in (0.1, 1)")
    _points(math.prod(len(x) for x in columns.values()))
    return sweeping.grid(**columns)


def random(num_points: int, seed: int = 0, **ranges: Any) -> dict[str, np.ndarray]:
    """Independent draws, to three digits."""
    if values := [name for name, x in ranges.items() if not isinstance(x, Range)]:
        raise InvalidInput(f"a random search needs ranges: {values[0]} is none, as log(0.01, 1) would be")
    num_points, seed = _points(num_points), checks.seed("seed", seed)
    return {name: _rounded(x) for name, x in sweeping.random(num_points, seed, **ranges).items()}


def _points(number: Any) -> int:
    return checks.count("the number of points", number, most=MOST_POINTS)


POINTS: Mapping[str, Callable[..., dict[str, np.ndarray]]] = {"grid": grid, "random": random}
SPACINGS: Mapping[str, Callable[..., Any]] = {"linear": linear, "log": log}


def main() -> None:
    """Runs the sweep of the flags."""
    problem.check_numbers()
    check_numbers()
    points = read_points()
    binary.configure_jax(FLAGS.devices, FLAGS.distributed)
    processes = Processes(jax.devices())
    processes.agree(problem.told())
    with processes.together():
        outside.load()
        task = problem.read_task()
        first = {name: float(values[0]) for name, values in points.items()}
        seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
        folds = getattr(fc.data.folds, FLAGS.fold_over)(task.data, FLAGS.folds) if FLAGS.folds else []
        smallest = min((fold.split(task.data)[0] for fold in folds), key=lambda d: d.num_clients, default=task.data)
        cohort_size = problem.cohort_size(dataclasses.replace(task, data=smallest))
        if cohort_size != (whole := problem.cohort_size(task)):
            print(
                f"The smallest fold trains {cohort_size} clients: cohorts are of {cohort_size}, not {whole}.",
                file=sys.stderr,
            )
        sampler = problem.sampler(cohort_size)
        if not isinstance(sampler, fc.data.sampling.Sampler):
            raise InvalidInput(
                f"--sampler={FLAGS.sampler} is a clock, and a sweep has none: leave it to experiments.run."
            )

        def build(hyper: Mapping[str, Any]) -> fc.extend.Algorithm:
            uplink = privacy.chain(FLAGS.uplink, None, hyper)
            return problem.build_algorithm(task, uplink, cohort_size, hyper)

        metric = chosen_metric(task, folds, build(first))  # fails now if the flags are wrong
        config = problem.config(IDENTITY) | {"cohort_size": cohort_size}
        opened = SweepFollower if processes.number else SweepDirectory
        directory = opened(FLAGS.workdir or f"{rundir.default_path(config)}-sweep", config, processes=processes)

        devices = problem.local_devices()
        stops, kept = sweeping.rungs(FLAGS.rounds, len(points[next(iter(points))]), FLAGS.halving)
        lanes = len(seeds) * max(1, len(folds))
        todo = sum(n * (b - a) for n, a, b in zip(kept, [0, *stops], stops)) * lanes
        about = terminal.describe(task, cohort_size, problem.initial(task, 0), devices)
    if processes.count > 1:
        about += f" in each of {processes.count} processes"
    print(f"{about}, {kept[0] * lanes} trainings", file=sys.stderr)
    problem.say_what_clips_bound()
    stopping = binary.Stopping(told=True)
    with directory:
        with processes.together():
            done = directory.trials() if processes.number == 0 else []
        done = [Trial(*trial) for trial in processes.first(done)]
        progress = Progress(todo // processes.count, sum(_gained(t, stops) for t in done) // processes.count)
        trials = fc.sweep(
            build,
            points,
            task.data,
            lambda seed: problem.initial(task, seed),
            task.per_example_loss,
            task.evaluation,
            rounds=FLAGS.rounds,
            seeds=seeds,
            folds=folds,
            halving=FLAGS.halving,
            score=metric,
            summarise=task.summarise,
            sampler=sampler,
            **problem.local_work(),
            done=done,
            on_trial=lambda trial: directory.add_trial(trial, points),
            on_rounds=progress,
            should_stop=stopping,
            devices=devices,
            points_per_chunk=FLAGS.points_per_chunk,
        )
        progress.close()
        stopped = int(processes.most(stopping.signal or 0))
        with processes.together():
            if processes.number == 0:
                directory.trials()
                if trials:
                    directory.report(points, trials, metric)
                if stopped:
                    print(f"Stopped after {len(trials)} trainings; the same command goes on from there.")
                else:
                    print(summary(points, trials, metric, directory))
        if stopped:
            sys.exit(128 + stopped)


def check_numbers() -> None:
    """Refuses numbers that no sweep can have."""
    for name, least in (("seeds", 1), ("folds", 0), ("halving", 2), ("points_per_chunk", 1)):
        if FLAGS[name].value is not None:
            checks.count(f"--{name}", FLAGS[name].value, least, MOST_POINTS)
    checks.seed("--seed + --seeds - 1, the last seed,", FLAGS.seed + FLAGS.seeds - 1)
    if FLAGS.folds == 1:
        raise InvalidInput("--folds=1 would leave nothing to train on: give 2 or more, or none.")
    if FLAGS["fold_over"].present and not FLAGS.folds:
        raise InvalidInput("--fold_over says nothing without --folds.")


def read_points() -> dict[str, np.ndarray]:
    """The points of ``--points``. Each of its names must be the ``{name}`` of a component, and vice versa."""
    if FLAGS.points is None:
        raise InvalidInput('--points is missing: what to try, as in "grid(lr=log(0.01, 1, 8))".')
    points = spec.one(FLAGS.points, POINTS, "--points", nested=SPACINGS)
    wanted = set().union(*(spec.placeholders(str(FLAGS[name].value), f"--{name}") for name in SWEPT))
    for name in points:
        if name not in wanted:
            flags_ = ", ".join(f"--{flag}" for flag in SWEPT)
            raise InvalidInput(f"--points: {name} is nowhere used: write {{{name}}} for a number in one of {flags_}.")
    for name in sorted(wanted - set(points)):
        raise InvalidInput(f"--points: {{{name}}} is given no values.")
    if not points:
        raise InvalidInput("--points names no hyper-parameter.")
    return points


def chosen_metric(task: tasks.Task, folds: Sequence[Fold], algorithm: fc.extend.Algorithm) -> str:
    """``--metric``, or the accuracy if the loss reports one, on the fold or the task's first held-out set."""
    sets = {"fold": folds[0].split(task.data)[1]} if folds else {}
    if not (sets := sets | dict(task.evaluation)):
        raise InvalidInput(f"--task: {FLAGS.task} holds nothing out to compare points on: give --folds.")
    names = problem.scores(task, sets, algorithm)
    if FLAGS.metric is not None:
        return named(FLAGS.metric, names).name
    first = f"eval/{next(iter(sets))}"
    return f"{first}/accuracy" if f"{first}/accuracy" in names else f"{first}/loss"


class Progress:
    """A bar of rounds, summed over all trainings; it appears with the first."""

    def __init__(self, total: int, initial: int):
        self.options: dict[str, Any] = {"total": total, "initial": initial, "unit": "round"}
        self.bar: tqdm.tqdm | None = None

    def __call__(self, rounds: int) -> None:
        self.bar = self.bar or tqdm.tqdm(**self.options, dynamic_ncols=True, mininterval=0.2)
        self.bar.update(rounds)

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()


class SweepDirectory(rundir.RunDirectory):
    """A run directory whose rows are trainings, each of them one line of ``results.jsonl``."""

    def trials(self) -> list[Trial]:
        """All whole lines on disk; those that other processes wrote move to ``results.jsonl``."""
        file, others = self.path / "results.jsonl", sorted(self.path.glob("results.*.jsonl"))
        found = file.read_bytes().decode("utf-8", "replace") if file.exists() else ""
        texts = [found, *(other.read_bytes().decode("utf-8", "replace") for other in others)]
        # A kill may have cut a last line short, or left what has moved already.
        whole = "".join(dict.fromkeys(x for text in texts for x in text.splitlines(keepends=True) if x.endswith("\n")))
        try:
            entries = [json.loads(line) for line in whole.splitlines()]
            trials = [Trial(int(e["point"]), int(e["seed"]), int(e["fold"]), _restored(e["metrics"])) for e in entries]
            if any("round" not in trial.metrics for trial in trials):
                raise KeyError("round")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InvalidInput(
                f"{file} is damaged: put it back, or remove {self.path} to train all points anew."
            ) from None
        if whole != found:
            files.write(file, whole)
        for other in others:
            other.unlink()
        return trials

    def add_trial(self, trial: Trial, points: Mapping[str, np.ndarray]) -> None:
        """Appends a training, in several processes to a file of this process's."""
        self.record()
        metrics = {name: x if math.isfinite(x) else None for name, x in trial.metrics.items()}
        entry = trial._asdict() | {"values": _point(points, trial.point), "metrics": metrics}
        name = f"results.{self.processes.number}.jsonl" if self.processes.number else "results.jsonl"
        with rundir.appending(self.path / name) as file:
            file.write(json.dumps(entry) + "\n")

    def report(self, points: Mapping[str, np.ndarray], trials: list[Trial], metric: str) -> None:
        """Writes the table, the picture and the best point's flags."""
        files.write(self.path / "table.md", table(points, trials, metric))
        values = sweeping.values(trials, metric)
        picture = fc.plots.sweep(points, values, metric, f"{FLAGS.task}    {FLAGS.client}")
        rundir.save_picture(self.path / "sweep.png", picture)
        first = sweeping.rank(trials, metric)[0]
        best, score = _point(points, first), _interval(values[first])
        lines = [f"# {command(self.path)}"]
        lines.append(f"# The best of {len(values)} points by {metric}, {score}: {_shown(best)}.")
        for name in (*PROBLEM, "scores"):
            value = self.config.get(name)
            if value not in (None, ""):
                lines.append(f"--{name}={_filled(value, best) if name in SWEPT else value}")
        files.write(self.path / "best.flags", "\n".join(lines) + "\n")


class SweepFollower(rundir.Follower, SweepDirectory):
    """The directory as the other processes have it: their trainings come from here, and nothing else."""


def table(points: Mapping[str, np.ndarray], trials: list[Trial], metric: str) -> str:
    """The points, best first, in Markdown: mean and 95% interval of each evaluated metric over seeds and folds."""
    measured = sorted(n for n in trials[0].metrics if n.startswith("eval/") and n.count("/") == 2)
    names = [metric, *(n for n in measured if n != metric)]  # of more parts, it is one client's
    columns = {name: sweeping.values(trials, name) for name in names}
    reached = sweeping.values(trials, "round")
    lines = ["| " + " | ".join([*points, "rounds", *names]) + " |", "|" + "---|" * (len(points) + 1 + len(names))]
    for p in sweeping.rank(trials, metric):
        cells = [*_point(points, p).values(), f"{reached[p][0]:.0f}", *(_interval(columns[name][p]) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    note = "Mean over seeds and folds, with a 95% interval (Student's t) where there are several."
    if FLAGS.folds:
        note += " Folds share training data, so the interval is somewhat too narrow."
    return "\n".join([*lines, "", note]) + "\n"


def summary(points: Mapping[str, np.ndarray], trials: list[Trial], metric: str, directory: SweepDirectory) -> str:
    """The best points, and where to look next."""
    values, best = sweeping.values(trials, metric), sweeping.rank(trials, metric)
    lines = [f"{metric}  {_interval(values[p]):<28} at  {_shown(_point(points, p))}" for p in best[:3]]
    lines.append(f"run directory  {directory.path}: table.md, sweep.png, results.jsonl")
    return "\n".join([*lines, f"the best       {command(directory.path)}"])


def command(path: pathlib.Path) -> str:
    """The command that trains the best point; it repeats ``--import``, which a flag file may not hold."""
    modules = outside.modules()
    imports = f" --import={','.join(modules)}" if modules else ""
    return f"python -m experiments.run{imports} --flagfile={path / 'best.flags'}"


def _gained(trial: Trial, stops: list[int]) -> int:
    """The rounds of a training since the previous rung."""
    rung = stops.index(int(trial.metrics["round"]))
    return stops[rung] - (stops[rung - 1] if rung else 0)


def _interval(values: list[float]) -> str:
    mean, count = np.mean(values), len(values)
    if count == 1 or not math.isfinite(mean):
        return f"{mean:.4g}"
    half = scipy.stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return f"{mean:.4g} ± {half:.2g}"


def _point(points: Mapping[str, np.ndarray], point: int) -> dict[str, str]:
    """A point's values as flags: exactly the float32 numbers of its training."""
    return {name: str(np.float32(values[point])) for name, values in points.items()}


def _shown(point: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in point.items())


def _filled(text: str, point: Mapping[str, str]) -> str:
    return re.sub(r"\{\s*(\w+)\s*\}", lambda match: point[match[1]], text)


def _restored(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if x is None else x for name, x in metrics.items()}


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.array([float(f"{x:.3g}") for x in values])


def describe() -> str:
    """The forms of ``--points``, and every component with its arguments, for ``--help``."""
    return f"""--points
    grid(name=(1, 2, 4), name=log(0.01, 1, 8), name=linear(0, 1, 5))
    random(30, name=log(0.01, 1), name=linear(0, 1), seed=0)

{registry.describe()}"""


if __name__ == "__main__":
    binary.run(main, __doc__ or "", describe, without=UNUSED)
