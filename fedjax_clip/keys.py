"""Keys of random numbers that are the same under ``vmap``, whatever ``jax_default_prng_impl`` says."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.typing import Array

IMPL = "threefry2x32"  # rbg's numbers change under vmap, so they would depend on who else is in a chunk


def seeded(seed: int | np.integer | Array) -> Array:
    """``jax.random.key(seed)``, a Threefry key."""
    return jax.random.key(seed, impl=IMPL)


def threefry(key: Array) -> Array:
    """A Threefry key that is a function of any PRNG key; a Threefry key, raw or not, as it is."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and key.shape == (2,) and key.dtype == jnp.uint32:
        return jax.random.wrap_key_data(key, impl=IMPL)
    if typed and str(jax.random.key_impl(key)) == IMPL:
        return key
    words = jax.random.key_data(key) if typed else key
    folded = jax.random.wrap_key_data(words[:2], impl=IMPL)
    for i in range(2, len(words)):
        folded = jax.random.fold_in(folded, words[i])
    return folded
