"""``reduce.exact_mean`` has the bits of its definition, which ``tests/oracles/exact_mean.py`` computes in fractions."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.exact_mean import exact_mean

import fedjax_clip as fc

SIZE = 4
KINDS = {"weighted": {}, "uniform": {"weighted": False}, "fixed": {"denominator": 7.0}}


class Format(NamedTuple):
    """Significand bits, least and greatest exponents of the messages drawn, and of the least subnormal."""

    dtype: type
    digits: int
    low: int
    high: int
    subnormal: int


FLOAT32 = Format(np.float32, 24, -126, 99, -149)  # 1e-38 to 1e30
BFLOAT16 = Format(ml_dtypes.bfloat16, 8, -126, 99, -133)
FLOAT64 = Format(np.float64, 53, -1022, 1000, -1074)


@functools.cache
def _compiled(kind, x64):
    del x64  # it makes another program
    reducer = fc.reduce.exact_mean(**KINDS[kind])
    return jax.jit(reducer.zero), jax.jit(reducer.add), jax.jit(lambda acc: reducer.finish(acc, None))


def reduced(kind, messages, weights, chunk):
    """The library's mean of ``messages``, ``chunk`` clients at a time."""
    zero, add, finish = _compiled(kind, bool(jax.config.jax_enable_x64))
    roster = fc.reduce.Roster(ids=jnp.arange(len(messages), dtype=jnp.int32), key=jax.random.key(0))
    acc = zero(jnp.asarray(messages[0]), roster)
    for at in range(0, len(messages), chunk):
        acc = add(acc, jnp.asarray(messages[at : at + chunk]), jnp.asarray(weights[at : at + chunk]))
    return np.asarray(finish(acc))


def assert_same_bits(kind, messages, weights, chunk):
    got, want = reduced(kind, messages, weights, chunk), exact_mean(messages, weights, **KINDS[kind])
    assert got.dtype == want.dtype
    bits = np.uint64 if want.dtype == np.float64 else np.uint32
    np.testing.assert_array_equal(got.view(bits), want.view(bits), err_msg=f"{got!r} is not {want!r}")


@st.composite
def rounds(draw, fmt):
    """A round's messages [n, SIZE] and weights [n], in a drawn order."""
    n = draw(st.sampled_from([1, 2, 5, 7]))
    style = draw(st.sampled_from(["wide", "close", "equal", "cancel", "ties", "least"]))
    top = draw(st.integers(fmt.low, fmt.high))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (n, SIZE)
    sign = rng.choice([-1.0, 1.0], shape)
    significand = rng.integers(2 ** (fmt.digits - 1), 2**fmt.digits, shape).astype(np.float64)  # exact: 53 bits
    if style == "wide":
        exponent = rng.integers(fmt.low, top + 1, shape)
    elif style == "least":  # about the least normal float, and subnormals
        exponent = rng.integers(fmt.subnormal, fmt.low + 15, shape)
    elif style == "equal":
        significand[:], exponent = significand[0, 0], top
    else:
        exponent = rng.integers(max(top - 30, fmt.low), top + 1, shape)
    x = np.ldexp(sign * significand, exponent - (fmt.digits - 1))
    if style == "cancel" and n > 1:  # all but a few small elements cancel
        half = n // 2
        x[half : 2 * half] = -x[:half]
        x[2 * half :] = np.ldexp(x[2 * half :], -20)
    if style == "ties":  # halves of the resolution, whichever it is
        depth = rng.integers(fmt.digits, fmt.digits + 30 if fmt is FLOAT64 else fmt.digits + 20, shape)
        x = np.ldexp(sign * rng.choice([1.0, 3.0, 5.0, 7.0], shape), np.maximum(top - depth, fmt.low))
        x[0, 0] = np.ldexp(1.0, top)
    weights = draw(
        st.one_of(
            st.lists(st.integers(1, 600), min_size=n, max_size=n),
            st.lists(st.floats(2.0**-10, 600, width=32), min_size=n, max_size=n),
            st.just([1] * n),
        )
    )
    if style == "cancel":
        weights = [weights[0]] * n
    order = draw(st.permutations(range(n)))
    return x.astype(fmt.dtype)[order], np.asarray(weights, np.float32)[order]


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(drawn=rounds(FLOAT32))
def test_float32_has_the_bits_of_the_definition(kind, chunk, drawn):
    assert_same_bits(kind, *drawn, chunk)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(drawn=rounds(BFLOAT16), chunk=st.sampled_from([1, 3]))
def test_bfloat16_has_the_bits_of_the_definition(kind, drawn, chunk):
    assert_same_bits(kind, *drawn, chunk)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(drawn=rounds(FLOAT64), chunk=st.sampled_from([1, 3]))
def test_float64_has_the_bits_of_the_definition(kind, drawn, chunk):
    with jax.enable_x64(True):
        assert_same_bits(kind, *drawn, chunk)


@settings(max_examples=15, deadline=None)
@given(
    messages=st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=2), min_size=2, max_size=2),
    weights=st.lists(st.integers(1, 600), min_size=2, max_size=2),
)
def test_integer_messages_have_the_bits_of_the_definition(messages, weights):
    assert_same_bits("weighted", np.asarray(messages, np.int32), np.asarray(weights, np.float32), 1)


@pytest.mark.parametrize("share", [0.4375, 0.5, 0.5625, 0.75, 0.875, 1.5, 2.625])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_client_is_rounded_alike_before_and_after_the_largest(order, share):
    messages = np.zeros((2, SIZE), np.float32)
    messages[0, :2] = np.ldexp([share, -share], -36)  # in units of the resolution, which client 1 sets
    messages[1, 2] = 1
    assert_same_bits("uniform", messages[order], np.ones(2, np.float32), 1)
