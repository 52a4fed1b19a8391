"""A convolution that stays fast inside XLA's loops on CPU: sums of matrix products over shifted rows.

``lax.conv`` inside a ``while`` falls to a naive loop there, 40 times slower.
"""

import jax
import jax.numpy as jnp


def conv(x, kernel):
    """``[B, H, W, I]`` with ``[h, w, I, O]``, stride 1, no padding."""
    if x.shape[-1] == 1:  # plain im2col is best for one channel
        h, w, _, out = kernel.shape
        rows, cols = x.shape[1] - h + 1, x.shape[2] - w + 1
        patches = jnp.concatenate([x[:, i : i + rows, j : j + cols] for i in range(h) for j in range(w)], axis=-1)
        return patches @ kernel.reshape(-1, out)
    return _conv(x, kernel)


@jax.custom_vjp
def _conv(x, kernel):
    patches = _row_patches(x, kernel.shape[1])
    rows = x.shape[1] - kernel.shape[0] + 1
    flat = kernel.reshape(kernel.shape[0], -1, kernel.shape[3])
    return sum(patches[:, i : i + rows] @ flat[i] for i in range(kernel.shape[0]))


def _forward(x, kernel):
    return _conv(x, kernel), (x, kernel)


def _backward(saved, dy):
    x, kernel = saved
    h, w, _, out = kernel.shape
    dx = jax.lax.conv_general_dilated(
        dy,
        kernel[::-1, ::-1].swapaxes(2, 3),
        (1, 1),
        [(h - 1, h - 1), (w - 1, w - 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    patches = jax.lax.optimization_barrier(_row_patches(x, w))  # else XLA computes them again for each product
    rows = dy.shape[1]
    flat = dy.reshape(-1, out)
    products = [patches[:, i : i + rows].reshape(-1, patches.shape[-1]).T @ flat for i in range(h)]
    return dx, jnp.stack(products).reshape(kernel.shape)


def _row_patches(x, width):
    cols = x.shape[2] - width + 1
    return jnp.concatenate([x[:, :, j : j + cols] for j in range(width)], axis=-1)


_conv.defvjp(_forward, _backward)
