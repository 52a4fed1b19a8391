"""Which clients are malicious."""

from collections.abc import Sequence

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.population import FederatedData

Clients = Sequence[int] | np.ndarray


def numbers_of(clients: Clients) -> np.ndarray:
    """int32 numbers of clients."""
    numbers = np.asarray(clients)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu") or np.any(numbers < 0):
        raise InvalidInput(f"clients must be the numbers of the malicious clients, such as [0, 3], not {clients!r}.")
    return numbers.astype(np.int32)


def population_of(numbers: np.ndarray) -> int:
    """The fewest clients that a population with these numbers has."""
    return int(numbers.max(initial=-1)) + 1


def owned(data: FederatedData, clients: Clients) -> np.ndarray:
    """Mask ``[N]`` of the examples that these clients own."""
    checks.kind("data", data, FederatedData, "a FederatedData")
    numbers = numbers_of(clients)
    if np.any(numbers >= data.num_clients):
        raise InvalidInput(f"There is no client {numbers.max()}: there are {data.num_clients}, numbered from 0.")
    return np.isin(np.repeat(np.arange(data.num_clients), data.sizes), numbers)
