"""The oracle of defences and attacks against hand-computed cases and their limits."""

import numpy as np
import pytest
from oracles import defences


def close(a, b, **kw):
    np.testing.assert_allclose(a, b, **{"rtol": 1e-12, "atol": 1e-12, **kw})


def cloud(n=9, d=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)) + 1.0


def poisoned(f=2, at=50.0):
    X = cloud()
    X[:f] = at
    return X


def test_without_byzantine_clients_every_rule_is_the_mean():
    X = cloud()
    mean = X.mean(axis=0)
    clipped, C = defences.arc(X, 0)
    close(clipped, X, rtol=0, atol=0)
    assert max(np.linalg.norm(X, axis=1)) == pytest.approx(C, rel=1e-15)
    close(defences.nnm(X, 0), np.tile(mean, (9, 1)))
    for rule in (defences.smea, defences.mda, defences.bulyan):
        close(rule(X, 0)[0], mean)
    close(defences.caf(X, 0), mean)
    close(defences.dnc(X, 0, [[0, 1], [2, 3]])[0], mean)


def test_one_common_message_is_kept():
    X = np.tile([1.0, -2.0, 3.0], (11, 1))
    close(defences.nnm(X, 2), X)
    for rule in (defences.smea, defences.mda, defences.bulyan):
        close(rule(X, 2)[0], X[0])
    close(defences.caf(X, 2), X[0])
    close(defences.dnc(X, 2, [[0, 1]])[0], X[0])
    close(defences.flame(X)[0], X[0])


def test_far_outliers_do_not_move_the_filters():
    X = poisoned()
    honest = X[2:].mean(axis=0)
    for rule in (defences.smea, defences.mda):
        result, kept = rule(X, 2)
        assert kept == list(range(2, 9))
        close(result, honest)
    close(defences.dnc(X, 2, [[0, 1], [1, 3], [2]])[0], honest)
    for rule in (lambda X, f: defences.bulyan(X, f)[0], defences.caf):
        for at in (50.0, 5000.0):
            assert np.linalg.norm(rule(poisoned(at=at), 2) - honest) < 2.0
    close(defences.nnm(X, 2)[2:], np.tile(honest, (7, 1)))


@pytest.mark.parametrize("rule", [lambda X: defences.nnm(X, 2), lambda X: defences.smea(X, 2)[0],
                                  lambda X: defences.mda(X, 2)[0], lambda X: defences.caf(X, 2),
                                  lambda X: defences.bulyan(X, 1)[0]])  # fmt: skip
def test_translation_and_scale(rule):
    X, shift = cloud(), np.array([3.0, -1.0, 2.0, 0.5])
    close(rule(2.5 * X + shift), 2.5 * rule(X) + shift, rtol=1e-9)


def test_arc_by_hand():
    X = np.diag([5.0, 1.0, 4.0, 2.0, 3.0])  # n = 5, f = 1: k = floor(2 * 4 / 5) = 1, the second largest norm
    clipped, C = defences.arc(X, 1)
    assert C == 4.0
    close(clipped, np.diag([4.0, 1.0, 4.0, 2.0, 3.0]))
    assert defences.arc(X, 2)[1] == 3.0  # k = floor(2 * 2 * 3 / 5) = 2
    ten = np.diag(np.arange(10.0, 0.0, -1.0))
    assert [defences.arc(ten, f)[1] for f in range(5)] == [10.0, 9.0, 7.0, 6.0, 6.0]  # k = 0, 1.8, 3.2, 4.2, 4.8
    assert defences.arc(np.zeros((3, 2)), 1)[1] == 0.0


def test_nnm_by_hand():
    X = np.array([[0.0], [1.0], [3.0], [10.0]])
    close(defences.nnm(X, 2)[:, 0], [0.5, 0.5, 2.0, 6.5])
    close(defences.nnm(X, 1)[:, 0], [4 / 3, 4 / 3, 4 / 3, 14 / 3])


