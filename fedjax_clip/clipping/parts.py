"""The parts of a clip: a norm, a scope, a rule for the threshold, and a shape."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput, PyTree

Norms = dict[str, Array]  # of each group of a scope; a scalar, or an array that broadcasts against the group's leaf


class Norm(NamedTuple):
    """``finish(join over leaves of reduce over axes of map(x))``.

    Attributes:
      map: what is done to each number.
      reduce: how the numbers of a leaf become one.
      join: how two leaves become one.
      finish: what is done in the end.
      widest: ``n -> the largest L2 norm`` of n numbers whose norm is 1; ``None`` if it is not known.

    Example:
      >>> fc.clipping.clip(1.0, norm=fc.clipping.l1())
    """

    map: Callable[[Array], Array]
    reduce: Callable[..., Array]
    join: Callable[[Array, Array], Array]
    finish: Callable[[Array], Array]
    widest: Callable[[int], float] | None = None


def l1() -> Norm:
    """``sum |x|``.

    Example:
      >>> fc.clipping.clip(1.0, norm=fc.clipping.l1())
    """
    return Norm(jnp.abs, jnp.sum, jnp.add, lambda total: total, lambda n: 1.0)


def l2() -> Norm:
    """``sqrt(sum |x|^2)``, in float32 or better; its gradient at zero is zero.

    Example:
      >>> fc.clipping.clip(1.0, norm=fc.clipping.l2())
    """
    return Norm(lambda x: jnp.square(jnp.abs(x)), jnp.sum, jnp.add, tree.safe_sqrt, lambda n: 1.0)


def linf() -> Norm:
    """``max |x|``.

    Example:
      >>> fc.clipping.clip(1.0, norm=fc.clipping.linf())
    """
    return Norm(jnp.abs, jnp.max, jnp.maximum, lambda total: total, math.sqrt)


class Scope(NamedTuple):
    """What shares one norm: ``label`` names the group of a leaf, ``keep`` the axes within it that are apart.

    Attributes:
      label: ``name of a leaf -> name of its group``.
      keep: ``"nothing"``: a group has one norm; ``"units"``: each output unit has; ``"everything"``: each number.

    Example:
      >>> fc.clipping.Scope(lambda name: name.split("/")[0])  # a norm for each top-level module
    """

    label: Callable[[str], str]
    keep: Literal["nothing", "units", "everything"] = "nothing"


def whole() -> Scope:
    """All of the tree.

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
    """Groups by name: ``{group: regular expression}``, the first that is found in a leaf's name; the rest are one.

    Args:
      patterns: regular expression by the group's name, tried in this order on names such as ``params/Dense_1/kernel``.

    Raises:
      InvalidInput: what is no regular expression.

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

    - a scalar, a vector, or what is one but for axes of length 1: the whole leaf;
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
    """The axes over which a unit reaches; ``None``: over the whole leaf."""
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
    for name, x in tree.named_leaves(updates):
        mapped = norm.map(tree.wide(x))
        if scope.keep == "everything":
            total = mapped
        elif scope.keep == "units" and (axes := unit_axes(x.shape)):
            total = norm.reduce(mapped, axis=axes)
        else:
            total = norm.reduce(tree.by_columns(norm.reduce, mapped)) if x.size else jnp.zeros((), mapped.dtype)
        label = scope.label(name)
        if label in totals:
            dtype = tree.common_type(totals[label], total)
            total = norm.join(totals[label].astype(dtype), total.astype(dtype))
        totals[label] = total
    return {label: norm.finish(total) for label, total in totals.items()}


def spread(scope: Scope, factors: Norms, updates: PyTree) -> PyTree:
    """Each group's factor times its leaves, in their own types."""
    scaled = [tree.scaled(factors[scope.label(name)], x) for name, x in tree.named_leaves(updates)]
    return jax.tree.unflatten(jax.tree.structure(updates), scaled)


