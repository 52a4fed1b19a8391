"""What algorithms share: their parts with defaults, the server's beginning and its step."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.core import checks, optimiser, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, ClientTx, InvalidInput, Params, PyTree, Server
from fedjax_clip.reduce import Reducer, weighted_mean
from fedjax_clip.uplink.base import Uplink, identity, on_parts
from fedjax_clip.uplink.orders import check_ends


class Parts(NamedTuple):
    """What most algorithms are built of, checked, with defaults filled in.

    Attributes:
      client_tx, server_tx, reducer, gradient: as ``fc.fedavg``.
      uplink: what a client's whole message passes; ``fc.uplink.on_parts`` where it has several parts.

    Example:
      >>> fc.extend.Parts(client_tx, optax.sgd(1.0), fc.uplink.identity(), fc.reduce.weighted_mean()).population
      0
    """

    client_tx: ClientTx
    server_tx: optax.GradientTransformation
    uplink: Uplink
    reducer: Reducer
    gradient: Gradient = batch_gradient

    @property
    def population(self) -> int:
        """Fewest clients that there must be, since one is named by number."""
        return max(self.uplink.promises.population, self.reducer.population)


def parts(
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None,
    uplink: Uplink | None,
    reducer: Reducer | None,
    only_update: bool = False,
    gradient: Gradient = batch_gradient,
) -> Parts:
    """``server_tx`` is ``optax.sgd(1.0)`` by default, ``reducer`` the weighted mean, ``uplink`` changes nothing.

    ``only_update`` says that clients send nothing but what passes the uplink, so that noise there covers all.
    """
    filled = Parts(
        client_tx,
        optax.sgd(1.0) if server_tx is None else server_tx,
        identity() if uplink is None else uplink,
        weighted_mean() if reducer is None else reducer,
        gradient,
    )
    if isinstance(client_tx, Uplink):
        raise InvalidInput("client_tx is an uplink; clips of a local step are in fc.clipping.")
    checks.kind(
        "client_tx", client_tx, optax.GradientTransformation | Callable, "an optax optimiser, or what builds one"
    )
    maker = getattr(client_tx, "func", client_tx)  # of a functools.partial
    if str(getattr(maker, "__module__", "")).split(".")[0] in ("optax", "fedjax_clip") and callable(client_tx):
        raise InvalidInput(
            f"client_tx is the function {maker.__name__} itself, which would be given the round's number: call it, as "
            f"in {maker.__name__}(0.1)."
        )
    checks.kind("server_tx", filled.server_tx, optax.GradientTransformation, "an optax optimiser")
    checks.kind(
        "uplink", filled.uplink, Uplink, "an fc.uplink.Uplink (fc.uplink.at_client(tx) makes one of an optax transform)"
    )
    checks.kind("reducer", filled.reducer, Reducer, "an fc.reduce.Reducer, such as fc.reduce.uniform_mean()")
    check_ends(filled.uplink.promises, filled.reducer, only_update)
    return filled


def on_update(uplink: Uplink | None, beside: Uplink | None = None) -> Uplink:
    """The link of a message ``(update, what is sent beside it)``; nothing happens to a part without a link."""
    links = (identity() if uplink is None else uplink, beside)
    return on_parts(*(link for link in links if link is not None))


def init_server(params: Params, parts: Parts, own: Callable[[Params], PyTree] = lambda params: ()) -> Server:
    """The server before round 0, with copies of the parameters (a round donates its server's buffers).

    Args:
      params: initial parameters.
      parts: of the algorithm.
      own: ``params -> what the algorithm itself keeps``; nothing by default.

    Example:
      >>> server = fc.extend.init_server(params, algorithm.parts)
    """
    params = tree.as_arrays(params)
    opt_state = optimiser.init(parts.server_tx, params)
    opt_state, link, own_state = tree.as_arrays((opt_state, parts.uplink.init(params), own(params)))
    return Server(params, opt_state, link, jnp.zeros((), jnp.int32), own_state)


def step_server(server: Server, parts: Parts, update: PyTree, uplink_state: PyTree, own: PyTree = ()) -> Server:
    """One step of the server's optimiser along ``-update``, the pseudo-gradient.

    Args:
      server: before the round.
      parts: of the algorithm.
      update: what the reducer and the uplink made of the clients' updates.
      uplink_state: the uplink's state at the server, after the round.
      own: what the algorithm itself keeps at the server, after the round.

    Example:
      >>> update = jax.tree.map(jnp.ones_like, server.params)  # what the reducer made of the clients' messages
      >>> server = fc.extend.step_server(server, algorithm.parts, update, server.uplink)
      >>> float(server.params["b"][0]), int(server.round)
      (1.0, 1)
    """
    gradient = jax.tree.map(lambda u, x: -u.astype(tree.common_type(u, x)), update, server.params)
    updates, opt_state = optimiser.update(parts.server_tx, gradient, server.opt_state, server.params)
    return Server(tree.apply_updates(server.params, updates), opt_state, uplink_state, server.round + 1, own)


def zeros_like(params: Params) -> PyTree:
    """A variate before round 0."""
    return jax.tree.map(jnp.zeros_like, params)


def told(num_clients: int | None) -> int | None:
    """``num_clients`` as far as it is known now (not traced): what the driver holds against the population's size.

    Raises:
      InvalidInput: what is no number of clients.
    """
    if num_clients is None or isinstance(num_clients, jax.core.Tracer):
        return None
    return checks.count("num_clients", num_clients)


def kind(algorithm: Algorithm) -> str:
    """Which algorithm it is: its name, or that of the function that made it, such as ``scaffold``."""
    return algorithm.name or maker(algorithm.round)


def maker(function: Any) -> str:
    """The function in which a function was defined, or its own name."""
    function = inspect.unwrap(getattr(function, "func", function))
    return getattr(function, "__qualname__", type(function).__qualname__).split(".<locals>")[0]
