"""NumPy oracle of personalised methods: Ditto, MR-MTL, pFedMe, APFL, Per-FedAvg, Reptile, FedRep, FedBABU, FedPer,
FedBN, FedALA, kNN-Per.

Conventions of rounds.py: gradient(i, x, step, round), cohorts of ids, steps[i], weights of the mean. Rows: `x` [R+1, d]
is the global vector and `v` [R+1, N, d] the personal models; row 0 is the start, row t+1 the state after round t. Only
sampled clients act; the others keep their state, and an empty cohort changes nothing. Every personal vector starts at
x0. Where a method fine-tunes at evaluation, gradient(i, y, k, FINE) is its k-th gradient, and `v` holds ALL clients
tuned afresh from that row's x. Two passes of one client in one round draw the same batches, step 0 on, unless said
otherwise: no paper says which batches the second pass sees. All formulas recalled.
"""

import numpy as np
from oracles.rounds import _arrays, _begin, _local_sgd, _mean, _save

FINE = -2


def _mask(x, index):
    """1 on the coordinates of `index`, 0 elsewhere; None is everywhere."""
    return np.ones_like(x) if index is None else np.isin(np.arange(x.size), index).astype(float)


def fine_tune(x, gradient, n, steps, eta, index=None):
    """[n, d]: x after `steps` steps of SGD at each of n clients, on the coordinates of `index` alone."""
    rows = np.tile(x, (n, 1))
    for i in range(n):
        for k in range(steps):
            rows[i] = rows[i] - eta * _mask(x, index) * gradient(i, rows[i], k, FINE)
    return rows


# Ditto, Algorithm 1 of Li, Hu, Beirami, Smith 2021.
def ditto(x0, gradient, cohorts, steps, eta, personal_eta, lam, personal_steps=None, server_lr=1.0, weights=None):
    """v_i -= personal_eta (g(v_i) + lam (v_i - x)), x as RECEIVED in the round; personal_steps: [N], None is `steps`.

    Open in the paper: the batches of v_i (here those of w_i). The rows of x are FedAvg's, whatever lam.
    """
    n, x, w, _, log = _begin(x0, steps, weights)
    v, personal_steps = np.tile(x, (n, 1)), steps if personal_steps is None else personal_steps
    _save(log, x=x, v=v)
    for t, cohort in enumerate(cohorts):
        delta = {i: _local_sgd(i, x, gradient, steps, eta, t) for i in cohort}
        for i in cohort:
            for k in range(personal_steps[i]):
                v[i] = v[i] - personal_eta * (gradient(i, v[i], k, t) + lam * (v[i] - x))
        x = x + server_lr * _mean(delta, cohort, w)
        _save(log, x=x, v=v)
    return _arrays(log)


# MR-MTL, Section 4 of Liu, Hu, Wu, Smith 2022: min_v sum_k f_k(v_k) + lam/2 ||v_k - mean(v)||^2.
def mr_mtl(x0, gradient, cohorts, steps, eta, lam, weights=None, over="all"):
    """v_i -= eta (g(v_i) + lam (v_i - x)) from the client's own v_i; x = the mean of v, fixed within a round.

    Open (the paper has all silos in every round): the mean after a partial cohort. over = "all": of the stored v of ALL
    clients; "cohort": of the sampled ones' new v_i. The two agree on full cohorts.
    """
    n, x, w, _, log = _begin(x0, steps, weights)
    _save(log, x=x, v=(v := np.tile(x, (n, 1))))
    for t, cohort in enumerate(cohorts):
        for i in cohort:
            for k in range(steps[i]):
                v[i] = v[i] - eta * (gradient(i, v[i], k, t) + lam * (v[i] - x))
        if len(cohort) > 0:
            x = _mean(v, range(n) if over == "all" else cohort, w)
        _save(log, x=x, v=v)
    return _arrays(log)


# pFedMe, Algorithm 1 of Dinh, Tran, Nguyen 2020: w_{r+1} = w_r - eta lam (w_r - theta(w_r)), server step beta.
def pfedme(x0, gradient, cohorts, steps, eta, personal_eta, lam, inner, beta=1.0, start="theta", weights=None):
    """steps[i] = R local rounds; theta = `inner` steps of personal_eta on f(theta) + lam/2 ||theta - w_r||^2.

    v_i is the last theta. All inner steps of local round r see batch r (the paper's D_i). Open: where the inner steps
    begin. start = "theta": where the last ones ended in this round, at x when r = 0; "w": at w_r. The paper lets ALL
    clients train and averages the sampled; here the others do nothing: same x. x = (1 - beta) x + beta mean.
    """
    n, x, w, _, log = _begin(x0, steps, weights)
    _save(log, x=x, v=(v := np.tile(x, (n, 1))))
    for t, cohort in enumerate(cohorts):
        delta = {}
        for i in cohort:
            y, theta = x.copy(), x.copy()
            for r in range(steps[i]):
                theta = y.copy() if start == "w" else theta
                for _ in range(inner):
                    theta = theta - personal_eta * (gradient(i, theta, r, t) + lam * (theta - y))
                y = y - eta * lam * (y - theta)
            v[i], delta[i] = theta, y - x
        x = x + beta * _mean(delta, cohort, w)
        _save(log, x=x, v=v)
    return _arrays(log)


