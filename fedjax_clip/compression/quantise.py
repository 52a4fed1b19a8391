"""Quantisers: few bits for each value."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.compression.base import Code, Compressor, first
from fedjax_clip.compression.coding import find
from fedjax_clip.core import checks
from fedjax_clip.core.types import Array, InvalidInput

SAMPLE = 2**14  # values sampled from a longer vector to estimate its distribution


def floats(bits: int = 32) -> Compressor:
    """Sends every value: as float32, or as bfloat16, rounded to nearest.

    Args:
      bits: 32, lossless, or 16.

    Raises:
      InvalidInput: another number of bits.

    Example:
      >>> link = fc.uplink.compress(fc.compression.floats(16))  # half the bytes
    """
    if bits not in (16, 32):
        raise InvalidInput(f"floats have 16 or 32 bits, not {bits!r}.")
    short = bits == 16

    def encode(x, key, count=None):
        whole = x.astype(jnp.bfloat16 if short else jnp.float32)
        symbols = jax.lax.bitcast_convert_type(whole, jnp.uint16 if short else jnp.uint32).astype(jnp.uint32)
        return Code(_only(symbols, count), jnp.zeros(0, jnp.float32), alphabet=2**bits, size=len(x))

    def decode(code, d, key):
        symbols = code.symbols.astype(jnp.uint16 if short else jnp.uint32)
        whole = jax.lax.bitcast_convert_type(symbols, jnp.bfloat16 if short else jnp.float32)
        return whole.astype(jnp.float32)

    return Compressor(encode, decode, not short, not short, lambda d: 2.0**-16 if short else 0.0, pointwise=True)


def uniform(bits: int = 8, bucket: int | None = None, coding: str = "fixed") -> Compressor:
    """Stochastic rounding to ``2^bits`` even levels between the least and the greatest value of a bucket. Unbiased.

    Guarantee: ``E ||C(x) - x||^2 <= d / (2 (2^bits - 1)^2) ||x||^2``, with d at most the bucket.

    Args:
      bits: 1 to 16, for each value.
      bucket: values that share two floats for their range; all of them by default.
      coding: of the levels, see ``fc.compression.Coding``.

    Raises:
      InvalidInput: bits or a bucket out of range, an unknown coding.

    Example:
      >>> link = fc.uplink.compress(fc.compression.rotated(fc.compression.uniform(4)))

    Source: Suresh et al. (2017), "Distributed Mean Estimation with Limited Communication", section 2.2.
    """
    bits, bucket = _checked(bits, 1, bucket, coding)
    top, row = 2**bits - 1, bucket or 512  # a single range is computed in rows, too, which vectorises

    def encode(x, key, count=None):
        blocks = _blocks(x, row, edge=True)
        low, high = jnp.min(blocks, 1, keepdims=True), jnp.max(blocks, 1, keepdims=True)
        if bucket is None:
            low, high = jnp.min(low, keepdims=True), jnp.max(high, keepdims=True)
        level = (blocks - low) / _nonzero(high - low) * top
        symbols = jnp.clip(_rounded(level, key), 0, top).ravel()[: len(x)].astype(jnp.uint32)
        scales = jnp.concatenate([low, high], 1).ravel()
        return Code(_only(symbols, count), scales, alphabet=top + 1, coding=coding, size=len(x))

    def decode(code, d, key):
        low, high = jnp.moveaxis(code.scales.reshape(-1, 2, 1), 1, 0)
        share = _blocks(code.symbols.astype(jnp.float32), row) / top
        return (low * (1 - share) + high * share).ravel()[:d]

    def error(d):
        return _bucket(d, bucket) / (2 * top**2)

    return Compressor(encode, decode, True, False, error, pointwise=True)


def qsgd(bits: int = 8, norm: str = "l2", bucket: int | None = None, coding: str = "fixed") -> Compressor:
    """QSGD: a sign and a level of ``s = 2^(bits-1) - 1``, stochastically rounded, in units of a norm / s. Unbiased.

    Guarantee: ``E ||C(x) - x||^2 <= min(d / (4 s^2), sqrt(d) / s) ||x||^2``, with d at most the bucket. It may enlarge.

    Args:
      bits: 2 to 16, for each value if the coding is fixed; ``elias_gamma``, ``runs`` or ``huffman`` take fewer if most
        levels are small.
      norm: ``"l2"`` as in the paper, or ``"linf"``, which wastes no levels.
      bucket: values that share a norm; all of them by default.
      coding: of the levels, see ``fc.compression.Coding``.

    Raises:
      InvalidInput: bits or a bucket out of range, an unknown norm or coding.

    Example:
      >>> link = fc.uplink.compress(fc.compression.qsgd(4, bucket=512, coding="runs"))

    Source: Alistarh et al. (2017), "QSGD", section 3.1 and lemma 3.1.
    """
    bits, bucket = _checked(bits, 2, bucket, coding)
    if norm not in ("l2", "linf"):
        raise InvalidInput(f"norm must be 'l2' or 'linf', not {norm!r}.")
    top, row = 2 ** (bits - 1) - 1, bucket or 512

    def encode(x, key, count=None):
        blocks = _blocks(x, row)
        size = jnp.abs(blocks)
        add, power = (jnp.sum, 2) if norm == "l2" else (jnp.max, 1)
        unit = add(size**power, 1, keepdims=True)
        unit = (add(unit, keepdims=True) if bucket is None else unit) ** (1 / power)
        level = jnp.clip(_rounded(size / _nonzero(unit) * top, key), 0, top).astype(jnp.uint32)
        negative = (blocks < 0).astype(jnp.uint32)
        symbols = jnp.where(level > 0, 2 * level - negative, 0)  # 0, -1, 1, -2, 2 ...
        symbols = _only(symbols.ravel()[: len(x)], count)
        return Code(symbols, unit.ravel(), alphabet=2 * top + 1, coding=coding, size=len(x))

    def decode(code, d, key):
        level = ((code.symbols + 1) // 2).astype(jnp.float32)
        signed = jnp.where(code.symbols % 2 == 1, -level, level)
        return (_blocks(signed, row) * code.scales[:, None] / top).ravel()[:d]

    def error(d):
        size = _bucket(d, bucket)
        return min(size / (4 * top**2), math.sqrt(size) / top)

    return Compressor(encode, decode, True, False, error, pointwise=True)


def terngrad(bucket: int | None = None, coding: str = "fixed") -> Compressor:
    """TernGrad: ``max|x| sign(x_i) b_i`` with ``b_i`` one with probability ``|x_i| / max|x|``. Unbiased.

    It is ``qsgd`` with one level, in units of the largest value. Two bits for each value, or at most 1.6 by
    ``"huffman"``.

    Args:
      bucket, coding: as ``qsgd``.

    Example:
      >>> link = fc.uplink.compress(fc.compression.terngrad(coding="huffman"))

    Source: Wen et al. (2017), "TernGrad", equation 4; its gradient clipping is a separate link here.
    """
    return qsgd(2, "linf", bucket, coding)


def sign(coding: str = "fixed") -> Compressor:
    """One bit per value and one scale: ``||x||_1 / d sign(x)``. Biased, a contraction: use error feedback.

    Guarantee: ``||C(x) - x||^2 = ||x||^2 - ||x||_1^2 / d <= (1 - 1/d) ||x||^2``, and no norm grows.

    Args:
      coding: of the signs, see ``fc.compression.Coding``.

    Example:
      >>> link = fc.uplink.error_feedback(fc.compression.sign())

    Source: Karimireddy et al. (2019), "Error Feedback Fixes SignSGD", the scaled sign of section 4.
    """
    find(coding)

    def encode(x, key, count=None):
        number = len(x) if count is None else jnp.maximum(count, 1).astype(jnp.float32)
        scale = jnp.sum(jnp.abs(x)) / number
        return Code(_only((x < 0).astype(jnp.uint32), count), scale[None], alphabet=2, coding=coding, size=len(x))

    def decode(code, d, key):
        return code.scales[0] * jnp.where(code.symbols == 1, -1.0, 1.0)

    return Compressor(encode, decode, False, True, lambda d: 1 - 1 / d, pointwise=True)


def kmeans(levels: int = 16, iterations: int = 10, coding: str = "fixed") -> Compressor:
    """Sends each value as the nearest entry of a codebook from Lloyd's algorithm, and the codebook. Biased.

    The algorithm begins from quantiles. For a vector longer than 16,384 values, all iterations but the last use 16,384
    evenly spaced ones. Guarantee: each centroid is the mean of its values, so no norm grows and ``||C(x) - x||^2 =
    ||x||^2 - ||C(x)||^2``.

    Args:
      levels: number of centroids, 2 to 256.
      iterations: of Lloyd's algorithm, at least 1.
      coding: of the numbers of centroids, see ``fc.compression.Coding``.

    Raises:
      InvalidInput: levels or iterations out of range, an unknown coding.

    Example:
      >>> link = fc.uplink.error_feedback(fc.compression.kmeans(4, coding="huffman"))

    Source: Lloyd (1982), "Least Squares Quantization in PCM"; Han, Mao and Dally (2016), "Deep Compression", section 3.
    """
    checks.count("kmeans: levels", levels)
    checks.count("kmeans: iterations", iterations)
    if not 2 <= levels <= 256:
        raise InvalidInput(f"kmeans: levels must lie between 2 and 256, and is {levels}.")
    find(coding)

    def nearest(x, codebook):
        ends = (codebook[1:] + codebook[:-1]) / 2
        return jnp.searchsorted(ends, x, method="compare_all" if levels <= 16 else "scan")

    def encode(x, key, count=None):
        live = first(len(x), count)
        stride = -(-len(x) // SAMPLE)
        some, known = x[::stride], live[::stride]
        share = (jnp.arange(levels, dtype=jnp.float32) + 0.5) / levels
        middle = (share * jnp.sum(known, dtype=jnp.float32)).astype(jnp.int32)
        ordered = jnp.sort(jnp.where(known, some, jnp.inf))
        codebook = jnp.where(jnp.any(live), ordered[jnp.minimum(middle, len(some) - 1)], 0)

        def centroids(x, live, symbols, codebook):
            nothing = jnp.zeros(levels, jnp.float32)
            total = nothing.at[symbols].add(jnp.where(live, x, 0))
            members = nothing.at[symbols].add(live.astype(jnp.float32))
            return jnp.where(members > 0, total / jnp.maximum(members, 1), codebook)

        def move(_, codebook):
            return centroids(some, known, nearest(some, codebook), codebook)

        before = jax.lax.fori_loop(0, iterations - 1, move, codebook)
        symbols = nearest(x, before)
        scales = centroids(x, live, symbols, before)
        return Code(_only(symbols.astype(jnp.uint32), count), scales, alphabet=levels, coding=coding, size=len(x))

    def decode(code, d, key):
        return code.scales[code.symbols]

    return Compressor(encode, decode, False, True, lambda d: 1.0, pointwise=True)


@functools.cache
def gaussian_levels(bits: int) -> np.ndarray:
    """The ``2^bits`` levels with the least squared error for a standard normal value, ``[2^bits]`` ascending.

    Source: Max (1960), "Quantizing for Minimum Distortion"; Lloyd (1982).
    """
    density = np.vectorize(lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi))
    below = np.vectorize(lambda z: math.erfc(-z / math.sqrt(2)) / 2)
    levels = np.linspace(-2, 2, 2**bits) if bits > 1 else np.array([-1.0, 1.0])
    for _ in range(2000):
        ends = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels = -np.diff(density(ends)) / np.diff(below(ends))
    return (levels - levels[::-1]) / 2


def _rounded(level: Array, key: Array) -> Array:
    """Rounds up or down at random, with a bias of at most 2^-17: each random word serves two values, to save time."""
    words = jax.random.bits(key, (-(-level.size // 2), 1), jnp.uint32)
    halves = (words >> jnp.array([[0, 16]], jnp.uint32)).ravel()[: level.size].reshape(level.shape) & 0xFFFF
    return jnp.floor(level + (halves.astype(jnp.float32) + 0.5) * 2.0**-16)


def _only(symbols: Array, count: Array | None) -> Array:
    return symbols if count is None else jnp.where(first(len(symbols), count), symbols, 0)


def _nonzero(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)


def _bucket(d: int, bucket: int | None) -> int:
    return d if bucket is None else min(d, bucket)


def _blocks(x: Array, bucket: int | None, edge: bool = False) -> Array:
    """``[ceil(d / bucket), bucket]``, padded with zeros, or with the last value."""
    size = _bucket(len(x), bucket)
    fill = {"mode": "edge"} if edge else {}
    return jnp.pad(x, (0, -len(x) % size), **fill).reshape(-1, size)


def _checked(bits: int, least: int, bucket: int | None, coding: str) -> tuple[int, int | None]:
    find(coding)
    return checks.count("bits", bits, least, 16), bucket if bucket is None else checks.count("bucket", bucket)
