"""The least epsilon that holds: of every sampler, of algorithms that know their noise, and by replays."""

import logging
import math

import numpy as np
import optax
import pytest
import scipy.stats
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, rdp
from problems import parameters, softmax_loss

import fedjax_clip as fc
from fedjax_clip import privacy, uplink
from fedjax_clip.data import sampling
from fedjax_clip.privacy import exposure, replays
from fedjax_clip.uplink import mechanism

CLIP, FIXED = uplink.clip_by_global_norm(1.0), fc.reduce.fixed_mean(8)
FALSE_ALARM = 1e-6  # of each statistical test below, for a right implementation


def gaussian_delta(z, epsilon):
    """Of one Gaussian mechanism, in closed form (Balle and Wang 2018)."""
    cdf = scipy.stats.norm.cdf
    return cdf(0.5 / z - epsilon * z) - math.exp(epsilon) * cdf(-0.5 / z - epsilon * z)


def test_a_cohort_of_fixed_size_costs_no_more_than_everybody():
    """8 of 11 at z = 2 over 100 rounds: 138.7 before, where 78.0 is all that a Gaussian of z / 2 costs by Renyi."""
    run = {"num_clients": 11, "rounds": 100, "delta": 1e-2}
    by_renyi = privacy.epsilon(2.0, sampling.uniform(8), accountant="rdp", **run)
    assert by_renyi == pytest.approx(78.0, abs=0.05)
    exact = privacy.epsilon(2.0, sampling.uniform(8), **run)
    assert gaussian_delta(1.0 / 10, exact) == pytest.approx(1e-2, rel=1e-6)
    for cohort in range(1, 11):
        sampled = privacy.epsilon(2.0, sampling.uniform(cohort), accountant="rdp", **run)
        assert sampled <= privacy.epsilon(1.0, privacy.Separated(1), accountant="rdp", **run) * (1 + 1e-9)
    few = privacy.epsilon(2.0, sampling.uniform(1), 1000, 100, 1e-2)
    assert few < 0.3 * privacy.epsilon(1.0, privacy.Separated(1), 1000, 100, 1e-2)  # sampling still counts


@pytest.mark.parametrize("cohort", [3, 8])
def test_high_rates_take_the_tighter_accountant_and_say_nothing(cohort, caplog):
    run = {"num_clients": 11, "rounds": 100, "delta": 1e-2}
    by_renyi, by_losses, least = (
        privacy.epsilon(1.25, sampling.poisson(cohort), accountant=name, **run) for name in ("rdp", "pld", "auto")
    )
    assert least == by_losses < 0.9 * by_renyi
    assert privacy.epsilons(1.25, sampling.poisson(cohort), **run)[-1] == least
    assert not caplog.records
    with caplog.at_level(logging.WARNING):  # which is no silence of the test's
        rdp.RdpAccountant().compose(PoissonSampledDpEvent(cohort / 11, GaussianDpEvent(1.25)))
    assert caplog.records


def test_gaussians_alone_are_exact():
    for z, rounds in ((2.0, 1), (3.0, 7), (0.5, 40)):
        epsilon = privacy.epsilon(z, sampling.round_robin(40), 40, rounds, 1e-4)
        assert gaussian_delta(z / math.sqrt(rounds), epsilon) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize(
    "sampler",
    [
        sampling.poisson(5),
        sampling.uniform(5),
        sampling.truncated_poisson(5, 6),
        sampling.cyclic_poisson(5, 3),
        sampling.balls_in_bins(5),
        sampling.b_min_sep(5, 4),
    ],
)
def test_epsilon_by_round_rises_to_the_runs_and_stays_above_it(sampler, monkeypatch):
    monkeypatch.setattr(replays, "FEWEST", 1)
    monkeypatch.setattr(exposure, "REPLAYED", 4)
    by_round = privacy.epsilons(2.0, sampler, 50, 12, 2e-2)
    assert by_round[-1] == privacy.epsilon(2.0, sampler, 50, 12, 2e-2)
    assert np.all(np.diff(by_round) >= 0)
    assert by_round[6] >= privacy.epsilon(2.0, sampler, 50, 7, 2e-2) * (1 - 1e-9)
    z, apart = 1.0 if sampler.scheme == "uniform" else 2.0, privacy.Separated(sampler.period)
    assert by_round[-1] < privacy.epsilon(z, apart, 50, 12, 2e-2)
    z = privacy.noise_multiplier(1.0, sampler, 50, 12, 2e-2)
    assert privacy.epsilon(z, sampler, 50, 12, 2e-2) <= 1.0 < privacy.epsilon(z - 0.03, sampler, 50, 12, 2e-2)


def test_truncation_costs_a_little_and_nothing_where_all_have_room():
    run = {"num_clients": 50, "rounds": 20, "delta": 1e-3}
    whole, roomy, tight = (
        privacy.epsilon(2.0, s, **run)
        for s in (sampling.poisson(5), sampling.truncated_poisson(5, 50), sampling.truncated_poisson(5, 12))
    )
    assert roomy == pytest.approx(whole)
    assert 1.01 * whole < tight < 1.1 * whole
    by_losses = privacy.epsilon(2.0, sampling.truncated_poisson(5, 12), accountant="pld", **run)
    assert tight == by_losses
    with pytest.raises(fc.InvalidInput, match="use 'auto' or 'pld'"):
        privacy.epsilon(2.0, sampling.truncated_poisson(5, 12), accountant="rdp", **run)


