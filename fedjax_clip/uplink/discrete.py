"""Integer noise, drawn all coordinates at once: discrete Gaussian and Skellam.

Where the noise is wide, by rounding a normal variable of a variance less by 1/12, which rounding adds; else with
rejection. Probabilities are right to about 1e-5 of their size out to 6.6 standard deviations, where the normal ends (32
random bits): for research on accuracy and accounting. A deployment that is attacked through its floating point draws by
exact arithmetic instead.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip import keys
from fedjax_clip.typing import Array

LEAST_STDDEV = 0.2  # below, acceptance gets rare: noise is then a little larger than asked for
LARGE = 100  # variance from which a Skellam variable is drawn as a corrected discrete Gaussian
WIDE_GAUSSIAN, WIDE_SKELLAM = 20, 1000  # the standard deviation, and the variance, from which nothing is rejected


def discrete_gaussian(key: Array, shape: tuple[int, ...], stddev: float | Array) -> Array:
    """``P(k) ~ exp(-k^2 / (2 stddev^2))`` on the integers; zero for a stddev of zero.

    Args:
      key: PRNG key.
      shape: of the result, int32.
      stddev: up to a million; may be traced.

    Example:
      >>> noise = discrete_gaussian(jax.random.key(0), (1000,), 3.0)

    Source: Canonne, Kamath and Steinke (2020), "The Discrete Gaussian for Differential Privacy", Definition 1.
    """
    known, stddev = stddev, jnp.float32(stddev)
    scale = jnp.where(stddev > 0, jnp.maximum(stddev, LEAST_STDDEV), 1)  # whatever is quick where there is no noise

    def narrow(key):
        return _rejection(key, shape, lambda key: _near_gaussian(key, shape, scale))

    def wide(key):
        less = jnp.sqrt(jnp.square(jnp.maximum(scale, WIDE_GAUSSIAN)) - 1 / 12)
        return jnp.round(less * _normal(key, shape)).astype(jnp.int32)

    return jnp.where(stddev > 0, _choose(known, (WIDE_GAUSSIAN,), (narrow, wide), key), 0)


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
        plus, minus = jax.random.split(key)
        mean = jnp.minimum(variance, LARGE) / 2
        return _poisson(plus, mean, shape) - _poisson(minus, mean, shape)

    def large(key):
        mu = jnp.maximum(variance, LARGE)
        wider = mu + 6  # so that the normal lies over the Skellam out to 8 standard deviations

        def propose(key):
            k, log_accept = _near_gaussian(key, shape, jnp.sqrt(wider))
            return k, log_accept + _log_bessel(k / mu, mu) + jnp.square(k.astype(jnp.float32)) / (2 * wider)

        return _rejection(key, shape, propose)

    def wide(key):
        mu = jnp.maximum(variance, WIDE_SKELLAM)
        square = mu - 1 / 12  # all even cumulants are mu, less those of what rounding adds
        fourth, sixth = (mu + 1 / 120) / square**2, (mu - 1 / 252) / square**3
        z = _normal(key, shape)
        zz = jnp.square(z)
        bend = fourth * (zz - 3) / 24 + sixth * ((zz - 10) * zz + 15) / 720
        bend -= jnp.square(fourth) * ((3 * zz - 24) * zz + 29) / 384
        return jnp.round(jnp.sqrt(square) * (z + z * bend)).astype(jnp.int32)

    return _choose(known, (LARGE, WIDE_SKELLAM), (small, large, wide), key)


def _poisson(key: Array, mean: Array, shape: tuple[int, ...]) -> Array:
    """By Knuth: how many exponential waiting times fit into ``mean``. JAX's own is quicker, and of Threefry only."""
    if not keys.is_secret(key):
        return jax.random.poisson(key, mean, shape, jnp.int32)

    def wait(carry):
        key, left, count = carry
        key, waiting = jax.random.split(key)
        left = left - jax.random.exponential(waiting, shape, jnp.float32)
        return key, left, count + (left > 0)

    start = key, jnp.broadcast_to(jnp.float32(mean), shape), jnp.zeros(shape, jnp.int32)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] > 0), wait, start)[2]


def _choose(
    size: float | Array, ends: tuple[float, ...], branches: tuple[Callable[[Array], Array], ...], key: Array
) -> Array:
    """The branch for a size between two ends; it alone is compiled where the size is known."""
    if not isinstance(size, jax.core.Tracer):
        return branches[int(np.searchsorted(ends, size, side="right"))](key)
    return jax.lax.switch(jnp.searchsorted(jnp.array(ends, jnp.float32), size, side="right"), branches, key)


def _near_gaussian(key: Array, shape: tuple[int, ...], scale: Array) -> tuple[Array, Array]:
    """Integers k, and the logarithm of the probability with which taking k makes it a discrete Gaussian.

    k is the integer nearest to a normal y. Given k and |y - k| = e, y was k + e or k - e, with density
    ``exp(-k^2 / (2 s^2)) exp(-e^2 / (2 s^2)) cosh(k e / s^2)`` together, over which this divides.
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
    """By Box and Muller from 32 bits, so that it reaches 6.6; ``jax.random.normal`` ends at 5.4."""
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
