"""Keys of random numbers: Threefry's, which are fast and public, and ChaCha20's, which cannot be guessed.

Both give the same numbers under ``vmap``, whatever ``jax_default_prng_impl`` says. A Threefry key has 64 bits and its
cipher is made for simulations. Noise that must stay unknown is drawn from a ChaCha20 key of 256 bits: ``chacha``. It is
a JAX PRNG like any other: ``jax.random.normal(key, ...)`` and all other functions of a key take it.

Why some of its numbers reveal no others, and no key: every output of a key K is ``block(K, counter, nonce)``, and the
nonce states its use. Drawn words have nonce 0, the keys of ``split`` nonce 1, and that of ``fold_in(data)`` nonce 2 and
``data``, so no two uses share an input. ChaCha20's block function is believed to be a pseudo-random function: without
K, its outputs at different inputs are indistinguishable from independent uniform words. So drawn numbers reveal nothing
about K or its children, and a child reveals nothing about its parent. The best known attack tries all 2^256 keys.

Source: Bernstein (2008), "ChaCha, a variant of Salsa20"; Nir and Langley (2018), RFC 8439, sections 2.1 to 2.4;
Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3", for keys of a tree of counters.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

from fedjax_clip.core.types import Array

IMPL = "threefry2x32"  # rbg's numbers change under vmap, so they would depend on the other clients of a chunk
WORDS = 8  # uint32, of a ChaCha20 key
CONSTANT = np.frombuffer(b"expand 32-byte k", "<u4")
DRAW, SPLIT, FOLD = range(3)  # the use of a block: the first word of its nonce


def seeded(seed: int | np.integer | Array) -> Array:
    """``jax.random.key(seed)``, a Threefry key."""
    return jax.random.key(seed, impl=IMPL)


def threefry(key: Array) -> Array:
    """A Threefry key derived from any PRNG key; keys of Threefry, raw or not, and of ChaCha20 stay as they are."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and key.shape == (2,) and key.dtype == jnp.uint32:
        return jax.random.wrap_key_data(key, impl=IMPL)
    if typed and (is_secret(key) or str(jax.random.key_impl(key)) == IMPL):
        return key
    words = jax.random.key_data(key) if typed else key
    return folded(jax.random.wrap_key_data(words[:2], impl=IMPL), words[2:])


def chacha(words: Array | np.ndarray) -> Array:
    """A ChaCha20 key of ``uint32 [8]`` words; a ChaCha20 key stays as it is."""
    if isinstance(words, jax.Array) and jnp.issubdtype(words.dtype, jax.dtypes.prng_key):
        return words
    return jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl=CHACHA20)


def is_secret(key: Array) -> bool:
    """Whether it is a key of ChaCha20."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and jax.random.key_impl(key) == CHACHA20


def folded(key: Array, data: Array) -> Array:
    """The key with these ``uint32`` words folded in, in order; a PRNG key contributes its words."""
    words = jax.random.key_data(data) if jnp.issubdtype(data.dtype, jax.dtypes.prng_key) else data
    for word in words:
        key = jax.random.fold_in(key, word)
    return key


def block(key: Array, counter: Array, nonce: Array) -> Array:
    """ChaCha20's block function (RFC 8439, section 2.3), of many counters at once.

    Args:
      key: uint32 ``[8]``.
      counter: uint32 ``[n]``, the number of each block.
      nonce: uint32 ``[3]``.

    Returns:
      uint32 ``[n, 16]``: concatenated as little-endian bytes they are the key stream of the RFC.
    """
    a, b, c, d = (jnp.asarray(x, jnp.uint32)[:, None] for x in (CONSTANT, key[:4], key[4:], nonce))
    a, b, c, d = (jnp.broadcast_to(x, (x.shape[0], counter.shape[0])) for x in (a, b, c, d))
    start = jnp.stack([a, b, c, jnp.concatenate([counter[None], d])])  # [4, 4, n]

    def double_round(_: Array, rows: Array) -> Array:
        a, b, c, d = _quarter_rounds(*rows)  # of the columns
        b, c, d = (jnp.roll(x, -i, axis=0) for i, x in enumerate((b, c, d), 1))
        a, b, c, d = _quarter_rounds(a, b, c, d)  # of the diagonals
        b, c, d = (jnp.roll(x, i, axis=0) for i, x in enumerate((b, c, d), 1))
        return jnp.stack([a, b, c, d])

    mixed = start + jax.lax.fori_loop(0, 10, double_round, start)
    return jnp.moveaxis(mixed, -1, 0).reshape(-1, 16)


def _quarter_rounds(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    """RFC 8439, section 2.1, of four columns at once."""
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


def _rotated(x: Array, bits: int) -> Array:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def _seed(seed: Array) -> Array:
    """A key of a seed, for tests: not a secret."""
    low, high = seed.astype(jnp.uint32), jax.lax.shift_right_logical(seed, jnp.asarray(32, seed.dtype))
    rest = jnp.zeros(WORDS - 2, jnp.uint32)
    return jnp.concatenate([jnp.stack([low, high.astype(jnp.uint32)]), rest])


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    children = block(key, jnp.arange(math.prod(shape), dtype=jnp.uint32), _nonce(SPLIT))
    return children[:, :WORDS].reshape(*shape, WORDS)


def _fold_in(key: Array, data: Array | int) -> Array:
    return block(key, jnp.zeros(1, jnp.uint32), _nonce(FOLD, data))[0, :WORDS]


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    size, dtype = math.prod(shape), jnp.dtype(f"uint{bit_width}")
    blocks = -(-size * bit_width // 512)
    words = block(key, jnp.arange(blocks, dtype=jnp.uint32), _nonce(DRAW)).reshape(-1)
    if bit_width > 32:
        words = words.reshape(-1, bit_width // 32)
    return jax.lax.bitcast_convert_type(words, dtype).reshape(-1)[:size].reshape(shape)


def _nonce(purpose: int, data: Array | int = 0) -> Array:
    return jnp.stack([jnp.uint32(purpose), jnp.asarray(data).astype(jnp.uint32), jnp.uint32(0)])


CHACHA20 = define_prng_impl(
    key_shape=(WORDS,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="chacha20",
    tag="cc20",
)
