"""Clips as optax transforms, for one side of the wire: a client's local step, or the server's."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.clipping import guarantee, rules, scopes, shapes
from fedjax_clip.clipping.norms import Norm, l2
from fedjax_clip.clipping.rules import Rule
from fedjax_clip.clipping.scopes import Norms, Scope
from fedjax_clip.clipping.shapes import Shape
from fedjax_clip.core import checks, tree
from fedjax_clip.core.metrics import Mean
from fedjax_clip.core.types import Array, InvalidInput, Metrics, PyTree


class ClipState(NamedTuple):
    """State of a clip: what it measured and changed in the last update, and its rule's state.

    Attributes:
      fired: fraction of each group's norms that the clip changed, by the group's name.
      norm: the mean norm of each group before the clip.
      threshold: the mean threshold of each group.
      inner: the rule's state.

    Example:
      >>> opt_state = client_tx.init(params)
      >>> _, opt_state = client_tx.update({"w": 3 * jnp.ones((2, 2)), "b": jnp.zeros(1)}, opt_state)
      >>> [float(state.norm[""]) for state in fc.clipping.clip_states(opt_state)]
      [6.0]
    """

    fired: Norms
    norm: Norms
    threshold: Norms
    inner: PyTree


def clip(
    rule: Rule | float | Array,
    *,
    norm: Norm | None = None,
    scope: Scope | None = None,
    shape: Shape | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A clip of any kind: each group of the scope is scaled by ``shape(norm of the group, threshold of the rule)``.

    Guarantee: the shape's. For every shape a NaN makes its whole group NaN. An infinity becomes NaN or, under the scope
    ``element``, the bound. A client whose update is not finite is dropped and counted.

    Args:
      rule: where the threshold comes from: a number, or ``fixed``, ``scheduled``, ``percentile``, ``z_score``,
        ``weight_ratio``.
      norm: ``l2()`` by default, or ``l1()``, ``linf()``.
      scope: ``whole()`` by default, or ``layer()``, ``groups({...})``, ``unit()``, ``element()``.
      shape: ``hard()`` by default, or ``smooth()``, ``normalise()``, ``delta_floor(...)``, ``two_sided(...)``.

    Raises:
      InvalidInput: a threshold that is not a positive number.

    Example:
      >>> tx = optax.chain(fc.clipping.clip(fc.clipping.z_score(), scope=fc.clipping.layer()), optax.sgd(0.1))
    """
    checks.kind("norm", norm, Norm | None, "one of fc.clipping, such as fc.clipping.linf()")
    checks.kind("scope", scope, Scope | None, "one of fc.clipping, such as fc.clipping.layer()")
    checks.kind("shape", shape, Callable | None, "one of fc.clipping, such as fc.clipping.hard()")
    norm, scope, shape = norm or l2(), scope or scopes.whole(), shape or shapes.hard()
    rule = rule if isinstance(rule, Rule) else rules.fixed(rule)

    def init(params):
        zeros = scopes.measure(scope, norm, jax.tree.map(jnp.zeros_like, params))
        none = dict.fromkeys(zeros, jnp.zeros((), jnp.float32))
        return ClipState(none, none, none, rule.init(zeros))

    def update(updates, state, params=None, **extra_args):
        norms = scopes.measure(scope, norm, updates)
        if rule.uses_params and params is None:
            raise InvalidInput("A threshold that depends on the parameters needs them: call update with params.")
        weights = scopes.measure(scope, norm, params) if rule.uses_params else None
        thresholds, inner = rule.apply(norms, state.inner, weights)
        thresholds = {k: jnp.asarray(thresholds[k], n.dtype) for k, n in norms.items()}
        factors = {k: shape(n, thresholds[k]) for k, n in norms.items()}
        changed = {k: f != 1 for k, f in factors.items()}
        fired, size, threshold = (
            {k: jnp.mean(v, dtype=jnp.float32) for k, v in of.items()} for of in (changed, norms, thresholds)
        )
        return scopes.spread(scope, factors, updates), ClipState(fired, size, threshold, inner)

    made = optax.GradientTransformationExtraArgs(init, update)
    limit = guarantee.bound_by_groups(rule, norm, scope, shape)
    return made if limit is None else guarantee.bounded(made, limit)


