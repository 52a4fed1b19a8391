"""Cross-validation: every client, or every example, held out exactly once."""

from typing import NamedTuple

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.data import draws
from fedjax_clip.data.population import FederatedData


class Fold(NamedTuple):
    """One way to split a population.

    Attributes:
      train: ``[n]`` numbers of the examples to train on, client by client.
      held_out: ``[N - n]`` numbers of the others, client by client.

    Example:
      >>> (first, second) = fc.data.folds.examples(data, num_folds=2)
      >>> train, held_out = first.split(data)
    """

    train: np.ndarray
    held_out: np.ndarray

    def split(self, data: FederatedData) -> tuple[FederatedData, FederatedData]:
        """``(train, held_out)``; a client without examples on one side is missing there."""
        train, held_out = (data.take(i, np.unique(np.searchsorted(data.offsets, i, side="right") - 1)) for i in self)
        return train, held_out


def clients(data: FederatedData, num_folds: int, seed: int = 0) -> list[Fold]:
    """Folds over clients: each client is held out in exactly one fold; fold sizes differ by at most one client.

    Args:
      data: the population.
      num_folds: K, from 2 to the number of clients.
      seed: of the order in which clients are dealt.

    Raises:
      InvalidInput: more folds than clients, or fewer than 2.

    Example:
      >>> data = fc.FederatedData({"x": np.zeros(6)}, [0, 3, 4, 6])
      >>> [f.held_out.tolist() for f in fc.data.folds.clients(data, 3)]
      [[4, 5], [0, 1, 2], [3]]
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    num_folds = checks.count("num_folds, of clients,", num_folds, 2, data.num_clients)
    fold_of = np.empty(data.num_clients, np.int64)
    order = np.random.default_rng(checks.seed("seed", seed)).permutation(data.num_clients)
    fold_of[order] = np.arange(data.num_clients) % num_folds
    return _folds(np.repeat(fold_of, data.sizes), num_folds)


def examples(data: FederatedData, num_folds: int, seed: int = 0) -> list[Fold]:
    """Folds over examples: each example is held out in exactly one fold, and each client's spread evenly.

    Each client's examples are dealt to the folds in random order, and the next client continues at the next fold. So
    fold sizes differ by at most one example in all, and by at most one for each client. A client whose examples are all
    held out in a fold, such as a client with a single example, does not train there.

    Args:
      data: the population.
      num_folds: K, from 2 to the number of examples.
      seed: of the order in which each client's examples are dealt.

    Raises:
      InvalidInput: more folds than examples, or fewer than 2.

    Example:
      >>> folds = fc.data.folds.examples(data, num_folds=4)
      >>> sum(len(fold.held_out) for fold in folds) == data.num_examples
      True
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    num_folds = checks.count("num_folds, of examples,", num_folds, 2, data.num_examples)
    seed = checks.seed("seed", seed)
    place = draws.shuffles(data.sizes, seed, np.arange(data.num_clients)) + np.repeat(data.offsets[:-1], data.sizes)
    return _folds(place % num_folds, num_folds)


def _folds(fold_of: np.ndarray, num_folds: int) -> list[Fold]:
    return [Fold(np.flatnonzero(fold_of != k), np.flatnonzero(fold_of == k)) for k in range(num_folds)]
