"""A population of which each of several processes opens a part."""

import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput, PyTree
from fedjax_clip.data.population import FederatedData, as_arrays, count_examples


def opened(
    examples: PyTree,
    clients: Sequence[int] | np.ndarray,
    sizes: Sequence[int] | np.ndarray,
    names: Sequence[str] | None = None,
) -> FederatedData:
    """The population, with the examples of this process's clients only: for ``fc.train`` in several processes.

    Each client is opened by one process, and trains on that process's devices. All processes know all clients' sizes.
    The examples of other clients take neither memory nor disk. Since no process has all examples, nothing notices if
    they change between a checkpoint and a resumed run, and such a run takes no ``secret``.

    Args:
      examples: pytree of arrays ``[n, ...]``: the examples of ``clients``, one client after the other.
      clients: ``[K]`` numbers of the clients that this process opens.
      sizes: int ``[M]``, how many examples each client of the whole population has.
      names: ``[M]`` client names.

    Returns:
      A population of M clients, of which ``own`` says whose examples are here.

    Raises:
      InvalidInput: numbers of examples that contradict the sizes; what ``FederatedData`` refuses.

    Example:
      >>> mine = {"x": np.ones((5, 2)), "y": np.zeros(5)}
      >>> part = fc.data.parts.opened(mine, clients=[0, 2], sizes=[3, 4, 2])
      >>> part.num_clients, part.num_examples, part.own.tolist()
      (3, 9, [True, False, True])
    """
    examples, sizes = as_arrays(examples), np.asarray(sizes)
    clients = checks.client_numbers("clients", clients, len(sizes))
    if (given := count_examples(examples)) != (wanted := int(sizes[clients].sum())):
        raise InvalidInput(f"By their sizes these clients have {wanted} examples, and {given} are given.")
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    place = np.concatenate([np.arange(offsets[client], offsets[client + 1]) for client in clients])

    def room(x: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryFile() as file:  # which takes no room where nothing is written
            whole = np.memmap(file, x.dtype, "w+", shape=(int(offsets[-1]), *x.shape[1:]))
        whole[place] = x
        return whole

    data = FederatedData(jax.tree.map(room, examples), offsets, names)
    object.__setattr__(data, "own", np.isin(np.arange(len(sizes)), clients))
    return data