def watch(tx: optax.GradientTransformation, fired: Callable[[PyTree], Array]) -> optax.GradientTransformationExtraArgs:
    """``tx``, unchanged, with ``fired(updates)`` (before the transform) kept in its state for the metrics.

    Args:
      tx: any optax transform.
      fired: from the incoming updates to a bool scalar: does ``tx`` change them?

    Example:
      >>> tx = fc.clipping.watch(optax.clip(1.0), lambda g: optax.tree.norm(g, ord=jnp.inf) > 1.0)
    """
    checks.kind("tx", tx, optax.GradientTransformation, "an optax transform")
    tx = optax.with_extra_args_support(tx)

    # Not by optax.monitor: its state changes structure in the first step, so no scan can carry it. Nor by
    # optax.snapshot: clip_report would not find its state.
    def init(params):
        return ClipState({"": jnp.zeros((), jnp.float32)}, {}, {}, tx.init(params))

    def update(updates, state, params=None, **extra_args):
        clipped, inner = tx.update(updates, state.inner, params, **extra_args)
        return clipped, ClipState({"": fired(updates).astype(jnp.float32)}, {}, {}, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_states(opt_state: PyTree) -> list[ClipState]:
    """The states of all clips in an optimiser's state, in order, without those inside other clips.

    Args:
      opt_state: of any optax chain.

    Example:
      >>> _, opt_state = client_tx.update({"w": jnp.ones((2, 2)), "b": jnp.zeros(1)}, client_tx.init(params))
      >>> [float(state.threshold[""]) for state in fc.clipping.clip_states(opt_state)]
      [1.0]
    """
    states = jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, ClipState))
    return [s for s in states if isinstance(s, ClipState)]


def clip_report(opt_state: PyTree) -> Metrics:
    """A report of the last step of the clips in an optimiser's state; empty without clips.

    ``clipped``: whether any fired; for each clip, numbered if there are several, ``norm`` and ``threshold`` (where it
    is finite) of each group, and ``clipped/group`` where there are several groups.

    Args:
      opt_state: of any optax chain.

    Example:
      >>> _, opt_state = client_tx.update({"w": jnp.ones((2, 2)), "b": jnp.zeros(1)}, client_tx.init(params))
      >>> float(fc.extend.metrics.finish(fc.clipping.clip_report(opt_state))["clipped"])
      1.0
    """
    one, states = jnp.ones((), jnp.float32), clip_states(opt_state)
    report: Metrics = {}
    for number, state in enumerate(states):
        prefix = f"{number}/" if len(states) > 1 else ""
        for kind, values in (("norm", state.norm), ("threshold", state.threshold), ("clipped", state.fired)):
            for group, value in values.items():
                if kind != "clipped" or len(values) > 1:
                    name = prefix + "/".join(filter(None, (kind, group)))
                    report[name] = Mean.of(value, jnp.isfinite(value).astype(jnp.float32))
    if states:
        fired = jnp.stack([f for state in states for f in state.fired.values()])
        report["clipped"] = Mean(jnp.any(fired > 0).astype(jnp.float32), one)
    return report


def bare_state(state: PyTree) -> PyTree:
    """An optimiser's state without the parts that its clips keep for metrics only.

    Args:
      state: of any optax transform.

    Example:
      >>> jax.tree.leaves(fc.clipping.bare_state(fc.clipping.clip(1.0).init(params)))
      []
    """

    def is_clip(s: PyTree) -> bool:
        return isinstance(s, ClipState)

    return jax.tree.map(lambda s: bare_state(s.inner) if is_clip(s) else s, state, is_leaf=is_clip)


