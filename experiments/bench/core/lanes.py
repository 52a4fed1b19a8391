"""The compiled program that trains a rule on a track, with a lane for each point of its knobs and each run."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_clip as fc
from experiments.bench.core.problem import Measure, Run, Track
from experiments.bench.core.rule import Rule
from experiments.bench.core.tuning import Point
from fedjax_clip.algorithms.base import kind
from fedjax_clip.core.keys import seeded, threefry

HUGE = 1e6  # an error this large counts as divergence
FAST: Any = {"xla_backend_optimization_level": 1}  # the programs are small, so compiling takes longer than running

SMALL = 2**14  # lanes of models up to this many bytes run side by side; larger ones are slower that way on a CPU
TRAFFIC = "clients", "bytes_up", "bytes_up_entropy", "bytes_down", "bytes_down_entropy"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a rule: arrays ``[points, runs]``, and the processor seconds of compiling and running.

    Attributes:
      measured: by the measures' names.
      diverged: whether any update was dropped because it was not finite, or a measure ended over ``HUGE``.
      traffic: bytes that a client sent and received in a round, by the names of the metrics.
      lanes: how many lanes were trained in those seconds.
    """

    measured: dict[str, np.ndarray]
    diverged: np.ndarray
    traffic: dict[str, np.ndarray]
    compile_seconds: float
    run_seconds: float
    lanes: int


@dataclasses.dataclass(frozen=True)
class Bank:
    """S runs, planned.

    Attributes:
      arrays: the inputs of a run. An array has an axis of S only where runs differ: what is equal is stored once, and
        a loop whose length is equal in all lanes needs no masks.
      axes: the same tree, with 0 for an axis of S and ``None`` for none.
      size: S.
    """

    arrays: Any
    axes: Any
    size: int

    def nth(self, arrays: Any, index: Any) -> Any:
        """What goes into one run."""
        return jax.tree.map(lambda a, x: x if a is None else x[index], self.axes, arrays, is_leaf=lambda a: a is None)


def plan(track: Track, runs: Sequence[Run], fresh: int = 0) -> Bank:
    """Plans runs: their starts, keys, the cohort of all clients, the rounds' cohorts, and the examples judged.

    Args:
      track, runs: of the benchmark.
      fresh: batches that clients take besides those of their local steps.
    """
    clients = [np.arange(track.data.num_clients) if run.clients is None else run.clients for run in runs]
    sizes, sampler = track.data.sizes, track.sampler(track.cohort_size)
    work = dataclasses.replace(track.work, steps=track.steps + fresh) if fresh else track.work
    drawn = [
        [ids[sampler.sample(sizes[ids], run.seed, r)] for r in range(track.rounds)]
        for run, ids in zip(runs, clients, strict=True)
    ]
    weights = track.data.client_weights

    def cohorts(rounds: Sequence[Sequence[np.ndarray]]) -> list[fc.extend.Cohort]:
        """``[R, ...]`` of each run, with equally many slots and rows."""
        most = max(len(ids) for each in rounds for ids in each)

        def planned(rows: int) -> list[fc.extend.Cohort]:
            options: dict[str, Any] = {"width": track.width or most, "least": (most, rows), "population": ()}
            return [
                fc.extend.plan_rounds(track.data, each, work, seed=run.seed, first_round=0, **options)
                for run, each in zip(runs, rounds, strict=True)
            ]

        found = planned(0)
        rows = {cohort.example_weight.shape[2] for cohort in found}
        found = found if len(rows) == 1 else planned(max(rows))
        return [
            jax.tree.map(lambda x: x[0], _among(cohort, len(ids), weights[ids].sum()))
            for cohort, ids in zip(found, clients, strict=True)
        ]

    everybody = [jax.tree.map(lambda x: x[0], cohort) for cohort in cohorts([[ids] for ids in clients])]
    inputs = [
        (
            jax.tree.map(lambda x: np.asarray(x, np.float32), track.start(run.seed)),
            np.asarray(jax.random.key_data(seeded(run.seed))),
            first,
            cohort,
            track.data.examples if run.judged is None else dict(run.judged),
        )
        for run, first, cohort in zip(runs, everybody, cohorts(drawn), strict=True)
    ]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *inputs)
    axes = jax.tree.map(lambda x: 0 if np.any(x != x[:1]) else None, stacked)
    return Bank(jax.tree.map(lambda x: x if np.any(x != x[:1]) else x[0], stacked), axes, len(runs))


