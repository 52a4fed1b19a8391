"""An independent test oracle for private federated learning, in NumPy float64.

Written from the papers' formulas (and the brief that asked for it), without
reading the library under test.  Every function is pure: it changes none of its
arguments and returns new arrays.  Vectors are flat float64 arrays.  No function
draws noise: noise is handed in, already drawn.

SOURCES.  No paper's own page with its equations could be opened while this was
written, so each formula rests on what is named here:
  [A] Andrew, Thakkar, McMahan, Ramaswamy 2021 (arXiv 1905.03871), Algorithm 1:
      from memory, checked against TensorFlow Privacy's
      quantile_estimator_query.py (by the paper's authors' group).
  [H] He, Li, Yu et al. 2023 (arXiv 2212.01539), group-wise clipping: from memory;
      the two noise allocations were derived again by whitening (see noise_std).
  [J] Jhunjhunwala, Wang, Joshi 2023 (arXiv 2301.09604), eq. 7: from the brief,
      compared with the authors' main.py, WHICH DIFFERS in epsilon (see there).
  [T] Takakura, Liew, Hasegawa 2025 (arXiv 2504.09850), DP-FedEXP: the noised form
      here is the brief's; nothing of the paper beyond its abstract was seen.
  [K] Karimireddy et al. 2020 (arXiv 1910.06378), Algorithm 1, option II: from
      memory, checked against [N]'s authors' code.
  [N] Noble, Bellet, Dieuleveut 2022 (arXiv 2111.09278), DP-SCAFFOLD: compared with
      the authors' user_scaffold.py and server_scaffold.py.
  [I] Islamov et al. 2025 (arXiv 2502.11682), Clip21-SGD2M: from memory, checked
      against a third party's transcript of its Byzantine sequel (arXiv 2603.23472).
      The factor n/N for sampled clients is the brief's, not the paper's.
  [S] Shulgin, Khirirat, Richtarik 2025 (arXiv 2502.13482), alpha-NormEC: from
      memory and the brief only; see the docstring about the server's step.
  [B] Balle, Wang 2018 (arXiv 1805.06530), Theorem 8: from memory, checked against
      their reference code's formula and, below, against numerical integration.
"""

import math

import numpy as np
from scipy.stats import norm as _normal


def _vector(value):
    return np.array(value, dtype=np.float64)  # a copy


def clip(vector, bound):
    """vector * min(1, bound / ||vector||); bound None leaves it as it is."""
    vector = _vector(vector)
    size = np.linalg.norm(vector)
    if bound is None or size <= bound:
        return vector
    return vector * (bound / size)


# 1. Adaptive clipping, per group --------------------------------------------


def quantile_by_group(updates, bounds, target, rate, denominator, equal, bits_noise=None, mean_noise=None):
    """One round of [A] Algorithm 1 (geometric update), on each group apart ([H]).

    updates: list over clients of dict group -> vector; bounds: dict group -> C_k.
    bit_ik = 1 if ||u_ik|| <= C_k (before clipping), else 0.
      mean_k = (sum_i clip(u_ik, C_k)) / denominator + mean_noise_k
      equal:   mean_k = C_k * ((sum_i clip(u_ik, C_k) / C_k) / denominator + mean_noise_k)
      b_k    = mean of the bits over those who came           if bits_noise is None
             = 1/2 + (sum_i (bit_ik - 1/2) + bits_noise_k) / denominator      else
      C_k   <- C_k exp(-rate (b_k - target))
    bits_noise: dict group -> number; mean_noise: dict group -> vector (with `equal`
    in units of C_k, as it is added before the server multiplies).

    b_k is NOT limited to [0, 1]: [A] does not, TensorFlow Privacy does.
    Returns (dict group -> mean, dict group -> new bound).
    """
    means, new_bounds = {}, {}
    for k, c in bounds.items():
        scale = c if equal else 1.0
        total = sum(clip(u[k], c) / scale for u in updates)
        noise = 0.0 if mean_noise is None else _vector(mean_noise[k])
        means[k] = scale * (total / denominator + noise)

        bits = [1.0 if np.linalg.norm(_vector(u[k])) <= c else 0.0 for u in updates]
        if bits_noise is None:
            b = sum(bits) / len(bits)
        else:
            b = 0.5 + (sum(bit - 0.5 for bit in bits) + bits_noise[k]) / denominator
        new_bounds[k] = c * math.exp(-rate * (b - target))
    return means, new_bounds


