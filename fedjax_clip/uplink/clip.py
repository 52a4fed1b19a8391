"""Clips of what a client sends."""

import jax.numpy as jnp

from fedjax_clip.clipping import check_threshold, scale_to_norm
from fedjax_clip.metrics import Mean
from fedjax_clip.typing import Array
from fedjax_clip.uplink.base import Uplink


def clip_by_global_norm(max_norm: float | Array) -> Uplink:
    """Scales a client's whole update to Euclidean norm at most ``max_norm``: ``d * min(1, max_norm / ||d||)``.

    Guarantee: a client moves a uniform mean of m clients by at most ``max_norm / m``. Zero stays zero; an update
    with a NaN or an infinity is dropped and counted. Reports ``clipped_updates``, the fraction of clients clipped.

    Args:
      max_norm: positive threshold on the norm of the round's update, in the units of the parameters; may be traced.

    Raises:
      InvalidInput: a threshold that is not a positive number.

    Source: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models", Algorithm 1 (flat
    clipping).
    """
    check_threshold("clip_by_global_norm", max_norm)

    def encode(update, state, client_state, ctx):
        message, clipped = scale_to_norm(update, max_norm)
        return message, client_state, {"clipped_updates": Mean(clipped.astype(jnp.float32), jnp.ones((), jnp.float32))}

    def decode(aggregate, state, report, ctx):
        return aggregate, state, report

    return Uplink(lambda params: (), lambda params: (), encode, decode)
