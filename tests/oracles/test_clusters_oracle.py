"""The oracle of clustered methods against hand-computed cases and the limits in which they are FedAvg."""

import numpy as np
import pytest
from oracles import clusters, rounds
from oracles.quadratics import close, family

CENTRES = np.array([[4.0, 0.0], [5.0, 1.0], [-4.0, 0.5], [-5.0, -1.0]])
STEPS = [2, 1, 3, 2]
WEIGHTS = [1.0, 2.0, 1.5, 3.0]
COHORTS = [[0, 1, 2], [], [3, 1], [0, 1, 2, 3]]
gradient, clean, loss = family(CENTRES)
TWO = np.array([[1.0, 0.0], [-1.0, 0.3]])


def test_one_cluster_is_fedavg():
    x0 = [0.3, -0.2]
    expected = rounds.fedavg(x0, gradient, COHORTS, STEPS, 0.2, 0.7, WEIGHTS)["x"]
    close(clusters.ifca_models([x0], gradient, loss, COHORTS, STEPS, 0.2, WEIGHTS, 0.7)["models"][:, 0], expected)
    expected = rounds.fedavg(x0, clean, COHORTS, [1] * 4, 0.2, weights=WEIGHTS)["x"]
    close(clusters.ifca_gradients([x0], clean, loss, COHORTS, 4, 0.2, WEIGHTS)["models"][:, 0], expected)
    for kind in ("local", "pooled"):
        got = clusters.hypcluster([x0], clean, loss, COHORTS, [1] * 4, 0.2, WEIGHTS, kind)
        close(got["models"][:, 0], expected)
    expected = rounds.fedavg(x0, gradient, [range(4)] * 3, STEPS, 0.2, weights=WEIGHTS)["x"]
    got = clusters.cfl(x0, gradient, 3, STEPS, 0.2, 0.0, 0.1, WEIGHTS)
    close(got["v"], np.repeat(expected[:, None], 4, axis=1))
    assert not got["label"].any()


def test_separate_clusters_are_separate_fedavgs():
    got = clusters.ifca_models(TWO, gradient, loss, COHORTS, STEPS, 0.2, WEIGHTS)
    assert got["chosen"].tolist() == [[0, 0, 1, -1], [-1] * 4, [-1, 0, -1, 1], [0, 0, 1, 1]]
    for j, own in enumerate(([0, 1], [2, 3])):
        cohorts = [[i for i in cohort if i in own] for cohort in COHORTS]
        close(got["models"][:, j], rounds.fedavg(TWO[j], gradient, cohorts, STEPS, 0.2, weights=WEIGHTS)["x"])


def test_gradient_averaging_divides_by_the_whole_cohort():
    # Three sampled, two pick model 0: it moves by eta / 3 times the SUM of their gradients, model 1 by a third of one.
    got = clusters.ifca_gradients(TWO, clean, loss, [[0, 1, 2]], 4, 0.6)
    close(got["models"][1, 0], TWO[0] - 0.2 * (2.0 * TWO[0] - CENTRES[0] - CENTRES[1]))
    close(got["models"][1, 1], TWO[1] - 0.2 * (TWO[1] - CENTRES[2]))
    assert got["chosen"].tolist() == [[0, 0, 1, -1]]


def test_a_tie_goes_to_the_lower_model_and_an_unpicked_one_stays():
    got = clusters.ifca_models([TWO[0], TWO[0], [90.0, 90.0]], clean, loss, [[0, 1, 2, 3]], STEPS, 0.2)
    assert got["chosen"].tolist() == [[0, 0, 0, 0]]
    close(got["models"][1, 1:], [TWO[0], [90.0, 90.0]], rtol=0, atol=0)
    assert not np.array_equal(got["models"][1, 0], TWO[0])


