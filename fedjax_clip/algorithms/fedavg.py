"""Federated averaging (FedAvg), FedSGD, and by their server's optimiser the FedOpt family."""

import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.core import optimiser
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, ClientTx, PerExampleLoss
from fedjax_clip.local.steps import at_round
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
    """Federated averaging: clients train locally, and the server steps along the mean of their changes.

    ``y_c = x - sum of client c's local steps``; ``x <- x + reduce_c uplink(y_c - x)``, by the server's optimiser.

    With a clip in front of the client's SGD this is clipped FedAvg (CELGC). ``optax.sgd(1.0)`` at the server is FedAvg,
    and ``optax.sgd(1.0, momentum=0.9)`` is FedAvgM. ``fc.fedopt`` has FedAdam, FedYogi and FedAdagrad.

    Args:
      per_example_loss: ``(params, batch, key) -> losses[B]``, or ``(losses[B], {name: values[B]})``.
      client_tx: optax optimiser of a client's local steps, fresh each round; or a function of the round's number
        that gives one (for schedules over rounds).
      server_tx: optax optimiser of the server; ``optax.sgd(1.0)`` by default.
      uplink: the links that an update passes on its way to the server; none by default.
      reducer: ``fc.reduce.weighted_mean()`` (by examples) by default, or ``fc.reduce.uniform_mean()``.
      gradient: the gradient of a batch; ``fc.local.per_example_gradient(clip)`` clips each example's gradient.
      keep_opt_state: whether each client keeps its optimiser's state between its rounds, as a clip with a history
        (``auto_clip``, ``z_clip``) needs. Otherwise the state is fresh in every round.

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

    def round(now: Round):
        def client_fn(x, client, key):
            kept = client.state.own if keep_opt_state else None
            y, opt_state, _, report = client.local_steps(x, key, opt_state=kept)
            return optax.tree.sub(y, x), opt_state if keep_opt_state else (), report

        return now.step(now.exchange(client_fn, now.server.params))

    def opt_state(params):
        return optimiser.init(at_round(client_tx, jnp.zeros((), jnp.int32)), params)

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        client_own=opt_state if keep_opt_state else None,
    )


def fedsgd(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """One client step a round along the gradient over all of a client's examples, then as ``fedavg``.

    ``y_c = x - lr grad f_c(x)``, with ``f_c`` the mean loss over all of client c's examples. With full participation,
    ``optax.sgd(lr)`` and the weighted mean this is distributed gradient descent on the mean loss of all examples. Local
    epochs and steps must be 1. The batch size only bounds the memory.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer: as ``fc.fedavg``.
      gradient: as ``fc.fedavg``, over all of a client's examples: ``per_example_gradient(clip)`` clips each of them.

    Returns:
      An ``Algorithm``; its metrics are ``fc.fedavg``'s.

    Raises:
      InvalidInput: an argument of the wrong kind.

    Example:
      >>> algorithm = fc.fedsgd(per_example_loss, optax.sgd(1.0), optax.sgd(0.1))

    Source: McMahan et al. (2017), section 2, FedSGD.
    """

    def round(now: Round):
        def client_fn(x, client, key):
            update, report = client.full_step(x, key)
            return update, client.state.own, report

        return now.step(now.exchange(client_fn, now.server.params))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx), uplink=uplink, reducer=reducer, gradient=gradient
    )