def test_replays_meet_what_is_known_and_err_on_the_safe_side():
    """One bin is a Gaussian, one round of b bins a Poisson sample, no separation a Poisson sample of each round."""
    known = {
        "one bin": (
            replays.balls_in_bins(None, 1, 2.0, 4, 1e-2),
            privacy.epsilon(1.0, privacy.Separated(1), 9, 1, 1e-2),
        ),
        "one round": (
            replays.balls_in_bins(None, 5, 1.0, 1, 1e-2),
            privacy.epsilon(1.0, sampling.poisson(1), 5, 1, 1e-2),
        ),
        "no separation": (
            replays.b_min_sep(0.2, 1, np.ones(1), 1.0, 6, 1e-2),
            privacy.epsilon(1.0, sampling.poisson(1), 5, 6, 1e-2),
        ),
        "every b-th round": (
            replays.b_min_sep(1.0, 5, np.ones(1), 1.0, 10, 1e-2),
            replays.balls_in_bins(None, 5, 1.0, 10, 1e-2) / 1.02,
        ),
    }
    for name, (replayed, exact) in known.items():
        assert exact < replayed < 1.08 * exact, name
    assert replays.balls_in_bins(None, 5, 1.0, 10, 1e-2) == replays.balls_in_bins(None, 5, 1.0, 10, 1e-2)
    assert replays.balls_in_bins(None, 5, 1.0, 10, 1e-9) == math.inf  # and no sampling is claimed then
    tiny = privacy.epsilon(1.0, sampling.balls_in_bins(10), 50, 10, 1e-9)
    assert tiny == privacy.epsilon(1.0, sampling.round_robin(10), 50, 10, 1e-9)


def drawn(sampler, clients, rounds, seed=0):
    """bool ``[rounds, clients]``: who came."""
    came = np.zeros((rounds, clients), bool)
    for round in range(rounds):
        came[round, sampler.draw(np.ones(clients), seed, round)] = True
    return came


def test_cyclic_samples_come_from_one_group_at_their_rate():
    came = drawn(sampling.cyclic_poisson(20, 4), 120, 300)
    for round in range(300):
        assert set(np.flatnonzero(came[round]) % 4) <= {round % 4}
    assert scipy.stats.binomtest(int(came.sum()), 300 * 30, 20 * 4 / 120).pvalue > FALSE_ALARM


def test_truncated_samples_leave_out_whom_chance_chooses():
    came, whole = drawn(sampling.truncated_poisson(20, 22), 100, 400), drawn(sampling.poisson(20), 100, 400)
    assert came.sum(axis=1).max() == 22
    assert np.all(came <= whole)
    np.testing.assert_array_equal(came.sum(axis=1), np.minimum(whole.sum(axis=1), 22))
    assert scipy.stats.chisquare(came.sum(axis=0)).pvalue > FALSE_ALARM


def test_each_ball_stays_in_its_bin():
    came = drawn(sampling.balls_in_bins(10), 103, 30)
    assert np.all(came[:10].sum(axis=0) == 1)  # 103 // 10 bins
    np.testing.assert_array_equal(came[10:20], came[:10])
    sizes = came[:10].sum(axis=1)
    assert len(set(sizes.tolist())) > 2  # not dealt evenly
    assert scipy.stats.chisquare(sizes).pvalue > FALSE_ALARM


