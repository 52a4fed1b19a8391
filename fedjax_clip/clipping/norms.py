"""The norm of a clip: what measures an update."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from fedjax_clip.core import tree
from fedjax_clip.core.types import Array


class Norm(NamedTuple):
    """``finish(join over leaves of reduce over axes of map(x))``.

    Attributes:
      map: applied to each number.
      reduce: combines the numbers of a leaf.
      join: combines two leaves.
      finish: applied to the result.
      widest: ``n -> the largest L2 norm`` of n numbers whose norm is 1; ``None`` if unknown.

    Example:
      >>> fc.clipping.clip(1.0, norm=fc.clipping.l1())
    """

    map: Callable[[Array], Array]
    reduce: Callable[..., Array]
    join: Callable[[Array, Array], Array]
    finish: Callable[[Array], Array]
    widest: Callable[[int], float] | None = None


def l1() -> Norm:
    """``sum |x|``.

    Example:
      >>> fc.clipping.clip(1.0, norm=fc.clipping.l1())
    """
    return Norm(jnp.abs, jnp.sum, jnp.add, lambda total: total, lambda n: 1.0)


def l2() -> Norm:
    """``sqrt(sum |x|^2)``, in float32 or better; its gradient at zero is zero.

    Example:
      >>> fc.clipping.clip(1.0, norm=fc.clipping.l2())
    """
    return Norm(lambda x: jnp.square(jnp.abs(x)), jnp.sum, jnp.add, tree.safe_sqrt, lambda n: 1.0)


def linf() -> Norm:
    """``max |x|``.

    Example:
      >>> fc.clipping.clip(1.0, norm=fc.clipping.linf())
    """
    return Norm(jnp.abs, jnp.max, jnp.maximum, lambda total: total, math.sqrt)
