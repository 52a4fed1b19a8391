"""The oracle of corrected training and of selection against hand-computed cases, Adam, and their limits."""

import numpy as np
from oracles import corrections, optimisers, rounds, selection
from oracles.quadratics import close, family

CENTRES = np.array([[1.0, -2.0, 0.5, 3.0], [0.0, 4.0, -1.0, 1.0], [-3.0, 1.0, 2.0, -2.0]])
SCALES = np.array([[1.0, 0.5, 2.0, 1.5], [0.3, 1.0, 1.0, 2.0], [1.2, 0.7, 0.4, 1.0]])
X0 = np.array([0.2, -0.1, 0.4, 0.3])
STEPS = [2, 3, 1]
WEIGHTS = [1.0, 3.0, 2.0]
COHORTS = [[0, 1], [2], [], [1, 2, 0]]
gradient, clean, _ = family(CENTRES, SCALES)


def fedavg(server_lr=1.0, g=gradient, cohorts=COHORTS):
    return rounds.fedavg(X0, g, cohorts, STEPS, 0.1, server_lr, WEIGHTS)["x"]


def test_fedexp():
    alone = [[0], [1], [], [2]]
    got = corrections.fedexp(X0, gradient, alone, STEPS, 0.1, 0.0, WEIGHTS)
    close(got["x"], fedavg(cohorts=alone))
    close(got["eta_g"], np.ones(4))
    close(corrections.fedexp(X0, gradient, COHORTS, STEPS, 0.1, 1e9, WEIGHTS)["x"], fedavg())
    # Steps to (1, 0) and (0, 1): D = (1/2, 1/2), mean square 1: 1 / (2 (1/2 + 0)) = 1; opposed ones extrapolate:
    # (1, 0.2) and (-1, 0.2): D = (0, 0.2), mean square 1.04, 1.04 / (2 (0.04 + 0.06)) = 5.2.
    toward = lambda ends: lambda i, x, k, t: x - np.array(ends)[i]  # noqa: E731
    run = lambda ends, eps: corrections.fedexp([0.0, 0.0], toward(ends), [[0, 1]], [1, 1], 1.0, eps)  # noqa: E731
    close(run([[1, 0], [0, 1]], 0.0)["eta_g"], [1.0])
    got = run([[1, 0.2], [-1, 0.2]], 0.06)
    close(got["eta_g"], [5.2])
    close(got["x"][1], [0.0, 1.04])
    close(got["tail"][1], [0.0, 0.52])


def test_dp_fedexp():
    zero = np.zeros((4, 3, 4))
    exact = corrections.fedexp(X0, gradient, COHORTS, STEPS, 0.1, 0.0)
    for kind, noise in (("ldp", zero), ("cdp", zero[:, 0])):
        got = corrections.dp_fedexp(X0, gradient, COHORTS, STEPS, 0.1, 1e9, 0.0, noise, kind, np.zeros(4), 2.0)
        close(got["x"], exact["x"])
        close(got["eta_g"], exact["eta_g"])
    # Clipped to 0.5 and noised: one client, c = clip + noise, its square less d sigma^2 is below ||c||^2: rate 1.
    z = np.random.default_rng(0).normal(size=(1, 3, 4))
    got = corrections.dp_fedexp(X0, gradient, [[1]], STEPS, 0.1, 0.5, 1.0, z, "ldp")
    delta = fedavg(cohorts=[[1]])[1] - X0
    close(got["x"][1], X0 + 0.5 * delta / np.linalg.norm(delta) + z[0, 1])
    assert got["eta_g"] == [1.0]
    # Steps to (1, 0.2) and (-1, 0.2), d = 2, sigma 0.1: (1.04 - 2 * 0.01) / 0.04 = 25.5.
    pull, none = lambda i, x, k, t: x - np.array([[1.0, 0.2], [-1.0, 0.2]])[i], np.zeros((1, 2, 2))
    got = corrections.dp_fedexp([0.0, 0.0], pull, [[0, 1]], [1, 1], 1.0, 9.0, 0.1, none, "ldp")
    close(got["eta_g"], [25.5])
    close(got["x"][1], [0.0, 5.1])
    got = corrections.dp_fedexp(X0, gradient, [[0, 1]], STEPS, 0.1, 9.0, 0.0, zero[:, 0], "cdp", [-100.0])
    assert got["eta_g"] == [1.0]


