"""The threshold rule of a clip: which norms are allowed."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_clip.clipping.scopes import Norms
from fedjax_clip.core import checks
from fedjax_clip.core.types import Array, InvalidInput, PyTree


class Rule(NamedTuple):
    """A rule for the threshold.

    Attributes:
      init: ``norms -> state``, from norms of zeros.
      apply: ``(norms, state, weight_norms) -> (thresholds, state)``; ``weight_norms`` are the parameters' own norms,
        for a rule that needs them.
      uses_params: whether the rule needs the parameters' norms.
      threshold: ``name of a group -> threshold`` if it is constant, else ``None``.

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
    """A constant threshold for all groups, or one for each group, by its name.

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
      floor: the smallest parameter norm assumed.

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


def _following(init: Callable[[Norms], PyTree], one: Callable[..., tuple[Array, PyTree]]) -> Rule:
    """A rule that follows each group's norms separately: ``one(norm, *state) -> (threshold, state)``."""

    def apply(norms, state, _):
        found = {k: one(n, *state[k]) for k, n in norms.items()}
        return {k: f[0] for k, f in found.items()}, {k: f[1] for k, f in found.items()}

    return Rule(init, apply)


def percentile(percent: float | Array, window: int = 1000) -> Rule:
    """The percentile of the last ``window`` norms, the current one included; linear between order statistics.

    The first update is never clipped. A norm that is not finite is not remembered, and the threshold stays as it is.

    Args:
      percent: between 0 and 100.
      window: number of norms that are remembered.

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

    return _following(init, one)


ABSURD = 1e6  # times the earlier norms: no plausible gradient of the same training


def z_score(z: float | Array = 2.5, decay: float = 0.97, warmup: int = 25) -> Rule:
    """``mu + z^2 / score * sigma`` where ``score = (||g|| - mu) / sigma`` is over z; infinity elsewhere.

    mu and sigma^2 are exponential averages of the CLIPPED norms. They begin with the plain norms of the first
    ``warmup`` updates, which are not clipped. A norm that is not finite is not remembered. A norm above a million times
    mu is not remembered either, and is clipped to mu even in the warm-up. If mu is above a million times the norm, the
    averages start again. So one absurd gradient does not switch the clip off.

    Args:
      z: the score above which a norm is clipped.
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

    return _following(init, one)
