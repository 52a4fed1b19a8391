"""FedALA: clients start from a learned mixture of their own model and the server's."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm, own_key
from fedjax_clip.algorithms.wrapping import split_by
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, Params, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def fedala(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    rate: float | Array = 1.0,
    mix_steps: int = 5,
    upper: str | None = None,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Each client starts from ``v_i + W_i (x - v_i)``, with a weight of its own in ``W_i`` for every number.

    At the start of a round it takes ``mix_steps`` steps ``W_i <- clip(W_i - rate g (x - v_i), 0, 1)``, with g the
    gradient at the mixture on its batches in turn. FedAvg's local steps from the mixture give the new ``v_i``, and it
    sends ``v_i - x``. ``W_i`` begins with ones, the server's model. With rate 0 it is FedAvg. Clips in ``client_tx``
    act on the local steps.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer: as ``fc.fedavg``.
      rate: of the mixture's steps, at least 0; may be traced.
      mix_steps: in each round. (The paper trains to convergence where a client first meets another model than its own,
        and on a share of its data afterwards.)
      upper: regular expression, found in the names of the leaves that are mixed, the paper's higher layers; the others
        are the server's. All are mixed by default.
      gradient: as ``fc.fedavg``, of all steps. No ``private_gradient``: a round uses a record for mixture and steps.

    Returns:
      An ``Algorithm`` whose clients keep ``(v_i, W_i)``; ``algorithm.personal`` gives ``v_i``.

    Raises:
      InvalidInput: an argument of the wrong kind, a negative rate; (when a run begins) an ``upper`` that is found in no
        leaf or in all.

    Example:
      >>> algorithm = fc.personal.fedala(per_example_loss, client_tx, mix_steps=3)

    Source: Zhang, Hua, Wang, Song, Xue, Ma and Guan (2023), "FedALA: Adaptive Local Aggregation for Personalized
    Federated Learning", Algorithm 1 and equation 5.
    """
    checks.within("fedala's rate", rate, 0, finite=True)
    mix_steps = checks.count("fedala's mix_steps", mix_steps)
    if upper is not None:
        checks.pattern("upper", upper)

    def mixed(params: Params) -> Params:
        """1 in the leaves that are mixed, 0 in the others."""
        if upper is None:
            return jax.tree.map(lambda x: 1.0, params)
        found, rest = split_by("upper", upper, params)
        return tree.join(jax.tree.map(lambda x: 1.0, found), jax.tree.map(lambda x: 0.0, rest))

    def round(now: Round):
        def client_fn(x, client, key):
            v, weights = client.state.own
            gap, here = optax.tree.sub(x, v), mixed(x)
            count = jnp.maximum(client.num_steps, 1)

            def mixture(weights):
                return jax.tree.map(lambda v, d, w: v + w * d, v, gap, weights)

            def learn(step, weights):
                g = client.gradient(mixture(weights), step % count, jax.random.fold_in(own_key(key), step // count))
                factor = jax.tree.map(lambda on: -on * rate, here)
                step = jax.tree.map(lambda f, g, d: tree.scaled(jnp.asarray(f), g * d), factor, g, gap)
                return jax.tree.map(lambda w, s: jnp.clip(w + s, 0, 1), weights, step)

            weights = jax.lax.fori_loop(0, mix_steps, learn, weights)
            y, _, _, report = client.local_steps(mixture(weights), key)
            return optax.tree.sub(y, x), (y, weights), report

        return now.step(now.exchange(client_fn, now.server.params))

    def begin(params):
        mixed(params)  # refuses a pattern that names nothing
        return tree.as_arrays(params), jax.tree.map(jnp.ones_like, params)

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        client_own=begin,
        personal=lambda params, own: own[0],
        reuses=True,
    )
