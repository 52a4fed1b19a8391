"""A decoder-only Transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Transformer(nn.Module):
    """Next token: learned positions, pre-norm blocks of causal attention and a GELU layer four times as wide, logits.

    Takes tokens ``int [B, T]``, T at most ``length``, to logits ``[B, T, vocabulary]``; those at ``t`` have seen the
    tokens up to ``t``. A block's matrices are called query, key, value, out, up and down. No dropout.

    Example:
      >>> shapes = jax.eval_shape(fc.models.Transformer(128).init, key, np.zeros((1, 80), np.int32))

    Source: Radford et al. (2019), "Language Models are Unsupervised Multitask Learners".
    """

    vocabulary: int
    length: int = 80
    width: int = 128
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, name="tokens")(x)
        x += nn.Embed(self.length, self.width, name="positions")(jnp.arange(x.shape[1], dtype=jnp.int32))[None]
        for i in range(self.layers):
            x = _Block(self.heads, name=f"block{i}")(x)
        return nn.Dense(self.vocabulary, name="logits")(nn.LayerNorm()(x))


class _Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, h = x.shape[-1], nn.LayerNorm()(x)
        query, key, value = (
            nn.Dense(width, name=name)(h).reshape(*x.shape[:-1], self.heads, width // self.heads)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x += nn.Dense(width, name="out")(attended.reshape(x.shape))
        h = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(h)
