"""NumPy oracle of clustered methods: IFCA, HypCluster, CFL.

Conventions of rounds.py. IFCA and HypCluster start from `models` [k, d] and log `models` [R+1, k, d] and `chosen`
[R, N], the model a client picked in that round, -1 when it was not sampled. loss(i, x, round) is client i's loss at x
when it picks; a tie goes to the lower model. A model that nobody picked stays as it is. Formulas recalled.
"""

from itertools import combinations

import numpy as np
from oracles.rounds import FULL, _arrays, _local_sgd, _mean, _save


def _picked(models, loss, cohort, n, t):
    chosen = np.full(n, -1)
    for i in cohort:
        chosen[i] = int(np.argmin([loss(i, model, t) for model in models]))
    return chosen


def _run(models, loss, cohorts, n, update):
    models, log = np.array(models, dtype=float), {}
    _save(log, models=models)
    for t, cohort in enumerate(cohorts):
        chosen, before = _picked(models, loss, cohort, n, t), models.copy()
        for j in range(len(models)):
            members = [i for i in cohort if chosen[i] == j]
            if len(members) > 0:
                models[j] = update(before[j], members, cohort, t)
        _save(log, models=models, chosen=chosen)
    return _arrays(log)


# IFCA, Algorithm 1 of Ghosh, Chung, Yin, Ramchandran 2020, option I (gradient averaging).
def ifca_gradients(models, gradient, loss, cohorts, n, eta, weights=None, draw=FULL):
    """theta_j -= eta sum_{i picked j} w_i g_i(theta_j) / sum_{i in COHORT} w_i: the paper's gamma / m, m all workers.

    So a model moves less the fewer pick it. `draw` is the step index that names g_i's batch. k = 1: gradient descent on
    the weighted f. The paper's weights are uniform.
    """
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=float)

    def update(x, members, cohort, t):
        share = sum(w[i] for i in members) / sum(w[i] for i in cohort)
        return x - eta * share * _mean({i: gradient(i, x, draw, t) for i in members}, members, w)

    return _run(models, loss, cohorts, n, update)


# IFCA, Algorithm 1, option II (model averaging).
def ifca_models(models, gradient, loss, cohorts, steps, eta, weights=None, server_lr=1.0):
    """theta_j = the mean over those who picked j of their models after steps[i] of SGD from theta_j. k = 1: FedAvg.

    The paper has uniform weights and server_lr = 1.
    """
    w = np.ones(len(steps)) if weights is None else np.asarray(weights, dtype=float)

    def update(x, members, cohort, t):
        return x + server_lr * _mean({i: _local_sgd(i, x, gradient, steps, eta, t) for i in members}, members, w)

    return _run(models, loss, cohorts, len(steps), update)


# HypCluster, Algorithm 2 of Mansour, Mohri, Ro, Suresh 2020; weights[i] = m_i, the examples of client i.
def hypcluster(models, gradient, loss, cohorts, steps, eta, weights, kind="local"):
    """Each sampled client joins its best hypothesis; then a few steps on sum_{k joined} m_k L_k / sum m_k.

    Open: whose steps those are. kind = "local": FedAvg in the cluster with weights m_k (IFCA's option II); "pooled":
    max(steps) steps of gradient descent on the pooled loss, gradient(i, x, k, t) in step k. They agree at one step.
    """
    if kind == "local":
        return ifca_models(models, gradient, loss, cohorts, steps, eta, weights)

    def update(x, members, cohort, t):
        for k in range(max(steps[i] for i in members)):
            x = x - eta * _mean({i: gradient(i, x, k, t) for i in members}, members, weights)
        return x

    return _run(models, loss, cohorts, len(steps), update)


def cosine_similarities(U):
    """<u_i, u_j> / (||u_i|| ||u_j||); 0 to and from a zero row."""
    norms = np.sqrt(np.sum(U**2, axis=1))
    unit = U / np.where(norms > 0.0, norms, 1.0)[:, None]
    return unit @ unit.T


# CFL's optimal bipartition (the minimised largest cross-cluster similarity) of Sattler, Mueller, Samek 2020.
def bipartition(alpha):
    """(c1, c2, cross) over all bipartitions of the rows: minimises the largest alpha_ij between the two sides.

    By enumeration; c1 holds row 0; of equals the smallest c1, then the lexicographically first. With distinct alphas
    the answer is unique: single linkage stopped at two clusters (the paper's Algorithm 1).
    """
    n, best = len(alpha), None
    for size in range(n - 1):
        for rest in combinations(range(1, n), size):
            c1 = [0, *rest]
            c2 = [j for j in range(n) if j not in c1]
            cross = float(alpha[np.ix_(c1, c2)].max())
            if best is None or cross < best[2]:
                best = c1, c2, cross
    return best


# CFL's criteria of Sattler et al. 2020: ||weighted mean of the updates|| < eps1 and max ||update|| > eps2 > 0.
def cfl_split(U, eps1, eps2, weights=None, gamma=None):
    """(c1, c2) as row lists when the cluster of updates U [m, d] splits, else None.

    Both tests strict. gamma: an estimate of the gradients' relative error; then a split also needs
    cross < sqrt((1 - gamma) / 2), the paper's guarantee of separation; None leaves that test out, as the authors' code.
    Fewer than two rows never split. weights None: uniform (the paper: |D_i|).
    """
    w = np.ones(len(U)) if weights is None else np.asarray(weights, dtype=float)
    mean = np.linalg.norm(w @ U / w.sum())
    if len(U) < 2 or not (mean < eps1 and np.sqrt(np.sum(U**2, axis=1)).max() > eps2):
        return None
    c1, c2, cross = bipartition(cosine_similarities(U))
    return (c1, c2) if gamma is None or cross < np.sqrt((1.0 - gamma) / 2.0) else None


# CFL, the recursion of Sattler et al. 2020, with the checks made in every round.
def cfl(x0, gradient, num_rounds, steps, eta, eps1, eps2, weights=None, gamma=None, average="new"):
    """`v` [R+1, N, d] each client's cluster model, `label` [R+1, N] its cluster. All clients take part in every round.

    Every cluster runs FedAvg's round, then is tested on that round's updates. Open: which average a splitting round
    makes. average = "new": of the updates within each new cluster (the authors' code); "old": of the parent's, so that
    both start at one point. A cluster is named by its least client. eps1 = 0: FedAvg.
    """
    n = len(steps)
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    v, label, log = np.tile(np.array(x0, dtype=float), (n, 1)), np.zeros(n, dtype=int), {}
    _save(log, v=v, label=label)
    for t in range(num_rounds):
        U = np.array([_local_sgd(i, v[i], gradient, steps, eta, t) for i in range(n)])
        new = label.copy()
        for name in np.unique(label):
            members = np.flatnonzero(label == name)
            parts = cfl_split(U[members], eps1, eps2, w[members], gamma)
            for part in parts or ():
                new[members[part]] = members[part].min()
        v = np.array([v[i] + _group_mean(U, w, (new if average == "new" else label), i) for i in range(n)])
        label = new
        _save(log, v=v, label=label)
    return _arrays(log)


def _group_mean(U, w, label, i):
    same = label == label[i]
    return w[same] @ U[same] / w[same].sum()
