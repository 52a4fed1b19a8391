"""Independent NumPy reference for batch normalisation in federated averaging (float64, no autodiff).

Written from the papers, before the library's code:
  * training and its derivatives: Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 1 and the equations of section 3;
  * averaging of all that a client has: McMahan et al. 2017, Algorithm 1;
  * each client's own norms: Li et al. 2021, "FedBN", Algorithm 1.

The network is ``softmax(relu(BN(x w1)) w2 + b2)``. Parameters are {"w1", "gamma", "beta", "w2", "b2"}, statistics are
{"mean", "var"}. A batch is (x, y, weights).

Conventions where the papers leave a choice:
  * an example of weight 0 does not exist, for the statistics, too; other weights count in the mean loss only;
  * a statistic moves by ``s <- momentum s + (1 - momentum) batch``, and var is the biased one of Algorithm 1, as in Flax;
  * FedBN keeps gamma, beta and the statistics at the client; a client that has not taken part has the initial ones.
"""

import numpy as np

NORM = ("gamma", "beta")


def normalise(u, gamma, beta, eps):
    """Algorithm 1: (y, what its derivative needs)."""
    mean, var = u.mean(0), u.var(0)
    hat = (u - mean) / np.sqrt(var + eps)
    return gamma * hat + beta, (u, mean, var, hat)


def normalise_backwards(dy, gamma, eps, saved):
    """Section 3's equations: the loss's derivatives in u, gamma and beta."""
    u, mean, var, hat = saved
    m = len(u)
    dhat = dy * gamma
    dvar = np.sum(dhat * (u - mean) * -0.5 * (var + eps) ** -1.5, 0)
    dmean = np.sum(dhat * -1 / np.sqrt(var + eps), 0) + dvar * np.sum(-2 * (u - mean), 0) / m
    du = dhat / np.sqrt(var + eps) + dvar * 2 * (u - mean) / m + dmean / m
    return du, np.sum(dy * hat, 0), np.sum(dy, 0)


def cross_entropy(logits, y):
    shifted = logits - logits.max(1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    return -np.log(p[np.arange(len(y)), y]), p


def loss_and_gradient(params, batch, eps=1e-5):
    """(weighted mean loss, its gradient, the batch's mean and var)."""
    x, y, w = (np.asarray(a) for a in batch)
    live = w > 0
    x, y, w = x[live].astype(np.float64), y[live], w[live].astype(np.float64)
    u = x @ params["w1"]
    z, saved = normalise(u, params["gamma"], params["beta"], eps)
    h = np.maximum(z, 0)
    losses, p = cross_entropy(h @ params["w2"] + params["b2"], y)
    d = p.copy()
    d[np.arange(len(y)), y] -= 1
    d *= (w / w.sum())[:, None]
    dz = (d @ params["w2"].T) * (z > 0)
    du, dgamma, dbeta = normalise_backwards(dz, params["gamma"], eps, saved)
    gradient = {"w1": x.T @ du, "gamma": dgamma, "beta": dbeta, "w2": h.T @ d, "b2": d.sum(0)}
    return float(np.sum(losses * w) / w.sum()), gradient, {"mean": saved[1], "var": saved[2]}


def evaluated(params, stats, x, y, eps=1e-5):
    """Losses [n] by the running statistics (Algorithm 2, line 11)."""
    hat = (x @ params["w1"] - stats["mean"]) / np.sqrt(stats["var"] + eps)
    return cross_entropy(np.maximum(params["gamma"] * hat + params["beta"], 0) @ params["w2"] + params["b2"], y)[0]


def local(params, stats, batches, lr, momentum, clip=None, eps=1e-5):
    """SGD steps over a client's batches, clipped by the gradient's global norm: (params, stats)."""
    params, stats = dict(params), dict(stats)
    for batch in batches:
        _, g, seen = loss_and_gradient(params, batch, eps)
        norm = np.sqrt(sum(np.sum(v**2) for v in g.values()))
        factor = 1.0 if clip is None else min(1.0, clip / norm)
        params = {k: v - lr * factor * g[k] for k, v in params.items()}
        stats = {k: momentum * v + (1 - momentum) * seen[k] for k, v in stats.items()}
    return params, stats


def rounds(params, stats, cohorts, lr, momentum, clip=None, server_lr=1.0, own=()):
    """FedAvg's rounds, with ``own`` FedBN's: names that each client keeps, among parameters and statistics.

    cohorts[t] is {client: (weight, batches)}. ``server_lr`` scales the step of trained parameters; statistics become
    the clients' mean. Returns (params, stats, {client: what it keeps}).
    """
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    stats = {k: np.asarray(v, np.float64) for k, v in stats.items()}
    first = {k: v for k, v in {**params, **stats}.items() if k in own}
    kept = {}
    for cohort in cohorts:
        total = sum(weight for weight, _ in cohort.values())
        new = {k: np.zeros_like(v) for k, v in {**params, **stats}.items() if k not in own}
        for client, (weight, batches) in cohort.items():
            mine = kept.get(client, first)
            p = {k: mine.get(k, v) for k, v in params.items()}
            s = {k: mine.get(k, v) for k, v in stats.items()}
            p, s = local(p, s, batches, lr, momentum, clip)
            here = {**p, **s}
            kept[client] = {k: here[k] for k in own}
            new = {k: v + weight / total * here[k] for k, v in new.items()}
        params = {k: v if k in own else v + server_lr * (new[k] - v) for k, v in params.items()}
        stats = {k: v if k in own else new[k] for k, v in stats.items()}
    return params, stats, kept
