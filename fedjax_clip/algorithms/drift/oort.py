"""Oort: clients train whose losses were large, that are fast, or that have not been tried."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.algorithms.base import Round, kind
from fedjax_clip.algorithms.drift.selection import ASKING, check_sees_losses, in_front, largest, only, sent_once
from fedjax_clip.core import checks, keys, tree
from fedjax_clip.core.types import Algorithm, Array, InvalidInput, PyTree, Server

PERCENTILE, BONUS = 0.95, 0.1  # of Algorithm 1: where utilities are clipped, and of what is long ago


class Tried(NamedTuple):
    """What the server knows of each client.

    Attributes:
      utility: float32 ``[N]``, ``|B_i| sqrt(mean_k F_ik^2)`` when client i last trained; ``|B_i|`` is its weight, with
        1 for the mean of all clients.
      last: int32 ``[N]``, the number of that round, from 1; 0 if it never has.

    Example:
      >>> algorithm = fc.drift.oort(fc.fedavg(per_example_loss, client_tx), clients=4, population=data.num_clients)
      >>> server = algorithm.init(params)
      >>> server.own[0].last.shape == (data.num_clients,)
      True
    """

    utility: Array
    last: Array


def oort(
    algorithm: Algorithm,
    clients: int,
    population: int,
    *,
    seconds: Sequence[float] | None = None,
    preferred: float = np.inf,
    penalty: float = 2.0,
    first: float = 0.9,
    decay: float = 0.98,
    least: float = 0.2,
    confidence: float = 0.95,
) -> Algorithm:
    """Any algorithm, in whose rounds those ``clients`` candidates train that promise most, or that were never tried.

    The cohort of a round are the candidates: take all clients that are there. In round r (from 0) a share
    ``max(first decay^r, least)`` of the places goes to candidates that have never trained, drawn with probabilities
    ``1 / t_i``. The others go to tried ones, drawn in proportion to their utility among those with at least
    ``confidence`` times the utility of the last place:

    ``util_i = (U_i + sqrt(0.1 log(r + 1) / last_i)) (T / t_i)^penalty [T < t_i]``, where
    ``U_i = |B_i| sqrt(mean_k F_ik^2)`` is of the losses of client i's examples when it last trained, clipped to the
    95th percentile and moved into [0, 1], and ``last_i`` the number of that round. Where there are too few
    candidates of one kind, the other takes the places.

    A chosen client takes the losses at x before it trains: a pass without gradients, where the paper takes them from
    the local steps. Left out: the pacer, which moves T, and the limit on how often a client is chosen. The choice
    favours large losses, so the average is biased towards them, and a client with wrong labels is chosen more often.

    Args:
      algorithm: any made by ``fc.fedavg`` and its like or by ``fc.extend.algorithm``.
      clients: K, how many train in a round, at least 1.
      population: N, the number of clients in the population.
      seconds: ``[N]``, ``t_i``, how long a round takes each client; all alike by default.
      preferred: T, seconds beyond which a client's utility falls.
      penalty: the exponent with which it falls, at least 0.
      first, decay, least: of the share of clients that were never tried, each in [0, 1].
      confidence: c, in [0, 1].

    Returns:
      An ``Algorithm`` whose server keeps ``fc.drift.Tried`` besides. ``asked`` and the bytes are of the chosen. Metrics
      besides the algorithm's: ``explored``, the clients tried so far.

    Raises:
      InvalidInput: an argument of the wrong kind; noise or a secure sum, which would not cover the losses; an algorithm
        with a round before round 1; (when a run begins) fewer clients than N, or a run that goes on with other clients.

    Example:
      >>> average = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.uniform_mean())
      >>> algorithm = fc.drift.oort(average, clients=5, population=data.num_clients)
      >>> fc.train(algorithm, data, params, rounds=2).history[-1]["explored"]
      9.0

    Source: Lai, Zhu, Madhyastha and Chowdhury (2021), "Oort: Efficient Federated Learning via Guided Participant
    Selection", Algorithm 1 and equation 1; utilities are moved into [0, 1] as in the authors' code.
    """
    checks.count("oort's clients", clients)
    checks.count("oort's population", population)
    check_sees_losses("oort", algorithm)
    checks.within("oort's penalty", penalty, 0, finite=True)
    for name, share in (("first", first), ("decay", decay), ("least", least), ("confidence", confidence)):
        checks.within(f"oort's {name}", share, 0, 1)
    checks.positive("oort's preferred", preferred)
    times = np.ones(population, np.float32) if seconds is None else np.asarray(seconds, np.float32)
    if times.shape != (population,) or not np.all((times > 0) & np.isfinite(times)):
        raise InvalidInput(f"oort's seconds must be {population} positive numbers, one for each client.")

    def answering(x, client, key):
        squares = dataclasses.replace(client, per_example_loss=_squared(client.per_example_loss)).mean_loss(x, key)
        utility = client.weight * tree.safe_sqrt(squares)
        return utility, utility, {}

    def init(params):
        server = algorithm.init(params)
        nobody = Tried(jnp.zeros(population, jnp.float32), jnp.zeros(population, jnp.int32))
        return server._replace(own=(nobody, server.own))

    def round(server: Server, cohort, key):
        tried, own = server.own
        server = server._replace(own=own)
        here = jax.random.fold_in(jax.random.fold_in(keys.threefry(key), server.round), ASKING)
        everyone = cohort.gathered(jnp.asarray(cohort.ids))
        order, chosen = in_front(cohort, everyone, _best(everyone, tried, server.round, here))
        cohort = only(cohort, order, chosen)

        asked = Round(server, cohort, algorithm.parts, here, here).ask(
            answering, server.params, remember=jnp.zeros((), jnp.float32)
        )
        came = cohort.gathered(jnp.where(jnp.isfinite(asked.clients.own), jnp.asarray(cohort.ids), -1))
        place = jnp.where(came >= 0, came, population)  # beyond the last, and dropped
        mean_weight = 1 if cohort.total_weight is None else cohort.total_weight / population
        tried = Tried(
            tried.utility.at[place].set(cohort.gathered(asked.clients.own) / mean_weight, mode="drop"),
            tried.last.at[place].set(server.round.astype(jnp.int32) + 1, mode="drop"),
        )
        after, states, metrics = algorithm.round(server, cohort, key)
        back = jnp.argsort(order)
        states = jax.tree.map(lambda x: x[back], states)
        metrics |= sent_once(server.params, asked.metrics, metrics) | {
            "explored": jnp.sum((tried.last > 0).astype(jnp.float32))
        }
        return after._replace(own=(tried, after.own)), states, metrics

    def _best(ids, tried, number, key):
        """bool: who of these candidates trains."""
        known = jnp.where(ids < population, jnp.maximum(ids, 0), 0)
        old, new = (ids >= 0) & (tried.last[known] > 0), (ids >= 0) & (tried.last[known] == 0)
        share = jnp.maximum(first * decay ** number.astype(jnp.float32), least)
        exploring = jnp.round(share * clients).astype(jnp.int32)
        exploiting = jnp.minimum(jnp.maximum(clients - exploring, clients - tree.count(new)), tree.count(old))
        exploring = clients - exploiting
        t = jnp.asarray(times)[known]
        utility = utilities(tried.utility[known], tried.last[known], old, number + 1, t, preferred, penalty)
        cutoff = confidence * _largest(utility, old, exploiting)
        luck = jax.lax.map(
            lambda id: jax.random.gumbel(jax.random.fold_in(key, id), dtype=jnp.float32), jnp.maximum(ids, 0)
        )
        promise = jnp.log(jnp.maximum(utility, 1e-30)) + luck  # its order is a draw in proportion
        untried = luck - jnp.log(t)
        chosen = largest(promise, ids, old & (utility >= cutoff), exploiting)
        return chosen | largest(untried, ids, new, exploring)

    made = algorithm._replace(init=init, round=round, name=f"oort({kind(algorithm)})", regroup=_regroup)
    return made._replace(population=max(made.population, population))


def utilities(
    utility: Array, last: Array, tried: Array, number: Array, seconds: Array, preferred: float, penalty: float
) -> Array:
    """``[N]`` of Algorithm 1 and equation 1, for the clients that were tried.

    Args:
      utility, last: of ``Tried``.
      tried: bool ``[N]``.
      number: of the round now, from 1.
      seconds, preferred, penalty: of ``oort``.
    """
    count = tree.count(tried)
    rising = jnp.sort(jnp.where(tried, utility, jnp.finfo(utility.dtype).max))
    last_one = jnp.maximum(count - 1, 0)
    place = jnp.minimum(jnp.floor(PERCENTILE * count.astype(jnp.float32)).astype(jnp.int32), last_one)
    moved = jnp.minimum(utility, rising[place]) - rising[0]
    moved = moved / tree.or_one(rising[last_one] - rising[0])
    ago = jnp.sqrt(BONUS * jnp.log(number.astype(jnp.float32)) / jnp.maximum(last, 1).astype(jnp.float32))
    slow = jnp.where(seconds > preferred, (preferred / seconds) ** penalty, 1)
    return jnp.where(tried, (moved + ago) * slow, 0)


def _largest(values: Array, among: Array, count: Array) -> Array:
    """The ``count``-th largest of some values, which are not negative."""
    falling = -jnp.sort(jnp.where(among, -values, 0))
    return falling[jnp.maximum(count - 1, 0)]


def _squared(per_example_loss):
    def squares(params, batch, key):
        out = per_example_loss(params, batch, key)
        return jnp.square(out[0] if isinstance(out, tuple) else out)

    return squares


def _regroup(server: Server, average: Callable[..., PyTree]) -> NoReturn:
    raise InvalidInput(
        "oort keeps a utility of each client by its number, and the clients have changed: begin a new run with its "
        "parameters (--init_params)."
    )
