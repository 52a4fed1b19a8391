"""Blocks of rounds on their way to the devices and back."""

import dataclasses
import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedjax_clip.core import keys
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.convolution import warn_slow_convolutions
from fedjax_clip.core.secret import Secret
from fedjax_clip.core.types import Algorithm, Params, PyTree
from fedjax_clip.data.clock import Clock, Timeline, Turn, World
from fedjax_clip.data.planning import LocalWork, plan_rounds, wasted_steps
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.data.speeds import BatchSizes
from fedjax_clip.training import placement

RESIDENT_BYTES = (
    2**29
)  # a population up to this size lives on every CPU device; on others, up to a quarter of the memory
WIDE_BYTES = 2**16  # on a CPU, models up to this size train several clients at once: their cost is that of many loops
WIDE = 16  # so many, unless all clients take the same number of steps: then none waits for another,
ALL_BYTES = 2**20  # and as many are faster as make up this size
LONGEST = 64  # rounds in a block, unless told,
PLAN_BYTES = 2**20  # as far as their example numbers are no more than this,
BLOCK_SECONDS = 0.1  # and so many as take this long: one waits no longer for a row of metrics, or to stop


class Block(NamedTuple):
    """Some rounds, planned: client numbers ``[D, R, C]`` and columns ``[R]`` on the host, cohorts on the devices."""

    rounds: range
    ids: np.ndarray
    columns: dict[str, np.ndarray]
    cohorts: Cohort