def test_hypcluster_pooled_is_gradient_descent_on_the_pooled_loss():
    got = clusters.hypcluster(TWO, clean, loss, [[0, 1, 2]], [3, 3, 3, 3], 0.2, WEIGHTS, "pooled")
    pooled = (CENTRES[0] + 2.0 * CENTRES[1]) / 3.0
    close(got["models"][1, 0], pooled + 0.8**3 * (TWO[0] - pooled))
    assert got["chosen"].tolist() == [[0, 0, 1, -1]]


def single_linkage(alpha):
    parts = [{i} for i in range(len(alpha))]
    for _, i, j in sorted((-alpha[r, c], r, c) for r in range(len(alpha)) for c in range(r)):
        if len(parts) == 2:
            break
        a, b = (next(p for p in parts if k in p) for k in (i, j))
        if a is not b:
            parts = [p for p in parts if p is not a and p is not b] + [a | b]
    return sorted(sorted(p) for p in parts)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_bipartition_is_single_linkage_cut_at_two(n):
    for seed in range(5):
        alpha = clusters.cosine_similarities(np.random.default_rng(seed).normal(size=(n, 3)))
        c1, c2, cross = clusters.bipartition(alpha)
        assert sorted([c1, c2]) == single_linkage(alpha)
        assert cross == alpha[np.ix_(c1, c2)].max()


def test_cfl_split_needs_a_small_mean_and_a_large_update():
    U = np.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])  # mean 0, norms sqrt(1.01)
    assert clusters.cfl_split(U, 0.1, 0.5) == ([0, 1], [2, 3])
    assert clusters.cfl_split(U, 0.0, 0.5) is None  # strict
    assert clusters.cfl_split(U, 0.1, 1.1) is None
    assert clusters.cfl_split(U + np.array([0.2, 0.0]), 0.1, 0.5) is None
    assert clusters.cfl_split(U, 0.1, 0.5, [3.0, 3.0, 1.0, 1.0]) is None  # the weighted mean is (0.5, 0)
    assert clusters.cfl_split(U[:1], 10.0, 0.5) is None
    # Cross similarity: -0.99 / 1.01 between (1, 0.1) and (-1, 0.1). Any gamma < 1 lets it pass; orthogonal ones need
    # 0 < sqrt((1 - gamma) / 2).
    assert clusters.cfl_split(U, 0.1, 0.5, gamma=0.99) == ([0, 1], [2, 3])
    three = np.array([[1.0, 0.0], [-0.5, np.sqrt(0.75)], [-0.5, -np.sqrt(0.75)]])
    assert clusters.cfl_split(three, 0.1, 0.5, gamma=1.0) == ([0], [1, 2])  # cross -0.5 < 0
    near = np.array([[1.0, 0.0], [0.9, 0.1]])
    assert clusters.cfl_split(near, 2.0, 0.5, gamma=0.5) is None  # cosine 0.99 > 0.5
    assert clusters.cfl_split(near, 2.0, 0.5) == ([0], [1])


def test_cfl_finds_the_two_groups_and_each_goes_its_own_way():
    got = clusters.cfl([0.0, 0.0], clean, 60, [1] * 4, 0.5, 0.3, 1.5)
    assert got["label"][-1].tolist() == [0, 0, 2, 2]
    close(got["v"][-1], np.repeat([CENTRES[:2].mean(0), CENTRES[2:].mean(0)], 2, axis=0), atol=1e-9)
    # At x0 = 0 the mean update is 0.0625 in norm and each is above 2: round 0 splits. New: each its own mean; old: one.
    close(got["v"][1], 0.5 * np.repeat([CENTRES[:2].mean(0), CENTRES[2:].mean(0)], 2, axis=0))
    old = clusters.cfl([0.0, 0.0], clean, 2, [1] * 4, 0.5, 0.3, 1.5, average="old")
    close(old["v"][1], np.tile(0.5 * CENTRES.mean(0), (4, 1)))
    assert old["label"].tolist() == [[0] * 4, [0, 0, 2, 2], [0, 0, 2, 2]]
    close(old["v"][2, 0], 0.5 * old["v"][1, 0] + 0.5 * CENTRES[:2].mean(0))
