"""An algorithm, a clip rule and a link as somebody outside of the repository writes them."""

import jax
import jax.numpy as jnp
import optax
from fedexp import fedexp

import fedjax_clip as fc

__all__ = ["clip_to_mean", "fedexp", "signs"]


def clip_to_mean(factor=2.0):
    """A clip rule: no coordinate of a gradient may be longer than ``factor`` times their mean length."""

    def update(updates, state, params=None):
        def clip(g):
            most = factor * jnp.mean(jnp.abs(g))
            return jnp.clip(g, -most, most)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def signs(scale=0.05):
    """A link: clients send ``scale sign(u)``, a bit of each coordinate."""

    def encode(update, ctx):
        bits = sum(x.size for x in jax.tree.leaves(update))
        sent = jax.tree.map(lambda x: scale * jnp.sign(x), update)
        return fc.uplink.Message(sent, bytes=jnp.float32(bits / 8)), {}

    return fc.uplink.stateless(encode)
