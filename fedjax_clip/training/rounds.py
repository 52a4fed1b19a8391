"""The one loop over rounds inside a program, and how it keeps clients' states between rounds.

A round does not know how it is placed: it computes the same under ``jax.jit`` with an unsplit cohort, and under
``shard_map`` with a split one.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.resident import Resident
from fedjax_clip.core.types import Array, Metrics, PyTree

Index = Array | int
Round = Callable[[PyTree, Cohort, Array], tuple[PyTree, PyTree, Metrics]]  # of an algorithm


class Shelf(NamedTuple):
    """How a program reads and writes the clients' states between rounds.

    Attributes:
      read: ``(kept, index of the round, cohort) -> states [C, ...]``.
      write: ``(kept, index of the round, cohort, states [C, ...]) -> kept``.
    """

    read: Callable[[PyTree, Index, Cohort], PyTree]
    write: Callable[[PyTree, Index, Cohort, PyTree], PyTree]


def _read_round(kept: PyTree, index: Index, cohort: Cohort) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), kept)


def _write_round(kept: PyTree, index: Index, cohort: Cohort, states: PyTree) -> PyTree:
    return jax.tree.map(lambda xs, x: jax.lax.dynamic_update_index_in_dim(xs, x, index, 0), kept, states)


def _read_clients(kept: PyTree, index: Index, cohort: Cohort) -> PyTree:
    return jax.tree.map(lambda x: x[jnp.maximum(cohort.ids, 0)], kept)


def _write_clients(kept: PyTree, index: Index, cohort: Cohort, states: PyTree) -> PyTree:
    def write(xs: Array, x: Array) -> Array:
        return xs.at[jnp.where(cohort.ids < 0, len(xs), cohort.ids)].set(x, mode="drop")

    return jax.tree.map(write, kept, states)


BY_ROUND = Shelf(_read_round, _write_round)  # [R, C, ...]: the host gathered each round's states
BY_CLIENT = Shelf(_read_clients, _write_clients)  # [M, ...]: all clients' states are on the device


def run_rounds(
    round: Round,
    state: PyTree,
    cohorts: Cohort,
    population: PyTree,
    key: Array,
    count: Array | np.int32 | int,
    shelf: Shelf = BY_CLIENT,
    axis_name: str | None = None,
    in_step: bool = False,
) -> tuple[PyTree, Metrics]:
    """Runs the first ``count`` of the R rounds that ``cohorts`` plan.

    Args:
      round: an algorithm's round.
      state: ``(server, kept)``; see ``shelf``.
      cohorts: ``[R, ...]``, without states.
      population: examples on the device, a ``Resident`` or ``[N, ...]``, or ``None`` if the cohorts hold batches.
      key: PRNG key of the run.
      count: int32, at most R.
      shelf: how ``kept`` is indexed: by client ``[M, ...]``, or by round ``[R, C, ...]``.
      axis_name: the mapped axis of the devices, if there are several.
      in_step: whether they take equally many turns of each loop; see ``Cohort``.

    Returns:
      ``(state, metrics [R, ...])``; metrics of rounds that were not run are 0.

    Example:
      >>> work = fc.extend.LocalWork(20)
      >>> cohorts = fc.extend.plan_rounds(data, [np.array([3, 1, 4])], work, seed=0, first_round=0)
      >>> cohorts = jax.tree.map(lambda x: x[0], cohorts)  # those of the first device
      >>> state = algorithm.init(params), algorithm.init_client(params)  # FedAvg's clients keep nothing
      >>> state, metrics = fc.extend.placement.run_rounds(algorithm.round, state, cohorts, None, key, 1)
    """
    placed = {"axis_name": axis_name, "in_step": in_step}
    population = None if population is None else Resident.of(population)  # outside the loops: at most one copy

    def one(state: PyTree, index: Array) -> tuple[PyTree, Metrics]:
        cohort = _read_round(cohorts, index, cohorts)
        return one_round(round, state, dataclasses.replace(cohort, **placed), population, key, shelf, index)

    one, (_, metrics) = tree.traced(one, state, 0)
    reports = jax.tree.map(lambda x: jnp.zeros((cohorts.ids.shape[0], *x.shape), x.dtype), metrics)

    def body(index: Array, carry: tuple[PyTree, Metrics]) -> tuple[PyTree, Metrics]:
        state, reports = carry
        state, metrics = one(state, index)
        return state, _write_round(reports, index, cohorts, metrics)

    planned = int(cohorts.ids.shape[0])
    return cohorts.loop(body, (state, reports), planned if cohorts.loops.whole else count, planned)


def one_round(
    round: Round,
    state: PyTree,
    cohort: Cohort,
    population: PyTree,
    key: Array,
    shelf: Shelf = BY_CLIENT,
    index: Index = 0,
) -> tuple[PyTree, Metrics]:
    """``(state, metrics)`` after an algorithm's ``round``, or its ``start``, of one cohort; see ``run_rounds``."""
    server, kept = state
    own = shelf.read(kept, index, cohort)
    server, own, metrics = round(server, dataclasses.replace(cohort, state=own, population=population), key)
    return (server, shelf.write(kept, index, cohort, own)), metrics
