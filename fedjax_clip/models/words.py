"""Text classification without order."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class BagOfWords(nn.Module):
    """Logits of the mean of a text's word embeddings.

    Takes words ``int [B, T]``, 0 for padding, to ``[B, num_outputs]``.

    Example:
      >>> params = fc.models.BagOfWords(3, 2**14).init(jax.random.key(0), np.zeros((1, 32), np.int32))

    Source: Joulin et al. (2017), "Bag of Tricks for Efficient Text Classification" (fastText), without its n-grams.
    """

    num_outputs: int
    vocabulary: int
    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        there = (x > 0)[..., None]
        words = jnp.sum(jnp.where(there, nn.Embed(self.vocabulary, self.width)(x), 0), 1)
        return nn.Dense(self.num_outputs)(words / jnp.maximum(jnp.sum(there, 1), 1).astype(words.dtype))