def noise_std(bounds, z, denominator, equal):
    """dict group -> standard deviation, per coordinate, of the noise in mean_k ([H]).

    global: z sqrt(sum_j C_j^2) / n, the same in every group;
    equal:  z sqrt(K) C_k / n (each u_ik / C_k has norm <= 1, all K together <= sqrt(K)).
    Both give sum_k (C_k / (n std_k))^2 = 1 / z^2, that is multiplier z over all groups.
    """
    if equal:
        return {k: z * math.sqrt(len(bounds)) * c / denominator for k, c in bounds.items()}
    flat = math.sqrt(sum(c * c for c in bounds.values()))
    return dict.fromkeys(bounds, z * flat / denominator)


def bits_std(sigma, K):
    """sqrt(K) sigma: noise on each of the K sums of bits - 1/2 ([A], [H]).

    A client's K shifted bits have norm sqrt(K)/2, so the multiplier of all of them
    is sqrt(K) sigma / (sqrt(K)/2) = 2 sigma, as for one group in [A].
    """
    return math.sqrt(K) * sigma


# 2. FedExP --------------------------------------------------------------------


def fedexp_step(updates, denominator=None, epsilon=1e-3, mean_noise=0, squares_noise=0.0):
    """[J] eq. 7, and its noised form after DP-FedEXP [T] (as the brief states it).

      mean    = (sum_i u_i) / n + mean_noise
      squares = (sum_i ||u_i||^2 + squares_noise) / n
      eta     = max(1, squares / (2 (||mean||^2 + epsilon)))
    n = denominator, or the number M of clients that came; with no noise and n = M
    this is max(1, sum ||u_i||^2 / (2 M (||mean||^2 + epsilon))).

    The authors' main.py adds M * epsilon, not epsilon, to ||mean||^2 (and lets
    epsilon decay with the client's step size).  Eq. 7 as briefed is used here.
    Returns (eta * mean, eta); the server adds the first to its model.
    """
    updates = [_vector(u) for u in updates]
    n = len(updates) if denominator is None else denominator
    mean = sum(updates) / n + mean_noise
    squares = (sum(float(u @ u) for u in updates) + squares_noise) / n
    eta = max(1.0, squares / (2.0 * (float(mean @ mean) + epsilon)))
    return eta * mean, eta


# 3. SCAFFOLD and DP-SCAFFOLD ----------------------------------------------------


def dp_scaffold_round(
    x,
    c,
    c_clients,
    gradients,
    lr,
    server_lr,
    num_clients,
    clip_update=None,
    clip_change=None,
    denominator=None,
    update_noise=0,
    change_noise=0,
):
    """[K] Algorithm 1 with option II, for SGD with a constant local rate.

    c_clients: dict client -> c_i, of all clients; gradients: dict sampled client ->
    list of functions y -> gradient, one for each local step.
      client: y <- x;  y <- y - lr (g(y) - c_i + c) at each step
              update = y - x;  c_i+ = mean of the gradients used;  change = c_i+ - c_i
              sends clip(update, clip_update), clip(change, clip_change); keeps c_i+
      server: x <- x + server_lr ((sum updates) / n + update_noise)
              c <- c + (n / num_clients) ((sum changes) / n + change_noise)
    n = denominator or |S|.  Option II's c_i - c + (x - y) / (steps lr) IS the mean of
    the gradients here.  For DP-SCAFFOLD [N] the gradients passed are the noised ones
    ([N] sets no clips here: it clips per example before noising).

    The client keeps the UNclipped c_i+ (brief: clipped "before they are sent"); the
    paper says nothing on this, and when a change is clipped c is no longer mean(c_i).
    Returns (x, c, c_clients).
    """
    x, c = _vector(x), _vector(c)
    n = len(gradients) if denominator is None else denominator
    new_clients = {i: _vector(ci) for i, ci in c_clients.items()}
    updates, changes = np.zeros_like(x), np.zeros_like(x)
    for i, steps in gradients.items():
        c_i, y, used = _vector(c_clients[i]), x.copy(), []
        for gradient in steps:
            g = _vector(gradient(y.copy()))
            used.append(g)
            y = y - lr * (g - c_i + c)
        new_clients[i] = sum(used) / len(used)
        updates += clip(y - x, clip_update)
        changes += clip(new_clients[i] - c_i, clip_change)
    x = x + server_lr * (updates / n + update_noise)
    c = c + (n / num_clients) * (changes / n + change_noise)
    return x, c, new_clients


# 4. Error feedback with clipping or smoothed normalization ----------------------


