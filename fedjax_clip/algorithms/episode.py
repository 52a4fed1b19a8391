"""EPISODE and EPISODE++: episodic clipping, decided for a whole round, with corrected local gradients."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip import clipping
from fedjax_clip.algorithms.base import init_server, on_update, parts, step_server, told, zeros_like
from fedjax_clip.algorithms.exchange import exchange, population_share, traffic
from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Algorithm, Array, ClientState, ClientTx, PerExampleLoss, PyTree
from fedjax_clip.local.steps import at_round, full_gradient, local_steps
from fedjax_clip.reduce import Reducer, together
from fedjax_clip.uplink.base import Uplink, identity


class Stored(NamedTuple):
    """A gradient that a client keeps, and whether it has one."""

    gradient: PyTree
    known: Array


def episode(
    per_example_loss: PerExampleLoss,
    threshold: float | Array,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    fresh_batches: int | None = None,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
) -> Algorithm:
    """One decision a round: if the mean gradient G is over the threshold, EVERY local step is normalised to it.

    Round: clients send a gradient G_i at x, the server returns their mean G. Local steps go along
    ``d = g(y) - G_i + G`` if ``||G|| <= threshold``, else along ``threshold * d / ||d||``. So clients that disagree do
    not clip one another's differences away, as they do in clipped FedAvg.

    Args:
      per_example_loss, server_tx, uplink, reducer: as ``fc.fedavg``; G takes the reducer's mean, as the update does.
      threshold: ``gamma / eta`` of the paper, on the norm of a gradient.
      client_tx: optimiser of the corrected and clipped direction, ``optax.sgd(eta)`` in the paper.
      fresh_batches: G_i is the gradient on so many of the client's first batches, and its local steps take the others
        (a client with no more than those sends its G_i and nothing else); ``None``: on all of its batches, which its
        local steps take too.

    Returns:
      An ``Algorithm`` without state across rounds; two exchanges and one gradient more a round. Metrics besides
      FedAvg's: ``clipped_round`` and ``mean_gradient_norm``.

    Raises:
      InvalidInput: an argument of the wrong kind or out of its range.

    Example:
      >>> algorithm = fc.episode(per_example_loss, 1.0, optax.sgd(0.1), fresh_batches=1)

    Source: Crawshaw, Bao and Liu (2023), "EPISODE", Algorithm 1.
    """
    checks.positive("episode: threshold", threshold)
    if fresh_batches is not None:
        checks.count("fresh_batches", fresh_batches)
    built = parts(client_tx, server_tx, uplink, reducer)

    def init(params):
        return init_server(params, built)

    def init_client(params):
        return ClientState((), built.uplink.init_client(params))

    def round(server, cohort, key):
        tx = at_round(client_tx, server.round)
        first_key, second_key = jax.random.split(jax.random.fold_in(key, server.round))

        def gradient_at_x(x, client, key):
            chosen = client if fresh_batches is None else client.only(fresh_batches)
            g, _ = full_gradient(per_example_loss, x, chosen, key)
            return g, g, {}

        def work(shared, client, key):
            x, mean = shared
            client = client if fresh_batches is None else client.after(fresh_batches)
            adjust = _episodic(client.state.own, mean, threshold)
            y, _, _, report = local_steps(per_example_loss, tx, x, client, key, adjust=adjust)
            return optax.tree.sub(y, x), client.state.own, report

        # Whose G_i is dropped keeps the NaN, and so is dropped from the local steps, too.
        nothing = jax.tree.map(lambda x: jnp.full((len(cohort.ids), *x.shape), jnp.nan, x.dtype), server.params)
        asked = dataclasses.replace(cohort, state=ClientState(nothing, ()))
        mean, _, gradients, first = exchange(
            gradient_at_x, identity(), built.reducer, server.params, (), asked, first_key
        )
        told = dataclasses.replace(cohort, state=ClientState(gradients.own, cohort.state.uplink))
        update, state, client_states, metrics = exchange(
            work, built.uplink, built.reducer, (server.params, mean), server.uplink, told, second_key
        )
        metrics |= _decision(mean, threshold) | traffic(first, metrics)
        return step_server(server, built, update, state), client_states._replace(own=()), metrics

    return Algorithm(init, init_client, round, population=built.population, parts=built, loss=per_example_loss)


def episode_plus(
    per_example_loss: PerExampleLoss,
    threshold: float | Array,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    num_clients: int | None = None,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
) -> Algorithm:
    """EPISODE++: EPISODE with gradients G_i that clients stored when they last took part, so clients may be sampled.

    The decision is on ``||G||``, ``G = 1/N sum of the G_i of ALL clients``. Before round 1 every client sends
    ``G_i``, the gradient at the initial parameters on the batches that its first round would take (``Algorithm.start``,
    which ``fc.train`` and ``fc.sweep`` run; the first row counts its bytes and steps). After its local steps a client
    stores the mean of its RAW gradients of the round, and ``G <- G + sum of the changes / N``.

    A client that was not asked before round 1, since it joins later or its gradient was not finite, has no G_i. G then
    stands for it: its first round is not corrected (``d = g``), and the G_i that it stores moves G by
    ``(G_i - G) / N``, which is right for the mean of all N.

    Args:
      per_example_loss, threshold, client_tx, server_tx, uplink, reducer: as ``episode``. G, too, takes the reducer's
        mean: with ``uniform_mean``, the paper's, it is ``1/N sum G_i``.
      num_clients: N, the whole population; read from the data unless it is given, and checked if it is.

    Returns:
      An ``Algorithm`` with a ``start``, whose clients keep ``G_i`` and whose server keeps ``G``; one exchange a round.

    Raises:
      InvalidInput: an argument of the wrong kind or out of its range.

    Example:
      >>> algorithm = fc.episode_plus(per_example_loss, 1.0, optax.sgd(0.1))

    Source: Crawshaw, Bao and Liu (2023), "Federated Learning with Client Subsampling, Data Heterogeneity, and Unbounded
    Smoothness", Algorithm 1 (EPISODE++).
    """
    checks.positive("episode_plus: threshold", threshold)
    built = parts(client_tx, server_tx, on_update(uplink), reducer)
    reduce = together(built.reducer, built.reducer)

    def init(params):
        return init_server(params, built, own=zeros_like)

    def init_client(params):
        return ClientState(Stored(zeros_like(params), jnp.zeros((), bool)), built.uplink.init_client(params))

    def moved(mean, change, cohort, metrics):
        share = population_share(built.reducer, cohort, metrics)
        return tree.add_scaled(mean, share, change)

    def start(server, cohort, key):
        def gradient_at_x(x, client, key):
            g, _ = full_gradient(per_example_loss, x, client, key)
            return g, Stored(g, jnp.ones((), bool)), {"steps": client.num_steps.astype(jnp.float32)}

        key = jax.random.fold_in(jax.random.fold_in(key, server.round), 2**31 - 2)  # no round has this number
        asked = dataclasses.replace(cohort, state=ClientState(cohort.state.own, ()))
        mean, _, states, metrics = exchange(gradient_at_x, identity(), built.reducer, server.params, (), asked, key)
        states = ClientState(states.own, cohort.state.uplink)
        return server._replace(own=moved(server.own, mean, cohort, metrics)), states, metrics

    def round(server, cohort, key):
        tx, key = at_round(client_tx, server.round), jax.random.fold_in(key, server.round)

        def client_fn(shared, client, key):
            x, mean = shared
            own = tree.where(client.state.own.known, client.state.own.gradient, mean)
            adjust = _episodic(own, mean, threshold)
            y, _, raw, report = local_steps(per_example_loss, tx, x, client, key, adjust=adjust, collect=True)
            return (optax.tree.sub(y, x), optax.tree.sub(raw, own)), Stored(raw, jnp.ones((), bool)), report

        (update, change), state, client_states, metrics = exchange(
            client_fn, built.uplink, reduce, (server.params, server.own), server.uplink, cohort, key
        )
        metrics |= _decision(server.own, threshold) | {"update_norm": tree.norm(update)}
        mean = moved(server.own, change, cohort, metrics)
        return step_server(server, built, update, state, mean), client_states, metrics

    return Algorithm(
        init,
        init_client,
        round,
        population=built.population,
        parts=built,
        num_clients=told(num_clients),
        start=start,
        loss=per_example_loss,
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


def _decision(mean: PyTree, threshold: float | Array) -> dict:
    norm = tree.norm(mean)
    return {"clipped_round": (~(norm <= threshold)).astype(jnp.float32), "mean_gradient_norm": norm}
