"""Counter-based random draws on the host: pure functions of (seed, round, client, ...).

Nothing here has a state to advance, so what a client draws depends neither on who
else is in the cohort nor on the order in which clients are planned, and a whole
cohort is drawn by a few array operations.
"""

import numpy as np

_FEISTEL_ROUNDS = 6


def mix(*words: np.ndarray | int) -> np.ndarray:
    """Hashes broadcast 32-bit words into one well-mixed uint32 (MurmurHash3, 32-bit variant)."""
    h = np.zeros((1,), np.uint32)  # an array, not a scalar: arrays wrap round without a warning
    for word in words:
        k = np.asarray(word).astype(np.uint64).astype(np.uint32) * np.uint32(0xCC9E2D51)
        k = _rotate(np.atleast_1d(k), 15) * np.uint32(0x1B873593)
        h = _rotate(h ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    h = h ^ np.uint32(4 * len(words))
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def uniform(*words: np.ndarray | int) -> np.ndarray:
    """Uniform float64 in [0, 1), 32 bits fine, from the hash of ``words``."""
    return mix(*words) / 2.0**32


def permute(index: np.ndarray, size: np.ndarray | int, *key: np.ndarray | int) -> np.ndarray:
    """Where a pseudo-random permutation of ``range(size)``, chosen by ``key``, sends ``index``.

    A Feistel network on the grid ``ceil(sqrt n) x ceil(n / ceil(sqrt n))``, walked until it lands
    inside ``range(n)`` (Black and Rogaway 2002): no array of ``size`` entries is made, so
    50 clients of a million cost as much as 50 of a hundred.

    Args:
      index: integers ``0 <= index < size``.
      size: the domain's size, below 2**31; broadcasts with ``index``.
      key: words that choose the permutation; broadcast with ``index``.

    Returns:
      int64 array; for a fixed size and key, distinct indices have distinct images.

    Example:
      >>> sorted(permute(np.arange(5), 5, 42).tolist())
      [0, 1, 2, 3, 4]
    """
    index, size, seed = np.broadcast_arrays(index, size, mix(*key))
    out = np.empty(index.shape, np.int64)
    todo = np.arange(index.size)
    x, n, seed = index.ravel().astype(np.uint32), size.ravel().astype(np.uint32), seed.ravel()
    while todo.size:
        rows = np.ceil(np.sqrt(n)).astype(np.uint32)
        columns = (n + rows - np.uint32(1)) // rows
        row, column = x // columns, x % columns
        for step in range(_FEISTEL_ROUNDS):
            if step % 2:
                column = (column + mix(seed, step, row) % columns) % columns
            else:
                row = (row + mix(seed, step, column) % rows) % rows
        x = row * columns + column
        out.ravel()[todo] = x
        walk = x >= n
        todo, x, n, seed = todo[walk], x[walk], n[walk], seed[walk]
    return out


def _rotate(x: np.ndarray, bits: int) -> np.ndarray:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))
