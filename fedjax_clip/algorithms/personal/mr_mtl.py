"""MR-MTL: each client's own model, held near the mean of all."""

import jax
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def mr_mtl(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    strength: float | Array,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Mean-regularised multi-task learning: own models ``v_i``, of which the server holds the mean x.

    A client steps its own model along ``g(v_i) + strength (v_i - x)`` and sends its change. The server adds ``|S| / N``
    times the mean of the changes, so x is the mean of all N clients' models, whichever clients come. Unlike Ditto it
    trains one model, so its gradients cost what FedAvg's do. With strength 0 it is local training. Clips in
    ``client_tx`` see the pull, too.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``. With ``private_gradient``
        each round is private for records, and so is the own model; a client that stays away spends nothing.
      strength: lambda, of the pull, at least 0; may be traced. The pull is stable for ``strength * lr < 1``.

    Returns:
      An ``Algorithm`` whose clients keep ``v_i``; ``algorithm.personal`` gives it.

    Raises:
      InvalidInput: an argument of the wrong kind, a negative strength.

    Example:
      >>> algorithm = fc.personal.mr_mtl(per_example_loss, client_tx, strength=0.1)

    Source: Liu, Hu, Wu and Smith (2022), "On Privacy and Personalization in Cross-Silo Federated Learning", Algorithm
    A1 and equation 3.
    """
    checks.within("mr_mtl's strength", strength, 0)

    def round(now: Round):
        def client_fn(x, client, key):
            def pulled(g, v, step):
                return tree.add_scaled(g, strength, optax.tree.sub(v, x))

            v, _, _, report = client.local_steps(client.state.own, key, adjust=pulled)
            return optax.tree.sub(v, client.state.own), v, report

        answer = now.exchange(client_fn, now.server.params)
        share = now.share(answer)
        return now.step(answer, jax.tree.map(lambda u: tree.scaled(share, u), answer.update))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        client_own=tree.as_arrays,
        personal=lambda params, own: own,
    )
