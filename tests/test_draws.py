"""Counter-based draws: published hash values, bijections, and uniformity."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_clip.data import draws

# A chi-squared statistic with d degrees of freedom exceeds d + 5 sqrt(2 d) + 15 in fewer than one of 10^6 cases.


def chi_squared(counts):
    expected = np.sum(counts) / len(counts)
    return np.sum((counts - expected) ** 2) / expected, len(counts) - 1


def assert_uniform(counts):
    statistic, freedom = chi_squared(np.asarray(counts))
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 15


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
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_permute_is_a_permutation(size, seed):
    assert np.array_equal(np.sort(draws.permute(np.arange(size), size, seed)), np.arange(size))


def test_permute_of_a_huge_domain_is_distinct_and_inside():
    image = draws.permute(np.arange(10_000), 2**31 - 1, 7)
    assert len(np.unique(image)) == 10_000
    assert image.min() >= 0
    assert image.max() < 2**31 - 1
    assert_uniform(np.bincount(image >> 27, minlength=16))


def test_permute_broadcasts_sizes_and_keys():
    sizes = np.array([[3], [7]])
    index = np.minimum(np.arange(7), sizes - 1)
    both = draws.permute(index, sizes, np.array([[5], [6]]))
    assert np.array_equal(both[0, :3], draws.permute(np.arange(3), 3, 5))
    assert np.array_equal(both[1], draws.permute(np.arange(7), 7, 6))


def test_every_permutation_of_a_small_domain_is_about_equally_likely():
    for size in (2, 3, 4):
        keys = np.arange(24_000)[:, None]
        images = draws.permute(np.arange(size), size, keys, 1)
        orders = {order: i for i, order in enumerate(itertools.permutations(range(size)))}
        assert_uniform(np.bincount([orders[tuple(row)] for row in images.tolist()], minlength=len(orders)))


def test_pairs_of_a_larger_domain_are_uniform():
    images = draws.permute(np.arange(2), 11, np.arange(50_000)[:, None])
    pairs = images[:, 0] * 11 + images[:, 1]
    assert_uniform(np.bincount(pairs, minlength=121).reshape(11, 11)[~np.eye(11, dtype=bool)])


def test_uniform_draws_are_uniform_and_independent_of_their_neighbours():
    u = draws.uniform(3, np.arange(100_000))
    assert_uniform(np.histogram(u, 64, (0, 1))[0])
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(len(u))
