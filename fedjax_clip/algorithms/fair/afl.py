"""AFL: the model for the mixture of clients that suits it least."""

from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, InvalidInput, PerExampleLoss, PyTree, Server
from fedjax_clip.reduce import Reducer, together, uniform_mean
from fedjax_clip.uplink.base import Uplink


def afl(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    clients: int,
    rate: float | Array,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Agnostic federated learning, ``min_x max_l sum_i l_i F_i(x)`` over mixtures l of the N clients.

    With ``u_i = y_i - x`` of FedAvg's local steps and ``F_i`` the mean loss at x over the client's data:
    ``x <- x + sum_S l_i u_i / sum_S l_i`` and ``l <- P(l + rate F)``, with F zero outside the cohort S, and P the
    nearest point of the simplex. l begins uniform. With a rate of 0 it is FedAvg with equal weights. A client sends its
    loss in its own place among N, so that their mean keeps them apart; no reducer protects l from clients that lie.

    Args:
      per_example_loss, client_tx, server_tx, uplink, gradient: as ``fc.fedavg``. No ``private_gradient`` and no noise:
        a client sends what depends on its loss.
      clients: N, the number of clients in the population, at least 1.
      rate: of the ascent in l, at least 0; may be traced. ``1 / (N F)`` moves a weight by about its own size.
      reducer: of ``l_i u_i`` and of ``l_i``; ``fc.reduce.uniform_mean()`` by default. Losses take the uniform mean.

    Returns:
      An ``Algorithm`` whose server keeps l, ``[N]``. A round passes a client's data once more than FedAvg, without
      gradients. Metrics besides FedAvg's: ``largest_weight``, of l.

    Raises:
      InvalidInput: an argument of the wrong kind, a negative rate; (when a run begins) fewer clients than N, or a run
        that goes on with other clients. A client beyond the N is dropped in each round.

    Example:
      >>> algorithm = fc.fair.afl(per_example_loss, client_tx, clients=59, rate=0.01)

    Source: Mohri, Sivek and Suresh (2019), "Agnostic Federated Learning", Algorithm Stochastic-AFL, with local steps
    for its gradient.
    """
    checks.count("afl's clients", clients)
    checks.within("afl's rate", rate, 0, finite=True)

    def round(now: Round):
        def client_fn(shared, client, key):
            x, weights = shared
            loss = client.mean_loss(x, key)
            y, _, _, report = client.local_steps(x, key)
            weight = jnp.where(client.id < clients, weights[client.id] * clients, jnp.nan)
            update = jax.tree.map(lambda y, x: tree.scaled(weight, y - x), y, x)
            place = (jnp.arange(clients, dtype=jnp.int32) == client.id).astype(loss.dtype)
            return (update, weight, (place * loss, place)), client.state.own, report

        weights = now.server.own
        reducer = together(now.parts.reducer, now.parts.reducer, uniform_mean())
        answer = now.exchange(client_fn, (now.server.params, weights), reducer=reducer)
        update, weight, (losses, came) = answer.update
        after = projected(weights + rate * tree.divided(losses, tree.or_one(came)))
        scale = tree.or_one(weight)
        update = jax.tree.map(lambda u: tree.divided(u, scale), update)
        return now.step(answer, update, own=after, metrics={"largest_weight": jnp.max(after)})

    made = algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=uniform_mean() if reducer is None else reducer,
        gradient=gradient,
        server_own=lambda params: jnp.full(clients, 1 / clients, jnp.float32),
        beside=[None, None],
        reuses=True,
    )
    return made._replace(population=max(made.population, clients), regroup=_regroup)


def projected(values: Array) -> Array:
    """The nearest point of the simplex.

    Args:
      values: ``[N]``.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra (2008), "Efficient Projections onto the l1-Ball for Learning
    in High Dimensions", the projection onto the simplex.
    """
    falling = -jnp.sort(-values)
    places = jnp.arange(1, len(values) + 1, dtype=values.dtype)
    shifts = (jnp.cumsum(falling) - 1) / places
    positive = tree.count(falling > shifts)
    return jnp.maximum(values - shifts[positive - 1], 0)


def _regroup(server: Server, average: Callable[..., PyTree]) -> NoReturn:
    raise InvalidInput(
        "afl keeps a weight of each client by its number, and the clients have changed: begin a new run with its "
        "parameters (--init_params)."
    )
