"""APFL: a mixture of the client's own model and the shared one."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm, own_key
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, Params, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def apfl(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    alpha: float | Array = 0.5,
    alpha_rate: float | Array | None = None,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """FedAvg, and own models ``v_i`` that are trained within the mixture ``alpha v_i + (1 - alpha) w``.

    At each local step on the same batch: ``w <- w - lr g(w)``, FedAvg's step, and ``v_i <- v_i - lr alpha g(alpha v_i +
    (1 - alpha) w)`` with the w before the step. A client uses the mixture of its ``v_i`` and the server's model. With
    alpha 0 that is FedAvg's model, and with alpha 1 it is local training. ``client_tx`` steps both models, each with a
    state of its own, so a clip bounds both gradients separately; ``clipped_steps`` counts steps at which either fired.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``.
      alpha: share of the own model, between 0 and 1, the same for all clients; may be traced.
      alpha_rate: at least 0; may be traced. Each client then adapts an alpha of its own, which begins with ``alpha``,
        by ``alpha <- alpha - alpha_rate <v - w, g>`` at each step, with the mixture's gradient g, before a clip, and
        within [0, 1]. By default alpha is fixed.

    Returns:
      An ``Algorithm`` whose clients keep ``v_i``, or ``(v_i, alpha_i)``; ``algorithm.personal`` gives the mixture. A
      round takes twice FedAvg's gradients.

    Raises:
      InvalidInput: an argument of the wrong kind, an alpha outside [0, 1], a negative rate.

    Example:
      >>> algorithm = fc.personal.apfl(per_example_loss, client_tx, alpha=0.5)

    Source: Deng, Kamani and Mahdavi (2020), "Adaptive Personalized Federated Learning", Algorithm 1.
    """
    checks.within("apfl's alpha", alpha, 0, 1)
    adapts = alpha_rate is not None
    if adapts:
        checks.within("apfl's alpha_rate", alpha_rate, 0, finite=True)

    def mixture(own, w):
        v, a = own if adapts else (own, alpha)
        return jax.tree.map(lambda v, w: _scaled(a, v) + _scaled(1 - jnp.asarray(a), w), v, w)

    def round(now: Round):
        def client_fn(x, client, key):
            def both(loss, models, batch, weights, key):
                w, own = models
                v, a = own if adapts else (own, alpha)
                g, report = client.gradient_of(loss, w, batch, weights, key)
                mixed, told = client.gradient_of(loss, mixture(own, w), batch, weights, own_key(key))
                h = jax.tree.map(lambda h: _scaled(a, h), mixed)
                if adapts:
                    h = h, optax.tree.vdot(optax.tree.sub(v, w), mixed).astype(jnp.float32)
                return (g, h), report | {"personal_loss": told["loss"]}

            own_tx = _with_alpha(client.tx, alpha_rate) if adapts else client.tx
            stepping = dataclasses.replace(client, tx=_each(client.tx, own_tx), gradient_of=both)
            (w, own), _, _, report = stepping.local_steps((x, client.state.own), key)
            return optax.tree.sub(w, x), own, report

        return now.step(now.exchange(client_fn, now.server.params))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        client_own=lambda params: tree.as_arrays((params, jnp.float32(alpha)) if adapts else params),
        personal=lambda params, own: mixture(own, params),
    )


def _scaled(factor: float | Array, x: Array) -> Array:
    return tree.scaled(jnp.asarray(factor), x)


def _each(*txs: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transform for each of several models, each with a state of its own."""
    all_txs = tuple(map(optax.with_extra_args_support, txs))

    def init(models):
        return tuple(tx.init(m) for tx, m in zip(all_txs, models, strict=True))

    def update(updates, states, params: tuple[Params, ...], *, anchor: tuple[Params, ...], **extra):
        given = zip(all_txs, updates, states, params, anchor, strict=True)
        new, states = zip(*[tx.update(u, s, y, anchor=x, **extra) for tx, u, s, y, x in given], strict=True)
        return new, states

    return optax.GradientTransformationExtraArgs(init, update)


def _with_alpha(tx: optax.GradientTransformation, rate: float | Array | None) -> optax.GradientTransformationExtraArgs:
    """For ``(v, alpha)``: ``tx``, and projected gradient descent."""

    def update(slope, state, params=None, **extra):
        return jnp.clip(params - rate * slope, 0, 1) - params, state

    return _each(tx, optax.GradientTransformationExtraArgs(lambda alpha: optax.EmptyState(), update))
