"""Sparsifiers: they send few of the values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.compression.base import Compressor
from fedjax_clip.compression.coding import find
from fedjax_clip.compression.quantise import SAMPLE, floats
from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput


def top_k(k: float, values: Compressor | None = None, positions: str = "elias_delta") -> Compressor:
    """Sends the k values of largest magnitude and their positions. Biased, a contraction: use error feedback.

    Guarantee: ``||C(x) - x||^2 <= (1 - k/d) ||x||^2``; with ``values`` of error e < 1 the factor is
    ``1 - (1 - e) k/d``. With ``values=sign()`` it is sparse ternary compression.

    Args:
      k: the number of values, or below 1 their fraction: magnitude pruning to a sparsity of ``1 - k``.
      values: compressor of the values that are kept; float32 by default.
      positions: coding of the gaps between them, see ``fc.compression.Coding``.

    Raises:
      InvalidInput: a k that is neither, a sparse compressor of values, an unknown coding.

    Example:
      >>> link = fc.uplink.error_feedback(fc.compression.top_k(0.01, values=fc.compression.qsgd(4)))

    Source: Aji and Heafield (2017), "Sparse Communication for Distributed Gradient Descent"; Stich, Cordonnier and
    Jaggi (2018), "Sparsified SGD with Memory", definition 2.1; Sattler et al. (2019), "Robust and
    Communication-Efficient Federated Learning from Non-IID Data".
    """
    k = _checked("top_k", k)
    values = _inner(values, positions)

    def encode(x, key, count=None):
        index = _largest(jnp.abs(x), _number(k, len(x)))
        inner = values.encode(x[index], key)
        return dataclasses.replace(inner, index=index, size=len(x), positions=positions)

    def decode(code, d, key):
        return _placed(code.index, values.decode(code, len(code.index), key), d)

    def error(d):
        share, e = _number(k, d) / d, values.error(_number(k, d))
        return 1 - (1 - e) * share if e <= 1 else e

    return Compressor(encode, decode, False, values.contracts, error, sparse=True)


def random_k(k: float, values: Compressor | None = None, unbiased: bool = True) -> Compressor:
    """Sends k values at random positions. The server knows the positions' seed, so only values travel.

    Guarantee if ``unbiased``: values are multiplied by d/k, and ``E ||C(x) - x||^2 <= (d/k - 1) ||x||^2``. Otherwise it
    is a contraction, ``<= (1 - k/d) ||x||^2``, for error feedback.

    Args:
      k: the number of values, or below 1 their fraction.
      values: compressor of the values that are kept; float32 by default.
      unbiased: whether the kept values are scaled up to represent the others.

    Raises:
      InvalidInput: a k that is neither, values that are sparse themselves.

    Example:
      >>> link = fc.uplink.error_feedback(fc.compression.random_k(0.01, unbiased=False))

    Source: Konečný et al. (2016), "Federated Learning: Strategies for Improving Communication Efficiency", random mask;
    Stich, Cordonnier and Jaggi (2018), definition 2.1.
    """
    k = _checked("random_k", k)
    values = _inner(values, "fixed")

    def places(d, key):
        return _subset(_number(k, d), d, jax.random.fold_in(key, 1))

    def encode(x, key, count=None):
        return dataclasses.replace(values.encode(x[places(len(x), key)], key), size=len(x))

    def decode(code, d, key):
        number = _number(k, d)
        return _placed(places(d, key), values.decode(code, number, key), d) * (d / number if unbiased else 1)

    def error(d):
        share, e = _number(k, d) / d, values.error(_number(k, d))
        if unbiased:
            return (1 + e) / share - 1 if values.unbiased else math.inf
        return 1 - (1 - e) * share

    both = unbiased and values.unbiased
    return Compressor(encode, decode, both, values.contracts and not unbiased, error, sparse=True)


def threshold(at: float | Array, values: Compressor | None = None, positions: str = "elias_delta") -> Compressor:
    """Sends all values of magnitude above a threshold. Biased; ``threshold(0.0)`` is lossless.

    Guarantee: ``||C(x) - x||^2 <= at^2 d``, and no norm grows. The relative error is at most 1.

    Args:
      at: at least 0, in the units of the update; may be traced.
      values: compressor of the kept values, which must treat each value separately; float32 by default.
      positions: coding of the gaps between them, see ``fc.compression.Coding``.

    Raises:
      InvalidInput: a negative threshold, values that are sparse or rotated, an unknown coding.

    Example:
      >>> link = fc.uplink.error_feedback(fc.compression.threshold(1e-3))

    Source: Strom (2015), "Scalable Distributed DNN Training Using Commodity GPU Cloud Computing"; Dutta et al. (2020),
    "On the Discrepancy between the Theoretical Analysis and Practical Implementations of Compressed Communication".
    """
    checks.within("threshold", at, 0)
    values = _inner(values, positions)
    if not values.pointwise:
        raise InvalidInput("threshold keeps a number of values that varies: rotate in front of it, not inside.")

    def encode(x, key, count=None):
        passed, d = jnp.abs(x) > at, len(x)
        rank = _count_up(passed)
        into = jnp.where(passed, rank - 1, d)
        index = jnp.full(d, d, jnp.int32).at[into].set(jnp.arange(d, dtype=jnp.int32), mode="drop")
        kept = jnp.where(index < d, x.at[index].get(mode="clip"), 0)
        inner = values.encode(kept, key, rank[-1])
        return dataclasses.replace(inner, index=index, count=rank[-1], size=d, positions=positions)

    def decode(code, d, key):
        return _placed(code.index, values.decode(code, d, key), d)

    def error(d):
        return max(1.0, values.error(d))

    return Compressor(encode, decode, False, values.contracts, error, sparse=True)


def _largest(x: Array, k: int) -> Array:
    """``jnp.sort(jax.lax.top_k(x, k)[1])`` of values at least 0.

    On a CPU, XLA's top-k puts each value that is larger than the least so far onto a heap. Here a sample gives a lower
    bound of the k largest, counting confirms it, and smaller values are skipped. That halves the time.
    """
    if len(x) > 4 * SAMPLE:
        some = x[:: len(x) // SAMPLE | 1]
        share = len(some) * k / len(x)
        low = jnp.min(jax.lax.top_k(some, min(len(some), math.ceil(share + 4 * math.sqrt(share) + 1)))[0])
        x = jnp.where((x < low) & (tree.count(x >= low) >= k), -1, x)
    return jnp.sort(jax.lax.top_k(x, k)[1])


def _subset(k: int, d: int, key: Array) -> Array:
    """k of d places, ascending: the first k distinct of many draws, or the k of highest rank if k is large.

    Fewer than k of 1.5 k + 64 draws are distinct with a probability far below 1e-12; then ``d`` fills the missing
    places.
    """
    if 4 * k > d:
        bits = jax.random.bits(key, (d,), jnp.uint32)
        ranks = jax.lax.bitcast_convert_type((bits >> 3) + jnp.uint32(0x20000000), jnp.float32)  # positive and normal
        return _largest(ranks, k)
    draws = jax.random.randint(key, (k + k // 2 + 64,), 0, d, jnp.int32)
    order = jnp.argsort(draws, stable=True)
    ranked = draws[order]
    first = jnp.zeros(len(draws), bool).at[order].set(jnp.diff(ranked, prepend=-1) > 0)
    return jnp.sort(jnp.where(first & (jnp.cumsum(first) <= k), draws, d))[:k]


def _count_up(passed: Array) -> Array:
    """``jnp.cumsum(passed)``, uint32 ``[d]``, in rows of 128 by a product with ones: faster than XLA's own scan."""
    rows = jnp.pad(passed, (0, -len(passed) % 128)).reshape(-1, 128).astype(jnp.float32)
    within = rows @ np.triu(np.ones((128, 128), np.float32))  # exact: whole numbers up to 128
    total = within[:, -1].astype(jnp.uint32)
    before = jnp.cumsum(total) - total
    return (before[:, None] + within.astype(jnp.uint32)).ravel()[: len(passed)]


def _placed(index: Array, values: Array, d: int) -> Array:
    return jnp.zeros(d, values.dtype).at[index].set(values, mode="drop")


def _number(k: float, d: int) -> int:
    return max(1, min(d, round(k * d))) if isinstance(k, float) and k < 1 else min(int(k), d)


def _checked(name: str, k: float) -> float:
    if isinstance(k, jax.core.Tracer):
        return k
    try:
        return float(k) if 0 < k < 1 else checks.count(name, int(k) if isinstance(k, float) and k == int(k) else k)
    except (TypeError, ValueError, OverflowError):
        wanted = "a whole number of values or a fraction between 0 and 1"
        raise InvalidInput(f"{name}: k must be {wanted}, not {checks.shown(k)}.") from None


def _inner(values: Compressor | None, positions: str) -> Compressor:
    find(positions)
    if values is None:
        return floats()
    if not isinstance(values, Compressor):
        raise InvalidInput(f"values must be a compressor such as qsgd(4), not {type(values).__name__}.")
    if values.sparse:
        raise InvalidInput("values are sparse already: a sparse compressor cannot stand inside of another.")
    return values
