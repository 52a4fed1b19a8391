"""Recurrent networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class CharLSTM(nn.Module):
    """Next character: embedding, LSTM layers, logits.

    Takes characters ``int [B, T]`` to logits ``[B, T, vocabulary]``; those at ``t`` have seen the characters up to
    ``t``.

    Example:
      >>> shapes = jax.eval_shape(fc.models.CharLSTM(128).init, key, np.zeros((1, 80), np.int32))

    Source: Caldas et al. (2018), "LEAF", Shakespeare; as in Reddi et al. (2021), all positions are predicted.
    """

    vocabulary: int
    embedding: int = 8
    hidden: int = 256
    layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.embedding)(x)
        for _ in range(self.layers):
            x = jnp.asarray(nn.RNN(nn.OptimizedLSTMCell(self.hidden))(x))
        return nn.Dense(self.vocabulary)(x)
