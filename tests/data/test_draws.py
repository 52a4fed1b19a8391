"""Counter-based draws: published hash values, permutations, and uniformity."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from statistical import assert_uniform

import fedjax_clip as fc
from fedjax_clip.data import draws

# A chi-squared statistic with d degrees of freedom exceeds d + 5 sqrt(2 d) + 15 in fewer than one of 10^6 cases.


def test_mix_is_murmurhash3_of_little_endian_words():
    assert draws.mix(int.from_bytes(b"test", "little"))[0] == 0xBA6BD213
    assert draws.mix() == 0
    words = [int.from_bytes(b"Hello, world"[i : i + 4], "little") for i in (0, 4, 8)]
    assert draws.mix(*words)[0] == murmur3(b"Hello, world")


def murmur3(data: bytes) -> int:
    """A loop over Python integers, from Appleby's reference (length divisible by four, seed 0)."""
    mask, h = 0xFFFFFFFF, 0
    for i in range(0, len(data), 4):
        k = int.from_bytes(data[i : i + 4], "little") * 0xCC9E2D51 & mask
        k = (k << 15 | k >> 17) & mask
        h ^= k * 0x1B873593 & mask
        h = ((h << 13 | h >> 19) & mask) * 5 + 0xE6546B64 & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.data())
def test_chosen_numbers_are_different_and_in_range(size, seed, data):
    count = data.draw(st.integers(0, size))
    chosen = draws.choose(count, size, seed)
    assert len(set(chosen.tolist())) == len(chosen) == count
    assert np.all((chosen >= 0) & (chosen < size))


def test_numbers_of_a_huge_range_are_uniform():
    chosen = draws.choose(10_000, 2**31 - 1, 7)
    assert len(np.unique(chosen)) == 10_000
    assert_uniform(np.bincount(chosen >> 27, minlength=16))


def test_every_ordered_choice_is_equally_likely_whichever_way_it_is_drawn():
    for count, size in ((2, 3), (2, 4), (2, 5), (3, 7), (4, 5)):
        outcomes = {choice: i for i, choice in enumerate(itertools.permutations(range(size), count))}
        counts = np.zeros(len(outcomes))
        for seed in range(8000):
            counts[outcomes[tuple(draws.choose(count, size, seed).tolist())]] += 1
        assert_uniform(counts)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_shuffles_are_permutations_side_by_side(sizes, seed):
    starts = np.cumsum([0, *sizes])
    together = draws.shuffles(np.array(sizes), seed, np.arange(len(sizes)))
    for k, size in enumerate(sizes):
        own = together[starts[k] : starts[k + 1]]
        assert np.array_equal(np.sort(own), np.arange(size))
        assert np.array_equal(own, draws.shuffles(np.array([size]), seed, np.array([k])))


def test_every_shuffle_of_a_small_client_is_equally_likely():
    for size in (2, 3, 4, 5):
        orders = {order: i for i, order in enumerate(itertools.permutations(range(size)))}
        shuffled = draws.shuffles(np.full(24_000, size), 1, np.arange(24_000)).reshape(-1, size)
        assert_uniform(np.bincount([orders[tuple(row)] for row in shuffled.tolist()], minlength=len(orders)))


def test_uniform_draws_are_uniform_and_independent_of_their_neighbours():
    u = draws.uniform(3, np.arange(100_000))
    assert_uniform(np.histogram(u, 64, (0, 1))[0])
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(len(u))


def test_a_draw_with_many_repetitions_ends():
    """Of the first 32 draws of this round only 11 differ, where 12 are wanted."""
    found = fc.data.sampling.uniform(12).sample(np.ones(24), seed=2336, round=1)
    assert len(np.unique(found)) == 12
