"""Reducers that see all messages of a round at once."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput, PyTree
from fedjax_clip.reduce.base import Reducer, Roster, looks_at_messages


class Stack(NamedTuple):
    """All messages of a round, from all devices, in the order of client numbers; absent clients come last.

    Attributes:
      messages: pytree of ``[N, ...]``, zeros for absent clients.
      weights: float32 ``[N]``, 0 for absent clients.
      ids: int32 ``[N]`` client numbers, meaningless for absent clients.
      key: PRNG key of the round's reduction.

    Example:
      >>> reducer = fc.reduce.stacking(lambda stack: jax.tree.map(lambda x: x.max(0), stack.messages))
    """

    messages: PyTree
    weights: Array
    ids: Array
    key: Array

    @property
    def present(self) -> Array:
        """bool ``[N]``: true for the first ``num_present`` rows."""
        return self.weights > 0

    @property
    def num_present(self) -> Array:
        """int32: number of messages."""
        return tree.count(self.present)


def stacking(aggregate: Callable[[Stack], PyTree], fewest: int = 1) -> Reducer:
    """A reducer that stores all messages and computes any function of them: ``stack -> aggregate``.

    Every device gathers all messages. With N slots in the cohort, it holds a few times ``N`` messages: the stack, its
    sorted copy, and the temporaries of ``aggregate``. Rows are in the order of the clients' numbers, so order, chunks
    and devices change an aggregate only through N, by rounding of sums with zeros.

    Args:
      aggregate: called once on each device, with the same stack. Rows of absent clients are zeros of weight 0.
      fewest: the fewest clients for which the aggregate has a meaning; with fewer it is zero, like a modular sum below
        its threshold. A Poisson sample may be that small; ``check_cohort`` refuses cohorts that always are.

    Example:
      >>> largest = fc.reduce.stacking(lambda stack: jax.tree.map(lambda x: jnp.max(x, 0), stack.messages))
    """

    def zero(message, roster):
        stack = jax.tree.map(lambda x: jnp.zeros((len(roster.ids), *x.shape), x.dtype), message)
        weights = jnp.zeros(len(roster.ids), jnp.float32)
        return Stack(stack, weights, jnp.asarray(roster.ids), roster.key), jnp.zeros((), jnp.int32)

    def add(acc, messages, weights):
        stack, filled = acc
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=filled, axis=0)
        kept = jax.tree.map(put, stack.messages, messages), put(stack.weights, weights.astype(stack.weights.dtype))
        return stack._replace(messages=kept[0], weights=kept[1]), filled + len(weights)

    def finish(acc, axis_name):
        key, rows = acc[0].key, acc[0]._replace(key=None)
        if axis_name is not None:
            rows = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), rows)
        if (missing := fewest - len(rows.ids)) > 0:  # a small cohort's program must trace, too
            rows = jax.tree.map(lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), rows)
        if not jax.tree.leaves(rows.messages):  # an empty part of a message
            return rows.messages
        order = jnp.argsort(jnp.where(rows.weights > 0, rows.ids, jnp.iinfo(jnp.int32).max))
        stack = jax.tree.map(lambda x: x[order], rows)._replace(key=key)
        enough = stack.num_present >= fewest
        return jax.tree.map(lambda x: jnp.where(enough, x, 0), aggregate(stack))

    return Reducer(zero, add, finish, linear=False, fewest=fewest)


def check_cohort(reducer: Reducer, cohort_size: float) -> None:
    """Refuses a reducer that needs more clients than the expected cohort, if its size is known and not 0.

    Args:
      reducer: any.
      cohort_size: clients a round, as ``Sampler.cohort_size``.

    Raises:
      InvalidInput: fewer than the reducer's ``fewest``.

    Example:
      >>> fc.reduce.check_cohort(fc.reduce.krum(2), 7)  # of 6 clients Krum cannot tell two malicious ones
    """
    if 0 < cohort_size < reducer.fewest:
        raise InvalidInput(
            f"This reducer needs at least {reducer.fewest} clients in a round, not {cohort_size:g}: ask for a "
            "larger cohort, or let the reducer expect fewer bad clients."
        )


def restacked(change: Callable[[Stack], Stack], reducer: Reducer, fewest: int | None = None) -> Reducer:
    """Reduces ``change(messages)`` by ``reducer``, in place of the messages.

    Args:
      change: ``stack -> stack``, with any number of rows.
      reducer: for the changed messages.
      fewest: as for ``stacking``; by default that of ``reducer``.

    Raises:
      InvalidInput: an argument that is not a reducer, such as a function that makes one.

    Example:
      >>> def halve(stack):
      ...   return stack._replace(messages=optax.tree.scale(0.5, stack.messages))
      >>> reducer = fc.reduce.restacked(halve, fc.reduce.median())
    """

    checks.kind("reducer", reducer, Reducer, "an fc.reduce.Reducer, such as fc.reduce.median()")
    looks_at_messages("A rule that changes messages", reducer)

    def aggregate(stack):
        stack = change(stack)
        message = jax.tree.map(lambda x: x[0], stack.messages)
        acc = reducer.zero(message, Roster(stack.ids, jax.random.fold_in(stack.key, 0)))
        return reducer.finish(reducer.add(acc, stack.messages, stack.weights), None)

    fewest = reducer.fewest if fewest is None else fewest
    kept = {name: getattr(reducer, name) for name in ("denominator", "population", "weighted", "forges")}
    return stacking(aggregate, fewest)._replace(**kept)


def bucketing(reducer: Reducer, size: int = 2) -> Reducer:
    """Divides the messages at random into buckets of ``size`` and reduces the uniform means of the buckets.

    Where clients' data differ, a robust rule mistakes an unusual client for a malicious one. Means of a few clients
    differ less. A malicious client spoils its bucket, so the reducer must tolerate as many bad buckets among ``ceil(n /
    size)`` as there are malicious clients. A hash of (round, client) deals the buckets, so order and devices do not
    matter. The last bucket may hold fewer.

    Args:
      reducer: for the means, any.
      size: s, at least 1; 1 gives ``reducer`` itself.

    Raises:
      InvalidInput: a size that is not a whole number of at least 1.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, reducer=fc.reduce.bucketing(fc.reduce.median(), 2))

    Source: Karimireddy, He and Jaggi (2022), "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing",
    Algorithm 1.
    """
    checks.kind("reducer", reducer, Reducer, "an fc.reduce.Reducer, such as fc.reduce.median()")
    size = checks.count("bucketing: size", size)
    if size == 1:
        return reducer

    def deal(stack, size=size):
        size = min(size, len(stack.ids))
        hashes = jax.vmap(lambda id: jax.random.bits(jax.random.fold_in(stack.key, id), (), jnp.uint32))(stack.ids)
        order = jnp.lexsort((hashes, ~stack.present))
        buckets = -(-len(stack.ids) // size)
        numbers = jnp.arange(buckets, dtype=jnp.int32)
        held = jnp.clip(stack.num_present - size * numbers, 0, size)

        def mean(x):
            x = jnp.pad(x[order], [(0, buckets * size - len(x))] + [(0, 0)] * (x.ndim - 1))
            share = 1 / jnp.maximum(held, 1).astype(jnp.float32)
            x = x.reshape(buckets, size, *x.shape[1:])
            return jnp.sum(x * share.reshape(buckets, *[1] * (x.ndim - 1)).astype(x.dtype), axis=1)

        weights = (held > 0).astype(stack.weights.dtype)
        return Stack(jax.tree.map(mean, stack.messages), weights, numbers, stack.key)

    return restacked(deal, reducer, size * (reducer.fewest - 1) + 1)._replace(weighted=False)
