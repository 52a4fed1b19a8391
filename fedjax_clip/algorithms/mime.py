"""Mime and MimeLite: every client steps with the server's momentum."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import Round, algorithm, zeros_like
from fedjax_clip.core import checks
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, Array, ClientTx, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def mime(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    beta: float | Array = 0.9,
    lite: bool = False,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Local steps with the SERVER's momentum, fixed in the round: ``(1 - beta) d + beta m``.

    ``d = g(y) - g(x) + G``, with g(x) on the same batch as g(y), and G the mean of clients' full gradients at x. Under
    ``lite``, ``d = g(y)``. After the round ``m <- (1 - beta) G + beta m``, with raw gradients even under a clip. G
    takes the reducer's mean, as the update does; the paper uses ``uniform_mean``. A clip in ``client_tx`` sees the
    whole direction, momentum included.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer: as ``fc.fedavg``; ``client_tx`` without momentum.
      beta: momentum, in [0, 1].
      lite: MimeLite: no correction, and one exchange a round in place of two.
      gradient: as ``fc.fedavg``, of all three gradients. No ``private_gradient``: a round uses a record three times.

    Returns:
      An ``Algorithm`` whose server keeps ``m``; two exchanges a round, or one if ``lite``.

    Raises:
      InvalidInput: an argument of the wrong kind, a beta outside [0, 1], noise.

    Example:
      >>> algorithm = fc.mime(per_example_loss, optax.sgd(0.1), beta=0.9)

    Source: Karimireddy et al. (2021), "Breaking the centralized barrier for cross-device federated learning",
    Algorithms 1 and 3, with SGD and momentum for the base optimiser.
    """
    checks.within("beta", beta, 0, 1)

    def round(now: Round):
        x, m = now.server.params, now.server.own

        def gradient_at_x(x, client, key):
            return client.full_gradient(x, key)[0], client.state.own, {}

        def client_fn(shared, client, key):
            x, m, mean = shared

            def with_momentum(g, y, step):
                if not lite:
                    at_x = client.gradient(x, step, key)
                    g = jax.tree.map(lambda g, a, c: g - a + c, g, at_x, mean)
                return jax.tree.map(lambda g, m: (1 - beta) * g + beta * m, g, m)

            y, _, _, report = client.local_steps(x, key, adjust=with_momentum)
            at_x = client.full_gradient(x, key)[0] if lite else ()
            return (optax.tree.sub(y, x), at_x), client.state.own, report

        asked = None if lite else now.ask(gradient_at_x, x)
        answer = now.exchange(client_fn, (x, m, () if asked is None else asked.update), after=asked)
        update, at_x = answer.update
        full = at_x if asked is None else asked.update
        came = answer.metrics["clients"] > 0
        after = jax.tree.map(lambda m, g: jnp.where(came, (1 - beta) * g + beta * m, m), m, full)
        return now.step(answer, update, own=optax.tree.cast_like(after, m))

    return algorithm(
        *(round, per_example_loss, client_tx, server_tx),
        uplink=uplink,
        reducer=reducer,
        gradient=gradient,
        server_own=zeros_like,
        beside=[None],
        asks=True,
    )
