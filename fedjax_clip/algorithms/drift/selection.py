"""Power-of-Choice: candidates answer with their losses, and those with the largest train."""

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_clip.algorithms.base import Round, kind
from fedjax_clip.algorithms.exchange import traffic
from fedjax_clip.algorithms.wrapping import check_made
from fedjax_clip.core import checks, keys, tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.types import Algorithm, Array, InvalidInput, Metrics, Params

ASKING = 2**31 - 4  # folded into the round's key for what is asked


def power_of_choice(algorithm: Algorithm, clients: int) -> Algorithm:
    """Any algorithm, in whose rounds only the ``clients`` candidates with the largest losses train.

    The cohort of a round are the candidates. Each is sent the parameters x and answers with its mean loss at x over its
    batches of the round. Those with the largest losses, ties going to the smaller number, are the algorithm's cohort.
    The others train nothing, and keep their states. With as many candidates as ``clients`` it is the algorithm itself.

    In the paper candidates come by ``fc.data.sampling.by_size(d)``, and the reducer is ``fc.reduce.uniform_mean()``. Of
    all clients as candidates one has the paper's idealised strategy. The choice favours clients with large losses, so
    the average is biased towards them.

    Args:
      algorithm: any made by ``fc.fedavg`` and its like or by ``fc.extend.algorithm``.
      clients: m, how many train in a round, at least 1.

    Returns:
      An ``Algorithm`` with the same state. ``asked``, ``bytes_down`` and ``bytes_up`` count what is asked, too;
      whoever trains has x already.
      Metrics besides the algorithm's: ``candidates``, those that answered.

    Raises:
      InvalidInput: an argument of the wrong kind; noise or a secure sum, which would not cover the losses; an algorithm
        with a round before round 1; (when a round is traced) a deployed round.

    Example:
      >>> average = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.uniform_mean())
      >>> algorithm = fc.drift.power_of_choice(average, clients=3)
      >>> result = fc.train(algorithm, data, params, rounds=2, sampler=fc.data.sampling.by_size(10))

    Source: Cho, Wang and Joshi (2020), "Client Selection in Federated Learning: Convergence Analysis and
    Power-of-Choice Selection Strategies", the strategy pow-d.
    """
    checks.count("power_of_choice's clients", clients)
    check_sees_losses("power_of_choice", algorithm)

    def answering(x, client, key):
        loss = client.mean_loss(x, key)
        return loss, loss, {}

    def round(server, cohort, key):
        here = jax.random.fold_in(jax.random.fold_in(keys.threefry(key), server.round), ASKING)
        ask = Round(server, cohort, algorithm.parts, here, here).ask
        asked = ask(answering, server.params, remember=jnp.zeros((), jnp.float32))
        everyone, losses = cohort.gathered(jnp.asarray(cohort.ids)), cohort.gathered(asked.clients.own)
        answered = (everyone >= 0) & jnp.isfinite(losses)  # one that did not answer has NaN
        order, chosen = in_front(cohort, everyone, largest(losses, everyone, answered, clients))
        after, states, metrics = algorithm.round(server, only(cohort, order, chosen), key)
        back = jnp.argsort(order)
        states = jax.tree.map(lambda x: x[back], states)
        counts = {
            "asked": asked.metrics["asked"],
            "dropped": asked.metrics["dropped"] + metrics["dropped"],
            "candidates": asked.metrics["clients"],
        }
        return after, states, metrics | sent_once(server.params, asked.metrics, metrics) | counts

    return algorithm._replace(round=round, name=f"power_of_choice({kind(algorithm)})")


def sent_once(x: Params, asked: Metrics, trained: Metrics) -> Metrics:
    """The bytes of a round whose clients were sent the parameters x for their losses, and train from them."""
    before = trained["asked"] * float(tree.nbytes(x))
    down = {
        name: asked["bytes_down"] + jnp.maximum(trained[name] - before, 0)
        for name in ("bytes_down", "bytes_down_entropy")
        if name in trained
    }
    return traffic(asked, trained) | down


def check_sees_losses(wrapper: str, algorithm: Algorithm) -> None:
    """Refuses to choose clients by their losses where nobody may see these, or all clients take part."""
    check_made(wrapper, algorithm)
    if algorithm.parts.uplink.promises.noise is not None or algorithm.parts.reducer.hides:
        raise InvalidInput(
            f"{wrapper} sees each client's loss, which neither noise nor a secure sum covers: leave it out, or take an "
            "algorithm without them."
        )
    if algorithm.start is not None:
        raise InvalidInput(f"{wrapper} cannot choose in a round before round 1, in which all clients take part.")


def largest(scores: Array, ids: Array, among: Array, count: Array | int) -> Array:
    """bool ``[N]``: the ``count`` of these clients with the largest scores; ties go to the smaller number."""
    scores = jnp.where(among, scores, -jnp.inf)
    ahead = (scores[None] > scores[:, None]) | ((scores[None] == scores[:, None]) & (ids[None] < ids[:, None]))
    return among & (jnp.sum(ahead & among[None], axis=1, dtype=jnp.int32) < count)


def in_front(cohort: Cohort, everyone: Array, best: Array) -> tuple[Array, Array]:
    """``(order, chosen)``: this device's places, the chosen first, and whether the client in each of them is chosen.

    Args:
      cohort: of this device.
      everyone: the numbers of all devices' clients.
      best: bool, which of them are chosen.
    """
    ids = jnp.asarray(cohort.ids)
    chosen = (ids >= 0) & jnp.any((ids[:, None] == everyone[None]) & best[None], axis=1)
    order = jnp.argsort(~chosen, stable=True)
    return order, chosen[order]


def only(cohort: Cohort, order: Array, chosen: Array) -> Cohort:
    """The cohort of the chosen clients, with empty places for the others, whose batches nobody reads."""

    def moved(x):
        return jax.tree.map(lambda x: jnp.asarray(x)[order], x)

    return dataclasses.replace(
        cohort,
        ids=jnp.where(chosen, moved(cohort.ids), -1),
        weight=jnp.where(chosen, moved(cohort.weight), 0),
        first=moved(cohort.first),
        num_steps=jnp.where(chosen, moved(cohort.num_steps), 0),
        state=moved(cohort.state),
        staleness=moved(cohort.staleness),
        # Buckets say how many steps the client in each place takes, and the places have changed.
        loops=cohort.loops._replace(buckets=None),
    )
