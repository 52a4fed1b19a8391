"""Noise on the right scale, refused where it would promise nothing, and accounted for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from dp_accounting import rdp
from problems import COHORTS, Run, assert_identical, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import privacy, uplink
from fedjax_clip.data import sampling
from fedjax_clip.uplink import Context

SGD = optax.sgd(0.2)
FALSE_ALARM = 1e-6  # of each statistical test below, for a right implementation
SIZE = 20_000


def context(denominator=8.0, key=0, weight=5.0):
    key = jax.random.key(key)
    return Context(key, key, jnp.int32(-1), jnp.float32(weight), denominator=denominator)


def noise_of(link, denominator=8.0, report=None):
    """What the server adds to a mean of zeros, its state and the metrics."""
    zeros = {"w": jnp.zeros(SIZE)}
    state = link.init(zeros)
    sent, _, seen = link.encode(zeros, state, link.init_client(zeros), context(denominator))
    seen = fc.extend.metrics.finish(seen) | (report or {})
    out, state, metrics = link.decode(sent, state, seen, context(denominator))
    return np.asarray(out["w"]), state, metrics


def assert_normal(x, std):
    """Its shape by Kolmogorov and Smirnov, its scale by chi-squared, which finds one that is off by 5%."""
    assert scipy.stats.kstest(x / std, "norm").pvalue > FALSE_ALARM

    def pvalue(std):
        below = scipy.stats.chi2(len(x)).cdf(np.sum(np.square(x / std, dtype=np.float64)))
        return 2 * min(below, 1 - below)

    assert pvalue(std) > FALSE_ALARM
    assert max(pvalue(0.95 * std), pvalue(1.05 * std)) < FALSE_ALARM


@pytest.mark.parametrize(
    ("link", "std"),
    [
        (uplink.chain(uplink.clip_by_global_norm(0.5), uplink.gaussian(1.2)), 1.2 * 0.5 / 8),
        (uplink.chain(uplink.at_client(optax.clip(0.1), bound=3.0), uplink.gaussian(1.2)), 1.2 * 3.0 / 8),
        (uplink.chain(uplink.quantile_clip(0.7, bits_noise=1.0), uplink.gaussian(2.0)), 2.0 * 0.7 / 8),
        (uplink.chain(uplink.relative_to_last(), uplink.clip_by_global_norm(0.5), uplink.gaussian(1)), 0.5 / 8),
        (uplink.chain(uplink.clip_by_global_norm(0.5), uplink.gaussian(1.2, noise_cohort=100)), 1.2 * 0.5 / 100),
    ],
)
def test_noise_is_the_multiplier_times_the_bound_over_the_denominator(link, std):
    noise, _, metrics = noise_of(link)
    assert_normal(noise, std)
    assert [v for k, v in metrics.items() if k.endswith("noise_std")] == [pytest.approx(std)]


def test_each_clients_own_noise():
    link = uplink.chain(uplink.clip_by_global_norm(0.5), uplink.local_gaussian(2.0))
    update = {"w": jnp.full(SIZE, 1.0)}
    ctx = context()
    clipped = 0.5 / np.sqrt(SIZE)
    for key in (0, 1):
        sent, _, _ = link.encode(
            update, link.init(update), link.init_client(update), ctx._replace(key=jax.random.key(key))
        )
        assert_normal(np.asarray(sent["w"]) - clipped, 1.0)


def test_the_quantiles_bits_are_noised_about_one_half():
    link, std = uplink.quantile_clip(1.0, 0.5, rate=1.0, bits_noise=2.0), 2.0 / 8
    one = {"w": jnp.ones(1)}

    @jax.vmap
    def moved(key):
        ctx = context()._replace(key=key)
        report = {
            "within": jnp.float32(0.8),
            "norm": jnp.float32(1),
            "clipped": jnp.float32(0.2),
        }  # 4 of the 5 that came
        return -jnp.log(link.decode(one, {"": jnp.float32(1.0)}, report, ctx)[1][""]) + 0.5

    within = np.asarray(moved(jax.vmap(jax.random.key)(np.arange(SIZE))))
    assert_normal(within - (0.5 + (4 - 5 / 2) / 8), std)


def test_without_noise_it_is_the_clipped_mean_to_the_last_bit():
    """Two clients come to every round, so the fixed denominator is the number that came."""
    clip = uplink.clip_by_global_norm(0.2)
    plain = fc.fedavg(softmax_loss, SGD, uplink=clip, reducer=fc.reduce.uniform_mean())
    silent = fc.fedavg(
        softmax_loss, SGD, uplink=uplink.chain(clip, uplink.gaussian(0.0)), reducer=fc.reduce.fixed_mean(2.0)
    )
    cohorts = [ids[:2] for ids in COHORTS]
    ends = [Run(algorithm, population()).rounds(parameters(), cohorts)[0].params for algorithm in (plain, silent)]
    assert_identical(*ends)


def test_a_fixed_mean_does_not_tell_how_many_came():
    algorithm = fc.fedavg(softmax_loss, SGD, reducer=fc.reduce.fixed_mean(6))
    few, many = (Run(algorithm, population()).rounds(parameters(), [ids])[0].params for ids in ([1], [1, 4]))
    alone = Run(fc.fedavg(softmax_loss, SGD), population()).rounds(parameters(), [[1]])[0].params
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(z - x, (y - x) / 6, atol=1e-6), parameters(), alone, few)
    assert not np.allclose(few["w"], many["w"])


CLIP, NOISE, FIXED = uplink.clip_by_global_norm(1.0), uplink.gaussian(1.0), fc.reduce.fixed_mean(8)


def scaffold(**kwargs):
    return fc.scaffold(softmax_loss, SGD, **kwargs)


def fedavg(**kwargs):
    return fc.fedavg(softmax_loss, SGD, **kwargs)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: fedavg(uplink=NOISE, reducer=FIXED), "put a clip"),
        (lambda: fedavg(uplink=uplink.local_gaussian(1.0)), "put a clip"),
        (lambda: uplink.chain(NOISE, CLIP), "put a clip"),
        (lambda: uplink.chain(CLIP, uplink.relative_to_last(), NOISE), "nothing between them that may enlarge"),
        (lambda: uplink.chain(uplink.at_client(optax.clip(1.0)), NOISE), "put a clip"),
        (lambda: uplink.chain(uplink.memory(fc.uplink.compress(fc.compression.top_k(0.5))), NOISE), "put a clip"),
        (lambda: uplink.chain(CLIP, NOISE, uplink.relative_to_last()), "move the noise last"),
        (lambda: uplink.chain(CLIP, uplink.local_gaussian(1.0), NOISE), "put a clip"),
        (lambda: uplink.chain(uplink.quantile_clip(0.1), NOISE), "bits_noise=cohort_size / 20"),
        (lambda: uplink.chain(uplink.zeroing(), CLIP, NOISE), "leave it out"),
        (lambda: fedavg(uplink=uplink.chain(CLIP, NOISE)), "make fixed_mean the reducer"),
        (lambda: fedavg(uplink=uplink.chain(CLIP, NOISE), reducer=fc.reduce.weighted_mean()), "without weights"),
        (lambda: scaffold(uplink=uplink.chain(CLIP, NOISE), reducer=FIXED), "take fedavg or fedsgd"),
        (lambda: scaffold(uplink=uplink.chain(CLIP, uplink.local_gaussian(1.0))), "take fedavg or fedsgd"),
        (lambda: uplink.gaussian(-1.0), "noise_multiplier"),
        (lambda: uplink.gaussian(1.0, noise_cohort=0), "noise_cohort"),
        (lambda: fc.reduce.fixed_mean(0), "positive"),
    ],
)
def test_what_would_promise_nothing_is_refused_when_it_is_built(build, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        build()


def test_a_gaussian_mechanism_alone():
    """Everyone takes part: delta(epsilon) of one Gaussian mechanism is known in closed form (Balle and Wang 2018)."""
    z, epsilon = 2.0, 1.5
    delta = scipy.stats.norm.cdf(0.5 / z - epsilon * z) - math.exp(epsilon) * scipy.stats.norm.cdf(
        -0.5 / z - epsilon * z
    )
    for sampler in (sampling.uniform(40), sampling.poisson(40), sampling.round_robin(40)):
        assert privacy.epsilon(z, sampler, 40, 1, delta, accountant="pld") == pytest.approx(epsilon, abs=1e-3)
    # four rounds at z are one at z / 2
    four = privacy.epsilon(2 * z, sampling.uniform(40), 40, 4, delta, accountant="pld")
    assert four == pytest.approx(epsilon, abs=1e-3)


def test_round_robin_counts_each_clients_rounds():
    once = privacy.epsilon(1.0, sampling.uniform(40), 40, 1, 1e-5)
    assert privacy.epsilon(1.0, sampling.round_robin(10), 40, 4, 1e-5) == once
    assert privacy.epsilon(1.0, sampling.round_robin(10), 40, 5, 1e-5) > once


@pytest.mark.parametrize("sampler", [sampling.poisson(5), sampling.uniform(5), sampling.round_robin(5)])
def test_epsilon_by_round_is_dp_accountings(sampler):
    by_round = privacy.epsilons(1.3, sampler, 50, 25, 1e-4, accountant="rdp")
    assert by_round.shape == (25,)
    for rounds in (1, 2, 11, 25):
        assert by_round[rounds - 1] == pytest.approx(privacy.epsilon(1.3, sampler, 50, rounds, 1e-4, "rdp"), rel=1e-12)
    assert np.all(np.diff(by_round) >= 0)


def test_tiny_losses_cost_nothing():
    orders, spent = np.array([1.5, 4.0]), np.array([1e-12, 1e-12])
    assert rdp.compute_epsilon(orders, spent, 1e-3)[0] == 0
    assert privacy.epsilons(1e6, sampling.poisson(5), 5000, 2, 1e-3).tolist() == [0, 0]


def test_solvers_find_the_edge():
    sampler = sampling.poisson(10)
    z = privacy.noise_multiplier(3.0, sampler, 500, 60, 1e-4)
    assert privacy.epsilon(z, sampler, 500, 60, 1e-4) <= 3.0 < privacy.epsilon(z - 2e-4, sampler, 500, 60, 1e-4)
    assert privacy.rounds(3.0, z, sampler, 500, 1e-4) == 60
    assert privacy.rounds(1e-3, 0.5, sampler, 500, 1e-4) == 0
    assert privacy.rounds(3.0, 50.0, sampler, 500, 1e-4, most=7) == 7


def test_bits_and_updates_together_cost_what_was_meant():
    link = uplink.chain(uplink.quantile_clip(0.1, bits_noise=2.5), uplink.gaussian(privacy.split(1.5, 2.5)))
    assert privacy.together(link.promises.noise_multipliers) == pytest.approx(1.5)
    assert privacy.together(()) == 0  # no noise is no privacy
    assert privacy.together((1.0, 0.0)) == 0
    assert privacy.epsilon(0, sampling.poisson(1), 10, 1, 0.1) == math.inf


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: privacy.epsilon(1.0, sampling.by_size(5), 50, 1, 1e-5), "use fc.data.sampling.poisson"),
        (lambda: privacy.epsilon(1.0, sampling.uniform(5), 50, 1, 1e-5, "pld"), "use 'auto', or poisson"),
        (lambda: privacy.epsilon(1.0, sampling.uniform(5), 50, 1, 1e-5, "gdp"), "'rdp' or 'pld'"),
        (lambda: privacy.epsilon(1.0, sampling.uniform(5), 50, 1, 0.0), "delta"),
        (lambda: privacy.epsilon(1.0, sampling.uniform(51), 50, 1, 1e-5), "larger than the population"),
        (lambda: privacy.split(2.0, 1.0), "over 1"),
        (lambda: privacy.noise_multiplier(1e-9, sampling.uniform(50), 50, 1, 1e-9), "raise delta"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(call, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        call()
