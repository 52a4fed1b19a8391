"""The audit: under epsilon where noise is right, over it for planted faults, and its scores and bounds by themselves.

The whole table of faults is docs/audit.md, by ``python -m experiments.audit --mutants=docs/audit.md``.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_clip as fc
from experiments.auditing import cases, mutants
from fedjax_clip.privacy import canaries, scores

QUICK = {"replays": 2000, "confidence": 0.999}  # the seed is fixed: it is right for good, or wrong for good


@pytest.mark.parametrize("name", ["gaussian, in turn", "memory of a clip"])
def test_what_is_right_stays_under_its_epsilon(name):
    found = cases.right()[name]().audit(**QUICK)
    assert not found.broken
    assert 0 < found.audited < found.accounted  # and the attack is not idle


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("no clip", "likelihood ratio"),
        ("noise once for two rounds", "linear discriminant"),
        ("no noise where nobody came", ""),
        ("bits without noise", ""),
        ("no local noise on zeros", ""),
        ("records clipped by batch", "likelihood ratio"),
        ("rho taken for epsilon", "likelihood ratio"),
    ],
)
def test_a_planted_fault_is_found(name, attack):
    found = mutants.MUTANTS[name]().audit(**QUICK)
    assert found.broken
    assert attack in found.attack


def seen(moved, present, **more):
    """What an attacker sees of one canary of whom only ``moved [L, R]`` is known."""
    moved = np.asarray(moved, float)
    chance = np.ones((1, moved.shape[1]))
    fields = {"chance": chance, "moved": moved[:, None], "updates": moved[:, :, None], "published": {}} | more
    return canaries.Seen(present=np.asarray(present, bool)[:, None], **fields)


def coins(length, seed=0):
    rng = np.random.default_rng(seed)
    return rng, rng.random(length) < 0.5


def test_the_likelihood_ratio_is_that_of_gaussian_noise():
    rng, present = coins(4000)
    moved = rng.normal(size=(4000, 3)) * 2 + present[:, None]
    law = scores.Law(2.0, np.eye(3), False)
    known = scores.likelihood_ratio(law, seen(moved, present))
    np.testing.assert_allclose(known, moved.sum(1))
    q = np.array([[0.25, 0.5, 0.0]])
    found = scores.likelihood_ratio(law, seen(moved, present, chance=q))
    spread = 1.4826 * np.median(np.abs(moved - np.median(moved)))
    ratio = 1 - q + q * np.exp((moved * 2 / spread - 0.5) / 4)
    np.testing.assert_allclose(found, np.log(ratio).sum(1))
    opposed = scores.likelihood_ratio(law._replace(opposed=True), seen(moved, present, chance=q))
    np.testing.assert_allclose(
        opposed, np.log(ratio).sum(1) - np.log(1 - q + q * np.exp((-moved * 2 / spread - 0.5) / 4)).sum(1)
    )


def test_the_likelihood_ratio_undoes_a_mechanism():
    strategy = np.asarray(fc.uplink.mechanism.tree(4).strategy(4), float)
    rng, present = coins(1000)
    took_part = np.array([[1.0, 0.0, 1.0, 0.0]])
    noise = rng.normal(size=(1000, 4))
    moved = np.linalg.solve(strategy, noise.T).T + present[:, None] * took_part
    found = scores.likelihood_ratio(scores.Law(1.0, strategy, False), seen(moved, present, chance=took_part))
    shift = strategy @ took_part[0]
    np.testing.assert_allclose(found, (noise + present[:, None] * shift) @ shift)


def test_the_discriminant_finds_noise_that_two_rounds_share():
    rng, present = coins(2000)
    noise = np.repeat(rng.normal(size=(2000, 1)) * 100, 2, axis=1)
    features = noise + np.stack([present, np.zeros(2000)], axis=1)
    score = scores.discriminant(features, present, np.arange(2000) < 500)
    assert score[present].min() > score[~present].max()


def test_exact_values_and_support_see_what_comes_back_and_what_cannot_be():
    rng, present = coins(2000)
    fit = np.arange(2000) < 1000
    values = rng.normal(size=(2000, 3))
    assert np.all(scores.exact_values(values, present, fit)[~fit] == 0)  # new numbers say nothing
    values[~present, 1] = 0.0
    score = scores.exact_values(values, present, fit)[~fit]
    assert np.all(score[present[~fit]] == 0)
    assert np.all(score[~present[~fit]] < 0)
    flat = rng.uniform(-1, 1, size=(2000, 1)) + 0.5 * present[:, None]
    score = scores.support(flat, present, fit)
    assert np.all(score[present & (flat[:, 0] > 1)] == 1)
    assert np.mean(score[~present & ~fit] > 0) < 0.01


def test_a_bound_holds_and_is_not_idle():
    truth = fc.privacy.epsilon(1.0, fc.privacy.Separated(1), 1, 1, 0.1, "pld")
    found = []
    for seed in range(20):
        rng, present = coins(4000, seed)
        found.append(scores.bound(rng.normal(size=4000) + present, present, 0.01, 0.1, seed))
    assert max(found) <= truth
    assert np.median(found) > 0.5 * truth


@pytest.mark.parametrize(("gaussian", "delta", "least"), [(True, 1e-3, 1.0), (False, 1e-9, 0.3)])
def test_bounds_of_one_run_hold_and_are_not_idle(gaussian, delta, least):
    truth = fc.privacy.epsilon(1.0, fc.privacy.Separated(1), 1, 1, delta, "pld")
    rng, present = coins(4000)
    score = rng.normal(size=4000) + present
    name, found = scores.one_run(score, present, 0.01, delta, gaussian, 0)
    assert least < found < truth
    assert ("f-DP" in name) == gaussian


def build(*links, reducer=None, **options):
    reducer = fc.reduce.fixed_mean(2) if reducer is None else reducer
    return functools.partial(fc.fedavg, uplink=fc.uplink.chain(*links), reducer=reducer, **options)


CLIP = fc.uplink.clip_by_global_norm(1.0)


def test_replays_are_of_the_algorithm_that_is_built():
    """What canaries and others send, without noise: the canary's direction, its weight, its absence."""
    stage = canaries.Stage(
        build(CLIP), fc.data.sampling.round_robin(2), 4, 2, {"a": jnp.zeros((2, 3))}, ("clients/",), False, False, 30, 0
    )
    shown = stage.replay(canaries.Trial("here or not", canaries.HUGE, None, quiet=True))
    there = shown.present[:, 0]
    assert 5 < there.sum() < 25
    assert stage.canaries == 2
    np.testing.assert_array_equal(shown.chance, [[1, 0], [1, 0]])  # clients 0 and 1 come in the first round
    np.testing.assert_allclose(shown.moved[:, 0], np.outer(there, [0.5, 0]), atol=1e-6)  # C / n
    np.testing.assert_array_equal(
        shown.published["clients"], np.stack([there, np.full(30, 2)], 1)
    )  # not the other canary
    several = stage.replay(canaries.Trial("several", canaries.HUGE, 0.0, several=True))
    np.testing.assert_allclose(several.moved[:, :, 0], several.present / 2, atol=1e-6)
    np.testing.assert_array_equal(several.published["clients"], 2)