# APFL, Algorithm 1 and the rule of adaptive alpha of Deng, Kamani, Mahdavi 2020.
def apfl(x0, gradient, cohorts, steps, eta, personal_eta, alpha, alpha_eta=0.0, when="step", chain=True, weights=None):
    """mixed = alpha v + (1 - alpha) w; w -= eta g(w), v -= personal_eta alpha g(mixed), both from the OLD w, v, alpha.

    alpha -= alpha_eta <v - w, g(mixed)>, from the old ones too, projected on [0, 1] (open in the paper; the authors'
    code clips). when = "step": at every step; "round": at a round's first. chain = False drops the factor alpha of v's
    gradient (another reading of the paper's sign). `mixed` is of the client's OWN last w, not of the new x. `w`, `v`
    [R+1, N, d], `alpha` [R+1, N]. w restarts at x; v, alpha stay.
    """
    n, x, wt, _, log = _begin(x0, steps, weights)
    v, w, a = np.tile(x, (n, 1)), np.tile(x, (n, 1)), np.zeros(n) + alpha
    _save(log, x=x, v=v, w=w, alpha=a, mixed=v)
    for t, cohort in enumerate(cohorts):
        for i in cohort:
            w[i] = x
            for k in range(steps[i]):
                g, g_mixed = gradient(i, w[i], k, t), gradient(i, a[i] * v[i] + (1.0 - a[i]) * w[i], k, t)
                slope = np.dot(v[i] - w[i], g_mixed)
                w[i] = w[i] - eta * g
                v[i] = v[i] - personal_eta * (a[i] if chain else 1.0) * g_mixed
                if when == "step" or k == 0:
                    a[i] = min(max(a[i] - alpha_eta * slope, 0.0), 1.0)
        x = x + _mean(w - x, cohort, wt)
        _save(log, x=x, v=v, w=w, alpha=a, mixed=a[:, None] * v + (1.0 - a[:, None]) * w)
    return _arrays(log)


# Per-FedAvg, Algorithm 1 of Fallah, Mokhtari, Ozdaglar 2020; first-order and Hessian-free: its Section 5.
def per_fedavg(
    x0, gradient, cohorts, steps, eta, alpha, kind="fo", hvp=None, delta=1e-3, draws=None, tune_steps=1, weights=None
):
    """y -= eta (I - alpha H(y)) u, u = g(y - alpha g(y)); kind "fo": H = 0; "exact": hvp(i, y, u, step, round);
    "hf": H u = (g(y + delta u) - g(y - delta u)) / (2 delta).

    draws(k) = the steps that give the batches D, D', D'' of g(y), of the adapted gradient, of H (the paper: three
    independent ones); None is (k, k, k). v: tune_steps of rate alpha from x.
    """
    n, x, w, _, log = _begin(x0, steps, weights)
    _save(log, x=x, v=fine_tune(x, gradient, n, tune_steps, alpha))
    for t, cohort in enumerate(cohorts):
        moves = {}
        for i in cohort:
            y = x.copy()
            for k in range(steps[i]):
                inner, outer, curve = (k, k, k) if draws is None else draws(k)
                u = gradient(i, y - alpha * gradient(i, y, inner, t), outer, t)
                if kind == "hf":
                    ahead, behind = gradient(i, y + delta * u, curve, t), gradient(i, y - delta * u, curve, t)
                    u = u - alpha * (ahead - behind) / (2.0 * delta)
                elif kind == "exact":
                    u = u - alpha * hvp(i, y, u, curve, t)
                y = y - eta * u
            moves[i] = y - x
        x = x + _mean(moves, cohort, w)
        _save(log, x=x, v=fine_tune(x, gradient, n, tune_steps, alpha))
    return _arrays(log)


# FedBABU, Algorithm 1 of Oh, Kim, Yun 2022: the head stays at x0 in training; fine-tuned at evaluation.
def fedbabu(
    x0, gradient, cohorts, steps, eta, body, tune_steps, tune_eta=None, tune_index=None, server_lr=1.0, weights=None
):
    """`body`: trained and averaged; tune_index: tuned, None is all (the paper's default); tune_eta None: eta."""
    n, x, w, _, log = _begin(x0, steps, weights)
    mask, rate = _mask(x, body), eta if tune_eta is None else tune_eta
    _save(log, x=x, v=fine_tune(x, gradient, n, tune_steps, rate, tune_index))
    for t, cohort in enumerate(cohorts):
        delta = {i: _local_sgd(i, x, lambda *at: mask * gradient(*at), steps, eta, t) for i in cohort}
        x = x + server_lr * _mean(delta, cohort, w)
        _save(log, x=x, v=fine_tune(x, gradient, n, tune_steps, rate, tune_index))
    return _arrays(log)


