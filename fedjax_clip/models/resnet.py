"""Residual networks."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_clip.models.conv import Conv


class ResNet(nn.Module):
    """ResNet-18 for small pictures, with group norm in place of batch norm: clients' batches share no statistics.

    A 3×3 stem, four stages of two basic blocks, the later ones at half the resolution, mean over the picture, logits.
    Takes ``[B, H, W, C]`` to ``[B, num_outputs]``; 32×32×3 pictures and the defaults make 11.2 million parameters.

    Example:
      >>> shapes = jax.eval_shape(fc.models.ResNet(10).init, key, np.zeros((1, 32, 32, 3)))

    Source: He et al. (2016); group norm of two groups as in Hsieh et al. (2020) and Reddi et al. (2021).
    """

    num_outputs: int
    blocks: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    groups: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.GroupNorm(self.groups)(Conv(self.width, (3, 3), use_bias=False)(x)))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                x = _Block(2**stage * self.width, 2 if stage and not block else 1, self.groups)(x)
        return nn.Dense(self.num_outputs)(jnp.mean(x, (1, 2)))


class _Block(nn.Module):
    width: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        y = nn.relu(nn.GroupNorm(self.groups)(Conv(self.width, (3, 3), strides, use_bias=False)(x)))
        y = nn.GroupNorm(self.groups)(Conv(self.width, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.GroupNorm(self.groups)(Conv(self.width, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)
