"""Scale-then-privatise: coordinates on a common scale before a clip and noise."""

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array
from fedjax_clip.uplink.base import Uplink, nothing


def preconditioned(decay: float | Array = 0.99, eps: float | Array = 1e-3) -> Uplink:
    """Clients scale each coordinate by ``s``, which depends on its usual size; the server divides the mean by ``s``.

    ``s_t = 1 / (sqrt(v_t) + eps)``, with ``v <- decay v + (1 - decay) (mean / s)^2`` at the server, beginning at 0. In
    front of a clip and noise it is scale-then-privatise: clip and noise act on the scale of an adaptive optimiser, so
    each coordinate gets noise in proportion to its own size. It costs no privacy, because v depends on the noised means
    only. The clip's bound is in units of ``1 / eps`` updates in the first round, and later of updates over their root
    mean squares. The noise of a mean must stay well under 1 in a
    coordinate, or v grows with the noise that is scaled back.

    Metrics: ``scale``, the mean of s over coordinates.

    Args:
      decay: of v, in [0, 1); for example that of the server's Adam. May be traced.
      eps: positive; a large one scales all coordinates alike, a small one adds much noise to small coordinates.

    Raises:
      InvalidInput: numbers out of range.

    Example:
      >>> clip, noise = fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(1.0)
      >>> uplink = fc.uplink.chain(fc.uplink.preconditioned(0.99, eps=1e-3), clip, noise)
      >>> adam, mean = optax.adam(1e-2, b2=0.99), fc.reduce.fixed_mean(50)
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), adam, uplink=uplink, reducer=mean)

    Source: Ganesh, McMahan and Thakurta (2025), "On Design Principles for Private Adaptive Optimizers", Algorithm 8.
    """
    checks.fraction("preconditioned: decay", decay, zero=True)
    checks.positive("preconditioned: eps", eps, finite=True)

    def usual(v):
        return jnp.sqrt(v) + jnp.asarray(eps, v.dtype)

    def init(params):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, tree.wide_type(x)), params)

    def encode(update, state, client_state, ctx):
        return jax.tree.map(lambda u, v: (u / usual(v)).astype(u.dtype), update, state), client_state, {}

    def decode(aggregate, state, report, ctx):
        mean = jax.tree.map(lambda x, v: x.astype(v.dtype) * usual(v), aggregate, state)
        kept, new = jnp.asarray(decay), 1 - jnp.asarray(decay)
        after = jax.tree.map(lambda x, v: tree.scaled(kept, v) + tree.scaled(new, x * x), mean, state)
        scale = jnp.mean(jnp.concatenate([jnp.ravel(1 / usual(v)).astype(jnp.float32) for v in jax.tree.leaves(state)]))
        back = jax.tree.map(lambda x, a: x.astype(a.dtype), mean, aggregate)
        return back, after, {"scale": scale}

    return Uplink(init, nothing, encode, decode)
