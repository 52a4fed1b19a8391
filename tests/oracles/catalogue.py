"""Independent NumPy references for the clipping catalogue, written from the papers' formulas alone.

Parameters are one flat float64 vector ``x``.  ``grad(i, x, batch)`` is client i's gradient.  ``rounds`` is a list of
dicts {sampled client: [batch, ...]}, one local step a batch.  ``weights[i]`` is the number of examples of client i,
for every client ever sampled; a weighted mean runs over the round's sampled clients.  Per-client state starts at zero.
Every function returns the list of x after each round.
"""

import numpy as np


def norm(u):
    """L2 norm of a vector (every source below unless it says otherwise)."""
    return float(np.sqrt(np.sum(np.square(u))))


def clip(u, tau):
    """u * min(1, tau / ||u||), zero safe (Pascanu et al. 2013)."""
    n = norm(u)
    return u.copy() if n == 0.0 else u * min(1.0, tau / n)


def weighted_mean(values, weights):
    """sum_i w_i v_i / sum_i w_i over the keys of `values` (FedAvg, McMahan et al. 2017)."""
    total = sum(weights[i] for i in values)
    return sum(weights[i] * values[i] for i in values) / total


def mean_gradient(grad, i, x, batches):
    """Equal-weight mean of one client's gradients at one fixed point (minibatch SGD)."""
    return sum(grad(i, x, batch) for batch in batches) / len(batches)


def local_steps(grad, i, x, batches, lr, tau=np.inf, mu=0.0):
    """y - x after local SGD from x, clip(g + mu (y - x)) a step (CELGC, Liu et al. 2022; FedProx, Li et al. 2020)."""
    y = x.copy()
    for batch in batches:
        y = y - lr * clip(grad(i, y, batch) + mu * (y - x), tau)
    return y - x


def celgc(x, grad, rounds, weights, *, lr, tau):
    """CELGC: every local gradient clipped, then averaged (Liu et al. 2022)."""
    x, xs = np.array(x, dtype=np.float64), []
    for sampled in rounds:
        updates = {i: local_steps(grad, i, x, batches, lr, tau) for i, batches in sampled.items()}
        x = x + weighted_mean(updates, weights)
        xs.append(x)
    return xs


def clipped_minibatch(x, grad, rounds, weights, *, lr, tau):
    """Clipped minibatch SGD: one clipped step on the averaged gradient (baseline of Crawshaw et al. 2023)."""
    x, xs = np.array(x, dtype=np.float64), []
    for sampled in rounds:
        means = {i: mean_gradient(grad, i, x, batches) for i, batches in sampled.items()}
        x = x - lr * clip(weighted_mean(means, weights), tau)
        xs.append(x)
    return xs


def episodic_step(y, d, lr, tau, clipped):
    """One local step under the round's indicator: -lr d, or -lr tau d/||d|| (EPISODE, Crawshaw et al. 2023)."""
    if not clipped:
        return y - lr * d
    n = norm(d)
    return y.copy() if n == 0.0 else y - lr * tau * d / n


def episode(x, grad, rounds, weights, *, lr, tau):
    """EPISODE: fresh corrections from each first batch, one clipping decision a round (Crawshaw et al. 2023)."""
    x, xs = np.array(x, dtype=np.float64), []
    for sampled in rounds:
        local = {i: grad(i, x, batches[0]) for i, batches in sampled.items()}
        mean = weighted_mean(local, weights)
        clipped = norm(mean) > tau
        updates = {}
        for i, batches in sampled.items():
            y = x.copy()
            for batch in batches[1:]:
                y = episodic_step(y, grad(i, y, batch) - local[i] + mean, lr, tau, clipped)
            updates[i] = y - x
        x = x + weighted_mean(updates, weights)
        xs.append(x)
    return xs


