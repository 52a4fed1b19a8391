"""pFedMe: personal models by Moreau envelopes."""

import dataclasses

import jax
import optax

from fedjax_clip.algorithms.base import Round, algorithm, own_key
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer, uniform_mean
from fedjax_clip.uplink.base import Uplink


def pfedme(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    strength: float | Array = 15.0,
    rate: float | Array = 0.01,
    inner_steps: int = 5,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local steps on the Moreau envelope ``F_i(y) = min_t f_i(t) + strength / 2 |t - y|^2``, whose minimiser is own.

    At each local step a client takes ``inner_steps`` steps ``t <- t - rate (g(t) + strength (t - y))`` from ``t = y``
    on the step's batch, and then steps y along the envelope's gradient, ``strength (y - t)``. The last t is its own
    model. A clip in ``client_tx`` bounds the envelope's gradient. With one inner step and ``strength * rate = 1`` y
    takes FedAvg's steps.

    Args:
      per_example_loss, server_tx, uplink, gradient: as ``fc.fedavg``. ``optax.sgd(beta)`` at the server is the paper's
        beta. No ``private_gradient``: a step uses a record several times.
      client_tx: the optimiser of y; ``optax.sgd(eta)`` in the paper.
      strength: lambda, positive; may be traced. The inner steps are stable for ``strength * rate < 1``.
      rate: of the inner steps, positive; may be traced.
      inner_steps: K, gradients at each local step.
      reducer: ``fc.reduce.uniform_mean()`` by default, as in the paper.

    Returns:
      An ``Algorithm`` whose clients keep t; ``algorithm.personal`` gives it.

    Raises:
      InvalidInput: an argument of the wrong kind, a number that is not positive.

    Example:
      >>> algorithm = fc.personal.pfedme(per_example_loss, optax.sgd(0.05), strength=5.0, rate=0.1, inner_steps=3)

    Source: Dinh, Tran and Nguyen (2020), "Personalized Federated Learning with Moreau Envelopes", Algorithm 1. The
    paper leaves the inner solver open; its code starts from the last t, not from y.
    """
    checks.positive("pfedme's strength", strength, finite=True)
    checks.positive("pfedme's rate", rate, finite=True)
    inner_steps = checks.count("pfedme's inner_steps", inner_steps)

    def round(now: Round):
        def client_fn(x, client, key):
            def minimiser(g, y, step):
                def descend(t, g):
                    pull = jax.tree.map(lambda g, t, y: g + strength * (t - y), g, t, y)
                    return tree.add_scaled(t, -rate, pull)

                def again(n, t):
                    return descend(t, client.gradient(t, step, jax.random.fold_in(own_key(key), n)))

                return jax.lax.fori_loop(1, inner_steps, again, descend(y, g))

            stepping = dataclasses.replace(client, tx=optax.chain(_envelope(strength), client.tx))
            y, (own, *_), _, report = stepping.local_steps(x, key, adjust=minimiser)
            return optax.tree.sub(y, x), own, report

        return now.step(now.exchange(client_fn, now.server.params))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=uniform_mean() if reducer is None else reducer,
        gradient=gradient,
        client_own=tree.as_arrays,
        personal=lambda params, own: own,
        reuses=True,
    )


def _envelope(strength: float | Array) -> optax.GradientTransformation:
    """``t -> strength (y - t)``; its state is the last t."""

    def update(t, last, params=None):
        return jax.tree.map(lambda t, y: strength * (y - t), t, params), t

    return optax.GradientTransformation(lambda params: params, update)