class Rule(NamedTuple):
    """Where the threshold comes from.

    Attributes:
      init: ``norms -> state``, from norms of zeros.
      apply: ``(norms, state, weight_norms) -> (thresholds, state)``; ``weight_norms`` are the parameters' own norms,
        for a rule that asks for them.
      uses_params: whether it does.
      threshold: ``name of a group -> threshold`` where it is always the same; ``None`` elsewhere.

    Example:
      >>> # twice the threshold of another rule, which then no longer says what it is
      >>> rule = fc.clipping.z_score()
      >>> def apply(norms, state, weights):
      ...     thresholds, state = rule.apply(norms, state, weights)
      ...     return {name: 2 * t for name, t in thresholds.items()}, state
      >>> wider = rule._replace(apply=apply, threshold=None)
    """

    init: Callable[[Norms], PyTree]
    apply: Callable[[Norms, PyTree, Norms | None], tuple[Norms, PyTree]]
    uses_params: bool = False
    threshold: Callable[[str], float | Array] | None = None


def fixed(threshold: float | Array | Mapping[str, float]) -> Rule:
    """The same threshold always, for all groups; or one for each group, by its name.

    Args:
      threshold: positive, in the units of the gradient; or one for each group of the scope, by its name.

    Raises:
      InvalidInput: a threshold that is not a positive number; (on the first update) a group without one.

    Example:
      >>> scope = fc.clipping.groups({"head": "Dense_1", "body": "."})
      >>> fc.clipping.clip(fc.clipping.fixed({"head": 1.0, "body": 0.1}), scope=scope)
    """

    def of(label: str) -> float | Array:
        if not isinstance(threshold, Mapping):
            return threshold
        if label not in threshold:
            raise InvalidInput(f"There is no threshold for the group {label!r}; there are {sorted(threshold)}.")
        return threshold[label]

    if isinstance(threshold, Mapping) and not threshold:
        raise InvalidInput("A clip's thresholds by group are none: give one for each group.")
    values = [*threshold.values()] if isinstance(threshold, Mapping) else [threshold]
    for value in values:
        checks.positive("A clip's threshold", value)
    known = of if all(isinstance(value, jax.core.Tracer) or math.isfinite(value) for value in values) else None
    return Rule(
        lambda norms: (), lambda norms, state, _: ({k: jnp.asarray(of(k)) for k in norms}, state), threshold=known
    )


def scheduled(schedule: Callable[[Array], Array]) -> Rule:
    """``schedule(t)`` at the t-th update from 0: any optax schedule.

    Args:
      schedule: ``number of the update -> threshold``.

    Example:
      >>> fc.clipping.clip(fc.clipping.scheduled(optax.exponential_decay(1.0, 100, 0.5)))
    """

    def apply(norms, count, _):
        return dict.fromkeys(norms, schedule(count)), count + 1

    return Rule(lambda norms: jnp.zeros((), jnp.int32), apply)


def weight_ratio(ratio: float | Array, floor: float = 1e-3) -> Rule:
    """``ratio * max(||w||, floor)``, with w the group's parameters: AGC's threshold (Brock et al. 2021, equation 3).

    Args:
      ratio: positive.
      floor: the least norm that the parameters are taken to have.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> fc.clipping.clip(fc.clipping.weight_ratio(0.01), scope=fc.clipping.unit())
    """
    checks.positive("weight_ratio", ratio)
    checks.within("floor", floor, 0)

    def apply(norms, state, weights):
        assert weights is not None
        return {k: ratio * jnp.maximum(weights[k], floor) for k in norms}, state

    return Rule(lambda norms: (), apply, uses_params=True)


