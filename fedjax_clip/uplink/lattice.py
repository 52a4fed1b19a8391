"""Floating-point safe noise: whole steps of a lattice, added to whole steps of the same lattice.

Floating-point noise leaks more than real-valued noise would. float32 noise takes only a few million values, so an
output excludes every candidate from which it does not differ by such a value (Mironov 2012). Here all arithmetic is
exact until the noise is added: messages are truncated to multiples of ``step``, sums are of int32, and the noise is an
exact discrete Gaussian. The conversion back to floating point is post-processing.

**Why it is worth z.** Truncation toward zero lengthens no vector, so a message of norm C has at most C / step steps.
The noise is ``x1 + spread x2``, both discrete Gaussians of standard deviation ``WIDTH``. By Poisson's summation formula
``sum_k exp(-(k - y)^2 / (2 s^2))`` depends on y by a factor of ``1 +- 2 exp(-2 pi^2 s^2)``. The correction is 1e-34 at
s = 2 and smaller above. Up to such factors the noise therefore is

- a discrete Gaussian of variance ``WIDTH^2 (1 + spread^2)``, with ``s = WIDTH / sqrt(1 + spread^2)`` (Micciancio and
  Walter 2017, after Micciancio and Peikert 2013, Theorem 3.3), and so
- a normal variable y of variance ``WIDTH^2 (1 + spread^2) - SMOOTH^2``, rounded at random: to the whole number k with
  probability proportional to ``exp(-(k - y)^2 / (2 SMOOTH^2))`` (Peikert 2010, Theorem 3.1).

Such rounding commutes with adding whole steps. So a release is post-processing of the Gaussian mechanism with standard
deviation z C. Every accountant of Gaussian mechanisms therefore applies unchanged, with sampling and over rounds.

**What is lost.** The table draws each of the two variables within a statistical distance of 2^-95. With the factors
above, that is under 1e-28 a coordinate: a thousand rounds of a million coordinates add 1e-19 to delta. Each message is
measured here once more, whatever clip came before, and shortened to C, less 1e-5 of it for float32's errors. The noise
is only as random as the bits of the key.

Source: Canonne, Kamath and Steinke (2020), "The Discrete Gaussian for Differential Privacy"; Mironov (2012), "On
Significance of the Least Significant Bits for Differential Privacy"; Micciancio and Walter (2017), "Gaussian Sampling
over the Integers".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import tree
from fedjax_clip.core.types import Array, PyTree
from fedjax_clip.uplink import alias
from fedjax_clip.uplink.mechanism import Mechanism

WIDTH = 1024  # standard deviation of each of the two draws
SPREAD = 511  # at most, so that the first draw smooths the steps of the second
SMOOTH = 2.0
ROOM = 2.0**30  # steps for a sum of messages: half of int32; the noise needs 2^23
MARGIN = 1e-5  # how far float32 may underestimate a norm, relatively


class Lattice(NamedTuple):
    """Steps for a sum of bounded messages and its noise.

    Attributes:
      bound: C, L2 norm of one message.
      levels: steps in C.
      spread: of the noise, whose standard deviation is ``WIDTH sqrt(1 + spread^2)`` steps.
      noisy: whether there is noise.
    """

    bound: Array
    levels: Array
    spread: Array
    noisy: Array

    @property
    def step(self) -> Array:
        """Length of a step, in the units of the messages."""
        return self.bound / self.levels

    @property
    def stddev(self) -> Array:
        """Standard deviation of the noise, in the units of the messages."""
        return jnp.where(self.noisy, _width(self.spread) * self.step, 0)


def lattice(bound: float | Array, noise_multiplier: float | Array, count: float | Array) -> Lattice:
    """The finest lattice, up to 2^19 steps in the noise, on which the sum of a cohort does not wrap around.

    int32 wraps around if more than ``2 (sqrt(n) + 3)^2`` messages of norm C point into the same coordinate. The sum is
    then wrong, but no less private. The noise is at least ``1e-6 (sqrt(n) + 3)^2`` bounds wide, because the table has
    no narrower noise.

    Client and server compute the lattice separately and must agree. A compiler may or may not round a product before an
    addition, so no product is added to anything. Where the numbers are known, the lattice is computed before the
    program.

    Args:
      bound: C, norm of a message.
      noise_multiplier: z, of the sum's noise; may be traced.
      count: n, the expected number of messages.
    """
    known = not any(isinstance(x, jax.core.Tracer) for x in (noise_multiplier, count))
    lib: Any = np if known else jnp
    z, count = lib.asarray(noise_multiplier, lib.float32), lib.asarray(count, lib.float32)
    most = lib.float32(ROOM) / lib.square(lib.sqrt(count) + 3)
    widths = lib.minimum(z, 1e9) * most / WIDTH
    spread = lib.floor(lib.sqrt(lib.maximum((widths - 1) * (widths + 1), 0)))
    spread = lib.minimum(spread, SPREAD).astype(lib.int32)
    levels = lib.where(z > 0, lib.minimum(most, _width(spread) / lib.where(z > 0, z, 1)), most)
    f32 = jnp.float32
    return Lattice(
        jnp.asarray(bound, f32), jnp.asarray(levels, f32), jnp.asarray(spread, jnp.int32), jnp.asarray(z > 0)
    )


def is_zero(noise_multiplier: float | Array) -> bool:
    """Whether z is known to be 0, which needs no lattice; a traced zero gives a lattice without noise."""
    return not isinstance(noise_multiplier, jax.core.Tracer) and float(noise_multiplier) == 0


def _width(spread: Any) -> Any:
    """Standard deviation, in steps, of the normal variable whose rounding is the noise."""
    lib: Any = jnp if isinstance(spread, jax.Array) else np
    return lib.sqrt(WIDTH**2 * (1 + lib.square(spread.astype(lib.float32))) - lib.float32(SMOOTH**2))


def truncated(messages: PyTree, on: Lattice) -> PyTree:
    """Truncates toward zero to whole steps, int32; NaN becomes zero.

    Their norm is at most ``levels``, whatever earlier links promised of the message.
    """
    levels = on.levels * jnp.where(on.noisy, 1 - MARGIN, 1)
    return jax.tree.map(lambda x: (x * levels).astype(jnp.int32), bounded(messages, on.bound))


def bounded(messages: PyTree, bound: Array) -> PyTree:
    """float32 ``messages / bound``, shortened to norm 1 if longer; zeros if not finite.

    The noise scales with the bound, and its sensitivity rests on this norm alone. It does not rest on a link's promise,
    nor on a clip's own measurement, which half precision or squares that underflow in float32 may spoil.
    """

    def finite(x: Array) -> Array:
        return jnp.where(jnp.isfinite(x), x, 0)

    units = jax.tree.map(lambda x: finite(x.astype(jnp.float32) / bound), messages)
    longer = jnp.maximum(tree.norm(units), 1).astype(jnp.float32)
    return jax.tree.map(lambda x: finite(x / longer), units)


def noise(key: Array, like: PyTree, on: Lattice) -> PyTree:
    """Discrete Gaussian noise, int32 in the shapes of ``like``; zeros if the lattice has no noise."""
    _, restore = tree.ravel(like)
    fine, coarse = alias.draw(key, tree.size(like), alias.gaussian_table(float(WIDTH)), 2)
    return restore(jax.lax.optimization_barrier(jnp.where(on.noisy, fine + on.spread * coarse, 0)))


def noised(key: Array, totals: Array, bound: float | Array, z: float | Array, count: float | Array) -> Array:
    """Adds noise to a few floating-point sums, after rounding them to whole steps; returns float32.

    Rounding moves each sum by half a step at most; the bound has up to ``2^19 / z`` steps. Bits and other whole numbers
    lose nothing else. Other sums keep the error of their float32 addition.

    Args:
      totals: sums of a cohort.
      bound: L2 norm by which one client moves all of them together.
      z: standard deviation of the noise over the bound; ``totals`` stay as they are where it is 0.
      count: n, the expected number of clients.
    """
    on = lattice(bound, z, count)
    steps = jnp.clip(jnp.round(totals / on.step), -ROOM, ROOM).astype(jnp.int32)
    return jnp.where(on.noisy, values(steps + noise(key, totals, on), on.step), totals)


def values(steps: PyTree, step: Array) -> PyTree:
    """float32 ``step`` times steps: the released values."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) * step.astype(jnp.float32), steps)


