"""IFCA: several models, of which each client trains the one that serves it best."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.algorithms.clusters.models import check_link, check_start, in_its_place, of_several, priced
from fedjax_clip.algorithms.parts import checked_link
from fedjax_clip.core import checks
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.reduce.base import apart
from fedjax_clip.uplink.base import Uplink


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
    check_link("ifca", link)

    def round(now: Round):
        check_start(now)

        def client_fn(x, client, key):
            losses = jax.lax.map(lambda model: client.mean_loss(model, key), x.models)
            chosen = jnp.argmin(losses).astype(jnp.int32)
            begin = x.of(chosen)
            y, _, _, report = client.local_steps(begin, key)
            message, sizes = in_its_place(optax.tree.sub(y, begin), chosen, clusters)
            return message, chosen, report | sizes

        answer = now.exchange(client_fn, now.server.params, reducer=apart(now.parts.reducer, clusters))
        answer = priced(answer, link, now.server.params, clusters)
        return now.step(answer, answer.update[0])

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
    return of_several(made, per_example_loss, clusters, jax.random.key(seed), spread)