def percentile(percent: float | Array, window: int = 1000) -> Rule:
    """The percentile of the last ``window`` norms, the current one included; linear between order statistics.

    The first update is never clipped. A norm that is not finite is not remembered, and finds the threshold as it is.

    Args:
      percent: between 0 and 100.
      window: norms that are remembered.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> fc.clipping.clip(fc.clipping.percentile(10, window=200), scope=fc.clipping.layer())

    Source: Seetharaman et al. (2020), "AutoClip", with all norms for a window; Merad and Gaïffas (2023) for a
    rolling one.
    """
    checks.within("percent", percent, 0, 100)
    window = checks.count("window", window, most=10**6)

    def init(norms):
        return {k: (jnp.zeros((window, *n.shape), n.dtype), jnp.zeros(n.shape, jnp.int32)) for k, n in norms.items()}

    def one(norm, past, count):
        usable = jnp.isfinite(norm)
        slot = jnp.arange(window, dtype=jnp.int32).reshape((-1,) + (1,) * norm.ndim)
        past = jnp.where((slot == (count % window)[None]) & usable[None], norm[None], past)
        count = count + usable.astype(jnp.int32)
        held = slot < count[None]
        ranked = jnp.sort(jnp.where(held, past, jnp.inf), axis=0)
        place = percent / 100 * jnp.maximum(jnp.minimum(count, window) - 1, 0).astype(norm.dtype)
        low, high = jnp.floor(place), jnp.ceil(place)
        below, above = (jnp.take_along_axis(ranked, i.astype(jnp.int32)[None], axis=0)[0] for i in (low, high))
        between = jnp.where(high > low, (place - low) * (above - below), 0)
        return jnp.where(count > 0, below + between, jnp.inf), (past, count)

    def apply(norms, state, _):
        found = {k: one(n, *state[k]) for k, n in norms.items()}
        return {k: f[0] for k, f in found.items()}, {k: f[1] for k, f in found.items()}

    return Rule(init, apply)


ABSURD = 1e6  # times the norms before: no gradient of the same training


def z_score(z: float | Array = 2.5, decay: float = 0.97, warmup: int = 25) -> Rule:
    """``mu + z^2 / score * sigma`` where ``score = (||g|| - mu) / sigma`` is over z; infinity elsewhere.

    mu and sigma^2 are exponential averages of the CLIPPED norms, begun with the plain ones of the first ``warmup``
    updates, which are not clipped. A norm that is not finite is not remembered. Nor is one of more than a million times
    mu, which is clipped to mu even in the warm-up; where mu is more than a million times the norm, all begins anew. So
    one absurd gradient does not switch the clip off.

    Args:
      z: scores over it are clipped.
      decay: of the running averages.
      warmup: updates that are not clipped.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> fc.clipping.clip(fc.clipping.z_score(3.0), scope=fc.clipping.layer())

    Source: Kumar et al. (2025), "ZClip".
    """
    checks.positive("z_score", z)
    warmup = checks.count("warmup", warmup, 0)
    checks.within("decay", decay, 0, 1)

    def init(norms):
        return {k: (n * 0, n * 0, jnp.zeros(n.shape, jnp.int32)) for k, n in norms.items()}

    def one(norm, mean, var, count):
        spoilt = (norm > 0) & (mean > ABSURD * norm)
        mean, var, count = (jnp.where(spoilt, 0, x) for x in (mean, var, count))
        deviation = jnp.sqrt(var)
        score = (norm - mean) / jnp.where(deviation > 0, deviation, 1)
        over = (count >= warmup) & (deviation > 0) & (score > z)
        absurd = ~over & (mean > 0) & (norm > ABSURD * mean)
        beyond = jnp.where(absurd, mean, jnp.inf)
        threshold = jnp.where(over, mean + z * z / jnp.where(over, score, 1) * deviation, beyond)
        seen = jnp.minimum(norm, threshold)
        warm = count < warmup
        rate = jnp.where(warm, 1 / (count + 1).astype(norm.dtype), 1 - decay)
        new_mean = mean + rate * (seen - mean)
        # Welford's step while warming up; ZClip's (deviation from the new mean) afterwards.
        spread = jnp.where(warm, (seen - mean) * (seen - new_mean), jnp.square(seen - new_mean))
        new_var = var + rate * (spread - var)
        usable = jnp.isfinite(norm) & jnp.isfinite(new_var) & ~absurd
        state = (jnp.where(usable, new, old) for new, old in ((new_mean, mean), (new_var, var)))
        return threshold, (*state, count + usable.astype(jnp.int32))

    def apply(norms, state, _):
        found = {k: one(n, *state[k]) for k, n in norms.items()}
        return {k: f[0] for k, f in found.items()}, {k: f[1] for k, f in found.items()}

    return Rule(init, apply)


