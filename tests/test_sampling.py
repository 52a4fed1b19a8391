"""Samplers: deterministic in (seed, round), with the right probabilities."""

import numpy as np
import pytest

import fedjax_clip as fc
from fedjax_clip import sampling

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


def test_clients_that_keep_a_state_cannot_be_sampled_twice():
    from problems import ENTRIES, parameters, population

    algorithm = ENTRIES["fedavg, stateful link"]()
    with pytest.raises(fc.InvalidInput, match="keep a state"):
        fc.train(algorithm, population(), parameters(), rounds=1, sampler=sampling.by_size(3, replacement=True))
