"""The state of a run between two rounds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import tree
from fedjax_clip.core.types import Algorithm, Params, PyTree, check_named


class State(NamedTuple):
    """The state to resume from: the server, the clients' states, and the run's identity.

    Attributes:
      server: from the algorithm's ``init``; its rounds update it.
      clients: ``[M, ...]`` on the host, from ``init_client`` for each of the M clients. States beyond 1 GiB lie on
        disk, beside the checkpoints or else in a temporary file. A leaf then reads like an array: ``leaf[ids]`` reads
        the states of these clients, and ``np.asarray(leaf)`` those of all.
      run: the identity that a checkpoint must agree with (see ``fc.train``), if there are checkpoints; and the width.

    Example:
      >>> state = fc.train(algorithm, data, params, rounds=1).state
      >>> trained = state.server.params
    """

    server: PyTree
    clients: PyTree
    run: dict[str, Any]


def init_state(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """The server's state before round 0 and the states of ``num_clients`` clients, ``[M, ...]``, on a device."""
    check_named(algorithm, num_clients)
    kept = algorithm.init_client(tree.as_arrays(params))
    return algorithm.init(params), jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], num_clients, axis=0), kept)


def client_states(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """The states of all clients before round 0, ``[M, ...]``, on the host."""
    state = algorithm.init_client(tree.as_arrays(params))
    return jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], num_clients, axis=0), state)
