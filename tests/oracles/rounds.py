"""NumPy oracle of federated methods with local training: EPISODE(++), FedAdagrad/Yogi/Adam, Mime(Lite), SCAFFOLD,
FedDyn, FedNova.

gradient(i, x, step, round) is client i's stochastic gradient; step = 0 .. steps[i]-1 inside the local training, FULL
for the gradient taken at the round's start, round = INITIAL for what happens before round 0. N = len(steps), all >= 1.
`weights` weigh the mean of the models (or deltas), `side_weights` the mean of the side messages (gradients, variates).
None is uniform, which is what the papers write for both (FedNova: p_i); side_weights = weights fits the weighted f.
An empty cohort leaves the whole state as it was, unless said otherwise (no paper defines it). Row 0 of each result is
the start, row t+1 the state after round t; arrays [R, ...] are what round t used.
"""

import numpy as np

FULL, INITIAL = -1, -1


def _begin(x0, steps, weights, side_weights=None):
    n = len(steps)
    w, sw = (np.ones(n) if z is None else np.asarray(z, dtype=float) for z in (weights, side_weights))
    return n, np.array(x0, dtype=float), w, sw, {}


def _mean(vectors, ids, w):
    """sum_i w_i vectors[i] / sum_i w_i over i in ids; 0 when there are none."""
    total, mass = 0.0, 0.0
    for i in ids:
        total = total + w[i] * vectors[i]
        mass += w[i]
    return total / mass if mass > 0.0 else 0.0


def _save(log, **state):
    for name, value in state.items():
        log.setdefault(name, []).append(np.copy(value))


def _arrays(log):
    return {name: np.array(rows) for name, rows in log.items()}


def _local_sgd(i, x, gradient, steps, eta, t):
    y = x
    for k in range(steps[i]):
        y = y - eta * gradient(i, y, k, t)
    return y - x


# FedAvg (McMahan et al. 2017), the reference of the limiting cases: x += server_lr * mean_S (y_i - x). Recalled.
def fedavg(x0, gradient, cohorts, steps, eta, server_lr=1.0, weights=None):
    _, x, w, _, log = _begin(x0, steps, weights)
    _save(log, x=x)
    for t, cohort in enumerate(cohorts):
        x = x + server_lr * _mean({i: _local_sgd(i, x, gradient, steps, eta, t) for i in cohort}, cohort, w)
        _save(log, x=x)
    return _arrays(log)


def _episode_step(y, d, clipped, eta, gamma):
    if not clipped:
        return y - eta * d
    norm = np.linalg.norm(d)
    return y if norm == 0.0 else y - gamma * d / norm


# EPISODE, Algorithm 1 of Crawshaw, Bao, Liu 2023. Means seen in the authors' code, which clips at >=; here at >, as the paper.
def episode(x0, gradient, cohorts, steps, eta, gamma, weights=None, side_weights=None):
    """d = g(y) - G_i + G, one decision a round. `G` [R, d] (zeros in an empty round), `clipped` [R]. Limiting cases:
    - gamma = inf and either steps = 1, side_weights = weights, or cohorts of one client: FedAvg.
    - a clipped round of one client and one step: ||x[t+1] - x[t]|| = gamma. All cohorts empty: x constant.
    """
    _, x, w, sw, log = _begin(x0, steps, weights, side_weights)
    _save(log, x=x)
    for t, cohort in enumerate(cohorts):
        start = {i: gradient(i, x, FULL, t) for i in cohort}
        g_mean = np.zeros_like(x) + _mean(start, cohort, sw)
        clipped = bool(np.linalg.norm(g_mean) > gamma / eta)
        delta = {}
        for i in cohort:
            y = x.copy()
            for k in range(steps[i]):
                y = _episode_step(y, gradient(i, y, k, t) - start[i] + g_mean, clipped, eta, gamma)
            delta[i] = y - x
        x = x + _mean(delta, cohort, w)
        _save(log, x=x, G=g_mean, clipped=clipped)
    return _arrays(log)