def _among(cohort: fc.extend.Cohort, num_clients: int, weight: float) -> fc.extend.Cohort:
    """The same cohorts, drawn from this number of clients in place of the whole population."""
    counts = np.full_like(cohort.num_clients, num_clients), np.full_like(cohort.total_weight, weight)
    return dataclasses.replace(cohort, num_clients=counts[0], total_weight=counts[1])


def run(
    track: Track, rule: Rule, points: Sequence[Point], bank: Bank, which: Sequence[int] | None = None, lanes: int = 0
) -> Outcome:
    """Trains all points on all runs in one program. All meet the same cohorts and the same noise.

    Args:
      track, rule, points: what is trained.
      bank: planned runs.
      which: numbers of the bank's runs to take; all by default.
      lanes: the fewest lanes of the program, so that calls with fewer lanes share it.
    """
    which = range(bank.size) if which is None else which
    count = len(points) * len(which)
    lanes = max(lanes, count)
    padded = [*range(count), *[0] * (lanes - count)]
    index = np.tile(np.asarray(which), len(points))[padded]
    points = [{**point, **rule.fixed} for point in points]
    values = {k: np.repeat(np.array([p[k] for p in points], np.float32), len(which))[padded] for k in points[0]}
    arguments = values, index, np.int32(count), bank.arrays, track.data.examples

    # Problems that differ in their data only, as the quartics do, share a program.
    shapes = [x.shape for x in jax.tree.leaves(arguments)]
    parts = (rule.build, track.loss, tuple(track.measures.items()), track.rounds, str(bank.axes))
    key = (*parts, jax.tree.structure(arguments), *shapes)
    if key not in _PROGRAMS:
        began = time.process_time()
        program = jax.jit(functools.partial(_lanes, track, rule, bank)).lower(*arguments)
        _PROGRAMS[key] = program.compile(compiler_options=FAST), time.process_time() - began
    program, compile_seconds = _PROGRAMS[key]

    began = time.process_time()
    found = jax.tree.map(lambda x: np.asarray(x)[:count].reshape(len(points), len(which)), program(*arguments))
    run_seconds = time.process_time() - began
    measured, dropped, traffic = found
    measured = {name: measured[name] for name in track.measures}  # a compiled program sorts them
    bad = [~(np.abs(x) < HUGE) for x in measured.values()]
    asked = np.maximum(traffic.pop("clients") + dropped, 1)
    traffic = {name: x / asked for name, x in traffic.items()}
    diverged = np.any([dropped > 0, *bad], axis=0)
    return Outcome(measured, diverged, traffic, compile_seconds, run_seconds, lanes if _is_small(bank) else count)


_PROGRAMS: dict[tuple, tuple[Any, float]] = {}  # compiled, and what that took


def _lanes(track: Track, rule: Rule, bank: Bank, values, index, count, arrays, examples) -> Any:
    """All lanes: side by side, or the first ``count`` one by one."""

    def lane(i):
        point = jax.tree.map(lambda x: x[i], values)
        return train_one(track, rule, point, bank.nth(arrays, index[i]), examples)

    if _is_small(bank):
        return jax.vmap(lane)(jnp.arange(len(index)))
    found = jax.tree.map(lambda x: jnp.zeros((len(index), *x.shape), x.dtype), jax.eval_shape(lane, 0))
    return jax.lax.fori_loop(0, count, lambda i, xs: jax.tree.map(lambda a, x: a.at[i].set(x), xs, lane(i)), found)


def _is_small(bank: Bank) -> bool:
    """Whether the model is so small that lanes run side by side."""
    return sum(x.nbytes for x in jax.tree.leaves(bank.nth(bank.arrays, 0)[0])) <= SMALL


