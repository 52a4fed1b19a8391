"""The oracle of fair methods against hand-computed cases, scipy, and the limits in which they are FedAvg."""

import numpy as np
import pytest
from oracles import fair, rounds
from oracles.quadratics import close, family
from scipy.optimize import minimize

CENTRES = np.array([[4.0, 0.0, 1.0], [0.5, 1.0, -2.0], [-4.0, 0.5, 0.0], [-1.0, -1.0, 3.0]])
X0 = np.array([0.3, -0.2, 0.5])
STEPS = [2, 1, 3, 2]
WEIGHTS = [1.0, 2.0, 1.5, 3.0]
COHORTS = [[0, 1, 2], [], [3, 1], [0, 1, 2, 3]]
gradient, clean, loss = family(CENTRES)
FULL = [[0, 1, 2, 3]] * 3


def test_qffl_at_zero_is_fedavg():
    for L in (None, 3.0):
        got = fair.qfedavg(X0, gradient, loss, COHORTS, STEPS, 0.2, 0.0, L)["x"]
        close(got, rounds.fedavg(X0, gradient, COHORTS, STEPS, 0.2)["x"])
    got = fair.qfedsgd(X0, clean, loss, COHORTS, 4, 0.0, 5.0)["x"]
    close(got, rounds.fedavg(X0, clean, COHORTS, [1] * 4, 0.2)["x"])


def test_qffl_by_hand_and_with_one_step():
    # One client, f = x^2 / 2 at 2: F = 2, g = 2. q = 1, L = 3: x - 2 * 2 / (1 * 4 + 3 * 2) = 2 - 0.4.
    got = fair.qfedsgd([2.0], lambda i, x, k, t: x, lambda i, x, t: x[0] ** 2 / 2, [[0]], 1, 1.0, 3.0)
    close(got["x"][:, 0], [2.0, 1.6])
    # q = 2: 2 - 4 * 2 / (2 * 2 * 4 + 3 * 4).
    got = fair.qfedsgd([2.0], lambda i, x, k, t: x, lambda i, x, t: x[0] ** 2 / 2, [[0]], 1, 2.0, 3.0)
    close(got["x"][1], [2.0 - 8.0 / 28.0])
    # Two steps of 0.5: y = 0.5, so dw = 2 (2 - 0.5) = 3; x - 2 * 3 / (9 + 2 * 2) = 2 - 6 / 13.
    got = fair.qfedavg([2.0], lambda i, x, k, t: x, lambda i, x, t: x[0] ** 2 / 2, [[0]], [2], 0.5, 1.0)
    close(got["x"][1], [2.0 - 6.0 / 13.0])
    for q in (0.5, 1.0, 3.0):
        sgd = fair.qfedsgd(X0, clean, loss, COHORTS, 4, q, 5.0)["x"]
        close(fair.qfedavg(X0, clean, loss, COHORTS, [1] * 4, 0.2, q)["x"], sgd)
    # A large q serves the worst client: F^q picks its direction.
    move = fair.qfedsgd(X0, clean, loss, FULL[:1], 4, 60.0, 5.0)["x"][1] - X0
    worst = max(range(4), key=lambda i: loss(i, X0, 0))
    close(move / np.linalg.norm(move), (CENTRES[worst] - X0) / np.linalg.norm(CENTRES[worst] - X0), atol=1e-3)


