"""NumPy oracle of corrected local training and server steps: FedExP, DP-FedExP, FedCM, FedSAM, FedAdamW, FedMuon,
Scaffnew, FedLC.

Conventions of rounds.py. Sources: recalled, unless a function says otherwise.
"""

import numpy as np
from oracles.rounds import _arrays, _begin, _local_sgd, _mean, _save


# FedExP, Algorithm 1 of Jhunjhunwala, Wang, Joshi 2023.
def fedexp(x0, gradient, cohorts, steps, eta, eps=1e-3, weights=None):
    """x += eta_g D, D = mean delta_i, eta_g = max(1, mean ||delta_i||^2 / (2 (||D||^2 + eps))); both means by weights.

    `eta_g` [R] (1 in an empty round); `tail` [R+1, d] = (x[t] + x[t-1]) / 2, the average of the last two iterates,
    which the paper evaluates. The paper's means are uniform. One client, eps >= 0: FedAvg, as the ratio is at most 1/2.
    """
    _, x, w, _, log = _begin(x0, steps, weights)
    _save(log, x=x, tail=x)
    for t, cohort in enumerate(cohorts):
        before, eta_g = x, 1.0
        if len(cohort) > 0:
            delta = {i: _local_sgd(i, x, gradient, steps, eta, t) for i in cohort}
            D, spread = _mean(delta, cohort, w), _mean({i: np.sum(delta[i] ** 2) for i in cohort}, cohort, w)
            eta_g = max(1.0, spread / (2.0 * (np.sum(D**2) + eps))) if spread > 0.0 else 1.0
            x = x + eta_g * D
        _save(log, x=x, tail=(x + before) / 2.0, eta_g=eta_g)
    return _arrays(log)


# DP-FedExP, Takakura, Liew, Hasegawa 2025 (arXiv 2504.09850). RECALLED AND NOT CONFIRMED: only its abstract was read,
# which settles that the step is chosen from the diversity of the local updates with no new hyperparameter.
def dp_fedexp(x0, gradient, cohorts, steps, eta, clip, sigma, noise, kind, extra=None, factor=1.0):
    """x += eta_g c, eta_g = max(1, numerator / (factor ||c||^2)), c_i = delta_i min(1, clip / ||delta_i||).

    kind "ldp": noise[t][i] [d], of deviation sigma a coordinate, is added to each c_i; c their mean; numerator =
    mean ||c_i||^2 - d sigma^2, unbiased for the clipped updates' mean. "cdp": c = mean c_i + noise[t]; numerator =
    mean ||c_i||^2 + extra[t], a scalar of noise. factor: 1 here, 2 is FedExP's. Uniform means; ||c|| = 0 gives 1.
    """
    _, x, _, _, log = _begin(x0, steps, None)
    _save(log, x=x)
    for t, cohort in enumerate(cohorts):
        eta_g = 1.0
        if len(cohort) > 0:
            delta = np.array([_local_sgd(i, x, gradient, steps, eta, t) for i in cohort])
            norms = np.sqrt(np.sum(delta**2, axis=1))
            delta = delta * np.minimum(1.0, clip / np.where(norms > 0.0, norms, 1.0))[:, None]
            if kind == "ldp":
                delta = delta + np.array([noise[t][i] for i in cohort])
            c = delta.mean(axis=0) + (noise[t] if kind == "cdp" else 0.0)
            numerator = np.mean(np.sum(delta**2, axis=1)) + (extra[t] if kind == "cdp" else -x.size * sigma**2)
            eta_g = max(1.0, numerator / (factor * np.sum(c**2))) if np.any(c != 0.0) else 1.0
            x = x + eta_g * c
        _save(log, x=x, eta_g=eta_g)
    return _arrays(log)


# FedCM, Algorithm 2 of Xu, Wang, Wang, Yao 2021.
def fedcm(x0, gradient, cohorts, steps, eta, alpha, server_lr=1.0, eta_g=None, weights=None):
    """y -= eta (alpha g + (1 - alpha) D); then D = mean (x - y_i) / (eta K_i) and x += server_lr mean (y_i - x).

    eta_g given: x -= eta_g D, as the paper writes it; the two agree for eta_g = server_lr eta K, equal steps. D = 0 at
    first. `D` [R+1, d]. alpha = 1: FedAvg. Unequal K_i are open: each is divided by its own.
    """
    _, x, w, _, log = _begin(x0, steps, weights)
    D = np.zeros_like(x)
    _save(log, x=x, D=D)
    for t, cohort in enumerate(cohorts):
        if len(cohort) > 0:
            step = lambda *at, D=D: alpha * gradient(*at) + (1.0 - alpha) * D  # noqa: E731
            delta = {i: _local_sgd(i, x, step, steps, eta, t) for i in cohort}
            D = _mean({i: -delta[i] / (eta * steps[i]) for i in cohort}, cohort, w)
            x = x + server_lr * _mean(delta, cohort, w) if eta_g is None else x - eta_g * D
        _save(log, x=x, D=D)
    return _arrays(log)


