"""Folds: everything is held out exactly once, however ragged the clients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_clip as fc
from fedjax_clip.data import folds

RAGGED = st.lists(st.integers(1, 9), min_size=2, max_size=8)


def population(sizes):
    numbers = np.arange(sum(sizes))
    weights = 1.0 + numbers
    return fc.FederatedData({"x": numbers}, np.concatenate([[0], np.cumsum(sizes)]), weights=weights)


def owners(data, index):
    return np.repeat(np.arange(data.num_clients), data.sizes)[index]


@settings(max_examples=40, deadline=None)
@given(RAGGED, st.integers(2, 8), st.integers(0, 5), st.sampled_from([folds.clients, folds.examples]))
def test_every_example_is_held_out_once_and_trained_on_in_all_other_folds(sizes, k, seed, make):
    data = population(sizes)
    k = min(k, len(sizes))
    made = make(data, k, seed)
    held_out = np.concatenate([fold.held_out for fold in made])
    assert sorted(held_out) == list(range(sum(sizes)))
    for fold in made:
        assert sorted(np.concatenate(fold)) == list(range(sum(sizes)))
        train, rest = fold.split(data)
        for part, index in ((train, fold.train), (rest, fold.held_out)):
            np.testing.assert_array_equal(part.examples["x"], index)
            np.testing.assert_array_equal(part.weights, 1.0 + index)
            np.testing.assert_array_equal([int(n) for n in part.names], np.unique(owners(data, index)))


@settings(max_examples=40, deadline=None)
@given(RAGGED, st.integers(2, 8), st.integers(0, 5))
def test_folds_over_clients_hold_out_whole_clients_as_many_in_each(sizes, k, seed):
    data = population(sizes)
    k = min(k, len(sizes))
    held = [np.unique(owners(data, fold.held_out)) for fold in folds.clients(data, k, seed)]
    assert sorted(np.concatenate(held)) == list(range(len(sizes)))
    assert np.ptp([len(h) for h in held]) <= 1


@settings(max_examples=40, deadline=None)
@given(RAGGED, st.integers(2, 8), st.integers(0, 5))
def test_folds_over_examples_take_an_even_share_of_all_and_of_each_client(sizes, k, seed):
    data = population(sizes)
    k = min(k, sum(sizes))
    made = folds.examples(data, k, seed)
    shares = np.array([np.bincount(owners(data, f.held_out), minlength=len(sizes)) for f in made])
    assert np.ptp(shares.sum(1)) <= 1
    assert np.all(np.ptp(shares, axis=0) <= 1)


def test_folds_depend_on_the_seed_and_on_nothing_else():
    data = population([5, 6, 7])
    first, again, other = (folds.examples(data, 3, seed)[0].held_out.tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("make", "k"), [(folds.clients, 4), (folds.clients, 1), (folds.examples, 7), (folds.examples, 2.0)]
)
def test_a_number_of_folds_that_cannot_be(make, k):
    with pytest.raises(
        fc.InvalidInput, match="num_folds, of (clients|examples), must be a whole number between 2 and [36]"
    ):
        make(population([1, 2, 3]), k)