# EPISODE++, Alg. 1 of Crawshaw, Bao, Liu (NeurIPS 2023). Seen in the authors' code, but for the test on ||G||.
def episode_plus(x0, gradient, cohorts, steps, eta, gamma, weights=None, side_weights=None, initial=None):
    """`G` [R+1, d], `Gi` [R+1, N, d], `clipped` [R]; `initial` [N, d] replaces G_i^0, ALL clients' at x_0. Limits:
    - G = sum_i w_i G_i / sum over ALL i, after every round.
    - gamma = inf: scaffold with server_lr = 1 and c0 = G_i^0 (option II's variate is the mean raw gradient exactly).
    - gamma = inf, N = 1: FedAvg. All cohorts empty: x, G, Gi constant.
    """
    n, x, w, sw, log = _begin(x0, steps, weights, side_weights)
    gi = np.zeros((n, x.size)) + (0.0 if initial is None else initial)
    for i in range(n if initial is None else 0):
        for k in range(steps[i]):
            gi[i] += gradient(i, x, k, INITIAL) / steps[i]
    g = _mean(gi, range(n), sw)
    _save(log, x=x, G=g, Gi=gi)
    for t, cohort in enumerate(cohorts):
        clipped = bool(np.linalg.norm(g) > gamma / eta)
        delta, change = {}, np.zeros_like(x)
        for i in cohort:
            y, raw = x.copy(), np.zeros_like(x)
            for k in range(steps[i]):
                grad = gradient(i, y, k, t)
                raw += grad / steps[i]
                y = _episode_step(y, grad - gi[i] + g, clipped, eta, gamma)
            delta[i] = y - x
            change += sw[i] * (raw - gi[i])
            gi[i] = raw
        x = x + _mean(delta, cohort, w)
        g = g + change / np.sum(sw)
        _save(log, x=x, G=g, Gi=gi, clipped=clipped)
    return _arrays(log)


# FedAdagrad / FedYogi / FedAdam, Algorithm 2 of Reddi et al. 2021. Formulas recalled; see NOTES.md.
def fedopt(kind, x0, gradient, cohorts, steps, eta_l, eta, tau, b1=0.9, b2=0.99, weights=None, v0=None, empty="skip"):
    """kind: "adagrad" (paper: b1 = 0), "yogi", "adam"; v0: tau^2; empty: "skip", or "zero" for D = 0. Limiting cases:
    - tau -> inf, v0 = tau^2, b1 = 0, eta = 2 tau server_lr (adam: and b2 = 1): FedAvg(server_lr).
    - b2 = 0: adam has v = D^2, yogi v + D^2 where v < D^2 (adagrad's rule) and v - D^2 where v > D^2.
    - adam, yogi with b2 = 1: v constant; adagrad ignores b2. All cohorts empty: x constant ("zero" too, as m = 0).
    """
    _, x, w, _, log = _begin(x0, steps, weights)
    m, v = np.zeros_like(x), np.zeros_like(x) + (tau**2 if v0 is None else v0)
    _save(log, x=x, m=m, v=v)
    for t, cohort in enumerate(cohorts):
        if len(cohort) > 0 or empty == "zero":
            d = _mean({i: _local_sgd(i, x, gradient, steps, eta_l, t) for i in cohort}, cohort, w)
            m = b1 * m + (1.0 - b1) * d
            if kind == "adagrad":
                v = v + d**2
            elif kind == "yogi":
                v = v - (1.0 - b2) * d**2 * np.sign(v - d**2)
            else:
                v = b2 * v + (1.0 - b2) * d**2
            x = x + eta * m / (np.sqrt(v) + tau)
        _save(log, x=x, m=m, v=v)
    return _arrays(log)


# The base optimiser SGDm of Mime's table: U = V = (1-beta) g + beta s. Recalled; other codes write g + beta s.
def sgdm(beta):
    return (lambda g, s: (1.0 - beta) * g + beta * s), (lambda g, s: (1.0 - beta) * g + beta * s)


# Mime / MimeLite, Algorithm 1 of Karimireddy et al. 2020. Uniform means recalled; the structure seen in google/fedjax.
def mime(x0, gradient, cohorts, steps, eta, base, lite=False, server_lr=1.0, weights=None, side_weights=None, s0=None):
    """base = (U, V), e.g. sgdm(beta); gradient(i, x, FULL, t) is full-batch; `c` [R, d]. Limiting cases:
    - lite, beta = 0: FedAvg(server_lr). Not lite, beta = 0, noiseless, cohorts of one client: FedAvg too.
    - steps = 1, noiseless, side_weights = weights: both give x -= eta * server_lr * U(c, s), centralised SGDm on c.
    - noiseless, cohorts of one client: mime = mimelite. All cohorts empty: x and s constant.
    """
    _, x, w, sw, log = _begin(x0, steps, weights, side_weights)
    direction, track = base
    s = np.zeros_like(x) + (0.0 if s0 is None else s0)
    _save(log, x=x, s=s)
    for t, cohort in enumerate(cohorts):
        c = np.zeros_like(x) + _mean({i: gradient(i, x, FULL, t) for i in cohort}, cohort, sw)
        delta = {}
        for i in cohort:
            y = x.copy()
            for k in range(steps[i]):
                grad = gradient(i, y, k, t) if lite else gradient(i, y, k, t) - gradient(i, x, k, t) + c
                y = y - eta * direction(grad, s)
            delta[i] = y - x
        s = track(c, s) if len(cohort) > 0 else s
        x = x + server_lr * _mean(delta, cohort, w)
        _save(log, x=x, s=s, c=c)
    return _arrays(log)