def train_one(
    track: Track, rule: Rule, point: Mapping[str, Any], inputs: Any, examples: Any
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """``(measures, drops, traffic)`` of one point on one run; the last two are sums over the rounds."""
    start, key, everybody, cohorts, judged = inputs
    rounds, key = track.rounds, threefry(key)
    algorithm = rule.build(track.loss, point)
    if algorithm.personal is not None:
        raise fc.InvalidInput(
            f"This benchmark judges the server's model, and the clients of {kind(algorithm)} use models of their own: "
            "compare them by fc.sweep or experiments.sweep, which judge these."
        )
    most = track.data.num_clients
    server = algorithm.init(start)
    kept = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], most, axis=0), algorithm.init_client(start))

    def turn(step, server, kept, cohort):
        own = jax.tree.map(lambda x: x[jnp.maximum(cohort.ids, 0)], kept)
        cohort = dataclasses.replace(cohort, state=own, population=examples)
        server, own, metrics = step(server, cohort, key)
        places = jnp.where(cohort.ids < 0, most, cohort.ids)
        kept = jax.tree.map(lambda xs, x: xs.at[places].set(x, mode="drop"), kept, own)
        return server, kept, {k: metrics[k] for k in ("dropped", *TRAFFIC) if k in metrics}

    def round(carry, inputs):
        server, kept, totals = carry
        index, cohort = inputs
        server, kept, sums = turn(algorithm.round, server, kept, cohort)
        totals = {
            name: totals[name]
            + jax.lax.cond(index >= rounds - m.window, m.of, lambda *_: jnp.zeros(()), server.params, judged)
            for name, m in track.measures.items()
        }
        return (server, kept, totals), sums

    before: dict[str, Any] = {}
    if algorithm.start is not None:
        server, kept, before = turn(algorithm.start, server, kept, everybody)
    carry = server, kept, {name: jnp.zeros(()) for name in track.measures}
    (_, _, totals), sums = jax.lax.scan(round, carry, (jnp.arange(rounds), cohorts))
    sums = {k: jnp.sum(x, dtype=jnp.float32) + before.get(k, 0.0) for k, x in sums.items()}
    measured = {name: totals[name] / m.window for name, m in track.measures.items()}
    return measured, sums.pop("dropped"), sums


def fingerprint(track: Track, rule: Rule) -> str:
    """A hash of the program of one lane, before it is compiled, and of what goes into it but the knobs.

    It changes with all that is computed, be it written in the registry, the track or the library, and with JAX.
    """
    bank = plan(track, track.measuring[:1], rule.fresh)
    lane = functools.partial(train_one, track, rule)
    inputs = bank.nth(bank.arrays, 0)
    program = jax.jit(lane).lower({k: np.float32(1) for k in (*rule.knobs, *rule.fixed)}, inputs, track.data.examples)
    digest = hashlib.sha256(program.as_text().encode())
    runs = [(run.seed, run.clients, run.judged) for run in (*track.tuning, *track.measuring)]
    for x in jax.tree.leaves((inputs, track.data.examples, runs)):
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:8]


def probe() -> Track:
    """A problem to tell rules by: small, with two layers, and clients of several batches."""
    shapes = {"first": {"kernel": (2, 3), "bias": (3,)}, "last": {"kernel": (3, 2), "bias": (2,)}}
    start = jax.tree.map(lambda shape: np.ones(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))

    def loss(params, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
        return jnp.sum((hidden @ params["last"]["kernel"] + params["last"]["bias"]) ** 2, axis=-1)

    data = fc.FederatedData({"x": np.ones((6, 2), np.float32)}, np.array([0, 2, 6]))
    measures = {"none": Measure(lambda params, _: jnp.zeros(()))}
    work = fc.extend.LocalWork(batch_size=2, steps=2)
    return Track("probe", data, loss, lambda seed: start, measures, {}, 2, 2, work, tuning=(), measuring=(Run(0),))
