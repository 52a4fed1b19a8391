"""Counter-based random draws on the host: pure functions of (seed, round, client, ...).

No function here has a state. A client's draws therefore depend neither on the rest of the cohort nor on the order of
planning, and a few array operations draw a whole cohort.

A public seed is hashed quickly, and anybody can repeat the draws. A ``SecretSeed`` may take its place: numbers are then
64 bits of SHAKE-256. Without the secret nobody can predict them, even from other numbers.
"""

import hashlib

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.secret import SecretSeed

Word = np.ndarray | int | SecretSeed


def mix(*words: Word) -> np.ndarray:
    """Hashes broadcast 32-bit words into one well-mixed uint32 (MurmurHash3, 32-bit variant).

    After a secret seed only the last word may be an array, and the result is uint64.
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
    """Uniform float64 in [0, 1) from the hash of ``words``, with a resolution of 32 bits; 64 after a secret seed."""
    bits = mix(*words)
    return bits / 2.0**32 if bits.dtype == np.uint32 else np.minimum(bits / 2.0**64, 1 - 2.0**-53)


def choose(count: int, size: int, *words: Word) -> np.ndarray:
    """``count`` different numbers below ``size``, in random order; all outcomes are equally likely.

    Up to half of ``size``, numbers are drawn one by one and repetitions skipped, so 50 of a million cost the same as 50
    of a thousand.

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
        tried *= 2  # must grow, or the loop might never end


def shuffles(sizes: np.ndarray, *words: np.ndarray | int) -> np.ndarray:
    """A permutation of ``range(n)`` for each n in ``sizes``, concatenated.

    Args:
      sizes: ``[S]`` positive integers.
      words: they choose the permutations; scalars, or ``[S]``.

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
    """uint64: number i of the stream named by the seed and all words but the last, for each i of the last word.

    Without the secret, nobody can tell SHAKE-256 of the secret and a text of fixed length from a random stream.
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
