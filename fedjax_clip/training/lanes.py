"""Lanes: trainings side by side in one program, each on cohorts that were planned beforehand."""

import contextlib
import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fedjax_clip.algorithms import averaging
from fedjax_clip.core import keys, tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.resident import Resident
from fedjax_clip.core.types import Algorithm, InvalidInput, Params, PerExampleLoss, PyTree
from fedjax_clip.data import lives
from fedjax_clip.data.folds import Fold
from fedjax_clip.data.planning import LocalWork, plan_rounds
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.training import failures, placement
from fedjax_clip.training.evaluation import Rows, evaluator, measure, rows
from fedjax_clip.training.planner import room
from fedjax_clip.training.rounds import one_round, run_rounds
from fedjax_clip.training.scores import Summary
from fedjax_clip.training.state import init_state

Build = Callable[[dict[str, Any]], Algorithm]

LONGEST = 64  # rounds in a block at most
PLAN_BYTES = 2**24  # a block's example numbers take no more bytes than this


class Stream(NamedTuple):
    """What all trainings with one seed on one fold share.

    Attributes:
      params: initial parameters.
      seed: uint32, of the run's key.
      num_clients: int32, N.
      held_out: the fold's held-out examples, if there are folds.
      owners: ``{set: [T, B]}``, numbers of the training clients whose examples the evaluation sets hold.
      cohorts: some rounds' cohorts ``[R, ...]``; their batches are example numbers of the whole population.
      everyone: one cohort of all clients, for an algorithm with a ``start``; ``None`` for others.
    """

    params: Params
    seed: Any
    num_clients: Any
    held_out: Rows | None
    owners: dict[str, jax.Array | np.ndarray]
    cohorts: Cohort
    everyone: Cohort | None = None


@placement.remembered  # so that a resumed sweep compiles nothing again
def program(
    build: Build, per_example_loss: PerExampleLoss, num_kept: int, devices: tuple[jax.Device, ...]
) -> Callable[..., Any]:
    """Compiles some rounds of ``[D, W]`` trainings; the W trainings of a device share one stream.

    Returns:
      ``(hyper, state, stream, population, sets, start, count, due) -> (state, metrics)``: ``hyper`` and ``state`` are
      ``[D, W, ...]``. ``state`` is donated, and ignored if ``start`` is 0. The streams, the population and the
      evaluation sets ``{name: (examples, Rows)}`` are ``[D, ...]``. The program evaluates if ``due``.
    """

    def one(hyper, state, stream, population, sets, start, count, due):
        algorithm = build({**hyper, "num_clients": stream.num_clients})
        key = keys.seeded(stream.seed)
        begun = init_state(algorithm, stream.params, num_kept)
        if (before := algorithm.start) is not None:
            begun = jax.lax.cond(
                start == 0,
                lambda begun: one_round(before, begun, stream.everyone, population, key)[0],
                lambda begun: begun,
                begun,
            )
        state = optax.tree.where(start == 0, begun, state)
        state, reports = run_rounds(algorithm.round, state, stream.cohorts, population, key, count)
        report = jax.tree.map(lambda x: x[count - 1], reports)
        sets = {name: (held, which._replace(owner=stream.owners[name])) for name, (held, which) in sets.items()}
        if stream.held_out is not None:
            sets |= {"fold": (population, stream.held_out)}
        for name, (examples, which) in sets.items():
            for rename, params in averaging.models(state[0].params, averaging.average_of(state[0])).items():
                scores = measure(per_example_loss, params, examples, which, due, algorithm, state[1])
                report |= {rename(f"eval/{name}/{score}"): x for score, x in scores.items()}
        return state, report

    def lanes(hyper, state, *rest):
        if len(jax.tree.leaves(hyper)[0]) > 1:
            return jax.vmap(one, in_axes=(0, 0, *(None for _ in rest)))(hyper, state, *rest)
        alone = jax.tree.map(lambda x: x[0], (hyper, state))  # not a vmap of one: convolutions would become grouped
        return jax.tree.map(lambda x: x[None], one(*alone, *rest))

    return placement.pmap_alone(lanes, devices, num_mapped=5, num_shared=3, donate=1)


class Lane(NamedTuple):
    """A training: a point by number, a seed, and a fold by number."""

    point: int
    seed: int
    fold: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All rounds of a seed on a fold, in blocks; the stream's cohorts are those of the first."""

    stream: Stream
    blocks: list[tuple[range, Cohort]]


