"""CFL: clusters of clients that are split where their updates disagree and their mean no longer moves."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.algorithms.clusters.models import Models, check_link, check_start, in_its_place, of_several, priced
from fedjax_clip.algorithms.parts import checked_link
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer, Roster, Stack, rows, stacking
from fedjax_clip.reduce.base import apart
from fedjax_clip.uplink.base import Uplink


def cfl(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    clusters: int,
    stationary: float | Array,
    disagree: float | Array,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """FedAvg in clusters, each of which splits in two where its mean update is small and a client's is large.

    All clients begin in one cluster. With the updates ``u_i`` of a cluster's clients in a round, it splits if
    ``|reduce u_i| < stationary`` and ``max |u_i| > disagree``. Its two parts have the least largest cosine between a
    client of one and a client of the other. Each part then takes its own mean, from the same model. The part with the
    smallest client number keeps the cluster's number, the other takes the next.

    A clip of the uplink bounds ``|u_i|``: keep ``disagree`` below its threshold. Clipped updates keep their directions,
    so clients part as they would, but their mean is small sooner.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``. The reducer is applied to
        each cluster by itself. The uplink's message is the change of all models, zero but for the client's own; no link
        with a memory, a sketch or noise, whose sums are over all clients. A new cluster begins with a fresh state of
        ``server_tx``.
      clusters: the most clusters; with so many none splits any more.
      stationary: the norm (L2, of the parameters) below which a cluster's mean update counts as at rest; 0 is FedAvg.
      disagree: the norm above which a client's update says that the common model does not suit it.

    Returns:
      An ``Algorithm`` whose clients keep the number of their cluster; ``algorithm.personal`` gives its model. A client
      that is absent when its cluster splits stays in the part that keeps the number: in the paper all clients take
      part. A new client is in cluster 0; ``fc.clusters.ifca`` finds it the model of least loss, see docs/personal.md.
      The server holds all messages of a round. Metrics besides FedAvg's: ``clusters``, their number, and
      ``cluster/0``, ..., the clients that came from each.

    Raises:
      InvalidInput: an argument of the wrong kind; a link or a reducer that adds all clients' messages.

    Example:
      >>> algorithm = fc.clusters.cfl(per_example_loss, client_tx, clusters=3, stationary=0.5, disagree=0.6)
      >>> result = fc.train(algorithm, data, params, rounds=2, cohort_size=data.num_clients)
      >>> result.params.of(0)["w"].shape
      (64, 10)

    Source: Sattler, Mueller and Samek (2020), "Clustered Federated Learning: Model-Agnostic Distributed Multi-Task
    Optimization under Privacy Constraints", Algorithms 1 and 2; without the bound on the gradients' error, and with
    each part's own mean in the round that splits it, as in the authors' code.
    """
    clusters = checks.count("cfl's clusters", clusters, most=1000)
    checks.within("cfl's stationary", stationary, 0, finite=True)
    checks.within("cfl's disagree", disagree, 0, finite=True)
    link = checked_link(uplink)
    check_link("cfl", link)

    def round(now: Round):
        check_start(now)

        def client_fn(models, client, key):
            cluster = client.state.own
            x = models.of(cluster)
            y, _, _, report = client.local_steps(x, key)
            message, sizes = in_its_place(optax.tree.sub(y, x), cluster, clusters)
            return message, cluster, report | sizes

        x = now.server.params
        splitting = _splitting(apart(now.parts.reducer, clusters), now.server.own, stationary, disagree)
        answer = priced(now.exchange(client_fn, x, reducer=splitting), link, x, clusters, down=1)
        update, found = answer.update
        own = _looked_up(jnp.asarray(now.cohort.ids), found, answer.clients.own)
        answer = answer._replace(clients=answer.clients._replace(own=own))
        source = jnp.arange(clusters, dtype=jnp.int32) + found.back
        server = now.server._replace(params=jax.tree.map(lambda models: models[source], x))
        number = now.server.own + tree.count(found.back != 0)
        now = dataclasses.replace(now, server=server)
        return now.step(answer, update, own=number, metrics={"clusters": number.astype(jnp.float32)})

    made = algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        server_own=lambda params: jnp.ones((), jnp.int32),
        client_own=lambda params: jnp.zeros((), jnp.int32),
        personal=lambda params, own: params.of(own),
        beside=[None],
        broadcasts=False,
    )
    return of_several(made, per_example_loss, clusters, jax.random.key(0), spread=0.0)


class _Found(NamedTuple):
    """Where clients are after a round; all zeros if nobody came.

    Attributes:
      ids: int32 ``[N]``, of the clients that came.
      came: int32 ``[N]``, 1 for those.
      cluster: int32 ``[N]``, each one's cluster now.
      back: int32 ``[k]``, from a new cluster's number to that of the cluster it was split from; 0 for the others.
    """

    ids: Array
    came: Array
    cluster: Array
    back: Array


def _splitting(by_cluster: Reducer, number: Array, stationary: float | Array, disagree: float | Array) -> Reducer:
    """``(message, place) -> (updates, _Found)``, each cluster reduced by itself, after it has split if it should.

    Args:
      by_cluster: reduces each cluster's messages apart.
      number: of clusters so far.
      stationary, disagree: of ``cfl``.
    """

    def aggregate(stack: Stack):
        messages, place = stack.messages
        here = jnp.argmax(place, axis=1).astype(jnp.int32)
        row = jnp.arange(len(here), dtype=jnp.int32)
        updates = jax.tree.map(lambda x: x[row, here], messages.models)

        def reduced(place):
            stacked = Models(jax.tree.map(lambda u: u[:, None] * _beside(place, u), updates)), place
            one = jax.tree.map(lambda x: x[0], stacked)
            acc = by_cluster.zero(one, Roster(stack.ids, jax.random.fold_in(stack.key, 0)))
            return by_cluster.finish(by_cluster.add(acc, stacked, stack.weights), None)[0]

        parents = reduced(place)
        at_rest = rows.norms(parents) < stationary
        members = (place > 0) & stack.present[:, None]
        unsuited = jnp.max(jnp.where(members, rows.norms(updates)[:, None], 0), axis=0) > disagree
        enough = jnp.sum(members, axis=0, dtype=jnp.int32) >= max(2, by_cluster.fewest)  # of fewer the mean is zero
        splits = at_rest & unsuited & enough
        new = number + jnp.cumsum(splits.astype(jnp.int32)) - 1  # the number of a cluster's second part
        splits &= new < place.shape[1]
        leaves = splits[here] & _second_part(rows.cosines(updates), here, stack.present)
        cluster = jnp.where(leaves, new[here], here)
        numbers = jnp.arange(place.shape[1], dtype=jnp.int32)
        born = splits[:, None] & (new[:, None] == numbers[None])  # [parent, child]
        back = jnp.sum(jnp.where(born, numbers[:, None] - numbers[None], 0), axis=0, dtype=jnp.int32)
        after = (cluster[:, None] == numbers[None]).astype(place.dtype)
        update = jax.lax.cond(jnp.any(splits), reduced, lambda _: parents, after)
        return update, _Found(stack.ids, stack.present.astype(jnp.int32), cluster, back)

    kept = {name: getattr(by_cluster, name) for name in ("denominator", "population", "weighted", "forges")}
    return stacking(aggregate)._replace(**kept)


def _second_part(cosines: Array, cluster: Array, present: Array) -> Array:
    """bool ``[N]``: who is not with its cluster's first client in the bipartition of least cosine across.

    Two clients are as close as the weakest cosine on the best path between them (single linkage). The least of these
    in a cluster is where it parts.
    """
    together = (cluster[:, None] == cluster[None]) & present[:, None] & present[None]
    path = jnp.where(together, cosines, -jnp.inf)
    path = jax.lax.fori_loop(
        *(0, len(path), lambda k, path: jnp.maximum(path, jnp.minimum(path[:, k, None], path[None, k]))), path
    )
    others = together & ~jnp.eye(len(path), dtype=bool)
    weakest = jnp.min(jnp.where(others, path, jnp.inf), axis=1)
    weakest = jnp.min(jnp.where(together, weakest[None], jnp.inf), axis=1)  # of the whole cluster
    first = jnp.argmax(together, axis=1)  # rows are in the order of clients' numbers
    row = jnp.arange(len(path))
    return present & (first != row) & (path[row, first] <= weakest)


def _looked_up(ids: Array, found: _Found, own: Array) -> Array:
    """int32 ``[C]``: the clusters of this device's clients; those that did not come keep theirs."""
    is_it = (ids[:, None] == found.ids[None]) & (found.came[None] > 0)
    return jnp.where(jnp.any(is_it, axis=1), found.cluster[jnp.argmax(is_it, axis=1)], own)


def _beside(place: Array, u: Array) -> Array:
    """``[N, k]`` places that broadcast against ``u [N, 1, ...]``."""
    return place.reshape(*place.shape, *[1] * (u.ndim - 1)).astype(u.dtype)