def test_clients_keep_their_states_through_a_replay():
    """Of a memory of step 1 behind a clip to 1: a gradient of 3 is sent in three rounds, and then nothing."""
    link = fc.uplink.memory(fc.clipping.clip_by_global_norm(1.0))
    everyone = fc.data.sampling.round_robin(2)
    stage = canaries.Stage(build(link), everyone, 2, 4, {"a": jnp.zeros(4)}, (), False, False, 4, 0)
    shown = stage.replay(canaries.Trial("three", 3.0, 3.0, quiet=True))
    np.testing.assert_allclose(shown.moved[:, 0], np.tile([0.5, 1.0, 1.5, 1.5], (4, 1)), atol=1e-5)


def test_a_server_that_reads_messages_sees_each():
    stage = canaries.Stage(
        build(CLIP), fc.data.sampling.round_robin(2), 4, 1, {"a": jnp.zeros(4)}, (), False, True, 4, 0
    )
    alone = stage.replay(canaries.Trial("alone", canaries.HUGE, -canaries.HUGE))
    np.testing.assert_allclose(alone.moved[:, 0, 0], np.where(alone.present[:, 0], 1, -1), atol=1e-6)
    less = stage.replay(canaries.Trial("less", canaries.HUGE, -canaries.HUGE, contrast=-1.0))
    other = less.updates[:, 0] - less.moved[:, 0] * stage.directions[0]
    np.testing.assert_allclose(other, np.tile(-stage.directions[-2], (4, 1)), atol=1e-5)


