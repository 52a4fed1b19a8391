"""Counter-based random draws on the host: pure functions of (seed, round, client, ...).

Nothing here has a state to advance, so what a client draws depends neither on who
else is in the cohort nor on the order in which clients are planned, and a whole
cohort is drawn by a few array operations.

A public seed is hashed, quickly and for anybody to repeat. In its place a ``SecretSeed`` may come first: numbers are
then 64 bits of SHAKE-256, which nobody can guess who does not have it, whatever others he knows.
"""

import hashlib

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.secret import SecretSeed

Word = np.ndarray | int | SecretSeed


def mix(*words: Word) -> np.ndarray:
    """Hashes broadcast 32-bit words into one well-mixed uint32 (MurmurHash3, 32-bit variant).

    Behind a secret seed: words of which the last may be an array, into uint64.
    """
    if words and isinstance(words[0], SecretSeed):
        return _secret(words[0], *words[1:])
    h = np.zeros((1,), np.uint32)  # an array, not a scalar: arrays wrap round without a warning
    for word in words:
        assert not isinstance(word, bytes)
        if np.ndim(word) == 0:
            checks.count("A seed, or a round,", word, 0, 2**32 - 1)
        k = np.asarray(word).astype(np.uint64).astype(np.uint32) * np.uint32(0xCC9E2D51)
        k = _rotate(np.atleast_1d(k), 15) * np.uint32(0x1B873593)
        h = _rotate(h ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    return _finish(h ^ np.uint32(4 * len(words)))


def uniform(*words: Word) -> np.ndarray:
    """Uniform float64 in [0, 1), 32 bits fine, from the hash of ``words``; 64 bits behind a secret seed."""
    bits = mix(*words)
    return bits / 2.0**32 if bits.dtype == np.uint32 else np.minimum(bits / 2.0**64, 1 - 2.0**-53)


def choose(count: int, size: int, *words: Word) -> np.ndarray:
    """``count`` different numbers below ``size``, in random order; all outcomes are equally likely.

    Up to half of ``size`` they are drawn one by one and repetitions passed over, so that 50 of a million cost what
    50 of a thousand do.

    Example:
      >>> sorted(choose(5, 5, 42).tolist())
      [0, 1, 2, 3, 4]
    """
    if 2 * count > size:
        return np.argsort(mix(*words, np.arange(size)), kind="stable")[:count]
    tried = 2 * count + 8
    while True:
        drawn = uniform(*words, np.arange(tried)) * size
        values, first = np.unique(drawn.astype(np.int64), return_index=True)
        if len(values) >= count:
            return values[np.argsort(first)][:count]
        tried *= 2  # not fewer than before, which would go on for ever


def shuffles(sizes: np.ndarray, *words: np.ndarray | int) -> np.ndarray:
    """A permutation of ``range(n)`` for each n in ``sizes``, one behind the other.

    Args:
      sizes: ``[S]`` positive integers.
      words: what chooses the permutations; scalars, or ``[S]``.

    Returns:
      int64 ``[sum(sizes)]``.

    Example:
      >>> shuffles(np.array([1, 1, 1]), 7).tolist()
      [0, 0, 0]
    """
    ends = np.cumsum(sizes)
    segment = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(segment)) - np.repeat(ends - sizes, sizes)
    rank = mix(mix(*words, np.zeros(len(sizes), np.int64))[segment], place)
    order = np.argsort((segment.astype(np.uint64) << np.uint64(32)) | rank, kind="stable")
    return place[order]


def _secret(seed: SecretSeed, *words: Word) -> np.ndarray:
    """uint64: place i of the stream that the seed and the words before the last one name, for each i of the last.

    SHAKE-256 of one secret and a text of fixed length is a stream that is told from a random one by nobody without it.
    """
    *scalars, last = words
    place = np.atleast_1d(np.asarray(last)).astype(np.int64)
    name = seed + np.array([len(scalars), *scalars], "<u8").tobytes()
    stream = hashlib.shake_256(name).digest(8 * (int(place.max()) + 1) if place.size else 0)
    return np.frombuffer(stream, "<u8")[place]


def _finish(h: np.ndarray) -> np.ndarray:
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _rotate(x: np.ndarray, bits: int) -> np.ndarray:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))
