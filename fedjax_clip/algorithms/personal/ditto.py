"""Ditto: a model of its own for each client, held near the server's."""

import optax

from fedjax_clip.algorithms.base import Round, algorithm, own_key
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def ditto(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    strength: float | Array,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """FedAvg, and beside it each client's own model ``v_i``, pulled towards the server's x.

    A client takes FedAvg's local steps from x and sends the change. It then steps its own model on the same batches,
    along ``g(v_i) + strength (v_i - x)``. So the server's model is FedAvg's, whatever the strength. With strength 0
    the own models are local training. Clips in ``client_tx`` see the pull, too. Only the first training is sent, so
    links and accounting are FedAvg's.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``; both trainings use
        ``client_tx``.
      strength: lambda, of the pull, at least 0; may be traced. The pull is stable for ``strength * lr < 1``.

    Returns:
      An ``Algorithm`` whose clients keep ``v_i``; ``algorithm.personal`` gives it. A round takes twice FedAvg's
      gradients. Metrics besides FedAvg's: ``personal_loss``, of the own models while they train.

    Raises:
      InvalidInput: an argument of the wrong kind, a negative strength.

    Example:
      >>> algorithm = fc.personal.ditto(per_example_loss, client_tx, strength=0.1)
      >>> evaluate = fc.evaluator(per_example_loss, {"examples": held_out}, algorithm=algorithm, population=data)
      >>> result = fc.train(algorithm, data, params, rounds=5, cohort_size=10, evaluate=evaluate)

    Source: Li, Hu, Beirami and Smith (2021), "Ditto: Fair and Robust Federated Learning Through Personalization",
    Algorithm 1.
    """
    checks.within("ditto's strength", strength, 0)

    def round(now: Round):
        def client_fn(x, client, key):
            def pulled(g, v, step):
                return tree.add_scaled(g, strength, optax.tree.sub(v, x))

            y, _, _, report = client.local_steps(x, key)
            v, _, _, own = client.local_steps(client.state.own, own_key(key), adjust=pulled)
            return optax.tree.sub(y, x), v, report | {"personal_loss": own["loss"]}

        return now.step(now.exchange(client_fn, now.server.params))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        client_own=tree.as_arrays,
        personal=lambda params, own: own,
    )
