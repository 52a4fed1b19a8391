"""NumPy oracle of robust aggregation and of attacks on it: ARC, NNM, SMEA, MDA, CAF, Bulyan, DnC, FLAME, ALIE, IPM.

X is the matrix [n, d] of the messages, f the number of Byzantine ones among them; every client weighs the same. The
combinatorial rules enumerate all subsets. Ties, which no paper settles, go to the lower index, and among subsets to
the lexicographically first. Formulas recalled, CAF's and SMEA's also seen in ByzFL.
"""

from itertools import combinations

import numpy as np


def _norms(X):
    return np.sqrt(np.sum(np.square(X), axis=1))


def _distances(X):
    return np.array([_norms(X - row) for row in X])


# ARC, Algorithm 2 of Allouah, Guerraoui, Gupta, Jellouli, Rizk, Stephan 2025: pre-aggregation by an adaptive clip.
def arc(X, f):
    """(the clipped [n, d], C): C = the (k+1)-th largest norm, k = floor(2 (f/n) (n - f)). k norms at most shrink.

    f = 0: C is the largest norm and nothing changes. Every norm after is min(norm, C).
    """
    n, norms = len(X), _norms(X)
    C = np.sort(norms)[::-1][2 * f * (n - f) // n]  # integers: the floor is exact
    scale = [min(1.0, C / norm) if norm > 0.0 else 1.0 for norm in norms]
    return np.array(scale)[:, None] * X, float(C)


# NNM, Algorithm 2 of Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan 2023.
def nnm(X, f):
    """Each row replaced by the mean of its n - f nearest rows, itself among them. f = 0: every row is the mean."""
    near = np.argsort(_distances(X), axis=1, kind="stable")[:, : len(X) - f]
    return np.array([X[rows].mean(axis=0) for rows in near])


def _best_subset(X, f, cost):
    subsets = [list(s) for s in combinations(range(len(X)), len(X) - f)]
    best = subsets[int(np.argmin([cost(X[s]) for s in subsets]))]
    return X[best].mean(axis=0), best


def top_eigen(X, c=None):
    """(mean, lambda_max, unit eigenvector) of the covariance sum_i c_i (x_i - m)(x_i - m)^T / sum c; c None: ones."""
    c = np.ones(len(X)) if c is None else c
    mean = c @ X / c.sum()
    values, vectors = np.linalg.eigh((c[:, None] * (X - mean)).T @ (X - mean) / c.sum())
    return mean, values[-1], vectors[:, -1]


# SMEA of Allouah, Guerraoui, Gupta, Pinot, Stephan 2023 ("privacy-robustness-utility trilemma").
def smea(X, f):
    """(mean over S, S): S of size n - f has the smallest largest eigenvalue of its covariance (over 1/|S|)."""
    return _best_subset(X, f, lambda rows: top_eigen(rows)[1])


# MDA, El Mhamdi et al. 2020; Rousseeuw 1985's minimal volume in a norm.
def mda(X, f):
    """(mean over S, S): S of size n - f has the smallest diameter max ||x_i - x_j||."""
    return _best_subset(X, f, lambda rows: _distances(rows).max())


# CAF, Algorithm 2 of Allouah, Guerraoui, Stephan 2025 ("Towards trustworthy FL with untrusted participants").
def caf(X, f, over="kept"):
    """Filter: c_i *= 1 - tau_i / max tau, tau_i = <x_i - mean_c, v>^2, v the top eigenvector of c's covariance.

    While sum c > n - 2f. Returns the weighted mean whose covariance had the smallest top eigenvalue of those met in the
    loop, the first of equals. Open: what max tau runs over: "kept", the c_i > 0, so that each pass puts one weight to
    exactly 0; or "all", as ByzFL's code, where a far vector of weight 0 slows the others' fall. f = 0: no pass, and the
    plain mean. A zero covariance ends it. ByzFL takes ONE power step for v; here v is exact.
    """
    c, best, least = np.ones(len(X)), X.mean(axis=0), np.inf
    while c.sum() > len(X) - 2 * f:
        mean, value, vector = top_eigen(X, c)
        best, least = (mean, value) if value < least else (best, least)
        tau = np.where((c > 0.0) | (over == "all"), ((X - mean) @ vector) ** 2, 0.0)
        if tau.max() == 0.0:
            break
        c = c * (1.0 - tau / tau.max())
    return best


def krum_scores(X, f, neighbours=None):
    """Sum of squared distances to the n - f - 2 nearest others (Blanchard et al. 2017, equation of Krum)."""
    neighbours = len(X) - f - 2 if neighbours is None else neighbours
    return np.sum(np.sort(np.square(_distances(X)), axis=1)[:, 1 : 1 + neighbours], axis=1)


# Bulyan of Krum, Section 4 of El Mhamdi, Guerraoui, Rouault 2018; n >= 4f + 3.
def bulyan(X, f, median="mean"):
    """(aggregate, the selected in order): theta = n - 2f picks by Krum, then the mean of theta - 2f around the median.

    Krum runs on the rows left, q of them, with max(q - f - 2, 1) neighbours (the paper's q - f - 2 is 0 in the last
    pick when f = 1). A coordinate keeps the theta - 2f values nearest its median, the lower of two equally near. Open:
    the median of an even theta: median = "mean" of the two middle ones, or "lower", an element as the paper's argmin.
    f = 0: the mean.
    """
    left, picked = list(range(len(X))), []
    while len(picked) < len(X) - 2 * f:
        scores = krum_scores(X[left], f, max(len(left) - f - 2, 1))
        picked.append(left.pop(int(np.argmin(scores))))
    rows = np.sort(X[picked], axis=0)
    centre = np.median(rows, axis=0) if median == "mean" else rows[(len(rows) - 1) // 2]
    order = np.argsort(np.abs(rows - centre), axis=0, kind="stable")[: len(rows) - 2 * f]
    return np.take_along_axis(rows, order, axis=0).mean(axis=0), picked


# DnC, Algorithm 2 of Shejwalkar, Houmansadr 2021.
def dnc(X, f, coordinates, filter_fraction=1.0):
    """(mean over the good, the good): `coordinates`: one index array an iteration, the paper's random subsamples.

    Each iteration: centre the subsampled columns, v = top right singular vector, score <x_i - mean, v>^2, keep the
    n - floor(filter_fraction f) lowest. Good = kept in ALL iterations (none: nan; undefined in the paper). The mean is
    over all coordinates. Scores have no sign ambiguity.
    """
    good = set(range(len(X)))
    for index in coordinates:
        centred = X[:, index] - X[:, index].mean(axis=0)
        scores = (centred @ np.linalg.svd(centred, full_matrices=False)[2][0]) ** 2
        good &= set(np.argsort(scores, kind="stable")[: len(X) - int(filter_fraction * f)].tolist())
    good = sorted(good)
    return X[good].mean(axis=0) if good else np.full(X.shape[1], np.nan), good


def cosine_distances(X):
    """1 - <x_i, x_j> / (||x_i|| ||x_j||); 1 to and from a zero row, 0 on the diagonal."""
    norms = _norms(X)
    unit = X / np.where(norms > 0.0, norms, 1.0)[:, None]
    d = 1.0 - unit @ unit.T
    np.fill_diagonal(d, 0.0)
    return np.maximum(d, 0.0)


def majority_cluster(d):
    """HDBSCAN's one cluster for min_cluster_size = floor(n/2) + 1, min_samples = 1, single cluster allowed.

    Two clusters of more than n/2 cannot be, so only the root is selected, and it keeps the points that leave it last:
    single linkage by growing distance, stopped at the first component of at least floor(n/2) + 1 members.
    """
    n = len(d)
    parts = [{i} for i in range(n)]
    for _, i, j in sorted((d[i, j], i, j) for i, j in combinations(range(n), 2)):
        a, b = (next(p for p in parts if k in p) for k in (i, j))
        if a is not b:
            parts = [p for p in parts if p is not a and p is not b] + [a | b]
            if len(a | b) > n // 2:
                return sorted(a | b)
    return list(range(n))


# FLAME, Algorithm 1 of Nguyen et al. 2022, without its noise.
def flame(X, directions=None):
    """(aggregate, admitted, S) of the updates X = W_i - G: cluster by cosine, clip at the median norm, average.

    directions: what is clustered; the paper's local models W_i = G + X_i. None: the updates, as many codes do. S is the
    median of ALL the norms (of an even n: the mean of two), also of those not admitted.
    """
    admitted = majority_cluster(cosine_distances(X if directions is None else directions))
    norms = _norms(X)
    S = float(np.median(norms))
    clipped = [X[i] * min(1.0, S / norms[i]) if norms[i] > 0.0 else X[i] for i in admitted]
    return np.mean(clipped, axis=0), admitted, S


# ALIE, Baruch, Baruch, Goldberg 2019: every Byzantine client sends mean - z std of the honest.
def alie(honest, z):
    """Population deviation (over 1/n; open in the paper). A negative z is the mirrored attack."""
    return honest.mean(axis=0) - z * honest.std(axis=0)


# IPM, Xie, Koyejo, Gupta 2019: -eps times the honest mean.
def ipm(honest, eps):
    """eps > (n - f) / f turns the plain mean round."""
    return -eps * honest.mean(axis=0)


# The optimised attacks of Shejwalkar, Houmansadr 2021 and of Allouah et al. 2023 (line search over the factor).
def optimised(attack, aggregate, honest, f, factors):
    """(attack vector, factor): the factor of `factors` with the largest ||F(honest and f copies) - mean(honest)||.

    aggregate: [n, d] -> [d], the honest rows first. The first of equals. Open: the grid.
    """
    damage = [
        np.linalg.norm(aggregate(np.vstack([honest, np.tile(attack(honest, z), (f, 1))])) - honest.mean(axis=0))
        for z in factors
    ]
    best = factors[int(np.argmax(damage))]
    return attack(honest, best), best
