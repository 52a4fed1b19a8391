"""The oracle of personalised methods against hand-computed cases and the limits in which they are simpler methods."""

import numpy as np
import pytest
from oracles import personal, rounds
from oracles.quadratics import close, family

CENTRES = np.array([[1.0, -2.0, 0.5, 3.0], [0.0, 4.0, -1.0, 1.0], [-3.0, 1.0, 2.0, -2.0]])
SCALES = np.array([[1.0, 0.5, 2.0, 1.5], [0.3, 1.0, 1.0, 2.0], [1.2, 0.7, 0.4, 1.0]])
X0 = np.array([0.2, -0.1, 0.4, 0.3])
STEPS = [2, 3, 1]
WEIGHTS = [1.0, 3.0, 2.0]
COHORTS = [[0, 1], [2], [], [1, 2, 0]]
gradient, clean, _ = family(CENTRES, SCALES)


def fedavg(server_lr=1.0, g=gradient, steps=STEPS, weights=WEIGHTS, eta=0.1):
    return rounds.fedavg(X0, g, COHORTS, steps, eta, server_lr, weights)["x"]


def local_only(eta, g=gradient):
    v = np.tile(X0, (3, 1))
    rows = [v.copy()]
    for t, cohort in enumerate(COHORTS):
        for i in cohort:
            for k in range(STEPS[i]):
                v[i] = v[i] - eta * g(i, v[i], k, t)
        rows.append(v.copy())
    return np.array(rows)


def test_ditto_by_hand_and_without_regularisation():
    # f = x^2 / 2 from x = v = 1, rate 0.5, lam 2: v 1 -> 0.5 -> 0.5 - 0.5 (0.5 + 2 (0.5 - 1)) = 0.75; x 1 -> 0.25.
    got = personal.ditto([1.0], lambda i, x, k, t: x, [[0], [0]], [2], 0.5, 0.5, 2.0)
    close(got["x"][:, 0], [1.0, 0.25, 0.0625])
    # Round 2 draws to 0.25: 0.75 - 0.5 (0.75 + 2 * 0.5) = -0.125, then -0.125 - 0.5 (-0.125 - 0.75) = 0.3125.
    close(got["v"][:, 0, 0], [1.0, 0.75, 0.3125])
    got = personal.ditto(X0, gradient, COHORTS, STEPS, 0.1, 0.07, 0.0, weights=WEIGHTS)
    close(got["x"], fedavg())
    close(got["v"], local_only(0.07))


def test_mr_mtl_limits():
    got = personal.mr_mtl(X0, gradient, COHORTS, STEPS, 0.07, 0.0, WEIGHTS)
    close(got["v"], local_only(0.07))
    close(got["x"], np.einsum("i,rid->rd", WEIGHTS, got["v"]) / 6.0)
    # eta lam = 1 with one step forgets v: v_i = x - eta g_i(v_i); full cohorts give both means the same.
    full = [[0, 1, 2]] * 3
    a, b = (personal.mr_mtl(X0, clean, full, STEPS, 0.1, 0.4, WEIGHTS, over) for over in ("all", "cohort"))
    close(a["x"], b["x"])
    one = personal.mr_mtl(X0, clean, [[1]], [1, 1, 1], 0.5, 2.0, over="cohort")
    close(one["x"][1], X0 - 0.5 * clean(1, X0, 0, 0))
    # Its fixed point solves g_i(v_i) + lam (v_i - mean v) = 0.
    end = personal.mr_mtl(X0, clean, [[0, 1, 2]] * 900, [1, 1, 1], 0.2, 0.5)
    v = end["v"][-1]
    close(SCALES * (v - CENTRES) + 0.5 * (v - v.mean(0)), np.zeros((3, 4)), atol=1e-10)


