"""Integer noise, drawn all coordinates at once: discrete Gaussian and Skellam.

If its width is known when a round is traced, a discrete Gaussian is drawn by exact arithmetic (``alias.py``). If its
width is traced, as in a sweep, and for Skellam noise, probabilities have a relative error of about 1e-5 out to 6
standard deviations or more, where 32 bits end. That is for research on accuracy: an adversary who sees 1e9 coordinates
can tell such noise from the accounted one. Wide noise is then a rounded normal variable whose variance is 1/12 smaller,
because rounding adds 1/12. Narrow noise is drawn by rejection.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core.types import Array
from fedjax_clip.uplink import alias

LEAST_STDDEV = 0.2  # below, acceptance gets rare, so the noise is made this wide
FARTHEST = 120  # from zero, for variances up to LARGE: less than 1e-20 of the probability lies beyond
LARGE = 100  # from this variance on, a Skellam variable is drawn as a corrected discrete Gaussian
WIDE_GAUSSIAN, WIDE_SKELLAM = 20, 1000  # from this standard deviation, and this variance, nothing is rejected


def discrete_gaussian(key: Array, shape: tuple[int, ...], stddev: float | Array) -> Array:
    """``P(k) ~ exp(-k^2 / (2 stddev^2))`` on the integers; zero for a stddev of zero.

    If stddev is not traced, the statistical distance is 2^-93 a coordinate: the noise is ``x1 + k x2``, two draws from
    a table with standard deviation ``stddev / sqrt(1 + k^2)`` each, as in ``lattice.py``.

    Args:
      key: PRNG key.
      shape: of the result, int32.
      stddev: up to two million; may be traced.

    Example:
      >>> noise = discrete_gaussian(jax.random.key(0), (1000,), 3.0)

    Source: Canonne, Kamath and Steinke (2020), "The Discrete Gaussian for Differential Privacy", Definition 1.
    """
    if not isinstance(stddev, jax.core.Tracer) and 0 < stddev <= alias.widest() ** 2 / 2:
        return _by_table(key, shape, float(stddev))
    known, stddev = stddev, jnp.float32(stddev)
    scale = jnp.where(stddev > 0, jnp.maximum(stddev, LEAST_STDDEV), 1)  # any quick value if there is no noise

    def narrow(key):
        return _rejection(key, shape, lambda key: _near_gaussian(key, shape, scale))

    def wide(key):
        less = jnp.sqrt(jnp.square(jnp.maximum(scale, WIDE_GAUSSIAN)) - 1 / 12)
        return jnp.round(less * _normal(key, shape)).astype(jnp.int32)

    return jnp.where(stddev > 0, _choose(known, (WIDE_GAUSSIAN,), (narrow, wide), key), 0)


def _by_table(key: Array, shape: tuple[int, ...], stddev: float) -> Array:
    wide = stddev > alias.widest()
    spread = math.floor(math.sqrt(stddev / 2 - 1)) if wide else 0  # the widest that still smooths
    table = alias.gaussian_table(stddev / math.sqrt(1 + spread**2))
    first, *second = alias.draw(key, math.prod(shape), table, 2 if spread else 1)
    return sum((spread * x for x in second), first).reshape(shape)


def skellam(key: Array, shape: tuple[int, ...], variance: float | Array) -> Array:
    """The difference of two Poisson variables of mean ``variance / 2``: ``P(k) = exp(-variance) I_k(variance)``.

    Args:
      key: PRNG key.
      shape: of the result, int32.
      variance: up to 1e12; may be traced.

    Example:
      >>> noise = skellam(jax.random.key(0), (1000,), 9.0)

    Source: Agarwal, Kairouz and Liu (2021), "The Skellam Mechanism for Differentially Private Federated Learning",
    Definition 3.1; Debye's expansion of the Bessel function, DLMF 10.41.3; Cornish and Fisher (1938), "Moments and
    Cumulants in the Specification of Distributions".
    """
    known, variance = variance, jnp.float32(variance)

    def small(key):
        return _by_inversion(key, shape, jnp.minimum(variance, LARGE))

    def large(key):
        mu = jnp.maximum(variance, LARGE)
        wider = mu + 6  # so that the normal density dominates the Skellam's out to 8 standard deviations

        def propose(key):
            k, log_accept = _near_gaussian(key, shape, jnp.sqrt(wider))
            return k, log_accept + _log_bessel(k / mu, mu) + jnp.square(k.astype(jnp.float32)) / (2 * wider)

        return _rejection(key, shape, propose)

    def wide(key):
        mu = jnp.maximum(variance, WIDE_SKELLAM)
        square = mu - 1 / 12  # all even cumulants are mu, less what rounding adds
        fourth, sixth = (mu + 1 / 120) / square**2, (mu - 1 / 252) / square**3
        z = _normal(key, shape)
        zz = jnp.square(z)
        bend = fourth * (zz - 3) / 24 + sixth * ((zz - 10) * zz + 15) / 720
        bend -= jnp.square(fourth) * ((3 * zz - 24) * zz + 29) / 384
        return jnp.round(jnp.sqrt(square) * (z + z * bend)).astype(jnp.int32)

    return _choose(known, (LARGE, WIDE_SKELLAM), (small, large, wide), key)


def _by_inversion(key: Array, shape: tuple[int, ...], mu: Array) -> Array:
    """A Skellam variable of variance at most ``LARGE``: a sign, times the number of k >= 0 with ``u < P(|X| > k)``.

    ``P(X = k) ~ I_k(mu)``, from ``I_k / I_(k - 1) = mu / (2 k + mu I_(k + 1) / I_k)``. Sums begin at the far end, so
    tails keep their relative precision.
    """

    def down(i, ratios):
        k = FARTHEST - i
        return ratios.at[k].set(mu / (2 * jnp.float32(k) + mu * ratios[k + 1]))

    ratios = jax.lax.fori_loop(0, FARTHEST, down, jnp.zeros(FARTHEST + 2, jnp.float32))[1:-1]
    weights = jnp.cumprod(ratios)  # of 1, 2 ... over that of 0
    beyond = jnp.cumsum(weights[::-1])  # P(|X| > k) up to a factor, the largest k first
    bits = jax.random.bits(key, shape, jnp.uint32)
    u = ((bits >> 1).astype(jnp.float32) + 0.5) * 2.0**-31 * (beyond[-1] + 0.5)
    size = FARTHEST - jnp.searchsorted(beyond, u, side="right").astype(jnp.int32)
    return jnp.where(bits & 1 == 1, size, -size)


def _choose(
    size: float | Array, ends: tuple[float, ...], branches: tuple[Callable[[Array], Array], ...], key: Array
) -> Array:
    """Chooses the branch by size; if the size is known, only that branch is compiled."""
    if not isinstance(size, jax.core.Tracer):
        return branches[int(np.searchsorted(ends, size, side="right"))](key)
    return jax.lax.switch(jnp.searchsorted(jnp.array(ends, jnp.float32), size, side="right"), branches, key)


def _near_gaussian(key: Array, shape: tuple[int, ...], scale: Array) -> tuple[Array, Array]:
    """Integers k, and the logarithm of the probability with which taking k makes it a discrete Gaussian.

    k is the integer nearest to a normal y. Given k and |y - k| = e, y was k + e or k - e, with the joint density
    ``exp(-k^2 / (2 s^2)) exp(-e^2 / (2 s^2)) cosh(k e / s^2)``. The acceptance probability divides by it.
    """
    y = scale * _normal(key, shape)
    k = jnp.round(y)
    e = y - k
    x = jnp.abs(k * e) / jnp.square(scale)
    log_cosh = x + jnp.log1p(jnp.exp(-2 * x)) - math.log(2)
    return k.astype(jnp.int32), (jnp.square(e) - 0.25) / (2 * jnp.square(scale)) - log_cosh


def _log_bessel(r: Array, mu: Array) -> Array:
    """``log(I_k(mu) / I_0(mu))`` at ``r = k / mu``, without cancellation; its relative error is below 1e-5 from 100."""
    root = jnp.sqrt(1 + jnp.square(r))
    exponent = r * jnp.arcsinh(r) - jnp.square(r) / (1 + root)
    next_term = (3 / root - 3 - 5 * jnp.square(r) / root**3) / (24 * mu)
    return -mu * exponent - jnp.log(root) / 2 + next_term


def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    """A normal variable by Box and Muller from 32 bits. It reaches 6.6, while ``jax.random.normal`` ends at 5.4."""
    size = math.prod(shape)
    bits = jax.random.bits(key, (2, -(-size // 2)), jnp.uint32).astype(jnp.float32)
    radius = jnp.sqrt(-2 * jnp.log((bits[0] + 0.5) * 2.0**-32))
    angle = 2 * jnp.pi * 2.0**-32 * bits[1]
    return jnp.concatenate([radius * jnp.cos(angle), radius * jnp.sin(angle)])[:size].reshape(shape)


def _rejection(key: Array, shape: tuple[int, ...], propose: Callable[[Array], tuple[Array, Array]]) -> Array:
    """Proposes for all coordinates until each has been accepted once."""

    def again(carry):
        key, value, open = carry
        key, proposing, deciding = jax.random.split(key, 3)
        proposed, log_accept = propose(proposing)
        accepted = jnp.log(jax.random.uniform(deciding, shape, jnp.float32)) < log_accept
        return key, jnp.where(open & accepted, proposed, value), open & ~accepted

    start = key, jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), again, start)[1]