def test_fedcm():
    close(corrections.fedcm(X0, gradient, COHORTS, STEPS, 0.1, 1.0, 0.6, weights=WEIGHTS)["x"], fedavg(0.6))
    got = corrections.fedcm(X0, gradient, COHORTS, [2, 2, 2], 0.1, 0.3, 0.6, weights=WEIGHTS)
    close(corrections.fedcm(X0, gradient, COHORTS, [2, 2, 2], 0.1, 0.3, 1.0, 0.12, WEIGHTS)["x"], got["x"])
    # f = x^2 / 2 at 1, one step of 0.5, alpha 0.4: v = 0.4, x = 0.8, D = 0.4; v = 0.32 + 0.24, x = 0.52, D = 0.56.
    got = corrections.fedcm([1.0], lambda i, x, k, t: x, [[0]] * 2, [1], 0.5, 0.4)
    close(got["x"][:, 0], [1.0, 0.8, 0.52])
    close(got["D"][:, 0], [0.0, 0.4, 0.56])


def test_fedsam():
    close(corrections.fedsam(X0, gradient, COHORTS, STEPS, 0.1, 0.0, 0.6, WEIGHTS)["x"], fedavg(0.6))
    # f = x^2 / 2 at 2: ascent to 2.3, gradient 2.3, x = 0.85.
    got = corrections.fedsam([2.0, 0.0], lambda i, x, k, t: x, [[0]], [1], 0.5, 0.3)
    close(got["x"][1], [0.85, 0.0])
    got = corrections.fedsam([0.0, 0.0], lambda i, x, k, t: x, [[0]], [1], 0.5, 0.3)
    close(got["x"][1], [0.0, 0.0], rtol=0, atol=0)


def test_fedadamw_first_round_is_adamw():
    tx, y = optimisers.adam(0.1, 0.8, 0.95, 1e-3), {"x": X0}  # checked against optax in its own test
    state = tx.init(y)
    for k in range(3):
        u, state, _ = tx.update({"x": gradient(1, y["x"], k, 0)}, state, y)
        y = {"x": y["x"] + u["x"] - 0.1 * 0.2 * y["x"]}
    for blocks in ([[0, 1, 2, 3]], [[0], [1, 2], [3]]):
        got = corrections.fedadamw(X0, gradient, [[1]], STEPS, 0.1, 0.7, 0.2, blocks, 0.8, 0.95, 1e-3)
        close(got["x"][1], y["x"])
        close(got["D"][1], (X0 - y["x"]) / 0.3)


def test_fedadamw_by_hand():
    # Gradient (3, 1) for ever, b1 = b2 = 0.5, eta = 1, eps = 0. Round 0: v = (4.5, 0.5), v^ = (9, 1), d = (1, 1). The
    # block mean is 2.5, D = (1, 1). Round 1: v = 1.25 + (4.5, 0.5), over 1 - 0.25 (global step 2) or 1 - 0.5 (local).
    run = lambda count, alpha: corrections.fedadamw(  # noqa: E731
        [0.0, 0.0], lambda i, x, k, t: np.array([3.0, 1.0]), [[0]] * 2, [1], 1.0, alpha, 0.0, [[0, 1]], 0.5, 0.5, 0.0,
        count=count)  # fmt: skip
    got = run("global", 0.0)
    close(got["V"][1], [2.5, 2.5])
    close(got["x"][1], [-1.0, -1.0])
    close(got["x"][2], [-1.0 - 3.0 / np.sqrt(5.75 / 0.75), -1.0 - 1.0 / np.sqrt(1.75 / 0.75)])
    close(run("local", 0.0)["x"][2], [-1.0 - 3.0 / np.sqrt(5.75 / 0.5), -1.0 - 1.0 / np.sqrt(1.75 / 0.5)])
    close(run("global", 0.4)["x"][2], got["x"][2] - 0.4)
    # Two steps a round, g = 1: v = 3/4 at the end of round 0, then 7/8 and 15/16 over 1 - 1/8 and 1 - 1/16: steps of 1.
    one = lambda count: corrections.fedadamw(  # noqa: E731
        [0.0], lambda i, x, k, t: np.ones(1), [[0]] * 2, [2], 1.0, 0.0, 0.0, [[0]], 0.5, 0.5, 0.0, count=count)  # fmt: skip
    close(one("global")["x"][:, 0], [0.0, -2.0, -4.0])
    close(one("local")["x"][2], [-2.0 - 1.0 / np.sqrt(7 / 4) - 1.0 / np.sqrt(5 / 4)])
    # The decay acts on y, not through the moments: g = 0 shrinks x by 1 - eta lam a step.
    none = corrections.fedadamw([2.0], lambda i, x, k, t: 0.0 * x, [[0]], [2], 0.5, 0.0, 0.2, [[0]])
    close(none["x"][1], [2.0 * 0.9**2])


