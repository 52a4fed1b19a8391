"""The clients' states in several processes: whole in the memory of each, or a part on the disk of each."""

import jax
import numpy as np

from fedjax_clip.core.types import PyTree
from fedjax_clip.training.processes import Processes
from fedjax_clip.training.states import ClientStates, InMemory, OnDisk


class Everywhere(InMemory):
    """States that every process keeps whole. Each reads those of its own devices' clients.

    Args:
      tree: the states of all clients ``[M, ...]``, the same in all processes.
      processes: those that train together, and call ``scatter`` together.
    """

    def __init__(self, tree: PyTree, processes: Processes):
        super().__init__(tree)
        self.processes = processes

    def gather(self, ids: np.ndarray) -> PyTree:
        """The states of this process's part of the clients ``ids [D, ...]``."""
        return self.of(ids, self.processes.own)

    def of(self, ids: np.ndarray, places: list[int]) -> PyTree:
        """The states of the clients ``ids[places]``."""
        return super().gather(ids[places])

    def scatter(self, ids: np.ndarray, new: PyTree) -> None:
        """Keeps all clients' new states, arrays ``[D, ...]`` with a slice on each device."""
        super().scatter(ids, self.processes.whole(new))


class Owned:
    """States of which every process keeps those of its own clients; those of a cohort travel.

    Args:
      states: of all clients, on disk.
    """

    def __init__(self, states: OnDisk):
        self.states, self.processes, self.tree, self.held = states, states.processes, states.tree, states.held

    def gather(self, ids: np.ndarray) -> PyTree:
        """The states of this process's part of the clients ``ids [D, ...]``."""
        return self.of(ids, self.processes.own)

    def of(self, ids: np.ndarray, places: list[int]) -> PyTree:
        """The states of ``ids[places]``, where all processes want some of the clients ``ids``."""
        count, number = self.processes.count, self.processes.number
        wanted = np.unique(ids[ids >= 0])
        owner = wanted % count
        sent = np.zeros((np.bincount(owner, minlength=count).max(initial=0), len(self.states.begin)), np.uint8)
        with self.processes.together():
            mine = self.states.read(wanted[owner == number])
        sent[: len(mine)] = mine
        came = self.processes.gather(sent)
        rows = np.empty((len(wanted) + 1, sent.shape[1]), np.uint8)
        rows[-1] = self.states.begin  # of no client
        for process, part in enumerate(came):
            rows[:-1][owner == process] = part[: np.sum(owner == process)]
        here = ids[places]
        found = rows[np.where(here < 0, len(wanted), np.searchsorted(wanted, here)).reshape(-1)]
        return jax.tree.map(lambda leaf: leaf.of(found).reshape(*here.shape, *leaf.shape[1:]), self.tree)

    def scatter(self, ids: np.ndarray, new: PyTree) -> None:
        """Keeps those of the new states, arrays ``[D, ...]`` with a slice on each device, that are its own clients'."""
        new = self.processes.whole(new)
        with self.processes.together():
            self.states.scatter(np.where(ids % self.processes.count == self.processes.number, ids, -1), new)


def shared(states: ClientStates, processes: Processes) -> ClientStates:
    """The states as the processes of a run read and write them together."""
    return states if processes.count == 1 else _shared(states, processes)


def look_up(states: ClientStates, ids: np.ndarray, processes: Processes) -> PyTree:
    """The states of this process's row of the clients ``ids [P, B]``, which all processes look up together."""
    if processes.count == 1:
        return states.gather(ids[0])
    return jax.tree.map(lambda x: x[0], _shared(states, processes).of(ids, [processes.number]))


def _shared(states: ClientStates, processes: Processes) -> Everywhere | Owned:
    return Owned(states) if isinstance(states, OnDisk) else Everywhere(states.tree, processes)


def finish(states: ClientStates) -> None:
    """Makes the states of all clients readable in every process, if they lie in a directory that all share."""
    if isinstance(states, Owned):
        states.states.share()
