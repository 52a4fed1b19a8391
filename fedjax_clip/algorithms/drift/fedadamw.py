"""FedAdamW: AdamW at the clients, whose second moments and directions travel."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm, zeros_like
from fedjax_clip.algorithms.drift.moments import direction, everywhere, within
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, Params, PerExampleLoss, PyTree
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


class Travelling(NamedTuple):
    """What the server keeps of AdamW, and sends beside the parameters.

    Attributes:
      direction: D, like the parameters.
      second: V, float32, one number for each leaf, or like the parameters.
      steps: float32 scalar, the mean number of local steps in all rounds together.

    Example:
      >>> server = fc.drift.fedadamw(per_example_loss, optax.sgd(0.01), rate=0.01).init(params)
      >>> sorted(server.own.second), float(server.own.steps)
      (['b', 'w'], 0.0)
    """

    direction: PyTree
    second: PyTree
    steps: Array


class _Moments(NamedTuple):
    step: Array
    first: PyTree
    second: PyTree


def fedadamw(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    rate: float | Array,
    alpha: float | Array = 0.5,
    decay: float | Array = 0.01,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    by_leaf: bool = True,
    gradient_tx: optax.GradientTransformation | None = None,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local AdamW steps along ``m^ / (sqrt(v^) + eps) + alpha D + decay y``, with m = 0 and v = V at a round's start.

    V is the mean of the clients' last v, and D that of their directions: ``D <- -u / (rate K)`` of a mean update u and
    a mean number of steps K. At local step k, ``m^ = m / (1 - b1^k)``, and ``v^ = v / (1 - b2^(s + k))`` after s steps
    in earlier rounds, so a v that has travelled is not taken for a fresh one. A round in which nobody came changes
    neither. A client's v is averaged over each leaf of the parameters before it is sent, so messages hardly grow.

    A clip in ``client_tx`` sees the whole direction; one in ``gradient_tx`` sees the raw gradient.

    Args:
      per_example_loss, server_tx, uplink, reducer, gradient: as ``fc.fedavg``.
      client_tx: what follows AdamW: ``optax.sgd(rate)``, with a clip in front of it if you like.
      rate: learning rate of the local steps, which makes a direction of an update; positive, may be traced.
      alpha: weight of D, at least 0; 0 leaves it out.
      decay: decoupled weight decay, at least 0.
      b1, b2: decay of the moments, in [0, 1).
      eps: added to the root; positive.
      by_leaf: whether v travels as one number for each leaf; otherwise as a whole, and messages are twice as long.
      gradient_tx: optax transform of the gradient before AdamW; none by default.

    Returns:
      An ``Algorithm`` whose server keeps ``Travelling(direction, second, steps)``. Metrics besides FedAvg's:
      ``direction_norm``.

    Raises:
      InvalidInput: an argument of the wrong kind; noise, which would not cover v.

    Example:
      >>> algorithm = fc.drift.fedadamw(per_example_loss, optax.sgd(0.01), rate=0.01)

    Source: Liu, Shang et al. (2025), "FedAdamW: A Communication-Efficient Optimizer with Convergence and Generalization
    Guarantees for Federated Large Models", with the leaves of the parameters for its blocks.
    """
    checks.positive("fedadamw's rate", rate, finite=True)
    checks.within("fedadamw's alpha", alpha, 0, finite=True)
    checks.within("fedadamw's decay", decay, 0, finite=True)
    for name, beta in (("b1", b1), ("b2", b2)):
        checks.fraction(f"fedadamw's {name}", beta, zero=True)
    checks.positive("fedadamw's eps", eps, finite=True)
    if gradient_tx is not None:
        checks.kind("fedadamw's gradient_tx", gradient_tx, optax.GradientTransformation, "an optax transform")
    first_tx = optax.identity() if gradient_tx is None else gradient_tx

    def adam(start: Travelling) -> optax.GradientTransformationExtraArgs:
        def init(params: Params) -> _Moments:
            second = jax.tree.map(
                lambda v, x: jnp.broadcast_to(v, x.shape), everywhere(start.second, wide_zeros(params)), params
            )
            return _Moments(jnp.zeros((), jnp.float32), wide_zeros(params), second)

        def update(g: PyTree, state: _Moments, params: Params, **_: Any) -> tuple[PyTree, _Moments]:
            k = state.step + 1
            m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * tree.wide(g), state.first, g)
            v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(tree.wide(g)), state.second, g)
            here, ever = 1 - b1**k, 1 - b2 ** (start.steps + k)

            def along(m, v, d, y):
                adaptive = m / here.astype(m.dtype) / (jnp.sqrt(v / ever.astype(v.dtype)) + eps)
                return (adaptive + alpha * tree.wide(d) + decay * tree.wide(y)).astype(y.dtype)

            return jax.tree.map(along, m, v, everywhere(start.direction, params), params), _Moments(k, m, v)

        return optax.GradientTransformationExtraArgs(init, update)

    def round(now: Round):
        x, start = now.server.params, now.server.own

        def client_fn(shared, client, key):
            x, start = shared
            worker = dataclasses.replace(client, tx=optax.chain(first_tx, adam(start), client.tx))
            y, opt_state, _, report = worker.local_steps(x, key)
            second = within(start.second, opt_state[1].second)
            if by_leaf:
                second = jax.tree.map(jnp.mean, second)
            return (optax.tree.sub(y, x), second, client.num_steps.astype(jnp.float32)), client.state.own, report

        answer = now.exchange(client_fn, (x, start))
        update, second, steps = answer.update
        came = steps > 0
        own = Travelling(
            direction(start.direction, update, rate, steps),
            optax.tree.where(came, second, start.second),
            start.steps + jnp.where(came, steps, 0),
        )
        return now.step(answer, update, own=own, metrics={"direction_norm": tree.norm(own.direction)})

    def server_own(params):
        second = jax.tree.map(lambda x: jnp.zeros((), x.dtype), wide_zeros(params)) if by_leaf else wide_zeros(params)
        return Travelling(zeros_like(params), second, jnp.zeros((), jnp.float32))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        server_own=server_own,
        beside=[None, None],
    )


def wide_zeros(params: Params) -> PyTree:
    """Moments before the first step, in float32 or better."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, tree.wide_type(x)), params)
