"""Noise in proportion to the bound that the clip in front of it guarantees: differential privacy."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip import checks, tree
from fedjax_clip.mechanism import Mechanism
from fedjax_clip.typing import Array, InvalidInput, PyTree
from fedjax_clip.uplink.base import Context, Uplink, nothing
from fedjax_clip.uplink.orders import NO_BOUND
from fedjax_clip.uplink.promises import Noise, Promises, Wire


def gaussian(
    noise_multiplier: float | Array,
    noise_cohort: float | Array | None = None,
    mechanism: Mechanism | None = None,
) -> Uplink:
    """The server adds Gaussian noise to the mean: ``mean + N(0, (z C / n)^2)`` in each coordinate.

    C is the bound of the clip before it in the chain and n the reducer's fixed denominator: neither is said twice, so
    that the noise cannot be on another scale than the sum's sensitivity. Guarantee: each round is a Gaussian
    mechanism of noise multiplier z for the presence of one client; ``fc.privacy`` says what that is worth over a run.

    With a ``mechanism`` it is DP-FTRL: the noise of the rounds is ``C^-1 Z``, Z as above, so that later rounds take
    back noise of earlier ones. All rounds together then are one Gaussian mechanism, whose noise multiplier is z over
    ``fc.privacy.sensitivity``. The bound in front of it must not move from round to round.

    Metrics: ``noise_std``, of one coordinate of the mean (of Z, with a mechanism); ``noise_cohort`` where one is given.

    Args:
      noise_multiplier: z >= 0, ratio of the sum's noise to C; may be traced.
      noise_cohort: n' in place of n: simulates the noise of a cohort of n' with a smaller one of n, for research on a
        deployment's accuracy. Privacy is then that of the deployment, NOT of the run.
      mechanism: of ``fc.mechanism``, how noise depends on that of the rounds before; independent by default.

    Raises:
      InvalidInput: no clip in front of it, a mean without a fixed denominator, a link that leaks, a link behind it
        that may make messages larger, a mechanism behind a bound that moves (all when the algorithm is built).

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.3), fc.uplink.gaussian(1.0))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, uplink=uplink, reducer=fc.fixed_mean(50))

    Source: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models", Algorithm 1; Kairouz et
    al. (2021), DP-FTRL.
    """
    checks.within("gaussian: noise_multiplier", noise_multiplier, 0)
    if noise_cohort is not None:
        checks.positive("gaussian: noise_cohort", noise_cohort)
    checks.kind("gaussian: mechanism", mechanism, Mechanism | None, "one such as fc.mechanism.tree(64)")

    def decode(aggregate, state, report, ctx):
        if ctx.denominator is None:
            raise InvalidInput("gaussian needs a mean with a fixed denominator: make fixed_mean the reducer.")
        cohort = ctx.denominator if noise_cohort is None else noise_cohort
        std = noise_multiplier * _bound(ctx) / cohort
        rescaled = {} if noise_cohort is None else {"noise_cohort": jnp.float32(noise_cohort)}
        noise = optax.tree.random_like(ctx.key, aggregate, sampler=jax.random.normal)
        if mechanism is not None:
            noise, state = mechanism.next(noise, state)
        return _plus(aggregate, std, noise), state, {"noise_std": jnp.float32(std)} | rescaled

    def encode(update, state, client_state, ctx):
        return update, client_state, {}

    def init(params):
        wide = jax.tree.map(lambda x: jnp.zeros(x.shape, tree.wide_type(x)), params)
        return () if mechanism is None else mechanism.init(wide)

    promises = Promises(
        contracts=True,
        noise=Noise.SERVER,
        noise_multipliers=(noise_multiplier,),
        needs_bound=True,
        mechanism=mechanism,
        deployment=noise_cohort,
        wire=Wire.KEEPS,
    )
    return Uplink(init, nothing, encode, decode, promises)


def local_gaussian(noise_multiplier: float | Array) -> Uplink:
    """Each client adds Gaussian noise of its own before it sends: ``u + N(0, (z C)^2)``, for a server not trusted.

    C is the bound of the clip before it. Guarantee: one message is a Gaussian mechanism of noise multiplier z / 2 for
    any change of the client's data (two updates of norm C lie 2 C apart), whoever reads it. The mean of n messages
    carries z C / sqrt(n) of noise, sqrt(n) times that of ``gaussian``. Links behind it only process what is private.

    Args:
      noise_multiplier: z >= 0, ratio of the noise to C; may be traced.

    Raises:
      InvalidInput: (when the algorithm is built) no clip in front of it.

    Source: Dwork and Roth (2014), section 12.1 (the local model) and appendix A (the Gaussian mechanism).
    """
    checks.within("local_gaussian: noise_multiplier", noise_multiplier, 0)

    def encode(update, state, client_state, ctx):
        noise = optax.tree.random_like(ctx.key, update, sampler=jax.random.normal)
        return _plus(update, noise_multiplier * _bound(ctx), noise), client_state, {}

    def decode(aggregate, state, report, ctx):
        return aggregate, state, {"noise_std": jnp.float32(noise_multiplier * _bound(ctx))}

    return Uplink(nothing, nothing, encode, decode, Promises(noise=Noise.CLIENT, needs_bound=True))


def _bound(ctx: Context) -> Array:
    if ctx.bound is None:
        raise InvalidInput(NO_BOUND)
    return ctx.bound


def _plus(values: PyTree, std: float | Array, noise: PyTree) -> PyTree:
    return jax.tree.map(lambda x, n: x + tree.scaled(jnp.asarray(std), n).astype(x.dtype), values, noise)
