"""What a message, and a trained model, tell of the examples behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import attacks


def gradient_of(params, batch):
    return jax.grad(lambda p: softmax_loss(p, batch, None)[0].mean())(params)


def one_example(number=0):
    return {k: x[number : number + 1] for k, x in population().examples.items()}


def test_a_dense_layer_gives_its_one_input_away_whatever_scales_the_message():
    batch = one_example()
    gradient = gradient_of(parameters(), batch)
    for scale in (1.0, -0.1, 1e-4):  # a rate, a clip of the whole message
        got = attacks.dense_inputs(scale * gradient["w"], scale * gradient["b"])
        np.testing.assert_allclose(got, batch["x"][0], rtol=1e-4, atol=1e-5)
    assert int(attacks.label_of(gradient["b"])) == int(batch["y"][0])
    assert not np.any(attacks.dense_inputs(np.zeros((4, 3)), np.zeros(3)))
    # Through an uplink that clips, as the server reads it.
    ctx = fc.uplink.Context(jax.random.key(0), jax.random.key(9), jnp.int32(0), jnp.float32(1))
    sent, *_ = fc.uplink.clip_by_global_norm(0.01).encode(jax.tree.map(lambda x: -0.1 * x, gradient), (), (), ctx)
    assert optax.tree.norm(sent) <= 0.0101
    np.testing.assert_allclose(attacks.dense_inputs(sent["w"], sent["b"]), batch["x"][0], rtol=1e-4, atol=1e-4)


def test_of_a_batch_a_dense_layer_gives_a_mixture():
    batch = {k: x[:3] for k, x in population().examples.items()}
    gradient = gradient_of(parameters(), batch)
    got = np.asarray(attacks.dense_inputs(gradient["w"], gradient["b"]))
    coefficients, *_ = np.linalg.lstsq(batch["x"].T, got)
    np.testing.assert_allclose(coefficients @ batch["x"], got, atol=1e-4)
    assert np.linalg.norm(batch["x"] - got, axis=1).min() > 0.1


@pytest.mark.parametrize("match", ["squares", "cosine"])
def test_inputs_are_found_whose_gradient_is_the_one_sent(match):
    params, batch = parameters(), one_example(2)
    gradient = gradient_of(params, batch)
    if match == "cosine":
        gradient = jax.tree.map(lambda x: 0.01 * x, gradient)  # clipped
    known = {**batch, "x": np.zeros_like(batch["x"])}  # the attacker has the shape and the label
    invert = jax.jit(
        lambda gradient, key: attacks.inverted(softmax_loss, params, gradient, known, key, steps=600, match=match)
    )
    got, mismatch = invert(gradient, jax.random.key(1))
    assert mismatch < 1e-4
    np.testing.assert_allclose(got, batch["x"], atol=0.05)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), members=st.integers(1, 12), others=st.integers(1, 12), ties=st.booleans())
def test_separation_is_the_u_statistic_and_the_ks_distance(seed, members, others, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(4, size=members + others) if ties else rng.normal(size=members + others)
    inside = np.arange(members + others) < members
    got = attacks.separation(scores, inside)
    u = scipy.stats.mannwhitneyu(scores[inside], scores[~inside]).statistic
    np.testing.assert_allclose(got["auc"], u / members / others)
    distance = scipy.stats.ks_2samp(scores[inside], scores[~inside], alternative="less").statistic
    np.testing.assert_allclose(got["advantage"], distance, atol=1e-12)
    np.testing.assert_allclose(got["true_positives"], np.mean(scores[inside] > scores[~inside].max()))


def test_likelihood_ratios_are_those_of_normal_logits():
    rng = np.random.default_rng(0)
    inside = np.arange(16)[:, None] % 2 == rng.integers(2, size=40)[None]
    members = rng.random(40) < 0.5
    shift = rng.normal(size=40)
    logits = shift + np.where(inside, 2.0, 0.0) + rng.normal(size=inside.shape)
    target = shift + np.where(members, 2.0, 0.0) + rng.normal(size=40)
    loss = lambda logit: np.log1p(np.exp(-logit))  # noqa: E731
    got = attacks.likelihood_ratios(loss(target), loss(logits), inside)
    expected = scipy.stats.norm.logpdf(target, shift + 2, 1) - scipy.stats.norm.logpdf(target, shift, 1)
    assert np.corrcoef(got, expected)[0, 1] > 0.9
    assert attacks.separation(got, members)["auc"] > attacks.separation(-loss(target), members)["auc"] > 0.6


def test_losses_of_all_examples_are_those_of_the_loss():
    data = population()
    want = softmax_loss(parameters(), data.examples, None)[0]
    np.testing.assert_allclose(attacks.losses_of(softmax_loss, parameters(), data), want, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: attacks.dense_inputs(np.zeros((3, 2)), np.zeros(3)),
        lambda: attacks.inverted(softmax_loss, parameters(), parameters(), one_example(), jax.random.key(0), "z"),
        lambda: attacks.inverted(softmax_loss, parameters(), parameters(), one_example(), jax.random.key(0), "y"),
        lambda: attacks.inverted(softmax_loss, parameters(), parameters(), one_example(), jax.random.key(0), steps=0),
        lambda: attacks.inverted(
            softmax_loss, parameters(), parameters(), one_example(), jax.random.key(0), match="none"
        ),
        lambda: attacks.likelihood_ratios(np.zeros(2), np.zeros((3, 2)), np.ones((3, 2), bool)),
        lambda: attacks.likelihood_ratios(np.zeros(2), np.zeros((3, 1)), np.ones((3, 1), bool)),
        lambda: attacks.separation(np.zeros(2), np.ones(2, bool)),
        lambda: attacks.separation(np.zeros(2), np.array([True])),
        lambda: attacks.losses_of(softmax_loss, parameters(), {"x": 1}),
    ],
)
def test_what_means_nothing_is_refused(make):
    with pytest.raises(fc.InvalidInput):
        make()