def test_smea_and_mda_by_hand():
    # Ranges: 5.1 without the first, 4.9 without the last. Squared deviations: 16.1 and 20.8.
    line = np.array([[0.0], [0.5], [4.7], [4.9], [5.6]])
    assert defences.smea(line, 1)[1] == [1, 2, 3, 4]
    assert defences.mda(line, 1)[1] == [0, 1, 2, 3]
    ties = np.array([[0.0], [1.0], [2.0], [3.0]])
    assert defences.mda(ties, 1)[1] == defences.smea(ties, 1)[1] == [0, 1, 2]
    X = cloud(7, 3, 5)
    best = min(np.linalg.eigvalsh(np.cov(np.delete(X, drop, axis=0).T, bias=True))[-1] for drop in range(7))
    assert defences.top_eigen(X[defences.smea(X, 1)[1]])[1] == pytest.approx(best, rel=1e-12)


def test_caf_by_hand():
    # On a line 0, 0, 0, 4 with f = 1: mean 1, tau = (1, 1, 1, 9), c = (8/9, 8/9, 8/9, 0), of sum 8/3 > 2: mean 0 of
    # variance 0, the smallest met.
    close(defences.caf(np.array([[0.0], [0.0], [0.0], [4.0]]), 1), [0.0], atol=1e-12)
    # 0, 1, 5 with f = 1, n - 2f = 1: mean 2, variance 14/3, tau = (4, 1, 9), c = (5/9, 8/9, 0) of sum 13/9 > 1:
    # mean 8/13, variance 40/169. Then tau = (64, 25)/169, c = (0, 8/9 * 39/64, 0) of sum 13/24 < 1: the end.
    close(defences.caf(np.array([[0.0], [1.0], [5.0]]), 1), [8 / 13])
    # ByzFL's example: tau = (27, 0, 27) about the mean.
    close(defences.caf(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]), 1), [4.0, 5.0, 6.0])
    # Four at (+-2, 0) are the first to go, together (tau = 4, the others 0): eigenvalues 2 and 1.815 about (0, 0.1). What
    # is left has 3.61 about (0, 0.2): the EARLIER mean is returned.
    cross = np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.1], [0.0, -1.7]] * 2)
    close(defences.caf(cross, 3), [0.0, 0.1], atol=1e-9)
    # The two readings of max tau part once a weight is 0.
    X = poisoned(3)
    X[:3] += np.random.default_rng(4).normal(size=(3, 4))
    assert np.linalg.norm(defences.caf(X, 3) - defences.caf(X, 3, "all")) > 1e-3


def test_krum_and_bulyan_by_hand():
    X = np.array([[0.0], [1.0], [2.0], [4.0], [5.0], [6.0], [100.0]])  # n = 7 = 4f + 3, f = 1
    close(defences.krum_scores(X, 1), [1 + 4 + 16 + 25, 1 + 1 + 9 + 16, 1 + 4 + 4 + 9, 1 + 4 + 4 + 9, 1 + 1 + 9 + 16,
                                       1 + 4 + 16 + 25, 94**2 + 95**2 + 96**2 + 98**2])  # fmt: skip
    # Picks: 2 first; of 0 1 4 5 6 100 with 3 neighbours: 4 (1 + 4 + 9 = 14; 5: 1 + 1 + 16 = 18); of 0 1 5 6 100 with
    # 2: 0 and 1 give 1 + 25, 1 + 16 = 17; 5: 1 + 16 = 17, the lower first: 1; of 0 5 6 100 with 1: 5 (1); of 0 6 100
    # with 1: 0 (36). The five are 0 1 2 4 5 of median 2; the three nearest are 1, 2 and the lower of 0 and 4.
    result, picked = defences.bulyan(X, 1)
    assert X[picked][:, 0].tolist() == [2.0, 4.0, 1.0, 5.0, 0.0]
    close(result, [1.0])
    even = np.vstack([X, [[3.0]]])
    assert not np.array_equal(defences.bulyan(even, 1)[0], defences.bulyan(even, 1, "lower")[0])