def scaffold(x, grad, rounds, weights, *, lr, tau=np.inf, num_clients):
    """SCAFFOLD option II with server rate 1 (Karimireddy et al. 2020); a finite tau clips each corrected step."""
    x, xs = np.array(x, dtype=np.float64), []
    variates, c = {i: np.zeros_like(x) for i in weights}, np.zeros_like(x)
    for sampled in rounds:
        updates, fresh = {}, {}
        for i, batches in sampled.items():
            y, raw = x.copy(), np.zeros_like(x)
            for batch in batches:
                g = grad(i, y, batch)
                raw = raw + g
                y = y - lr * clip(g - variates[i] + c, tau)
            updates[i], fresh[i] = y - x, raw / len(batches)
        c = c + sum(fresh[i] - variates[i] for i in sampled) / num_clients
        variates.update(fresh)
        x = x + weighted_mean(updates, weights)
        xs.append(x)
    return xs


def fat_pr(x, grad, rounds, weights, *, lr, server_lr, tau):
    """FAT-Clipping-PR: the sum of a client's local gradients clipped once a round (Yang, Qiu, Liu 2022)."""
    x, xs = np.array(x, dtype=np.float64), []
    for sampled in rounds:
        sums = {}
        for i, batches in sampled.items():
            y, s = x.copy(), np.zeros_like(x)
            for batch in batches:
                g = grad(i, y, batch)
                s = s + g
                y = y - lr * g
            sums[i] = clip(s, tau)
        x = x - server_lr * lr * weighted_mean(sums, weights)
        xs.append(x)
    return xs


def update_clip(x, grad, rounds, weights, *, lr, bound):
    """Each client's whole update clipped, no noise (DP-FedAvg, McMahan et al. 2018; CE-FedAvg, Zhang et al. 2022)."""
    x, xs = np.array(x, dtype=np.float64), []
    for sampled in rounds:
        updates = {i: clip(local_steps(grad, i, x, batches, lr), bound) for i, batches in sampled.items()}
        x = x + weighted_mean(updates, weights)
        xs.append(x)
    return xs


def geometric_quantile(c, norms, target, rate):
    """C * exp(-rate (b - target)), b the unweighted fraction of norms <= C (Andrew et al. 2021)."""
    b = sum(1.0 for n in norms if n <= c) / len(norms)
    return c * np.exp(-rate * (b - target))


def quantile_clip(x, grad, rounds, weights, *, lr, c0, target_unclipped_quantile, rate):
    """Update clipping with an adaptive bound, no noise; returns (xs, C after each round) (Andrew et al. 2021)."""
    x, xs, c, cs = np.array(x, dtype=np.float64), [], float(c0), []
    for sampled in rounds:
        raw = {i: local_steps(grad, i, x, batches, lr) for i, batches in sampled.items()}
        x = x + weighted_mean({i: clip(raw[i], c) for i in raw}, weights)
        c = geometric_quantile(c, [norm(u) for u in raw.values()], target_unclipped_quantile, rate)
        xs.append(x)
        cs.append(c)
    return xs, cs


def zero_then_clip(
    x, grad, rounds, weights, *, lr, zero0, zero_quantile, zero_rate,
    multiplier, increment, c0, clip_quantile, clip_rate, zero_norm_order=2,
):  # fmt: skip
    """Adaptive zeroing around adaptive clipping; returns (xs, zs, cs) (TFF's robust aggregator; Andrew et al. 2021)."""
    x, xs, z, zs, c, cs = np.array(x, dtype=np.float64), [], float(zero0), [], float(c0), []
    for sampled in rounds:
        raw = {i: local_steps(grad, i, x, batches, lr) for i, batches in sampled.items()}
        sizes = {i: float(np.linalg.norm(raw[i], zero_norm_order)) for i in raw}  # TFF itself: infinity norm
        kept = {i: np.zeros_like(x) if sizes[i] > multiplier * z + increment else raw[i] for i in raw}
        x = x + weighted_mean({i: clip(kept[i], c) for i in kept}, weights)
        z = geometric_quantile(z, list(sizes.values()), zero_quantile, zero_rate)
        c = geometric_quantile(c, [norm(u) for u in kept.values()], clip_quantile, clip_rate)
        xs.append(x)
        zs.append(z)
        cs.append(c)
    return xs, zs, cs


