"""Matrix factorisation with private user factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Factorisation(nn.Module):
    """``mean + bias + item_bias[i] + <user, item[i]>`` of items ``[B]``, for the one user who uses it.

    The leaves ``params/user`` and ``params/user_bias`` are the user's, so ``private="user"`` keeps them at the client.
    They begin at 0, so a new user's predictions come from the items' biases.

    Example:
      >>> params = fc.models.Factorisation(1128, 8).init(jax.random.key(0), np.zeros(1, np.int32))

    Source: Koren, Bell and Volinsky (2009), "Matrix Factorization Techniques for Recommender Systems", equation 5.
    """

    num_items: int
    rank: int
    mean: float = 0.0

    @nn.compact
    def __call__(self, item: jax.Array) -> jax.Array:
        user = self.param("user", nn.initializers.zeros, (self.rank,), jnp.float32)
        bias = self.param("user_bias", nn.initializers.zeros, (), jnp.float32)
        factors = nn.Embed(self.num_items, self.rank, embedding_init=nn.initializers.normal(0.1), name="item")(item)
        item_bias = nn.Embed(self.num_items, 1, embedding_init=nn.initializers.zeros, name="item_bias")(item)
        return self.mean + bias + item_bias[:, 0] + factors @ user
