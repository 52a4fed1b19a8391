"""What algorithms share whose directions and moments travel with the parameters."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.core import tree
from fedjax_clip.core.types import Array, Params, PyTree


def direction(old: PyTree, update: PyTree, rate: float | Array, steps: Array) -> PyTree:
    """``-update / (rate steps)``, the mean direction of a round's local steps; ``old`` where the update is zero.

    Args:
      old: the direction before the round, like the parameters.
      update: the round's mean update.
      rate: learning rate of the local steps.
      steps: float32, the mean number of a client's local steps.
    """
    length = -rate * tree.or_one(steps)
    new = jax.tree.map(lambda u, d: tree.divided(u, length).astype(d.dtype), update, old)
    return optax.tree.where(tree.norm(update) > 0, new, old)


def everywhere(part: PyTree, params: Params) -> PyTree:
    """``part`` with zeros for the leaves that it lacks, as the private ones of ``fc.partially_private``."""
    return tree.join(part, jax.tree.map(jnp.zeros_like, params))


def within(part: PyTree, whole: PyTree) -> PyTree:
    """The leaves of ``whole`` that ``part`` has."""
    return jax.tree.map(lambda p, x: None if p is None else x, part, whole, is_leaf=lambda x: x is None)
