"""The L2 bound of a clip's results, which scales the noise after the clip."""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.clipping.norms import Norm
from fedjax_clip.clipping.rules import Rule
from fedjax_clip.clipping.scopes import Scope, unit_axes
from fedjax_clip.clipping.shapes import Shape
from fedjax_clip.core import tree
from fedjax_clip.core.types import Array, PyTree

Bound = Callable[[PyTree], Array]


class Bounded(optax.GradientTransformationExtraArgs):
    """An optax transform that knows its L2 bound, ``like -> norm`` for updates of these shapes, as ``l2_bound``."""

    l2_bound: Bound


def bounded(tx: optax.GradientTransformationExtraArgs, l2_bound: Bound) -> optax.GradientTransformationExtraArgs:
    """The same transform, with its bound."""
    made = Bounded(tx.init, tx.update)
    made.l2_bound = l2_bound
    return made


def bound_of(tx: optax.GradientTransformation) -> Bound | None:
    """``like -> L2 norm`` that no result of a clip of ``fc.clipping`` exceeds; ``None`` if none is known.

    Known for fixed thresholds: with T_k the threshold of group k, ``sqrt(sum_k T_k^2)``, times ``sqrt(n_k)`` for a
    group of n_k numbers under the L-infinity norm. Any other transform, and a chain, has none.

    Args:
      tx: an optax transform.

    Example:
      >>> bound = fc.clipping.bound_of(fc.clipping.clip(0.5, scope=fc.clipping.layer()))
      >>> round(float(bound(params)), 4)  # 0.5 sqrt(2), since the model has two layers
      0.7071
    """
    return getattr(tx, "l2_bound", None)


def bound_by_groups(rule: Rule, norm: Norm, scope: Scope, shape: Shape) -> Bound | None:
    """The L2 bound of a clip with these parts, if it has one."""
    of_group, widest = rule.threshold, norm.widest
    if of_group is None or widest is None or not getattr(shape, "bounds", False):
        return None

    def l2_bound(like: PyTree) -> Array:
        sizes = group_sizes(scope, like)
        thresholds = {k: jnp.asarray(of_group(k), jnp.float32) for k in sizes}
        # Factored out, since float32 may not hold its square.
        unit = functools.reduce(jnp.maximum, thresholds.values(), jnp.float32(0))
        squares = [
            jnp.square(thresholds[k] / tree.or_one(unit)) * n * widest(size) ** 2 for k, (n, size) in sizes.items()
        ]
        return unit * jnp.sqrt(sum(squares, jnp.float32(0)))

    return l2_bound


def group_sizes(scope: Scope, like: PyTree) -> dict[str, tuple[int, int]]:
    """``{label: (norms, numbers under the largest of them)}`` of a tree of these shapes."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, x in tree.named_leaves(like):
        shape = np.shape(x)
        total = math.prod(shape)
        if scope.keep == "everything":
            here = total, 1
        elif scope.keep == "units" and (axes := unit_axes(shape)):
            each = math.prod(shape[a] for a in axes)
            here = total // each if each else 0, each
        else:
            here = 1, total
        label = scope.label(name)
        if label in sizes and scope.keep == "nothing":
            sizes[label] = 1, sizes[label][1] + here[1]
        else:
            before = sizes.get(label, (0, 0))
            sizes[label] = before[0] + here[0], max(before[1], here[1])
    return sizes