def test_pfedme_limits():
    # One inner step from w_r: theta = w_r - p g(w_r), so w_r moves by -eta lam p g(w_r): FedAvg of that rate.
    got = personal.pfedme(X0, gradient, COHORTS, STEPS, 0.2, 0.1, 5.0, 1, 0.6, "w", WEIGHTS)
    close(got["x"], fedavg(0.6))
    # Many inner steps: theta is the proximal point (lam w + a c) / (lam + a) of the Moreau envelope.
    for start in ("w", "theta"):
        got = personal.pfedme(X0, clean, [[0]], [1, 1, 1], 0.1, 0.1, 3.0, 400, 1.0, start)
        theta = (3.0 * X0 + SCALES[0] * CENTRES[0]) / (3.0 + SCALES[0])
        close(got["v"][1, 0], theta, atol=1e-10)
        close(got["x"][1], X0 - 0.3 * (X0 - theta), atol=1e-10)
    warm, cold = (personal.pfedme(X0, clean, [[1]], STEPS, 0.1, 0.1, 3.0, 1, 1.0, s)["x"] for s in ("theta", "w"))
    assert not np.allclose(warm, cold)


def test_apfl_limits():
    run = lambda **kw: personal.apfl(X0, gradient, COHORTS, STEPS, 0.1, 0.07, weights=WEIGHTS, **kw)  # noqa: E731
    for alpha in (0.0, 0.3, 1.0):
        close(run(alpha=alpha)["x"], fedavg())
    close(run(alpha=1.0)["v"], local_only(0.07))
    close(run(alpha=1.0)["mixed"], local_only(0.07))
    close(run(alpha=0.0)["v"], np.tile(X0, (5, 3, 1)))
    close(run(alpha=0.0)["mixed"], run(alpha=0.0)["w"])
    # By hand: f = (x - 2)^2 / 2, w = v = 0, alpha 0.5, rates 0.5, alpha_eta 1. Step 1: mixed 0, g -2, v - w = 0:
    # w = 1, v = 0.5, alpha 0.5. Step 2: mixed 0.75, g(w) = -1, g(mixed) = -1.25, slope (0.5 - 1)(-1.25) = 0.625:
    # w = 1.5, v = 0.5 + 0.5 * 0.5 * 1.25 = 0.8125, alpha = max(0.5 - 0.625, 0) = 0, so mixed = w.
    hand = lambda when: personal.apfl([0.0], lambda i, x, k, t: x - 2.0, [[0]], [2], 0.5, 0.5, 0.5, 1.0, when)  # noqa: E731
    got = hand("step")
    close([got["w"][1, 0, 0], got["v"][1, 0, 0], got["alpha"][1, 0], got["mixed"][1, 0, 0]], [1.5, 0.8125, 0.0, 1.5])
    close(hand("round")["alpha"][1], [0.5])


def test_per_fedavg_kinds():
    hvp = lambda i, y, u, k, t: SCALES[i] * u  # noqa: E731
    run = lambda kind, alpha=0.2: personal.per_fedavg(  # noqa: E731
        X0, gradient, COHORTS, STEPS, 0.1, alpha, kind, hvp, weights=WEIGHTS
    )
    close(run("hf")["x"], run("exact")["x"], atol=1e-10)  # a quadratic has no third derivative
    assert not np.allclose(run("fo")["x"], run("exact")["x"])
    for kind in ("fo", "hf", "exact"):
        close(run(kind, 0.0)["x"], fedavg())
        close(run(kind, 0.0)["v"], np.repeat(fedavg()[:, None], 3, axis=1))
    # One exact step is gradient descent on F_i(x - alpha g_i(x)): checked by central differences.
    value = lambda x: np.sum(SCALES[0] * (x - 0.2 * clean(0, x, 0, 0) - CENTRES[0]) ** 2) / 2.0  # noqa: E731
    slope = [(value(X0 + h) - value(X0 - h)) / 2e-5 for h in 1e-5 * np.eye(4)]
    got = personal.per_fedavg(X0, clean, [[0]], [1, 1, 1], 0.1, 0.2, "exact", hvp)
    close(got["x"][1], X0 - 0.1 * np.array(slope), rtol=1e-7)
    close(got["v"][1, 2], got["x"][1] - 0.2 * clean(2, got["x"][1], 0, 0))
    # Draws: three batches a step.
    seen = []
    note = lambda i, x, k, t: seen.append(k) or clean(i, x, k, t)  # noqa: E731
    personal.per_fedavg(
        X0, note, [[0]], [2], 0.1, 0.2, "hf", draws=lambda k: (3 * k, 3 * k + 1, 3 * k + 2), tune_steps=0
    )
    assert seen == [0, 1, 2, 2, 3, 4, 5, 5]