# FedSAM, Algorithm 1 of Qu et al. 2022; Caldarola, Caputo, Ciccone 2022.
def fedsam(x0, gradient, cohorts, steps, eta, rho, server_lr=1.0, weights=None):
    """y -= eta g(y + rho g(y) / ||g(y)||), both gradients of one batch; no ascent where g = 0. rho = 0: FedAvg."""

    def sharp(i, y, k, t):
        g = gradient(i, y, k, t)
        norm = np.linalg.norm(g)
        return gradient(i, y + rho * g / norm, k, t) if norm > 0.0 else g

    _, x, w, _, log = _begin(x0, steps, weights)
    _save(log, x=x)
    for t, cohort in enumerate(cohorts):
        x = x + server_lr * _mean({i: _local_sgd(i, x, sharp, steps, eta, t) for i in cohort}, cohort, w)
        _save(log, x=x)
    return _arrays(log)


# FedAdamW, Liu, Shang et al. 2025 (arXiv 2510.27486); formulas seen in a public summary of it.
def fedadamw(
    x0, gradient, cohorts, steps, eta, alpha, lam, blocks, b1=0.9, b2=0.999, eps=1e-8, server_lr=1.0, weights=None,
    count="global",
):  # fmt: skip
    """y -= eta (m^ / (sqrt(v^) + eps) + alpha D + lam y), m = 0 and v = V at a round's start; k = 1 .. K.

    m^ = m / (1 - b1^k), v^ = v / (1 - b2^s): s = r K_i + k, the paper's global step, r the non-empty rounds before;
    count = "local": s = k. `V` [R+1, d]: the mean over the cohort of v's mean over each of `blocks` (index arrays that
    part the coordinates), spread over the block. `D` [R+1, d] = mean (x - y_i) / (eta K_i); x += server_lr mean (y_i - x).
    Choices: lam y is a decay (the summary prints -lam y); eps outside the root; D and V start at 0.
    """
    _, x, w, _, log = _begin(x0, steps, weights)
    D, V, r = np.zeros_like(x), np.zeros_like(x), 0
    _save(log, x=x, D=D, V=V)
    for t, cohort in enumerate(cohorts):
        delta, second = {}, {}
        for i in cohort:
            y, m, v = x.copy(), np.zeros_like(x), V.copy()
            for k in range(1, steps[i] + 1):
                g = gradient(i, y, k - 1, t)
                m, v = b1 * m + (1.0 - b1) * g, b2 * v + (1.0 - b2) * g**2
                s = r * steps[i] + k if count == "global" else k
                d = m / (1.0 - b1**k) / (np.sqrt(v / (1.0 - b2**s)) + eps)
                y = y - eta * (d + alpha * D + lam * y)
            delta[i], second[i] = y - x, np.zeros_like(x)
            for block in blocks:
                second[i][block] = v[block].mean()
        if len(cohort) > 0:
            D = _mean({i: -delta[i] / (eta * steps[i]) for i in cohort}, cohort, w)
            x, V, r = x + server_lr * _mean(delta, cohort, w), _mean(second, cohort, w), r + 1
        _save(log, x=x, D=D, V=V)
    return _arrays(log)


