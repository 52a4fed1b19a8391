"""Many trainings that differ in float hyper-parameters, seeds and folds, as one compiled program."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import Algorithm, InvalidInput, Params, PerExampleLoss, PyTree
from fedjax_clip.data import sampling, speeds
from fedjax_clip.data.folds import Fold
from fedjax_clip.data.planning import LocalWork
from fedjax_clip.data.population import FederatedData, check_fields, check_sets, check_whole
from fedjax_clip.training import placement
from fedjax_clip.training.lanes import Build, Lane, Lanes, plan
from fedjax_clip.training.loop import Row
from fedjax_clip.training.metric import Metric
from fedjax_clip.training.processes import Processes
from fedjax_clip.training.scores import Summary

Points = Mapping[str, Sequence[float] | np.ndarray]

CHUNK_BYTES = (
    2**15
)  # on a CPU, as many points at once as have parameters of this size; a loop over larger ones is faster
COPIES = 32  # on other devices, we assume that a point needs memory for this many copies of its parameters


class Trial(NamedTuple):
    """One training of a sweep.

    Attributes:
      point: which of the points.
      seed: its seed.
      fold: which of the folds; 0 if there are none.
      metrics: its last row, as ``fc.train`` would give it: ``round``, the algorithm's metrics, ``eval/...``.

    Example:
      >>> fc.sweeping.Trial(point=3, seed=0, fold=0, metrics={"eval/examples/loss": 0.5}).point
      3
    """

    point: int
    seed: int
    fold: int
    metrics: Row


def grid(**values: Sequence[float] | np.ndarray) -> dict[str, np.ndarray]:
    """All combinations of the values, the last name's changing fastest.

    Returns:
      ``{name: [P]}``, P the product of the numbers of values.

    Example:
      >>> {name: x.tolist() for name, x in fc.sweeping.grid(lr=[0.1, 1.0], clip=[1.0, 2.0]).items()}
      {'lr': [0.1, 0.1, 1.0, 1.0], 'clip': [1.0, 2.0, 1.0, 2.0]}
    """
    columns = np.meshgrid(*(np.asarray(v, np.float64) for v in values.values()), indexing="ij")
    return {name: column.ravel() for name, column in zip(values, columns)}


class Range(NamedTuple):
    """A range that ``random`` draws from: uniformly between two numbers, or with a uniform logarithm.

    Example:
      >>> points = fc.sweeping.random(20, lr=fc.sweeping.Range(0.01, 1.0, log=True))
    """

    low: float
    high: float
    log: bool = False


def random(num_points: int, seed: int = 0, **ranges: Range) -> dict[str, np.ndarray]:
    """``num_points`` independent draws of every hyper-parameter.

    Better than a grid where few of the hyper-parameters matter: each value of each is tried once.

    Args:
      num_points: P.
      seed: of the draws.
      ranges: ``Range(low, high)``, or ``Range(low, high, log=True)`` for a uniform logarithm.

    Example:
      >>> points = fc.sweeping.random(20, lr=fc.sweeping.Range(0.01, 1.0, log=True), clip=fc.sweeping.Range(0.5, 2.0))

    Source: Bergstra and Bengio (2012), "Random Search for Hyper-Parameter Optimization".
    """
    num_points = checks.count("num_points", num_points)
    rng, drawn = np.random.default_rng(checks.seed("seed", seed)), {}
    for name, (low, high, log) in ranges.items():
        if not -math.inf < low < high < math.inf or (log and low <= 0):
            raise InvalidInput(f"{name} is drawn from {low} to {high}: that is no range{' above zero' * log}.")
        u = rng.uniform(size=num_points)
        drawn[name] = low * (high / low) ** u if log else low + (high - low) * u
    return drawn


@jax.transfer_guard("allow")  # the driver's transfers to the devices are intended
def sweep(
    build: Build,
    points: Points,
    data: FederatedData,
    params: Params | Callable[[int], Params],
    per_example_loss: PerExampleLoss,
    evaluation: Mapping[str, FederatedData] | None = None,
    *,
    rounds: int,
    seeds: Sequence[int] = (0,),
    folds: Sequence[Fold] = (),
    halving: int | None = None,
    score: str = "eval/fold/loss",
    summarise: Summary | None = None,
    cohort_size: int | None = None,
    sampler: sampling.Sampler | None = None,
    batch_size: int | speeds.BatchSizes | None = 20,
    local_epochs: int = 1,
    local_steps: int | None = None,
    shuffle: bool = True,
    done: Iterable[Trial] = (),
    on_trial: Callable[[Trial], None] = lambda trial: None,
    on_rounds: Callable[[int], None] = lambda rounds: None,
    should_stop: Callable[[], bool] = lambda: False,
    devices: Sequence[jax.Device] | None = None,
    points_per_chunk: int | None = None,
) -> list[Trial]:
    """Trains every point with every seed on every fold: one program, compiled once.

    Each trial is what ``fc.train(build(point), fold's training data, params, seed=seed, ...)`` gives, up to rounding:
    the same cohorts, batches and keys. The program trains a chunk of points side by side; devices work
    on chunks of their own, and chunks follow each other.

    After ``jax.distributed.initialize``, the trials are dealt to the processes, which are to be given the same
    arguments. Each process trains its own trials on its local devices. At each rung and at the end they wait for each
    other, and then all have all trials.

    Args:
      build: ``hyper -> algorithm``. ``hyper`` has a point's values by name, traced, and ``num_clients``, the size of
        the population trained on.
      points: ``{name: [P]}``, see ``grid`` and ``random``.
      data: the training population; it lives on every device.
      params: initial parameters, or a function ``seed -> params``.
      per_example_loss: the loss that the evaluation measures.
      evaluation: populations by name, in which every trial is evaluated at its end: ``eval/name/loss`` ... Where an
        algorithm's clients have models of their own, each one's examples are judged by its own, as by ``fc.evaluator``.
      rounds: rounds of a trial.
      seeds: of everything random.
      folds: see ``fc.data.folds``; a trial trains on its fold's ``train`` and is evaluated on its ``held_out`` as well,
        under ``eval/fold/...``.
      halving: eta of successive halving, if given. At each rung the best 1/eta of the points go on, until they have
        trained eta times as many rounds in all; see ``rungs``.
      score: the metric whose mean over seeds and folds ranks the points; see ``fc.extend.metrics.higher_is_better``.
      summarise: scores that are not means, as for ``fc.evaluator``; the host computes them at the end of each trial.
      cohort_size, sampler, batch_size, local_epochs, local_steps, shuffle, devices: as ``fc.train``.
      done: trials of an earlier call that was stopped; they are not run again.
      on_trial: called with each trial once it is done, by the process that trained it.
      on_rounds: called after each dispatch with the number of rounds that were trained, summed over its trials.
      should_stop: asked after each dispatch; if true, the trials done so far are returned. Of several processes, each
        goes on with its own trials up to the next rung, unless it is told to stop, too.
      points_per_chunk: points that a device trains at once. By default, on a CPU: one, or more while their parameters
        fit into 32 KiB. On other devices: as many as fit into a quarter of the memory.

    Returns:
      The trials, ordered by point, seed and fold; with ``halving`` those of all rungs: points that were given up
      ended at the ``round`` that their metrics say.

    Raises:
      InvalidInput: a point that ``build`` refuses, a cohort larger than a fold's population ...

    Example:
      >>> points = fc.sweeping.grid(lr=[0.01, 0.1, 1.0], clip=[0.1, 1.0, np.inf])
      >>> def build(hyper):
      ...   client_tx = optax.chain(fc.clipping.clip_by_global_norm(hyper["clip"]), optax.sgd(hyper["lr"]))
      ...   return fc.fedavg(per_example_loss, client_tx)
      >>> trials = fc.sweep(build, points, data, params, per_example_loss, {"examples": held_out}, rounds=5)

    Source of the halving: Jamieson and Talwalkar (2016), "Non-stochastic Best Arm Identification and Hyperparameter
    Optimization", Algorithm 1.
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    check_whole("data", data)
    check_fields(data)
    check_sets("evaluation", evaluation or {})
    checks.kind("sampler", sampler, sampling.Sampler | None, "one of fc.data.sampling (a sweep has no clock)")
    checks.kind("points", points, Mapping, "values by name, such as fc.sweeping.grid(lr=[0.1, 1.0])")
    checks.takes("build", build, 1, "a point's values by name")
    checks.kind("folds", folds, Iterable, "a list such as fc.data.folds.clients(data, 5)")
    for name, values in points.items():
        for value in np.ravel(np.asarray(values, object)):
            checks.number(f"points: {name}", value)
    columns = {name: np.asarray(values, np.float32) for name, values in points.items()}
    num_points, begins = _check_points(columns, build, data.num_clients)
    rounds = checks.count("rounds", rounds)
    checks.kind("seeds", seeds, Iterable, "a list of them")
    seeds = [checks.seed("A seed", seed) for seed in seeds]
    if not seeds:
        raise InvalidInput("A sweep needs at least one seed.")
    if sampler is None:
        sampler = sampling.uniform(data.num_clients if cohort_size is None else cohort_size)
    elif cohort_size is not None:
        raise InvalidInput("cohort_size and sampler both say how many clients take part: give one of them.")
    work = LocalWork(batch_size, local_epochs, local_steps, shuffle)
    devices = placement.local(devices)
    processes = Processes(jax.devices())
    stops, kept = rungs(rounds, num_points, halving)
    plans = plan(data, folds, seeds, params, sampler, work, stops, begins, evaluation or {})
    if points_per_chunk is not None:
        points_per_chunk = checks.count("points_per_chunk", points_per_chunk)
    widest = points_per_chunk or _widest(next(iter(plans.values())).stream.params, devices)
    width = _width(widest, len(plans), [-(-count // processes.count) for count in kept], len(devices))
    running = Lanes(build, columns, plans, data, per_example_loss, evaluation or {}, devices, width, folds, summarise)

    known = {(*t[:3], t.metrics["round"]): t for t in done}
    lanes = [Lane(*lane) for lane in itertools.product(range(num_points), seeds, range(max(1, len(folds))))]
    own = set(_dealt(lanes, num_points, processes))
    trials: list[Trial] = []
    states: dict[Lane, PyTree] = {}
    for rung, stop in enumerate(stops):
        left = [lane for lane in lanes if (*lane, stop) not in known]
        ended, stopped = [], False
        with processes.together():
            for group in running.deal([lane for lane in left if lane in own]):
                rows = running.run(group, states, stop, stop < rounds, on_rounds, should_stop)
                for lane, row in (rows or {}).items():
                    ended.append(Trial(*lane, {"round": float(stop), **row}))
                    on_trial(ended[-1])
                if stopped := rows is None or should_stop():
                    break
        ended = [Trial(*trial) for told in processes.tell(json.dumps(ended)) for trial in json.loads(told)]
        trials += [known[*lane, stop] for lane in lanes if (*lane, stop) in known] + ended
        if processes.any(stopped):
            break
        if stop < rounds:
            best = set(rank([t for t in trials if t.metrics["round"] == stop], score)[: kept[rung + 1]])
            lanes = [lane for lane in lanes if lane.point in best]
    return sorted(trials, key=_order)


def _dealt(lanes: Sequence[Lane], num_points: int, processes: Processes) -> list[Lane]:
    """The lanes of this process: as many points with each seed and fold as any other process has.

    Points are dealt at random, or halving might leave only those of one process.
    """
    place = np.random.default_rng(0).permutation(num_points)
    turn = {stream: i for i, stream in enumerate(dict.fromkeys(lane[1:] for lane in lanes))}
    return [lane for lane in lanes if (place[lane.point] + turn[lane[1:]]) % processes.count == processes.number]


def rungs(rounds: int, num_points: int, halving: int | None) -> tuple[list[int], list[int]]:
    """The rounds at which successive halving drops points, and how many points train up to each.

    Returns:
      ``(stops, kept)``; without halving ``([rounds], [num_points])``. The first stop is at a tenth of the rounds or
      later.

    Example:
      >>> fc.sweeping.rungs(100, 64, 2)
      ([13, 25, 50, 100], [64, 32, 16, 8])
    """
    rounds, num_points = checks.count("rounds", rounds), checks.count("num_points", num_points)
    if halving is None:
        return [rounds], [num_points]
    halving = checks.count("halving", halving, 2)
    steps = 0
    # No rung comes before a tenth of the rounds, and each keeps one point or more.
    while halving ** (steps + 1) <= min(10, num_points, rounds):
        steps += 1
    back = [halving**k for k in range(steps, -1, -1)]
    return [-(-rounds // b) for b in back], [-(-num_points // halving**k) for k in range(steps + 1)]


def values(trials: Iterable[Trial], metric: str) -> dict[int, list[float]]:
    """Each point's values of a metric, over seeds and folds, at the last round that the point reached.

    A seed and fold in which no point has a number, as the AUROC of a fold with one class, is left out.

    Raises:
      InvalidInput: a metric that the trials do not have.

    Example:
      >>> trials = [fc.sweeping.Trial(0, seed, 0, {"round": 9.0, "loss": 0.5 + seed}) for seed in (0, 1)]
      >>> fc.sweeping.values(trials, "loss")
      {0: [0.5, 1.5]}
    """
    found: dict[int, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.point, []).append(trial)
        if metric not in trial.metrics:
            raise InvalidInput(f"There is no metric {metric!r}; there is {', '.join(sorted(trial.metrics))}.")
    last = {point: max(t.metrics["round"] for t in ts) for point, ts in found.items()}
    kept = {p: [t for t in ts if t.metrics["round"] == last[p]] for p, ts in found.items()}
    known = {t[1:3] for ts in kept.values() for t in ts if not math.isnan(t.metrics[metric])}
    return {p: [t.metrics[metric] for t in ts if t[1:3] in known or not known] for p, ts in kept.items()}


def rank(trials: Sequence[Trial], metric: str) -> list[int]:
    """The points, best mean first. Dropped points come after the others, and NaN comes after every number.

    Args:
      trials: what ``sweep`` returned.
      metric: the metric to compare by; see ``fc.extend.metrics.higher_is_better``.

    Example:
      >>> trials = [fc.sweeping.Trial(point, 0, 0, {"round": 9.0, "loss": 1.0 - point}) for point in (0, 1)]
      >>> fc.sweeping.rank(trials, "loss")
      [1, 0]
    """
    means = {point: float(np.mean(x)) for point, x in values(trials, metric).items()}
    last = {trial.point: trial.metrics["round"] for trial in sorted(trials, key=_order)}
    return sorted(means, key=lambda p: (-last[p], float(Metric(metric).cost(means[p])), p))


def ask_and_tell(
    study: Any,
    space: Mapping[str, Range],
    run: Callable[[dict[str, np.ndarray]], list[Trial]],
    count: int = 8,
    score: str = "eval/examples/loss",
) -> list[Trial]:
    """Trains the next proposals of an Optuna study side by side, and tells the study their scores.

    The proposals are the points of one sweep. A sweep of as many points of the same names, with the same ``build``,
    runs the program that the first call has compiled. A point that halving gives up is told as pruned.

    Args:
      study: an ``optuna.Study``; its direction is that of the score. A sampler with ``constant_liar=True`` spreads the
        proposals of a batch.
      space: the range of each hyper-parameter.
      run: ``points -> trials``, by ``fc.sweep``, with one ``build`` for all calls.
      count: proposals at once.
      score: the metric that the study optimises, meant over seeds and folds.

    Returns:
      The sweep's trials. Its points are numbered as the last ``count`` of ``study.trials``.

    Raises:
      InvalidInput: Optuna is not installed, a study of the other direction or of several objectives, a metric that the
        trials do not have.

    Example:
      >>> import optuna
      >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
      >>> study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, constant_liar=True))
      >>> def build(hyper):
      ...   return fc.fedavg(per_example_loss, optax.sgd(hyper["lr"]))
      >>> def run(points):
      ...   return fc.sweep(build, points, data, params, per_example_loss, {"examples": held_out}, rounds=3)
      >>> trials = fc.sweeping.ask_and_tell(study, {"lr": fc.sweeping.Range(0.01, 1.0, log=True)}, run, count=4)
      >>> len(study.trials), study.best_value < 2.3
      (4, True)

    Source: Akiba et al. (2019), "Optuna: A Next-generation Hyperparameter Optimization Framework".
    """
    try:
        from optuna import Study
        from optuna.trial import TrialState
    except ImportError as error:
        raise InvalidInput("A study needs optuna, which is not installed: pip install 'fedjax_clip[optuna]'") from error
    checks.kind("study", study, Study, "an optuna.Study")
    direction = "MAXIMIZE" if Metric(score).higher_is_better else "MINIMIZE"
    if [found.name for found in study.directions] != [direction]:
        raise InvalidInput(f'A study of {score} needs optuna.create_study(direction="{direction.lower()}").')
    asked = [study.ask() for _ in range(checks.count("count", count))]
    points = {
        name: np.array([trial.suggest_float(name, low, high, log=log) for trial in asked])
        for name, (low, high, log) in space.items()
    }
    trials = run(points)
    last = max(trial.metrics["round"] for trial in trials)
    for number, trial in enumerate(asked):
        mine = [t for t in trials if t.point == number]
        rounds = sorted({t.metrics["round"] for t in mine})
        for round in rounds:
            found = values([t for t in mine if t.metrics["round"] == round], score)[number]
            trial.report(float(np.mean(found)), int(round))
        if not rounds or math.isnan(mean := float(np.mean(values(mine, score)[number]))):
            study.tell(trial, state=TrialState.FAIL)
        elif rounds[-1] < last:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, mean)
    return trials


def _order(trial: Trial) -> tuple[Any, ...]:
    return *trial[:3], trial.metrics["round"]


def _check_points(columns: Mapping[str, np.ndarray], build: Build, num_clients: int) -> tuple[int, bool]:
    """How many points there are, and whether they have a ``start``. Calls ``build`` on each point, before compiling."""
    shapes = {name: x.shape for name, x in columns.items()}
    if not shapes or len(set(shapes.values())) > 1 or any(len(s) != 1 or s[0] < 1 for s in shapes.values()):
        raise InvalidInput(f"points must be one or more values of each hyper-parameter, as many of each: not {shapes}.")
    if "num_clients" in columns:
        raise InvalidInput("num_clients is no hyper-parameter: build is given the population's own.")
    count = len(next(iter(columns.values())))
    for i in range(count):
        point = {name: float(x[i]) for name, x in columns.items()}
        try:
            algorithm = build({**point, "num_clients": num_clients})
            checks.kind("build(point)", algorithm, Algorithm, "an algorithm such as fc.fedavg(...)")
        except InvalidInput as error:
            raise InvalidInput(f"{', '.join(f'{k}={v:g}' for k, v in point.items())}: {error}") from None
    return count, algorithm.start is not None


def _widest(params: Params, devices: Sequence[jax.Device]) -> int:
    """The largest number of points that a device trains at once."""
    size = max(1, sum(np.asarray(x).nbytes for x in jax.tree.leaves(params)))
    if devices[0].platform == "cpu":
        return max(1, CHUNK_BYTES // size)
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", 2**32)
    return max(1, memory // (4 * COPIES * size))


def _width(widest: int, num_streams: int, kept: Sequence[int], num_devices: int) -> int:
    """The width up to ``widest`` that needs the fewest lanes over all dispatches; in a tie the largest."""

    def trained(width: int) -> int:
        return sum(-(-num_streams * -(-count // width) // num_devices) * width for count in kept)

    return min(range(1, min(widest, kept[0]) + 1), key=lambda width: (trained(width), -width))
