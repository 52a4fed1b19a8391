"""What algorithms share: the server's beginning and its step."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip import tree
from fedjax_clip.typing import Params, PyTree, Server
from fedjax_clip.uplink.base import Uplink


def init_server(params: Params, server_tx: optax.GradientTransformation, uplink: Uplink) -> Server:
    """The server before round 0, with copies of the parameters (a round donates its server's buffers)."""
    params = tree.as_arrays(params)
    return Server(params, tree.as_arrays(server_tx.init(params)), uplink.init(params), jnp.zeros((), jnp.int32))


def step_server(
    server: Server, server_tx: optax.GradientTransformation, update: PyTree, uplink_state: PyTree
) -> Server:
    """One step of the server's optimiser along ``-update``, the pseudo-gradient (Reddi et al. 2021, Algorithm 1)."""
    gradient = jax.tree.map(jnp.negative, update)
    updates, opt_state = server_tx.update(gradient, server.opt_state, server.params)
    return Server(optax.apply_updates(server.params, updates), opt_state, uplink_state, server.round + 1)