Shape = Callable[[Array, Array], Array]  # (norm, threshold) -> factor


def bounding(shape: Shape) -> Shape:
    """Marks a shape under which no norm exceeds its threshold."""
    shape.bounds = True  # type: ignore[attr-defined] # a mark, which chains of other functions do not have
    return shape


def hard() -> Shape:
    """``min(1, threshold / norm)``. Guarantee: norm at most the threshold, direction kept.

    Example:
      >>> fc.clipping.clip(1.0, shape=fc.clipping.hard())  # the default
    """

    def factor(norm, threshold):
        over = ~(norm <= threshold)  # a NaN too
        return jnp.where(over, threshold / jnp.where(over, norm, 1.0), 1.0)  # whose gradient is finite at zero

    return bounding(factor)


def smooth(alpha: float | Array = 1.0) -> Shape:
    """``threshold / (alpha + norm)``. Guarantee: norm under the threshold; smooth, and never the identity.

    Args:
      alpha: positive; the norm at which half of the threshold is left.

    Raises:
      InvalidInput: an alpha that is not a positive number.

    Example:
      >>> fc.clipping.clip(1.0, shape=fc.clipping.smooth(0.5))
    """
    checks.positive("smooth", alpha)
    return bounding(lambda norm, threshold: threshold / (alpha + norm))


def normalise() -> Shape:
    """``threshold / norm``. Guarantee: norm equal to the threshold; zero stays zero.

    Example:
      >>> fc.clipping.clip(1.0, scope=fc.clipping.layer(), shape=fc.clipping.normalise())
    """
    return bounding(lambda norm, threshold: jnp.where(norm == 0, 0.0, threshold / jnp.where(norm == 0, 1.0, norm)))


def delta_floor(delta: float | Array) -> Shape:
    """``min(1, max(delta, threshold / norm))``. Guarantee: no update shrinks to less than delta of itself; unbounded.

    Args:
      delta: between 0, a hard clip, and 1, none.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> fc.clipping.clip(1.0, shape=fc.clipping.delta_floor(0.01))

    Source: "δ-GClip", Tucat et al. (2024): with delta > 0 gradient descent converges for deep networks of some width.
    """
    checks.within("delta", delta, 0, 1)
    clip = hard()
    return lambda norm, threshold: jnp.maximum(delta, clip(norm, threshold))


def two_sided(lower: float | Array = 0.0) -> Shape:
    """``clamp(norm, lower, threshold) / norm``, zero at zero; with the scope ``element`` it is Bi²Clip's clip.

    Guarantee: norm between the bounds, but for zero, which stays zero.

    Args:
      lower: the least norm of what is not zero; at most the threshold.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> fc.clipping.clip(0.1, scope=fc.clipping.element(), shape=fc.clipping.two_sided(1e-4))

    Source: Lee et al. (2025), "Efficient Distributed Optimization under Heavy-Tailed Noise" (TailOPT), Bi²Clip.
    """

    checks.within("lower", lower, 0)

    def factor(norm, threshold):
        safe = jnp.where(norm == 0, 1.0, norm)
        return jnp.where(norm == 0, 0.0, jnp.clip(norm, lower, threshold) / safe)

    return bounding(factor)
