"""EPISODE and EPISODE++: episodic clipping, decided for a whole round, with corrected local gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip import clipping
from fedjax_clip.algorithms.base import Round, algorithm, zeros_like
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, Metrics, PerExampleLoss, PyTree
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


class Stored(NamedTuple):
    """A client's stored gradient, and whether it has one."""

    gradient: PyTree
    known: Array


def episode(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    threshold: float | Array,
    fresh_batches: int | None = None,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """One decision a round: if the mean gradient G is over the threshold, EVERY local step is normalised to it.

    Clients send a gradient G_i at x, and the server returns their mean G. Local steps go along ``d = g(y) - G_i + G``
    if ``||G|| <= threshold``, else along ``threshold * d / ||d||``. In clipped FedAvg, clients that disagree clip each
    other's differences away; here they do not.

    Args:
      per_example_loss, server_tx, uplink, reducer: as ``fc.fedavg``; G takes the reducer's mean, as the update does.
      client_tx: optimiser of the corrected and clipped direction, ``optax.sgd(eta)`` in the paper.
      threshold: ``gamma / eta`` of the paper, on the norm of a gradient; positive.
      fresh_batches: number of the client's first batches for G_i; its local steps take the other batches. A client
        without other batches sends only its G_i. ``None`` takes all batches for both.
      gradient: as ``fc.fedavg``, of G_i, too. No ``private_gradient``: a round would use a record twice.

    Returns:
      An ``Algorithm`` without state across rounds; two exchanges and one gradient more a round. Metrics besides
      FedAvg's: ``clipped_round`` and ``mean_gradient_norm``.

    Raises:
      InvalidInput: an argument of the wrong kind or out of its range; noise, which would not cover G_i.

    Example:
      >>> algorithm = fc.episode(per_example_loss, optax.sgd(0.1), threshold=1.0, fresh_batches=1)

    Source: Crawshaw, Bao and Liu (2023), "EPISODE", Algorithm 1.
    """
    checks.positive("episode: threshold", threshold)
    if fresh_batches is not None:
        checks.count("fresh_batches", fresh_batches)

    def round(now: Round):
        def gradient_at_x(x, client, key):
            chosen = client if fresh_batches is None else client.only(fresh_batches)
            g, _ = chosen.full_gradient(x, key)
            return g, g, {}

        def work(shared, client, key):
            x, mean = shared
            rest = client if fresh_batches is None else client.after(fresh_batches)
            adjust = _episodic(client.state.own, mean, threshold)
            y, _, _, report = rest.local_steps(x, key, adjust=adjust)
            return optax.tree.sub(y, x), client.state.own, report

        x = now.server.params
        asked = now.ask(gradient_at_x, x, remember=x)  # its G_i, until the end of the round
        answer = now.exchange(work, (x, asked.update), after=asked)
        return now.step(answer, metrics=_decision(asked.update, threshold))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        asks=True,
    )


def episode_plus(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    threshold: float | Array,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """EPISODE++: EPISODE with gradients G_i that clients stored when they last took part, so clients may be sampled.

    The decision is on ``||G||``, ``G = 1/N sum of the G_i of ALL clients``. Before round 1 every client sends
    ``G_i``, the gradient at the initial parameters on the batches that its first round would take (``Algorithm.start``,
    which ``fc.train`` and ``fc.sweep`` run; the first row counts its bytes and steps). After its local steps a client
    stores the mean of its RAW gradients of the round, and ``G <- G + sum of the changes / N``.

    A client may have no G_i, because it joins later or its first gradient was not finite. G then replaces it: its first
    round is not corrected (``d = g``), and the G_i that it stores moves G by ``(G_i - G) / N``, which is right for the
    mean of all N.

    Args:
      per_example_loss, client_tx, server_tx, threshold, uplink, gradient: as ``episode``.
      reducer: as ``fc.fedavg``. G takes its mean, too: with ``uniform_mean``, the paper's, it is ``1/N sum G_i``.

    Returns:
      An ``Algorithm`` with a ``start``, whose clients keep ``G_i`` and whose server keeps ``G``; one exchange a round.
      Metrics: as ``episode``.

    Raises:
      InvalidInput: an argument of the wrong kind or out of its range; noise, which would not cover G_i.

    Example:
      >>> algorithm = fc.episode_plus(per_example_loss, optax.sgd(0.1), threshold=1.0)

    Source: Crawshaw, Bao and Liu (2023), "Federated Learning with Client Subsampling, Data Heterogeneity, and Unbounded
    Smoothness", Algorithm 1 (EPISODE++).
    """
    checks.positive("episode_plus: threshold", threshold)

    def start(now: Round):
        def gradient_at_x(x, client, key):
            g, _ = client.full_gradient(x, key)
            return g, Stored(g, jnp.ones((), bool)), {"steps": client.num_steps.astype(jnp.float32)}

        asked = now.ask(gradient_at_x, now.server.params)
        mean = tree.add_scaled(now.server.own, now.share(asked), asked.update)
        return now.server._replace(own=mean), asked.clients, asked.metrics

    def round(now: Round):
        def client_fn(shared, client, key):
            x, mean = shared
            own = optax.tree.where(client.state.own.known, client.state.own.gradient, mean)
            adjust = _episodic(own, mean, threshold)
            y, _, raw, report = client.local_steps(x, key, adjust=adjust, collect=True)
            return (optax.tree.sub(y, x), optax.tree.sub(raw, own)), Stored(raw, jnp.ones((), bool)), report

        answer = now.exchange(client_fn, (now.server.params, now.server.own))
        update, change = answer.update
        mean = tree.add_scaled(now.server.own, now.share(answer), change)
        return now.step(answer, update, own=mean, metrics=_decision(now.server.own, threshold))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        server_own=zeros_like,
        client_own=lambda params: Stored(zeros_like(params), jnp.zeros((), bool)),
        mean_of=lambda own: (own.gradient, own.known),
        beside=[None],
        start=start,
    )


def _episodic(own: PyTree, mean: PyTree, threshold: float | Array):
    """``d = g - G_i + G``, normalised to the threshold in every step of a round that is clipped."""
    clipped = ~(tree.norm(mean) <= threshold)

    def adjust(g, y, step):
        d = jax.tree.map(lambda g, g_i, m: g - g_i + m, g, own, mean)
        norm = tree.norm(d)
        factor = jnp.where(clipped, clipping.normalise()(norm, jnp.asarray(threshold, norm.dtype)), 1.0)
        return jax.tree.map(lambda d: tree.scaled(factor, d), d)

    return adjust


def _decision(mean: PyTree, threshold: float | Array) -> Metrics:
    norm = tree.norm(mean)
    return {"clipped_round": (~(norm <= threshold)).astype(jnp.float32), "mean_gradient_norm": norm}
