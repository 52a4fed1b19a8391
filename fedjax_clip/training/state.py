"""What a run keeps from one round to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import tree
from fedjax_clip.core.types import Algorithm, Params, PyTree, check_named


class State(NamedTuple):
    """All that a run needs to go on: the server, what the clients keep, and which run it is.

    Attributes:
      server: what the algorithm's ``init`` makes and its rounds change.
      clients: ``[M, ...]`` on the host, what ``init_client`` makes for each of the M clients.
      run: what a checkpoint must agree with (``fc.train`` says what that is), if there are checkpoints; and the width.

    Example:
      >>> state = fc.train(algorithm, data, params, rounds=1).state
      >>> trained = state.server.params
    """

    server: PyTree
    clients: PyTree
    run: dict[str, Any]


def init_state(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """The server before round 0 and what each of ``num_clients`` clients keeps, ``[M, ...]``, on a device."""
    check_named(algorithm, num_clients)
    kept = algorithm.init_client(tree.as_arrays(params))
    return algorithm.init(params), jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], num_clients, axis=0), kept)


def client_states(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """What all clients keep before round 0, ``[M, ...]``, on the host."""
    state = algorithm.init_client(tree.as_arrays(params))
    return jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], num_clients, axis=0), state)
