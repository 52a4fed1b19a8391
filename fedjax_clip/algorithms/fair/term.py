"""TERM: clients count by the exponential of their loss."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink

LARGEST = 60.0  # of an exponent, far from what float32 overflows at


def term(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    t: float | Array,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Tilted FedAvg, for the objective ``log(mean_i exp(t F_i)) / t``: ``x <- x + sum_i e_i u_i / sum_i e_i``.

    ``e_i = exp(t F_i)`` with ``F_i`` the client's mean loss at x, and ``u_i`` FedAvg's update. With t = 0 it is FedAvg;
    as t grows, the client with the largest loss alone counts; a negative t plays outliers down. The server keeps the
    last round's ``a = log mean_i e_i``, and clients send ``exp(t F_i - a)``, so that nothing overflows.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``; both sums are the reducer's
        means. No ``private_gradient`` and no noise: a client sends what depends on its loss.
      t: the tilt; may be traced.

    Returns:
      An ``Algorithm`` whose server keeps a. A round passes a client's data once more than FedAvg, without gradients.

    Raises:
      InvalidInput: an argument of the wrong kind, a t that is no number.

    Example:
      >>> algorithm = fc.fair.term(per_example_loss, client_tx, t=1.0)

    Source: Li, Beirami, Sanjabi and Smith (2021), "Tilted Empirical Risk Minimization", Algorithm 2 with clients for
    groups and local steps for its gradient.
    """
    checks.within("term's t", t, -1e6, 1e6)

    def round(now: Round):
        def client_fn(shared, client, key):
            x, a = shared
            tilt = jnp.exp(jnp.clip(t * client.mean_loss(x, key) - a, -LARGEST, LARGEST))
            y, _, _, report = client.local_steps(x, key)
            update = jax.tree.map(lambda y, x: tree.scaled(tilt, y - x), y, x)
            return (update, tilt), client.state.own, report

        a = now.server.own
        answer = now.exchange(client_fn, (now.server.params, a))
        update, tilt = answer.update
        scale = tree.or_one(tilt)
        return now.step(answer, jax.tree.map(lambda u: tree.divided(u, scale), update), own=a + jnp.log(scale))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        server_own=lambda params: jnp.zeros((), jnp.float32),
        beside=[None],
        reuses=True,
    )
