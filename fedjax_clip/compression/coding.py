"""Codings of streams of small integers: their length on the device, their bits on the host."""

import heapq
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fedjax_clip.core import checks
from fedjax_clip.core.types import Array, InvalidInput

ABSENT = np.uint32(2**32 - 1)
LONE = 63  # the code length that marks an only symbol, which takes no bits


class Reader:
    """A reader of a string of bits, from the left."""

    def __init__(self, bits: np.ndarray):
        self.bits, self.at = bits, 0
        self.ones = np.flatnonzero(bits)

    def fixed(self, count: int, width: int) -> np.ndarray:
        """``count`` numbers of ``width`` bits."""
        block = self.bits[self.at : self.at + count * width].reshape(count, width).astype(np.uint64)
        self.at += count * width
        return block @ (np.uint64(1) << np.arange(width, dtype=np.uint64)[::-1])

    def zeros(self) -> int:
        """Skips the zeros before the next one, and counts them."""
        one = int(self.ones[np.searchsorted(self.ones, self.at)])
        skipped, self.at = one - self.at, one
        return skipped


class Coding(NamedTuple):
    """A coding of a sequence of numbers s in ``[0, alphabet)``; compressors take it by name.

    ``"fixed"``: equally many bits for each letter. ``"elias_gamma"``, ``"elias_delta"``: Elias's codes of ``s + 1``,
    short for small s. ``"rice"``: Golomb's code for geometric s, with the best power of two. ``"huffman"``: the
    shortest prefix code for the numbers' own frequencies, with its table, for at most 256 letters. ``"runs"``: the
    lengths of runs of zeros and the numbers between them, in Elias's gamma.

    Attributes:
      bits: ``(symbols uint32 [n], live bool [n], alphabet) -> uint32``, the length of the live symbols; traced.
      write: ``(symbols [n], alphabet) -> bits [..]``, on the host.
      read: ``(reader, n, alphabet) -> symbols [n]``.
      check: ``(alphabet, how many may be large at once) -> None``; refuses symbols that the coding cannot write or
        count.

    Example:
      >>> compressor = fc.compression.qsgd(4, coding="huffman")

    Source: Elias (1975), "Universal Codeword Sets"; Golomb (1966), "Run-Length Encodings"; Rice and Plaunt (1971);
    Huffman (1952); Alistarh et al. (2017), section 3.2, for the runs.
    """

    bits: Callable[[Array, Array, int], Array]
    write: Callable[[np.ndarray, int], np.ndarray]
    read: Callable[[Reader, int, int], np.ndarray]
    check: Callable[[int, int], None] = lambda alphabet, n: None


def find(name: str) -> "Coding":
    """The coding of this name.

    Raises:
      InvalidInput: an unknown name.
    """
    if not isinstance(name, str) or name not in CODINGS:
        raise InvalidInput(f"There is no coding {checks.shown(name)}; there are {', '.join(CODINGS)}.")
    return CODINGS[name]


def length(x: Array) -> Array:
    """Number of binary digits of each number of a uint32 array; 0 for 0."""
    return 32 - jax.lax.clz(x)


def put(codes: npt.ArrayLike, lengths: npt.ArrayLike) -> np.ndarray:
    """Numbers as bits, each padded to its length with leading zeros, even beyond 64."""
    codes, lengths = np.asarray(codes, np.uint64), np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(min(64, lengths.max(initial=0)))):
        here = lengths > place
        bits[ends[here] - 1 - place] = (codes[here] >> np.uint64(place)) & np.uint64(1)
    return bits


def digits(x: np.ndarray) -> np.ndarray:
    """``length`` on the host."""
    return np.frexp(np.asarray(x, np.float64))[1].astype(np.int64)  # exact below 2^53


def width(alphabet: int) -> int:
    """The number of bits that distinguish ``alphabet`` symbols."""
    return (alphabet - 1).bit_length()


def _sum(bits: Array, live: Array) -> Array:
    return jnp.sum(jnp.where(live, bits, 0), dtype=jnp.uint32)


