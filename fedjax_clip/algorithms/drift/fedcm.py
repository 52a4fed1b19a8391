"""FedCM: local steps with the momentum of all clients."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm, zeros_like
from fedjax_clip.algorithms.drift.moments import direction
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def fedcm(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    alpha: float | Array,
    rate: float | Array,
    steps: float | Array | None = None,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local steps along ``alpha g + (1 - alpha) D``, with D the mean direction of all clients' last round.

    After a round whose mean update is u, ``D <- -u / (rate K)``, with K the mean number of the clients' local steps.
    D is zero before round 1, and stays as it is after a round whose update is zero (when nobody came). With
    ``alpha=1`` it is FedAvg to the bit. Clients keep nothing, so any few of them may come. A clip in ``client_tx``
    sees the whole direction, so D is bounded by its threshold.

    D comes from the aggregate alone. With ``steps`` given, clients send nothing but their updates, so noise of the
    uplink covers all. Otherwise each sends its number of steps, too.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``; ``client_tx`` without
        momentum.
      alpha: weight of the client's own gradient, in [0, 1]; the paper takes 0.1. May be traced.
      rate: learning rate of the local steps, which makes a direction of an update; positive, may be traced.
      steps: K, if all clients take equally many local steps; by default the reducer's mean of what they took.

    Returns:
      An ``Algorithm`` whose server keeps D, and sends it beside the parameters. Metrics besides FedAvg's:
      ``direction_norm``.

    Raises:
      InvalidInput: an argument of the wrong kind; noise without ``steps``.

    Example:
      >>> algorithm = fc.drift.fedcm(per_example_loss, optax.sgd(0.1), alpha=0.1, rate=0.1)

    Source: Xu, Wang, Wang and Yao (2021), "FedCM: Federated Learning with Client-level Momentum", Algorithm 2.
    """
    checks.within("fedcm's alpha", alpha, 0, 1)
    checks.positive("fedcm's rate", rate, finite=True)
    if steps is not None:
        checks.positive("fedcm's steps", steps, finite=True)

    def round(now: Round):
        def client_fn(shared, client, key):
            x, momentum = shared

            def with_momentum(g, y, step):
                return jax.tree.map(lambda g, d: alpha * g + (1 - alpha) * d, g, momentum)

            y, _, _, report = client.local_steps(x, key, adjust=with_momentum)
            update, took = optax.tree.sub(y, x), client.num_steps.astype(jnp.float32)
            return (update, took) if steps is None else update, client.state.own, report

        answer = now.exchange(client_fn, (now.server.params, now.server.own))
        update, took = answer.update if steps is None else (answer.update, jnp.float32(steps))
        momentum = direction(now.server.own, update, rate, took)
        return now.step(answer, update, own=momentum, metrics={"direction_norm": tree.norm(momentum)})

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        server_own=zeros_like,
        beside=[None] if steps is None else [],
    )
