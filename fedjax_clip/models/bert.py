"""Encoders of the BERT family."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_clip.core.types import Array
from fedjax_clip.models.dense import Dense


class Bert(nn.Module):
    """Hidden states of a text: learned positions, blocks of attention and a GELU layer, each with a norm behind it.

    Takes tokens ``int [B, T]``, 0 for padding, to ``[B, T, width]``. No token sees padding. A block's matrices
    are called query, key, value, out, up and down. The defaults are those of all-MiniLM-L6-v2. No dropout, no pooler.

    Attributes:
      positions: the longest text, in tokens.
      types: of segments; all tokens here are of the first.
      epsilon: of the norms.
      dtype: of the arithmetic, by default that of the parameters.

    Example:
      >>> model = fc.models.Bert(100, width=16, hidden=32, layers=2, heads=4, positions=32)
      >>> params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))

    Source: Devlin et al. (2019), "BERT".
    """

    vocabulary: int
    width: int = 384
    hidden: int = 1536
    layers: int = 6
    heads: int = 12
    positions: int = 512
    types: int = 2
    epsilon: float = 1e-12
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        there = tokens != 0
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="tokens")(tokens)
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x += nn.Embed(self.positions, self.width, dtype=self.dtype, name="positions")(places)
        x += nn.Embed(self.types, self.width, dtype=self.dtype, name="types")(jnp.zeros_like(places))
        x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
        for i in range(self.layers):
            x = _Block(self.hidden, self.heads, self.epsilon, self.dtype, name=f"block{i}")(x, there[:, None, None])
        return x


class _Block(nn.Module):
    hidden: int
    heads: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        width = x.shape[-1]

        def norm(name: str, x: Array) -> Array:
            return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)(x)

        query, key, value = (
            Dense(width, dtype=self.dtype, name=name)(x).reshape(*x.shape[:-1], self.heads, width // self.heads)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask)
        x = norm("attention_norm", x + Dense(width, dtype=self.dtype, name="out")(attended.reshape(x.shape)))
        h = nn.gelu(Dense(self.hidden, dtype=self.dtype, name="up")(x), approximate=False)
        return norm("mlp_norm", x + Dense(width, dtype=self.dtype, name="down")(h))


class TextClassifier(nn.Module):
    """Logits of a text by an encoder's mean hidden state and a new linear layer, which is called head.

    Takes tokens ``int [B, T]``, 0 for padding, to ``[B, num_outputs]``. Parameters are ``encoder`` and ``head``.

    Attributes:
      encoder: a ``Bert``.
      scale: of the embedding, which has length one.

    Example:
      >>> bert = fc.models.Bert(100, width=16, hidden=32, layers=2, heads=4, positions=32)
      >>> params = fc.models.TextClassifier(bert, 3).init(jax.random.key(0), np.zeros((1, 8), np.int32))
      >>> sorted(params["params"])
      ['encoder', 'head']
    """

    encoder: Bert
    num_outputs: int
    scale: float = 10.0

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        embedding = mean_pooled(self.encoder(tokens), tokens)
        return nn.Dense(self.num_outputs, kernel_init=nn.initializers.zeros, name="head")(self.scale * embedding)


def mean_pooled(hidden: Array, tokens: Array) -> Array:
    """The mean of a text's hidden states, of length one: a sentence's embedding.

    Args:
      hidden: ``[B, T, width]``.
      tokens: ``int [B, T]``, 0 for padding.

    Returns:
      ``[B, width]``; zero for a text without tokens.

    Example:
      >>> fc.models.mean_pooled(np.array([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]]), np.array([[5, 7, 0]])).tolist()
      [[0.6000000238418579, 0.800000011920929]]

    Source: Reimers and Gurevych (2019), "Sentence-BERT".
    """
    there = (tokens != 0)[..., None].astype(hidden.dtype)
    mean = jnp.sum(hidden * there, 1) / jnp.maximum(jnp.sum(there, 1), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