def test_reptile_and_fedbabu():
    got = personal.reptile(X0, gradient, COHORTS, STEPS, 0.1, 0.5, 0, weights=WEIGHTS)
    close(got["x"], fedavg(0.5))
    close(got["v"][:, 1], got["x"])
    got = personal.reptile(X0, clean, COHORTS, STEPS, 0.1, 1.0, 1, 0.3)
    close(got["v"][2, 1], got["x"][2] - 0.3 * clean(1, got["x"][2], 0, 0))
    body = [0, 1]
    got = personal.fedbabu(X0, gradient, COHORTS, STEPS, 0.1, body, 1, 0.3, [2, 3], weights=WEIGHTS)
    close(got["x"][:, :2], fedavg()[:, :2])  # the quadratic is separable
    close(got["x"][:, 2:], np.tile(X0[2:], (5, 1)), rtol=0, atol=0)
    close(got["v"][:, :, :2], np.repeat(got["x"][:, None, :2], 3, axis=1))
    assert np.all(got["v"][:, :, 2:] != X0[2:])
    close(personal.fedbabu(X0, gradient, COHORTS, STEPS, 0.1, range(4), 0, weights=WEIGHTS)["x"], fedavg())


def test_fedrep():
    got = personal.fedrep(X0, clean, COHORTS, STEPS, 0.1, [3], [2, 2, 2], 0.05, WEIGHTS)
    close(got["x"][:, :3], fedavg(g=clean)[:, :3])  # separable
    close(got["x"][:, 3], X0[3])
    own = X0[3]
    for _ in range(2):
        own = own - 0.05 * SCALES[1, 3] * (own - CENTRES[1, 3])
    close(got["v"][1, 1, 3], own)
    close(got["v"][2, 1], [*got["x"][2, :3], own])
    # Coupled, f = (a b - 2)^2 / 2, body a = 1, head b = 1, rate 0.5. Head: b = 1 + 0.5 = 1.5. Body on it: the residual is
    # -0.5, a = 1 + 0.5 * 0.5 * 1.5 = 1.375; a body step before the head's would give 1.5.
    coupled = lambda i, x, k, t: (x[0] * x[1] - 2.0) * x[::-1]  # noqa: E731
    got = personal.fedrep([1.0, 1.0], coupled, [[0]], [1], 0.5, [1], [1])
    close(got["x"][1], [1.375, 1.0])
    close(got["v"][1, 0], [1.375, 1.5])
    draws = []
    note = lambda i, x, k, t: draws.append(k) or clean(i, x, k, t)  # noqa: E731
    personal.fedrep(X0, note, [[1]], STEPS, 0.1, [3], [2, 2, 2])
    assert draws == [0, 1, 2, 3, 4]


def test_partial_is_fedavg_without_local_parts_and_local_training_without_shared():
    got = personal.partial(X0, gradient, COHORTS, STEPS, 0.1, [], WEIGHTS)
    close(got["x"], fedavg())
    close(got["v"], np.repeat(got["x"][:, None], 3, axis=1))
    got = personal.partial(X0, gradient, COHORTS, STEPS, 0.1, range(4), WEIGHTS)
    close(got["x"], np.tile(X0, (5, 1)), rtol=0, atol=0)
    close(got["v"], local_only(0.1))
    got = personal.partial(X0, gradient, COHORTS, STEPS, 0.1, [1], WEIGHTS)
    close(got["x"][:, [0, 2, 3]], fedavg()[:, [0, 2, 3]])
    close(got["v"][:, :, 1], local_only(0.1)[:, :, 1])


