"""Convolutions that stay fast inside a loop on a CPU, and under ``vmap`` with a kernel for every client.

XLA's fast convolution on a CPU takes one form only: channels last, ungrouped, kernel not reversed. The forward pass
of ``flax.linen.Conv`` has it; the gradient to its kernel does not, nor does anything under ``vmap`` with batched
kernels, and inside a ``scan`` or ``fori_loop`` those fall to a plain loop, tens of times slower. Here all three
products of a convolution, and their gradients in turn, are written in the fast form:

  y  = x * w
  dx = (dy, dilated by the strides) * (w, flipped, input and output channels exchanged)
  dw = (x, batch and channels exchanged) * (dy, as a kernel dilated by the strides)

so the family is closed and derivatives of every order are fast. Convolutions with a kernel each run one by one under
``vmap``. Other platforms keep XLA's own convolution and its gradients.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import tree
from fedjax_clip.core.types import Array, InvalidInput

_MARK = "fedjax_clip_convolution"  # names the jitted calls below, so that warn_slow_convolutions recognises them
_FLOATS = ("float16", "bfloat16", "float32", "float64")

Lowering = Literal["auto", "canonical", "unrolled", "xla"]
Pairs = tuple[tuple[int, int], ...]


class _Spec(NamedTuple):
    strides: tuple[int, ...]
    padding: Pairs
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    precision: Any
    lowering: Lowering


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    lowering: Lowering = "auto",
) -> Array:
    """``jax.lax.conv_general_dilated`` with gradients and a ``vmap`` that are fast in a loop on a CPU.

    The values are the same up to rounding. Ungrouped channels-last convolutions of floats in one to three dimensions,
    with any strides, padding and dilation, take the fast form. All others go to ``jax.lax`` unchanged. bfloat16 and
    float16 are accumulated in float32 on a CPU. Works under ``jit``, ``vmap``, loops and ``grad`` of any order;
    forward-mode derivatives (``jvp``, ``jacfwd``) are refused, as by every ``jax.custom_vjp``.

    Args:
      lhs: inputs ``[B, *spatial, I]``.
      rhs: kernel ``[*window, I, O]``.
      window_strides, padding, lhs_dilation, rhs_dilation: as ``jax.lax.conv_general_dilated`` takes them.
      dimension_numbers, feature_group_count, batch_group_count: as ``jax.lax.conv_general_dilated`` takes them.
      precision, preferred_element_type: as ``jax.lax.conv_general_dilated`` takes them.
      lowering: ``"auto"``: the fast form on a CPU, XLA's convolution elsewhere; ``"canonical"`` or ``"xla"``: one of
        them on every platform, to compare; ``"unrolled"``: XLA's convolution and gradients, one by one under ``vmap``
        without a loop.

    Returns:
      ``[B, *spatial_out, O]``.

    Raises:
      InvalidInput: an unknown lowering.

    Example:
      >>> layer = nn.Conv(32, (3, 3), conv_general_dilated=fc.models.conv_general_dilated)  # what ``fc.models.Conv`` is
    """
    if lowering not in get_args(Lowering):
        raise InvalidInput(f"lowering is 'auto', 'canonical', 'unrolled' or 'xla', not {lowering!r}")
    rank = lhs.ndim - 2
    ones = (1,) * rank
    fits = (
        1 <= rank <= 3
        and feature_group_count == batch_group_count == 1
        and preferred_element_type is None
        and lhs.dtype == rhs.dtype
        and lhs.dtype.name in _FLOATS
        and jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == _channels_last(rank)
        and lhs.shape[-1] == rhs.shape[-2]
    )
    if fits:
        strides, lhs_by, rhs_by = (tuple(d or ones) for d in (window_strides, lhs_dilation, rhs_dilation))
        window = _dilated(rhs.shape[:-2], rhs_by)
        if isinstance(padding, str):
            fits = lhs_by == ones  # jax.lax refuses the others
            ends: Sequence[tuple[int, int]] = jax.lax.padtype_to_pads(lhs.shape[1:-1], window, strides, padding)
        else:
            ends = padding
        pads = tuple((int(low), int(high)) for low, high in ends)
        room = np.add(_dilated(lhs.shape[1:-1], lhs_by), np.sum(pads, 1)) - window
        # Empty arrays have nothing to gain.
        fits = fits and bool(np.all(room >= 0) and lhs.size and rhs.size)
    if not fits or lowering == "xla":
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
        )
    return _conv(_Spec(strides, pads, lhs_by, rhs_by, jax.lax.Precision(precision) if precision else None, lowering))(
        *_equally_varying(lhs, rhs)
    )


def warn_slow_convolutions(function_or_jaxpr: Any, *args: Any, platform: str | None = None) -> bool:
    """Warns of convolutions that are slow in a loop on a CPU, and says what to write in their place.

    Ungrouped convolutions in any but the fast form are slow, such as the kernel's gradient of a plain
    ``flax.linen.Conv``. So trace the GRADIENT of the loss. Grouped convolutions are slow too, but ``Conv`` cannot help
    them.

    Args:
      function_or_jaxpr: what ``jax.make_jaxpr`` returns, or a function to trace.
      *args: the function's arguments; shapes and types (``jax.ShapeDtypeStruct``) will do.
      platform: where it will run; ``jax.default_backend()`` by default.

    Returns:
      Whether it warned.

    Example:
      >>> fc.models.warn_slow_convolutions(lambda params, x: x @ params["w"], params, np.zeros((2, 64)))  # has none
    """
    if (platform or jax.default_backend()) != "cpu":
        return False
    if not hasattr(function_or_jaxpr, "eqns"):
        function_or_jaxpr = jax.make_jaxpr(function_or_jaxpr)(*args)
    slow = any(_is_slow(eqn) for eqn in _equations(getattr(function_or_jaxpr, "jaxpr", function_or_jaxpr)))
    if slow:
        warnings.warn(
            "this model's convolutions run tens of times slower in a loop on a CPU: "
            "use fedjax_clip.models.Conv in place of nn.Conv",
            UserWarning,
            stacklevel=2,
        )
    return slow


def _is_slow(eqn: Any) -> bool:
    if eqn.primitive.name != "conv_general_dilated":
        return False
    numbers = eqn.params["dimension_numbers"]
    grouped = eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1
    return not grouped and numbers != _channels_last(len(numbers.lhs_spec) - 2)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, including those of inner jaxprs, except our own convolutions'."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.params.get("name") != _MARK:
            for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(param, "jaxpr", param)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _channels_last(rank: int) -> jax.lax.ConvDimensionNumbers:
    spatial = tuple(range(1, rank + 1))
    return jax.lax.ConvDimensionNumbers(
        (0, rank + 1, *spatial), (rank + 1, rank, *(d - 1 for d in spatial)), (0, rank + 1, *spatial)
    )


def _dilated(sizes: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    return tuple((size - 1) * by + 1 for size, by in zip(sizes, dilation))


def _equally_varying(lhs: Array, rhs: Array) -> tuple[Array, Array]:
    """Both varying over the same axes of a ``shard_map``, as ``custom_vjp`` wants its cotangents."""

    def axes(x: Array) -> frozenset:
        return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())

    def cast(x: Array, other: Array) -> Array:
        missing = tuple(axes(other) - axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return cast(lhs, rhs), cast(rhs, lhs)


def _plain(spec: _Spec, lhs: Array, rhs: Array) -> Array:
    return jax.lax.conv_general_dilated(
        lhs,
        rhs,
        spec.strides,
        spec.padding,
        spec.lhs_dilation,
        spec.rhs_dilation,
        _channels_last(lhs.ndim - 2),
        precision=spec.precision,
    )


def _choose(spec: _Spec, canonical: Callable, xla: Callable, *args: Array) -> Any:
    if spec.lowering != "auto":
        return canonical(*args)
    return jax.lax.platform_dependent(*args, cpu=canonical, default=xla)


@functools.cache
def _sequential(spec: _Spec) -> Callable[[Array, Array], Array]:
    """The convolution in the fast form, which ``vmap`` does not turn into a grouped one."""

    @jax.custom_batching.custom_vmap
    def conv(lhs, rhs):
        return _plain(spec, tree.wide(lhs), tree.wide(rhs)).astype(lhs.dtype)

    @conv.def_vmap
    def batched(axis_size, in_batched, lhs, rhs):
        if in_batched == [True, False]:  # one kernel: a larger batch
            out = conv(lhs.reshape(-1, *lhs.shape[2:]), rhs)
            return out.reshape(axis_size, -1, *out.shape[1:]), True
        if in_batched == [False, True]:  # one input: more output channels
            kernels = jnp.moveaxis(rhs, 0, -2)
            out = conv(lhs, kernels.reshape(*kernels.shape[:-2], -1))
            return jnp.moveaxis(out.reshape(*out.shape[:-1], axis_size, -1), -2, 0), True
        if axis_size == 1 or spec.lowering == "unrolled":
            return jnp.stack([conv(lhs[i], rhs[i]) for i in range(axis_size)]), True
        return jax.lax.map(lambda both: conv(*both), (lhs, rhs)), True

    return conv


def _one_by_one(function: Callable[..., Any], gradient_of: Callable[..., Any]) -> Callable[..., Any]:
    """The function, unrolled under ``vmap``; its gradients are those of another that computes the same."""

    @jax.custom_batching.custom_vmap
    def each(*args):
        return function(*args)

    @each.def_vmap
    def batched(axis_size, in_batched, *args):
        outs = [each(*(x[i] if on else x for x, on in zip(args, in_batched))) for i in range(axis_size)]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *outs), jax.tree.map(lambda _: True, outs[0])

    differentiable = jax.custom_vjp(each)
    differentiable.defvjp(lambda *args: (each(*args), args), lambda args, dy: jax.vjp(gradient_of, *args)[1](dy))
    return differentiable


@functools.cache
def _conv(spec: _Spec) -> Callable[[Array, Array], Array]:
    def forward(lhs, rhs):
        return _choose(spec, _sequential(spec), functools.partial(_plain, spec), lhs, rhs)

    def backward(lhs, rhs, dy):
        fast = _one_by_one(xla_backward, canonical_backward) if spec.lowering == "unrolled" else canonical_backward
        return _choose(spec, fast, xla_backward, lhs, rhs, dy)

    def canonical_backward(lhs, rhs, dy):
        window = _dilated(rhs.shape[:-2], spec.rhs_dilation)
        image = _dilated(lhs.shape[1:-1], spec.lhs_dilation)
        output = _dilated(dy.shape[1:-1], spec.strides)
        low, _ = zip(*spec.padding)
        before = [w - 1 - p for w, p in zip(window, low)]
        after = [i + p - o for i, p, o in zip(image, low, output)]
        to_lhs = spec._replace(
            strides=spec.lhs_dilation, lhs_dilation=spec.strides, padding=tuple(zip(before, after, strict=True))
        )
        ends = [o - i + w - 1 - p for o, i, w, p in zip(output, image, window, low)]
        to_rhs = spec._replace(
            strides=spec.rhs_dilation, rhs_dilation=spec.strides, padding=tuple(zip(low, ends, strict=True))
        )
        flipped = jnp.flip(rhs, range(rhs.ndim - 2)).swapaxes(-1, -2)
        dx = _conv(to_lhs)(dy, flipped)
        dw = _conv(to_rhs)(lhs.swapaxes(0, -1), jnp.moveaxis(dy, 0, -2))
        return dx, jnp.moveaxis(dw, 0, -2)

    def xla_backward(lhs, rhs, dy):
        return jax.vjp(functools.partial(_plain, spec), lhs, rhs)[1](dy)

    for function in (forward, backward):
        function.__name__ = _MARK
    conv, pull = jax.custom_vjp(jax.jit(forward)), jax.jit(backward)
    conv.defvjp(lambda lhs, rhs: (conv(lhs, rhs), (lhs, rhs)), lambda saved, dy: pull(*saved, dy))
    return conv