# Reptile, Algorithm 2 (batched) of Nichol, Achiam, Schulman 2018: x += server_lr mean(y_i - x); a task is a client.
def reptile(x0, gradient, cohorts, steps, eta, server_lr, tune_steps, tune_eta=None, weights=None):
    """FedAvg with a server rate; v: tune_steps from x, as the paper evaluates."""
    return fedbabu(x0, gradient, cohorts, steps, eta, None, tune_steps, tune_eta, None, server_lr, weights)


# FedRep, Algorithm 1 of Collins, Hassani, Mokhtari, Shakkottai 2021: head_steps on the head, then steps on the body.
def fedrep(x0, gradient, cohorts, steps, eta, head, head_steps, head_eta=None, weights=None):
    """The head trains on the received body; then the body on the new head (one step in Algorithm 1, steps[i] here).

    Draws: head steps 0 .. h-1, body steps h .. h+steps[i]-1. As in `partial`: v_i = x's body with i's own head, `y` the
    client's model as its training left it; x keeps the head of x0, which each client reads once.
    """
    rate, mask = eta if head_eta is None else head_eta, _mask(np.asarray(x0, dtype=float), head)

    def train(i, y, t):
        for k in range(head_steps[i]):
            y = y - rate * mask * gradient(i, y, k, t)
        for k in range(steps[i]):
            y = y - eta * (1.0 - mask) * gradient(i, y, head_steps[i] + k, t)
        return y

    return _partial(x0, cohorts, steps, head, train, weights)


# FedPer, Algorithms 1, 2 of Arivazhagan et al. 2019 (local = head) and FedBN, Alg. 1 of Li et al. 2021 (local = norms).
def partial(x0, gradient, cohorts, steps, eta, local, weights=None):
    """Joint SGD from (x's shared part, own local part); `local` never leaves the client. `v`, `y` as in fedrep."""
    return _partial(x0, cohorts, steps, local, lambda i, y, t: y + _local_sgd(i, y, gradient, steps, eta, t), weights)


def _partial(x0, cohorts, steps, local, train, weights):
    n, x, w, _, log = _begin(x0, steps, weights)
    mask, y = _mask(x, local), np.tile(x, (n, 1))
    _save(log, x=x, v=y, y=y)
    for t, cohort in enumerate(cohorts):
        for i in cohort:
            y[i] = train(i, np.where(mask > 0.0, y[i], x), t)
        x = x + (1.0 - mask) * _mean(y - x, cohort, w)
        _save(log, x=x, v=mask * y + (1.0 - mask) * x, y=y)
    return _arrays(log)


# FedALA, Algorithm 1 of Zhang, Hua, Wang et al. 2023.
def fedala(x0, gradient, cohorts, steps, eta, ala_eta, ala_steps=(5, 1), upper=None, weights=None):
    """start = v_i + (x - v_i) W_i; W_i = clip(W_i - ala_eta g(start) (x - v_i), 0, 1), start formed again after each.

    W_i starts at 1 and stays at the client, and 1 outside `upper` (the paper's lower layers). SGD from start gives the
    new v_i, averaged. ala_steps = (the client's first time with x != v_i, later): the paper's "until convergence", then
    one epoch. Draws: 0 .. ala_steps-1, then 0 .. steps-1 anew (open: the paper's random s% of the data).
    """
    n, x, w, _, log = _begin(x0, steps, weights)
    v, mix, mask, met = np.tile(x, (n, 1)), np.ones((n, x.size)), _mask(x, upper), set()
    _save(log, x=x, v=v, W=mix)
    for t, cohort in enumerate(cohorts):
        for i in cohort:
            gap = x - v[i]
            for k in range(ala_steps[1] if i in met else ala_steps[0] if np.any(gap != 0.0) else 0):
                step = ala_eta * mask * gradient(i, v[i] + gap * mix[i], k, t) * gap
                mix[i] = np.clip(mix[i] - step, 0.0, 1.0)
            met |= {i} if np.any(gap != 0.0) else set()
            begin = v[i] + gap * mix[i]
            v[i] = begin + _local_sgd(i, begin, gradient, steps, eta, t)
        x = x + _mean(v - x, cohort, w)
        _save(log, x=x, v=v, W=mix)
    return _arrays(log)


# kNN-Per, the mixture of Section 3 of Marfoq, Neglia, Kameni, Vidal 2022.
def knn_per(stored, labels, queries, global_probs, k, lam, scale=1.0):
    """lam p_knn + (1 - lam) p_global [q, C]; p_knn(c) ~ sum of exp(-d / scale) over the k nearest stored of label c.

    d is Euclidean, of [m, p] to [q, p]. Open: ties go to the lower index; scale (the paper: 1).
    """
    out = np.array(global_probs, dtype=float)
    for q, query in enumerate(queries):
        d = np.linalg.norm(stored - query, axis=1)
        near = np.argsort(d, kind="stable")[:k]
        weight = np.exp(-(d[near] - d[near].min()) / scale)
        votes = np.bincount(np.asarray(labels)[near], weights=weight, minlength=out.shape[1])
        out[q] = lam * votes / votes.sum() + (1.0 - lam) * out[q]
    return out
