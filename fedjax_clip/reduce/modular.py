"""Secure sums, modulo 2^32: the server learns no message. Cryptography runs on the host."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput
from fedjax_clip.reduce.base import Reducer


def modular_sum(cohort_size: int, threshold: int | None = None) -> Reducer:
    """``sum_i m_i mod 2^32`` of unsigned integers, which is all that a server learns under secure aggregation.

    Exact: the same bits in any order and on any number of devices. Masks cancel in it, so a simulation needs none;
    ``fc.secure.pairwise_masks`` runs the protocol, with the same result to the last bit. The decoding link divides by
    ``cohort_size``.

    Args:
      cohort_size: n, the (expected) size of a cohort.
      threshold: t; with fewer clients the sum is not opened, and the round's update is zero. More than n / 2; 2 n / 3
        by default. In a round of more than 2 t - 1 clients, as a Poisson sample may be, it is half of them plus one.

    Raises:
      InvalidInput: a cohort of one client, whose sum is its message; a threshold that is not a majority, or above the
        size.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.5), fc.uplink.integer_grid())
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, uplink=uplink, reducer=fc.reduce.modular_sum(50))

    Source: Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine Learning", the ideal
    functionality of Definition 6.1.
    """
    threshold = secure_threshold(cohort_size, threshold)

    def zero(message, roster):
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint32), message)
        return total, jnp.zeros((), jnp.int32), tree.count(roster.ids >= 0)

    def add(acc, messages, weights):
        total = jax.tree.map(lambda t, m: t + jnp.sum(m, 0, jnp.uint32), acc[0], messages)
        return total, acc[1] + tree.count(weights > 0), acc[2]

    def finish(acc, axis_name):
        total, came, present = acc if axis_name is None else jax.lax.psum(acc, axis_name)
        return jax.tree.map(lambda t: jnp.where(came >= majority(present, threshold), t, 0), total)

    return Reducer(zero, add, finish, True, float(cohort_size), threshold=threshold, hides="modular_sum")


def on_host(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
    cohort_size: int,
    threshold: int = 1,
    modular: bool = False,
) -> Reducer:
    """The sum by a function of NumPy arrays, called once a round outside the compiled program, for real cryptography.

    The first device collects all messages of a round and sends them to the host. On several CPU devices XLA aborts
    after the others have waited for 40 seconds: use one device for a slower function.

    Args:
      function: ``(messages [n, d], came [n]) -> sum [d]`` of the same type, of the round's n clients; messages of
        absent clients are zeros.
      cohort_size: the denominator for real numbers (the decoding link divides a sum of integers).
      threshold: with fewer clients the function is not called, and the sum is zero.
      modular: whether messages are integers, whose sum may wrap around.

    Raises:
      InvalidInput: as ``modular_sum``.

    Example:
      >>> reducer = fc.reduce.on_host(lambda messages, came: messages.sum(0), cohort_size=8)  # fixed_mean(8)
    """
    cohort_size, threshold = checks.count("cohort_size", cohort_size), checks.count("threshold", threshold)

    def zero(message, roster):
        num_clients = len(roster.ids)
        stack = jax.tree.map(lambda x: jnp.zeros((num_clients, *x.shape), x.dtype), message)
        return stack, jnp.zeros(num_clients, bool), roster.ids >= 0, jnp.zeros((), jnp.int32)

    def add(acc, messages, weights):
        stack, came, present, count = acc
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=count, axis=0)
        return jax.tree.map(put, stack, messages), put(came, weights > 0), present, count + len(weights)

    def finish(acc, axis_name):
        leaves, structure = jax.tree.flatten(acc[0])
        if not leaves:  # an empty part of a message
            return acc[0]
        stack = jnp.concatenate([x.reshape(len(x), -1) for x in leaves], 1), acc[1], acc[2]
        first = jnp.array(True)
        if axis_name is not None:
            stack = jax.lax.all_gather(stack, axis_name, tiled=True)
            first = jax.lax.axis_index(axis_name) == 0
        _, came, present = stack
        needed = majority(tree.count(present), threshold) if modular else threshold
        total = jax.lax.cond(
            first & (tree.count(came) >= needed),
            functools.partial(_call_on_host, function),
            lambda messages, came, present: jnp.zeros(messages.shape[1:], messages.dtype),
            *stack,
        )
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        total = total if modular else total / cohort_size
        parts = jnp.split(total, np.cumsum([x[0].size for x in leaves])[:-1])
        return jax.tree.unflatten(structure, [p.reshape(x.shape[1:]) for p, x in zip(parts, leaves, strict=True)])

    made = Reducer(zero, add, finish, True, float(cohort_size), threshold=threshold if modular else None)
    return made._replace(hides="a secure sum")


PIECE = 2**14  # elements sent to the host at once


def _call_on_host(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray], messages: Array, came: Array, present: Array
) -> Array:
    """``function(messages, came)`` on NumPy arrays of the present clients, sent in pieces of at most 64 KiB.

    JAX copies larger pieces by a thread of the CPU's pool, and all of those threads may be waiting for this device.
    """
    held: dict[int, np.ndarray] = {}  # by call: several devices may each train alone
    calls = itertools.count()
    pieces = jnp.pad(messages.ravel(), (0, -messages.size % PIECE)).reshape(-1, PIECE)
    (n, d), dtype, count = messages.shape, messages.dtype, len(pieces)
    number, total = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((d,), dtype)

    def begin():
        call = next(calls)
        held[call] = np.empty((count, PIECE), dtype)
        return np.int32(call)

    def take(call, index, piece):
        held[int(call)][int(index)] = piece
        return np.int32(call)

    def finish(call, came, present):
        here = np.asarray(present)
        return function(held.pop(int(call)).ravel()[: n * d].reshape(n, d)[here], np.asarray(came)[here])

    def send(index, call):
        return io_callback(take, number, call, jnp.int32(index), pieces[index])

    call = jax.lax.fori_loop(0, count, send, io_callback(begin, number))
    return io_callback(finish, total, call, came, present)


def secure_threshold(cohort_size: int, threshold: int | None) -> int:
    """The checked threshold of a secure sum: a majority of a cohort of two clients or more.

    Without a majority, a server that lies to two halves of the clients opens two sums. Against a server with k
    colluding clients the protocol needs ``2 t > n + k`` (Bonawitz et al. 2017, Theorem 6.5), so a sum is safe from ``2
    t - n - 1`` of them.

    Args:
      cohort_size: n, clients.
      threshold: t, the fewest clients whose sum is opened; two thirds by default.

    Raises:
      InvalidInput: as ``modular_sum``.

    Example:
      >>> fc.reduce.secure_threshold(8, None)
      6
    """
    cohort_size = checks.count("cohort_size", cohort_size)
    if cohort_size < 2:
        raise InvalidInput(
            "A secure sum of one client is its message: take cohorts of two or more, or a mean that hides nothing."
        )
    threshold = max(2, -(-2 * cohort_size // 3)) if threshold is None else threshold
    threshold = checks.count("threshold", threshold)
    if threshold > cohort_size:
        raise InvalidInput(f"A threshold of {threshold} clients is more than the cohort of {cohort_size}.")
    if 2 * threshold <= cohort_size:
        raise InvalidInput(
            f"A threshold of {threshold} is no majority of a cohort of {cohort_size}, so that a server that lies could "
            f"open two sums, or one message: take {cohort_size // 2 + 1} or more."
        )
    return threshold


def majority(present: Any, threshold: int) -> Any:
    """The threshold of a round: the expected cohort's, or more than half of the present clients if that is more.

    Args:
      present: number of clients in the round, whether their messages arrive or not; may be traced.
      threshold: of an expected cohort.

    Example:
      >>> int(fc.reduce.majority(12, threshold=6))
      7
    """
    lib = np if isinstance(present, int) else jnp
    return lib.maximum(threshold, present // 2 + 1)
