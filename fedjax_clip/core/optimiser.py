"""Optax transforms at many clients and over many rounds, with states that travel between host and devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.core.types import Array, InvalidInput, Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyData:
    """A PRNG key as plain words, which NumPy, checkpoints and ``jnp.where`` accept."""

    data: Array
    impl: Any = dataclasses.field(metadata={"static": True})


def init(tx: optax.GradientTransformation, params: Params) -> PyTree:
    """``tx.init(params)``, its keys as ``KeyData``.

    Raises:
      InvalidInput: a transform that expects a leading axis of examples in the gradients.
    """
    state = tx.init(params)
    wrong = optax.contrib.DifferentiallyPrivateAggregateState
    if any(isinstance(s, wrong) for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, wrong))):
        raise InvalidInput(
            "optax.contrib.differentially_private_aggregate needs the gradient of each example, and an optimiser sees "
            "their mean here: give the algorithm gradient=fc.local.private_gradient(max_norm, noise_multiplier)."
        )
    return _plain(state)


def update(
    tx: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: PyTree,
    params: Params | None = None,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """``tx.update(...)`` for a state of ``init``."""
    got = tx.update(updates, _typed(state), params, **extra)
    if not isinstance(got, tuple) or len(got) != 2:
        raise InvalidInput("The transform's update must return (updates, state).")
    return got[0], _plain(got[1])


def reseeded(state: PyTree, key: Array) -> PyTree:
    """The state with fresh randomness: each of its keys is folded with the words of ``key``.

    Otherwise a noisy transform would draw the same noise at every client and in every round.

    Args:
      state: of ``init``; keys of the old style, plain ``uint32`` words, are recognised by their names.
      key: of the round and the client.
    """

    def fold(path: Any, leaf: PyTree) -> PyTree:
        name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
        if isinstance(leaf, KeyData):
            folded = jax.random.fold_in(
                jax.random.wrap_key_data(leaf.data, impl=leaf.impl), jax.random.bits(key, (), jnp.uint32)
            )
            return KeyData(jax.random.key_data(folded), leaf.impl)
        if name in ("key", "rng_key") and leaf.dtype == "uint32":
            return jax.random.fold_in(leaf, jax.random.bits(key, (), jnp.uint32))
        return leaf

    return jax.tree_util.tree_map_with_path(fold, state, is_leaf=lambda x: isinstance(x, KeyData))


def _plain(state: PyTree) -> PyTree:
    def plain(x: Any) -> Any:
        return KeyData(jax.random.key_data(x), jax.random.key_impl(x)) if _is_key(x) else x

    return jax.tree.map(plain, state)


def _typed(state: PyTree) -> PyTree:
    def typed(x: Any) -> Any:
        return jax.random.wrap_key_data(x.data, impl=x.impl) if isinstance(x, KeyData) else x

    return jax.tree.map(typed, state, is_leaf=lambda x: isinstance(x, KeyData))


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