def diagonal(mechanism: Mechanism) -> float:
    """``C[0, 0]``: if Z is this multiple of whole steps, the fresh noise in ``C^-1 Z`` is in whole steps."""
    return float(np.asarray(mechanism.strategy(1))[0, 0])


def init_correlated(mechanism: Mechanism, params: PyTree) -> PyTree:
    """The mechanism's state before round 0."""
    return mechanism.init(_rows(mechanism, params))


def correlated(mechanism: Mechanism, steps: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
    """``C^-1 Z`` in whole steps, with Z ``diagonal`` times the given steps: this round's steps plus a rounded past.

    The past is a function of earlier noise alone. So for each value of the messages exactly one Z gives an output, and
    no output excludes a value. A mechanism of whole numbers (``tree``) is exact.

    One that computes in floating point (``toeplitz``, ``banded``) is not. Its past is rounded by e in each coordinate
    and round, so the messages' sensitivity is that of ``C (x + e - e')``. For d coordinates and T rounds, this exceeds
    that of ``C x`` by about ``||C|| sqrt(d T)`` steps at most, where the noise has up to 2^19 steps. If roundings
    behave like independent ones, they add at most ``||C||^2 d T / 4`` to its square. The accounting leaves this out.
    """
    rows, unit = _rows(mechanism, steps), diagonal(mechanism)
    past, _ = mechanism.next(jax.tree.map(jnp.zeros_like, rows), state)
    now = jax.tree.map(lambda z, r: z if z.dtype == r.dtype else unit * z.astype(r.dtype), steps, rows)
    _, state = mechanism.next(now, state)
    return jax.tree.map(lambda z, p: z + jnp.round(p).astype(jnp.int32), steps, past), state


def _rows(mechanism: Mechanism, like: PyTree) -> PyTree:
    """Zeros of the type in which the mechanism computes."""
    dtype = jnp.int32 if mechanism.whole else jnp.float32
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), like)