def _fixed() -> Coding:
    return Coding(
        lambda symbols, live, alphabet: jnp.sum(live, dtype=jnp.uint32) * np.uint32(width(alphabet)),
        lambda symbols, alphabet: put(symbols, np.full(len(symbols), width(alphabet))),
        lambda reader, n, alphabet: reader.fixed(n, width(alphabet)),
    )


def _not_floats(name: str) -> Callable[[int, int], None]:
    def check(alphabet, n):
        if alphabet > 2**31:
            raise InvalidInput(f"The coding {name!r} is for small numbers, not for floats: quantise them first.")

    return check


def _gamma() -> Coding:
    """Writes ``s + 1`` in binary, after as many zeros as it has digits, less one."""

    def bits(symbols, live, alphabet):
        return _sum(2 * length(symbols + 1) - 1, live)

    def write(symbols, alphabet):
        return put(symbols + np.uint64(1), 2 * digits(symbols + np.uint64(1)) - 1)

    def read(reader, n, alphabet):
        return np.array([int(reader.fixed(1, reader.zeros() + 1)[0]) - 1 for _ in range(n)], np.uint64)

    return Coding(bits, write, read, _not_floats("elias_gamma"))


def _delta() -> Coding:
    """Writes the number of digits of ``s + 1`` in gamma, then its digits after the first."""

    def bits(symbols, live, alphabet):
        size = length(symbols + 1)
        return _sum(2 * length(size) - 1 + size - 1, live)

    def write(symbols, alphabet):
        value = symbols + np.uint64(1)
        size = digits(value)
        rest = (size - 1).astype(np.uint64)
        code = (size.astype(np.uint64) << rest) | (value & ((np.uint64(1) << rest) - np.uint64(1)))
        return put(code, 2 * digits(size) - 1 + size - 1)

    def read(reader, n, alphabet):
        def one():
            size = int(reader.fixed(1, reader.zeros() + 1)[0])
            return (1 << size - 1) + int(reader.fixed(1, size - 1)[0]) - 1

        return np.array([one() for _ in range(n)], np.uint64)

    return Coding(bits, write, read, _not_floats("elias_delta"))


def _rice() -> Coding:
    """Golomb's code of a power of two: ``s >> r`` zeros, a one, and r digits, after the best r in 5 bits."""

    def bits(symbols, live, alphabet):
        count = jnp.sum(live, dtype=jnp.uint32)
        totals = [_sum(symbols >> np.uint32(r), live) + count * np.uint32(1 + r) for r in range(32)]
        return 5 + jnp.min(jnp.stack(totals))

    def write(symbols, alphabet):
        totals = [int(np.sum(symbols >> np.uint64(r))) + len(symbols) * (1 + r) for r in range(32)]
        r = np.uint64(np.argmin(totals))
        low = symbols & ((np.uint64(1) << r) - np.uint64(1))
        code = (np.uint64(1) << r) | low
        return np.concatenate([put([r], [5]), put(code, (symbols >> r).astype(np.int64) + 1 + int(r))])

    def read(reader, n, alphabet):
        r = int(reader.fixed(1, 5)[0])

        def one():
            high = reader.zeros()
            return (high << r) + int(reader.fixed(1, r + 1)[0]) - (1 << r)

        return np.array([one() for _ in range(n)], np.uint64)

    def check(alphabet, n):
        if alphabet * n >= 2**32:  # their sum is counted in 32 bits
            raise InvalidInput("The coding 'rice' is for small numbers: use 'elias_delta' or 'fixed'.")

    return Coding(bits, write, read, check)