def plan(
    data: FederatedData,
    folds: Sequence[Fold],
    seeds: Sequence[int],
    params: Params | Callable[[int], Params],
    sampler: Sampler,
    work: LocalWork,
    stops: Sequence[int],
    begins: bool = False,
    evaluation: Mapping[str, FederatedData] = types.MappingProxyType({}),
) -> dict[tuple[int, int], Plan]:
    """Plans every ``(seed, fold)``, all with the same shapes; no block crosses one of the ``stops``.

    With ``begins``, each plan also has a cohort of all clients, for an algorithm with a ``start``.
    """
    spans = [range(a, b) for a, b in itertools.pairwise([0, *stops])]
    trained = [fold.split(data)[0] for fold in folds] or [data]

    def cohorts(k: int, seed: int, rounds: range, length: int, least: tuple[int, int], all: bool = False) -> Cohort:
        sizes = lives.sizes_of(trained[k]) or (lambda round: trained[k].sizes)
        ids = [np.arange(trained[k].num_clients) if all else sampler.draw(sizes(r), seed, r) for r in rounds]
        options: dict[str, Any] = {"seed": seed, "first_round": rounds.start, "population": (), "least": least}
        planned = jax.tree.map(lambda x: x[0], plan_rounds(trained[k], ids, work, length=length, **options))
        return dataclasses.replace(planned, batches=folds[k].train[planned.batches]) if folds else planned

    length = max(1, PLAN_BYTES // cohorts(0, seeds[0], range(1), 1, (0, 0)).batches.nbytes)
    length = min(LONGEST, length, max(map(len, spans)))
    blocks = [s[i : i + length] for s in spans for i in range(0, len(s), length)]

    def every(least: tuple[int, int]) -> dict[tuple[int, int], list[Cohort]]:
        lanes = itertools.product(seeds, range(len(trained)))
        return {(seed, k): [cohorts(k, seed, rounds, length, least) for rounds in blocks] for seed, k in lanes}

    planned = every((0, 0))
    shapes = {(c.ids.shape[1], c.example_weight.shape[1]) for cs in planned.values() for c in cs}
    if len(shapes) > 1:
        planned = every(tuple(map(max, zip(*shapes))))
    everyone: dict[tuple[int, int], Cohort] = {}
    if begins:
        room = (0, 0)
        for _ in range(2):  # the first pass finds the largest shape, the second pads all cohorts to it
            everyone = {(s, k): cohorts(k, s, range(1), 1, room, all=True) for s in seeds for k in range(len(trained))}
            room = tuple(max(x) for x in zip(*((c.ids.shape[1], c.example_weight.shape[1]) for c in everyone.values())))
        everyone = {lane: jax.tree.map(lambda x: x[0], cohort) for lane, cohort in everyone.items()}
    least = max((len(f.held_out) for f in folds), default=0)
    streams = {}
    for seed in seeds:
        initial = tree.parameters(params(seed) if callable(params) else params)
        for k, population in enumerate(trained):
            held_out = rows(data, folds[k].held_out, population, least) if folds else None
            owners = {name: rows(x, np.arange(x.num_examples), population).owner for name, x in evaluation.items()}
            size, first = np.int32(population.num_clients), planned[seed, k][0]
            common = Stream(initial, np.uint32(seed), size, held_out, owners, first, everyone.get((seed, k)))
            streams[seed, k] = Plan(common, list(zip(blocks, planned[seed, k])))
    return streams


class Lanes:
    """Trains lanes, ``width`` points at a time on each device.

    Args:
      points: ``{name: float32 [P]}``.
      plans: of every seed and fold.
      data, evaluation: populations; they are copied to every device.
      folds: held out, one after the other; empty without folds.
      summarise: of each lane's values at its end, on the host; see ``fc.evaluator``.
      others: see ``program``.
    """

    def __init__(
        self,
        build: Build,
        points: Mapping[str, np.ndarray],
        plans: Mapping[tuple[int, int], Plan],
        data: FederatedData,
        per_example_loss: PerExampleLoss,
        evaluation: Mapping[str, FederatedData],
        devices: Sequence[jax.Device],
        width: int,
        folds: Sequence[Fold] = (),
        summarise: Summary | None = None,
    ):
        self.points, self.plans, self.devices, self.width, self.data = points, plans, devices, width, data
        self.build, self.trained = build, [fold.split(data)[0] for fold in folds] or [data]
        num_kept = max(int(plan.stream.num_clients) for plan in plans.values())
        first = next(iter(plans.values())).stream
        hyper = {name: values[0] for name, values in points.items()} | {"num_clients": first.num_clients}
        with _while_tracing():
            state = jax.eval_shape(lambda *args: init_state(build(args[0]), args[1], num_kept), hyper, first.params)
        self.fresh = jax.tree.map(lambda x: np.zeros((len(devices), width, *x.shape), x.dtype), state)
        self.population, self.sets = self._resident(evaluation)
        self.program = program(build, per_example_loss, num_kept, tuple(devices))
        self.folds = {f"fold {k}": fold.split(data)[1] for k, fold in enumerate(folds)} if summarise else {}
        self.evaluate = evaluator(per_example_loss, {**evaluation, **self.folds}, summarise=summarise)

    def _resident(self, evaluation: Mapping[str, FederatedData]) -> tuple[Resident, dict]:
        """The examples to train and to evaluate on, on every device, if there is room for them."""
        device, beside = self.devices[0], 2 * sum(x[0].nbytes for x in jax.tree.leaves(self.fresh))
        takes = sum(Resident.nbytes(x.examples, device.platform) for x in (self.data, *evaluation.values()))
        if device.platform != "cpu" and takes > (free := room(device, beside)):
            raise InvalidInput(
                f"A sweep keeps all examples on each device: they take {takes / 2**30:.1f} GiB of its memory, and "
                f"{free / 2**30:.1f} GiB are free for them. Sweep over fewer examples or fewer points at a time."
            )
        of = functools.partial(Resident.of, platform=device.platform)
        sets = {k: (of(x.examples), rows(x, np.arange(x.num_examples), self.data)) for k, x in evaluation.items()}
        both = of(self.data.examples), sets
        everywhere = jax.tree.map(lambda x: np.broadcast_to(x, (len(self.devices), *x.shape)), both)
        return placement.split(everywhere, self.devices)

    def deal(self, lanes: Sequence[Lane]) -> list[list[list[Lane]]]:
        """The lanes in groups, one for each dispatch: for each device up to ``width`` lanes of one seed and fold."""
        shares = []
        for _, stream in itertools.groupby(sorted(lanes, key=_stream), key=_stream):
            members = list(stream)
            shares += [members[i : i + self.width] for i in range(0, len(members), self.width)]
        return [shares[i : i + len(self.devices)] for i in range(0, len(shares), len(self.devices))]

    def run(
        self,
        shares: list[list[Lane]],
        states: dict[Lane, PyTree],
        stop: int,
        keep: bool,
        on_rounds: Callable[[int], None],
        should_stop: Callable[[], bool],
    ) -> dict[Lane, dict[str, float]] | None:
        """Trains a group up to round ``stop``; returns the metrics of each lane, or ``None`` if told to stop earlier.

        Lanes resume from their ``(round, state)`` in ``states`` if all have one; with ``keep`` they store it there
        again.
        """
        lanes = {lane: (d, w) for d, share in enumerate(shares) for w, lane in enumerate(share)}
        filled = [share + share[-1:] * (self.width - len(share)) for share in shares]
        filled += filled[-1:] * (len(self.devices) - len(filled))
        hyper = {name: values[[[lane.point for lane in s] for s in filled]] for name, values in self.points.items()}
        plans = [self.plans[_stream(share[0])] for share in filled]
        common = [plan.stream for plan in plans]

        start, state = 0, self.fresh
        if all(lane in states for lane in lanes):
            start = states[filled[0][0]][0]
            state = _stack([_stack([states[lane][1] for lane in share]) for share in filled])
        state = placement.split(state, self.devices)
        for i, (rounds, _) in enumerate(plans[0].blocks):
            if not start <= rounds.start < stop:
                continue
            stream = _stack([s._replace(cohorts=plan.blocks[i][1]) for s, plan in zip(common, plans)])
            counts = np.int32(rounds.start), np.int32(len(rounds)), np.bool_(rounds.stop == stop)
            with _while_tracing(), failures.Explained(self.data, debug=False):
                state, report = self.program(hyper, state, stream, self.population, self.sets, *counts)
            report = {name: np.asarray(x) for name, x in report.items()}  # waits for the devices
            on_rounds(len(rounds) * len(lanes))
            if rounds.stop < stop and should_stop():
                return None
        if keep:
            state = jax.tree.map(np.asarray, state)
            states |= {lane: (stop, jax.tree.map(lambda x, at=at: x[at], state)) for lane, at in lanes.items()}
        rows = {lane: {name: float(x[at]) for name, x in report.items()} for lane, at in lanes.items()}
        if self.evaluate.summarise:
            ended = jax.tree.map(np.asarray, (state[0].params, averaging.average_of(state[0]), state[1]))
            rows = {
                lane: row | self._summaries(lane, *jax.tree.map(lambda x, at=lanes[lane]: x[at], ended))
                for lane, row in rows.items()
            }
        return rows

    def _summaries(self, lane: Lane, params: Params, average: PyTree | None, clients: PyTree) -> dict[str, float]:
        """What ``summarise`` makes of a lane's values, on the held-out sets and on what its fold holds out."""
        population, evaluate = self.trained[lane.fold], self.evaluate
        point = {name: x[lane.point] for name, x in self.points.items()}
        algorithm = self.build({**point, "num_clients": np.int32(population.num_clients)})
        if algorithm.personal is not None:
            evaluate = dataclasses.replace(evaluate, algorithm=algorithm, population=population)
        found: dict[str, float] = {}
        for name, data in self.evaluate.sets.items():
            if name not in self.folds or name == f"fold {lane.fold}":
                where = "fold" if name in self.folds else name
                for rename, model in averaging.models(params, average).items():
                    scores = evaluate.summary(evaluate.values(name, model, clients), data)
                    found |= {rename(f"eval/{where}/{score}"): x for score, x in scores.items()}
        return found


@contextlib.contextmanager
def _while_tracing() -> Iterator[None]:
    """Explains the error that JAX raises where a swept number must be known at compile time."""
    try:
        yield
    except TypeError as error:
        if failures.explained(error) and not isinstance(error, jax.errors.JAXTypeError):
            raise  # an error of the user's own functions
        why = str(error).splitlines()[0]
        raise InvalidInput(f"A swept number decides what is compiled, which only a known one can: {why}") from error


def _stream(lane: Lane) -> tuple[int, int]:
    return lane.seed, lane.fold


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)
