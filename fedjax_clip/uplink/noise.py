"""Gaussian noise for differential privacy, scaled to the bound of the clip in front of it."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput
from fedjax_clip.uplink import lattice
from fedjax_clip.uplink.base import Context, Message, Uplink, nothing, stateless
from fedjax_clip.uplink.mechanism import Mechanism
from fedjax_clip.uplink.orders import NO_BOUND
from fedjax_clip.uplink.promises import Noise, Promises, Wire

NEEDS_EXACT_SUM = (
    "gaussian adds its noise to an exact sum of integers, and this reducer makes no such sum: make fixed_mean the "
    "reducer, alone."
)


def gaussian(
    noise_multiplier: float | Array,
    noise_cohort: float | Array | None = None,
    mechanism: Mechanism | None = None,
) -> Uplink:
    """The server adds Gaussian noise to the mean: ``mean + N(0, (z C / n)^2)`` in each coordinate.

    C is the bound of the clip before it in the chain and n the reducer's fixed denominator. Both are read from there,
    so the noise always matches the sum's sensitivity. Guarantee: each round is a Gaussian mechanism of noise multiplier
    z for the presence of one client; ``fc.privacy`` computes epsilon over a run.

    The guarantee covers the released bits, not only real numbers. Messages are truncated toward zero to whole steps of
    a lattice (``lattice.py``: up to ``2^19 / z`` steps in C) and added as integers, and the noise is an exact integer.
    Truncation moves a sum by at most n steps; the noise has 2^19 steps for ``n / z`` up to 2000. If z is known to be 0
    when the algorithm is built, messages stay as they are. If z is traced, a zero leaves them on the lattice without
    noise.

    With a ``mechanism`` it is DP-FTRL: the noise of the rounds is ``C^-1 Z``, Z as above, so later rounds take back
    noise of earlier ones. All rounds together are then one Gaussian mechanism, whose noise multiplier is z over
    ``fc.privacy.sensitivity``. The clip's bound must then be the same in all rounds.

    Metrics: ``noise_std``, of one coordinate of the mean (of Z, with a mechanism); ``noise_cohort`` where one is given.
    The standard deviation in the mean is 1e-6 C or more, unless z is 0.

    Args:
      noise_multiplier: z >= 0, ratio of the sum's noise to C; may be traced.
      noise_cohort: n' in place of n: simulates the noise of a cohort of n' with a smaller cohort of n, for research on
        a deployment's accuracy. The privacy is then the deployment's, NOT the run's.
      mechanism: from ``fc.uplink.mechanism``: how the noise depends on earlier rounds; independent by default.

    Raises:
      InvalidInput: (when the algorithm is built) no clip before it, a reducer other than ``fixed_mean``, a link that
        leaks, a link after it, a mechanism after a clip whose bound changes.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.3), fc.uplink.gaussian(1.0))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, uplink=uplink, reducer=fc.reduce.fixed_mean(50))

    Source: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models", Algorithm 1; Kairouz et
    al. (2021), DP-FTRL; Mironov (2012) and Canonne, Kamath and Steinke (2020) for the lattice.
    """
    checks.within("gaussian: noise_multiplier", noise_multiplier, 0, finite=True)
    if noise_cohort is not None:
        checks.positive("gaussian: noise_cohort", noise_cohort)
    checks.kind("gaussian: mechanism", mechanism, Mechanism | None, "one such as fc.uplink.mechanism.tree(64)")
    silent = lattice.is_zero(noise_multiplier)
    rescaled = {} if noise_cohort is None else {"noise_cohort": jnp.float32(noise_cohort)}
    unit = 1.0 if mechanism is None else lattice.diagonal(mechanism)

    def on(ctx):
        if ctx.denominator is None:
            raise InvalidInput("gaussian needs a mean with a fixed denominator: make fixed_mean the reducer.")
        rescale = 1 if noise_cohort is None else ctx.denominator / noise_cohort
        z = jnp.float32(noise_multiplier) * jnp.float32(rescale) / unit
        return lattice.lattice(_bound(ctx), z, ctx.denominator)

    def encode(update, state, client_state, ctx):
        if silent:
            return update, client_state, {}
        message = lattice.truncated(update, on(ctx))
        travels = tree.nbytes(update)  # the client sends the update as it is; the server rounds it to whole steps
        other = None if travels == tree.nbytes(message) else jnp.float32(travels)
        return Message(message, other).plain, client_state, {}

    def decode(aggregate, state, report, ctx):
        steps = on(ctx)
        seen = {"noise_std": unit * steps.stddev / jnp.float32(ctx.denominator)} | rescaled
        if silent:
            return aggregate, state, seen
        if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(aggregate)):
            raise InvalidInput(NEEDS_EXACT_SUM)
        noise = lattice.noise(ctx.key, aggregate, steps)
        if mechanism is not None:
            noise, state = lattice.correlated(mechanism, noise, state)
        total = jax.tree.map(jnp.add, aggregate, noise)  # modulo 2^32
        return lattice.values(total, steps.step / jnp.float32(ctx.denominator)), state, seen

    def init(params):
        return () if mechanism is None else lattice.init_correlated(mechanism, params)

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
    """Each client adds its own Gaussian noise before it sends: ``u + N(0, (z C)^2)``, for an untrusted server.

    C is the bound of the clip before it. Guarantee: one message is a Gaussian mechanism of noise multiplier z / 2 for
    any change of the client's data (two updates of norm C lie 2 C apart), against every reader. The mean of n messages
    carries z C / sqrt(n) of noise, sqrt(n) times that of ``gaussian``. Later links are post-processing. As in
    ``gaussian``, update and noise are added as whole steps of a lattice.

    Args:
      noise_multiplier: z >= 0, ratio of the noise to C; may be traced.

    Raises:
      InvalidInput: (when the algorithm is built) no clip in front of it.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.3), fc.uplink.local_gaussian(1.0))

    Source: Dwork and Roth (2014), section 12.1 (the local model) and appendix A (the Gaussian mechanism).
    """
    checks.within("local_gaussian: noise_multiplier", noise_multiplier, 0, finite=True)
    silent = lattice.is_zero(noise_multiplier)

    def on(ctx):
        return lattice.lattice(_bound(ctx), noise_multiplier, 1)

    def encode(update, ctx):
        if silent:
            return update, {}
        steps = on(ctx)
        noised = jax.tree.map(jnp.add, lattice.truncated(update, steps), lattice.noise(ctx.key, update, steps))
        return optax.tree.cast_like(lattice.values(noised, steps.step), update), {}

    def decode(aggregate, report, ctx):
        return aggregate, {"noise_std": on(ctx).stddev}

    return stateless(encode, decode, Promises(noise=Noise.CLIENT, needs_bound=True))


def _bound(ctx: Context) -> Array:
    if ctx.bound is None:
        raise InvalidInput(NO_BOUND)
    return ctx.bound