def _huffman() -> Coding:
    """The shortest prefix code for the symbols' own frequencies, after a table of 6 bits for each letter."""

    def bits(symbols, live, alphabet):
        counts = jnp.zeros(alphabet, jnp.uint32).at[symbols].add(live.astype(jnp.uint32))

        def merge(_, carry):  # the code's length is the sum of the weights of all inner nodes, for any order of ties
            weights, total = carry
            first = jnp.argmin(weights)
            rest = weights.at[first].set(ABSENT)
            second = jnp.argmin(rest)
            two = rest[second] < ABSENT
            both = jnp.where(two, weights[first] + rest[second], 0)
            return jnp.where(two, rest.at[second].set(both), weights), total + both

        weights = jnp.where(counts > 0, counts, ABSENT)
        total = jax.lax.fori_loop(0, alphabet - 1, merge, (weights, jnp.zeros((), jnp.uint32)))[1]
        return total + np.uint32(6 * alphabet)

    def lengths(counts):
        heap: list[tuple[int, int, tuple[int, ...]]] = [(int(c), s, (s,)) for s, c in enumerate(counts) if c]
        depth = np.zeros(len(counts), np.int64)
        if len(heap) == 1:
            depth[heap[0][1]] = LONE
            return depth
        heapq.heapify(heap)
        while len(heap) > 1:
            (a, s, left), (b, t, right) = heapq.heappop(heap), heapq.heappop(heap)
            depth[list(left + right)] += 1
            heapq.heappush(heap, (a + b, min(s, t), left + right))
        return depth

    def canonical(depth):
        codes, code, last = np.zeros(len(depth), np.uint64), 0, 0
        for symbol in np.lexsort((np.arange(len(depth)), depth)):
            if 0 < depth[symbol] < LONE:
                code <<= int(depth[symbol]) - last
                codes[symbol], last = code, int(depth[symbol])
                code += 1
        return codes

    def write(symbols, alphabet):
        symbols = symbols.astype(np.int64)
        depth = lengths(np.bincount(symbols, minlength=alphabet))
        table = put(depth, np.full(alphabet, 6))
        if LONE in depth:
            return table
        return np.concatenate([table, put(canonical(depth)[symbols], depth[symbols])])

    def read(reader, n, alphabet):
        depth = reader.fixed(alphabet, 6).astype(np.int64)
        if LONE in depth:
            return np.full(n, np.argmax(depth), np.uint64)
        known = {(int(d), int(c)): s for s, (d, c) in enumerate(zip(depth, canonical(depth))) if d}

        def one():
            size = code = 0
            while (size, code) not in known:
                size, code = size + 1, 2 * code + int(reader.fixed(1, 1)[0])
            return known[size, code]

        return np.array([one() for _ in range(n)], np.uint64)

    def check(alphabet, n):
        if alphabet > 256:
            raise InvalidInput(f"The coding 'huffman' takes at most 256 letters, not {alphabet}.")

    return Coding(bits, write, read, check)


def _runs() -> Coding:
    """Writes the count of nonzero symbols, then for each the zeros before it and its value, in Elias's gamma."""
    gamma = _gamma()

    def bits(symbols, live, alphabet):
        there = live & (symbols > 0)
        place = jnp.arange(1, len(symbols) + 1, dtype=jnp.uint32)
        last = jax.lax.cummax(jnp.where(there, place, 0))
        before = jnp.concatenate([jnp.zeros(1, jnp.uint32), last[:-1]])
        number = jnp.sum(there, dtype=jnp.uint32)
        gaps = gamma.bits(place - before - 1, there, alphabet)
        return gaps + gamma.bits(symbols - 1, there, alphabet) + gamma.bits(number[None], jnp.ones(1, bool), alphabet)

    def write(symbols, alphabet):
        at = np.flatnonzero(symbols)
        gaps = np.diff(at, prepend=-1) - 1
        pairs = np.stack([gaps, symbols[at].astype(np.int64) - 1], 1).ravel()
        return gamma.write(np.concatenate([[len(at)], pairs]).astype(np.uint64), alphabet)

    def read(reader, n, alphabet):
        number = int(gamma.read(reader, 1, alphabet)[0])
        gaps, values = gamma.read(reader, 2 * number, alphabet).reshape(number, 2).T
        symbols = np.zeros(n, np.uint64)
        symbols[np.cumsum(gaps.astype(np.int64) + 1) - 1] = values + np.uint64(1)
        return symbols

    return Coding(bits, write, read, _not_floats("runs"))


CODINGS = {
    "fixed": _fixed(),
    "elias_gamma": _gamma(),
    "elias_delta": _delta(),
    "rice": _rice(),
    "huffman": _huffman(),
    "runs": _runs(),
}
