"""IFCA: several models, of which each client trains the one that serves it best."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.algorithms.parts import checked_link
from fedjax_clip.core import checks, keys, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, InvalidInput, Params, PerExampleLoss, PyTree
from fedjax_clip.reduce import Reducer
from fedjax_clip.reduce.base import apart
from fedjax_clip.uplink.base import Uplink
from fedjax_clip.uplink.promises import Wire


class Models(NamedTuple):
    """The parameters of k models.

    Attributes:
      models: pytree like a model's parameters, of ``[k, ...]``.

    Example:
      >>> fc.clusters.stacked(params, 3, jax.random.key(0)).models["w"].shape
      (3, 64, 10)
    """

    models: PyTree

    def of(self, cluster: Array | int) -> Params:
        """The parameters of one model.

        Args:
          cluster: its number.
        """
        return jax.tree.map(lambda x: x[cluster], self.models)


def stacked(params: Params, clusters: int, key: Array, spread: float | Array = 0.1) -> Models:
    """``clusters`` models: the given one, and copies of it with Gaussian noise on each number.

    Args:
      params: pytree, the first model.
      clusters: k.
      key: PRNG key of the noise.
      spread: standard deviation of the noise, at least 0. With 0 all models are alike, and stay so.

    Raises:
      InvalidInput: k that is not a whole number of at least 1, a negative spread.

    Example:
      >>> start = fc.clusters.stacked(params, 3, jax.random.key(0))
      >>> result = fc.train(fc.clusters.ifca(per_example_loss, client_tx, clusters=3), data, start, rounds=2)
    """
    clusters = checks.count("stacked: clusters", clusters)
    checks.within("stacked: spread", spread, 0, finite=True)
    params = tree.as_arrays(params)
    leaves, structure = jax.tree.flatten(params)

    def copies(x, key):
        noise = spread * jax.random.normal(key, (clusters, *x.shape), tree.wide_type(x))
        own = jnp.arange(clusters).reshape(-1, *[1] * x.ndim) > 0
        return jnp.where(own, x[None] + noise.astype(x.dtype), x[None])

    each = jax.random.split(keys.threefry(key), len(leaves))
    return Models(jax.tree.unflatten(structure, [copies(x, k) for x, k in zip(leaves, each)]))


def ifca(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    clusters: int,
    spread: float | Array = 0.1,
    seed: int = 0,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """The server has k models; each client trains the one with the least loss on its data, and sends its change.

    ``j = argmin_j f_i(x_j)``; ``x_j <- x_j + reduce (y_i - x_j)`` over the clients that chose j. A model that nobody
    chose stays. The reducer is applied to each cluster by itself, so a median is a cluster's median. With one cluster
    it is FedAvg. HypCluster is the same rule.

    The parameters of the server are ``fc.clusters.Models``. A run may begin with a model's parameters, of which
    ``fc.clusters.stacked`` makes k, or with such ``Models`` of your own. Which groups are found depends on the start.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``. The uplink's message is the
        change of all k models, zero but for the chosen one; no link with a memory, a sketch or noise, whose sums are
        over all clients. No ``private_gradient``: the choice depends on the loss.
      clusters: k.
      spread, seed: of ``fc.clusters.stacked``, if a run begins with one model.

    Returns:
      An ``Algorithm`` whose clients keep the number of their cluster; ``algorithm.personal`` gives its model. A client
      that never took part is in cluster 0: ``fc.personal.adapt`` lets it choose. A round passes a client's data k times
      more than FedAvg, without gradients. Metrics besides FedAvg's: ``cluster/0``, ..., the clients that chose each.
      ``bytes_up`` counts one model and a number, unless a link reports its own.

    Raises:
      InvalidInput: an argument of the wrong kind; a link or a reducer that adds all clients' messages.

    Example:
      >>> algorithm = fc.clusters.ifca(per_example_loss, client_tx, clusters=2)
      >>> result = fc.train(algorithm, data, params, rounds=2, cohort_size=10)
      >>> result.params.of(1)["w"].shape
      (64, 10)

    Source: Ghosh, Chung, Yin and Ramchandran (2020), "An Efficient Framework for Clustered Federated Learning",
    Algorithm 1, option II (model averaging); Mansour, Mohri, Ro and Suresh (2020), "Three Approaches for
    Personalization with Applications to Federated Learning", HypCluster.
    """
    clusters = checks.count("ifca's clusters", clusters, most=1000)
    checks.within("ifca's spread", spread, 0, finite=True)
    checks.seed("ifca's seed", seed)
    link = checked_link(uplink)
    if link.promises.mirrors or link.promises.wire is Wire.SUMS or link.promises.grid is not None:
        raise InvalidInput(
            "ifca averages each cluster's updates apart, and the uplink adds those of all clients: take the memory, "
            "the sketch or the grid out of the uplink, or fedavg for the algorithm."
        )

    def round(now: Round):
        if not isinstance(now.server.params, Models):
            raise InvalidInput(
                "A wrapper gives this algorithm a part of one model, and it trains several: begin the run with "
                "fc.clusters.stacked(params, clusters, key) for its parameters."
            )

        def client_fn(x, client, key):
            losses = jax.lax.map(lambda model: client.mean_loss(model, key), x.models)
            chosen = jnp.argmin(losses).astype(jnp.int32)
            begin = x.of(chosen)
            y, _, _, report = client.local_steps(begin, key)
            place = (jnp.arange(clusters, dtype=jnp.int32) == chosen).astype(jnp.float32)
            change = optax.tree.sub(y, begin)
            message = Models(jax.tree.map(lambda u: jnp.stack([tree.scaled(p, u) for p in place]), change))
            sizes = {f"cluster/{j}": place[j] for j in range(clusters)}
            return (message, place), chosen, report | sizes

        by_cluster = apart(now.parts.reducer, clusters)
        answer = now.exchange(client_fn, now.server.params, reducer=by_cluster)
        if link.promises.wire is not Wire.PACKS:
            up = answer.metrics["asked"] * float(tree.nbytes(now.server.params) / clusters + 4)
            answer = answer._replace(metrics=answer.metrics | {"bytes_up": up})
        return now.step(answer, answer.update[0])

    def models(params: Any) -> Models:
        return params if isinstance(params, Models) else stacked(params, clusters, jax.random.key(seed), spread)

    def first(params: Any) -> Params:
        return params.of(0) if isinstance(params, Models) else params

    made = algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        client_own=lambda params: jnp.zeros((), jnp.int32),
        personal=lambda params, own: params.of(own),
        beside=[None],
        reuses=True,
        broadcasts=False,
    )
    return made._replace(
        init=lambda params: made.init(models(params)),
        init_client=lambda params: made.init_client(models(params)),
        loss=lambda params, batch, key: per_example_loss(first(params), batch, key),
    )