NOISY = (CLIP, fc.uplink.gaussian(2.0))
GIVEN = {"num_clients": 4, "delta": 1e-3}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fc.privacy.audit(build(CLIP), fc.data.sampling.poisson(2), **GIVEN), "no noise to audit"),
        (lambda: fc.privacy.audit(build(*NOISY), None, **GIVEN), "sampler"),
        (
            lambda: fc.privacy.audit(build(*NOISY), fc.data.sampling.poisson(2), **GIVEN, replays=1),
            "whole number between 100",
        ),
        (lambda: fc.privacy.audit(build(*NOISY), fc.data.sampling.poisson(2), **GIVEN, rounds=10**9), "rounds must be"),
        (lambda: fc.privacy.audit(build(*NOISY), fc.data.sampling.poisson(2), **GIVEN, confidence=1.0), "confidence"),
        (lambda: fc.privacy.audit(build(*NOISY), fc.data.sampling.poisson(2), num_clients=4, delta=2.0), "delta"),
        (
            lambda: fc.privacy.audit(build(CLIP, fc.uplink.local_gaussian(4.0)), fc.data.sampling.poisson(2), **GIVEN),
            "Say noise_multiplier=",
        ),
        (
            lambda: fc.privacy.audit(
                lambda *at: fc.fedavg(*at)._replace(parts=None), fc.data.sampling.poisson(2), **GIVEN
            ),
            "Only built-in algorithms",
        ),
        (
            lambda: fc.privacy.audit(build(*NOISY), fc.data.sampling.by_size(2), **GIVEN),
            "amplification by this sampler",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused(call, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        call()


RUN = ("--task=linear_regression(num_clients=6)", "--cohort_size=3", "--sampler=round_robin", "--audit_rounds=2")


def test_the_binary_audits_the_flags_of_a_run(binaries):
    code, out, err = binaries("audit", *RUN, "--uplink=clip_by_global_norm(0.5)|gaussian(2.0)", "--replays=1000")
    assert (code, err) == (0, "")
    assert "audited and accounted, at delta 0.001" in out
    assert "nothing wrong found, which is no proof" in out
    assert "one client's presence" in out


def test_the_binary_says_what_is_wrong(binaries):
    code, _, err = binaries("audit", *RUN, "--uplink=clip_by_global_norm(0.5)")
    assert code == 2
    assert "no noise to audit" in err
    code, _, err = binaries("audit", *RUN, "--uplink=clip_by_global_norm(0.5)|gaussian(2.0)", "--replays=1")
    assert code == 2
    assert "replays must be a whole number between 100" in err


def test_the_binary_ends_with_1_where_a_run_is_broken(binaries, monkeypatch):
    """A link that the flags name and that adds no noise, though it promises some."""
    silent = fc.uplink.gaussian(2.0)
    silent = silent._replace(
        encode=lambda update, state, client_state, ctx: (update, client_state, {}),
        decode=lambda aggregate, state, report, ctx: (aggregate, state, {}),
    )
    from experiments.config import registry

    monkeypatch.setattr(registry, "UPLINKS", {**registry.UPLINKS, "gaussian": lambda noise_multiplier: silent})
    code, out, _ = binaries("audit", *RUN, "--uplink=clip_by_global_norm(0.5)|gaussian(2.0)", "--replays=1000")
    assert code == 1
    assert "BROKEN" in out
