"""Random rotation, which makes every coordinate nearly normal, and the quantisers made for that."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.compression.base import Code, Compressor
from fedjax_clip.compression.coding import find
from fedjax_clip.compression.quantise import gaussian_levels
from fedjax_clip.core import checks
from fedjax_clip.core.types import Array, InvalidInput


def hadamard(x: Array) -> Array:
    """``H x / sqrt(n)`` with Sylvester's matrix H, in n log2 n additions: orthogonal, and its own inverse.

    Args:
      x: ``[n]``, n a power of two.

    Raises:
      InvalidInput: another length.

    Example:
      >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> fc.compression.hadamard(fc.compression.hadamard(x)).tolist()
      [1.0, 2.0, 3.0, 4.0]
    """
    n = len(x)
    if n & (n - 1) or n == 0:
        raise InvalidInput(f"The Hadamard transform needs a length that is a power of two, not {n}.")
    step = 1
    while step < n:
        order = min(4, n // step)  # four-point butterflies: two of the log2 n steps in one pass over memory
        parts = list(jnp.moveaxis(x.reshape(-1, order, step), 1, 0))
        pairs = [(parts[i] + parts[i + 1], parts[i] - parts[i + 1]) for i in range(0, order, 2)]
        (a, b), *rest = pairs
        x = jnp.stack([a, b] if not rest else [a + rest[0][0], b + rest[0][1], a - rest[0][0], b - rest[0][1]], 1)
        step *= order
    return x.reshape(n) / math.sqrt(n)


def rotated(compressor: Compressor) -> Compressor:
    """A compressor of the randomly rotated vector; the decoder rotates back. Both ends know the rotation.

    ``H D x`` with random signs D and Hadamard's matrix on 4,096 values at a time, taken from all over x. x is padded
    with zeros to a multiple of 4,096 (to a power of two if it is shorter). No value is large after that, which helps
    quantisers whose error grows with the range. The compressor's guarantee holds for the padded size.

    Args:
      compressor: of the rotated vector.

    Example:
      >>> link = fc.uplink.compress(fc.compression.rotated(fc.compression.uniform(2)))

    Source: Suresh et al. (2017), "Distributed Mean Estimation with Limited Communication", section 3.
    """
    checks.kind("compressor", compressor, Compressor, "a compressor such as uniform(4)")

    def encode(x, key, count=None):
        return dataclasses.replace(compressor.encode(_forward(x, key).ravel(), key), size=_padded(len(x)))

    def decode(code, d, key):
        return _back(compressor.decode(code, _padded(d), key).reshape(_shape(d)), d, key)

    return compressor._replace(
        encode=encode, decode=decode, error=lambda d: compressor.error(_padded(d)), pointwise=False
    )


def eden(bits: int = 1, unbiased: bool = True, coding: str = "fixed") -> Compressor:
    """DRIVE (one bit) and EDEN: rotates, rounds to the best levels for normal values, and sends one scale.

    Each block of 4,096 values is rotated together, see ``rotated``, and has its own scale, ``||x||^2 / <Rx, q>``. So
    ``<C(x), x> = ||x||^2`` exactly. That is unbiased for a uniform rotation, and nearly so for this one: its bias
    vanishes as the values get many, so ``unbiased`` is not promised. The error is close to 0.571, 0.134, 0.036 ...
    ``||x||^2`` for 1, 2, 3 bits, ``1 / (1 - D) - 1`` of the distortion D for a normal value. The other scale, ``<Rx, q>
    / ||q||^2``, has the least error and enlarges no norm: take it for error feedback.

    Args:
      bits: 1 to 8 for each value (of which there are up to 4,095 more, see ``rotated``).
      unbiased: whether to take the first scale.
      coding: of the levels, see ``fc.compression.Coding``.

    Raises:
      InvalidInput: bits out of range, an unknown coding.

    Example:
      >>> link = fc.uplink.compress(fc.compression.eden(1))  # DRIVE

    Source: Vargaftik et al. (2021), "DRIVE", section 3; Vargaftik et al. (2022), "EDEN", Algorithm 1.
    """
    bits = checks.count("eden: bits", bits, 1, 8)
    find(coding)
    levels = gaussian_levels(bits).astype("float32")
    ends = (levels[1:] + levels[:-1]) / 2

    def encode(x, key, count=None):
        r = _forward(x, key)
        norm = jnp.sqrt(_by_block(r**2))
        unit = r * (math.sqrt(r.shape[0] * r.shape[2]) / jnp.where(norm > 0, norm, 1))[None, :, None]
        symbols = jnp.searchsorted(ends, unit, method="compare_all" if bits <= 4 else "scan")
        q = jnp.asarray(levels)[symbols]
        along = _by_block(r * q)
        if unbiased:
            scales = jnp.where(norm > 0, norm**2 / jnp.where(along > 0, along, 1), 0)
        else:
            scales = along / _by_block(q**2)
        return Code(symbols.ravel().astype(jnp.uint32), scales, alphabet=2**bits, coding=coding, size=r.size)

    def decode(code, d, key):
        q = jnp.asarray(levels)[code.symbols].reshape(_shape(d))
        return _back(q * code.scales[None, :, None], d, key)

    def error(d):
        together = _padded(d) // _shape(d)[1]
        return math.inf if unbiased else 1 - together ** (-1.0 if bits == 1 else -2.0)

    return Compressor(encode, decode, False, not unbiased, error)


def _shape(d: int) -> tuple[int, int, int]:
    """``(p, m, q)``: d values and padding in m blocks of p q, each with p runs of q neighbours that lie far apart.

    Two small products with Hadamard's matrices transform a block, and 4,096 values are then nearly normal.
    """
    log = min((d - 1).bit_length(), 12)
    return 1 << log // 2, -(-d // (1 << log)), 1 << log - log // 2


def _padded(d: int) -> int:
    return math.prod(_shape(d))


def _by_block(r: Array) -> Array:
    """``[m]`` sums over the values of each block."""
    return jnp.sum(r, (0, 2))


def random_signs(key: Array, shape: tuple[int, ...]) -> Array:
    """Independent fair signs, float32, from one random bit each; ``jax.random.rademacher`` draws a word for each.

    Args:
      key: PRNG key.
      shape: of the result.

    Example:
      >>> signs = fc.compression.random_signs(jax.random.key(0), (1000,))
    """
    size = math.prod(shape)
    return unpacked_signs(jax.random.bits(key, (-(-size // 32),), jnp.uint32)).ravel()[:size].reshape(shape)


def unpacked_signs(words: Array) -> Array:
    """``[..., 32]`` signs, float32, of the bits of uint32 ``[...]``."""
    places = jnp.arange(32, dtype=jnp.uint32).reshape(*[1] * words.ndim, 32)
    return jnp.where((words[..., None] >> places) & 1, jnp.float32(1), -1)


def _signed(r: Array, key: Array) -> Array:
    return r * random_signs(jax.random.fold_in(key, 2), r.shape)


def _transformed(r: Array) -> Array:
    """Hadamard's matrix on each block of ``[p, m, q]``: ``H_p X H_q``, orthogonal and its own inverse."""
    left, right = (_matrix(r.shape[axis]) for axis in (0, 2))
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("ab,bmc,cd->amd", left, r, right, precision=exact)


def _matrix(n: int) -> np.ndarray:
    """Hadamard's matrix of order ``n``, orthogonal: its signs are the parities of ``row & column``."""
    index = np.arange(n)
    return ((1 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)) / math.sqrt(n)).astype(np.float32)


def _forward(x: Array, key: Array) -> Array:
    """x rotated, ``[p, m, q]``."""
    shape = _shape(len(x))
    return _transformed(_signed(jnp.pad(x, (0, math.prod(shape) - len(x))).reshape(shape), key))


def _back(r: Array, d: int, key: Array) -> Array:
    return _signed(_transformed(r), key).ravel()[:d]
