"""Fully connected networks."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Flattens its input and applies a ReLU after every hidden layer; without hidden layers it is a linear model.

    Args:
      hidden: widths of the hidden layers.
      num_outputs: of the last layer.

    Example:
      >>> params = fc.models.MLP((128,), 10).init(jax.random.key(0), np.zeros((1, 8, 8, 1)))
    """

    hidden: Sequence[int]
    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_outputs)(x)