def orthogonalise(M, ns_steps=5, eps=1e-7):
    """Muon's Newton-Schulz: X = M / (||M||_F + eps), then X = a X + (b A + c A^2) X, A = X X^T (Jordan et al. 2024).

    (a, b, c) = (3.4445, -4.7750, 2.0315): singular values go to about [0.7, 1.2], not to 1. A tall M is transposed.
    ns_steps = None: the exact polar factor U V^T over the nonzero singular values.
    """
    if ns_steps is None:
        U, s, Vt = np.linalg.svd(M, full_matrices=False)
        keep = s > 1e-12 * max(s.max(), 1e-300)
        return U[:, keep] @ Vt[keep]
    X = M.T if M.shape[0] > M.shape[1] else M
    X = X / (np.linalg.norm(X) + eps)
    for _ in range(ns_steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if M.shape[0] > M.shape[1] else X


# FedMuon, Liu, Shang et al. 2025 (arXiv 2510.27403); formulas seen in a public summary of it.
def fedmuon(
    x0,
    gradient,
    cohorts,
    steps,
    eta,
    alpha,
    beta,
    matrices,
    lam=0.0,
    ns_steps=5,
    scale=None,
    server_lr=1.0,
    weights=None,
):
    """M = beta M + g; y -= eta ((1 - alpha) O(M) + alpha D + lam y), M = the clients' mean M at a round's start.

    matrices: (index array, (rows, cols)) of each matrix; O orthogonalises those (times scale(rows, cols); None is 1) and
    leaves the other coordinates of M as they are: momentum SGD (open; Muon itself uses AdamW there). No Nesterov step.
    `D`, `M` [R+1, d] as fedadamw's D, and the mean of the cohort's last M; both start at 0. matrices = [], alpha = 0,
    beta = 0: FedAvg. The summary has no decay: lam = 0.
    """
    _, x, w, _, log = _begin(x0, steps, weights)
    D, M = np.zeros_like(x), np.zeros_like(x)
    _save(log, x=x, D=D, M=M)
    for t, cohort in enumerate(cohorts):
        delta, last = {}, {}
        for i in cohort:
            y, m = x.copy(), M.copy()
            for k in range(steps[i]):
                m = beta * m + gradient(i, y, k, t)
                o = m.copy()
                for index, shape in matrices:
                    o[index] = (1.0 if scale is None else scale(*shape)) * orthogonalise(
                        m[index].reshape(shape), ns_steps
                    ).ravel()
                y = y - eta * ((1.0 - alpha) * o + alpha * D + lam * y)
            delta[i], last[i] = y - x, m
        if len(cohort) > 0:
            D = _mean({i: -delta[i] / (eta * steps[i]) for i in cohort}, cohort, w)
            x, M = x + server_lr * _mean(delta, cohort, w), _mean(last, cohort, w)
        _save(log, x=x, D=D, M=M)
    return _arrays(log)


# Scaffnew, Algorithm 2 of Mishchenko, Malinovsky, Stich, Richtarik 2022 (ProxSkip with the consensus constraint).
def scaffnew(x0, gradient, coins, n, gamma, p, h0=None):
    """y_i = x_i - gamma (g_i - h_i); a head: x_i = mean y, else y_i; then h_i += (p / gamma) (x_i - y_i).

    coins[s]: the flip of iteration s (True: communicate). All clients always. `x` [S+1, N, d], `h` [S+1, N, d]; row 0 is
    the start, h0 (sum 0; zeros by default). g_i = gradient(i, x_i, steps since the last head, heads so far). h moves only
    at a head, and sum h stays 0. Always heads: gradient descent on the mean, whatever p.
    """
    x, h, log = np.tile(np.array(x0, dtype=float), (n, 1)), np.zeros((n, len(x0))) + (0.0 if h0 is None else h0), {}
    _save(log, x=x, h=h)
    step, heads = 0, 0
    for coin in coins:
        y = x - gamma * (np.array([gradient(i, x[i], step, heads) for i in range(n)]) - h)
        x = np.tile(y.mean(axis=0), (n, 1)) if coin else y
        h = h + (p / gamma) * (x - y)
        step, heads = (0, heads + 1) if coin else (step + 1, heads)
        _save(log, x=x, h=h)
    return _arrays(log)


# FedLC, the calibrated loss of Zhang, Li, Li et al. 2022: pairwise margins tau n_c^(-1/4).
def fedlc_loss(logits, labels, counts, tau, own=False):
    """-log(exp z_y / sum_{c != y} exp z_c) a row, z_c = f_c - tau counts[c]^(-1/4); its gradient by the logits.

    own = True: the sum takes c = y too, the softmax as many codes have it. The client's own counts; an absent class
    (count 0) has z = -inf and leaves the sum. Returns (losses [m], gradients [m, C]). A row whose label is the only
    class present is -inf without `own` (open). tau = 0 and own: cross-entropy. A common shift of z changes nothing.
    """
    counts = np.asarray(counts, dtype=float)
    margin = np.where(counts > 0, tau * np.maximum(counts, 1.0) ** -0.25, np.inf)
    losses, slopes = [], []
    for f, y in zip(np.asarray(logits, dtype=float), labels, strict=True):
        others = np.array([c for c in range(len(f)) if counts[c] > 0 and (own or c != y)], dtype=int)
        raised = np.exp((f - margin)[others] - (f[y] - margin[y]))
        losses.append(np.log(raised.sum()) if len(others) > 0 else -np.inf)
        slope = np.zeros_like(f)
        slope[others] = raised / raised.sum()
        slope[y] -= 1.0
        slopes.append(slope)
    return np.array(losses), np.array(slopes)
