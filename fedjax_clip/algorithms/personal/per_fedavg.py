"""Per-FedAvg: a start from which one step on its own data serves each client; and Reptile."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm, own_key
from fedjax_clip.algorithms.fedavg import fedavg
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, InvalidInput, PerExampleLoss
from fedjax_clip.reduce import Reducer, uniform_mean
from fedjax_clip.uplink.base import Uplink

HESSIANS = ("none", "differences", "exact")


def per_fedavg(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    rate: float | Array = 0.01,
    hessian: str = "none",
    delta: float | Array = 1e-3,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local steps along the gradient of ``f_i(y - rate grad f_i(y))``, the loss AFTER a step on a client's own data.

    ``d = (I - rate H(y; B'')) g(y - rate g(y; B'); B)``, with three batches: B of the local step, B' and B'' the
    client's next two, from its first one again after its last. Clips in ``client_tx`` see d. With rate 0 it is FedAvg.
    The server's model is a start, not a model to use: ``fc.personal.fine_tune(..., optax.sgd(rate), steps=1)`` makes
    each client's own, for new clients, too.

    Args:
      per_example_loss, client_tx, server_tx, uplink, gradient: as ``fc.fedavg``. No ``private_gradient``: a step uses
        three batches.
      rate: alpha of the step on own data, at least 0; may be traced.
      hessian: what is made of H. ``"none"``: it is left out (FO, first order). ``"differences"``: ``H u = (g(y + delta
        u) - g(y - delta u)) / (2 delta)`` (HF, Hessian-free). ``"exact"``: the derivative of g along u, by ``jax.jvp``.
      delta: of ``"differences"``, positive; may be traced.
      reducer: ``fc.reduce.uniform_mean()`` by default, as in the paper.

    Returns:
      An ``Algorithm``; a local step takes 2, 4 or about 4 gradients.

    Raises:
      InvalidInput: an argument of the wrong kind, a negative rate, another ``hessian``.

    Example:
      >>> algorithm = fc.personal.per_fedavg(per_example_loss, optax.sgd(0.1), rate=0.05, hessian="exact")

    Source: Fallah, Mokhtari and Ozdaglar (2020), "Personalized Federated Learning with Theoretical Guarantees: A
    Model-Agnostic Meta-Learning Approach", Algorithm 1 and section 5 for FO and HF.
    """
    checks.within("per_fedavg's rate", rate, 0, finite=True)
    checks.positive("per_fedavg's delta", delta, finite=True)
    if hessian not in HESSIANS:
        raise InvalidInput(f"per_fedavg's hessian must be one of {', '.join(HESSIANS)}, not {checks.shown(hessian)}.")

    def round(now: Round):
        def client_fn(x, client, key):
            count = jnp.maximum(client.num_steps, 1)

            def meta(_, y, step):
                def at(y, later):
                    """The gradient on a later batch, with randomness of its own."""
                    own = jax.random.fold_in(own_key(key), later) if later else key
                    return client.gradient(y, (step + later) % count, own)

                outer = at(tree.add_scaled(y, -rate, at(y, 1)), 0)
                if hessian == "none":
                    return outer
                if hessian == "exact":
                    along = jax.jvp(lambda y: at(y, 2), (y,), (outer,))[1]
                else:
                    ahead, behind = (at(tree.add_scaled(y, sign * delta, outer), 2) for sign in (1, -1))
                    along = jax.tree.map(lambda a, b: (a - b) / (2 * delta), ahead, behind)
                return tree.add_scaled(outer, -rate, along)

            y, _, _, report = client.local_steps(x, key, adjust=meta)
            return optax.tree.sub(y, x), client.state.own, report

        return now.step(now.exchange(client_fn, now.server.params))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=uniform_mean() if reducer is None else reducer,
        gradient=gradient,
        reuses=True,
    )


def reptile(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """``x <- x + step mean_i (y_i - x)``, a start for fine-tuning: FedAvg with clients counting equally.

    ``optax.sgd(step)`` at the server is Reptile's step. Personalise with ``fc.personal.fine_tune``.

    Args:
      per_example_loss, client_tx, server_tx, uplink, gradient: as ``fc.fedavg``.
      reducer: ``fc.reduce.uniform_mean()`` by default.

    Returns:
      An ``Algorithm``, ``fc.fedavg``'s.

    Raises:
      InvalidInput: an argument of the wrong kind.

    Example:
      >>> algorithm = fc.personal.reptile(per_example_loss, optax.sgd(0.1), optax.sgd(0.5))

    Source: Nichol, Achiam and Schulman (2018), "On First-Order Meta-Learning Algorithms", Algorithm 2.
    """
    mean = uniform_mean() if reducer is None else reducer
    return fedavg(per_example_loss, client_tx, server_tx, uplink=uplink, reducer=mean, gradient=gradient)
