"""FedNova: clients with more local steps do not weigh more."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.core import tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def fednova(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Averages steps, not sums of steps: ``x + tau_eff * mean (y_i - x) / tau_i``, with ``tau_eff = mean tau_i``.

    ``tau_i`` is the number of client i's local steps. For SGD without momentum at the clients. A clip in ``client_tx``
    bounds each step, and so ``||y_i - x|| / tau_i`` by ``client_lr * threshold``, whatever tau_i. The uplink sees the
    normalised update.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``.

    Returns:
      An ``Algorithm`` without state across rounds.

    Raises:
      InvalidInput: an argument of the wrong kind; noise, which would not cover ``tau_i``.

    Example:
      >>> algorithm = fc.fednova(per_example_loss, optax.sgd(0.1))

    Source: Wang et al. (2020), "Tackling the Objective Inconsistency Problem", equation 8 with a_i = 1.
    """

    def round(now: Round):
        def client_fn(x, client, key):
            y, _, _, report = client.local_steps(x, key)
            steps = jnp.maximum(client.num_steps, 1).astype(jnp.float32)
            normalised = jax.tree.map(lambda y, x: tree.divided(y - x, steps), y, x)
            return (normalised, steps), client.state.own, report

        answer = now.exchange(client_fn, now.server.params)
        mean, steps = answer.update
        return now.step(answer, jax.tree.map(lambda d: tree.scaled(steps, d), mean))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        beside=[None],
    )