def clip_by_global_norm(max_norm: float | Array) -> optax.GradientTransformationExtraArgs:
    """Scales a step to Euclidean norm at most ``max_norm``: ``g * min(1, max_norm / ||g||)``.

    Guarantee: the result's norm is at most ``max_norm`` up to rounding, its direction is g's. Zero stays zero.
    A NaN anywhere makes the whole result NaN, an infinity becomes NaN: the client is then dropped and counted.

    The norm is summed by columns, which makes the clip of a small network a third cheaper on a CPU.

    Args:
      max_norm: positive threshold on the norm over all leaves, in the units of the gradient; may be traced.

    Raises:
      InvalidInput: a threshold that is not a positive number.

    Example:
      >>> tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))

    Source: Pascanu, Mikolov and Bengio (2013), Algorithm 1; ``optax.clip_by_global_norm``.
    """
    checks.positive("clip_by_global_norm: max_norm", max_norm)
    return clip(max_norm)


def clip_by_value(max_value: float | Array) -> optax.GradientTransformationExtraArgs:
    """Clamps every element: ``clamp(g, -max_value, max_value)``.

    Guarantee: L-infinity norm at most ``max_value``; the direction may change. Zero stays zero, infinities become
    the bound, NaN stays NaN.

    Args:
      max_value: positive bound on an element, in the units of the gradient; may be traced.

    Raises:
      InvalidInput: a bound that is not a positive number.

    Example:
      >>> tx = optax.chain(fc.clipping.clip_by_value(0.01), optax.sgd(0.1))

    Source: ``optax.clip``.
    """
    checks.positive("clip_by_value: max_value", max_value)
    made = watch(optax.clip(max_value), lambda updates: ~(optax.tree.norm(updates, ord=jnp.inf) <= max_value))
    limit = guarantee.bound_by_groups(rules.fixed(max_value), l2(), scopes.element(), shapes.hard())
    return made if limit is None else guarantee.bounded(made, limit)


def auto_clip(percent: float | Array = 10.0, window: int = 1000) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm at a percentile of its own history; see ``percentile``.

    Guarantee: norm at most the percentile of the norms seen. This is no fixed bound, so it gives no sensitivity.

    Args:
      percent: between 0 and 100.
      window: norms that are remembered.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> client_tx = optax.chain(fc.clipping.auto_clip(10), optax.sgd(0.1))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, keep_opt_state=True)

    Source: Seetharaman et al. (2020), "AutoClip", section 2.
    """
    return clip(rules.percentile(percent, window))


def z_clip(z: float | Array = 2.5, decay: float = 0.97, warmup: int = 25) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm if it is an outlier of its own history; see ``z_score``.

    Guarantee: norm at most ``mean + z * deviation`` of the running statistics, after the warm-up.

    Args:
      z: the score above which a norm is clipped.
      decay: of the running mean and deviation.
      warmup: updates that are not clipped.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> client_tx = optax.chain(fc.clipping.z_clip(), optax.sgd(0.1))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, keep_opt_state=True)

    Source: Kumar et al. (2025), "ZClip", Algorithm 1.
    """
    return clip(rules.z_score(z, decay, warmup))


def adaptive_gradient_clip(ratio: float | Array = 0.01, floor: float = 1e-3) -> optax.GradientTransformationExtraArgs:
    """AGC: clips each output unit's gradient at ``ratio`` times the norm of its weights.

    ``optax.adaptive_grad_clip`` with telemetry: the same values, of leaves up to rank 5 (optax takes no others). See
    ``unit`` for what a unit is. Guarantee: ``||g_unit|| <= ratio * max(||w_unit||, floor)``; unchanged under
    (w, g) -> (c w, c g) above the floor.

    Args:
      ratio: positive.
      floor: the smallest weight norm assumed.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> tx = optax.chain(fc.clipping.adaptive_gradient_clip(0.01), optax.sgd(0.1))

    Source: Brock et al. (2021), equation 3.
    """
    return clip(rules.weight_ratio(ratio, floor), scope=scopes.unit())


