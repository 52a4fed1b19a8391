"""Magnitude pruning of the model itself, as a transform of the server's optimiser."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput


class PruneState(NamedTuple):
    """The number of rounds done, int32."""

    rounds: Array


def prune(sparsity: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Sets the parameters of least magnitude, all leaves together, to zero after each step of the server.

    A zero parameter may come back if the clients' updates make it large. To save bytes, send the nonzero parameters
    only: ``fc.compressed_broadcast(algorithm, fc.compression.threshold(0.0), relative=False)``.

    Args:
      sparsity: the fraction of zeros, or a schedule of it over rounds. The paper's schedule from 0 to 0.9 in 100 rounds
        is ``optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=100)``.

    Raises:
      InvalidInput: a sparsity outside [0, 1]; (when a round is traced) no parameters, as in a client's uplink.

    Example:
      >>> server_tx = optax.chain(optax.sgd(1.0), fc.compression.prune(0.9))  # last, so that it sees the whole step

    Source: Zhu and Gupta (2017), "To Prune, or Not to Prune", equation 1; Han et al. (2015), "Learning both Weights and
    Connections for Efficient Neural Networks".
    """
    if not callable(sparsity):
        checks.within("prune: sparsity", sparsity, 0, 1)

    def update(updates: Any, state: PruneState, params: Any = None) -> tuple[Any, PruneState]:
        if params is None:
            raise InvalidInput("prune looks at the parameters: it belongs at the end of the server's optimiser.")
        (x, restore), (u, _) = tree.ravel(params), tree.ravel(updates)
        dtype = tree.common_type(x, u)
        x, u = x.astype(dtype), u.astype(dtype)
        share = sparsity(state.rounds) if callable(sparsity) else sparsity
        rank = jnp.argsort(jnp.argsort(jnp.abs(x + u))).astype(jnp.float32)
        pruned = restore(jnp.where(rank < jnp.floor(share * len(x)), -x, u))
        return optax.tree.cast_like(pruned, updates), PruneState(state.rounds + 1)

    return optax.GradientTransformation(lambda params: PruneState(jnp.zeros((), jnp.int32)), update)
