"""Newer defences: limiting cases, what adaptive clipping and mixing do, and where each of them breaks down."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_close, assert_identical
from test_robust import IDS, N, flat, fold, matrix, messages, with_absent

import fedjax_clip as fc
from fedjax_clip import reduce

EVERYONE = np.ones(N, np.float32)
F = 2  # of seven
NEW = {  # one function each, so that each compiles once
    "arc": lambda: reduce.arc(F, reduce.trimmed_mean(F)),
    "nnm": lambda: reduce.nnm(F, reduce.median()),
    "mda": lambda: reduce.mda(F),
    "smea": lambda: reduce.smea(F),
    "caf": lambda: reduce.caf(F),
    "bulyan": lambda: reduce.bulyan(1),
    "dnc": lambda: reduce.dnc(F, iterations=2, coordinates=7),
    "flame": reduce.flame,
}


def rows_of(values):
    return matrix(values, np.argsort(IDS))


def test_without_malicious_clients_each_is_its_limit():
    values, median = messages(4), reduce.median()
    mean = fold(fc.reduce.uniform_mean, values, EVERYONE, IDS)
    assert reduce.arc(0, median) is median
    for make in (
        lambda: reduce.nnm(0, reduce.median()),
        lambda: reduce.nnm(0, reduce.krum(1)),
        lambda: reduce.mda(0),
        lambda: reduce.smea(0),
        lambda: reduce.caf(0),
        lambda: reduce.bulyan(0),
        lambda: reduce.dnc(0),
    ):
        assert_close(fold(make, values, EVERYONE, IDS), mean)
    same = jax.tree.map(lambda x: np.repeat(x[:1], N, axis=0), values)
    for make in NEW.values():
        assert_close(fold(make, same, EVERYONE, IDS), jax.tree.map(lambda x: x[0], same))


@pytest.mark.parametrize("name", NEW)
def test_order_chunks_and_absent_clients_change_no_bit(name):
    present = np.array([1, 1, 0, 1, 1, 1, 1], bool) if name != "bulyan" else np.ones(N, bool)
    values, weights = with_absent(messages(3), present), present.astype(np.float32)
    expected = fold(NEW[name], values, weights, IDS)
    assert flat(expected).any()
    order = np.random.default_rng(1).permutation(N)
    shuffled = jax.tree.map(lambda x: x[order], values), weights[order], IDS[order]
    assert_identical(fold(NEW[name], *shuffled), expected)
    assert_identical(fold(NEW[name], values, weights, IDS, width=1), expected)
    longer = jax.tree.map(lambda x: np.concatenate([x, np.zeros((2, *x.shape[1:]), x.dtype)]), values)
    absent = np.concatenate([weights, [0, 0]]).astype(np.float32), np.concatenate([IDS, [-1, -1]]).astype(np.int32)
    assert_close(fold(NEW[name], longer, *absent, width=N + 2), expected)
    few = np.float32(np.arange(N) < NEW[name]().fewest - 1)
    assert not flat(fold(NEW[name], with_absent(messages(3), few > 0), few, IDS)).any()


@functools.cache
def stacked(make):
    """All messages after a change of the stack, in the order of clients."""
    everything = lambda: make(reduce.stacking(lambda stack: stack.messages))  # noqa: E731
    return lambda values, weights=EVERYONE: fold(everything, values, weights, IDS)


def clipped_by_two(reducer):
    return reduce.arc(F, reducer)


def mixed_by_two(reducer):
    return reduce.nnm(F, reducer)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(1e-3, 1e6), bad=st.integers(0, F))
def test_adaptive_clipping_shortens_the_longest_to_the_next_and_touches_no_other(seed, scale, bad):
    values = messages(seed)
    values = {k: np.where((sorted(IDS)[bad] > IDS).reshape(-1, *[1] * (x.ndim - 1)), np.float32(scale) * x, x)
              for k, x in values.items()}  # fmt: skip
    clipped, before = stacked(clipped_by_two)(values), rows_of(values)
    after = matrix(clipped, range(N))
    norms, k = np.linalg.norm(before, axis=1), 2 * F * (N - F) // N
    order = np.argsort(-norms)
    threshold = norms[order[k]]
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), np.minimum(norms, threshold), rtol=1e-5)
    np.testing.assert_array_equal(after[order[k:]], before[order[k:]])
    assert threshold <= norms[bad:].max()  # an honest norm, whatever two clients send
    cosines = np.sum(after * before, 1) / norms / np.linalg.norm(after, axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-5)


def test_mixing_averages_the_nearest_and_brings_the_honest_together():
    for seed in range(3):
        values = messages(seed)
        x = rows_of(values)
        distances = np.linalg.norm(x[:, None] - x[None], axis=2)
        expected = np.stack([x[np.argsort(row, kind="stable")[: N - F]].mean(0) for row in distances])
        after = matrix(stacked(mixed_by_two)(values), range(N))
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-6)
        assert after.std(0).sum() < x.std(0).sum()


def test_every_message_counts_alike_behind_mixing():
    values, weights = messages(5), np.arange(1, N + 1, dtype=np.float32)
    weighted = lambda: reduce.nnm(F, fc.reduce.weighted_mean())  # noqa: E731
    assert not weighted().weighted
    expected = matrix(stacked(mixed_by_two)(values), range(N)).mean(0)
    np.testing.assert_allclose(flat(fold(weighted, values, weights, IDS)), expected, rtol=1e-5, atol=1e-6)


def test_subsets_are_searched_whole():
    values = messages(11)
    x = rows_of(values)
    subsets = [np.setdiff1d(np.arange(N), out) for out in itertools.combinations(range(N), F)]
    diameter = [np.linalg.norm(x[s][:, None] - x[s][None], axis=2).max() for s in subsets]
    variance = [np.linalg.eigvalsh(np.cov(x[s].T, bias=True))[-1] for s in subsets]
    for name, spread in (("mda", diameter), ("smea", variance)):
        expected = x[subsets[int(np.argmin(spread))]].mean(0)
        np.testing.assert_allclose(flat(fold(NEW[name], values, EVERYONE, IDS)), expected, rtol=1e-4, atol=1e-6)


def test_too_many_subsets_are_refused_with_a_sentence():
    many = {"w": np.zeros((40, 2), np.float32)}, np.ones(40, np.float32), np.arange(40, dtype=np.int32)
    for name in ("mda", "smea"):
        make = functools.partial(getattr(reduce, name), 5)
        with pytest.raises(fc.InvalidInput, match=f"{name} would search 658008 subsets, 5 of a cohort with 40 places"):
            fold.__wrapped__(make, *many)


def noisy_flame():
    return reduce.flame(0.5)


def test_flame_keeps_the_densest_majority_and_clips_it_to_the_median_norm():
    rng = np.random.default_rng(0)
    honest = np.array([1, 0, 0, 0]) + 0.1 * rng.normal(size=(5, 4))
    honest *= np.array([1, 2, 3, 4, 5])[:, None]
    x = np.concatenate([[[0, 90, 0, 0], [0, -80, 1, 0]], honest]).astype(np.float32)
    norms = np.linalg.norm(x, axis=1)
    bound = np.median(norms)
    # Angles decide: of the five, the four that are joined first, or all five if the fifth joins before.
    units = x / norms[:, None]
    longest = 1 - (units @ units.T)
    expected = None
    for edge in np.sort(longest[np.triu_indices(N, 1)]):
        groups = np.arange(N)
        for i, j in itertools.combinations(range(N), 2):
            if longest[i, j] <= edge + 1e-9:
                groups[groups == groups[j]] = groups[i]
        size = np.bincount(groups, minlength=N)
        if size.max() > N / 2:
            kept = groups == size.argmax()
            expected = (x * np.minimum(1, bound / norms)[:, None])[kept].mean(0)
            break
    assert not kept[:2].any()
    ids = np.arange(N, dtype=np.int32)
    got = fold(reduce.flame, {"w": x}, EVERYONE, ids)["w"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    noisy = [fold(noisy_flame, {"w": x}, EVERYONE, ids, jax.random.key(s))["w"] - got for s in range(100)]
    np.testing.assert_allclose(np.std(noisy), 0.5 * bound, rtol=0.15)


# Defence, how many clients it needs for f, and with how many malicious ones of these the attack below breaks it.
F_TOLD = 2
BREAKDOWN = {
    "median": (reduce.median, 7, 4),
    "trimmed_mean": (lambda: reduce.trimmed_mean(F_TOLD), 7, 3),
    "geometric_median": (lambda: reduce.geometric_median(64), 7, 4),
    "krum": (lambda: reduce.krum(F_TOLD), 7, 4),
    "bulyan": (lambda: reduce.bulyan(F_TOLD), 11, 6),
    "mda": (lambda: reduce.mda(F_TOLD), 7, 3),
    "smea": (lambda: reduce.smea(F_TOLD), 7, 3),
    "caf": (lambda: reduce.caf(F_TOLD), 7, 4),
    "dnc": (lambda: reduce.dnc(F_TOLD), 7, 3),
    "flame": (reduce.flame, 7, 4),
    "nnm, median": (lambda: reduce.nnm(F_TOLD, reduce.median()), 7, 4),
    "arc, mean": (lambda: reduce.arc(F_TOLD, reduce.uniform_mean()), 7, 3),
    "arc, nnm, trimmed_mean": (lambda: reduce.arc(F_TOLD, reduce.nnm(F_TOLD, reduce.trimmed_mean(F_TOLD))), 7, 4),
}


def attacked(make, n, bad, distance):
    """The aggregate's distance from the honest mean in radii of the honest, ``bad`` clients far away at one point."""
    rng = np.random.default_rng(n)
    honest = (rng.normal(size=(n - bad, 6)) + 3).astype(np.float32)
    centre, radius = honest.mean(0), np.linalg.norm(honest - honest.mean(0), axis=1).max()
    far = np.tile(-distance * centre / np.linalg.norm(centre), (bad, 1)).astype(np.float32)
    x = np.concatenate([far, honest])
    got = np.asarray(fold(make, {"w": x}, np.ones(n, np.float32), np.arange(n, dtype=np.int32), width=n)["w"])
    return np.linalg.norm(got - centre) / radius, np.linalg.norm(got) / np.linalg.norm(honest, axis=1).max()


