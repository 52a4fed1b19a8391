"""FedDyn: a regulariser that moves, so that clients' optima agree with the server's."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm, zeros_like
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer, uniform_mean
from fedjax_clip.uplink.base import Uplink


def feddyn(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    alpha: float | Array,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local steps along ``g - h_i + alpha (y - x)``, so that clients' optima agree with the server's.

    After the steps ``h_i <- h_i - alpha (y_i - x)``; ``h <- h - alpha / N sum_i (y_i - x)``; ``x <- mean y_i - h /
    alpha``. So h is the mean of the h_i of all N clients. Both means are the reducer's. A clip in ``client_tx`` sees
    the corrected direction. While it fires, h_i follows the clipped path and is no gradient at y_i any more, so the
    fixed point moves.

    Args:
      per_example_loss, client_tx, server_tx, uplink, gradient: as ``fc.fedavg``. h follows what the server receives.
      alpha: strength of the regulariser, positive.
      reducer: ``fc.reduce.uniform_mean()`` by default, as the derivation asks.

    Returns:
      An ``Algorithm`` whose clients keep ``h_i`` and whose server keeps ``h``.

    Raises:
      InvalidInput: an argument of the wrong kind, an alpha that is not positive.

    Example:
      >>> algorithm = fc.feddyn(per_example_loss, optax.sgd(0.1), alpha=0.1)

    Source: Acar et al. (2021), "Federated Learning Based on Dynamic Regularization", Algorithm 1.
    """
    checks.positive("feddyn's alpha", alpha)

    def round(now: Round):
        def client_fn(x, client, key):
            h_i = client.state.own

            def regularised(g, y, step):
                return jax.tree.map(lambda g, h, y, x: g - h + alpha * (y - x), g, h_i, y, x)

            y, _, _, report = client.local_steps(x, key, adjust=regularised)
            update = optax.tree.sub(y, x)
            return update, jax.tree.map(lambda h, u: h - alpha * u, h_i, update), report

        answer = now.exchange(client_fn, now.server.params)
        h = tree.add_scaled(now.server.own, -alpha * now.share(answer), answer.update)
        # Under a fixed denominator an empty round must look like any other, or noise could not hide it.
        came = True if now.parts.reducer.denominator is not None else answer.metrics["clients"] > 0

        def corrected(m, h):
            dtype = tree.common_type(m, h)
            return jnp.where(came, m.astype(dtype) - (h / alpha).astype(dtype), 0)

        return now.step(answer, jax.tree.map(corrected, answer.update, h), own=h)

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=uniform_mean() if reducer is None else reducer,
        gradient=gradient,
        server_own=zeros_like,
        client_own=zeros_like,
        mean_of=lambda own: (own, True),
    )