class Dispatcher:
    """Plans blocks of a run's rounds, sends them to the devices and takes the results back.

    Args:
      algorithm, data, sampler, work, devices, seed: of the run.
      length: the most rounds in a block; by default as many as take a tenth of a second, as far as seen.
      non_finite: see ``Cohort``.
      secret: what noise and cohorts are drawn from in place of the seed.

    Attributes:
      resident: whether the population lives on the devices; blocks are then example numbers only.
      length: rounds that a block has room for.
      width: clients that a device trains at once, for all blocks planned from now on.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        data: FederatedData,
        sampler: Sampler | Clock,
        work: LocalWork,
        devices: Sequence[jax.Device],
        seed: int,
        length: int | None = None,
        non_finite: str = "drop",
        secret: Secret | None = None,
    ):
        self.algorithm, self.data, self.work, self.non_finite = algorithm, data, work, non_finite
        hidden = None if secret is None else secret.seed()
        world = World(data.sizes, lambda ids: work.duration(ids, data.sizes, seed), seed, hidden)
        self.turns = Timeline(sampler, world)
        self.words = None if secret is None else secret.words()
        self.devices, self.seed = devices, seed
        self.on_cpu = devices[0].platform == "cpu"
        memory = (devices[0].memory_stats() or {}).get("bytes_limit", 4 * RESIDENT_BYTES)
        most = RESIDENT_BYTES if self.on_cpu else memory // 4
        self.resident = sum(x.nbytes for x in data.fields().values()) <= most
        self.population = placement.replicate(data.examples, devices) if self.resident else None
        self.width = 1
        self.least = (0, 0)
        self.fixed, self.seconds = length is not None, math.inf  # of the fastest round so far
        self.length = 1
        if self.resident:
            self.length = self._longest() if length is None else length
        self.run_rounds = placement.pmap_rounds(algorithm, devices)
        self.key = keys.seeded(seed)

    def _plan(self, turns: Sequence[Turn], first_round: int) -> Cohort:
        planned = plan_rounds(
            self.data,
            [turn.ids for turn in turns],
            self.work,
            seed=self.seed,
            first_round=first_round,
            length=self.length,
            least=self.least,
            num_devices=len(self.devices),
            width=self.width,
            population=self.population,
            staleness=[turn.staleness for turn in turns if turn.staleness is not None] or None,
        )
        secret = None if self.words is None else np.tile(self.words, (len(self.devices), self.length, 1))
        return dataclasses.replace(planned, non_finite=self.non_finite, secret=secret)

    def _longest(self) -> int:
        cohort = self._plan([self.turns[0]], 0)
        return min(LONGEST, max(1, PLAN_BYTES // (cohort.batches.nbytes + cohort.example_weight.nbytes)))

    def next_block(self, rounds: range, *every: int) -> range:
        """The first of these rounds, as many as go together: none beyond a multiple of ``every``."""
        length = self.length if self.fixed else min(self.length, max(1, int(BLOCK_SECONDS / self.seconds)))
        return next_block(rounds, length, *every)

    def plan(self, rounds: range) -> Block:
        """These rounds, on the devices or on their way."""
        turns = [self.turns[r] for r in rounds]
        return self._sent(rounds, turns)

    def _sent(self, rounds: range, turns: Sequence[Turn]) -> Block:
        cohorts = self._plan(turns, rounds.start)
        self.least = cohorts.ids.shape[-1], cohorts.example_weight.shape[2]
        ids = np.asarray(cohorts.ids)
        columns = {name: np.array([turn.metrics[name] for turn in turns]) for name in turns[0].metrics}
        columns["wasted_steps"] = wasted_steps(cohorts)
        if not (self.on_cpu and self.resident and len(self.devices) == 1):  # which takes numbers in with the call
            cohorts = placement.split(cohorts, self.devices)
        return Block(rounds, ids, columns, cohorts)

    def before(self, server: PyTree, clients: PyTree) -> tuple[PyTree, list[dict[str, np.ndarray]]]:
        """The algorithm's ``start``: all clients, a cohort as large as the first round's at a time.

        Returns:
          The server to begin with, and the metrics of each cohort, ``[1]`` each.
        """
        assert self.algorithm.start is not None
        size, rounds, columns = max(1, len(self.turns[0].ids)), self.run_rounds, []
        self.run_rounds = placement.pmap_rounds(self.algorithm._replace(round=self.algorithm.start), self.devices)
        for first in range(0, self.data.num_clients, size):
            ids = np.arange(first, min(first + size, self.data.num_clients))
            server, finish = self.start(server, clients, self._sent(range(1), [Turn(ids, None, {})]))
            columns.append(finish())
        self.run_rounds, self.seconds = rounds, math.inf
        return server, columns

    def start(self, server: PyTree, clients: PyTree, block: Block) -> tuple[PyTree, Callable[[], dict]]:
        """Sends a block; returns the server to be, and a function that waits for the end.

        It writes what the clients keep into ``clients`` and returns the block's metrics, ``[R]`` each.
        """
        cohorts = dataclasses.replace(block.cohorts, state=gather(clients, block.ids))
        began = time.perf_counter()
        server, states, report = self.run_rounds(server, cohorts, self.key, len(block.rounds))

        def finish() -> dict[str, np.ndarray]:
            # Waiting is not only for the clock: collectives of dispatches in flight dead-lock on CPU devices.
            columns = placement.first_replica(report)
            scatter(clients, block.ids, states)
            self.seconds = min(self.seconds, (time.perf_counter() - began) / len(block.rounds))
            return columns | block.columns

        return server, finish

    def choose_width(self, server: PyTree, clients: PyTree, params: Params, round: int) -> None:
        """Sets the width: by rule on a CPU, by trying on other devices.

        Where it is tried, it goes from all of a device's clients down by fours while that is faster, and is
        remembered as long as the process lives.
        """
        ids = self.turns[round].ids
        most = max(1, math.ceil(len(ids) / len(self.devices)))
        if self.on_cpu:
            size = sum(x.nbytes for x in jax.tree.leaves(params))
            steps = self.work.steps
            own = callable(steps) or isinstance(self.work.batch_size, BatchSizes)
            even = not own and (steps is not None or np.ptp(self.data.sizes) == 0)
            self.width = 1 if size > WIDE_BYTES else min(most, max(WIDE, ALL_BYTES // max(1, size)) if even else WIDE)
            return
        shapes = tuple((x.shape, str(x.dtype)) for x in self.data.fields().values())
        tried = _WIDTHS.setdefault(self.algorithm.round, {})
        key = tuple(self.devices), self.work, shapes, most
        if key not in tried:
            tried[key] = fastest(most, lambda width: self._try(width, server, clients, round))
        self.width = tried[key]

    def _try(self, width: int, server: PyTree, clients: PyTree, round: int) -> float:
        """Seconds of a round at this width; infinite if it does not fit."""
        self.width, self.least, seconds = width, (0, 0), []
        block = self.plan(range(round, round + 1))
        for _ in range(3):  # the first one compiles
            own = placement.replicate(server, self.devices)
            began = time.perf_counter()
            try:
                _, finish = self.start(own, jax.tree.map(np.copy, clients), block)
                finish()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    return math.inf
                raise
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])

    def warn_slow_convolutions(self, server: PyTree, clients: PyTree, block: Block, params: Params) -> None:
        """Says what to write in place of convolutions that crawl on a CPU."""
        if not self.on_cpu or all(np.ndim(x) < 3 for x in jax.tree.leaves(params)):
            return

        def shape(skip: int) -> Callable:
            return lambda x: jax.ShapeDtypeStruct(x.shape[skip:], x.dtype)

        cohort = jax.tree.map(shape(2), dataclasses.replace(block.cohorts, population=None))
        # One client at a time: a vmap would make its convolutions look like grouped ones, which nothing helps.
        kept = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*cohort.ids.shape, *x.shape[1:]), x.dtype), clients)
        population = jax.tree.map(shape(1), self.population)
        cohort = dataclasses.replace(cohort, state=kept, population=population, width=1)
        warn_slow_convolutions(self.algorithm.round, jax.tree.map(shape(1), server), cohort, self.key, platform="cpu")


_WIDTHS: weakref.WeakKeyDictionary[Callable, dict[tuple, int]] = weakref.WeakKeyDictionary()  # of rounds that live


def fastest(widest: int, seconds: Callable[[int], float]) -> int:
    """Of ``widest``, a quarter of it, ..., 1: the last one before trying on no longer gains 5%."""
    best, least = widest, seconds(widest)
    while best > 1:
        narrower = max(1, best // 4)
        took = seconds(narrower)
        if took > 0.95 * least:
            break
        best, least = narrower, took
    return best


def next_block(rounds: range, length: int, *every: int) -> range:
    """The first of ``rounds``, at most ``length``, ending where a multiple of ``every`` (if not 0) is due."""
    due = [rounds.start + e - rounds.start % e for e in every if e]
    return range(rounds.start, min(rounds.start + length, rounds.stop, *due))


def gather(states: PyTree, ids: np.ndarray) -> PyTree:
    """What a block's clients keep, ``[D, R, C, ...]``."""
    return jax.tree.map(lambda x: x[np.maximum(ids, 0)], states)


def scatter(states: PyTree, ids: np.ndarray, new_states: PyTree) -> None:
    """Writes what the clients keep from now on into ``states``, ``[M, ...]``."""
    for old, new in zip(jax.tree.leaves(states), jax.tree.leaves(new_states), strict=True):
        new = np.asarray(new)
        for place in np.ndindex(ids.shape[:-1]):
            here = ids[place][ids[place] >= 0]  # absent clients come last: no copy in between
            old[here] = new[place][: len(here)]
