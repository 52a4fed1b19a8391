"""Convolutions and max-pooling on 2×2 blocks of pixels: the form that fills the lanes of a TPU.

A TPU multiplies tiles of 128 by 128 channels, so maps of 32 channels leave most of a tile empty. Here the four pixels
of a block are channels: ``[B, H, W, C]`` becomes ``[B, H / 2, W / 2, 4 C]``, and a kernel of 3×3 pixels becomes one of
2×2 blocks (3×3 with an odd padding), with zeros where a pixel of the output does not see one of the input. The sums
are the same but for rounding, the multiplications more, the tiles fewer.

Between two such layers ``join`` and ``split`` cancel, so a map keeps this form from layer to layer.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_clip.core.convolution import conv_general_dilated
from fedjax_clip.core.types import Array

LANES = 128  # channels in a tile of a TPU

Pairs = Sequence[tuple[int, int]]


def split(x: Array) -> Array:
    """``[B, H, W, C] -> [B, H / 2, W / 2, 4 C]``, the channels of a block's pixels row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


def join(x: Array) -> Array:
    """The inverse of ``split``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def pays(image: Sequence[int], kernel: Sequence[int], padding: Pairs) -> bool:
    """Whether a convolution can be written in blocks and then multiplies fewer tiles.

    Args:
      image: shape ``[B, H, W, I]``.
      kernel: shape ``[*window, I, O]``; strides and dilations are 1.
      padding: pixels before and after ``H`` and ``W``.
    """
    if len(image) != 4 or len(kernel) != 4:
        return False
    sizes = [(size, size + sum(pad) - window + 1) for size, window, pad in zip(image[1:3], kernel, padding)]
    if any(size % 2 or out % 2 or out <= 0 for size, out in sizes):
        return False
    taps = [_taps(window, low) for window, (low, _) in zip(kernel, padding)]

    def tiles(pixels: int, window: Sequence[int]) -> int:  # for four pixels of the output
        area, (channels, features) = window[0] * window[1], (-(-pixels * c // LANES) for c in kernel[2:])
        return area * channels * features * 4 // pixels

    return tiles(4, taps) < tiles(1, kernel)


def convolution(x: Array, kernel: Array, padding: Pairs, precision: jax.lax.PrecisionLike = None) -> Array:
    """The convolution of ``pays``, from blocks ``[B, H / 2, W / 2, 4 I]`` to blocks of its output.

    Args:
      x: blocks of the input.
      kernel: ``[*window, I, O]``, of pixels.
      padding: in pixels.
      precision: of ``jax.lax.conv_general_dilated``.
    """
    pads, taps = [], []
    for axis, (low, high) in enumerate(padding):
        window, size = kernel.shape[axis], 2 * x.shape[axis + 1]
        taps.append(_taps(window, low))
        before, out = (low + low % 2) // 2, (size + low + high - window + 1) // 2
        pads.append((before, out - 1 + taps[-1] - size // 2 - before))
    # The output's pixel q of a block sees the input from pixel q on: one kernel for each, padded by q in front.
    for axis in (1, 0):
        spare, odd = 2 * taps[axis] - kernel.shape[axis], padding[axis][0] % 2
        shifts = [[(0, 0)] * axis + [(odd + q, spare - odd - q)] + [(0, 0)] * (3 - axis) for q in (0, 1)]
        kernel = jnp.concatenate([jnp.pad(kernel, shift) for shift in shifts], -1)
    channels, features = kernel.shape[2:]
    kernel = kernel.reshape(taps[0], 2, taps[1], 2, channels, features).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(*taps, 4 * channels, features)
    # Unrolled: of clients under vmap, XLA would group the channels, and then compile for minutes and gain nothing.
    numbers = ("NHWC", "HWIO", "NHWC")
    return conv_general_dilated(x, kernel, (1, 1), pads, None, None, numbers, precision=precision, lowering="unrolled")


def per_channel(x: Array) -> Array:
    """``[C] -> [4 C]``: one number a channel, for each pixel of a block."""
    return jnp.tile(x, 4)


def _taps(window: int, low: int) -> int:
    """How many blocks a block of the output sees along one axis; an odd padding begins in the middle of one."""
    return (window + low % 2 + 2) // 2


@jax.custom_vjp
def max_pool(x: Array) -> Array:
    """``[B, h, w, 4 C] -> [B, h, w, C]``: the maximum of a block's four pixels.

    In a tie the first value gets the gradient; NaN stays NaN.
    """
    half = jnp.maximum(*jnp.split(x, 2, -1))
    return jnp.maximum(*jnp.split(half, 2, -1))


def _push(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = max_pool(x)
    return y, (x, y)


def _pull(saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    x, y = saved
    first, *rest = ((pixel == y) | (pixel != pixel) for pixel in jnp.split(x, 4, -1))
    winner = jnp.where(first, 0, jnp.where(rest[0], 1, jnp.where(rest[1], 2, 3)))
    # Full lanes: XLA fuses this into the convolution's gradients, so that the gradient of x is never stored.
    pixel = jax.lax.broadcasted_iota(winner.dtype, x.shape, x.ndim - 1) // y.shape[-1]
    every = [jnp.concatenate([values] * 4, -1) for values in (winner, dy)]
    return (jnp.where(every[0] == pixel, every[1], 0),)


max_pool.defvjp(_push, _pull)
