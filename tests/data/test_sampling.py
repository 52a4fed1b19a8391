"""Samplers: deterministic in (seed, round), with the right probabilities."""

import numpy as np
import optax
import pytest

import fedjax_clip as fc
from fedjax_clip.data import sampling

SIZES = np.array([5, 10, 20, 40, 25])
SAMPLERS = {
    "uniform": sampling.uniform(3),
    "poisson": sampling.poisson(3),
    "by_size": sampling.by_size(3),
    "by_size, replacement": sampling.by_size(3, replacement=True),
    "round_robin": sampling.round_robin(3),
    "available": sampling.available(3, period=4, duty=0.5),
}
ROUNDS = 4000


def frequency(sampler, rounds=ROUNDS):
    """How often each client stands in a cohort."""
    ids = np.concatenate([sampler.sample(SIZES, 1, r) for r in range(rounds)])
    return np.bincount(ids, minlength=len(SIZES)) / rounds


@pytest.mark.parametrize("name", SAMPLERS)
def test_cohorts_are_a_function_of_seed_and_round(name):
    sampler = SAMPLERS[name]
    cohorts = [sampler.sample(SIZES, 1, r) for r in range(20)]
    for r, ids in enumerate(cohorts):
        assert np.array_equal(ids, sampler.sample(SIZES, 1, r))
        assert np.all((ids >= 0) & (ids < len(SIZES)))
        assert sampler.replacement or len(set(ids.tolist())) == len(ids)
    assert len({tuple(ids) for ids in cohorts}) > 1
    if name != "round_robin":
        assert any(not np.array_equal(ids, sampler.sample(SIZES, 2, r)) for r, ids in enumerate(cohorts))


# Five standard errors of a proportion over ROUNDS rounds: a false alarm about once in 10^6.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", np.full(5, 0.6)),
        ("poisson", np.full(5, 0.6)),
        ("by_size, replacement", 3 * SIZES / 100),
        ("round_robin", np.full(5, 0.6)),
    ],
)
def test_every_client_takes_part_as_often_as_it_should(name, expected):
    np.testing.assert_allclose(frequency(SAMPLERS[name]), expected, atol=5 * np.sqrt(3 * 0.25 / ROUNDS))


def test_without_replacement_the_first_draw_is_in_proportion_to_size():
    first = frequency(sampling.by_size(1))
    np.testing.assert_allclose(first, SIZES / 100, atol=5 * np.sqrt(0.25 / ROUNDS))
    assert np.all(np.diff(frequency(sampling.by_size(3))[np.argsort(SIZES)]) > 0)


def test_poisson_cohorts_vary_in_size_and_count_independently():
    counts = np.array([len(sampling.poisson(3).sample(SIZES, 1, r)) for r in range(ROUNDS)])
    np.testing.assert_allclose(counts.var(), 5 * 0.6 * 0.4, rtol=0.15)


def test_round_robin_visits_everyone_in_turn():
    cohorts = [sampling.round_robin(2).sample(SIZES, 0, r).tolist() for r in range(3)]
    assert cohorts == [[0, 1], [2, 3], [4, 0]]


def test_only_available_clients_take_part():
    windows = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], bool)
    sampler = sampling.available(2, windows=windows)
    for r in range(20):
        ids = sampler.sample(SIZES, 0, r)
        assert len(ids) == 2
        assert np.all(windows[r % 2, ids])
    periodic = sampling.available(5, period=6, duty=0.5)
    present = np.array([np.isin(np.arange(5), periodic.sample(SIZES, 0, r)) for r in range(12)])
    assert np.array_equal(present[:6], present[6:])
    assert np.array_equal(present[:6].sum(0), np.full(5, 3))


def test_a_cohort_from_a_million_clients_is_drawn_without_looking_at_them():
    ids = sampling.uniform(50).sample(np.ones(1_000_000), 0, 0)
    assert len(set(ids.tolist())) == 50


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (np.array([True, False, True]), "not bool of shape .3,.: np.flatnonzero"),
        (np.array([0.0, 1.0]), "not float64"),
        ([[0, 1]], "of shape .1, 2."),
        ([0, -1], "from 0 to 2, and hold -1"),
        ([0, 3], "from 0 to 2, and hold 3"),
        ([1, 0, 1], "hold client 1 twice"),
    ],
)
def test_a_cohort_is_numbers_of_clients(ids, sentence):
    own = sampling.Sampler(lambda sizes, seed, round: ids)
    turn = fc.data.clock.Turn(ids, None, {})
    data, loss = fc.FederatedData({"x": np.ones((3, 2), np.float32)}, [0, 1, 2, 3]), lambda p, b, k: b["x"] @ p
    for sampler in (own, fc.data.clock.Clock(0, lambda world, state, round: (turn, state))):
        with pytest.raises(fc.InvalidInput, match=sentence):
            fc.train(fc.fedavg(loss, optax.sgd(0.1)), data, np.zeros(2, np.float32), rounds=1, sampler=sampler)
    if "twice" not in sentence:
        with pytest.raises(fc.InvalidInput, match=sentence):
            fc.extend.plan(data, ids, fc.extend.LocalWork(), seed=0, round=0)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True, "a"])
def test_a_seed_has_32_bits(seed):
    data = fc.FederatedData({"x": np.ones((9, 2), np.float32), "y": np.arange(9) % 2}, [0, 3, 6, 9])
    work, points, quality = fc.extend.LocalWork(), {"lr": [0.1]}, fc.data.quality
    for call in (
        lambda: fc.train(fc.fedavg(abs, optax.sgd(0.1)), data, np.zeros(2), rounds=1, seed=seed),
        lambda: fc.sweep(lambda h: fc.fedavg(abs, optax.sgd(0.1)), points, data, {}, abs, rounds=1, seeds=[seed]),
        lambda: fc.extend.plan(data, [0], work, seed=seed, round=0),
        lambda: data.split_clients(0.5, seed),
        lambda: data.split_examples(0.5, seed),
        lambda: fc.data.folds.clients(data, 2, seed),
        lambda: fc.data.folds.examples(data, 2, seed),
        lambda: fc.data.partition.iid(data.examples, 2, seed),
        lambda: quality.oversample(data, 2, seed=seed),
        lambda: quality.flip_labels(data, 0.5, 2, seed=seed),
        lambda: quality.drop_values(data, 0.5, seed=seed),
        lambda: fc.attacks.backdoor(data, [0], [0], 1.0, 1, 0.5, seed=seed),
        lambda: fc.sweeping.random(2, seed),
        lambda: fc.uplink.count_sketch(seed=seed),
        lambda: fc.tasks.linear_regression(seed=seed),
    ):
        with pytest.raises(fc.InvalidInput, match="whole number between 0 and 4294967295"):
            call()


def test_clients_that_keep_a_state_cannot_be_sampled_twice():
    from problems import ENTRIES, parameters, population

    algorithm = ENTRIES["fedavg, stateful link"]()
    with pytest.raises(fc.InvalidInput, match="keep a state"):
        fc.train(algorithm, population(), parameters(), rounds=1, sampler=sampling.by_size(3, replacement=True))
