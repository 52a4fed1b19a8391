"""NumPy oracle of fair methods: q-FedSGD, q-FedAvg, AFL, TERM, FedMGDA+.

Conventions of rounds.py; loss(i, x, round) is client i's loss at x, the round's received vector. An empty cohort
changes nothing. Formulas recalled; FedMGDA+'s box also seen in easyFL's code.
"""

from itertools import product

import numpy as np
from oracles.rounds import FULL, _arrays, _begin, _local_sgd, _save


def _qffl_step(F, G, q, L):
    """sum_k F_k^q G_k / sum_k (q F_k^(q-1) ||G_k||^2 + L F_k^q), the step of both algorithms."""
    h = q * F ** (q - 1.0) * np.sum(G**2, axis=1) + L * F**q if q != 0.0 else L * np.ones(len(F))
    return F**q @ G / h.sum()


# q-FedSGD, Algorithm 1 of Li, Sanjabi, Beirami, Smith 2020 (q-FFL).
def qfedsgd(x0, gradient, loss, cohorts, n, q, L, draw=FULL, shift=0.0):
    """x -= sum F_k^q g_k / sum h_k, g_k = gradient(k, x, draw, t), L the inverse of FedSGD's rate; uniform sums.

    The clients are sampled by p_k, so that nothing else weighs them. shift is added to every F before the powers (the
    authors' code: 1e-10; the paper: none, and F = 0 is undefined for 0 < q < 1). q = 0: gradient descent of rate 1/L.
    """
    _, x, _, _, log = _begin(x0, range(n), None)
    _save(log, x=x)
    for t, cohort in enumerate(cohorts):
        if len(cohort) > 0:
            F = np.array([loss(i, x, t) + shift for i in cohort])
            x = x - _qffl_step(F, np.array([gradient(i, x, draw, t) for i in cohort]), q, L)
        _save(log, x=x)
    return _arrays(log)


# q-FedAvg, Algorithm 2: the gradient's place taken by L (x - y_k), y_k after local SGD.
def qfedavg(x0, gradient, loss, cohorts, steps, eta, q, L=None, shift=0.0):
    """x -= sum F_k^q L (x - y_k) / sum h_k, h_k of ||L (x - y_k)||^2; L None is 1 / eta, the paper's choice.

    F_k at x, before training. q = 0: FedAvg, whatever L. steps = 1, noiseless, L = 1/eta: q-FedSGD.
    """
    _, x, _, _, log = _begin(x0, steps, None)
    L = 1.0 / eta if L is None else L
    _save(log, x=x)
    for t, cohort in enumerate(cohorts):
        if len(cohort) > 0:
            F = np.array([loss(i, x, t) + shift for i in cohort])
            x = x - _qffl_step(F, -L * np.array([_local_sgd(i, x, gradient, steps, eta, t) for i in cohort]), q, L)
        _save(log, x=x)
    return _arrays(log)


def project_simplex(u):
    """The nearest point of {p >= 0, sum p = 1} to u: max(u - c, 0), c from the sorted u (Duchi et al. 2008)."""
    s = np.sort(u)[::-1]
    c = (np.cumsum(s) - 1.0) / np.arange(1, len(u) + 1)
    return np.maximum(u - c[np.flatnonzero(s > c)[-1]], 0.0)


# AFL, the algorithm Stochastic-AFL of Mohri, Sivek, Suresh 2019: descent in x, projected ascent in lambda, both from
# the old pair.
def afl(x0, gradient, loss, cohorts, steps, eta, lam_eta, lam0=None, server_lr=1.0, normalise=True):
    """x += server_lr sum_S lam_i (y_i - x) [/ sum_S lam_i]; lam = P(lam + lam_eta F), F_i at the old x, 0 outside S.

    `lam` [R+1, N] over ALL clients; lam0 None: uniform. The paper samples one client or takes all, with one step; local
    steps and cohorts are open. normalise = True divides by the sampled mass (no move when it is 0); the two agree on
    full cohorts. No projection of x. lam_eta = 0: FedAvg with weights lam0.
    """
    n, x, _, _, log = _begin(x0, steps, None)
    lam = np.full(n, 1.0 / n) if lam0 is None else np.asarray(lam0, dtype=float)
    _save(log, x=x, lam=lam)
    for t, cohort in enumerate(cohorts):
        if len(cohort) > 0:
            F = np.zeros(n)
            F[list(cohort)] = [loss(i, x, t) for i in cohort]
            move = sum(lam[i] * _local_sgd(i, x, gradient, steps, eta, t) for i in cohort)
            mass = sum(lam[i] for i in cohort) if normalise else 1.0
            x = x + server_lr * move / mass if mass > 0.0 else x
            lam = project_simplex(lam + lam_eta * F)
        _save(log, x=x, lam=lam)
    return _arrays(log)


