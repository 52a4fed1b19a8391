"""SCAFFOLD and SCAFFOLDClip: control variates against client drift."""

import jax
import optax

from fedjax_clip.algorithms.base import init_server, on_update, parts, step_server, told, zeros_like
from fedjax_clip.algorithms.exchange import exchange, population_share
from fedjax_clip.core import tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, ClientState, ClientTx, PerExampleLoss
from fedjax_clip.local.steps import at_round, local_steps
from fedjax_clip.reduce import Reducer, together
from fedjax_clip.uplink.base import Uplink


def scaffold(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    num_clients: int | None = None,
    uplink: Uplink | None = None,
    variate_uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local steps along ``d = g - c_i + c``; a clip at the head of ``client_tx`` sees d (SCAFFOLDClip).

    After a client's steps ``c_i`` becomes the mean of its RAW gradients of the round, which for unclipped SGD is
    option II of the paper, ``c_i - c + (x - y) / (I eta)``; once a step is clipped that formula would be wrong.
    Changes of variates take the reducer's mean, as updates do: ``c <- c + |S| / N * mean (c_i' - c_i)``, so that c is
    the mean of all c_i. ``uniform_mean`` is the paper's. With the default, by examples, both follow the weighted
    objective. A weighted mean of updates with a uniform one of variates would end at the uniform objective's optimum.

    DP-SCAFFOLD for records is ``gradient=fc.local.private_gradient(C, z)``: all that a client sends then comes of
    noised
    gradients. For clients, the change of the variate needs a clip and noise as the update does: give ``variate_uplink``
    as well. Two links of noise z sqrt(2) cost what one of z costs (``fc.privacy.together``). The server's c is then the
    mean of what was sent, and no longer of the c_i.

    Args:
      per_example_loss, client_tx, server_tx, reducer, gradient: as ``fc.fedavg``.
      uplink: what the update passes.
      variate_uplink: what the change of the variate passes; nothing by default.
      num_clients: N, the whole population; read from the data unless it is given, and checked if it is.

    Returns:
      An ``Algorithm`` whose clients keep ``c_i`` and whose server keeps ``c``; messages are twice as long.

    Raises:
      InvalidInput: an argument of the wrong kind or out of its range.

    Example:
      >>> tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> algorithm = fc.scaffold(per_example_loss, tx)

      >>> link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(1.4))
      >>> mean = fc.reduce.fixed_mean(50)
      >>> private = fc.scaffold(per_example_loss, tx, uplink=link, variate_uplink=link, reducer=mean)

    Source: Karimireddy et al. (2020), Algorithm 1; Crawshaw, Bao and Liu (2023) for the clip; Noble, Bellet and
    Dieuleveut (2022), "Differentially Private Federated Learning on Heterogeneous Data", Algorithm 1, for records.
    """
    link, covers_all = on_update(uplink, variate_uplink), variate_uplink is not None
    built = parts(client_tx, server_tx, link, reducer, only_update=covers_all, gradient=gradient)
    reduce = together(built.reducer, built.reducer)

    def init(params):
        return init_server(params, built, own=zeros_like)

    def init_client(params):
        return ClientState(zeros_like(params), built.uplink.init_client(params))

    def round(server, cohort, key):
        tx, key = at_round(client_tx, server.round), jax.random.fold_in(key, server.round)

        def client_fn(shared, client, key):
            x, c = shared
            c_i = client.state.own

            def corrected(g, y, step):
                return jax.tree.map(lambda g, c_i, c: g - c_i + c, g, c_i, c)

            y, _, mean, report = local_steps(
                per_example_loss, tx, x, client, key, adjust=corrected, gradient=gradient, collect=True
            )
            update, change = optax.tree.sub(y, x), optax.tree.sub(mean, c_i)
            return (update, change), mean, report

        (update, change), state, client_states, metrics = exchange(
            client_fn, built.uplink, reduce, (server.params, server.own), server.uplink, cohort, key
        )
        share = population_share(built.reducer, cohort, metrics)
        c = tree.add_scaled(server.own, share, change)
        metrics |= {"update_norm": tree.norm(update), "variate_norm": tree.norm(c)}
        return step_server(server, built, update, state, c), client_states, metrics

    return Algorithm(
        init,
        init_client,
        round,
        population=built.population,
        parts=built,
        num_clients=told(num_clients),
        loss=per_example_loss,
    )
