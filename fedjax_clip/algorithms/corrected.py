"""FedNova, FedDyn and Mime: corrections of what local steps do to the average, and what a clip does to them."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import init_server, on_update, parts, step_server, told, zeros_like
from fedjax_clip.algorithms.exchange import exchange, population_share, traffic
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientState, ClientTx, PerExampleLoss
from fedjax_clip.local.steps import at_round, full_gradient, local_steps
from fedjax_clip.reduce import Reducer, together, uniform_mean
from fedjax_clip.uplink.base import Uplink, identity


def fednova(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
) -> Algorithm:
    """Averages steps, not sums of steps: ``x + tau_eff * mean (y_i - x) / tau_i``, with ``tau_eff = mean tau_i``.

    A client that takes more local steps no longer weighs more. For SGD without momentum at the clients; a clip in
    ``client_tx`` bounds each step and so ``||y_i - x|| / tau_i`` by ``client_lr * threshold``, whatever tau_i.
    The uplink sees the normalised update.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer: as ``fc.fedavg``.

    Returns:
      An ``Algorithm`` without state across rounds.

    Raises:
      InvalidInput: an argument of the wrong kind or out of its range.

    Example:
      >>> algorithm = fc.fednova(per_example_loss, optax.sgd(0.1))

    Source: Wang et al. (2020), "Tackling the Objective Inconsistency Problem", equation 8 with a_i = 1.
    """
    built = parts(client_tx, server_tx, on_update(uplink), reducer)
    reduce = together(built.reducer, built.reducer)

    def init(params):
        return init_server(params, built)

    def init_client(params):
        return ClientState((), built.uplink.init_client(params))

    def round(server, cohort, key):
        tx, key = at_round(client_tx, server.round), jax.random.fold_in(key, server.round)

        def client_fn(x, client, key):
            y, _, _, report = local_steps(per_example_loss, tx, x, client, key)
            steps = jnp.maximum(client.num_steps, 1).astype(jnp.float32)
            return (
                (jax.tree.map(lambda y, x: tree.divided(y - x, steps), y, x), steps),
                client.state.own,
                report,
            )

        (mean, steps), state, client_states, metrics = exchange(
            client_fn, built.uplink, reduce, server.params, server.uplink, cohort, key
        )
        update = jax.tree.map(lambda d: tree.scaled(steps, d), mean)
        return step_server(server, built, update, state), client_states, metrics | {"update_norm": tree.norm(update)}

    return Algorithm(init, init_client, round, population=built.population, parts=built, loss=per_example_loss)


def feddyn(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    alpha: float | Array,
    num_clients: int | None = None,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
) -> Algorithm:
    """Local steps along ``g - h_i + alpha (y - x)``, so that clients' optima agree with the server's.

    After the steps ``h_i <- h_i - alpha (y_i - x)``; ``h <- h - alpha / N sum_i (y_i - x)``; ``x <- mean y_i - h /
    alpha``. So h is the mean of the h_i of all N clients, and both means are the reducer's: uniform by default. A clip
    in ``client_tx`` sees the corrected direction: h_i then follows the clipped path, and is no gradient at y_i any
    more, so the fixed point moves while clips fire.

    Args:
      per_example_loss, client_tx, server_tx, uplink: as ``fc.fedavg``. h follows what the server receives.
      reducer: ``fc.reduce.uniform_mean()`` by default, as the derivation asks.
      alpha: strength of the regulariser, positive.
      num_clients: N, the whole population; read from the data unless it is given, and checked if it is.

    Returns:
      An ``Algorithm`` whose clients keep ``h_i`` and whose server keeps ``h``.

    Raises:
      InvalidInput: an argument of the wrong kind or out of its range.

    Example:
      >>> algorithm = fc.feddyn(per_example_loss, optax.sgd(0.1), alpha=0.1)

    Source: Acar et al. (2021), "Federated Learning Based on Dynamic Regularization", Algorithm 1.
    """
    checks.positive("feddyn's alpha", alpha)
    built = parts(client_tx, server_tx, uplink, uniform_mean() if reducer is None else reducer, only_update=True)

    def init(params):
        return init_server(params, built, own=zeros_like)

    def init_client(params):
        return ClientState(zeros_like(params), built.uplink.init_client(params))

    def round(server, cohort, key):
        tx, key = at_round(client_tx, server.round), jax.random.fold_in(key, server.round)

        def client_fn(x, client, key):
            h_i = client.state.own

            def regularised(g, y, step):
                return jax.tree.map(lambda g, h, y, x: g - h + alpha * (y - x), g, h_i, y, x)

            y, _, _, report = local_steps(per_example_loss, tx, x, client, key, adjust=regularised)
            update = optax.tree.sub(y, x)
            return update, jax.tree.map(lambda h, u: h - alpha * u, h_i, update), report

        mean, state, client_states, metrics = exchange(
            client_fn, built.uplink, built.reducer, server.params, server.uplink, cohort, key
        )
        share = population_share(built.reducer, cohort, metrics)
        h = tree.add_scaled(server.own, -alpha * share, mean)
        # Under a fixed denominator a round of nobody looks like any other, or noise could not hide it.
        came = True if built.reducer.denominator is not None else metrics["clients"] > 0

        def corrected(m, h):
            dtype = tree.common_type(m, h)
            return jnp.where(came, m.astype(dtype) - (h / alpha).astype(dtype), 0)

        update = jax.tree.map(corrected, mean, h)
        return step_server(server, built, update, state, h), client_states, metrics | {"update_norm": tree.norm(update)}

    return Algorithm(
        init,
        init_client,
        round,
        population=built.population,
        parts=built,
        num_clients=told(num_clients),
        loss=per_example_loss,
    )


def mime(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    beta: float | Array = 0.9,
    lite: bool = False,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
) -> Algorithm:
    """Local steps with the SERVER's momentum, fixed in the round: ``(1 - beta) d + beta m``.

    d is the gradient at y, corrected to ``g(y) - g(x) + G`` unless ``lite``, with G the mean of full gradients at x
    and g(x) on the same batch. G takes the reducer's mean, as the update does: ``uniform_mean`` is the paper's. After
    the round ``m <- (1 - beta) G + beta m``: of RAW gradients, whatever is clipped.
    A clip in ``client_tx`` sees the whole direction, momentum included.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer: as ``fc.fedavg``; ``client_tx`` without momentum.
      beta: momentum.
      lite: MimeLite: no correction, and one exchange a round in place of two.

    Returns:
      An ``Algorithm`` whose server keeps ``m``; two exchanges a round, or one if ``lite``.

    Raises:
      InvalidInput: an argument of the wrong kind or out of its range.

    Example:
      >>> algorithm = fc.mime(per_example_loss, optax.sgd(0.1), beta=0.9)

    Source: Karimireddy et al. (2021), "Breaking the centralized barrier for cross-device federated learning",
    Algorithms 1 and 3, with SGD and momentum for the base optimiser.
    """
    checks.within("beta", beta, 0, 1)
    built = parts(client_tx, server_tx, on_update(uplink), reducer)

    def init(params):
        return init_server(params, built, own=zeros_like)

    def init_client(params):
        return ClientState((), built.uplink.init_client(params))

    def round(server, cohort, key):
        tx = at_round(client_tx, server.round)
        gradient_key, work_key = jax.random.split(jax.random.fold_in(key, server.round))

        def gradient_at_x(x, client, key):
            return full_gradient(per_example_loss, x, client, key)[0], client.state.own, {}

        def client_fn(shared, client, key):
            x, m, mean = shared

            def with_momentum(g, y, step):
                if not lite:
                    batch, weights = client.batch(step)
                    at_x, _ = batch_gradient(per_example_loss, x, batch, weights, jax.random.fold_in(key, step))
                    g = jax.tree.map(lambda g, a, c: g - a + c, g, at_x, mean)
                return jax.tree.map(lambda g, m: (1 - beta) * g + beta * m, g, m)

            y, _, _, report = local_steps(per_example_loss, tx, x, client, key, adjust=with_momentum)
            at_x = gradient_at_x(x, client, key)[0] if lite else ()
            return (optax.tree.sub(y, x), at_x), client.state.own, report

        mean, first = (), {"bytes_down": 0.0, "bytes_up": 0.0}
        if not lite:
            asked = dataclasses.replace(cohort, state=ClientState((), ()))  # the link's state is for the other message
            mean, _, _, first = exchange(
                gradient_at_x, identity(), built.reducer, server.params, (), asked, gradient_key
            )
        shared = server.params, server.own, mean
        (update, at_x), state, client_states, metrics = exchange(
            client_fn, built.uplink, together(built.reducer, built.reducer), shared, server.uplink, cohort, work_key
        )
        came = metrics["clients"] > 0
        m = jax.tree.map(lambda m, g: jnp.where(came, (1 - beta) * g + beta * m, m), server.own, at_x if lite else mean)
        m = optax.tree.cast_like(m, server.own)
        metrics |= {"update_norm": tree.norm(update)} | traffic(first, metrics)
        return step_server(server, built, update, state, m), client_states, metrics

    return Algorithm(init, init_client, round, population=built.population, parts=built, loss=per_example_loss)
