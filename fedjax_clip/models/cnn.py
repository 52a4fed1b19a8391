"""Convolutional networks."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from fedjax_clip.models.conv import Conv


class CNN(nn.Module):
    """3×3 convolutions (VALID), each with a ReLU; one 2×2 max-pool; a dense layer with a ReLU; logits. No dropout.

    Takes images ``[B, H, W, C]`` to ``[B, num_outputs]``; 28×28×1 images and the defaults make 1.2 million parameters.

    Example:
      >>> shapes = jax.eval_shape(fc.models.CNN(62).init, key, np.zeros((1, 28, 28, 1)))

    Source: Caldas et al. (2018), "LEAF"; Reddi et al. (2021), "Adaptive Federated Optimization" (without its dropout).
    """

    num_outputs: int
    channels: Sequence[int] = (32, 64)
    dense: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, width in enumerate(self.channels, 1):
            pooled = layer == len(self.channels)
            x = Conv(width, (3, 3), padding="VALID", activation=nn.relu, max_pool=pooled)(x)
        x = nn.relu(nn.Dense(self.dense)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_outputs)(x)