def test_orthogonalise():
    r = np.random.default_rng(0)
    for shape in ((3, 5), (5, 3), (4, 4)):
        M = r.normal(size=shape)
        U, s, Vt = np.linalg.svd(M, full_matrices=False)
        close(corrections.orthogonalise(M, None), U @ Vt)
        got = corrections.orthogonalise(M)
        p = s / (np.linalg.norm(M) + 1e-7)  # each singular value goes through the quintic alone
        for _ in range(5):
            p = 3.4445 * p - 4.7750 * p**3 + 2.0315 * p**5
        close(got, U @ np.diag(p) @ Vt, atol=1e-10)
        close(corrections.orthogonalise(10.0 * M), got, atol=1e-6)
    close(corrections.orthogonalise(np.outer([3.0, 4.0], [0.0, 2.0]), None), np.outer([0.6, 0.8], [0.0, 1.0]))
    close(corrections.orthogonalise(np.zeros((2, 2)), None), np.zeros((2, 2)))
    close(corrections.orthogonalise(np.zeros((2, 2))), np.zeros((2, 2)))


def test_fedmuon():
    close(corrections.fedmuon(X0, gradient, COHORTS, STEPS, 0.1, 0.0, 0.0, [], server_lr=0.6, weights=WEIGHTS)["x"],
          fedavg(0.6))  # fmt: skip
    # A constant gradient diag(2, 0.5): its polar factor is I, whatever the momentum: two steps move by -2 eta I.
    fixed = lambda i, x, k, t: np.array([2.0, 0.0, 0.0, 0.5])  # noqa: E731
    square = [(np.arange(4), (2, 2))]
    got = corrections.fedmuon(X0, fixed, [[0], [0]], STEPS, 0.1, 0.25, 0.5, square, ns_steps=None)
    eye = np.array([1.0, 0.0, 0.0, 1.0])
    close(got["x"][1], X0 - 0.1 * 2 * 0.75 * eye)
    close(got["M"][1], 1.5 * fixed(0, 0, 0, 0))
    close(got["D"][1], 0.75 * eye)
    close(got["x"][2], got["x"][1] - 0.1 * 2 * (0.75 * eye + 0.25 * 0.75 * eye))
    close(got["M"][2], (0.25 * 1.5 + 1.5) * fixed(0, 0, 0, 0))  # the momentum travels
    got = corrections.fedmuon(X0, fixed, [[0]], STEPS, 0.1, 0.0, 0.0, square, ns_steps=None, scale=lambda m, n: m + n)
    close(got["x"][1], X0 - 0.1 * 2 * 4 * eye)
    # Two clients: M is the mean of what each ended with.
    got = corrections.fedmuon(X0, clean, [[0, 1]], [1, 1, 1], 0.1, 0.0, 0.9, square, weights=WEIGHTS)
    close(got["M"][1], (clean(0, X0, 0, 0) + 3.0 * clean(1, X0, 0, 0)) / 4.0)


