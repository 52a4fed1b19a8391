"""Sums of floating-point numbers to the same bits in any order: each number becomes integers, and integers are added.

The bits of a number fall into bins of 13 at fixed exponents, and a sum keeps its top bins only: three for float32. When
a larger number comes, the lowest bins go. A digit of a number depends on the number and its bin alone, so it does not
matter in which order the numbers come. The top bin of a number is the lowest in which it is less than half a unit of
the next bin, so that rounding carries nothing into a bin that is not kept yet. This is the binned sum of Demmel and
Nguyen (2015), "Parallel Reproducible Summation", with integers for bins. ``fc.reduce.exact_mean`` states the formula.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import tree
from fedjax_clip.core.types import Array, InvalidInput, PyTree

BITS = 13  # of a bin
MOST = 2**17  # numbers in a sum: their digits, of up to 2^12 each, and carries fit into int32
NOT_FINITE = 2**20  # the bin of NaN and infinity, above all others


@functools.partial(jax.tree_util.register_dataclass, data_fields=["limbs", "bins"], meta_fields=["dtype", "room"])
@dataclasses.dataclass(frozen=True)
class Sum:
    """An unfinished sum of arrays ``[...]``.

    Attributes:
      limbs: L arrays int32 ``[...]``, the sums of the digits in the L top bins.
      bins: int32 ``[L]``, the bin of each limb: limb j has the one with ``bin = j modulo L``, so that a limb keeps its
        place when the top moves. ``[L, ...]`` if each element has bins of its own.
      dtype: of the numbers, float32 or float64.
      room: how many numbers may be added on this device.
    """

    limbs: list[Array]
    bins: Array
    dtype: np.dtype
    room: int


def zero(like: Array, room: int, each: bool = False) -> Sum:
    """The sum of no arrays.

    Args:
      like: one of them, of any type.
      room: how many will be added at most.
      each: whether every element has bins of its own, by the largest number there; otherwise the largest element of all
        arrays gives the bins.
    """
    dtype = tree.wide_type(like)
    limbs = [jnp.zeros(like.shape, jnp.int32) for _ in range(_limbs(dtype))]
    lowest = jnp.zeros(like.shape if each else (), dtype)
    return Sum(limbs, _bins(_bin(lowest), len(limbs)), dtype, room)


def add(total: Sum, values: Array, weights: Array | None = None) -> Sum:
    """The sum with ``fl(weights[i] values[i])`` of each i, where fl rounds to the sum's type.

    Args:
      total: the sum so far.
      values: ``[w, ...]``.
      weights: ``[w]``, at least 0; ones by default, as they must be where each element has bins of its own.
    """
    if not values.size:
        return total
    values = values.astype(total.dtype)
    each = total.bins.ndim > 1
    largest = jnp.max(jnp.abs(values), 0 if each else tuple(range(1, values.ndim)))
    if weights is not None:
        factors = weights.astype(total.dtype)
        largest = largest * factors  # rounding keeps the order, so the largest product is that of the largest value
        # A barrier, because a product that is fused with the difference below might not be rounded.
        values = jax.lax.optimization_barrier(values * factors.reshape(-1, *[1] * (values.ndim - 1)))
    top = jnp.maximum(jnp.max(total.bins, 0), _bin(largest if each else jnp.max(largest)))
    bins, limbs = _bins(top, len(total.limbs)), []
    for limb, before, bin in zip(total.limbs, total.bins, bins, strict=True):
        digits = _digits(values, *(x[None] if x.ndim else x for x in (bin, top)))
        limbs.append(jnp.where(bin == before, limb, 0) + jnp.sum(digits, 0, dtype=jnp.int32))
    return dataclasses.replace(total, limbs=limbs, bins=bins)


def rounded(total: Sum, axis_name: str | None = None) -> Array:
    """The sum over all devices of the mapped axis, rounded once to its type; NaN with a number that is not finite.

    Raises:
      InvalidInput: (when traced) room for more numbers than the limbs can hold.
    """
    room = total.room if axis_name is None else total.room * jax.lax.axis_size(axis_name)
    if room > MOST:
        raise InvalidInput(
            f"An exact sum holds at most {MOST:,} clients, and this round has room for {room:,}: take a smaller "
            "cohort, or fc.reduce.weighted_mean() in place of exact_mean."
        )
    bins, limbs, count = total.bins, total.limbs, len(total.limbs)
    if axis_name is not None:
        bins = _bins(jax.lax.pmax(jnp.max(bins, 0), axis_name), count)
        here = [jnp.where(now == before, x, 0) for x, now, before in zip(limbs, bins, total.bins, strict=True)]
        limbs = jax.lax.psum(here, axis_name)
    top = jnp.max(bins, 0)
    lowest = top - count + 1
    levels = [_chosen((lowest + level) % count, limbs) for level in range(count)]  # in the order of their bins
    return jnp.where(top < NOT_FINITE, _rounded(levels, total.dtype) * _unit(lowest, total.dtype), jnp.nan)


def finished(totals: PyTree, axis_name: str | None = None) -> PyTree:
    """A pytree of sums over all devices: each ``Sum`` as ``rounded``, the other arrays added up as they are."""
    leaves, structure = jax.tree.flatten(totals, is_leaf=lambda x: isinstance(x, Sum))
    arrays = [x for x in leaves if not isinstance(x, Sum)]
    rest = iter(arrays if axis_name is None else jax.lax.psum(arrays, axis_name))
    done = [rounded(x, axis_name) if isinstance(x, Sum) else next(rest) for x in leaves]
    return jax.tree.unflatten(structure, done)


def _limbs(dtype: np.dtype) -> int:
    return 1 + -(-jnp.finfo(dtype).nmant // BITS)  # 3 for float32, 5 for float64: the top bin may hold one bit only


def _bias(dtype: np.dtype) -> int:
    return 1 - int(jnp.finfo(dtype).minexp)


def _word(dtype: np.dtype, unsigned: bool = False) -> np.dtype:
    return np.dtype(f"{'u' if unsigned else ''}int{8 * dtype.itemsize}")


def _bin(largest: Array) -> Array:
    """The lowest bin in which a number is less than half a unit of the next bin, int32.

    It is no lower than one with L - 1 bins below that floats can scale.
    """
    dtype = largest.dtype
    bits = jax.lax.bitcast_convert_type(largest, _word(dtype))  # without a sign
    exponent = (bits >> jnp.finfo(dtype).nmant).astype(jnp.int32)  # from 0
    return jnp.where(exponent > 2 * _bias(dtype), NOT_FINITE, jnp.maximum((exponent + 1) // BITS, _limbs(dtype)))


def _bins(top: Array, count: int) -> Array:
    """The bins of all limbs, ``[L, ...]``."""
    slots = jnp.arange(count, dtype=jnp.int32).reshape(-1, *[1] * top.ndim)
    return top[None] - (top[None] - slots) % count


def _chosen(slot: Array, limbs: list[Array]) -> Array:
    return functools.reduce(lambda x, j: jnp.where(slot == j, limbs[j], x), range(1, len(limbs)), limbs[0])


def _power_of_two(exponent: Array, dtype: np.dtype) -> Array:
    """``2^exponent`` exactly, for the exponents of normal numbers."""
    bits = (exponent + _bias(dtype)).astype(_word(dtype)) << jnp.finfo(dtype).nmant
    return jax.lax.bitcast_convert_type(bits, dtype)


def _unit(bin: Array, dtype: np.dtype) -> Array:
    """The number of which a bin's digit is a multiple."""
    return _power_of_two(BITS * bin - _bias(dtype), dtype)


