"""FedMuon: orthogonalised momentum at the clients, which travels."""

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

QUINTIC = (3.4445, -4.7750, 2.0315)


class Matrices(NamedTuple):
    """What the server keeps of FedMuon, and sends beside the parameters.

    Attributes:
      direction: D, like the parameters.
      momentum: M, like the parameters.

    Example:
      >>> server = fc.drift.fedmuon(per_example_loss, optax.sgd(0.01), rate=0.01).init(params)
      >>> server.own.momentum["w"].shape
      (64, 10)
    """

    direction: PyTree
    momentum: PyTree


def fedmuon(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    rate: float | Array,
    alpha: float | Array = 0.5,
    beta: float | Array = 0.95,
    iterations: int = 5,
    gradient_tx: optax.GradientTransformation | None = None,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local steps along ``(1 - alpha) O(m) + alpha D``, with ``m <- beta m + g`` from the clients' mean momentum M.

    O makes the singular values of a matrix about one, by Newton and Schulz. Leaves of two axes or more are matrices,
    with the last axis for columns; it leaves vectors as they are, so biases take momentum SGD. M is the mean of the
    clients' last m, and D that of their directions: ``D <- -u / (rate K)`` of a mean update u and a mean number of
    steps K. Without matrices, ``alpha = beta = 0`` is FedAvg.

    A clip in ``client_tx`` sees the whole direction, whose norm O has set; one in ``gradient_tx`` sees the
    raw gradient.

    Args:
      per_example_loss, server_tx, uplink, reducer, gradient: as ``fc.fedavg``.
      client_tx: what follows Muon: ``optax.sgd(rate)``, with a clip in front of it if you like.
      rate: learning rate of the local steps, which makes a direction of an update; positive, may be traced.
      alpha: weight of D, in [0, 1].
      beta: decay of the momentum, in [0, 1).
      iterations: of Newton and Schulz, at least 1.
      gradient_tx: optax transform of the gradient before the momentum; none by default.

    Returns:
      An ``Algorithm`` whose server keeps ``Matrices(direction, momentum)``; messages are twice as long as FedAvg's.
      Metrics besides FedAvg's: ``direction_norm``.

    Raises:
      InvalidInput: an argument of the wrong kind; noise, which would not cover m.

    Example:
      >>> algorithm = fc.drift.fedmuon(per_example_loss, optax.sgd(0.01), rate=0.01)

    Source: Liu, Shang et al. (2025), "FedMuon: Accelerating Federated Learning with Matrix Orthogonalization"; Jordan
    et al. (2024), "Muon: An optimizer for hidden layers in neural networks", for O.
    """
    checks.positive("fedmuon's rate", rate, finite=True)
    checks.within("fedmuon's alpha", alpha, 0, 1)
    checks.fraction("fedmuon's beta", beta, zero=True)
    checks.count("fedmuon's iterations", iterations)
    if gradient_tx is not None:
        checks.kind("fedmuon's gradient_tx", gradient_tx, optax.GradientTransformation, "an optax transform")
    first_tx = optax.identity() if gradient_tx is None else gradient_tx

    def muon(start: Matrices) -> optax.GradientTransformationExtraArgs:
        def init(params: Params) -> PyTree:
            return everywhere(start.momentum, params)

        def update(g: PyTree, m: PyTree, params: Params, **_: Any) -> tuple[PyTree, PyTree]:
            m = jax.tree.map(lambda m, g: beta * m + g, m, g)

            def along(m, d):
                return (1 - alpha) * (orthogonalised(m, iterations) if m.ndim > 1 else m) + alpha * d

            return jax.tree.map(along, m, everywhere(start.direction, params)), m

        return optax.GradientTransformationExtraArgs(init, update)

    def round(now: Round):
        x, start = now.server.params, now.server.own

        def client_fn(shared, client, key):
            x, start = shared
            worker = dataclasses.replace(client, tx=optax.chain(first_tx, muon(start), client.tx))
            y, opt_state, _, report = worker.local_steps(x, key)
            m = within(start.momentum, opt_state[1])
            return (optax.tree.sub(y, x), m, client.num_steps.astype(jnp.float32)), client.state.own, report

        answer = now.exchange(client_fn, (x, start))
        update, m, steps = answer.update
        m = optax.tree.cast_like(m, start.momentum)
        own = Matrices(direction(start.direction, update, rate, steps), optax.tree.where(steps > 0, m, start.momentum))
        return now.step(answer, update, own=own, metrics={"direction_norm": tree.norm(own.direction)})

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        server_own=lambda params: Matrices(zeros_like(params), zeros_like(params)),
        beside=[None, None],
    )


def orthogonalised(m: Array, iterations: int) -> Array:
    """``U V^T`` of ``m = U S V^T``, about: Newton and Schulz take singular values to between 0.7 and 1.2.

    Args:
      m: of two axes or more, the last for columns.
      iterations: number of iterations of Muon's quintic.
    """
    x = tree.wide(m).reshape(-1, m.shape[-1])
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (tree.norm(x).astype(x.dtype) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(iterations):
        square = jnp.matmul(x, x.T, precision="highest")
        powers = b * square + c * jnp.matmul(square, square, precision="highest")
        x = a * x + jnp.matmul(powers, x, precision="highest")
    return (x.T if tall else x).reshape(m.shape).astype(m.dtype)
