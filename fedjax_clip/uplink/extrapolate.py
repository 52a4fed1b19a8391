"""FedExP: a server step that grows where clients disagree, with and without privacy."""

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.core.metrics import Mean
from fedjax_clip.core.types import Array, InvalidInput
from fedjax_clip.uplink import lattice
from fedjax_clip.uplink.base import Uplink, stateless
from fedjax_clip.uplink.orders import NO_BOUND
from fedjax_clip.uplink.promises import Promises, Wire


def fedexp(noise_multiplier: float | Array | None = None, epsilon: float = 1e-3) -> Uplink:
    """Multiplies the mean update by ``eta = max(1, mean_i ||u_i||^2 / (2 (||mean u||^2 + epsilon)))``.

    If updates point in different directions their mean is short, and the server's step grows to make up for it.
    Guarantee: eta is at least 1. Where it is larger, ``eta ||mean u|| <= mean ||u||^2 / (2 ||mean u||)``.

    Each client also sends its squared norm. In a chain of a clip to C, ``fedexp`` and ``gaussian``, one client moves
    the sum of squares by at most C^2. The server adds ``N(0, (z_s C^2)^2)`` to it, with z_s the ``noise_multiplier``:
    one more Gaussian mechanism, which accounting counts. The mean's own noise is in the denominator, so noise makes
    steps smaller, never larger. The clients' own noise is refused, since squares would reach the server in the clear.

    Metrics: ``extrapolation``, eta.

    Args:
      noise_multiplier: z_s, the noise on the sum of squares over C^2; no noise by default.
      epsilon: what keeps eta finite, in squared units of the parameters.

    Raises:
      InvalidInput: numbers out of range; (when a chain is built) noise on the squares without a bound in front.

    Example:
      >>> clip = fc.uplink.clip_by_global_norm(0.3)
      >>> link = fc.uplink.chain(clip, fc.uplink.fedexp(noise_multiplier=10.0), fc.uplink.gaussian(1.0))

    Source: Jhunjhunwala, Wang and Joshi (2023), "FedExP: Speeding Up Federated Averaging via Extrapolation", equation
    7; with noise after Takakura, Liew and Hasegawa (2025), "Accelerating Differentially Private Federated Learning via
    Adaptive Extrapolation", whose own choice of the noise on the squares this does not follow.
    """
    checks.positive("fedexp: epsilon", epsilon)
    if noise_multiplier is not None:
        checks.within("fedexp: noise_multiplier", noise_multiplier, 0, finite=True)

    def on(ctx):
        if ctx.denominator is None:
            raise InvalidInput("Noise on fedexp's squares needs a fixed mean: make fixed_mean the reducer.")
        if ctx.bound is None:
            raise InvalidInput(NO_BOUND)
        assert noise_multiplier is not None
        return lattice.lattice(jnp.square(ctx.bound), noise_multiplier, ctx.denominator)

    def encode(update, ctx):
        square = jnp.square(tree.norm(update)).astype(jnp.float32)
        if noise_multiplier is None:
            return update, {"squares": Mean(square, jnp.ones((), jnp.float32))}
        return update, {"squares": lattice.truncated(square, on(ctx))}

    def decode(aggregate, report, ctx):
        if noise_multiplier is None:
            squares = jnp.where(ctx.weight > 0, report["squares"], 0)
        else:
            total = report["squares"] + lattice.noise(ctx.key, report["squares"], on(ctx))
            squares = lattice.values(total, on(ctx).step / jnp.float32(ctx.denominator))
        short = jnp.square(tree.norm(aggregate)).astype(jnp.float32)
        eta = jnp.maximum(1, squares / (2 * (short + epsilon)))
        return jax.tree.map(lambda x: tree.scaled(eta, x), aggregate), {"extrapolation": eta}

    link = stateless(encode, decode, Promises(contracts=True, wire=Wire.KEEPS))
    if noise_multiplier is None:
        leaks = "fedexp tells the server the norms of clients' updates without noise: give it noise_multiplier=10.0."
        return link.promising(leaks=leaks)
    return link.promising(noise_multipliers=(noise_multiplier,), needs_bound=True, trusts="fedexp")