def biclip(g, d, u):
    """Coordinate-wise sign(g) * min(max(|g|, d), u), with sign(0) = 0 (BiClip, TailOPT 2025)."""
    return np.sign(g) * np.minimum(np.maximum(np.abs(g), d), u)


def bi2clip(x, grad, rounds, weights, *, lr, server_lr, d, u, server_d, server_u):
    """Bi2Clip: BiClip on each local gradient and on the server's mean update (TailOPT 2025)."""
    x, xs = np.array(x, dtype=np.float64), []
    for sampled in rounds:
        updates = {}
        for i, batches in sampled.items():
            y = x.copy()
            for batch in batches:
                y = y - lr * biclip(grad(i, y, batch), d, u)
            updates[i] = y - x
        x = x + server_lr * biclip(weighted_mean(updates, weights), server_d, server_u)
        xs.append(x)
    return xs


def centered(x, grad, rounds, weights, *, lr, tau):
    """Centred clipping, one iteration, centred on the last aggregate (Karimireddy, He, Jaggi 2021)."""
    x, xs = np.array(x, dtype=np.float64), []
    m = np.zeros_like(x)
    for sampled in rounds:
        updates = {i: local_steps(grad, i, x, batches, lr) for i, batches in sampled.items()}
        m = m + weighted_mean({i: clip(updates[i] - m, tau) for i in updates}, weights)
        x = x + m
        xs.append(x)
    return xs


def centered_often(x, grad, rounds, weights, *, lr, tau, iterations):
    """The same with several iterations, uniformly over clients."""
    x, xs = np.array(x, dtype=np.float64), []
    m = np.zeros_like(x)
    for sampled in rounds:
        updates = [local_steps(grad, i, x, batches, lr) for i, batches in sampled.items()]
        for _ in range(iterations):
            m = m + np.mean([clip(u - m, tau) for u in updates], axis=0)
        x = x + m
        xs.append(x)
    return xs


def fedprox(x, grad, rounds, weights, *, lr, tau, mu):
    """FedProx (Li et al. 2020) with the whole proximal gradient clipped, as CELGC would."""
    x, xs = np.array(x, dtype=np.float64), []
    for sampled in rounds:
        updates = {i: local_steps(grad, i, x, batches, lr, tau, mu) for i, batches in sampled.items()}
        x = x + weighted_mean(updates, weights)
        xs.append(x)
    return xs


def fednova(x, grad, rounds, weights, *, lr, tau):
    """FedNova: updates normalised by their step counts (Wang et al. 2020), over clipped local SGD."""
    x, xs = np.array(x, dtype=np.float64), []
    for sampled in rounds:
        steps = {i: float(len(batches)) for i, batches in sampled.items()}
        d = {i: -local_steps(grad, i, x, batches, lr, tau) / steps[i] for i, batches in sampled.items()}
        x = x - weighted_mean(steps, weights) * weighted_mean(d, weights)
        xs.append(x)
    return xs


def feddyn(x, grad, rounds, weights, *, lr, tau, alpha, num_clients):
    """FedDyn (Acar et al. 2021) by local steps, each clipped; its averages are uniform, so `weights` is unused."""
    x, xs = np.array(x, dtype=np.float64), []
    local_h, h = {i: np.zeros_like(x) for i in weights}, np.zeros_like(x)
    for sampled in rounds:
        ys = {}
        for i, batches in sampled.items():
            y = x.copy()
            for batch in batches:
                y = y - lr * clip(grad(i, y, batch) - local_h[i] + alpha * (y - x), tau)
            ys[i] = y
            local_h[i] = local_h[i] - alpha * (y - x)
        h = h - alpha / num_clients * sum(y - x for y in ys.values())
        x = sum(ys.values()) / len(ys) - h / alpha
        xs.append(x)
    return xs


