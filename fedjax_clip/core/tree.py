"""The few operations on pytrees that optax.tree lacks.

Five functions have a relative in optax, and differ from it:

- ``norm``: ``optax.tree.norm`` squares half precision in half precision, its gradient at zero is NaN, and its sums are
  not vectorised on a CPU.
- ``apply_updates``: optax's fails on two types where ``jax_numpy_dtype_promotion`` is strict.
- ``add_scaled``: ``optax.tree.add_scale`` changes the leaves' types to those of the factor or the change.
- ``total``: ``optax.tree.sum`` adds in the arrays' own types.
- ``size``: ``optax.tree.size`` warns of shapes without arrays, as ``jax.eval_shape`` gives them.

Optax has nothing like the others.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from fedjax_clip.core import checks
from fedjax_clip.core.types import Array, InvalidInput, PyTree

SMALL = 512  # elements of an array that an accelerator may handle together with others
FEW = 10  # so many small arrays stay apart


def traced(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], PyTree]:
    """``function`` traced for arguments like ``args``, and zeros like its result, to start a loop with.

    The function is traced once, here; calls of the result only repeat its operations. A Python integer among the
    arguments stands for a loop's index, which is int32 here even under ``jax_enable_x64``. Under ``jax.disable_jit``
    nothing is traced: the function is called once and returned unchanged.
    """
    args = jax.tree.map(lambda x: np.int32(x) if type(x) is int else x, args)
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return function, jax.tree.map(jnp.zeros_like, function(*args))
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    operations, structure = jaxpr_as_fun(jaxpr), jax.tree.structure(shapes)

    def again(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if (now := _forms(map(jax.typeof, leaves))) != (before := _forms(jaxpr.in_avals)):
            raise TypeError(f"The loop was traced for {before}, and is called with {now}.")
        return jax.tree.unflatten(structure, operations(*leaves))

    return again, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _forms(types: Iterable[Any]) -> list[str]:
    return [f"{x.dtype}{list(x.shape)}" for x in types]


def common_type(*values: Any) -> np.dtype:
    """``jnp.result_type``, even if ``jax_numpy_dtype_promotion`` is strict, for arrays that are then cast to it."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


def wide_type(x: Any) -> np.dtype:
    """The type in which an array is summed: its own, or float32 if that is narrower or not a float."""
    own = x.dtype
    return own if jnp.issubdtype(own, jnp.inexact) and own.itemsize >= 4 else np.dtype(np.float32)


def wide(x: Array) -> Array:
    """An array in its ``wide_type``."""
    return x.astype(wide_type(x))


def scaled(factor: Array, x: Array) -> Array:
    """``factor x``, computed in float32 or better and cast back to the type of x; the factor may lack leading axes."""
    factor = factor.astype(wide_type(x))
    if 0 < factor.ndim < x.ndim:
        factor = jnp.expand_dims(factor, range(x.ndim - factor.ndim))
    return (wide(x) * factor).astype(x.dtype)


def divided(x: Array, by: Array) -> Array:
    """``x / by``, computed in float32 or better and cast back to the type of x; the shapes broadcast."""
    return (wide(x) / by.astype(wide_type(x))).astype(x.dtype)


def weighted_sum(weights: Array | np.ndarray, x: Array) -> Array:
    """``sum_i weights_i x_i`` over the first axis, as exact as ``x``'s type whatever ``jax_default_matmul_precision``.

    A product that names no precision is one pass of bfloat16 on a TPU.
    """
    return jnp.tensordot(weights.astype(x.dtype), x, 1, precision=jax.lax.Precision.HIGHEST)


def count(condition: Array | np.ndarray) -> Array:
    """The number of true values, int32."""
    return jnp.sum(condition, dtype=jnp.int32)


def norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves, in float32 or better; its gradient at zero is zero."""
    return safe_sqrt(reduced(jnp.sum, total, [jnp.square(jnp.abs(wide(x))) for x in jax.tree.leaves(tree)]))


def total(parts: Sequence[Array]) -> Array:
    """The sum of arrays, in float32 or the best of their types."""
    dtype = common_type(jnp.float32, *parts)
    return sum((x.astype(dtype) for x in parts), jnp.zeros((), dtype))


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """``optax.apply_updates`` for any two types: the sum is computed in the better one."""

    def add(x: Array, update: Array) -> Array:
        dtype = common_type(x, update)
        return (x.astype(dtype) + update.astype(dtype)).astype(x.dtype)

    return jax.tree.map(add, params, updates)


def add_scaled(values: PyTree, factor: Any, change: PyTree) -> PyTree:
    """``values + factor change``, each leaf in its own type."""
    return apply_updates(values, jax.tree.map(lambda x: scaled(jnp.asarray(factor), x), change))


def or_one(total: Array) -> Array:
    """A divisor: the total, or 1 where it is 0.

    The smallest positive number would not do: XLA may multiply it by another divisor, which gives 0, and then NaN.
    """
    return jnp.where(total > 0, total, 1)


def stays_finite(new: PyTree, old: PyTree) -> Array:
    """Whether every number of ``new`` is finite that was finite in ``old``; integers always are."""
    ok = jnp.ones((), bool)
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            # NaN where a number is lost: a sum detects it, and is vectorised.
            zeros = jnp.where(jnp.isfinite(y), x * 0, 0)
            ok &= reduced(jnp.sum, total, [zeros]) == 0
    return ok


def safe_sqrt(x: Array) -> Array:
    """The square root, with gradient zero at zero."""
    return jnp.where(x == 0, x, jnp.sqrt(jnp.where(x == 0, 1, x)))


def reduced(reduce: Callable[..., Array], join: Callable[[Sequence[Array]], Array], arrays: Sequence[Array]) -> Array:
    """``join([reduce(x), reduce(y), ...])`` over all axes of each array, which is ``reduce`` over all of them.

    On a CPU, XLA's loop over all elements has one accumulator and is not vectorised; its loop over columns is. So a CPU
    reduces to columns first, behind a barrier. Other devices reduce small arrays together, in one kernel.
    """

    def by_columns(x: Array) -> Array:
        columns = reduce(x.reshape(-1, x.shape[-1]), axis=0)
        return reduce(jax.lax.optimization_barrier(columns))

    def on_cpu(*arrays: Array) -> Array:
        return join([reduce(x) if x.ndim < 2 else by_columns(x) for x in arrays])

    def elsewhere(*arrays: Array) -> Array:
        small = [x.ravel() for x in arrays if x.size <= SMALL]
        if len(small) <= FEW or len({x.dtype for x in small}) > 1:
            return join([reduce(x) for x in arrays])
        together = jax.lax.optimization_barrier(jnp.concatenate(small))  # or XLA reduces its parts again
        return join([reduce(x) for x in (together, *(x for x in arrays if x.size > SMALL))])

    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)


def sorted_rows(x: Array) -> list[Array]:
    """``list(jnp.sort(x, axis=0))`` of finite or infinite values.

    Up to 32 rows go through Batcher's network of minima and maxima (Knuth, algorithm 5.2.2M). It is elementwise, so XLA
    fuses it and later operations into one vectorised loop; XLA's own sort compares float by float.
    """
    rows = list(x)
    if len(rows) > 32:
        return list(jnp.sort(x, axis=0))
    top = 1 << max(len(rows) - 1, 1).bit_length() - 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            for i in range(len(rows) - d):
                if i & p == r:
                    rows[i], rows[i + d] = jnp.minimum(rows[i], rows[i + d]), jnp.maximum(rows[i], rows[i + d])
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return rows


def ravel(tree: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """All elements as one vector of the leaves' common type, and a function back to their shapes, for any type.

    Leaves are written one by one into zeros: on a CPU, XLA fuses a concatenation with its inputs and runs it element by
    element, a hundred times slower. The barrier keeps each reader from repeating it.
    """
    leaves, structure = jax.tree.flatten(tree)
    starts = [0, *itertools.accumulate(x.size for x in leaves)]
    vector = jnp.zeros(starts[-1], common_type(*leaves or [jnp.float32]))
    for x, start in zip(leaves, starts):
        vector = jax.lax.dynamic_update_slice(vector, x.ravel().astype(vector.dtype), (start,))

    def restore(vector: Array) -> PyTree:
        parts = [vector[start : start + x.size].reshape(x.shape) for x, start in zip(leaves, starts)]
        return jax.tree.unflatten(structure, parts)

    return jax.lax.optimization_barrier(vector), restore


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves, from their shapes and types alone."""
    return sum(np.size(x) * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))


