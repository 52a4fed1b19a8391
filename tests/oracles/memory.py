"""NumPy oracle of the methods that keep one memory per client: Clip21, Clip21-SGD2M, alpha-NormEC, EF21 / EF21-PP.

One round t of every function here, with S = cohorts[t] (any size, empty too):
  1. every i in S forms u_i = update(i, x, t), what it would send in full (a gradient, a local-training delta, ...),
     sends c_i, a bounded function of u_i and of its memory v_i, and adds it: v_i += c_i; the others' v_i stay;
  2. the server adds to g the mean over ALL N clients, absent ones counting zero: g += sum_S w_i c_i / sum_all w_i
     (uniform: (|S|/N) * mean_{i in S} c_i), so that g = sum_i w_i v_i / sum_i w_i at all times;
  3. x = server(x, g), in an empty round too.
Results: x [R+1, d], g [R+1, d], v [R+1, N, d]; row 0 is the start, row t+1 the state after round t.
EF21's paper (and Clip21-SGD2M's) write the step on x first and the memories second. Started from zero memories that is
the same sequence with one idle step in front (x^1 = x^0); EF21's own g_i^0 = C(grad f_i(x^0)) is exactly round 0.
"""

import numpy as np


# clip_tau(z) = min(1, tau/||z||) z, of Clip21 and Clip21-SGD2M; the form seen in a secondary source of the latter.
def clip(z, tau):
    norm = np.sqrt(np.sum(z * z))
    if norm <= tau:
        return z.copy()
    return z * (tau / norm)


# Smoothed normalisation Norm_alpha(z) = z / (alpha + ||z||) of alpha-NormEC (Shulgin et al. 2025); recalled.
def smooth_normalise(z, alpha):
    norm = np.sqrt(np.sum(z * z))
    if alpha + norm == 0.0:
        return np.zeros_like(z)
    return z / (alpha + norm)


# The top-k compressor of EF21: the k entries largest in magnitude; ties go to the lower index (ours).
def top_k(z, k):
    kept = np.argsort(-np.abs(z), kind="stable")[:k]
    out = np.zeros_like(z)
    for j in kept:
        out[j] = z[j]
    return out


# The server's plain step x - lr g (Clip21, Clip21-SGD2M, EF21).
def plain_server(lr):
    return lambda x, g: x - lr * g


# The server's step x + lr g, for updates that are deltas (y_i - x, or minus the gradient) and not gradients.
def delta_server(lr=1.0):
    return lambda x, g: x + lr * g


# alpha-NormEC's step x - gamma g/||g|| (from a secondary source); g = 0 leaves x where it is (ours).
def normalised_server(gamma):
    def step(x, g):
        norm = np.sqrt(np.sum(g * g))
        if norm == 0.0:
            return x.copy()
        return x - gamma * g / norm

    return step


def _weights(weights, n):
    if weights is None:
        return np.ones(n)
    return np.asarray(weights, dtype=float)


def _start(x0, n, v0):
    x = np.array(x0, dtype=float)
    v = np.zeros((n, x.size)) if v0 is None else np.array(v0, dtype=float)
    return x, v


def _mean_over_all(v, w):
    total = np.zeros(v.shape[1])
    for i in range(len(w)):
        total += w[i] * v[i]
    return total / np.sum(w)


# The frame of Clip21, alpha-NormEC and EF21: c_i = 0 outside S, g += mean over ALL N of c_i (EF21-PP, verified).
def _memory_method(x0, update, server, cohorts, n, message, weights, v0):
    w = _weights(weights, n)
    x, v = _start(x0, n, v0)
    g = _mean_over_all(v, w)
    xs, gs, vs = [x.copy()], [g.copy()], [v.copy()]
    for t, cohort in enumerate(cohorts):
        increment = np.zeros_like(x)
        for i in cohort:
            c = message(update(i, x, t) - v[i])
            v[i] = v[i] + c
            increment += w[i] * c
        g = g + increment / np.sum(w)
        x = server(x, g)
        xs.append(x.copy())
        gs.append(g.copy())
        vs.append(v.copy())
    return {"x": np.array(xs), "g": np.array(gs), "v": np.array(vs)}


