"""Residual networks."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.models.conv import Conv
from fedjax_clip.models.norms import BatchNorm


class ResNet(nn.Module):
    """ResNet-18 for small pictures, with group norm in place of batch norm: clients' batches share no statistics.

    A 3×3 stem, four stages of two basic blocks, the later ones at half the resolution, mean over the picture, logits.
    Takes ``[B, H, W, C]`` to ``[B, num_outputs]``; 32×32×3 pictures and the defaults make 11.2 million parameters.
    With ``norm="batch"`` it takes the example weights in training as well, see ``BatchNorm``.

    Attributes:
      num_outputs: number of logits.
      blocks: number of blocks of each stage.
      width: channels of the first stage.
      groups: of the group norms.
      norm: ``"group"`` or ``"batch"``.

    Example:
      >>> shapes = jax.eval_shape(fc.models.ResNet(10).init, key, np.zeros((1, 32, 32, 3)))

    Source: He et al. (2016); group norm of two groups as in Hsieh et al. (2020) and Reddi et al. (2021).
    """

    num_outputs: int
    blocks: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    groups: int = 2
    norm: str = "group"

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        if self.norm not in ("group", "batch"):
            raise InvalidInput(f"norm must be 'group' or 'batch', not {self.norm!r}.")

        def normalised(x: jax.Array) -> jax.Array:
            return BatchNorm()(x, weights) if self.norm == "batch" else nn.GroupNorm(self.groups)(x)

        x = nn.relu(normalised(Conv(self.width, (3, 3), use_bias=False)(x)))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                width, stride = 2**stage * self.width, 2 if stage and not block else 1
                x = _Block(width, stride, self.groups, self.norm)(x, weights)
        return nn.Dense(self.num_outputs)(jnp.mean(x, (1, 2)))


class _Block(nn.Module):
    width: int
    stride: int
    groups: int
    norm: str

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None) -> jax.Array:
        strides = (self.stride, self.stride)

        def normalised(x: jax.Array) -> jax.Array:
            return BatchNorm()(x, weights) if self.norm == "batch" else nn.GroupNorm(self.groups)(x)

        y = nn.relu(normalised(Conv(self.width, (3, 3), strides, use_bias=False)(x)))
        y = normalised(Conv(self.width, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = normalised(Conv(self.width, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)
