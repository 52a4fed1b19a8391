"""Clips of a client's update."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip import clipping
from fedjax_clip.clipping.guarantee import group_sizes
from fedjax_clip.clipping.norms import Norm, l2
from fedjax_clip.clipping.scopes import Scope, measure, spread, whole
from fedjax_clip.clipping.shapes import hard
from fedjax_clip.core import checks, tree
from fedjax_clip.core.metrics import Mean
from fedjax_clip.core.types import Array, InvalidInput
from fedjax_clip.uplink import lattice
from fedjax_clip.uplink.base import Uplink, at_client, nothing
from fedjax_clip.uplink.promises import Promises

LEAKS = "{} tells the server without noise which clients' updates are small, so noise on the updates keeps no secret{}."


def clip_by_global_norm(max_norm: float | Array) -> Uplink:
    """Each client scales its update to Euclidean norm at most ``max_norm``: ``u * min(1, max_norm / ||u||)``.

    Guarantee: one client moves the sum of the messages by at most ``max_norm`` (times its weight), up to rounding.
    Zero stays zero. A client whose update is not finite is dropped and counted. Metrics: ``uplink/clipped`` (fraction
    of clients), ``uplink/norm`` and ``uplink/threshold``.

    ``max_norm = client_lr * tau`` clips the SUM of a client's local gradients to tau: FAT-Clipping-PR.

    Args:
      max_norm: positive threshold on the norm of the round's update, in the units of the parameters; may be traced.

    Raises:
      InvalidInput: a threshold that is not a positive number.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), uplink=fc.uplink.clip_by_global_norm(1.0))

    Source: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models", Algorithm 1 (flat
    clipping); Zhang et al. (2022); Yang, Qiu and Liu (2022), FAT-Clipping-PR.
    """
    checks.positive("clip_by_global_norm: max_norm", max_norm)
    return at_client(clipping.clip_by_global_norm(max_norm))


def quantile_clip(
    initial: float | Array = 0.1,
    target_unclipped_quantile: float | Array = 0.5,
    rate: float | Array = 0.2,
    bits_noise: float | Array | None = None,
    scope: Scope | None = None,
    allocation: Literal["global", "equal"] = "global",
) -> Uplink:
    """Clips updates at a bound that tracks a quantile of their norms: ``C <- C exp(-rate (b - target))``.

    b is the unweighted fraction of the cohort whose norm is at most C: each client sends one extra bit.
    Guarantee: norm at most this round's C; C changes by a factor of at most e^rate a round without noise, and settles
    at the target quantile of norms that do not change. Without noise on b, C leaks the bits, so a chain with
    ``gaussian`` requires it: ``b = 1/2 + (sum_i (b_i - 1/2) + N(0, bits_noise^2)) / n`` for a mean with denominator n.

    With a ``scope`` of K groups, such as layers, each group k has its own bound C_k and bit. The message's norm is then
    at most ``sqrt(sum_k C_k^2)``, and later noise scales with that. ``allocation`` divides the noise among the groups.
    ``"global"``: the same noise in all coordinates. ``"equal"``: clients send ``u_k / C_k`` and the server multiplies
    by C_k, so group k has noise ``z sqrt(K) C_k``, and small groups get little. The noise on each bit has standard
    deviation ``sqrt(K) bits_noise``, so K bits cost what one bit costs with ``bits_noise``.

    Args:
      initial: C, or each C_k, before round 0, in the units of the parameters.
      target_unclipped_quantile: the fraction of updates that should pass UNCLIPPED.
      rate: step of log C.
      bits_noise: standard deviation of the noise on the number of bits; the paper takes n / 20. ``fc.privacy.split``
        gives the noise left for updates.
      scope: the groups with their own bounds: ``fc.clipping.layer()`` or ``groups({...})``; the whole update by
        default.
      allocation: of the noise among groups.

    Raises:
      InvalidInput: a bound or rate that is not positive, a target outside [0, 1], a scope of units or elements.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), uplink=fc.uplink.quantile_clip(0.1, 0.5))
      >>> by_layer = fc.uplink.quantile_clip(0.1, bits_noise=2.5, scope=fc.clipping.layer(), allocation="equal")

    Source: Andrew et al. (2021), "Differentially Private Learning with Adaptive Clipping", Algorithm 1; He et al.
    (2023), "Exploring the Limits of Differentially Private Deep Learning with Group-wise Clipping", sections 3 and 4,
    for groups and the allocation of noise among them.
    """
    checks.positive("quantile_clip: initial", initial, finite=True)
    _check_quantile("quantile_clip", target_unclipped_quantile, rate)
    if bits_noise is not None:
        checks.within("quantile_clip: bits_noise", bits_noise, 0, finite=True)
    checks.kind("quantile_clip: scope", scope, Scope | None, "one of fc.clipping, such as fc.clipping.layer()")
    groups = whole() if scope is None else scope
    if groups.keep != "nothing":
        raise InvalidInput(
            "quantile_clip: scope must be one of layers or groups: units and elements are too many bits."
        )
    if allocation not in ("global", "equal"):
        raise InvalidInput(f"quantile_clip: allocation must be 'global' or 'equal', not {allocation!r}.")
    equal = allocation == "equal"

    def init(params):
        return {name: jnp.float32(initial) for name in group_sizes(groups, params)}

    def encode(update, bounds, client_state, ctx):
        norms = measure(groups, l2(), update)
        factors = {k: hard()(n, bounds[k].astype(n.dtype)) for k, n in norms.items()}
        if equal:
            factors = {k: f / bounds[k].astype(f.dtype) for k, f in factors.items()}
        report = {
            _of("within", k): Mean(_number(n <= bounds[k].astype(n.dtype)), _number(True)) for k, n in norms.items()
        }
        report |= {_of("norm", k): Mean(n, _number(True)) for k, n in norms.items()}
        fired = jnp.any(jnp.stack([~(n <= bounds[k].astype(n.dtype)) for k, n in norms.items()]))
        return spread(groups, factors, update), client_state, report | {"clipped": Mean(_number(fired), _number(True))}

    def decode(aggregate, bounds, report, ctx):
        within = {k: report[_of("within", k)] for k in bounds}
        if bits_noise is not None:
            if ctx.denominator is None:
                raise InvalidInput("Noise on quantile_clip's bits needs a fixed mean: make fixed_mean the reducer.")
            centred = jnp.stack([jnp.where(ctx.weight > 0, (b - 0.5) * ctx.weight, 0) for b in within.values()])
            together = math.sqrt(len(bounds)) / 2  # norm of one client's bits, less one half each
            noised = lattice.noised(ctx.key, centred, together, 2 * bits_noise, ctx.denominator)
            within = {k: 0.5 + x / ctx.denominator for k, x in zip(within, noised, strict=True)}
        moved = {k: _towards_quantile(c, within[k], target_unclipped_quantile, rate) for k, c in bounds.items()}
        if equal:
            aggregate = spread(groups, bounds, aggregate)
        seen = {_of("norm", k): report[_of("norm", k)] for k in bounds} | {
            _of("threshold", k): c for k, c in bounds.items()
        }
        if len(bounds) > 1:
            seen |= {_of("clipped", k): 1 - report[_of("within", k)] for k in bounds}
        return aggregate, moved, seen | {"clipped": report["clipped"]}

    def bound(bounds, like):
        return jnp.sqrt(jnp.float32(len(bounds)) if equal else sum(jnp.square(c) for c in bounds.values()))

    link = Uplink(init, nothing, encode, decode, Promises(bound=bound, moves="quantile_clip"))
    if bits_noise is None:
        return link.promising(leaks=LEAKS.format("quantile_clip", ": give it bits_noise=cohort_size / 20"))
    # A bit minus one half has sensitivity one half; K of them sqrt(K) / 2, under noise of sqrt(K) bits_noise.
    return link.promising(noise_multipliers=(2 * bits_noise,), trusts="quantile_clip")


def zeroing(
    initial: float | Array = 10.0,
    target_unclipped_quantile: float | Array = 0.98,
    rate: float | Array = 2.302585,
    multiplier: float | Array = 2.0,
    increment: float | Array = 1.0,
    norm: Norm | None = None,
) -> Uplink:
    """Replaces an update by zero if its norm exceeds ``multiplier Z + increment``, with Z a quantile of the norms.

    Z follows the quantile as ``quantile_clip``'s bound does. Put it BEFORE a clip: ``chain(zeroing(),
    quantile_clip(1.0, 0.8, 0.2))`` is TensorFlow Federated's robust aggregator with Euclidean norms; its own default is
    to zero by the largest element, ``norm=fc.clipping.linf()``. A zeroed client still counts in the average, and the
    clip sees its zero. Guarantee: norm at most ``multiplier Z + increment``; an infinite or NaN update is not zeroed
    but dropped, as everywhere.

    Args:
      initial: Z before round 0, in the units of the parameters.
      target_unclipped_quantile: the quantile of the norms that Z follows.
      rate: step of log Z.
      multiplier, increment: an update is zeroed over ``multiplier Z + increment``.
      norm: ``fc.clipping.l2()`` by default, of the whole update.

    Raises:
      InvalidInput: a bound or rate that is not positive, a target outside [0, 1].

    Example:
      >>> link = fc.uplink.chain(fc.uplink.zeroing(), fc.uplink.quantile_clip(1.0, 0.8))

    Source: TensorFlow Federated, ``robust_aggregator`` (zeroing_factory), whose other defaults these are.
    """
    checks.positive("zeroing: initial", initial)
    _check_quantile("zeroing", target_unclipped_quantile, rate)
    checks.positive("zeroing: multiplier", multiplier)
    checks.within("zeroing: increment", increment, 0)
    checks.kind("zeroing: norm", norm, Norm | None, "one of fc.clipping, such as fc.clipping.linf()")

    def encode(update, quantile, client_state, ctx):
        size = tree.norm(update) if norm is None else measure(whole(), norm, update)[""]
        far = size > (multiplier * quantile + increment).astype(size.dtype)
        message = jax.tree.map(lambda x: jnp.where(far, 0, x), update)
        return message, client_state, _bits(size, quantile) | {"zeroed": Mean(_number(far), _number(True))}

    def decode(aggregate, quantile, report, ctx):
        moved = _towards_quantile(quantile, report["within"], target_unclipped_quantile, rate)
        return aggregate, moved, _seen(quantile, report) | {"zeroed": report["zeroed"]}

    leaks = LEAKS.format("zeroing", ", and has no form with noise: leave it out")
    promises = Promises(contracts=True, leaks=leaks)
    return Uplink(lambda params: jnp.float32(initial), nothing, encode, decode, promises)


def by_group(link: Uplink, groups: Mapping[str, Sequence[int]]) -> Uplink:
    """A clip that also reports the fraction of clients clipped in each group: ``clipped/group`` in its metrics.

    It shows which clients a threshold hits: those with little data, with rare labels, with slow devices ...

    Args:
      link: a link that reports ``clipped``: ``clip_by_global_norm``, ``at_client(a clip)``,
        ``quantile_clip``.
      groups: client numbers by the group's name; a client may be in several.

    Raises:
      InvalidInput: (when a round is traced) a link that does not report whether it clipped.

    Example:
      >>> groups = {"small": np.flatnonzero(data.sizes < 20), "large": np.flatnonzero(data.sizes >= 20)}
      >>> link = fc.uplink.by_group(fc.uplink.clip_by_global_norm(1.0), groups)
    """
    checks.kind("link", link, Uplink, "an fc.uplink.Uplink, such as fc.uplink.clip_by_global_norm(1.0)")
    checks.kind("groups", groups, Mapping, 'clients\' numbers by group, such as {"few": [0, 3]}')
    members = {
        name: checks.client_numbers(f"groups[{name!r}]", ids, 2**31, twice=True).astype(np.int32)
        for name, ids in groups.items()
    }

    def encode(update, state, client_state, ctx):
        message, client_state, report = link.encode(update, state, client_state, ctx)
        if "clipped" not in report:
            raise InvalidInput("by_group needs a link that reports whether it clipped, such as clip_by_global_norm.")
        clipped = report["clipped"].total
        for name, ids in members.items():
            here = _number(jnp.any(ctx.client_id == ids))
            report = report | {f"clipped/{name}": Mean(clipped * here, here)}
        return message, client_state, report

    def decode(aggregate, state, report, ctx):
        update, state, metrics = link.decode(aggregate, state, report, ctx)
        return update, state, metrics | {f"clipped/{name}": report[f"clipped/{name}"] for name in members}

    return link._replace(encode=encode, decode=decode)


def _bits(norm: Array, bound: Array) -> dict:
    within = norm <= bound.astype(norm.dtype)
    return {"within": Mean(_number(within), _number(True)), "norm": Mean(norm, _number(True))}


def _towards_quantile(bound: Array, within: Array, target: float | Array, rate: float | Array) -> Array:
    within = jnp.where(jnp.isnan(within), target, within)  # an empty round: the threshold stays
    moved = bound * jnp.exp(-rate * (within - target)).astype(bound.dtype)
    return jnp.maximum(moved, jnp.finfo(moved.dtype).tiny)  # a bound of zero could never grow again


def _seen(bound: Array, report: dict) -> dict:
    return {"clipped": 1 - report["within"], "norm": report["norm"], "threshold": bound}


def _of(kind: str, group: str) -> str:
    """The name of a group's entry in a report; the whole update is the group without a name."""
    return "/".join(filter(None, (kind, group)))


def _number(flag: Array | bool) -> Array:
    return jnp.asarray(flag, jnp.float32)


def _check_quantile(name: str, target: float | Array, rate: float | Array) -> None:
    checks.within(f"{name}: target_unclipped_quantile", target, 0, 1)
    checks.positive(f"{name}: rate", rate)
