"""A convolution for Flax, in the form that each platform computes fastest, and a pooling."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import blocks
from fedjax_clip.core.convolution import conv_general_dilated
from fedjax_clip.core.types import Array

_NUMBERS = ("NHWC", "HWIO", "NHWC")
_INCREASING = (nn.relu, nn.leaky_relu, nn.sigmoid, nn.softplus, nn.tanh)  # commute with a maximum


class Conv(nn.Conv):
    """``flax.linen.Conv``, parameter for parameter, that stays fast in a loop on a CPU and under ``vmap``.

    With an ``activation``, a TPU computes layers of few channels on 2×2 blocks of pixels, which fill its lanes
    (``core/blocks.py``): the same result up to rounding, in fewer cycles. Give activation and pooling here rather than
    apply them to the result, because the map then keeps this form from layer to layer. On other platforms the layer is
    ``max_pool_2x2(activation(Conv(...)(x)))``, bit by bit.

    Attributes:
      activation: an elementwise function of the output, such as ``nn.relu``; ``None``: no activation.
      max_pool: whether ``max_pool_2x2`` follows the activation.

    Example:
      >>> layer = fc.models.Conv(32, (3, 3), activation=nn.relu, max_pool=True)
      >>> variables = layer.init(key, np.zeros((1, 8, 8, 1)))
    """

    conv_general_dilated: Callable[..., Array] | None = conv_general_dilated
    activation: Callable[[Array], Array] | None = None
    max_pool: bool = False

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        activation, padding = self.activation, self._padding(inputs)
        if activation is None or padding is None:
            return self._finished(super().__call__(inputs))
        assert not isinstance(self.kernel_size, int)
        shape = (*self.kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        args = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)

        def pixels(x, kernel, bias):
            y = conv_general_dilated(x, kernel, (1, 1), padding, None, None, _NUMBERS, precision=self.precision)
            return self._finished(_plus(y, bias))

        def in_blocks(x, kernel, bias):
            y = blocks.convolution(blocks.split(x), kernel, padding, self.precision)
            if self.max_pool and activation in _INCREASING:  # the same, on a quarter of the numbers
                y = blocks.max_pool(y)
                return activation(_plus(y, bias))
            y = activation(_plus(y, None if bias is None else blocks.per_channel(bias)))
            return blocks.max_pool(y) if self.max_pool else blocks.join(y)

        return jax.lax.platform_dependent(*args, tpu=in_blocks, default=pixels)

    def _finished(self, y: Array) -> Array:
        y = y if self.activation is None else self.activation(y)
        return max_pool_2x2(y) if self.max_pool else y

    def _padding(self, inputs: Array) -> tuple[tuple[int, int], ...] | None:
        """Pixels before and after each axis, if blocks pay; ``None`` if they do not."""
        size, padding, shape = self.kernel_size, self.padding, np.shape(inputs)
        plain = all(np.all(np.array(by or 1) == 1) for by in (self.strides, self.input_dilation, self.kernel_dilation))
        usual = plain and self.feature_group_count == 1 and self.mask is None and len(shape) == 4
        if not usual or isinstance(size, int) or len(size) != 2 or padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
            return None
        padding = nn.linear.canonicalize_padding(padding, 2)
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(shape[1:3], size, (1, 1), padding)
        padding = tuple((int(low), int(high)) for low, high in padding)
        return padding if blocks.pays(shape, (*size, shape[-1], self.features), padding) else None


def _plus(y: Array, bias: Array | None) -> Array:
    """``y [..., C] + bias [C]``, of equal ranks."""
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def max_pool_2x2(x: Array) -> Array:
    """``flax.linen.max_pool(x, (2, 2), strides=(2, 2))`` as a maximum of four strided slices: faster on a CPU.

    In a tie the first value gets the gradient, as in ``max_pool``; NaN stays NaN. After a convolution of few channels
    ``Conv(..., max_pool=True)`` is the same, and faster on a TPU.

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
