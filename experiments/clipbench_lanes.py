"""The one compiled program that runs a rule on a track: a lane for each threshold and seed."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_clip as fc
from experiments.clipbench_tracks import Measure, Track
from experiments.rules import Rule
from fedjax_clip.keys import seeded

HUGE = 1e6  # an error this large is called divergence
FAST: Any = {"xla_backend_optimization_level": 1}  # the programs are small: they take longer to compile than to run

SMALL = 2**14  # lanes of models up to so many bytes run side by side; for larger ones that takes longer on a CPU


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a rule: arrays ``[thresholds, seeds]``, and processors' seconds for compiling and running."""

    measured: dict[str, np.ndarray]
    diverged: np.ndarray
    compile_seconds: float
    run_seconds: float


def run(track: Track, rule: Rule, grid: Sequence[float], seeds: int) -> Outcome:
    """Runs all thresholds and seeds in one program.

    All thresholds meet the same cohorts and the same noise. A lane has diverged if it ends with a measure that is not
    finite or huge, or had updates dropped in the last tenth of its rounds because they were not finite.
    """
    starts = [track.start(seed) for seed in range(seeds)]
    start = jax.tree.map(lambda *xs: np.stack([np.asarray(x, np.float32) for x in xs]), *starts)
    keys = jax.vmap(seeded)(jnp.arange(seeds))
    cohorts, axes = plan_seeds(track, seeds)
    lane = functools.partial(train_one, track, rule)

    def side_by_side(*arguments):
        each_threshold = jax.vmap(lane, in_axes=(0, None, None, None, None))
        return jax.vmap(each_threshold, in_axes=(None, 0, 0, axes, None), out_axes=1)(*arguments)

    def one_by_one(grid, start, keys, cohorts, examples):
        def nth(i):
            seed = i % seeds
            own = jax.tree.map(lambda a, x: x if a is None else x[seed], axes, cohorts, is_leaf=lambda a: a is None)
            return lane(grid[i // seeds], jax.tree.map(lambda x: x[seed], start), keys[seed], own, examples)

        measured = jax.lax.map(nth, jnp.arange(len(grid) * seeds))
        return jax.tree.map(lambda x: x.reshape(len(grid), seeds), measured)

    lanes = side_by_side if sum(x.nbytes for x in jax.tree.leaves(start)) <= SMALL * seeds else one_by_one
    arguments = np.asarray(grid, np.float32), start, keys, cohorts, track.data.examples

    # Problems that differ in their data only, as the two quartics do, share a program.
    parts = (rule.build, track.loss, tuple(track.measures.items()), track.client_lr, track.rounds, str(axes))
    key = (*parts, jax.tree.structure(arguments), *(x.shape for x in jax.tree.leaves(arguments)))
    if key not in _PROGRAMS:
        began = time.process_time()
        _PROGRAMS[key] = jax.jit(lanes).lower(*arguments).compile(compiler_options=FAST), time.process_time() - began
    program, compile_seconds = _PROGRAMS[key]

    began = time.process_time()
    measured, dropped = jax.tree.map(np.asarray, program(*arguments))
    run_seconds = time.process_time() - began
    measured = {name: measured[name] for name in track.measures}  # a compiled program sorts them
    bad = [~(np.abs(x) < HUGE) for x in measured.values()]
    return Outcome(measured, np.any([dropped > 0, *bad], axis=0), compile_seconds, run_seconds)


_PROGRAMS: dict[tuple, tuple[Any, float]] = {}  # compiled, and what that took


def plan_seeds(track: Track, seeds: int) -> tuple[fc.Cohort, Any]:
    """The rounds' cohorts ``[S, R, ...]``, or ``[R, ...]`` where all seeds' are equal, and the axes of S."""
    sizes, sampler = track.data.sizes, track.sampler(track.cohort_size)
    drawn = [[sampler.sample(sizes, seed, r) for r in range(track.rounds)] for seed in range(seeds)]
    most = max(len(ids) for rounds in drawn for ids in rounds)

    def plan(rows: int) -> list[fc.Cohort]:
        options: dict[str, Any] = {
            "first_round": 0,
            "width": track.width or most,
            "least": (most, rows),
            "population": (),
        }
        return [fc.plan_rounds(track.data, ids, track.work, seed=seed, **options) for seed, ids in enumerate(drawn)]

    planned = plan(0)
    rows = {cohorts.example_weight.shape[2] for cohorts in planned}
    planned = planned if len(rows) == 1 else plan(max(rows))
    stacked = jax.tree.map(lambda *xs: np.stack([x[0] for x in xs]), *planned)
    # What is not batched costs once: loops whose lengths are the same in all lanes need no masks.
    axes = jax.tree.map(lambda x: 0 if np.any(x != x[:1]) else None, stacked)
    return jax.tree.map(lambda x: x if np.any(x != x[:1]) else x[0], stacked), axes


def train_one(track: Track, rule: Rule, threshold, start, key, cohorts, examples) -> tuple[dict[str, Any], Any]:
    """``(measures, late drops)`` of one threshold and seed."""
    num_clients, rounds = track.data.num_clients, track.rounds
    algorithm = rule.build(track.loss, threshold, track.client_lr, num_clients)
    kept = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], num_clients, axis=0), algorithm.init_client(start))

    def round(carry, inputs):
        server, kept, totals, dropped = carry
        index, cohort = inputs
        own = jax.tree.map(lambda x: x[jnp.maximum(cohort.ids, 0)], kept)
        cohort = dataclasses.replace(cohort, state=own, population=examples)
        server, own, metrics = algorithm.round(server, cohort, key)
        places = jnp.where(cohort.ids < 0, num_clients, cohort.ids)
        kept = jax.tree.map(lambda xs, x: xs.at[places].set(x, mode="drop"), kept, own)
        totals = {
            name: totals[name]
            + jax.lax.cond(index >= rounds - m.window, m.of, lambda *_: jnp.zeros(()), server.params, examples)
            for name, m in track.measures.items()
        }
        dropped += jnp.where(index >= rounds - max(1, rounds // 10), metrics["dropped"], 0)
        return (server, kept, totals, dropped), None

    carry = algorithm.init(start), kept, {name: jnp.zeros(()) for name in track.measures}, jnp.zeros(())
    (_, _, totals, dropped), _ = jax.lax.scan(round, carry, (jnp.arange(rounds), cohorts))
    return {name: totals[name] / m.window for name, m in track.measures.items()}, dropped


def fingerprint(track: Track, rule: Rule) -> str:
    """A hash of the program of one lane, before it is compiled, and of all that goes into it but the threshold.

    It changes with all that is computed, be it written in the registry, the track or the library, and with JAX.
    """
    cohorts, _ = plan_seeds(track, 1)
    start, inputs = track.start(0), (cohorts, track.data.examples)
    program = jax.jit(functools.partial(train_one, track, rule)).lower(np.float32(1), start, seeded(0), *inputs)
    digest = hashlib.sha256(program.as_text().encode())
    for x in jax.tree.leaves((start, inputs)):
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
    return Track("probe", data, loss, lambda seed: start, measures, (1.0,), 0.1, 2, 2, fc.LocalWork(batch_size=2))
