"""The states of all clients between two rounds, of which a round reads and writes its cohort's."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from fedjax_clip.core import tree as trees
from fedjax_clip.core.types import Algorithm, Params, PyTree
from fedjax_clip.training.processes import ALONE, Processes
from fedjax_clip.training.rows import Leaf, OnDisk, layout

MEMORY_BYTES = 2**30  # states up to this size lie in memory, larger ones in a file

__all__ = ["ClientStates", "InMemory", "OnDisk", "alike", "begun", "layout", "of"]


class ClientStates(Protocol):
    """The states of all M clients of a run."""

    @property
    def tree(self) -> PyTree:
        """The states as ``State.clients`` shows them: leaves that read like arrays ``[M, ...]``."""
        ...

    def gather(self, ids: np.ndarray) -> PyTree:
        """The states of these clients, ``[*ids.shape, ...]``; of any client where the number is -1."""
        ...

    def scatter(self, ids: np.ndarray, new: PyTree) -> None:
        """Keeps these clients' new states, ``[*ids.shape, ...]``, but those of number -1, which come last in a row."""
        ...

    def held(self) -> contextlib.AbstractContextManager[None]:
        """A context in which no other run writes these states, nor reads what a run writes in it.

        Raises:
          InvalidInput: another run holds them.
        """
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

    def held(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def of(tree: PyTree) -> ClientStates:
    """The states that ``State.clients`` shows."""
    first = next(iter(jax.tree.leaves(tree)), None)
    return first.states if isinstance(first, Leaf) else InMemory(tree)


def alike(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """The states in which all clients begin, ``[M, ...]``: views of one state, which take no memory."""
    state = algorithm.init_client(trees.as_arrays(params))
    return jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (num_clients, *np.shape(x))), state)


def begun(alike: PyTree, place: Callable[[], pathlib.Path] | None = None, processes: Processes = ALONE) -> ClientStates:
    """The states before round 0: in memory, or on disk if they are too large for that.

    Args:
      alike: from the function of this name.
      place: names the directory of states on disk; by default they lie in a temporary file.
      processes: those that train together.
    """
    if sum(x.nbytes for x in jax.tree.leaves(alike)) > MEMORY_BYTES:
        return OnDisk(alike, place and place(), processes)
    return InMemory(jax.tree.map(lambda x: np.array(x, order="C"), alike))
