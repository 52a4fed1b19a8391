"""A convolution for Flax, and a pooling, that are also fast on a CPU."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from fedjax_clip.core.convolution import conv_general_dilated
from fedjax_clip.core.types import Array

Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
Conv.__doc__ = """``flax.linen.Conv``, parameter for parameter, that stays fast in a loop on a CPU and under ``vmap``.

Example:
  >>> layer = fc.models.Conv(32, (3, 3))
  >>> variables = layer.init(key, np.zeros((1, 8, 8, 1)))
"""


def max_pool_2x2(x: Array) -> Array:
    """``flax.linen.max_pool(x, (2, 2), strides=(2, 2))`` as a maximum of four strided slices: faster on a CPU.

    In a tie the first value gets the gradient, as in ``max_pool``; NaN stays NaN.

    Args:
      x: ``[..., H, W, C]``; an odd last row or column is left out (VALID).

    Returns:
      ``[..., H // 2, W // 2, C]``.

    Example:
      >>> fc.models.max_pool_2x2(np.zeros((1, 28, 28, 3), np.float32)).shape
      (1, 14, 14, 3)
    """
    height, width = (size // 2 * 2 for size in x.shape[-3:-1])
    corners = (x[..., i:height:2, j:width:2, :] for i in (0, 1) for j in (0, 1))
    return functools.reduce(lambda a, b: jnp.where((a >= b) | (a != a), a, b), corners)