def _inverse(bin: Array, dtype: np.dtype) -> Array:
    return _power_of_two(_bias(dtype) - BITS * bin, dtype)


@jax.custom_jvp
def _digits(values: Array, bin: Array, top: Array) -> Array:
    """The digit of each number in a bin: ``rn(x / u_k) - 2^13 rn(x / u_(k+1))``, or ``rn(x / u_k)`` in the top bin."""
    dtype, above = values.dtype, jnp.minimum(bin + 1, top)
    higher = jnp.where(bin == top, 0, jnp.round(values * _inverse(above, dtype)) * _unit(above, dtype))
    return jnp.round((values - higher) * _inverse(bin, dtype)).astype(jnp.int32)  # the difference is exact


@_digits.defjvp
def _no_derivative(primals, tangents):
    raise InvalidInput(
        "An exact sum adds whole numbers, which have no derivative: take fc.reduce.weighted_mean() to differentiate "
        "through rounds."
    )


def _rounded(levels: list[Array], dtype: np.dtype) -> Array:
    """``sum_k levels[k] 2^(13 k)``, rounded once, to nearest even."""
    levels = _carried(levels)
    negative = levels[-1] < 0
    levels = _carried([jnp.where(negative, -x, x) for x in levels])  # digits of 13 bits, and a top of 31
    unsigned, low = _word(dtype, True), 2 * BITS
    one, two, *others = (x.astype(unsigned) for x in levels)
    below, above = (two << BITS) | one, functools.reduce(lambda x, y: (x << BITS) | y, reversed(others))

    # The first 32 (64) bits of above * 2^26 + below, the last of which says whether any bit follows. A shift by more
    # than the word has bits gives 0.
    zeros, size = jax.lax.clz(above), 8 * dtype.itemsize
    left, right = jax.lax.shift_left, jax.lax.shift_right_logical
    first = left(above, zeros) | right(below, low - zeros) | left(below, zeros - low)
    follow = left(below, size - low + zeros) != 0
    magnitude = (first | follow.astype(unsigned)).astype(dtype)
    exponent = low - zeros.astype(jnp.int32)
    return jnp.where(negative, -magnitude, magnitude) * _power_of_two(exponent, dtype)


def _carried(levels: list[Array]) -> list[Array]:
    """The same number with digits from 0 to 2^13 - 1, except the top."""
    digits, carry = [], jnp.zeros((), jnp.int32)
    for x in levels[:-1]:
        x = x + carry
        digits.append(x & (2**BITS - 1))
        carry = x >> BITS
    return [*digits, levels[-1] + carry]
