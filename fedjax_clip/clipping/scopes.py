"""The scope of a clip: which numbers share one norm."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_clip.clipping.norms import Norm
from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput, PyTree

Norms = dict[str, Array]  # of each group of a scope; a scalar, or an array that broadcasts against the group's leaf


class Scope(NamedTuple):
    """The numbers that share one norm: ``label`` names the group of a leaf, ``keep`` the axes that stay separate.

    Attributes:
      label: ``name of a leaf -> name of its group``.
      keep: ``"nothing"``: one norm for a group; ``"units"``: one for each output unit; ``"everything"``: one for each
        number.

    Example:
      >>> fc.clipping.Scope(lambda name: name.split("/")[0])  # a norm for each top-level module
    """

    label: Callable[[str], str]
    keep: Literal["nothing", "units", "everything"] = "nothing"


def whole() -> Scope:
    """The whole tree.

    Example:
      >>> fc.clipping.clip(0.1, scope=fc.clipping.whole())
    """
    return Scope(lambda name: "")


def layer() -> Scope:
    """Each layer: leaves whose names differ in the last part only (kernel and bias), or a leaf that stands alone.

    Example:
      >>> fc.clipping.clip(0.1, scope=fc.clipping.layer())
    """
    return Scope(lambda name: name.rpartition("/")[0] or name)


def groups(patterns: Mapping[str, str]) -> Scope:
    """Groups by name: ``{group: regular expression}``. The first match in a leaf's name counts; the rest are one group.

    Args:
      patterns: regular expression by the group's name, tried in this order on names such as ``params/Dense_1/kernel``.

    Raises:
      InvalidInput: a pattern that is not a regular expression.

    Example:
      >>> fc.clipping.groups({"head": "Dense_1", "body": "."}).label("params/Dense_1/kernel")
      'head'
    """
    checks.kind(
        "groups", patterns, Mapping, 'patterns by the names of groups, such as {"head": "Dense_1", "body": "."}'
    )
    for pattern in patterns.values():
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            raise InvalidInput(f"groups: {pattern!r} is not a regular expression: {error}.") from error
    return Scope(lambda name: next((group for group, p in patterns.items() if re.search(p, name)), "rest"))


def unit() -> Scope:
    """Each output unit of a kernel, as in AGC (Brock et al. 2021) and with the shapes that optax takes for kernels.

    One unit is, with ``:`` for the axes that share a norm:

    - a scalar, a vector, or an array with one axis longer than 1: the whole leaf;
    - ``[in, out]`` of a dense layer: ``[:, o]``;
    - ``[in, heads, size]`` of an attention: ``[:, h, s]``. A convolution over one axis has this rank too, and optax and
      ``unit`` do not tell it apart;
    - ``[height, width, in, out]`` of a convolution, and higher ranks: ``[:, :, :, o]``.

    Example:
      >>> fc.clipping.clip(0.1, scope=fc.clipping.unit())

    Source: ``optax.adaptive_grad_clip``, whose ``unitwise_norm`` has the same units.
    """
    return Scope(lambda name: name, "units")


def unit_axes(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of one unit; ``None`` for the whole leaf."""
    if sum(n != 1 for n in shape) <= 1:
        return None
    return (0,) if len(shape) <= 3 else tuple(range(len(shape) - 1))


def element() -> Scope:
    """Each number.

    Example:
      >>> fc.clipping.clip(0.1, scope=fc.clipping.element())
    """
    return Scope(lambda name: name, "everything")


def measure(scope: Scope, norm: Norm, updates: PyTree) -> Norms:
    """The norm of every group, in float32 or better."""
    totals: Norms = {}
    whole: dict[str, list[Array]] = {}
    for name, x in tree.named_leaves(updates):
        mapped, label = norm.map(tree.wide(x)), scope.label(name)
        if scope.keep == "everything":
            totals[label] = mapped
        elif scope.keep == "units" and (axes := unit_axes(x.shape)):
            totals[label] = norm.reduce(mapped, axis=axes)
        else:
            whole.setdefault(label, []).append(mapped if x.size else jnp.zeros(1, mapped.dtype))

    def join(parts: Sequence[Array]) -> Array:
        dtype = tree.common_type(*parts)
        return functools.reduce(norm.join, [x.astype(dtype) for x in parts])

    totals |= {label: tree.reduced(norm.reduce, join, parts) for label, parts in whole.items()}
    return {label: norm.finish(total) for label, total in totals.items()}


def spread(scope: Scope, factors: Norms, updates: PyTree) -> PyTree:
    """The leaves times their group's factor, in their own types."""
    scaled = [tree.scaled(factors[scope.label(name)], x) for name, x in tree.named_leaves(updates)]
    return jax.tree.unflatten(jax.tree.structure(updates), scaled)
