"""Codes of vectors, their bytes, and the compressors that make them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.compression import coding
from fedjax_clip.core.tree import count, ravel
from fedjax_clip.core.types import Array, InvalidInput, PyTree

FLOAT = 2**32  # the alphabet of float32, bit by bit


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["symbols", "scales", "index", "count"],
    meta_fields=["alphabet", "coding", "size", "positions"],
)
@dataclasses.dataclass(frozen=True)
class Code:
    """A code that travels in place of ``x [size]``: symbols, a few floats, and the symbols' places.

    Attributes:
      symbols: uint32 ``[n]``, each below ``alphabet``; zeros after the first ``count``.
      scales: float32 ``[m]``: ranges, norms, a codebook.
      index: int32 ascending places of the symbols, ``size`` after the first ``count``; ``None`` if the receiver knows
        them.
      count: uint32, the number of symbols that travel; ``None`` if always all.
      alphabet: the number of different symbols; ``2**32`` for the bits of float32.
      coding: of the symbols; see ``fc.compression.Coding``.
      size: d, of the vector.
      positions: coding of the gaps between places.

    Example:
      >>> code = fc.compression.top_k(0.01).encode(jnp.arange(1000.0), key)
      >>> len(fc.compression.to_bytes(code)) == int(fc.compression.nbytes(code))
      True
    """

    symbols: Array
    scales: Array
    index: Array | None = None
    count: Array | None = None
    alphabet: int = FLOAT
    coding: str = "fixed"
    size: int = 0
    positions: str = "elias_delta"


class Compressor(NamedTuple):
    """Encodes a vector into a code, and decodes it.

    Attributes:
      encode: ``(x [d], key, count) -> Code``; encodes the first ``count`` values of ``x``, or all if ``None``.
      decode: ``(code, d, key) -> x [d]``, with the key of ``encode``, so that its random numbers need not travel.
      unbiased: whether the decoded vector has the encoded one as its mean over keys.
      contracts: whether decoding never gives a larger norm than that of the encoded vector, up to rounding.
      error: ``d -> e`` with ``E ||decoded - x||^2 <= e ||x||^2`` for every x; infinite without a bound. A biased one
        with e < 1 is a contraction with ``delta = 1 - e``.
      sparse: whether it sends the places of its values; then it cannot be nested in another sparse compressor.
      pointwise: whether each symbol belongs to one value, so that symbols after ``count`` need not travel.

    Example:
      >>> compressor = fc.compression.top_k(0.01, values=fc.compression.qsgd(4))
      >>> x = jnp.arange(1000.0)
      >>> code = compressor.encode(x, key)
      >>> compressor.decode(code, len(x), key).shape
      (1000,)
    """

    encode: Callable[..., Code]
    decode: Callable[[Code, int, Array], Array]
    unbiased: bool = False
    contracts: bool = False
    error: Callable[[int], float] = lambda d: math.inf
    sparse: bool = False
    pointwise: bool = False


def check_memory(name: str, compressor: Compressor, tree: PyTree) -> None:
    """Refuses a compressor whose relative error may exceed 1, for a client that stores the error.

    Raises:
      InvalidInput: an error that may be above 1 for this number of values.
    """
    size = sum(np.size(x) for x in jax.tree.leaves(tree))
    if (error := compressor.error(size)) > 1:
        raise InvalidInput(
            f"{name} stores what is lost and sends it later, but of {size} values this compressor may lose "
            f"{error:.3g} times their norm squared, so that what it stores would grow without end. Take more bits, "
            "smaller buckets, or unbiased=False."
        )


def nbits(codes: PyTree) -> Array:
    """The number of bits that ``to_bytes`` writes, before rounding up to bytes; uint32, traced."""
    return sum((_nbits(c) for c in _leaves(codes)), jnp.zeros((), jnp.uint32))


def nbytes(codes: PyTree) -> Array:
    """``len(to_bytes(codes))`` without writing: a uint32 scalar, exact below half a gigabyte; traced.

    Args:
      codes: a ``Code``, or a pytree of them.

    Example:
      >>> int(fc.compression.nbytes(fc.compression.sign().encode(jnp.arange(800.0), key)))  # 800 bits and a scale
      104
    """
    return (nbits(codes) + 7) // 8


def entropy(codes: PyTree) -> Array:
    """The bytes that an ideal coder of the symbols' frequencies would need: float32, traced.

    ``n H`` bits for n symbols of empirical entropy H, ``log2 (d over n)`` for their places, 32 for a float. No prefix
    code of the symbols is shorter; a code of clustered places can be.

    Args:
      codes: as ``nbytes``.

    Example:
      >>> code = fc.compression.qsgd(4).encode(jnp.arange(100.0), key)
      >>> bool(fc.compression.entropy(code) < fc.compression.nbytes(code))
      True

    Source: Cover and Thomas (2006), theorem 5.3.1; Cover (1973), "Enumerative Source Encoding".
    """
    return sum((_entropy(c) for c in _leaves(codes)), jnp.zeros((), jnp.float32)) / 8


def to_bytes(codes: PyTree) -> bytes:
    """The bytes of a code, written on the host.

    Args:
      codes: as ``nbytes``.

    Example:
      >>> code = fc.compression.qsgd(4).encode(jnp.arange(8.0), key)
      >>> same = fc.compression.from_bytes(fc.compression.to_bytes(code), code)
    """
    bits = [part for code in _leaves(jax.tree.map(np.asarray, codes)) for part in _write(code)]
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *bits])).tobytes()


def from_bytes(data: bytes, like: PyTree) -> PyTree:
    """Reads codes back from bytes, exactly.

    Args:
      data: the result of ``to_bytes``.
      like: codes of the same shapes, or their ``jax.eval_shape``.

    Example:
      >>> sign = fc.compression.sign()
      >>> sent = fc.compression.to_bytes(sign.encode(jnp.array([1.0, -3.0]), key))
      >>> code = fc.compression.from_bytes(sent, jax.eval_shape(sign.encode, jnp.zeros(2), key))
      >>> sign.decode(code, 2, key).tolist()
      [2.0, -2.0]
    """
    reader = coding.Reader(np.unpackbits(np.frombuffer(data, np.uint8)))
    return jax.tree.map(lambda code: _read(reader, code), like, is_leaf=_is_code)


def _nbits(code: Code) -> Array:
    bits = jnp.uint32(32 * code.scales.size + (0 if code.count is None else 32))
    if code.index is not None:
        before = jnp.concatenate([jnp.full(1, -1, code.index.dtype), code.index[:-1]])
        gaps = (code.index - before - 1).astype(jnp.uint32)
        bits += _coding(code.positions, code.size, 1).bits(gaps, _live(gaps, code), code.size)
    live, alphabet = _live(code.symbols, code), code.alphabet
    return bits + _coding(code.coding, alphabet, len(live)).bits(code.symbols, live, alphabet)


def first(size: int, number: Array | None) -> Array:
    """A mask of the first ``number`` of ``size`` places; all of them if ``None``."""
    return jnp.ones(size, bool) if number is None else jnp.arange(size, dtype=number.dtype) < number


def _live(x: Array, code: Code) -> Array:
    """A mask of the symbols or places that travel."""
    return first(len(x), code.count)


def _coding(name: str, alphabet: int, large: int) -> coding.Coding:
    found = coding.find(name)
    found.check(alphabet, large)
    return found


def _entropy(code: Code) -> Array:
    live = _live(code.symbols, code)
    n, bits = count(live).astype(jnp.float32), jnp.float32(32 * code.scales.size)
    if code.alphabet > 2**16:
        bits += 32.0 * n
    else:
        counts = _counts(code.symbols, live, code.alphabet)
        bits += jnp.sum(jnp.where(counts > 0, counts * jnp.log2(n / jnp.maximum(counts, 1)), 0))
    if code.index is not None:
        places = count(_live(code.index, code)).astype(jnp.float32)
        sizes = jnp.float32(code.size), places, code.size - places
        all, these, others = (jax.scipy.special.gammaln(1.0 + x) for x in sizes)
        bits += (all - these - others) / math.log(2)
    return bits


def _counts(symbols: Array, live: Array, alphabet: int) -> Array:
    if alphabet > 4:
        return jnp.zeros(alphabet, jnp.float32).at[symbols].add(live.astype(jnp.float32))
    return jnp.stack([jnp.sum(live & (symbols == a), dtype=jnp.float32) for a in range(alphabet)])  # quicker


def _write(code: Any) -> list[np.ndarray]:
    n = None if code.count is None else int(code.count)
    words = np.concatenate([np.array([] if n is None else [n], np.uint32), code.scales.view(np.uint32)])
    bits = [coding.put(words, np.full(len(words), 32))]
    if code.index is not None:
        gaps = np.diff(code.index[:n].astype(np.int64), prepend=-1) - 1
        bits.append(coding.find(code.positions).write(gaps.astype(np.uint64), code.size))
    return [*bits, coding.find(code.coding).write(code.symbols[:n].astype(np.uint64), code.alphabet)]


def _read(reader: coding.Reader, like: Any) -> Code:
    count = None if like.count is None else reader.fixed(1, 32).astype(np.uint32)[0]
    scales = reader.fixed(like.scales.shape[0], 32).astype(np.uint32).view(np.float32)
    index = None
    if like.index is not None:
        index = np.full(like.index.shape[0], like.size, np.int32)
        n = len(index) if count is None else int(count)
        gaps = coding.find(like.positions).read(reader, n, like.size).astype(np.int64)
        index[:n] = np.cumsum(gaps + 1) - 1
    symbols = np.zeros(like.symbols.shape[0], np.uint32)
    n = len(symbols) if count is None else int(count)
    symbols[:n] = coding.find(like.coding).read(reader, n, like.alphabet)
    return dataclasses.replace(like, symbols=symbols, scales=scales, index=index, count=count)


def _is_code(x: Any) -> bool:
    return isinstance(x, Code)


def _leaves(codes: PyTree) -> list[Code]:
    return jax.tree.leaves(codes, is_leaf=_is_code)


def roundtrip(compressor: Compressor, tree: PyTree, key: Array, by_leaf: bool = False) -> tuple[PyTree, PyTree]:
    """The decoded pytree, and the codes that travelled: one for the whole tree, or one for each leaf.

    Args:
      compressor: of vectors.
      tree: pytree of floating-point arrays.
      key: PRNG key.
      by_leaf: whether each leaf is compressed separately, with its own key.

    Example:
      >>> arrived, code = fc.compression.roundtrip(fc.compression.sign(), {"w": jnp.array([1.0, -3.0])}, key)
      >>> arrived["w"].tolist()
      [2.0, -2.0]
    """
    if by_leaf:
        leaves, structure = jax.tree.flatten(tree)
        pairs = [roundtrip(compressor, x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(structure, [x for x, _ in pairs]), [code for _, code in pairs]
    x, _ = ravel(tree)
    # Without a barrier XLA would encode again for decoding.
    code = jax.lax.optimization_barrier(compressor.encode(x.astype(jnp.float32), key))
    return opened(compressor, code, tree, key), code


def opened(compressor: Compressor, codes: PyTree, like: PyTree, key: Array, by_leaf: bool = False) -> PyTree:
    """The pytree of which ``roundtrip`` made these codes, as far as they tell.

    Args:
      compressor, key, by_leaf: those of ``roundtrip``.
      codes: what travelled.
      like: pytree of arrays, or of their shapes and types, like the result.

    Example:
      >>> tree = {"w": jnp.array([1.0, -3.0])}
      >>> arrived, code = fc.compression.roundtrip(fc.compression.sign(), tree, key)
      >>> fc.compression.opened(fc.compression.sign(), code, tree, key)["w"].tolist()
      [2.0, -2.0]
    """
    leaves, structure = jax.tree.flatten(like)
    if by_leaf:
        each = enumerate(zip(codes, leaves, strict=True))
        return jax.tree.unflatten(
            structure, [opened(compressor, code, x, jax.random.fold_in(key, i)) for i, (code, x) in each]
        )
    starts = np.cumsum([0, *(x.size for x in leaves)]).tolist()
    # Without a barrier XLA would decode again for each reader of the result.
    vector = jax.lax.optimization_barrier(compressor.decode(codes, starts[-1], key))
    parts = [vector[start : start + x.size].reshape(x.shape) for x, start in zip(leaves, starts)]
    return optax.tree.cast_like(jax.tree.unflatten(structure, parts), like)
