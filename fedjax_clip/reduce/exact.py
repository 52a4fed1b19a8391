"""The mean that is the same to the last bit on any number of devices."""

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, exact, tree
from fedjax_clip.core.types import Array
from fedjax_clip.reduce.base import Reducer


def exact_mean(*, weighted: bool = True, denominator: float | Array | None = None) -> Reducer:
    """``sum_i w_i m_i / sum_i w_i`` to the same bits for any order of clients, any chunks and any number of devices.

    A sum of floats depends on the order of its terms, so means over one device and over eight differ by rounding. Here
    each client's message is rounded to integers, before any sum, and integers are added exactly.

    For an array of messages ``m_i`` let fl and rn round to nearest even, fl to float32 and rn to an integer. Over all
    clients i and all elements of the array::

        p_i = fl(w_i m_i)
        e   = floor(log2(max |p_i|))                        # of the largest weighted element of the round
        u   = 2^(13 max(floor((e + 128) / 13) - 2, 1) - 127)   # the resolution
        S   = fl(u sum_i rn(p_i / u))                       # each element's sum is exact, and rounded once

    and the mean is ``fl(S fl(1 / W))``, with W from the ``w_i`` as S from the ``p_i``; zero without clients. So u is
    between 2^-37 and 2^-25 of ``2^e``, and at least 2^-114. A client's message is rounded by at most 2^-26 of the
    array's largest element. The range is that of float32: nothing is clipped. Where a device takes subnormal numbers
    for zero, as XLA does on a CPU, so does the mean.

    bfloat16 and integer messages are converted to float32, and the mean is float32. For float64 messages fl is
    float64, with 1024 for 128, 1023 for 127 and 4 for 2, so u is at most 2^-51 of ``2^e``; W has the widest type of the
    message. With ``non_finite="keep"`` an array is NaN if any element of a client is not finite. The sums of a round's
    client metrics are exact in the same way, each with bins of its own (``Reducer.exact``), and so is what links
    compute from them.

    A device holds 12 bytes for each float32 parameter (``weighted_mean``: 4), and sends as many. There is no derivative
    through it.

    **What stays the same.** Parameters, states and metrics have the same bits for any number of devices and processes,
    and any order of the clients in a cohort. It needs one thing of you: fix ``clients_per_chunk`` of ``fc.train``,
    since the default width may depend on the number of clients on a device, and another width is another program.
    ``wasted_steps`` and ``seconds`` describe the devices and differ. Other hardware and other versions of JAX compute
    other gradients.

    Args:
      weighted: whether a client counts by its weight, as in ``weighted_mean``; otherwise ``w_i = 1``, as in
        ``uniform_mean``.
      denominator: n, a fixed divisor in place of ``sum_i w_i``, with ``w_i = 1``; as in ``fixed_mean``, for noise.

    Raises:
      InvalidInput: a denominator that is not positive; (when traced) a round with room for more than 131,072 clients on
        all devices together, or a derivative.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.exact_mean())
      >>> result = fc.train(algorithm, data, params, rounds=3, cohort_size=10, clients_per_chunk=1)

    Source: Demmel and Nguyen (2015), "Parallel Reproducible Summation", section 4, with integers for bins.
    """
    checks.kind("exact_mean: weighted", weighted, bool, "True or False")
    if denominator is not None:
        checks.positive("exact_mean: denominator", denominator)
        weighted = False

    def whole(x: Array) -> bool:  # integers, which the link that sent them divides
        return denominator is not None and jnp.issubdtype(x.dtype, jnp.integer)

    def zero(message, roster):
        room = len(roster.ids)
        totals = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32) if whole(x) else exact.zero(x, room), message)
        if not weighted:
            return totals, jnp.zeros((), jnp.int32)
        dtype = tree.common_type(jnp.float32, *map(tree.wide_type, jax.tree.leaves(message)))
        return totals, exact.zero(jnp.zeros((), dtype), room)

    def add(acc, messages, weights):
        def plus(m, total):
            if weighted:
                return exact.add(total, m, weights)
            m = jnp.where((weights > 0).reshape(-1, *[1] * (m.ndim - 1)), m, 0)
            return total + jnp.sum(m, 0, jnp.int32) if whole(m) else exact.add(total, m)

        weight = exact.add(acc[1], weights) if weighted else acc[1] + tree.count(weights > 0)
        return jax.tree.map(plus, messages, acc[0]), weight

    def finish(acc, axis_name):
        totals, weight = exact.finished(acc, axis_name)
        weight = weight if denominator is None else jnp.asarray(denominator)

        def mean(total):
            if whole(total):
                return total
            # XLA itself multiplies by the inverse, if not always: so it is said here, and kept by a barrier.
            inverse = jax.lax.optimization_barrier(1 / tree.or_one(weight).astype(total.dtype))
            return jnp.where(weight > 0, total * inverse, 0)

        return jax.lax.optimization_barrier(jax.tree.map(mean, totals))

    return Reducer(zero, add, finish, True, denominator, weighted=weighted, exact=True)
