"""Rounds one after the other in one program: the only loop over rounds, whoever compiles it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.types import Algorithm, Array, Metrics, Params, PyTree, check_named

Index = Array | int
Round = Callable[[PyTree, Cohort, Array], tuple[PyTree, PyTree, Metrics]]  # of an algorithm


class Shelf(NamedTuple):
    """Where a program keeps what its clients keep between rounds.

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


BY_ROUND = Shelf(_read_round, _write_round)  # [R, C, ...]: the host has gathered each round's states
BY_CLIENT = Shelf(_read_clients, _write_clients)  # [M, ...]: all clients' states are at hand


def run_rounds(
    round: Round,
    state: PyTree,
    cohorts: Cohort,
    population: PyTree,
    key: Array,
    count: Array | np.int32,
    shelf: Shelf = BY_CLIENT,
    axis_name: str | None = None,
) -> tuple[PyTree, Metrics]:
    """Runs the first ``count`` of the R rounds that ``cohorts`` plan.

    Args:
      round: an algorithm's round.
      state: ``(server, kept)``; see ``shelf``.
      cohorts: ``[R, ...]``, without states.
      population: examples on the device, or ``None`` if the cohorts hold batches.
      key: PRNG key of the run.
      count: int32, up to R.
      shelf: how ``kept`` is indexed: by client ``[M, ...]``, or by round ``[R, C, ...]``.
      axis_name: the mapped axis of the devices, if there are several.

    Returns:
      ``(state, metrics [R, ...])``; metrics of rounds that were not run are 0.
    """

    def one(state: PyTree, index: Array) -> tuple[PyTree, Metrics]:
        cohort = _read_round(cohorts, index, cohorts)
        return one_round(round, state, dataclasses.replace(cohort, axis_name=axis_name), population, key, shelf, index)

    one, (_, metrics) = tree.traced(one, state, 0)
    reports = jax.tree.map(lambda x: jnp.zeros((cohorts.ids.shape[0], *x.shape), x.dtype), metrics)

    def body(index: Array, carry: tuple[PyTree, Metrics]) -> tuple[PyTree, Metrics]:
        state, reports = carry
        state, metrics = one(state, index)
        return state, _write_round(reports, index, cohorts, metrics)

    return jax.lax.fori_loop(0, count, body, (state, reports))


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


def init_state(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """The server before round 0 and what each of ``num_clients`` clients keeps, ``[M, ...]``, on a device."""
    check_named(algorithm, num_clients)
    kept = algorithm.init_client(tree.as_arrays(params))
    return algorithm.init(params), jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], num_clients, axis=0), kept)


def client_states(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """What all clients keep before round 0, ``[M, ...]``, on the host."""
    state = algorithm.init_client(tree.as_arrays(params))
    return jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], num_clients, axis=0), state)
