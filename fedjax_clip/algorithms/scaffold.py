"""SCAFFOLD and SCAFFOLDClip: control variates against client drift."""

import jax
import optax

from fedjax_clip.algorithms.base import Round, algorithm, zeros_like
from fedjax_clip.core import tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def scaffold(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    uplink: Uplink | None = None,
    variate_uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local steps along ``d = g - c_i + c``, which corrects a client's drift from the others.

    After its steps ``c_i'`` is the mean of the client's RAW gradients of the round, and ``c <- c + |S| / N mean (c_i' -
    c_i)``. A clip at the head of ``client_tx`` sees d (SCAFFOLDClip). For unclipped SGD the mean of raw gradients is
    the paper's option II, ``c_i - c + (x - y) / (I eta)``. Once a step is clipped, that formula would be wrong.

    Changes of variates take the reducer's mean, as updates do, so c is the mean of all c_i. The paper uses
    ``uniform_mean``. With the default, which weighs by examples, both follow the weighted objective.

    DP-SCAFFOLD for records is ``gradient=fc.local.private_gradient(C, z)``: all that a client sends then comes from
    noised gradients. For user-level DP, the change of the variate needs a clip and noise like the update: give
    ``variate_uplink`` as well. Two links of noise z sqrt(2) cost what one of z costs (``fc.privacy.together``). The
    server's c is then the mean of the noised messages, and no longer of the c_i.

    Args:
      per_example_loss, client_tx, server_tx, reducer, gradient: as ``fc.fedavg``.
      uplink: the link of the update.
      variate_uplink: the link of the change of the variate; none by default.

    Returns:
      An ``Algorithm`` whose clients keep ``c_i`` and whose server keeps ``c``; messages are twice as long. Metrics
      besides FedAvg's: ``variate_norm``.

    Raises:
      InvalidInput: an argument of the wrong kind; noise on the update and not on the variate.

    Example:
      >>> tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> algorithm = fc.scaffold(per_example_loss, tx)

      >>> link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(1.4))
      >>> mean = fc.reduce.fixed_mean(50)
      >>> private = fc.scaffold(per_example_loss, tx, uplink=link, variate_uplink=link, reducer=mean)

    Source: Karimireddy et al. (2020), Algorithm 1; Crawshaw, Bao and Liu (2023) for the clip; Noble, Bellet and
    Dieuleveut (2022), "Differentially Private Federated Learning on Heterogeneous Data", Algorithm 1, for records.
    """

    def round(now: Round):
        def client_fn(shared, client, key):
            x, c = shared
            c_i = client.state.own

            def corrected(g, y, step):
                return jax.tree.map(lambda g, c_i, c: g - c_i + c, g, c_i, c)

            y, _, mean, report = client.local_steps(x, key, adjust=corrected, collect=True)
            return (optax.tree.sub(y, x), optax.tree.sub(mean, c_i)), mean, report

        answer = now.exchange(client_fn, (now.server.params, now.server.own))
        update, change = answer.update
        c = tree.add_scaled(now.server.own, now.share(answer), change)
        return now.step(answer, update, own=c, metrics={"variate_norm": tree.norm(c)})

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        server_own=zeros_like,
        client_own=zeros_like,
        mean_of=lambda own: (own, True),
        beside=[variate_uplink],
    )
