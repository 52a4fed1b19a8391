"""The state of a run between two rounds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import tree
from fedjax_clip.core.types import Algorithm, Params, PyTree, check_named
from fedjax_clip.data.population import FederatedData


class Members(NamedTuple):
    """The clients that a state is of.

    Attributes:
      names: ``[M]``, or ``None`` if they have numbers only.
      weights: ``[M]`` float64, the sums of their example weights.
    """

    names: Sequence[str] | None
    weights: np.ndarray

    @classmethod
    def of(cls, data: FederatedData) -> "Members":
        """The clients of a population."""
        return cls(data.names, np.asarray(data.client_weights, np.float64))

    def name(self, client: int) -> str:
        """A client's name, or its number."""
        return str(client) if self.names is None else self.names[client]

    def same(self, other: "Members") -> bool:
        """Whether they are the same clients, in the same order, with the same weights."""
        names = [None if m.names is None else list(m.names) for m in (self, other)]
        return names[0] == names[1] and np.array_equal(self.weights, other.weights)


class State(NamedTuple):
    """The state to resume from, or to go on from: the server, the clients' states, and what run they are of.

    Attributes:
      server: from the algorithm's ``init``; its rounds update it.
      clients: ``[M, ...]`` on the host, from ``init_client`` for each of the M clients. States beyond 1 GiB lie on
        disk, beside the checkpoints or else in a temporary file. A leaf then reads like an array: ``leaf[ids]`` reads
        the states of these clients, and ``np.asarray(leaf)`` those of all.
      run: the identity that a checkpoint must agree with (see ``fc.train``), if there are checkpoints; and the width.
      members: names and weights of the M clients.
      rounds: rounds done.
      best: the best model so far, if the run keeps it.

    Example:
      >>> state = fc.train(algorithm, data, params, rounds=1).state
      >>> trained = state.server.params
      >>> result = fc.train(algorithm, data, params, rounds=3, state=state)
      >>> [row["round"] for row in result.history]
      [2.0, 3.0]
    """

    server: PyTree
    clients: PyTree
    run: dict[str, Any]
    members: Members | None = None
    rounds: int = 0
    best: Any = ()


def init_state(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """The server's state before round 0 and the states of ``num_clients`` clients, ``[M, ...]``, on a device."""
    check_named(algorithm, num_clients)
    kept = algorithm.init_client(tree.as_arrays(params))
    return algorithm.init(params), jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], num_clients, axis=0), kept)


def client_states(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """The states of all clients before round 0, ``[M, ...]``, on the host."""
    state = algorithm.init_client(tree.as_arrays(params))
    return jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], num_clients, axis=0), state)
