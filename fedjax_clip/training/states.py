"""The states of all clients between two rounds, of which a round reads and writes its cohort's."""

from typing import Protocol

import jax
import numpy as np

from fedjax_clip.core.types import PyTree


class ClientStates(Protocol):
    """The states of all M clients of a run.

    Attributes:
      tree: the states as ``State.clients`` shows them: one state's structure, and leaves that read like arrays
        ``[M, ...]``.
    """

    tree: PyTree

    def gather(self, ids: np.ndarray) -> PyTree:
        """The states of these clients, ``[*ids.shape, ...]``; of any client where the number is -1."""
        ...

    def scatter(self, ids: np.ndarray, new: PyTree) -> None:
        """Keeps these clients' new states, ``[*ids.shape, ...]``, but those of number -1, which come last in a row."""
        ...


class InMemory:
    """The states as arrays ``[M, ...]``, which ``scatter`` changes in place."""

    def __init__(self, tree: PyTree):
        self.tree = tree

    def gather(self, ids: np.ndarray) -> PyTree:
        return jax.tree.map(lambda x: x[np.maximum(ids, 0)], self.tree)

    def scatter(self, ids: np.ndarray, new: PyTree) -> None:
        for old, leaf in zip(jax.tree.leaves(self.tree), jax.tree.leaves(new), strict=True):
            leaf = np.asarray(leaf)
            for place in np.ndindex(ids.shape[:-1]):
                here = ids[place][ids[place] >= 0]  # absent clients come last: no copy in between
                old[here] = leaf[place][: len(here)]


def of(tree: PyTree) -> ClientStates:
    """The states that ``State.clients`` shows."""
    return InMemory(tree)