def test_fedala():
    got = personal.fedala(X0, gradient, COHORTS, STEPS, 0.1, 0.5, (0, 0), weights=WEIGHTS)
    close(got["x"], fedavg())
    close(got["W"], np.ones((5, 3, 4)))
    got = personal.fedala(X0, gradient, COHORTS, STEPS, 0.1, 0.5, upper=[0], weights=WEIGHTS)
    close(got["W"][:, :, 1:], np.ones((5, 3, 3)), rtol=0, atol=0)
    assert np.all((got["W"] >= 0.0) & (got["W"] <= 1.0))
    assert np.any(got["W"] < 1.0)
    # By hand, f_i = (x - c_i)^2 / 2, c = (4, 0), x0 = 1, one SGD step of 0.5. Round 0: v = (2.5, 0.5), x = 1.5.
    # Round 1, client 0: gap -1, start 1.5, W = 1 - 0.2 (1.5 - 4)(-1) = 0.5, start 2, v = 3. Client 1: gap 1, start 1.5,
    # W = 1 - 0.2 * 1.5 = 0.7, start 1.2, v = 0.6. x = 1.8.
    pull = lambda i, x, k, t: x - np.array([4.0, 0.0])[i]  # noqa: E731
    got = personal.fedala([1.0], pull, [[0, 1]] * 2, [1, 1], 0.5, 0.2, (1, 1))
    close(got["W"][2, :, 0], [0.5, 0.7])
    close(got["v"][2, :, 0], [3.0, 0.6])
    close(got["x"][2], [1.8])
    got = personal.fedala([1.0], pull, [[0, 1]] * 2, [1, 1], 0.5, 50.0, (1, 1))
    close(got["W"][2, :, 0], [0.0, 0.0])  # the projection; then both go on from their own models
    close(got["v"][2, :, 0], [3.25, 0.25])
    # Two passes at the first gap, none later: W of client 0 is 0.5 and then, from start 2, 0.5 - 0.2 (2 - 4)(-1) = 0.1.
    got = personal.fedala([1.0], pull, [[0, 1]] * 3, [1, 1], 0.5, 0.2, (2, 0))
    close(got["W"][2:, 0, 0], [0.1, 0.1])
    assert np.any(personal.fedala([1.0], pull, [[0, 1]] * 3, [1, 1], 0.5, 0.2, (0, 1))["W"][3] < 1.0)


def test_knn_per():
    stored, labels = np.array([[0.0], [1.0], [3.0]]), [0, 1, 1]
    probs = np.array([[0.25, 0.25, 0.5]])
    near = np.array([[0.0]])
    close(personal.knn_per(stored, labels, near, probs, 2, 0.0), probs)
    close(personal.knn_per(stored, labels, near, probs, 1, 1.0), [[1.0, 0.0, 0.0]])
    e = np.exp(-1.0)
    close(
        personal.knn_per(stored, labels, near, probs, 2, 0.5),
        [[0.5 / (1 + e) + 0.125, 0.5 * e / (1 + e) + 0.125, 0.25]],
    )
    both = np.exp(-0.5) + np.exp(-1.5)
    close(personal.knn_per(stored, labels, near, probs, 9, 1.0, 2.0), [[1 / (1 + both), both / (1 + both), 0.0]])


@pytest.mark.parametrize("empty", [[], [[]], [[], []]])
def test_empty_cohorts_change_nothing(empty):
    for run in (
        personal.ditto(X0, gradient, empty, STEPS, 0.1, 0.1, 1.0),
        personal.mr_mtl(X0, gradient, empty, STEPS, 0.1, 1.0),
        personal.mr_mtl(X0, gradient, empty, STEPS, 0.1, 1.0, over="cohort"),
        personal.pfedme(X0, gradient, empty, STEPS, 0.1, 0.1, 1.0, 2),
        personal.apfl(X0, gradient, empty, STEPS, 0.1, 0.1, 0.5, 0.1),
        personal.partial(X0, gradient, empty, STEPS, 0.1, [0]),
        personal.fedala(X0, gradient, empty, STEPS, 0.1, 0.5),
    ):
        close(run["x"], np.tile(X0, (len(empty) + 1, 1)), rtol=0, atol=0)
        close(run["v"], np.tile(X0, (len(empty) + 1, 3, 1)), rtol=0, atol=0)