def mime_lite(x, grad, rounds, weights, *, lr, tau, beta):
    """MimeLite with SGDm: server momentum frozen in every local step (Karimireddy et al. 2021), steps clipped."""
    x, xs = np.array(x, dtype=np.float64), []
    m = np.zeros_like(x)
    for sampled in rounds:
        at_x = {i: mean_gradient(grad, i, x, batches) for i, batches in sampled.items()}
        updates = {}
        for i, batches in sampled.items():
            y = x.copy()
            for batch in batches:
                y = y - lr * clip((1.0 - beta) * grad(i, y, batch) + beta * m, tau)
            updates[i] = y - x
        m = (1.0 - beta) * weighted_mean(at_x, weights) + beta * m
        x = x + weighted_mean(updates, weights)
        xs.append(x)
    return xs


def mime(x, grad, rounds, weights, *, lr, tau, beta):
    """Mime with SGDm: MimeLite plus the SVRG correction on each batch (Karimireddy et al. 2021), steps clipped."""
    x, xs = np.array(x, dtype=np.float64), []
    m = np.zeros_like(x)
    for sampled in rounds:
        at_x = {i: mean_gradient(grad, i, x, batches) for i, batches in sampled.items()}
        mean = weighted_mean(at_x, weights)
        updates = {}
        for i, batches in sampled.items():
            y = x.copy()
            for batch in batches:
                corrected = grad(i, y, batch) - grad(i, x, batch) + mean
                y = y - lr * clip((1.0 - beta) * corrected + beta * m, tau)
            updates[i] = y - x
        m = (1.0 - beta) * mean + beta * m
        x = x + weighted_mean(updates, weights)
        xs.append(x)
    return xs


def autoclip(gs, percentile):
    """AutoClip: clip to a percentile of all norms so far, this one included (Seetharaman et al. 2020)."""
    history, out = [], []
    for g in gs:
        history.append(norm(g))
        out.append(clip(g, float(np.percentile(history, percentile))))
    return out


def zclip(gs, *, decay=0.97, z=2.5, warmup=25, eps=0.0):
    """ZClip: z-score test on the norm, reciprocal threshold, EMA fed the clipped norm (Kumar et al. 2025)."""
    out = [g.copy() for g in gs[:warmup]]
    collected = [norm(g) for g in gs[:warmup]]
    mean, var = np.mean(collected), np.var(collected)
    for g in gs[warmup:]:
        n = norm(g)
        std = np.sqrt(var)
        if n - mean > z * (std + eps):  # score = (n - mean) / (std + eps) > z, without dividing by a zero deviation
            threshold = mean + z**2 * std * (std + eps) / (n - mean)  # mean + (z**2 / score) * std
            g, n = clip(g, threshold), min(n, threshold)
        out.append(g.copy())
        mean = decay * mean + (1.0 - decay) * n
        var = decay * var + (1.0 - decay) * (n - mean) ** 2
    return out


def u_clip(gs, tau):
    """U-Clip: the clipped-off part is carried to the next gradient (Elesedy and Hutter 2023)."""
    out, b = [], 0.0
    for g in gs:
        u = clip(g + b, tau)
        b = g + b - u
        out.append(u)
    return out


def delta_gclip(gs, tau, delta):
    """delta-GClip: g * min(1, max(delta, tau / ||g||)), zero safe (delta-regularised clipping, 2024)."""
    return [g * min(1.0, max(delta, tau / norm(g))) if norm(g) > 0.0 else g.copy() for g in gs]


def agc(g, w, ratio, floor):
    """Adaptive gradient clipping of a matrix [in, out], one unit a column (Brock et al. 2021)."""
    out = g.copy()
    for j in range(g.shape[1]):
        limit = ratio * max(norm(w[:, j]), floor)
        if norm(g[:, j]) > limit:
            out[:, j] = g[:, j] * limit / norm(g[:, j])
    return out
