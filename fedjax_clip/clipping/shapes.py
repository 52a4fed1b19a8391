"""The shape of a clip: the factor by which an update over its threshold is scaled."""

from collections.abc import Callable

import jax.numpy as jnp

from fedjax_clip.core import checks
from fedjax_clip.core.types import Array

Shape = Callable[[Array, Array], Array]  # (norm, threshold) -> factor


def bounding(shape: Shape) -> Shape:
    """Marks a shape under which no norm exceeds its threshold."""
    shape.bounds = True  # type: ignore[attr-defined] # a mark, which chains of other functions do not have
    return shape


def hard() -> Shape:
    """``min(1, threshold / norm)``. Guarantee: norm at most the threshold, direction kept.

    Example:
      >>> fc.clipping.clip(1.0, shape=fc.clipping.hard())  # the default
    """

    def factor(norm, threshold):
        over = ~(norm <= threshold)  # also for a NaN
        return jnp.where(over, threshold / jnp.where(over, norm, 1.0), 1.0)  # whose gradient is finite at zero

    return bounding(factor)


def smooth(alpha: float | Array = 1.0) -> Shape:
    """``threshold / (alpha + norm)``. Guarantee: norm under the threshold; smooth, and never the identity.

    Args:
      alpha: positive; the norm at which half of the threshold is left.

    Raises:
      InvalidInput: an alpha that is not a positive number.

    Example:
      >>> fc.clipping.clip(1.0, shape=fc.clipping.smooth(0.5))
    """
    checks.positive("smooth", alpha)
    return bounding(lambda norm, threshold: threshold / (alpha + norm))


def normalise() -> Shape:
    """``threshold / norm``. Guarantee: norm equal to the threshold; zero stays zero.

    Example:
      >>> fc.clipping.clip(1.0, scope=fc.clipping.layer(), shape=fc.clipping.normalise())
    """
    return bounding(lambda norm, threshold: jnp.where(norm == 0, 0.0, threshold / jnp.where(norm == 0, 1.0, norm)))


def delta_floor(delta: float | Array) -> Shape:
    """``min(1, max(delta, threshold / norm))``. Guarantee: no update shrinks to less than delta of itself; unbounded.

    Args:
      delta: from 0 (a hard clip) to 1 (no clip).

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> fc.clipping.clip(1.0, shape=fc.clipping.delta_floor(0.01))

    Source: "δ-GClip", Tucat et al. (2024): with delta > 0 gradient descent converges for deep networks of some width.
    """
    checks.within("delta", delta, 0, 1)
    clip = hard()
    return lambda norm, threshold: jnp.maximum(delta, clip(norm, threshold))


def two_sided(lower: float | Array = 0.0) -> Shape:
    """``clamp(norm, lower, threshold) / norm``, zero at zero; with the scope ``element`` it is Bi²Clip's clip.

    Guarantee: norm between the bounds, except zero, which stays zero.

    Args:
      lower: the least norm of a nonzero result; at most the threshold.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> fc.clipping.clip(0.1, scope=fc.clipping.element(), shape=fc.clipping.two_sided(1e-4))

    Source: Lee et al. (2025), "Efficient Distributed Optimization under Heavy-Tailed Noise" (TailOPT), Bi²Clip.
    """

    checks.within("lower", lower, 0)

    def factor(norm, threshold):
        safe = jnp.where(norm == 0, 1.0, norm)
        return jnp.where(norm == 0, 0.0, jnp.clip(norm, lower, threshold) / safe)

    return bounding(factor)