def smoothed_clip(threshold: float | Array, alpha: float | Array = 1.0) -> optax.GradientTransformationExtraArgs:
    """``threshold * g / (alpha + ||g||)``. Guarantee: norm under ``threshold``; zero stays zero.

    Args:
      threshold: upper bound of the norm, in the units of the gradient.
      alpha: positive; the norm at which half of the threshold is left.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> tx = optax.chain(fc.clipping.smoothed_clip(1.0), optax.sgd(0.1))

    Source: Zhang et al. (2020), "Why gradient clipping accelerates training"; Khirirat et al. (2025), α-NormEC.
    """
    return clip(threshold, shape=shapes.smooth(alpha))


def normalised(length: float | Array = 1.0) -> optax.GradientTransformationExtraArgs:
    """``length * g / ||g||``. Guarantee: norm equal to ``length``; zero stays zero.

    Args:
      length: norm of every step, in the units of the gradient.

    Raises:
      InvalidInput: a threshold that is not a positive number.

    Example:
      >>> tx = optax.chain(optax.ema(0.9), fc.clipping.normalised(), optax.sgd(0.1))  # NSGD-M

    Source: Cutkosky and Mehta (2020), "Momentum improves normalized SGD"; with ``optax.ema`` before it, NSGD-M.
    """
    return clip(length, shape=shapes.normalise())


def delta_clip(threshold: float | Array, delta: float | Array) -> optax.GradientTransformationExtraArgs:
    """``g * min(1, max(delta, threshold / ||g||))``. Guarantee: norm at least ``delta * ||g||``; no upper bound.

    Args:
      threshold: positive, in the units of the gradient.
      delta: between 0, a hard clip, and 1, none.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> tx = optax.chain(fc.clipping.delta_clip(1.0, 0.01), optax.sgd(0.1))

    Source: Tucat et al. (2024), "δ-GClip".
    """
    return clip(threshold, shape=shapes.delta_floor(delta))


def two_sided_clip(lower: float | Array, upper: float | Array) -> optax.GradientTransformationExtraArgs:
    """``sign(g) * clamp(|g|, lower, upper)``, element by element; ``sign(0) = 0``.

    Guarantee: every element that is not zero lies between the bounds in size; L-infinity norm at most ``upper``.

    Args:
      lower: the least size of an element that is not zero.
      upper: the largest size of an element.

    Raises:
      InvalidInput: a number out of its range.

    Example:
      >>> tx = optax.chain(fc.clipping.two_sided_clip(1e-4, 0.1), optax.sgd(0.1))

    Source: Lee et al. (2025), TailOPT, Bi²Clip.
    """
    return clip(upper, scope=scopes.element(), shape=shapes.two_sided(lower))


def u_clip(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Carries the clipped part to later steps: ``u = clip(g + b); b <- g + b - u``.

    Guarantee: the clip's, and the sum of the results is the sum of the gradients less the last carry b. A carry that is
    not finite, or larger than 2^24 times u, is dropped: float32 could not pay it back, and it would absorb every later
    gradient.

    Args:
      tx: any clip.

    Example:
      >>> tx = optax.chain(fc.clipping.u_clip(fc.clipping.clip_by_global_norm(1.0)), optax.sgd(0.1))

    Source: Elesedy and Hutter (2023), "U-Clip: On-Average Unbiased Stochastic Gradient Clipping", Algorithm 1.
    """
    checks.kind("tx", tx, optax.GradientTransformation, "an optax transform")
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return jax.tree.map(jnp.zeros_like, params), tx.init(params)

    def update(updates, state, params=None, **extra_args):
        wanted = jax.tree.map(jnp.add, updates, state[0])
        sent, inner = tx.update(wanted, state[1], params, **extra_args)
        carry = jax.tree.map(jnp.subtract, wanted, sent)
        owed, paid = tree.norm(carry), tree.norm(sent)
        payable = jnp.isfinite(owed) & ((paid == 0) | (owed <= 2.0**24 * paid))
        return sent, (optax.tree.where(payable, carry, optax.tree.zeros_like(carry)), inner)

    made, limit = optax.GradientTransformationExtraArgs(init, update), guarantee.bound_of(tx)
    return made if limit is None else guarantee.bounded(made, limit)
