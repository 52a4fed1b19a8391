"""exact_mean: its formula in fractions, any order and any split, the ends of its range, and what it refuses."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import OPTIMIZED
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from problems import Run, assert_close, clipped_sgd, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.core import exact
from fedjax_clip.reduce import Roster

N, D = 8, 3  # clients, elements
LARGEST = np.float32(2.0**103)  # sums and products with weights stay in range


@functools.partial(jax.jit, static_argnames=("width", "devices", "options"), compiler_options=OPTIMIZED)
def folded(messages, weights, width=1, devices=1, options=()):
    """The mean of messages that come ``width`` at a time, on devices that are lanes of a vmap."""
    reducer = fc.reduce.exact_mean(**dict(options))

    def one_device(messages, weights):
        def body(i, acc):
            return reducer.add(acc, *(jax.lax.dynamic_slice_in_dim(x, i * width, width) for x in (messages, weights)))

        acc = reducer.zero(messages[0], Roster(jnp.arange(len(messages)), jax.random.key(0)))
        return reducer.finish(jax.lax.fori_loop(0, len(messages) // width, body, acc), "devices")

    messages, weights = (x.reshape(devices, -1, *x.shape[1:]) for x in (messages, weights))
    means = jax.vmap(one_device, axis_name="devices")(messages, weights)
    return means[0]


def fl(x: Fraction) -> np.float32:
    """Rounded to nearest even, not by way of float64."""
    if not x:
        return np.float32(0)
    exponent = math.frexp(float(x))[1] - 24
    return np.float32(math.ldexp(round(x / Fraction(2) ** exponent), exponent))


def summed(p: np.ndarray) -> list[np.float32]:
    """S for each column of ``p [n, d]``, by the formula of the docstring."""
    largest = float(np.abs(p).max())
    e = math.frexp(largest)[1] - 1 if largest else -127
    u = Fraction(2) ** (13 * max((e + 128) // 13 - 2, 1) - 127)
    return [fl(u * sum(round(Fraction(float(x)) / u) for x in column)) for column in p.T]


def formula(messages: np.ndarray, weights: np.ndarray) -> np.ndarray:
    weights = weights.astype(np.float32)
    if not weights.any():
        return np.zeros(messages.shape[1], np.float32)
    inverse = np.float32(1) / summed(weights[:, None])[0]
    return np.array([s * inverse for s in summed(weights[:, None] * messages)], np.float32)


def values(largest: float):
    """Of one size, or of sizes far apart, with zeros, negatives and numbers that are not normal."""
    plain = st.floats(-float(largest), float(largest), width=32)
    sizes = st.builds(lambda x, e: np.float32(math.ldexp(x, e)), st.floats(-1, 1, width=32), st.integers(-140, 100))
    return st.one_of(plain, sizes, st.sampled_from([0.0, -0.0, float(largest), -float(largest)]))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (N, D), elements=values(LARGEST)),
    hnp.arrays(np.float32, N, elements=st.one_of(st.integers(0, 2000), st.floats(0, 100, width=32))),
    st.permutations(range(N)),
)
def test_it_is_the_formula_in_fractions_in_any_order_and_any_split(messages, weights, order):
    weights[0] = max(weights[0], 1)
    messages = np.where(np.abs(messages) < 2.0**-126, 0, messages)  # which a CPU takes for 0
    weights, order = np.where(weights < 2.0**-100, 0, weights), np.array(order)
    want = formula(messages, weights)
    for width, devices, to in ((1, 1, order), (2, 4, order[::-1]), (8, 1, np.sort(order))):
        got = np.asarray(folded(messages[to], weights[to], width, devices))
        np.testing.assert_array_equal(got, want)


def test_a_number_in_a_bin_that_goes_is_rounded_to_the_next():
    """Found by the test above: 0.78 of the resolution rounds to 1, whether the larger number comes before or after."""
    messages, weights = np.zeros((N, D), np.float32), np.full(N, 50, np.float32)
    messages[5, 1], messages[7, 2] = 3.2451855e30, 3.7778932e22
    want = formula(messages, weights)
    for width, devices, step in ((1, 1, 1), (1, 1, -1), (2, 4, 1)):
        np.testing.assert_array_equal(folded(messages[::step], weights, width, devices), want)


def test_it_is_never_worse_than_a_sum_of_floats():
    rng = np.random.default_rng(0)
    messages = rng.normal(size=(64, 500)).astype(np.float32)
    weights = rng.integers(1, 600, 64).astype(np.float32)
    true = weights.astype(np.float64) @ messages.astype(np.float64) / weights.sum(dtype=np.float64)
    floats = np.asarray(jnp.tensordot(weights, messages, 1) / weights.sum())
    ours = np.asarray(folded(messages, weights, 4, 2))
    assert np.abs(ours - true).max() <= np.abs(floats - true).max()
    np.testing.assert_allclose(ours, true, rtol=0, atol=2.0**-23 * np.abs(true).max())  # three roundings


def test_the_ends_of_the_range():
    ones, zeros = np.ones(N, np.float32), np.zeros((N, D), np.float32)
    assert not np.asarray(folded(zeros, ones)).any()
    assert not np.asarray(folded(zeros + 5, 0 * ones)).any()  # nobody came
    top = np.finfo(np.float32).max / N
    np.testing.assert_array_equal(folded(zeros + top, ones), zeros[0] + top)
    np.testing.assert_array_equal(folded(zeros + np.float32(2.0**-114), ones), zeros[0] + np.float32(2.0**-114))
    assert not np.asarray(folded(zeros + np.float32(2.0**-116), ones)).any()  # below the resolution
    one_far = zeros + 1
    one_far[3] = 2.0**90  # the others are below its resolution, wherever it comes
    for order in (np.arange(N), np.arange(N)[::-1]):
        np.testing.assert_array_equal(folded(one_far[order], ones), zeros[0] + np.float32(2.0**90 / N))


def test_as_many_clients_as_the_limbs_hold():
    """Each with the digits that are the largest; and one more is refused."""
    worst = np.float32([2 - 2.0**-23, -(2 - 2.0**-23), 1 + 2.0**-12 - 2.0**-23])  # the largest digits of both signs
    for exponent in range(13):
        x = np.float32(np.ldexp(worst, exponent))

        def total(x=x):
            acc = exact.add(exact.zero(jnp.zeros(3), exact.MOST), jnp.broadcast_to(x, (exact.MOST, 3)))
            return exact.rounded(acc)

        np.testing.assert_array_equal(jax.jit(total)(), x * np.float32(exact.MOST))
    with pytest.raises(fc.InvalidInput, match="at most 131,072 clients, and this round has room for 131,073"):
        exact.rounded(exact.zero(jnp.zeros(3), exact.MOST + 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_shows(value):
    for place in (0, 5):
        messages = np.ones((N, D), np.float32)
        messages[place, 1] = value
        assert np.isnan(folded(messages, np.ones(N, np.float32), 2, 2)).all()


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({}, fc.reduce.weighted_mean()),
        ({"weighted": False}, fc.reduce.uniform_mean()),
        ({"denominator": 5}, fc.reduce.fixed_mean(5)),
    ],
)
def test_it_is_the_mean_of_floats_but_for_rounding(options, other):
    reducer = fc.reduce.exact_mean(**options)
    rng = np.random.default_rng(1)
    message = {
        "half": jnp.asarray(rng.normal(size=(N, 4)), jnp.bfloat16),
        "whole": jnp.asarray(rng.integers(-9, 9, (N, 2)), jnp.int32),
        "one": jnp.asarray(rng.normal(size=N), jnp.float32),
        "none": jnp.zeros((N, 0)),
    }
    weights = jnp.asarray([1, 2, 3, 0, 5, 6, 7, 8], jnp.float32)

    def reduced(reducer):
        acc = reducer.zero(jax.tree.map(lambda x: x[0], message), Roster(jnp.arange(N), jax.random.key(0)))
        return reducer.finish(reducer.add(acc, message, weights), None)

    assert_close(reduced(reducer), reduced(other))
    assert jax.tree.map(lambda x: x.dtype, reduced(reducer)) == jax.tree.map(lambda x: x.dtype, reduced(other))
    assert (reducer.weighted, reducer.denominator) == (other.weighted, other.denominator)


def test_float64_loses_nothing():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        messages = np.exp(rng.normal(size=(N, D)) * 8)
        weights = rng.integers(1, 9, N).astype(np.float32)
        both = [np.asarray(folded(messages[::step], weights[::step], 2, 2)) for step in (1, -1)]
    np.testing.assert_array_equal(*both)
    true = weights.astype(np.float64) @ messages / weights.sum()
    np.testing.assert_allclose(both[0], true, rtol=0, atol=2.0**-50 * np.abs(messages).max())


def test_it_has_no_derivative_and_says_so():
    run = Run(fc.fedavg(softmax_loss, clipped_sgd, reducer=fc.reduce.exact_mean()), population())
    _, clients = run.start(parameters())
    cohort = jax.tree.map(lambda x: x[0], run.cohort([4, 1], 0, clients)).differentiable()

    def norm(lr):
        algorithm = fc.fedavg(softmax_loss, optax.sgd(lr), reducer=fc.reduce.exact_mean())
        return optax.tree.norm(algorithm.round(algorithm.init(parameters()), cohort, jax.random.key(0))[0].params)

    with pytest.raises(fc.InvalidInput, match="no derivative: take fc.reduce.weighted_mean"):
        jax.grad(norm)(0.1)


def test_arguments():
    with pytest.raises(fc.InvalidInput, match="denominator"):
        fc.reduce.exact_mean(denominator=0)
    with pytest.raises(fc.InvalidInput, match="weighted"):
        fc.reduce.exact_mean(weighted=3)
    assert fc.reduce.together(fc.reduce.exact_mean(), fc.reduce.exact_mean()).exact
    assert not fc.reduce.together(fc.reduce.exact_mean(), fc.reduce.uniform_mean()).exact
