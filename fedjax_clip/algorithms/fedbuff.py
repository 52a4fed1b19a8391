"""FedBuff: buffered asynchronous federated averaging."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.algorithms.parts import checked_link
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.metrics import Mean
from fedjax_clip.core.types import Algorithm, Array, ClientTx, InvalidInput, PerExampleLoss
from fedjax_clip.local.steps import at_round
from fedjax_clip.reduce import Reducer, uniform_mean
from fedjax_clip.uplink.base import Uplink, encoded


def fedbuff(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    max_staleness: int,
    exponent: float | Array = 0.5,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """The server steps at every K-th answer, along ``1/K sum_c (1 + s_c)^-exponent clip(y_c - x_{t - s_c})``.

    A round is one buffer: its cohort are the K clients whose answers fill it. Client c started from ``x_{t - s_c}``,
    the parameters of s_c steps ago, which the server remembers. Its answer goes through the uplink as it arrives, and
    the result is discounted. With a plain sampler no client is stale, and this is FedAvg to the last bit. The clock
    ``fc.data.clock.buffered`` sets the staleness.

    Args:
      per_example_loss, client_tx, server_tx, uplink, gradient: as ``fc.fedavg``. A ``client_tx`` that is a function of
        the round's number gets that of the parameters; clips with a threshold of the server use the present one.
      max_staleness: the most steps that an answer may be late. One that is later is dropped and counted (its place in
        the buffer stays empty); the server's state has ``max_staleness + 1`` times the size of the parameters.
      exponent: of the discount; 0: none.
      reducer: ``fc.reduce.uniform_mean()`` by default, the paper's 1/K.

    Returns:
      An ``Algorithm``. Metrics besides FedAvg's: ``staleness``, the mean over the clients that arrived.

    Raises:
      InvalidInput: a negative exponent, or a staleness that is no whole number.

    Example:
      >>> clip = fc.uplink.clip_by_global_norm(0.5)
      >>> algorithm = fc.fedbuff(per_example_loss, optax.sgd(0.1), max_staleness=10, uplink=clip)
      >>> sampler, speeds = fc.data.sampling.uniform(10), fc.data.speeds.lognormal()
      >>> clock = fc.data.clock.buffered(sampler, speeds, buffer_size=10, concurrency=50)
      >>> result = fc.train(algorithm, data, params, rounds=10, sampler=clock)

    Source: Nguyen et al. (2022), "Federated Learning with Buffered Asynchronous Aggregation", Algorithm 1.
    """
    checks.within("exponent", exponent, 0)
    length = checks.count("max_staleness", max_staleness, 0, 10**5) + 1
    link = checked_link(uplink)
    if mirrors := link.promises.mirrors:
        raise InvalidInput(
            f"FedBuff weighs messages by their staleness, and {mirrors} adds them up as they were sent: "
            f"take fedavg or fedsgd, or {mirrors} out of the uplink."
        )
    if link.promises.grid is not None:
        raise InvalidInput(
            "FedBuff weighs messages by their staleness, and integers on a grid cannot be weighed: take fedavg, or "
            "the grid out of the uplink."
        )

    def round(now: Round):
        def client_fn(ring, client, key):
            sent = now.server.round - client.staleness
            x = jax.tree.map(lambda past: past[sent % length], ring)
            client = dataclasses.replace(client, tx=at_round(client_tx, jnp.maximum(sent, 0)))
            y, _, _, report = client.local_steps(x, key)
            staleness = Mean.of(client.staleness, jnp.ones(()))
            return optax.tree.sub(y, x), client.state.own, report | {"staleness": staleness}

        answer = now.exchange(client_fn, now.server.own)
        past = answer.metrics["asked"] * float(tree.nbytes(now.server.params)) * (length - 1)
        one_of_them = {"bytes_down": answer.metrics["bytes_down"] - past}  # a client is sent no ring
        after, clients, metrics = now.step(answer._replace(metrics=answer.metrics | one_of_them))
        ring = jax.tree.map(lambda past, x: past.at[after.round % length].set(x), now.server.own, after.params)
        return after._replace(own=ring), clients, metrics

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=_discounted(link, exponent, length - 1),
        reducer=uniform_mean() if reducer is None else reducer,
        gradient=gradient,
        server_own=lambda params: jax.tree.map(lambda x: jnp.repeat(x[None], length, axis=0), params),
        broadcasts=False,
    )


def _discounted(link: Uplink, exponent: float | Array, max_staleness: int) -> Uplink:
    """The link's result times ``(1 + staleness)^-exponent``; dropped as too late beyond ``max_staleness``."""

    def encode(update, state, client_state, ctx):
        message, client_state, report = encoded(link, update, state, client_state, ctx)
        weight = (1.0 + jnp.float32(ctx.staleness)) ** -exponent
        value = jax.tree.map(lambda m: _shortened(weight, m), message.value)
        return message._replace(value=value, packed=None, late=ctx.staleness > max_staleness), client_state, report

    return link._replace(encode=encode)


def _shortened(weight: Array, x: Array) -> Array:
    """``weight x``; integers are truncated toward zero, so that no message gets longer."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.where(weight < 1, tree.scaled(weight, x), x)
    return weight.astype(x.dtype) * x