def test_scaffnew():
    mean = lambda x: np.mean([clean(i, x, 0, 0) for i in range(3)], axis=0)  # noqa: E731
    for p in (1.0, 0.3):
        got = corrections.scaffnew(X0, clean, [True] * 6, 3, 0.1, p)
        x = X0
        for s in range(6):
            x = x - 0.1 * mean(x)
            close(got["x"][s + 1], np.tile(x, (3, 1)))
    coins = np.random.default_rng(0).random(1500) < 0.25
    got = corrections.scaffnew(X0, clean, coins, 3, 0.3, 0.25)
    close(got["h"].sum(axis=1), np.zeros((1501, 4)), atol=1e-10)
    best = (SCALES * CENTRES).sum(0) / SCALES.sum(0)
    close(got["x"][-1], np.tile(best, (3, 1)), atol=1e-8)
    close(got["h"][-1], [clean(i, best, 0, 0) for i in range(3)], atol=1e-8)
    tails = np.flatnonzero(~coins)
    close(got["h"][tails + 1], got["h"][tails], rtol=0, atol=0)
    seen = []
    note = lambda i, x, k, t: seen.append((k, t)) or clean(i, x, k, t)  # noqa: E731
    corrections.scaffnew(X0, note, [False, True, True, False], 1, 0.1, 0.5)
    assert seen == [(0, 0), (1, 0), (0, 1), (0, 2)]


def test_fedlc():
    r = np.random.default_rng(0)
    logits, labels = r.normal(size=(5, 4)), [0, 1, 3, 3, 1]
    losses, slopes = corrections.fedlc_loss(logits, labels, [3, 5, 1, 9], 0.0, own=True)
    raised = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    close(losses, -np.log(raised[np.arange(5), labels]))
    close(slopes, raised - np.eye(4)[labels])
    # Two classes of counts 16 and 81, tau 6: margins 3 and 2. Label 0: -log(e^{0-3} / e^{0-2}) = 1.
    losses, slopes = corrections.fedlc_loss([[0.0, 0.0]], [0], [16, 81], 6.0)
    close(losses, [1.0])
    close(slopes, [[-1.0, 1.0]])
    close(corrections.fedlc_loss([[0.0, 0.0]], [0], [16, 81], 6.0, own=True)[0], [np.log(1.0 + np.e)])
    # An absent class is as if it were not there.
    a, b = corrections.fedlc_loss([[0.3, 9.0, -0.2]], [0], [2, 0, 7], 1.0)
    close(a, corrections.fedlc_loss([[0.3, -0.2]], [0], [2, 7], 1.0)[0])
    assert b[0, 1] == 0.0
    for own in (False, True):
        value = lambda f, own=own: corrections.fedlc_loss(f, labels, [3, 5, 1, 9], 0.7, own)[0].sum()  # noqa: E731
        h = 1e-6
        for m, c in ((0, 0), (1, 3), (4, 2)):
            bump = np.zeros((5, 4))
            bump[m, c] = h
            slope = (value(logits + bump) - value(logits - bump)) / (2 * h)
            close(corrections.fedlc_loss(logits, labels, [3, 5, 1, 9], 0.7, own)[1][m, c], slope, rtol=1e-7, atol=1e-9)


def test_power_of_choice():
    losses = np.array([0.1, 5.0, 3.0, 9.0, 3.0])
    assert selection.power_of_choice(losses, [0, 4, 2, 1], 2) == [1, 4]
    assert selection.power_of_choice(losses, [0, 2], 2) == [2, 0]
    assert selection.power_of_choice(losses, range(5), 1) == [3]


def test_oort():
    close(selection.oort_statistical([3.0, 4.0]), 2.0 * np.sqrt(12.5))
    close(selection.oort_statistical([2.0] * 7), 14.0)
    # Round 1 has log 1 = 0: the utilities themselves, the top one clipped to the place floor(0.5 * 4) = 2.
    close(selection.oort_utilities([1.0, 9.0, 3.0, 2.0], [1] * 4, 1, percentile=0.5), [1.0, 3.0, 3.0, 2.0])
    close(selection.oort_utilities([2.0, 2.0], [1, 4], np.exp(10.0)), [3.0, 2.5])
    got = selection.oort_utilities([2.0, 2.0, 2.0], [1] * 3, 1, [5.0, 10.0, 40.0], 10.0, 2.0)
    close(got, [2.0, 2.0, 0.125])
    close(selection.oort_utilities([1.0, 2.0, 5.0], [1] * 3, 1, normalise=True), [0.0, 0.25, 1.0])
    assert [selection.oort_exploration(r) for r in (0, 1, 500)] == [0.9, 0.9 * 0.98, 0.2]
    ids, p = selection.oort_pool([10.0, 1.0, 9.0, 8.6, 5.0], 2)  # cutoff 0.95 * 9 = 8.55
    assert ids == [0, 2, 3]
    close(p, np.array([10.0, 9.0, 8.6]) / 27.6)