def size(tree: PyTree) -> int:
    """Number of elements of all leaves, from their shapes alone."""
    return sum(np.size(x) for x in jax.tree.leaves(tree))


def as_arrays(tree: PyTree) -> PyTree:
    """Copies every leaf into a device array of a strong type, because a weak type would cost a second compilation."""
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype), tree)


def leaf_name(path: Sequence[Any], separator: str = "/") -> str:
    """``"a/b/0"``: the keys of the path to a leaf, without Flax's box around it.

    Flax boxes parameters: NNX in variables, Linen in ``LogicallyPartitioned`` and ``Partitioned``. The leaf is then the
    box's attribute ``value``, which is not part of the parameter's name.
    """
    end = len(path)
    while end > 1 and path[end - 1] == jax.tree_util.GetAttrKey("value"):
        end -= 1
    return jax.tree_util.keystr(tuple(path[:end]), simple=True, separator=separator)


def parameters(params: PyTree) -> PyTree:
    """The parameters with arrays as leaves.

    Raises:
      InvalidInput: no leaves, or one that is not numbers, such as a function.
    """
    leaves = named_leaves(params)
    if not leaves:
        raise InvalidInput("params hold nothing to train: give a model's parameters, such as model.init(key, x).")
    for name, x in leaves:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise InvalidInput(
                f"Parameter {name or 'params'!r} is a PRNG key, which cannot be trained: split it off, as "
                "nnx.split(model, nnx.Param, ...) does, and give the loss's key to the model."
            )
        try:
            numbers = isinstance(x, jax.Array) or jnp.issubdtype(np.asarray(x).dtype, jnp.number)
        except (TypeError, ValueError):
            numbers = False
        if not numbers:
            raise InvalidInput(f"Parameter {name or 'params'!r} must be an array of numbers, not {checks.shown(x)}.")
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), params)


def named_leaves(
    tree: PyTree, separator: str = "/", is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """``[("a/b/0", leaf), ...]`` in the order of ``jax.tree.leaves``; see ``leaf_name``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return [(leaf_name(path, separator), leaf) for path, leaf in leaves]


def flatten_with_names(tree: PyTree, separator: str = "/") -> dict[str, np.ndarray]:
    """``{"a/b/0": array}``: the leaves as NumPy arrays under readable, unique names.

    Raises:
      InvalidInput: two leaves with the same name, since a key contains the separator.
    """
    named: dict[str, np.ndarray] = {}
    for name, leaf in named_leaves(tree, separator):
        if name in named:
            raise InvalidInput(f"Two arrays are called {name!r}, since a key has {separator!r} in it: rename one.")
        named[name] = np.asarray(leaf)
    return named


def split(tree: PyTree, pattern: str) -> tuple[PyTree, PyTree]:
    """``(matching, rest)``: the leaves whose names match a regular expression, and the others, with None elsewhere.

    Example:
      >>> split({"user": 1, "items": 2}, "^user")
      ({'items': None, 'user': 1}, {'items': 2, 'user': None})
    """

    def keep(wanted: bool) -> PyTree:
        def choose(path, leaf):
            return leaf if bool(re.search(pattern, leaf_name(path))) == wanted else None

        return jax.tree_util.tree_map_with_path(choose, tree)

    return keep(True), keep(False)


def join(first: PyTree, second: PyTree) -> PyTree:
    """The inverse of ``split``: each leaf from the tree that has it."""
    return jax.tree.map(lambda x, y: y if x is None else x, first, second, is_leaf=lambda x: x is None)
