"""Reducers combine the messages of a cohort into one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput, PyTree


class Roster(NamedTuple):
    """The clients whose messages a reducer will get, in order, and the round's randomness.

    Attributes:
      ids: int32 ``[C]`` client numbers of one device; -1 in empty slots.
      key: PRNG key of the round's reduction, the same on all devices.

    Example:
      >>> fc.reduce.Roster(jnp.array([4, 1, -1]), jax.random.key(0))
    """

    ids: Array
    key: Array


class Reducer(NamedTuple):
    """Folds messages into an accumulator, a few clients at a time.

    Attributes:
      zero: ``(message, roster) -> acc``, the empty accumulator for messages like this one.
      add: ``(acc, messages[w, ...], weights[w]) -> acc``. A dropped or absent client has weight 0 and a message
        of zeros.
      finish: ``(acc, axis_name) -> aggregate``, over all devices of the mapped axis, if there is one.
      linear: whether the aggregate is linear in the messages. Masks and sums then commute with it, and the accumulator
        does not grow with the cohort.
      denominator: the fixed denominator of a sum; ``None`` if it depends on the clients that arrived.
      fewest: the fewest clients in a round for which the guarantee holds; with fewer the aggregate is zero.
      threshold: of a modular sum, which adds integers: with fewer clients it returns zeros. ``None`` for a reducer of
        real numbers.
      population: the fewest clients that the population must have, since the reducer names one by number.
      weighted: whether a client counts by its weight; otherwise all clients count equally.
      hides: its name, if it is a secure sum: nobody may read a single message.
      forges: its name, if it replaces messages after the uplink by functions of other clients' messages.
      exact: whether a round's client metrics, too, are summed to the same bits in any order, as ``exact_mean`` sums
        messages; ``reducer._replace(exact=True)`` asks it of any reducer.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.uniform_mean())
    """

    zero: Callable[[PyTree, Roster], Any]
    add: Callable[[Any, PyTree, Array], Any]
    finish: Callable[[Any, str | None], PyTree]
    linear: bool
    denominator: float | Array | None = None
    fewest: int = 1
    threshold: int | None = None
    population: int = 0
    weighted: bool = False
    hides: str = ""
    forges: str = ""
    exact: bool = False


def weighted_mean() -> Reducer:
    """``sum_i w_i m_i / sum_i w_i``, with weights ``w_i`` (numbers of examples); zero without clients.

    Sums are in float32 or better for every type of message, with one accumulator for the whole cohort.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.weighted_mean())  # the default

    Source: McMahan et al. (2017), Algorithm 1.
    """
    return _mean(lambda weights: weights)._replace(weighted=True)


def uniform_mean() -> Reducer:
    """``sum_i m_i / n`` over the n clients that arrived, of any size; zero without clients.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.uniform_mean())
    """
    return _mean(lambda weights: (weights > 0).astype(weights.dtype))


def fixed_mean(denominator: float | Array) -> Reducer:
    """``sum_i m_i / n`` with a fixed n: each client moves it by at most its bound / n.

    Differential privacy needs it: a mean over the clients that arrived, or one weighted by examples, reveals who they
    were. Integers are added exactly, modulo 2^32, to the same bits in any order and on any number of devices. Their sum
    is not divided: the link that sent them divides it after adding noise (``fc.uplink.gaussian``).

    Args:
      denominator: n, the (expected) size of a cohort.

    Raises:
      InvalidInput: n that is not positive.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.3), fc.uplink.gaussian(1.0))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, uplink=uplink, reducer=fc.reduce.fixed_mean(50))

    Source: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models", the estimator f~_f.
    """
    checks.positive("fixed_mean: denominator", denominator)
    return _mean(lambda weights: (weights > 0).astype(weights.dtype), denominator)


def _mean(weigh: Callable[[Array], Array], denominator: float | Array | None = None) -> Reducer:
    def exact(x: Array) -> bool:
        return denominator is not None and jnp.issubdtype(x.dtype, jnp.integer)

    def zero(message, roster):
        types = jax.tree.map(lambda x: jnp.int32 if exact(x) else tree.wide_type(x), message)
        return jax.tree.map(lambda x, t: jnp.zeros(x.shape, t), message, types), jnp.zeros((), jnp.float32)

    def add(acc, messages, weights):
        weights = weigh(weights)

        def plus(t, m):
            if exact(t):
                return t + jnp.sum(m * weights.reshape(-1, *[1] * (m.ndim - 1)).astype(m.dtype), 0, jnp.int32)
            return t + tree.weighted_sum(weights, m.astype(t.dtype))

        return jax.tree.map(plus, acc[0], messages), acc[1] + jnp.sum(weights)

    def finish(acc, axis_name):
        total, weight = acc if axis_name is None else jax.lax.psum(acc, axis_name)
        if denominator is not None:
            return jax.tree.map(lambda t: t if exact(t) else t / jnp.asarray(denominator, t.dtype), total)
        return jax.tree.map(lambda t: jnp.where(weight > 0, tree.divided(t, weight), 0), total)

    return Reducer(zero, add, finish, True, denominator)


def looks_at_messages(name: str, reducer: Reducer) -> None:
    """Refuses to wrap a secure sum by a reducer that reads single messages.

    Args:
      name: of the wrapper.
      reducer: the wrapped reducer.

    Raises:
      InvalidInput: a reducer that hides single messages.
    """
    if reducer.hides:
        raise InvalidInput(
            f"{name} reads single messages, which {reducer.hides} hides: take {reducer.hides} alone, "
            "and let a clip of the uplink bound what one client sends."
        )


def apart(reducer: Reducer, groups: int) -> Reducer:
    """Reduces the messages of each group of clients by themselves: ``(stack, chosen) -> (aggregates, counts)``.

    A client's message is a pytree of ``[groups, ...]``, of which only its own group's part counts, and the group as
    float32 ``[groups]``, one 1 among zeros. The result has each group's aggregate, zero for a group of fewer clients
    than ``reducer`` needs, and the groups' sizes.

    Args:
      reducer: of real numbers, of one group's messages.
      groups: number of groups.

    Raises:
      InvalidInput: a secure sum, which adds all messages.

    Example:
      >>> reducer = apart(uniform_mean(), groups=3)
    """
    checks.kind("apart: reducer", reducer, Reducer, "one such as fc.reduce.uniform_mean()")
    groups = checks.count("apart: groups", groups)
    if reducer.hides or reducer.threshold is not None:
        raise InvalidInput(
            f"The algorithm reduces each group's messages apart, and {reducer.hides or 'modular_sum'} adds those of "
            "all: take fc.reduce.uniform_mean() or another reducer of real numbers."
        )

    def of(group, tree):
        return jax.tree.map(lambda x: x[:, group], tree)

    def zero(message, roster):
        one = jax.tree.map(lambda x: x[0], message[0])
        return tuple(reducer.zero(one, roster) for _ in range(groups)), jnp.zeros(groups, jnp.float32)

    def add(acc, messages, weights):
        stack, chosen = messages
        accs = [reducer.add(a, of(g, stack), weights * chosen[:, g]) for g, a in enumerate(acc[0])]
        came = (weights > 0).astype(jnp.float32)
        return tuple(accs), acc[1] + tree.weighted_sum(came, chosen)

    def finish(acc, axis_name):
        counts = acc[1] if axis_name is None else jax.lax.psum(acc[1], axis_name)
        found = [reducer.finish(a, axis_name) for a in acc[0]]
        found = [jax.tree.map(lambda x, n=n: jnp.where(n >= reducer.fewest, x, 0), a) for a, n in zip(found, counts)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *found), counts

    return reducer._replace(zero=zero, add=add, finish=finish)


def together(*reducers: Reducer) -> Reducer:
    """Reduces messages of several parts: the first part by the first reducer, the second by the second, ...

    Args:
      reducers: one for each part of a message, in order.

    Raises:
      InvalidInput: an argument that is not a reducer; a secure sum beside another reducer.

    Example:
      >>> reducer = fc.reduce.together(fc.reduce.weighted_mean(), fc.reduce.uniform_mean())
    """
    for reducer in reducers:
        checks.kind("A reducer", reducer, Reducer, "one such as fc.reduce.uniform_mean()")
    if any(r.hides for r in reducers) and not all(r.hides for r in reducers):
        raise InvalidInput(
            "A part of the message would be in a secure sum and another one in the clear: give each part a secure sum."
        )

    def zero(message, roster):
        return tuple(r.zero(m, roster) for r, m in zip(reducers, message, strict=True))

    def add(acc, messages, weights):
        return tuple(r.add(a, m, weights) for r, a, m in zip(reducers, acc, messages, strict=True))

    def finish(acc, axis_name):
        return tuple(r.finish(a, axis_name) for r, a in zip(reducers, acc, strict=True))

    first = reducers[0]  # the first part is the update: the uplink's demands on the reducer apply to this one
    return first._replace(
        zero=zero,
        add=add,
        finish=finish,
        linear=all(r.linear for r in reducers),
        weighted=any(r.weighted for r in reducers),
        exact=all(r.exact for r in reducers),
        fewest=max(r.fewest for r in reducers),
        hides=next((r.hides for r in reducers if r.hides), ""),
        forges=next((r.forges for r in reducers if r.forges), ""),
        population=max(r.population for r in reducers),
    )
