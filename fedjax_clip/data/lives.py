"""Which examples a client has in a round, where they come and go (``fc.data.stream``)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.population import FederatedData

ENDLESS = 2**31 - 1  # the end of a life without end


class Seen(NamedTuple):
    """The examples that each client of some rounds has in its round.

    Attributes:
      sizes: ``[K]``, how many.
      begin: ``[K]``, the place of a client's first one in ``listed``, where its others follow.
      listed: ``[n]`` example numbers; ``None`` stands for all, ``0, 1, ..., N - 1``.
    """

    sizes: np.ndarray
    begin: np.ndarray
    listed: np.ndarray | None

    def take(self, index: np.ndarray) -> "Seen":
        """These clients only."""
        return Seen(self.sizes[index], self.begin[index], self.listed)

    def weights(self, data: FederatedData, ids: np.ndarray) -> np.ndarray:
        """``[K]`` weight of each client: the sum of the weights of the examples that it has."""
        if self.listed is None:
            return data.client_weights[ids]
        if data.weights is None:
            return self.sizes
        before = np.concatenate([[0.0], np.cumsum(data.weights[self.listed], dtype=np.float64)])
        return before[self.begin + self.sizes] - before[self.begin]


def seen(data: FederatedData, ids: np.ndarray, rounds: np.ndarray) -> Seen:
    """The examples that client ``ids[k]`` has in round ``rounds[k]``.

    Raises:
      InvalidInput: a client that has none in its round.
    """
    sizes, begin = data.sizes[ids], data.offsets[ids]
    if data.lives is None:
        return Seen(sizes, begin, None)
    owner = np.repeat(np.arange(len(ids)), sizes)
    number = np.arange(len(owner)) + np.repeat(begin - (np.cumsum(sizes) - sizes), sizes)
    alive = (data.lives[number, 0] <= rounds[owner]) & (rounds[owner] < data.lives[number, 1])
    counts = np.bincount(owner[alive], minlength=len(ids))
    if len(none := np.flatnonzero(counts == 0)):
        raise InvalidInput(
            f"Client {data.name(int(ids[none[0]]))!r} has no examples in round {int(rounds[none[0]])} of the stream, "
            "and is asked to train. Samplers draw from the clients that have some; an algorithm that asks all clients "
            "before the first round needs them all in round 0."
        )
    return Seen(counts, np.cumsum(counts) - counts, number[alive])


def sizes_of(data: FederatedData) -> Callable[[int], np.ndarray] | None:
    """``round -> sizes [M]``, how many examples each client has in a round; ``None`` if that is the same in all."""
    if data.lives is None:
        return None
    start, end = data.lives.T
    turns, _ = data.turns

    @functools.lru_cache(maxsize=2)
    def since(turn: int) -> np.ndarray:
        now = turns[turn - 1] if turn else -1
        return np.add.reduceat(((start <= now) & (now < end)).astype(np.int64), data.offsets[:-1])

    return lambda round: since(int(np.searchsorted(turns, round, side="right")))


def total_weights(data: FederatedData, first_round: int, length: int) -> np.ndarray:
    """``[length]``: the weight of all examples that clients have, in each round from this one on."""
    if data.lives is None:
        return np.full(length, data.client_weights.sum(dtype=np.float64))
    turns, totals = data.turns
    return totals[np.searchsorted(turns, np.arange(first_round, first_round + length), side="right")]