@pytest.mark.parametrize("name", BREAKDOWN)
def test_a_defence_holds_up_to_its_f_and_breaks_beyond(name):
    """The table of ``docs/robustness.md``."""
    make, n, too_many = BREAKDOWN[name]
    assert attacked(fc.reduce.uniform_mean, 7, 1, 1e4)[0] > 100  # one is enough for a mean
    for distance in (1e2, 1e4):
        radii, norms = attacked(make, n, F_TOLD, distance)
        assert norms <= 1.01
        if name not in ("arc, mean", "flame"):  # which bound the norm alone
            assert radii <= 1.01
    assert attacked(make, n, too_many, 1e4)[0] > 100 or name == "flame"
    if name == "flame":  # the norm is theirs, too
        assert attacked(make, n, too_many, 1e4)[1] > 100


@pytest.mark.parametrize("name", [name for name in BREAKDOWN if name not in ("arc, mean", "flame")])
def test_messages_as_long_as_may_pass_neither_hang_nor_break_a_defence(name):
    """Of two that oppose each other, even the squared distance is infinite in float32."""
    make, n, _ = BREAKDOWN[name]
    rng = np.random.default_rng(n)
    honest = (rng.normal(size=(n - 2, 6)) + 3).astype(np.float32)
    far = np.zeros((2, 6), np.float32)
    far[:, 0] = 9.9e18, -9.9e18
    x, ids = np.concatenate([far, honest]), np.arange(n, dtype=np.int32)
    got = np.asarray(fold(make, {"w": x}, np.ones(n, np.float32), ids, width=n)["w"])
    radius = np.linalg.norm(honest - honest.mean(0), axis=1).max()
    assert np.linalg.norm(got - honest.mean(0)) <= 1.01 * radius


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: reduce.arc(-1, reduce.median()), "arc: num_bad"),
        (lambda: reduce.arc(2, 2), "arc: reducer"),
        (lambda: reduce.arc(1, fc.secure.pairwise_masks(4)), "hides"),
        (lambda: reduce.nnm(1.5, reduce.median()), "nnm: num_bad"),
        (lambda: reduce.nnm(1, reduce.median), "nnm: reducer"),
        (lambda: reduce.mda(-1), "mda: num_bad"),
        (lambda: reduce.smea("2"), "smea: num_bad"),
        (lambda: reduce.caf(-1), "caf: num_bad"),
        (lambda: reduce.bulyan(0.5), "bulyan: num_bad"),
        (lambda: reduce.dnc(1, iterations=0), "dnc: iterations"),
        (lambda: reduce.dnc(1, coordinates=0), "dnc: coordinates"),
        (lambda: reduce.dnc(1, fraction=0.0), "dnc: fraction"),
        (lambda: reduce.flame(-0.1), "flame: noise"),
        (lambda: reduce.check_cohort(reduce.bulyan(2), 10), "at least 11 clients in a round, not 10"),
        (lambda: reduce.check_cohort(reduce.arc(2, reduce.krum(2)), 6), "at least 7 clients"),
        (lambda: reduce.check_cohort(reduce.nnm(2, reduce.median()), 4), "at least 5 clients"),
    ],
)
def test_what_means_nothing_is_refused(make, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        make()
