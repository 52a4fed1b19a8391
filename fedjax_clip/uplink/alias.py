"""Integers of a given distribution by exact arithmetic: Walker's alias method with thresholds of 96 bits.

A column is drawn uniformly. A uniform number under its threshold gives the column, any other gives its alias. The
number is compared 32 bits at a time, and further bits are drawn only where the first ones equal the threshold's. The
method uses no floating point, and its only source of randomness is ``jax.random.bits``, so any generator will do.
"""

import decimal
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core.types import Array

WORDS = 3  # of 32 bits in a threshold
MOST_COLUMNS = 2**16  # so that one 32-bit word chooses two columns
REACH = 16  # standard deviations on each side, beyond which lies less than 1e-55
FRACTION = 384  # binary digits after the point, of the weights from which a table is made


class Table(NamedTuple):
    """A distribution on ``-columns / 2 ... columns / 2 - 1``, as NumPy arrays that a compiled program holds.

    Attributes:
      thresholds: uint32 ``[WORDS, columns]``, the highest word first.
      aliases: int32 ``[columns]``.
    """

    thresholds: np.ndarray
    aliases: np.ndarray

    @property
    def columns(self) -> int:
        """A power of two."""
        return len(self.aliases)


def widest() -> float:
    """The largest standard deviation that a table can have."""
    return MOST_COLUMNS / 2 / REACH


@functools.lru_cache(maxsize=16)
def gaussian_table(stddev: float) -> Table:
    """The discrete Gaussian ``P(k) ~ exp(-k^2 / (2 stddev^2))``, to a statistical distance under 2^-95.

    Args:
      stddev: positive, at most ``widest()``.

    Source: Vose (1991), "A Linear Algorithm for Generating Random Numbers with a Given Distribution".
    """
    columns = max(64, 1 << math.ceil(math.log2(2 * REACH * stddev)))
    with decimal.localcontext(decimal.Context(prec=FRACTION // 3)):
        exact = (-1 / (2 * decimal.Decimal(stddev) ** 2)).exp()
        ratio = int(exact * 2**FRACTION)  # exp(-(2 k + 1) / (2 stddev^2)), the step from k to k + 1
    square, weights = ratio * ratio >> FRACTION, [1 << FRACTION]
    for _ in range(columns // 2 - 1):
        weights.append(weights[-1] * ratio >> FRACTION)
        ratio = ratio * square >> FRACTION
    capacity = 1 << 32 * WORDS  # of one column
    total = 2 * sum(weights) - weights[0]
    half = [w * columns * capacity // total for w in weights]
    masses = [0, *half[:0:-1], *half]  # -columns / 2 has no mirror image, so it gets no mass
    masses[columns // 2] += columns * capacity - sum(masses)
    return _table(masses, capacity)


def _table(masses: list[int], capacity: int) -> Table:
    """Vose's algorithm on whole numbers that add up to the columns' capacities."""
    left, aliases = list(masses), list(range(len(masses)))
    poor = [i for i, m in enumerate(left) if m < capacity]
    rich = [i for i, m in enumerate(left) if m > capacity]
    while poor:
        i, j = poor.pop(), rich[-1]
        aliases[i] = j
        left[j] -= capacity - left[i]
        if left[j] <= capacity:
            rich.pop()
            if left[j] < capacity:
                poor.append(j)
    words = [[m >> 32 * w & 0xFFFFFFFF for m in left] for w in reversed(range(WORDS))]  # a full column is its own alias
    return Table(np.array(words, np.uint32), np.array(aliases, np.int32))


def draw(key: Array, size: int, table: Table, count: int = 1) -> tuple[Array, ...]:
    """``count`` independent vectors int32 ``[size]`` from a table, 1 or 2: both take their columns from one word."""
    thresholds, aliases = jnp.asarray(table.thresholds), jnp.asarray(table.aliases)
    bits, keys = table.columns.bit_length() - 1, jax.random.split(key, (1 + count, WORDS))

    def drawn(words: int) -> tuple[tuple[Array, ...], Array]:
        """Draws by the first words of each threshold, and says whether a coordinate is still undecided."""
        choosing, values, undecided = _bits(keys[0, 0], size), [], jnp.zeros((), bool)
        for i in range(count):
            column = (choosing >> (bits * i) & (table.columns - 1)).astype(jnp.int32)
            below, tied = jnp.zeros(size, bool), jnp.ones(size, bool)
            for w in range(words):
                word, threshold = _bits(keys[1 + i, w], size), _at(thresholds[w], column)
                below, tied = below | (tied & (word < threshold)), tied & (word == threshold)
            values.append(jnp.where(below, column, _at(aliases, column)) - table.columns // 2)
            undecided |= jnp.any(tied)
        return tuple(values), undecided

    def again(carry):
        return drawn(WORDS)[0], jnp.zeros((), bool)

    return jax.lax.while_loop(lambda carry: carry[1], again, drawn(1))[0]


def _at(values: Array, index: Array) -> Array:
    return values.at[index].get(mode="promise_in_bounds")


def _bits(key: Array, size: int) -> Array:
    return jax.random.bits(key, (size,), jnp.uint32)
