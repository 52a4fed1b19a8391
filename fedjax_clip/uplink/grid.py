"""Updates as integers on a grid, for secure sums, and the clients' own noise on them."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.compression import hadamard, random_signs
from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput
from fedjax_clip.uplink import discrete
from fedjax_clip.uplink.base import Context, Uplink, stateless
from fedjax_clip.uplink.lattice import bounded
from fedjax_clip.uplink.orders import NEEDS_MODULAR_SUM, NO_BOUND
from fedjax_clip.uplink.promises import Noise, Promises

TYPES = {8: (jnp.uint8, jnp.int8), 16: (jnp.uint16, jnp.int16), 32: (jnp.uint32, jnp.int32)}
WRAPS = 1e-6  # probability that a round's sum of rotated or noisy messages leaves the grid
FINEST = 2**20  # steps in a bound: float32 cannot resolve finer ones
ATTEMPTS = 32  # to round without enlarging the norm; each succeeds with probability 0.39 or more


class Grid(NamedTuple):
    """The grid of a round's messages, in steps, fixed by shapes and numbers known before the round.

    Attributes:
      levels: the bound on an update's L2 norm, a whole number.
      l2, l1: norms that no rounded update exceeds, noise aside: one client's sensitivity.
      stddev: standard deviation of one client's noise in each coordinate.
      noise: ``"gaussian"``, ``"skellam"`` or none.
      clients: the fewest clients whose noise adds up to the promised one; the sum of fewer is not opened.
      room: the most clients whose sum stays on the grid.
      dim: coordinates.

    Example:
      >>> fc.uplink.skellam(1.0).promises.grid(650, cohort_size=8, threshold=6)
    """

    levels: float | Array
    l2: float | Array
    l1: float | Array
    stddev: float | Array
    noise: str
    clients: int
    room: int
    dim: int


def integer_grid(bits: int = 32, rotate: bool = False) -> Uplink:
    """Rounds a bounded update to whole steps of a grid. Each element is rounded up or down at random, without bias.

    Messages are unsigned integers of ``bits`` bits in the update's shapes. Only ``fc.reduce.modular_sum`` (or the
    protocol itself, ``fc.secure.pairwise_masks``) adds them. The step is C / L, with C the bound of the clip before it
    and L the largest whole number for which the sum of a cohort cannot wrap around. There is room for ``n + 6 sqrt(n) +
    6`` clients if n are expected, since a Poisson sample varies; a larger round is aborted. Must be the last link.
    Metrics: ``step``, and ``aborted``, 1 for an aborted round.

    Args:
      bits: of one element: 8, 16 or 32.
      rotate: whether a random rotation, shared by all clients, first spreads an update over its elements. Steps become
        about ``sqrt(d / 60)`` times finer, and a round's sum wraps with probability 1e-6 at most.

    Raises:
      InvalidInput: (when the algorithm is built) no clip before it, a link after it, a reducer other than a modular
        sum; (when a round is traced) too few bits for the cohort.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.5), fc.uplink.integer_grid(16))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, uplink=uplink, reducer=fc.reduce.modular_sum(50))

    Source: Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine Learning"; Suresh et
    al. (2017), "Distributed Mean Estimation with Limited Communication", for rounding and rotation.
    """
    return _link(bits, rotate, "", 0.0)


def discrete_gaussian(noise_multiplier: float | Array, bits: int = 32, rotate: bool = False) -> Uplink:
    """An integer grid on which each client adds its share of discrete Gaussian noise, so that the sum is private.

    One client's noise has standard deviation ``z D / sqrt(t)`` in each coordinate, with t the sum's threshold. The
    smallest sum that is ever opened thus carries ``z D`` of noise, and a sum of n clients ``sqrt(n / t)`` times that. D
    is the clip's bound after rounding: a client rounds again until its norm is at most

      ``D^2 = min(L^2 + d/4 + L + sqrt(d)/2, (L + sqrt(d))^2)``  in steps of the grid (paper's beta: e^-1/2)

    Guarantee: against an adversary who sees the sums, for the data (not the presence) of one client. Epsilon is a
    little larger than that of a Gaussian with the same ``z``: ``fc.privacy.epsilon(fc.privacy.distributed(uplink,
    params, reducer), ...)``. Metrics: those of ``integer_grid``, ``noise_multiplier`` of the clients that arrived, and
    ``noise_std`` of one coordinate of the mean.

    Args:
      noise_multiplier: z >= 0, ratio of the sum's noise to D; may be traced.
      bits, rotate: as for ``integer_grid``; the grid has room for the noise, too.

    Raises:
      InvalidInput: as ``integer_grid``.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.5), fc.uplink.discrete_gaussian(1.0))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, uplink=uplink, reducer=fc.reduce.modular_sum(50))

    Source: Kairouz, Liu and Steinke (2021), "The Distributed Discrete Gaussian Mechanism for Federated Learning with
    Secure Aggregation", Algorithm 1, Theorem 1 and Proposition 22.
    """
    return _link(bits, rotate, "gaussian", noise_multiplier)


def skellam(noise_multiplier: float | Array, bits: int = 32, rotate: bool = False) -> Uplink:
    """``discrete_gaussian`` with Skellam noise, whose sum over clients is Skellam again.

    Args:
      noise_multiplier, bits, rotate: as for ``discrete_gaussian``.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.5), fc.uplink.skellam(1.0, bits=16, rotate=True))

    Source: Agarwal, Kairouz and Liu (2021), "The Skellam Mechanism for Differentially Private Federated Learning",
    Algorithm 1.
    """
    return _link(bits, rotate, "skellam", noise_multiplier)


def _link(bits: int, rotate: bool, noise: str, z: float | Array) -> Uplink:
    if (bits := checks.count("bits", bits)) not in TYPES:
        raise InvalidInput(f"An integer grid has 8, 16 or 32 bits, not {bits!r}.")
    checks.within("noise_multiplier", z, 0, finite=True)
    unsigned, signed = TYPES[bits]
    layout = functools.partial(_layout, bits=bits, rotate=rotate, noise=noise, z=z)

    def encode(update, ctx):
        x, restore = tree.ravel(update)
        grid, _ = _of(layout, x.size, ctx)
        x = bounded(x, ctx.bound)
        x = _rotated(x, ctx.round_key) if rotate else x
        rounding, noising = jax.random.split(ctx.key)
        steps = _rounded(x * jnp.float32(grid.levels), rounding, grid.l2 if noise else None)
        if noise == "gaussian":
            steps += discrete.discrete_gaussian(noising, x.shape, grid.stddev)
        elif noise == "skellam":
            steps += discrete.skellam(noising, x.shape, grid.stddev**2)
        return restore(steps.astype(unsigned)), {}

    def decode(aggregate, report, ctx):
        total, restore = tree.ravel(aggregate)
        if not jnp.issubdtype(total.dtype, jnp.unsignedinteger):
            raise InvalidInput(NEEDS_MODULAR_SUM)
        grid, step = _of(layout, total.size, ctx)
        steps = jax.lax.bitcast_convert_type(total.astype(unsigned), signed)  # the representative nearest to zero
        mean = steps.astype(jnp.float32) * (step / ctx.denominator)
        mean = _rotated_back(mean, ctx.round_key) if rotate else mean
        aborted = (ctx.weight < grid.clients) | (ctx.weight > grid.room)
        metrics = {"step": jnp.float32(step), "aborted": aborted.astype(jnp.float32)}
        if noise:
            of_came = jnp.sqrt(ctx.weight)
            metrics["noise_multiplier"] = of_came * jnp.float32(z) / math.sqrt(grid.clients)
            metrics["noise_std"] = of_came * jnp.float32(grid.stddev * step / ctx.denominator)
        return restore(jnp.where(aborted, 0, mean)), metrics

    promises = Promises(noise=Noise.SHARES if noise else None, needs_bound=True, grid=layout)
    return stateless(encode, decode, promises)


def _layout(
    dim: int, cohort_size: float, threshold: int, *, bits: int, rotate: bool, noise: str, z: float | Array
) -> Grid:
    """The finest grid whose sums do not wrap: ``room L s + room + z D sqrt(room / t) tail <= 2^(bits - 1)``.

    s is 1, or what a rotation makes of the largest element of a vector of norm 1 (Hoeffding's inequality over random
    signs), and tail that many standard deviations of noise (Bernstein's), so that all elements hold together.
    """
    traced = isinstance(z, jax.core.Tracer)
    lib, z = (jnp, z) if traced else (np, float(z))
    room = math.floor(cohort_size + 6 * math.sqrt(cohort_size) + 6)
    root = math.sqrt(dim)
    tail = math.sqrt(2 * math.log(4 * dim / WRAPS))
    spread = min(1.0, tail / math.sqrt(_power(dim))) if rotate else 1.0
    noisy = z * (math.sqrt(room / threshold) * tail)
    free = 2 ** (bits - 1) - 1 - room - noisy * root - (tail**2 / 6 if noise else 0)
    levels = lib.minimum(lib.floor(free / (room * spread + noisy)), FINEST)
    if not traced and levels < 1:
        raise InvalidInput(
            f"An integer grid of {bits} bits has no room for the sum of {room} clients"
            f"{' and their noise' if noise else ''}: give it more bits{'' if rotate else ', or rotate=True'}."
        )
    levels = lib.maximum(levels, 1.0)
    squared = lib.minimum(levels**2 + dim / 4 + levels + root / 2, (levels + root) ** 2)
    l2 = lib.sqrt(squared) * (1 + 1e-5)  # float32 measures it
    l1, stddev = l2 * lib.minimum(root, l2), z * l2 / math.sqrt(threshold)
    if not traced:  # otherwise NumPy's float64 would turn the message into float64
        levels, l2, l1, stddev = map(float, (levels, l2, l1, stddev))
    return Grid(levels, l2, l1, stddev, noise, threshold, room, dim)


def _of(layout, dim: int, ctx: Context) -> tuple[Grid, Array]:
    """The grid, and the length of its step in the units of the parameters."""
    if ctx.bound is None:
        raise InvalidInput(NO_BOUND)
    if ctx.threshold is None:
        raise InvalidInput(NEEDS_MODULAR_SUM)
    grid = layout(dim, ctx.denominator, ctx.threshold)
    return grid, ctx.bound / grid.levels


def _rounded(x: Array, key: Array, most: float | Array | None) -> Array:
    """Rounds each element to a neighbouring integer without bias; repeats while the norm exceeds a given one."""

    def attempt(key):
        return jnp.floor(x + jax.random.uniform(key, x.shape, x.dtype))

    if most is None:
        return attempt(key).astype(jnp.int32)

    def again(carry):
        key, _, attempts = carry
        key, now = jax.random.split(key)
        return key, attempt(now), attempts + 1

    def too_long(steps):
        length = tree.norm(steps)
        return length > jnp.asarray(most, length.dtype)

    def goes_on(carry):
        return too_long(carry[1]) & (carry[2] < ATTEMPTS)

    _, steps, _ = jax.lax.while_loop(goes_on, again, again((key, x, jnp.zeros((), jnp.int32))))
    return jnp.where(too_long(steps), jnp.trunc(x), steps).astype(jnp.int32)


def _rotated(x: Array, key: Array) -> Array:
    """Applies random signs and a Hadamard matrix to the first 2^k elements, then to the last 2^k.

    The result is orthogonal and needs no padding, because the two blocks overlap and each covers over half the vector.
    """
    for signs, block in _blocks(x, key):
        x = x.at[block].set(hadamard(signs * x[block]))
    return x


def _rotated_back(x: Array, key: Array) -> Array:
    for signs, block in reversed(_blocks(x, key)):
        x = x.at[block].set(signs * hadamard(x[block]))
    return x


def _blocks(x: Array, key: Array) -> list[tuple[Array, slice]]:
    power = _power(x.size)
    signs = random_signs(key, (2, power)).astype(x.dtype)
    return [(signs[0], slice(0, power)), (signs[1], slice(x.size - power, x.size))]


def _power(dim: int) -> int:
    return 1 << (dim.bit_length() - 1)
