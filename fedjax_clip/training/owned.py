"""The clients' states in several processes."""

import numpy as np

from fedjax_clip.core.types import PyTree
from fedjax_clip.training.processes import Processes
from fedjax_clip.training.states import ClientStates


class Everywhere:
    """States that every process keeps whole, where processes read those of their own devices' clients.

    Args:
      states: of all clients, the same in all processes.
      processes: those that train together, and call ``scatter`` together.
    """

    def __init__(self, states: ClientStates, processes: Processes):
        self.states, self.processes, self.tree = states, processes, states.tree

    def gather(self, ids: np.ndarray) -> PyTree:
        """The states of this process's part of the clients ``ids [D, ...]``."""
        return self.states.gather(ids[self.processes.own])

    def scatter(self, ids: np.ndarray, new: PyTree) -> None:
        """Keeps all clients' new states, arrays ``[D, ...]`` with a slice on each device."""
        self.states.scatter(ids, self.processes.whole(new))


def shared(states: ClientStates, processes: Processes) -> ClientStates:
    """The states as the processes of a run read and write them together."""
    return states if processes.count == 1 else Everywhere(states, processes)
