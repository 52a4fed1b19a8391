"""Federated averaging and the other members of its family: FedSGD and the server-optimiser methods (FedOpt)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Parts, init_server, parts, step_server
from fedjax_clip.algorithms.exchange import exchange
from fedjax_clip.core import optimiser
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, ClientState, ClientTx, Params, PerExampleLoss, PyTree
from fedjax_clip.local.steps import ClientFn, at_round, local_gradient, local_update
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def fedavg(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
    keep_opt_state: bool = False,
) -> Algorithm:
    """Federated averaging: clients train locally, the server steps along the average of their changes.

    Round: every client c of the cohort starts from x, takes its local steps to y_c and sends y_c - x through the
    uplink; the server takes ``server_tx``'s step with ``-reduce(y_c - x)`` for a gradient. With a clip in front of
    the client's SGD it is clipped FedAvg (CELGC); ``optax.sgd(1.0)`` at the server is FedAvg, ``optax.sgd(1.0,
    momentum=0.9)`` is FedAvgM. ``fc.fedopt`` has FedAdam, FedYogi and FedAdagrad.

    Args:
      per_example_loss: ``(params, batch, key) -> losses[B]``, or ``(losses[B], {name: values[B]})``.
      client_tx: optax optimiser of a client's local steps, fresh each round; or a function of the round's number
        that gives one (for schedules over rounds).
      server_tx: optax optimiser of the server; ``optax.sgd(1.0)`` by default.
      uplink: what an update passes on its way to the server; nothing by default.
      reducer: ``fc.reduce.weighted_mean()`` (by examples) by default, or ``fc.reduce.uniform_mean()``.
      gradient: how a batch's gradient is taken; ``fc.local.per_example_gradient(clip)`` clips every example's own.
      keep_opt_state: whether each client keeps its optimiser's state from its one round to its next, as a clip with
        a history (``auto_clip``, ``z_clip``) needs; fresh in every round otherwise.

    Returns:
      An ``Algorithm``. Its metrics: ``loss`` (mean over the examples trained on, each before its step),
      ``examples``, ``steps``, ``clients``, ``dropped``, ``update_norm``, ``clipped_steps`` (if the client's chain
      has a clip of ``fc.clipping``) and whatever else the loss reports.

    Raises:
      InvalidInput: an argument of the wrong kind.

    Example:
      >>> client_tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx)

    Source: McMahan et al. (2017), Algorithm 1; Reddi et al. (2021), Algorithms 1 and 2; Liu et al. (2022) for the
    clipped local step.
    """
    filled = parts(client_tx, server_tx, uplink, reducer, only_update=True, gradient=gradient)

    def work(tx):
        return local_update(per_example_loss, tx, gradient, keep_opt_state)

    def own(params):
        return optimiser.init(at_round(client_tx, jnp.zeros((), jnp.int32)), params) if keep_opt_state else ()

    return _averaged(work, filled, own)._replace(loss=per_example_loss, name="fedavg")


def fedsgd(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
) -> Algorithm:
    """One client step a round along the gradient over all of a client's examples, then as ``fedavg``.

    With full participation, ``optax.sgd(lr)`` and the weighted mean this is distributed gradient descent on the
    mean loss of all examples. Takes and returns what ``fedavg`` does; local epochs and steps must be 1, and the
    batch size only bounds the memory.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer: as ``fc.fedavg``.

    Returns:
      An ``Algorithm``; its metrics are ``fc.fedavg``'s.

    Raises:
      InvalidInput: an argument of the wrong kind.

    Example:
      >>> algorithm = fc.fedsgd(per_example_loss, optax.sgd(1.0), optax.sgd(0.1))

    Source: McMahan et al. (2017), section 2, FedSGD.
    """
    filled = parts(client_tx, server_tx, uplink, reducer, only_update=True)
    averaged = _averaged(lambda tx: local_gradient(per_example_loss, tx), filled, lambda params: ())
    return averaged._replace(loss=per_example_loss, name="fedsgd")


def _averaged(
    work: Callable[[optax.GradientTransformation], ClientFn], parts: Parts, own: Callable[[Params], PyTree]
) -> Algorithm:
    def init(params):
        return init_server(params, parts)

    def init_client(params):
        return ClientState(own(params), parts.uplink.init_client(params))

    def round(server, cohort, key):
        client_fn = work(at_round(parts.client_tx, server.round))
        key = jax.random.fold_in(key, server.round)
        update, uplink_state, client_states, metrics = exchange(
            client_fn, parts.uplink, parts.reducer, server.params, server.uplink, cohort, key
        )
        return step_server(server, parts, update, uplink_state), client_states, metrics

    return Algorithm(init, init_client, round, population=parts.population, parts=parts)