def test_rested_clients_come_at_one_rate_from_the_start():
    came = np.concatenate([drawn(sampling.b_min_sep(20, 4), 200, 40, seed) for seed in range(5)], axis=1)
    apart = [np.diff(np.flatnonzero(column)).min(initial=99) for column in came.T]
    assert min(apart) == 4
    p = 1 / (200 / 20 - 4 + 1)  # of a rested client
    gaps = np.concatenate([np.diff(np.flatnonzero(column)) for column in came[:, :].T])
    assert np.mean(gaps == 4) == pytest.approx(p, abs=0.05)
    for row in (0, 1, 20, 39):
        assert scipy.stats.binomtest(int(came[row].sum()), 1000, 0.1).pvalue > FALSE_ALARM


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: sampling.cyclic_poisson(5, 0), "groups"),
        (lambda: sampling.cyclic_poisson(0, 2), "cohort_size"),
        (lambda: sampling.cyclic_poisson(6, 2).sample(np.ones(10), 0, 0), "fewer rounds apart"),
        (lambda: sampling.truncated_poisson(5, 0), "most"),
        (lambda: sampling.balls_in_bins(11).sample(np.ones(10), 0, 0), "larger than the population"),
        (lambda: sampling.b_min_sep(5, 3).sample(np.ones(10), 0, 0), "fewer rounds apart"),
        (lambda: privacy.epsilon(1.0, sampling.cyclic_poisson(6, 2), 10, 4, 1e-2), "too many"),
        (lambda: privacy.epsilon(1.0, sampling.b_min_sep(6, 2), 10, 4, 1e-2), "too many"),
        (lambda: privacy.epsilon(1.0, sampling.poisson(6), 10, 4, 1e-2, "gdp"), "'auto', 'rdp' or 'pld'"),
        (lambda: privacy.epsilon(-1.0, sampling.poisson(6), 10, 4, 1e-2), "noise_multiplier"),
    ],
)
def test_what_cannot_be_is_refused(build, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        build()


def fedavg(*links, reducer=FIXED, **kwargs):
    return fc.fedavg(softmax_loss, optax.sgd(0.1), uplink=uplink.chain(*links), reducer=reducer, **kwargs)


RUN = {"sampler": sampling.round_robin(8), "num_clients": 40, "rounds": 20, "delta": 1e-3}


def test_an_algorithm_knows_its_noise():
    noisy = fedavg(CLIP, uplink.gaussian(1.5))
    assert privacy.epsilon(noisy, **RUN) == privacy.epsilon(1.5, **RUN)
    assert privacy.epsilons(noisy, **RUN)[-1] == privacy.epsilon(1.5, **RUN)
    tree = mechanism.tree(20)
    assert privacy.epsilon(fedavg(CLIP, uplink.gaussian(1.5, mechanism=tree)), **RUN) == privacy.epsilon(
        1.5, mechanism=tree, **RUN
    )
    bits = fedavg(uplink.quantile_clip(0.1, bits_noise=2.0), uplink.gaussian(1.5))
    assert privacy.epsilon(bits, **RUN) == privacy.epsilon(privacy.together([1.5, 4.0]), **RUN)
    link, summed = uplink.chain(CLIP, uplink.skellam(1.5)), fc.reduce.modular_sum(8, threshold=8)
    on_grid = fc.fedavg(softmax_loss, optax.sgd(0.1), uplink=link, reducer=summed)
    curve = privacy.distributed(link, parameters(), summed)
    assert privacy.epsilon(on_grid, params=parameters(), **RUN) == privacy.epsilon(curve, **RUN)


def test_without_noise_nothing_is_private():
    assert privacy.together(()) == 0
    assert privacy.epsilon(privacy.together(()), **RUN) == math.inf
    assert privacy.epsilon(fedavg(CLIP), **RUN) == math.inf
    assert privacy.epsilon(fedavg(), **RUN) == math.inf
    assert np.all(privacy.epsilons(fedavg(CLIP), **RUN) == math.inf)
    assert (
        privacy.epsilon(fedavg(gradient=fc.local.private_gradient(1.0, 2.0)), **RUN) == math.inf
    )  # that is for records


@pytest.mark.parametrize(
    ("algorithm", "sentence"),
    [
        (fedavg(CLIP, uplink.gaussian(1.0))._replace(parts=None), "is not known"),
        (fedavg(CLIP, uplink.local_gaussian(1.0)), r"epsilon\(z / 2"),
        (fedavg(CLIP, uplink.gaussian(1.0, noise_cohort=1000)), "larger deployment"),
        (
            fedavg(CLIP, uplink.skellam(1.0), reducer=fc.reduce.modular_sum(8, threshold=8)),
            "give epsilon params=",
        ),
    ],
)
def test_what_an_algorithm_does_not_tell_is_refused(algorithm, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        privacy.epsilon(algorithm, **RUN)


def test_a_record_level_target_is_solved_for_its_noise():
    data = fc.FederatedData({"x": np.ones((30, 2), np.float32), "y": np.arange(30)}, [0, 5, 14, 30])
    about = data, fc.extend.LocalWork(batch_size=4, epochs=2), sampling.uniform(2), 6, 1e-3
    z = privacy.record_noise_multiplier(3.0, *about)
    worst = privacy.record_epsilons(z, *about)
    assert worst.max() <= 3.0 < privacy.record_epsilons(z - 2e-4, *about).max()


def test_weights_that_a_private_gradient_would_ignore_are_refused():
    arrays = {"x": np.ones((4, 2), np.float32)}
    about = fc.extend.LocalWork(batch_size=2), sampling.uniform(2), 3, 1e-3
    alike = fc.FederatedData(arrays, [0, 2, 4], weights=np.full(4, 2.0))
    assert np.all(privacy.record_epsilons(4.0, alike, *about) > 0)
    weighted = fc.FederatedData(arrays, [0, 2, 4], weights=np.array([1.0, 2.0, 1.0, 1.0]))
    for solve in (privacy.record_epsilons, privacy.record_noise_multiplier):
        with pytest.raises(fc.InvalidInput, match="private_gradient counts all equally"):
            solve(4.0, weighted, *about)
    algorithm = fc.fedavg(
        lambda params, batch, key: batch["x"] @ params, optax.sgd(0.1), gradient=fc.local.private_gradient(1, 1)
    )
    with pytest.raises(fc.InvalidInput, match="private_gradient counts all equally"):
        fc.train(algorithm, weighted, np.zeros(2, np.float32), rounds=1)
