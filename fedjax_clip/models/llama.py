"""Decoders of the Llama family."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_clip.core.types import Array, Params
from fedjax_clip.models.dense import Dense


class Cache(NamedTuple):
    """What a decoder keeps of the tokens that it has seen: keys and values ``[B, L, key heads, D]`` of each layer."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array  # how many of the L places are taken


class Llama(nn.Module):
    """Next token: RMS norms, rotary positions, attention with shared keys, SwiGLU layers, logits.

    Takes tokens ``int [B, T]`` to logits ``[B, T, vocabulary]``; those at ``t`` have seen the tokens up to ``t``. With
    ``segments``, several texts lie in one row: a token sees only its own segment, and positions begin anew in each.
    A block's matrices are called query, key, value, out, gate, up and down. The defaults are those of SmolLM2-135M.

    Attributes:
      width: of the hidden state.
      hidden: of the SwiGLU layer.
      heads, key_heads: of the queries, and of the keys and values; the second divides the first.
      theta: base of the rotary frequencies.
      epsilon: of the norms.
      tied: whether the logits use the embedding's matrix.
      rematerialise: whether the backward pass computes each block again, and keeps only its input.
      dtype: of the arithmetic, by default that of the parameters.

    Example:
      >>> model = fc.models.Llama(128, width=16, hidden=32, layers=2, heads=4, key_heads=2)
      >>> params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))

    Source: Touvron et al. (2023), "LLaMA"; Ainslie et al. (2023), "GQA"; Su et al. (2021), "RoFormer".
    """

    vocabulary: int
    width: int = 576
    hidden: int = 1536
    layers: int = 30
    heads: int = 9
    key_heads: int = 3
    theta: float = 100_000.0
    epsilon: float = 1e-5
    tied: bool = True
    rematerialise: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Array, segments: Array | None = None, cache: Cache | None = None) -> Any:
        embedding = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="tokens")
        x = embedding(tokens)
        positions, mask = _places(tokens, segments, cache)
        block = nn.remat(_Block) if self.rematerialise else _Block
        keys, values = [], []
        for i in range(self.layers):
            kept = None if cache is None else (cache.keys[i], cache.values[i], cache.length)
            name = f"block{i}"
            x, (key, value) = block(
                self.hidden, self.heads, self.key_heads, self.theta, self.epsilon, self.dtype, name=name
            )(x, positions, mask, kept)
            keys.append(key)
            values.append(value)
        x = nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
        logits = (
            embedding.attend(x)
            if self.tied
            else Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name="logits")(x)
        )
        if cache is None:
            return logits
        return logits, Cache(tuple(keys), tuple(values), cache.length + tokens.shape[1])


class _Block(nn.Module):
    hidden: int
    heads: int
    key_heads: int
    theta: float
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, positions: Array, mask: Array, kept: Any) -> Any:
        width = x.shape[-1]
        each = width // self.heads
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.RMSNorm, epsilon=self.epsilon, dtype=self.dtype)

        def heads(name: str, count: int, h: Array) -> Array:
            return dense(count * each, name=name)(h).reshape(*h.shape[:2], count, each)

        h = norm(name="attention_norm")(x)
        query = rotated(heads("query", self.heads, h), positions, self.theta)
        key = rotated(heads("key", self.key_heads, h), positions, self.theta)
        value = heads("value", self.key_heads, h)
        if kept is not None:
            place = (0, kept[2], 0, 0)
            key = jax.lax.dynamic_update_slice(kept[0], key.astype(kept[0].dtype), place)
            value = jax.lax.dynamic_update_slice(kept[1], value.astype(kept[1].dtype), place)
        attended = jax.nn.dot_product_attention(query, key.astype(query.dtype), value.astype(query.dtype), mask=mask)
        x += dense(width, name="out")(attended.reshape(x.shape))
        h = norm(name="mlp_norm")(x)
        h = nn.silu(dense(self.hidden, name="gate")(h)) * dense(self.hidden, name="up")(h)
        return x + dense(width, name="down")(h), (key, value)


def rotated(x: Array, positions: Array, theta: float) -> Array:
    """Rotary positions: turns the pair ``(x_i, x_(i + D / 2))`` by ``position theta^(-2 i / D)``.

    Args:
      x: ``[B, T, heads, D]``.
      positions: ``[B, T]``.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _places(tokens: Array, segments: Array | None, cache: Cache | None) -> tuple[Array, Array]:
    """Each token's position ``[B, T]``, and which keys it sees, ``[B, 1, T, keys]``."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if cache is not None:
        index += cache.length
        seen = index[:, :, None] >= jnp.arange(cache.keys[0].shape[1], dtype=jnp.int32)
        return index, seen[:, None]
    seen = index[:, :, None] >= index[:, None]
    if segments is None:
        return index, seen[:, None]
    seen &= segments[:, :, None] == segments[:, None]
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1]), segments[:, 1:] - segments[:, :-1]], 1) != 0
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    return index - start, seen[:, None]


def empty_cache(model: Llama, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """A cache for ``batch`` texts of at most ``length`` tokens."""
    shape = batch, length, model.key_heads, model.width // model.heads
    empty = tuple(jnp.zeros(shape, dtype) for _ in range(model.layers))
    return Cache(empty, empty, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def generate(
    model: Llama,
    params: Params,
    prompt: Array,
    steps: int,
    key: Array | None = None,
    temperature: float | Array = 1.0,
    lengths: Array | None = None,
) -> Array:
    """The tokens that follow a prompt, one by one.

    Args:
      model, params: a ``Llama`` and its parameters.
      prompt: ``int [B, T]``.
      steps: how many tokens follow.
      key: of the draws; ``None``: the likeliest token each time.
      temperature: positive; divides the logits before a draw.
      lengths: ``int [B]``, from 1 to T, of prompts that are padded behind; by default all have T tokens.

    Returns:
      ``int [B, steps]``.

    Example:
      >>> model = fc.models.Llama(128, width=16, hidden=32, layers=1, heads=2, key_heads=1)
      >>> params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))
      >>> fc.models.generate(model, params, np.zeros((1, 4), np.int32), steps=3).shape
      (1, 3)
    """

    def chosen(logits: Array, step: Array) -> Array:
        if key is None:
            return jnp.argmax(logits, -1)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)

    apply: Any = model.apply
    batch, given = prompt.shape
    read = given if lengths is None else 1  # tokens at once; those behind them one by one, as far as a row has them
    lengths = jnp.full(batch, given, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    logits, cache = apply(params, prompt[:, :read], cache=empty_cache(model, batch, given + steps))

    def follow(carry: tuple[Array, Cache], place: Array) -> tuple[tuple[Array, Cache], Array]:
        last, cache = carry
        own = jax.lax.dynamic_slice_in_dim(prompt, jnp.minimum(place, given - 1), 1, 1)[:, 0]
        token = jnp.where(place < lengths, own, chosen(last, place - given).astype(prompt.dtype))
        logits, cache = apply(params, token[:, None], cache=cache)
        return (logits[:, -1], cache), token

    _, tokens = jax.lax.scan(follow, (logits[:, -1], cache), jnp.arange(read, given + steps, dtype=jnp.int32))
    places = (lengths - read)[:, None] + jnp.arange(steps, dtype=jnp.int32)
    return jnp.take_along_axis(tokens.T, places, axis=1)