def test_dnc_scores_and_intersection():
    X = np.array([[0.0, 0.0], [0.1, 0.1], [-0.1, -0.1], [9.0, 0.0], [0.0, 9.0]])
    assert defences.dnc(X, 1, [[0]])[1] == [0, 1, 2, 4]
    result, good = defences.dnc(X, 1, [[0], [1]])
    assert good == [0, 1, 2]
    close(result, [0.0, 0.0], atol=1e-15)
    assert defences.dnc(X, 1, [[0]], 1.9)[1] == [0, 1, 2, 4]  # floor(1.9) = 1
    assert len(defences.dnc(X, 1, [[0, 1]], 2.0)[1]) == 3


def test_flame():
    angle = np.array([0.0, 0.1, 0.25, 1.5, 3.0])
    X = np.array([1.0, 2.0, 3.0, 4.0, 50.0])[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    result, admitted, S = defences.flame(X)
    assert admitted == [0, 1, 2]  # floor(5/2) + 1 of them
    assert S == 3.0
    close(result, X[:3].mean(axis=0))
    X[1] *= 20.0
    result, admitted, S = defences.flame(X)
    assert (admitted, S) == ([0, 1, 2], 4.0)
    close(result, (X[0] + X[1] * 4.0 / 40.0 + X[2]) / 3.0)
    # The cosines of the models W = G + X, not of the updates, when they are given.
    assert defences.flame(X, X + 1e6)[1] != defences.flame(X)[1]
    # A whole half may come at once: two tight pairs far from each other merge into four of four.
    pairs = np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0]])
    assert defences.flame(pairs)[1] == [0, 1, 2, 3]


@pytest.mark.parametrize("n", [4, 5, 8, 9, 12])
def test_majority_cluster_is_hdbscan(n):
    cluster = pytest.importorskip("sklearn.cluster")
    for seed in range(8):
        d = defences.cosine_distances(cloud(n, 3, seed) - 0.3)
        labels = cluster.HDBSCAN(
            min_cluster_size=n // 2 + 1, min_samples=1, allow_single_cluster=True, metric="precomputed", copy=True
        ).fit_predict(d)
        assert defences.majority_cluster(d) == np.flatnonzero(labels == 0).tolist()


def test_attacks():
    honest = np.array([[1.0, 0.0], [3.0, 4.0]])
    close(defences.alie(honest, 1.5), [2.0 - 1.5, 2.0 - 3.0])
    close(defences.ipm(honest, 0.5), [-1.0, -1.0])
    mean = lambda X: X.mean(axis=0)  # noqa: E731
    # Against the mean every factor helps: ||f (a - m) / n|| grows with it.
    assert defences.optimised(defences.alie, mean, honest, 2, [0.5, 1.0, 2.0])[1] == 2.0
    assert defences.optimised(defences.ipm, mean, honest, 1, [0.1, 3.0, 1.0])[1] == 3.0
    # Against the median of 0, 1, 2, 3, 4 and two at 2 - z s: damage 0 at z = 0, then at most 1; the first of equals.
    line = np.arange(5.0)[:, None]
    vector, z = defences.optimised(defences.alie, lambda X: np.median(X, axis=0), line, 2, [0.0, 1.0, 5.0, 9.0])
    assert z == 1.0
    close(vector, [2.0 - np.sqrt(2.0)])
    # MDA throws a far attack away: a moderate factor wins.
    rule = lambda X: defences.mda(X, 2)[0]  # noqa: E731
    X = cloud(7, 3, 4)
    factors = [0.25, 0.5, 1.0, 2.0, 100.0]
    _, z = defences.optimised(defences.alie, rule, X, 2, factors)
    assert z < 100.0
    close(rule(np.vstack([X, np.tile(defences.alie(X, 100.0), (2, 1))])), X.mean(axis=0))
