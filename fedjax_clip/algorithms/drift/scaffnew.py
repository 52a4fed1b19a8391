"""Scaffnew: ProxSkip for averaging, whose control variates make local steps pay."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm, zeros_like
from fedjax_clip.core import checks, keys
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, InvalidInput, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink

COIN = 2**31 - 3  # folded into the round's key for the number of steps


def scaffnew(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    p: float | Array,
    rate: float | Array,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local steps along ``g - h_i`` until a coin of probability p says to average: a geometric number of steps.

    After the average ``h_i <- h_i + (p / rate) (u - u_i)``, with ``u_i = y_i - x`` and u the reducer's mean of them.
    So the mean of all ``h_i`` stays zero, and ``h_i`` goes to client i's gradient at the solution. With ``p=1`` it is
    one step of distributed gradient descent a round, whatever h.

    The coin is common to all clients, so the server draws its outcome for the whole round: ``K = min(Geometric(p), the
    client's planned batches)``. Plan at least ``3 / p`` batches, which the coin outlasts in one round of twenty.

    The theory is for full participation and ``fc.reduce.uniform_mean()``. Clients that do not come keep their ``h_i``,
    and the mean stays zero under any sampling, if no link loses anything and all messages count as they are.

    Args:
      per_example_loss, client_tx, server_tx, uplink, gradient: as ``fc.fedavg``. A clip in ``client_tx`` sees
        ``g - h_i``.
      p: probability that a step is a round's last; above 0 and at most 1, may be traced.
      rate: learning rate of the local steps; positive, may be traced.
      reducer: by default the weighted mean, of which ``h_i`` then corrects the weighted objective.

    Returns:
      An ``Algorithm`` whose clients keep ``h_i``. The server sends x and K, and the mean after the round. Metrics
      besides FedAvg's: ``coin``, the outcome of Geometric(p).

    Raises:
      InvalidInput: an argument of the wrong kind; (when a round is traced) a deployed round, which is one trip to the
        clients and back.

    Example:
      >>> algorithm = fc.drift.scaffnew(per_example_loss, optax.sgd(0.1), p=0.2, rate=0.1)

    Source: Mishchenko, Malinovsky, Stich and Richtarik (2022), "ProxSkip: Yes! Local Gradient Steps Provably Lead to
    Communication Acceleration! Finally!", Algorithm 2.
    """
    checks.within("scaffnew's p", p, 0, 1)
    checks.positive("scaffnew's p", p)
    checks.positive("scaffnew's rate", rate, finite=True)

    def round(now: Round):
        if now.cohort.side is not None:
            raise InvalidInput(
                "scaffnew's clients hear the mean at the end of a round, and a deployed round is one trip to the "
                "clients and back: take fedavg, fedsgd or scaffold."
            )

        def client_fn(shared, client, key):
            x, coin = shared
            h, _ = client.state.own
            short = dataclasses.replace(client, num_steps=jnp.minimum(client.num_steps, coin))
            y, _, _, report = short.local_steps(x, key, adjust=lambda g, y, step: optax.tree.sub(g, h))
            update = optax.tree.sub(y, x)
            return update, (h, update), report

        key = jax.random.fold_in(keys.threefry(now.key), COIN)
        coin = _geometric(key, p)
        # NaN in the place of u_i marks the clients that did not answer.
        state = now.cohort.state
        h, nothing = state.own
        unheard = jax.tree.map(lambda u: jnp.full_like(u, jnp.nan), nothing)
        asking = dataclasses.replace(
            now, cohort=dataclasses.replace(now.cohort, state=state._replace(own=(h, unheard)))
        )
        answer = asking.exchange(client_fn, (now.server.params, coin))

        def corrected(h, mine, mean):
            short_of_mean = mean[None].astype(mine.dtype) - mine
            return jnp.where(jnp.isfinite(mine), (h + (p / rate) * short_of_mean).astype(h.dtype), h)

        h, mine = answer.clients.own
        h = jax.tree.map(corrected, h, mine, answer.update)
        answer = answer._replace(clients=answer.clients._replace(own=(h, optax.tree.zeros_like(mine))))
        return now.step(answer, metrics={"coin": coin.astype(jnp.float32)})

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        client_own=lambda params: (zeros_like(params), zeros_like(params)),
    )


def _geometric(key: Array, p: float | Array) -> Array:
    """The number of tosses until the first of probability p, int32; as ``jax.random.geometric``, in float32 always."""
    u = jax.random.uniform(key, (), jnp.float32)
    tosses = 1 + jnp.floor(jnp.log1p(-u) / jnp.log1p(-jnp.asarray(p, jnp.float32)))
    return jnp.minimum(tosses, 2**30).astype(jnp.int32)
