"""Low-rank adapters: only they train and travel."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks, tree
from fedjax_clip.core.quantised import is_quantised
from fedjax_clip.core.types import Array, Batch, InvalidInput, Params, PerExampleLoss, PyTree


class Lora(NamedTuple):
    """The result of ``lora``: a problem whose parameters are the base model and its adapters.

    Attributes:
      init: ``key -> {"base": the base model, "adapters": {matrix: {"a": [m, rank], "b": [rank, n]}}}``; the adapters
        change nothing yet.
      merge: of these parameters, ``-> params`` of the base model's structure.
      per_example_loss: ``(these parameters, batch, key)``, the given loss of the adapted model.
      frozen: which of them stay as they are, for ``fc.partially_frozen``.
      fresh: ``key -> adapters``, as ``init`` draws them.
      scale: ``alpha / rank``, of the changes.
      untouched: as ``frozen``, without the matrices that have adapters, for ``fc.adapters``, which change these, too.
      whole: the names of the parameters that train whole.

    Example:
      >>> tuned = fc.lora(per_example_loss, params, rank=4, pattern="w")
      >>> sorted(tuned.init(key)), tuned.frozen
      (['adapters', 'base'], '^base/')
    """

    init: Callable[[Array], PyTree]
    merge: Callable[[PyTree], Params]
    per_example_loss: PerExampleLoss
    frozen: str
    fresh: Callable[[Array], PyTree]
    scale: float | Array
    untouched: str
    whole: tuple[str, ...] = ()


def lora(
    per_example_loss: PerExampleLoss,
    base: Params,
    rank: int,
    pattern: str = r"kernel$",
    alpha: float | Array | None = None,
    beside: bool = False,
    whole: str | None = None,
    dora: bool = False,
) -> Lora:
    """Fine-tunes a frozen model by low-rank changes of its matrices: ``W + alpha / rank * A B``.

    A is drawn from N(0, 1/m) and B is zero, so training begins at the base model. A parameter of more than two axes is
    the matrix of its last axis against the others. The mean of clients' A and of their B is not the mean of their A B:
    as in other federated LoRA (FedIT) the two are averaged apart, and ``fc.adapters`` has what averages the products.

    Args:
      per_example_loss: ``(params, batch, key)`` of the whole model.
      base: pytree of parameters, to stay as they are: their gradients are zero, and ``fc.partially_frozen`` keeps them
        from travelling. Matrices may be in few bits (``fc.models.quantised``).
      rank: of the changes, at least 1.
      pattern: regular expression, searched in the names of parameters such as ``"params/block0/query/kernel"``.
      alpha: scale of the changes, ``rank`` by default.
      beside: for Flax Dense layers: compute ``x W + scale (x A) B``, and make no matrix as large as W, neither of a
        change nor of a gradient. The same function up to rounding.
      whole: regular expression: parameters of the base that train and travel as they are, such as a new head's.
      dora: whether each column's length trains apart from its direction: with ``V = W + alpha / rank * A B``, the
        matrix is ``m V / ||V||`` by column, and m begins as W's lengths. Gradients take ``||V||`` as a constant.

    Returns:
      A ``Lora``: initial parameters, how to merge them, and a loss for ``fc.fedavg`` or any other algorithm under
      ``fc.partially_frozen``.

    Raises:
      InvalidInput: a rank below 1, a pattern that finds no matrix, ``whole`` that finds no parameter or one with an
        adapter; (when the loss is traced) ``beside`` with a matrix that no Flax Dense layer multiplies by.

    Example:
      >>> tuned = fc.lora(per_example_loss, params, rank=4, pattern="w")
      >>> algorithm = fc.partially_frozen(fc.fedavg(tuned.per_example_loss, optax.sgd(0.1)), tuned.frozen)
      >>> result = fc.train(algorithm, data, tuned.init(key), rounds=10)
      >>> params = tuned.merge(result.params)

    Source: Hu et al. (2022), "LoRA"; federated: Zhang et al. (2024), "Towards Building the Federated GPT" (FedIT); Liu
    et al. (2024), "DoRA: Weight-Decomposed Low-Rank Adaptation", equations 5 and 11.
    """
    rank = checks.count("rank", rank)
    checks.kind("pattern", pattern, str, "a regular expression")
    named = tree.named_leaves(base, is_leaf=is_quantised)
    structure = jax.tree.structure(base, is_leaf=is_quantised)
    names = [name for name, _ in named]
    matrices = {
        name: (math.prod(w.shape[:-1]), w.shape[-1], np.dtype(np.float32) if is_quantised(w) else tree.wide_type(w))
        for name, w in named
        if len(w.shape) > 1 and re.search(pattern, name)
    }
    if not matrices:
        raise InvalidInput(f"The pattern {pattern!r} finds no matrix among the parameters {', '.join(names)}.")
    trained = _whole(whole, names, matrices)
    scale = 1.0 if alpha is None else alpha / rank

    def fresh(key):
        keys = jax.random.split(key, len(matrices))
        pairs = {
            name: {"a": jax.random.normal(k, (m, rank), dtype) / math.sqrt(m), "b": jnp.zeros((rank, n), dtype)}
            for k, (name, (m, n, dtype)) in zip(keys, matrices.items())
        }
        if dora:
            for name, w in named:
                if name in pairs:
                    pairs[name]["m"] = _lengths(w, pairs[name], scale)
        return pairs

    def init(key):
        return {"base": base, "adapters": fresh(key)}

    def on_base(change, params):
        leaves = zip(names, jax.tree.leaves(params["base"], is_leaf=is_quantised), strict=True)
        return jax.tree.unflatten(structure, [change(name, w) for name, w in leaves])

    def merge(params):
        def merged(name, w):
            if (pair := params["adapters"].get(name)) is None:
                return w
            v = w.dense() if is_quantised(w) else w
            v = v + (scale * (pair["a"] @ pair["b"])).reshape(w.shape).astype(v.dtype)
            return v * _stretch(w, pair, scale).astype(v.dtype) if dora else v

        return on_base(merged, params)

    def adapted_loss(params, batch, key):
        base = on_base(lambda name, w: w if name in trained else jax.lax.stop_gradient(w), params)
        params = {**params, "base": base}
        if not beside:
            return per_example_loss(merge(params), batch, key)
        return _beside(per_example_loss, params, batch, key, scale)

    def all_but(kept):
        return rf"^base/(?!({'|'.join(map(re.escape, kept))})$)" if kept else "^base/"

    return Lora(
        init, merge, adapted_loss, all_but(trained), fresh, scale, all_but((*matrices, *trained)), tuple(trained)
    )


def _lengths(w: Any, pair: dict[str, Array], scale: float | Array) -> Array:
    """``||W + scale A B||`` of each column ``[n]``, without a matrix as large as W."""
    a, b = pair["a"], pair["b"]
    w = (w.dense() if is_quantised(w) else jnp.asarray(w)).astype(a.dtype)
    w = w.reshape(-1, w.shape[-1])
    inner, square = a.T @ w, a.T @ a  # [r, n], [r, r]
    squares = jnp.sum(w * w, 0) + 2 * scale * jnp.sum(inner * b, 0) + scale**2 * jnp.sum((square @ b) * b, 0)
    return jnp.sqrt(jnp.maximum(squares, 0))


def _stretch(w: Any, pair: dict[str, Array], scale: float | Array) -> Array:
    """``m / ||W + scale A B||`` of each column; the length is a constant for gradients."""
    return pair["m"] / jnp.maximum(jax.lax.stop_gradient(_lengths(w, pair, scale)), 1e-12)


def _whole(pattern: str | None, names: Sequence[str], matrices: Mapping[str, Any]) -> list[str]:
    """The parameters that train whole."""
    if pattern is None:
        return []
    checks.pattern("whole", pattern)
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        raise InvalidInput(f"whole={pattern!r} finds none of the parameters {', '.join(names)}.")
    if twice := next((name for name in found if name in matrices), None):
        raise InvalidInput(f"{twice} would train whole and have an adapter: change whole={pattern!r} or the pattern.")
    return found


def _beside(per_example_loss: PerExampleLoss, params: PyTree, batch: Batch, key: Any, scale: float | Array) -> Any:
    """The loss of the base model, each of whose Dense layers adds ``scale (x A) B`` to its product."""
    import flax.linen as nn  # the library itself does without

    adapters, used, inside = params["adapters"], set(), set()

    def adapted(layer, args, kwargs, context):
        name = "/".join(("params", *context.module.path, "kernel"))
        here = isinstance(context.module, nn.Dense) and context.method_name == "__call__" and name in adapters
        if not here or name in inside:  # inside: a subclass of Dense calls Dense's own method
            return layer(*args, **kwargs)
        used.add(name)
        inside.add(name)
        y = layer(*args, **kwargs)
        inside.remove(name)
        pair = adapters[name]
        a, b = (pair[k].astype(y.dtype) for k in "ab")
        change = scale * (args[0].astype(y.dtype) @ a @ b)
        if "m" not in pair:
            return y + change
        own = context.module.get_variable
        bias = own("params", "bias").astype(y.dtype) if context.module.use_bias else 0
        return (y - bias + change) * _stretch(own("params", "kernel"), pair, scale).astype(y.dtype) + bias

    with nn.intercept_methods(adapted):
        result = per_example_loss(params["base"], batch, key)
    if unused := sorted(adapters.keys() - used):
        raise InvalidInput(f"lora: beside=True is for the kernels of Flax Dense layers, and {unused[0]} is none.")
    return result