def test_project_simplex():
    close(fair.project_simplex(np.array([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5])
    close(fair.project_simplex(np.array([2.0, 0.0])), [1.0, 0.0])
    close(fair.project_simplex(np.array([1.0, 0.6, -5.0])), [0.7, 0.3, 0.0])
    r = np.random.default_rng(0)
    for _ in range(20):
        u = 2.0 * r.normal(size=5)
        p = fair.project_simplex(u)
        assert p.min() >= 0.0
        assert p.sum() == pytest.approx(1.0, rel=1e-14)
        # Optimal: <u - p, z - p> <= 0 for every vertex z.
        assert np.max((u - p) - (u - p) @ p) <= 1e-12


def test_afl_limits():
    lam0 = np.array([0.1, 0.2, 0.3, 0.4])
    for cohorts in (COHORTS, FULL):
        got = fair.afl(X0, gradient, loss, cohorts, STEPS, 0.2, 0.0, lam0, 0.8)
        close(got["x"], rounds.fedavg(X0, gradient, cohorts, STEPS, 0.2, 0.8, lam0)["x"])
        close(got["lam"], np.tile(lam0, (len(cohorts) + 1, 1)))
    a, b = (fair.afl(X0, gradient, loss, FULL, STEPS, 0.2, 0.1, normalise=z)["x"] for z in (True, False))
    close(a, b)
    # Losses 2 and 0.5 at x = 2 towards 0 and 3; lam = P((0.5, 0.5) + 0.2 (2, 0.5)) = (0.65, 0.35), x from the OLD lam.
    pull, cost = lambda i, x, k, t: x - 3.0 * i, lambda i, x, t: (x[0] - 3.0 * i) ** 2 / 2
    got = fair.afl([2.0], pull, cost, [[0, 1]] * 2, [1, 1], 0.1, 0.2)
    close(got["x"][:, 0], [2.0, 1.95, 1.95 - 0.1 * (0.65 * 1.95 - 0.35 * 1.05)])
    close(got["lam"][1], [0.65, 0.35])
    # A small-step run nears the minimax point: the centre of the smallest ball, where the worst losses are level.
    got = fair.afl(X0, clean, loss, [range(4)] * 4000, [1] * 4, 0.02, 0.002)
    tail = got["x"][2000:].mean(0)
    level = [{"type": "ineq", "fun": lambda z, i=i: z[3] - loss(i, z[:3], 0)} for i in range(4)]
    best = minimize(lambda z: z[3], [0, 0, 0, 9], constraints=level, method="SLSQP")
    close(max(loss(i, tail, 0) for i in range(4)), best.fun, rtol=0.02)


def test_term_limits():
    got = fair.term(X0, gradient, loss, COHORTS, STEPS, 0.2, 0.0, 0.7, WEIGHTS)["x"]
    close(got, rounds.fedavg(X0, gradient, COHORTS, STEPS, 0.2, 0.7, WEIGHTS)["x"])
    worst = max(range(4), key=lambda i: loss(i, X0, 0))
    got = fair.term(X0, clean, loss, FULL, [1] * 4, 0.2, 1e4)
    close(got["x"][1], X0 - 0.2 * clean(worst, X0, 0, 0))
    F = [1.0, 3.0]
    close(fair.tilted_weights(F, np.log(2.0)), [0.2, 0.8])
    close(fair.tilted_weights(F, -1e4), [1.0, 0.0])
    close(fair.tilted_loss(F, np.log(2.0)), np.log(5.0) / np.log(2.0))
    close(fair.tilted_loss(F, 1e-7), 2.0, rtol=1e-5)
    close(fair.tilted_loss(F, 1e4, [1.0, 3.0]), 3.0, rtol=1e-4)
    # One step with everyone is gradient descent on the tilted loss: central differences.
    value = lambda x: fair.tilted_loss([loss(i, x, 0) for i in range(4)], 0.3, WEIGHTS)  # noqa: E731
    slope = [(value(X0 + h) - value(X0 - h)) / 2e-5 for h in 1e-5 * np.eye(3)]
    got = fair.term(X0, clean, loss, FULL, [1] * 4, 0.2, 0.3, weights=WEIGHTS)["x"]
    close(got[1], X0 - 0.2 * np.array(slope), rtol=1e-7)


def test_min_norm():
    half = np.full(2, 0.5)
    G = np.array([[1.0, 0.0], [0.0, 2.0]])  # free: lam ~ 1/||g||^2 = (0.8, 0.2)
    close(fair.min_norm(G, half, 1.0), [0.8, 0.2])
    close(fair.min_norm(G, half, 0.1), [0.6, 0.4])
    close(fair.min_norm(G, half, 0.0), half)
    close(fair.min_norm(np.array([[1.0], [3.0]]), half, 1.0), [1.0, 0.0])  # the nearer end
    close(fair.min_norm(np.array([[1.0], [-3.0]]), half, 1.0), [0.75, 0.25])  # zero lies between
    r = np.random.default_rng(1)
    for n, d, eps in [(3, 2, 0.2), (4, 3, 0.1), (5, 2, 1.0), (5, 6, 0.15)]:
        G, lam0 = r.normal(size=(n, d)), r.dirichlet(np.ones(n))
        lam = fair.min_norm(G, lam0, eps)
        other = minimize(
            lambda z, G=G: np.sum((z @ G) ** 2),
            lam0,
            jac=lambda z, G=G: 2.0 * G @ (z @ G),
            method="SLSQP",
            bounds=list(zip(np.maximum(lam0 - eps, 0.0), np.minimum(lam0 + eps, 1.0), strict=True)),
            constraints={"type": "eq", "fun": lambda z: z.sum() - 1.0},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        close(np.sum((lam @ G) ** 2), other.fun, rtol=1e-6, atol=1e-9)
        assert np.sum((lam @ G) ** 2) <= other.fun + 1e-9


def test_fedmgda():
    got = fair.fedmgda(X0, gradient, COHORTS, STEPS, 0.2, 0.0, 0.7, WEIGHTS, normalise=False)["x"]
    close(got, rounds.fedavg(X0, gradient, COHORTS, STEPS, 0.2, 0.7, WEIGHTS)["x"])
    got = fair.fedmgda(X0, clean, FULL, [1] * 4, 0.2, 1.0, 0.1)
    for t in range(3):
        g = np.array([clean(i, got["x"][t], 0, t) for i in range(4)])
        u = g / np.linalg.norm(g, axis=1, keepdims=True)
        assert np.min(u @ got["d"][t]) >= got["d"][t] @ got["d"][t] - 1e-9  # no client's loss grows
        close(got["x"][t + 1], got["x"][t] - 0.1 * got["lam"][t] @ u)
    one = fair.fedmgda(X0, clean, [[2]], STEPS, 0.2, 0.3, 0.1)
    close(np.linalg.norm(one["x"][1] - X0), 0.1)
    still = fair.fedmgda(CENTRES[2], clean, [[2]], STEPS, 0.2, 0.3, 0.1)
    close(still["x"][1], CENTRES[2], rtol=0, atol=0)