# Clip21 (Khirirat et al. 2023), Algorithm 1: v_i += clip_tau(grad f_i - v_i). From a secondary source; rule for S as in EF21-PP.
def clip21(x0, update, server, cohorts, n, tau, weights=None, v0=None):
    """Clip21.

    Limiting cases:
    - tau = inf: v_i is client i's latest update, g the mean over all N of the latest ones (zeros, or v0, for a client
      not yet seen); equal to ef21 with k = d.
    - tau = inf and every cohort full: g = mean of this round's updates, i.e. plain FedSGD / FedAvg.
    - equal to clip21_sgd2m with beta = betahat = 1 for every tau, weights and cohorts (g0 = v0).
    - tau = 0, or all cohorts empty: g and v stay at their start; x repeats server(x, g), and stands still from zeros.
    - a fixed update u_i, full cohorts, v0 = 0: v_i = min(1, t tau/||u_i||) u_i after t rounds.
    """
    return _memory_method(x0, update, server, cohorts, n, lambda z: clip(z, tau), weights, v0)


# Clip21-SGD2M (Islamov et al. 2025). Form, zero start seen in secondary sources; a client out of S keeps u_i (ours).
def clip21_sgd2m(x0, update, server, cohorts, n, tau, beta, betahat, weights=None, v0=None, u0=None):
    """Clip21-SGD2M; `v` holds the paper's g_i, `u` [R+1, N, d] its momenta.

    Limiting cases:
    - beta = betahat = 1: clip21, for every tau, weights and cohorts.
    - tau = inf, betahat = 1: v_i = u_i; with full cohorts g is the mean of the clients' momenta, i.e. SGD with momentum
      on the mean: g <- (1-beta) g + beta mean(updates).
    - tau = inf, beta = 1: v_i <- (1-betahat) v_i + betahat update_i for sampled i: x, g, v as in the case above with
      beta := betahat (u0 = v0), for any cohorts.
    - tau = inf, beta = betahat = 1, full cohorts: plain FedSGD / FedAvg.
    - betahat = 0 (or tau = 0): g, v stay; u moves. All cohorts empty: u, v, g stay; x repeats server(x, g).
    """
    w = _weights(weights, n)
    x, v = _start(x0, n, v0)
    _, u = _start(x0, n, u0)
    g = _mean_over_all(v, w)
    xs, gs, vs, us = [x.copy()], [g.copy()], [v.copy()], [u.copy()]
    for t, cohort in enumerate(cohorts):
        increment = np.zeros_like(x)
        for i in cohort:
            u[i] = (1.0 - beta) * u[i] + beta * update(i, x, t)
            c = clip(u[i] - v[i], tau)
            v[i] = v[i] + betahat * c
            increment += w[i] * c
        g = g + betahat * increment / np.sum(w)
        x = server(x, g)
        xs.append(x.copy())
        gs.append(g.copy())
        vs.append(v.copy())
        us.append(u.copy())
    return {"x": np.array(xs), "g": np.array(gs), "v": np.array(vs), "u": np.array(us)}


# alpha-NormEC (Shulgin et al. 2025), no noise. From secondary sources, listing not read; the rule for S as in EF21-PP.
def normec(x0, update, server, cohorts, n, alpha, beta, weights=None, v0=None):
    """alpha-NormEC.

    Limiting cases:
    - every message is shorter than beta: ||v_i[t+1] - v_i[t]|| < beta (= beta for alpha = 0 and u != 0).
    - beta = alpha -> inf: the message tends to u itself, so clip21 with tau = inf (error of order ||u||^2/alpha).
    - alpha = 0, beta = tau: the message clip21 sends whenever ||u|| >= tau (clip21 sends u when it is shorter).
    - beta = 0, or all cohorts empty: g and v stay at their start; x repeats server(x, g), and stands still from zeros
      with either server.
    - normalised_server(gamma): ||x[t+1] - x[t]|| = gamma whenever g != 0.
    """
    return _memory_method(x0, update, server, cohorts, n, lambda z: beta * smooth_normalise(z, alpha), weights, v0)


# EF21 (Richtarik et al. 2021); EF21-PP, Algorithm 4 of Fatkhullin et al. 2021: verified in its text (eq. 7, Table 2).
def ef21(x0, update, server, cohorts, n, k, weights=None, v0=None):
    """EF21 with top-k (full cohorts) and EF21-PP (any cohorts).

    Limiting cases:
    - k = d: v_i is the latest update; equal to clip21 with tau = inf. With full cohorts: plain FedSGD / FedAvg.
    - k = 0, or all cohorts empty: g and v stay at their start; x repeats server(x, g), and stands still from zeros.
    - v0 = 0 and full cohorts: after round 0, v_i = top_k(update_i, k), EF21's own start.
    - a fixed update, client i sampled ceil(d/k) times: v_i equals the update.
    """
    return _memory_method(x0, update, server, cohorts, n, lambda z: top_k(z, k), weights, v0)