def dp_clip21_sgd2m_round(x, g, u, v, gradients, tau, beta, beta_hat, lr, num_clients, denominator, noise=0):
    """[I] Clip21-SGD2M with noise, with sampled clients (n/N: the brief's).

    gradients: dict sampled client -> function x -> gradient; u, v: dict client ->
    vector, of all clients (the paper's v_i, the momentum, and g_i, the shift).
      client: u_i <- (1 - beta) u_i + beta grad_i(x)
              c_i  = clip_tau(u_i - v_i);  v_i <- v_i + beta_hat c_i   (without noise)
      server: m = (sum_i c_i) / n + noise
              g <- g + beta_hat (n / num_clients) m;  x <- x - lr g
    n = denominator (None: those who came).  The paper starts its loop with the step
    of x; the sequence is the same, one round shifted.  Its noise is each client's
    own; `noise` is then the mean of those.  With noise 0 and g = mean of v over all
    clients at the start, this stays so, whatever n.
    Returns (x, g, u, v).
    """
    x, g = _vector(x), _vector(g)
    n = len(gradients) if denominator is None else denominator
    u = {i: _vector(w) for i, w in u.items()}
    v = {i: _vector(w) for i, w in v.items()}
    total = np.zeros_like(x)
    for i, gradient in gradients.items():
        u[i] = (1.0 - beta) * u[i] + beta * _vector(gradient(x.copy()))
        c_i = clip(u[i] - v[i], tau)
        v[i] = v[i] + beta_hat * c_i
        total += c_i
    m = total / n + noise
    g = g + beta_hat * (n / num_clients) * m
    x = x - lr * g
    return x, g, u, v


def dp_alpha_normec_round(x, g, v, gradients, alpha, beta, lr, num_clients, denominator, noise=0, normalize=False):
    """[S] alpha-NormEC with noise, with sampled clients (n/N: the brief's).

      client: d = grad_i(x) - v_i;  c_i = beta d / (alpha + ||d||);  v_i <- v_i + c_i
      server: m = (sum_i c_i) / n + noise;  g <- g + (n / num_clients) m
              x <- x - lr g             (normalize: x <- x - lr g / ||g||)
    beta is inside c_i, so ||c_i|| < beta and `noise` is not multiplied by beta; the
    paper's beta multiplies normalized difference and noise alike: its z is noise / beta.
    From memory, NOT verified: the paper's server steps along g / ||g||; the brief's
    plain step is the default here and `normalize` gives the other.
    Returns (x, g, v).
    """
    x, g = _vector(x), _vector(g)
    n = len(gradients) if denominator is None else denominator
    v = {i: _vector(w) for i, w in v.items()}
    total = np.zeros_like(x)
    for i, gradient in gradients.items():
        d = _vector(gradient(x.copy())) - v[i]
        c_i = beta * d / (alpha + np.linalg.norm(d))
        v[i] = v[i] + c_i
        total += c_i
    m = total / n + noise
    g = g + (n / num_clients) * m
    size = np.linalg.norm(g)
    x = x - lr * (g / size if normalize and size > 0 else g)
    return x, g, v


# 5. Epsilons by hand ------------------------------------------------------------


def gaussian_delta(z, epsilon):
    """[B] Theorem 8 at sensitivity 1, noise z: the exact delta(epsilon)."""
    a, b = 1.0 / (2.0 * z), epsilon * z
    return float(_normal.cdf(a - b) - math.exp(epsilon + _normal.logcdf(-a - b)))


def gaussian_epsilon(z, rounds, delta):
    """Exact epsilon of `rounds` Gaussian mechanisms of multiplier z, no subsampling.

    Together they are one Gaussian of multiplier z / sqrt(rounds); epsilon solves
    [B]'s delta(epsilon) = Phi(1/(2z) - eps z) - e^eps Phi(-1/(2z) - eps z) = delta
    by bisection; 0 if delta(0) <= delta already.
    """
    z = z / math.sqrt(rounds)
    if gaussian_delta(z, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(z, high) > delta:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        if gaussian_delta(z, middle) > delta:
            low = middle
        else:
            high = middle
    return high


def two_mechanisms(z1, z2):
    """(z1^-2 + z2^-2)^(-1/2): the multiplier of two Gaussian mechanisms at once.

    [A] Theorem 1: with z2 = 2 sigma_b for the bits and z1 = z_Delta this is z.
    """
    return (z1**-2 + z2**-2) ** -0.5
