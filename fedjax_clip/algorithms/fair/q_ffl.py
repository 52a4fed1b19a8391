"""q-FFL: clients count by a power of their loss."""

import jax
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer, uniform_mean
from fedjax_clip.uplink.base import Uplink

LEAST = 1e-10  # added to a loss, of which a negative power may be taken


def q_ffl(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    q: float | Array,
    rate: float | Array,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """q-FedAvg, for the objective ``sum_i F_i^(q + 1) / (q + 1)``, which counts clients with a large loss more.

    With ``u_i = y_i - x`` of FedAvg's local steps and ``F_i`` the mean loss at x over the client's data: ``x <- x +
    sum_i F_i^q u_i / sum_i h_i``, where ``h_i = F_i^q + q F_i^(q - 1) |u_i|^2 / rate`` bounds the curvature. With q = 0
    it is FedAvg. Both sums are the reducer's means. ``|u_i|`` is that of the update before the uplink.

    Args:
      per_example_loss, client_tx, server_tx, uplink, gradient: as ``fc.fedavg``. No ``private_gradient`` and no noise:
        a client sends what depends on its loss.
      q: at least 0; may be traced. The larger, the fairer.
      rate: 1 / L, the learning rate for which the paper's step sizes are derived: that of the local steps. Positive;
        may be traced.
      reducer: ``fc.reduce.uniform_mean()`` by default, as in the paper.

    Returns:
      An ``Algorithm``. A round passes a client's data once more than FedAvg, without gradients.

    Raises:
      InvalidInput: an argument of the wrong kind, a negative q, a rate that is not positive.

    Example:
      >>> algorithm = fc.fair.q_ffl(per_example_loss, optax.sgd(0.1), q=1.0, rate=0.1)

    Source: Li, Sanjabi, Beirami and Smith (2020), "Fair Resource Allocation in Federated Learning", Algorithm 2.
    """
    checks.within("q_ffl's q", q, 0, finite=True)
    checks.positive("q_ffl's rate", rate, finite=True)

    def round(now: Round):
        def client_fn(x, client, key):
            loss = client.mean_loss(x, key) + LEAST
            y, _, _, report = client.local_steps(x, key)
            update = optax.tree.sub(y, x)
            weight = loss**q
            squared = (tree.norm(update) ** 2).astype(loss.dtype)
            curvature = weight + q * loss ** (q - 1) * squared / rate
            return (jax.tree.map(lambda u: tree.scaled(weight, u), update), curvature), client.state.own, report

        answer = now.exchange(client_fn, now.server.params)
        mean, curvature = answer.update
        scale = tree.or_one(curvature)
        return now.step(answer, jax.tree.map(lambda u: tree.divided(u, scale), mean))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=uniform_mean() if reducer is None else reducer,
        gradient=gradient,
        beside=[None],
        reuses=True,
    )