# SCAFFOLD, Algorithm 1, option II, of Karimireddy et al. 2020. Recalled; c's rule seen in EPISODE++'s authors' code.
def scaffold(x0, gradient, cohorts, steps, eta, server_lr=1.0, weights=None, side_weights=None, c0=None):
    """`c` [R+1, d], `ci` [R+1, N, d]; c0 [N, d] are the clients' first variates, zeros by default. Limiting cases:
    - c = sum_i w_i c_i / sum over ALL i, after every round; c_i = the mean raw gradient of i's last round.
    - N = 1, or round 0 from zeros: FedAvg(server_lr). steps = 1, side_weights = weights, full cohorts: FedAvg.
    - episode_plus with gamma = inf when c0 = G_i^0, server_lr = 1. All cohorts empty: x, c, ci constant.
    """
    n, x, w, sw, log = _begin(x0, steps, weights, side_weights)
    ci = np.zeros((n, x.size)) + (0.0 if c0 is None else c0)
    c = _mean(ci, range(n), sw)
    _save(log, x=x, c=c, ci=ci)
    for t, cohort in enumerate(cohorts):
        delta, change = {}, np.zeros_like(x)
        for i in cohort:
            y = x.copy()
            for k in range(steps[i]):
                y = y - eta * (gradient(i, y, k, t) - ci[i] + c)
            new = ci[i] - c + (x - y) / (steps[i] * eta)
            delta[i] = y - x
            change += sw[i] * (new - ci[i])
            ci[i] = new
        x = x + server_lr * _mean(delta, cohort, w)
        c = c + change / np.sum(sw)
        _save(log, x=x, c=c, ci=ci)
    return _arrays(log)


# FedDyn, Algorithm 1 of Acar et al. 2021, the argmin by SGD steps. Means and `alphas` seen in the authors' code.
def feddyn(x0, gradient, cohorts, steps, eta, alpha, weights=None, side_weights=None, alphas=None):
    """`h` [R+1, d], `Gi` [R+1, N, d] the stored client gradients. Limiting cases:
    - alphas None: h = mean over ALL of G_i. alphas_i = alpha / (N w_i / sum w): a fixed point has sum w_i grad f_i = 0.
    - round 0, full cohort, weights = side_weights: x + 2 mean(y_i - x), the y_i of FedProx(alpha). Empty: all constant.
    """
    n, x, w, sw, log = _begin(x0, steps, weights, side_weights)
    a = np.full(n, float(alpha)) if alphas is None else np.asarray(alphas, dtype=float)
    gi, h = np.zeros((n, x.size)), np.zeros_like(x)
    _save(log, x=x, h=h, Gi=gi)
    for t, cohort in enumerate(cohorts):
        delta, change = {}, np.zeros_like(x)
        for i in cohort:
            y = x.copy()
            for k in range(steps[i]):
                y = y - eta * (gradient(i, y, k, t) - gi[i] + a[i] * (y - x))
            delta[i] = y - x
            gi[i] = gi[i] - a[i] * delta[i]
            change += sw[i] * delta[i]
        if len(cohort) > 0:
            h = h - alpha * change / np.sum(sw)
            x = x + _mean(delta, cohort, w) - h / alpha
        _save(log, x=x, h=h, Gi=gi)
    return _arrays(log)


# FedNova (Wang et al. 2020), d_i = (x-y_i)/(eta ||a_i||_1). Seen in the authors' code; p renormalised over S is ours.
def fednova(x0, gradient, cohorts, steps, eta, momentum=0.0, weights=None, tau_eff=None):
    """momentum: heavy ball from zero each round; tau_eff: a number in place of the sum; `tau` [R]. Limiting cases:
    - equal steps, tau_eff None, momentum = 0: FedAvg with the same weights. All cohorts empty: x constant.
    - a constant gradient g_i per client: x -= eta tau_eff sum p_i g_i, whatever the steps and the momentum.
    """
    _, x, w, _, log = _begin(x0, steps, weights)
    _save(log, x=x)
    for t, cohort in enumerate(cohorts):
        d, a_norm = {}, {}
        for i in cohort:
            y, b, last, a_norm[i] = x.copy(), np.zeros_like(x), 0.0, 0.0
            for k in range(steps[i]):
                b, last = momentum * b + gradient(i, y, k, t), momentum * last + 1.0
                y = y - eta * b
                a_norm[i] += last
            d[i] = (x - y) / (eta * a_norm[i])
        tau = _mean(a_norm, cohort, w) if tau_eff is None else tau_eff
        x = x - tau * eta * _mean(d, cohort, w)
        _save(log, x=x, tau=tau)
    return _arrays(log)