def tilted_loss(F, tilt, weights=None):
    """(1/t) log sum_i p_i exp(t F_i), p the normalised weights; t = 0: the mean (TERM's equation (2))."""
    p = np.full(len(F), 1.0 / len(F)) if weights is None else np.asarray(weights, dtype=float) / np.sum(weights)
    if tilt == 0.0:
        return float(p @ F)
    top = np.max(tilt * np.asarray(F))
    return float((np.log(p @ np.exp(tilt * np.asarray(F) - top)) + top) / tilt)


def tilted_weights(F, tilt, weights=None):
    """p_i exp(t F_i) / sum_j p_j exp(t F_j): the weights of the tilted loss's gradient (TERM's Lemma 1)."""
    p = np.ones(len(F)) if weights is None else np.asarray(weights, dtype=float)
    raised = p * np.exp(tilt * np.asarray(F) - np.max(tilt * np.asarray(F)))
    return raised / raised.sum()


# TERM, Li, Beirami, Sanjabi, Smith 2021, tilted over clients.
def term(x0, gradient, loss, cohorts, steps, eta, tilt, server_lr=1.0, weights=None):
    """x += server_lr sum_S a_i (y_i - x), a = tilted_weights of the cohort's F_i at the old x; `a` [R, N].

    Open: the paper's federated use; here the exact weights of the round's cohort, not its running estimate of the
    normaliser (stochastic TERM, Algorithm 2). tilt = 0: FedAvg; tilt -> inf: the worst client alone. steps = 1, full
    cohorts: gradient descent on tilted_loss.
    """
    n, x, w, _, log = _begin(x0, steps, weights)
    _save(log, x=x)
    for t, cohort in enumerate(cohorts):
        a = np.zeros(n)
        if len(cohort) > 0:
            a[list(cohort)] = tilted_weights([loss(i, x, t) for i in cohort], tilt, w[list(cohort)])
            x = x + server_lr * sum(a[i] * _local_sgd(i, x, gradient, steps, eta, t) for i in cohort)
        _save(log, x=x, a=a)
    return _arrays(log)


def min_norm(G, lam0, eps):
    """lam of min ||sum lam_i G_i||^2 over the simplex with |lam_i - lam0_i| <= eps, by enumeration of active bounds.

    Every pattern (lower bound, upper bound, free) of the n weights, the free ones from the KKT equations; the best that
    is feasible. n <= 7 or so. The direction G^T lam is unique, lam need not be.
    """
    n = len(G)
    lower, upper, Q = np.maximum(lam0 - eps, 0.0), np.minimum(lam0 + eps, 1.0), G @ G.T
    best, least = None, np.inf
    for pattern in product((0, 1, 2), repeat=n):
        kind = np.array(pattern)
        lam, free = np.where(kind == 1, upper, lower), np.flatnonzero(kind == 2)
        fixed = np.flatnonzero(kind != 2)
        if len(free) > 0:
            kkt = np.block(
                [[Q[np.ix_(free, free)], np.ones((len(free), 1))], [np.ones((1, len(free))), np.zeros((1, 1))]]
            )
            right = np.append(-Q[np.ix_(free, fixed)] @ lam[fixed], 1.0 - lam[fixed].sum())
            lam[free] = np.linalg.lstsq(kkt, right, rcond=None)[0][:-1]
        feasible = abs(lam.sum() - 1.0) < 1e-10 and np.all(lam >= lower - 1e-10) and np.all(lam <= upper + 1e-10)
        value = lam @ Q @ lam
        if feasible and value < least - 1e-15:
            best, least = lam, value
    return best


# FedMGDA+, Algorithm 1 of Hu, Shaloudegi, Zhang, Yu 2022.
def fedmgda(x0, gradient, cohorts, steps, eta, eps, server_lr=1.0, weights=None, normalise=True):
    """x -= server_lr sum lam_i u_i, u_i = (x - y_i) / ||x - y_i||, lam = min_norm(u, p, eps); `lam` [R, N], `d` [R, d].

    p: the cohort's weights, normalised, the centre lambda_0 (uniform in the paper). Open: a zero update stays zero.
    normalise = False is the paper's FedMGDA. eps = 0: the mean of the u_i (not normalised: FedAvg); eps = 1: MGDA, under
    which no client's first-order loss grows: <d, u_i> >= ||d||^2.
    """
    n, x, w, _, log = _begin(x0, steps, weights)
    _save(log, x=x)
    for t, cohort in enumerate(cohorts):
        lam, d = np.zeros(n), np.zeros_like(x)
        if len(cohort) > 0:
            G = -np.array([_local_sgd(i, x, gradient, steps, eta, t) for i in cohort])
            norms = np.sqrt(np.sum(G**2, axis=1))
            G = G / np.where(norms > 0.0, norms, 1.0)[:, None] if normalise else G
            lam[list(cohort)] = min_norm(G, w[list(cohort)] / w[list(cohort)].sum(), eps)
            d = lam[list(cohort)] @ G
            x = x - server_lr * d
        _save(log, x=x, lam=lam, d=d)
    return _arrays(log)
