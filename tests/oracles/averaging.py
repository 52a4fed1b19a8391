"""Independent NumPy reference for federated averaging with clipping (float64, plain loops, no autodiff).

Written from the formulas alone, so that it can disagree with the library:
  * FedAvg / FedSGD: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    Algorithm 1;
  * server optimisers on the pseudo-gradient: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithms 1 and 2;
  * update clipping: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (flat clipping);
  * optimiser constants and the places of eps: those of optax 0.2.8.

Parameters, gradients and deltas are flat dicts {name: float64 array}.  A batch is (x, y, weights); weights None = ones.

Conventions where the formulas leave a choice:
  * an example of weight 0 does not exist: its row is never read, so a NaN there does no harm;
  * a batch of total weight 0 takes no step (no loss, no momentum, no weight decay);
  * a client of total weight 0 is neither counted nor dropped: it has no say under either weighting;
  * a clip fires when norm > c (or some |g_j| > value), strictly;
  * finiteness is judged on the delta as the client made it, before the update clip;
  * a round with no counted client has aggregate 0, and the server optimiser still steps on it (its momentum moves on),
    unless empty_round="skip"; its loss and fractions are 0/0 and reported as nan.
"""

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic on dicts of arrays
# ---------------------------------------------------------------------------------------------------------------------


def as64(tree):
    return {k: np.array(v, dtype=np.float64) for k, v in tree.items()}


def zeros_like(tree):
    return {k: np.zeros_like(v, dtype=np.float64) for k, v in tree.items()}


def full_like(tree, value):
    return {k: np.full_like(v, value, dtype=np.float64) for k, v in tree.items()}


def add(a, b):
    return {k: a[k] + b[k] for k in a}


def sub(a, b):
    return {k: a[k] - b[k] for k in a}


def scale(c, a):
    return {k: c * a[k] for k in a}


def global_norm(tree):
    return float(np.sqrt(sum(np.sum(v * v) for v in tree.values())))


def all_finite(tree):
    return all(np.all(np.isfinite(v)) for v in tree.values())


def clip_to_norm(tree, c):
    """(tree * min(1, c / ||tree||), whether it was shrunk)."""
    norm = global_norm(tree)
    if norm > c:
        return scale(c / norm, tree), True
    return tree, False


# ---------------------------------------------------------------------------------------------------------------------
# Models: the loss of one example, and its gradient worked out by hand
# ---------------------------------------------------------------------------------------------------------------------


class Model:
    """loss_one(params, x_i, y_i) -> float and grad_one(params, x_i, y_i) -> dict, summed over a batch one by one."""

    def __init__(self, name, loss_one, grad_one):
        self.name, self.loss_one, self.grad_one = name, loss_one, grad_one

    def losses(self, params, x, y):
        """[loss_1, ..., loss_B]."""
        params = as64(params)
        return np.array([self.loss_one(params, np.asarray(x[i], np.float64), y[i]) for i in range(len(x))])

    def sums(self, params, x, y, weights=None):
        """(sum_i w_i loss_i, sum_i w_i grad_i, sum_i w_i, number of examples with w_i > 0)."""
        params = as64(params)
        if weights is None:
            weights = np.ones(len(x))
        loss_sum, grad_sum, weight_sum, count = 0.0, zeros_like(params), 0.0, 0
        for i in range(len(x)):
            w_i = float(weights[i])
            if w_i == 0.0:
                continue
            x_i = np.asarray(x[i], np.float64)
            loss_sum += w_i * self.loss_one(params, x_i, y[i])
            grad_sum = add(grad_sum, scale(w_i, self.grad_one(params, x_i, y[i])))
            weight_sum += w_i
            count += 1
        return loss_sum, grad_sum, weight_sum, count

    def mean_loss(self, params, x, y, weights=None):
        """sum_i w_i loss_i / sum_i w_i."""
        loss_sum, _, weight_sum, _ = self.sums(params, x, y, weights)
        return loss_sum / weight_sum

    def grad(self, params, x, y, weights=None):
        """Gradient of sum_i w_i loss_i / sum_i w_i (zero when the weights sum to zero)."""
        _, grad_sum, weight_sum, _ = self.sums(params, x, y, weights)
        return scale(1.0 / weight_sum, grad_sum) if weight_sum else grad_sum


# Linear regression: loss = (x.w + b - y)^2 / 2.


def _linear_loss(p, x, y):
    r = x @ p["w"] + p["b"] - y
    return 0.5 * r * r


def _linear_grad(p, x, y):
    r = x @ p["w"] + p["b"] - y
    return {"w": r * x, "b": np.asarray(r)}


# Softmax regression: z = x W + b, loss = log sum_j exp(z_j) - z_y, dloss/dz = softmax(z) - onehot(y).


def _cross_entropy(z, y):
    top = np.max(z)
    return top + np.log(np.sum(np.exp(z - top))) - z[int(y)]


def _cross_entropy_grad(z, y):
    e = np.exp(z - np.max(z))
    dz = e / np.sum(e)
    dz[int(y)] -= 1.0
    return dz


def _softmax_loss(p, x, y):
    return _cross_entropy(x @ p["w"] + p["b"], y)


def _softmax_grad(p, x, y):
    dz = _cross_entropy_grad(x @ p["w"] + p["b"], y)
    return {"w": np.outer(x, dz), "b": dz}


# One hidden layer: a = x W1 + b1, h = max(a, 0), z = h W2 + b2, cross-entropy of z.  relu'(0) = 0.


def _mlp_loss(p, x, y):
    h = np.maximum(x @ p["w1"] + p["b1"], 0.0)
    return _cross_entropy(h @ p["w2"] + p["b2"], y)


def _mlp_grad(p, x, y):
    a = x @ p["w1"] + p["b1"]
    h = np.maximum(a, 0.0)
    dz = _cross_entropy_grad(h @ p["w2"] + p["b2"], y)
    da = (p["w2"] @ dz) * (a > 0.0)
    return {"w1": np.outer(x, da), "b1": da, "w2": np.outer(h, dz), "b2": dz}


linear = Model("linear", _linear_loss, _linear_grad)
softmax = Model("softmax", _softmax_loss, _softmax_grad)
mlp = Model("mlp", _mlp_loss, _mlp_grad)
MODELS = {"linear": linear, "softmax": softmax, "mlp": mlp}


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers.  Each object holds constants only: init(params) -> state; update(g, state, params) -> (u, state, fired).
# A tx is one such object or a list of them applied in order; x <- x + u.
# ---------------------------------------------------------------------------------------------------------------------


class clip_by_global_norm:
    """g * min(1, c / ||g||)."""

    def __init__(self, c):
        self.c = c

    def init(self, params):
        return None

    def update(self, g, state, params):
        u, fired = clip_to_norm(g, self.c)
        return u, state, fired


class clip:
    """Each entry of g into [-value, value]."""

    def __init__(self, value):
        self.value = value

    def init(self, params):
        return None

    def update(self, g, state, params):
        fired = any(bool(np.any(np.abs(v) > self.value)) for v in g.values())
        return {k: np.clip(v, -self.value, self.value) for k, v in g.items()}, state, fired


class add_decayed_weights:
    """g + wd * params."""

    def __init__(self, wd):
        self.wd = wd

    def init(self, params):
        return None

    def update(self, g, state, params):
        return add(g, scale(self.wd, params)), state, False


class sgd:
    """m = mu m + g; u = -lr m, or -lr (g + mu m) with nesterov."""

    def __init__(self, lr, momentum=0.0, nesterov=False):
        self.lr, self.mu, self.nesterov = lr, momentum or 0.0, nesterov

    def init(self, params):
        return zeros_like(params)

    def update(self, g, m, params):
        m = add(scale(self.mu, m), g)
        step = add(g, scale(self.mu, m)) if self.nesterov else m
        return scale(-self.lr, step), m, False


class adam:
    """m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; u = -lr m^ / (sqrt(v^) + eps), m^ = m/(1-b1^t), v^ = v/(1-b2^t)."""

    def __init__(self, lr, b1=0.9, b2=0.999, eps=1e-8):
        self.lr, self.b1, self.b2, self.eps = lr, b1, b2, eps

    def init(self, params):
        return 0, zeros_like(params), zeros_like(params)

    def update(self, g, state, params):
        t, m, v = state
        t, m, v, u = t + 1, dict(m), dict(v), {}
        for k in g:
            m[k] = self.b1 * m[k] + (1 - self.b1) * g[k]
            v[k] = self.b2 * v[k] + (1 - self.b2) * g[k] ** 2
            m_hat = m[k] / (1 - self.b1**t)
            v_hat = v[k] / (1 - self.b2**t)
            u[k] = -self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
        return u, (t, m, v), False


class yogi:
    """Adam with v = v - (1-b2) sign(v - g^2) g^2.  As in optax, m AND v start at 1e-6 and both are bias-corrected."""

    def __init__(self, lr, b1=0.9, b2=0.999, eps=1e-3, initial_accumulator_value=1e-6):
        self.lr, self.b1, self.b2, self.eps, self.initial = lr, b1, b2, eps, initial_accumulator_value

    def init(self, params):
        return 0, full_like(params, self.initial), full_like(params, self.initial)

    def update(self, g, state, params):
        t, m, v = state
        t, m, v, u = t + 1, dict(m), dict(v), {}
        for k in g:
            m[k] = self.b1 * m[k] + (1 - self.b1) * g[k]
            v[k] = v[k] - (1 - self.b2) * np.sign(v[k] - g[k] ** 2) * g[k] ** 2
            m_hat = m[k] / (1 - self.b1**t)
            v_hat = v[k] / (1 - self.b2**t)
            u[k] = -self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
        return u, (t, m, v), False


class rmsprop:
    """v = decay v + (1-decay) g^2; u = -lr g / sqrt(v + eps): optax's default has eps INSIDE the root, v_0 = 0."""

    def __init__(self, lr, decay=0.9, eps=1e-8):
        self.lr, self.decay, self.eps = lr, decay, eps

    def init(self, params):
        return zeros_like(params)

    def update(self, g, state, params):
        v, u = {}, {}
        for k in g:
            v[k] = self.decay * state[k] + (1 - self.decay) * g[k] ** 2
            u[k] = -self.lr * g[k] / np.sqrt(v[k] + self.eps)
        return u, v, False


class adagrad:
    """s = s + g^2, s_0 = initial_accumulator_value; u = -lr g / sqrt(s + eps) where s > 0, else 0."""

    def __init__(self, lr, initial_accumulator_value=0.1, eps=1e-7):
        self.lr, self.initial, self.eps = lr, initial_accumulator_value, eps

    def init(self, params):
        return full_like(params, self.initial)

    def update(self, g, state, params):
        s, u = {}, {}
        for k in g:
            s[k] = state[k] + g[k] ** 2
            u[k] = np.where(s[k] > 0, -self.lr * g[k] / np.sqrt(np.where(s[k] > 0, s[k] + self.eps, 1.0)), 0.0)
        return u, s, False


def _links(tx):
    return tx if isinstance(tx, (list, tuple)) else [tx]


def tx_init(tx, params):
    return [link.init(params) for link in _links(tx)]


def tx_update(tx, g, states, params):
    """Apply the chain in order; (u, states, whether any clip in it fired)."""
    new_states, any_fired = [], False
    for link, state in zip(_links(tx), states, strict=True):
        g, state, fired = link.update(g, state, params)
        new_states.append(state)
        any_fired = any_fired or fired
    return g, new_states, any_fired


# ---------------------------------------------------------------------------------------------------------------------
# Clients
# ---------------------------------------------------------------------------------------------------------------------


def _new_stats():
    return {"loss_sum": 0.0, "weight_sum": 0.0, "steps": 0, "clipped": 0, "examples": 0}


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def local_update(params, batches, model, tx):
    """ClientUpdate of Algorithm 1: one optimiser step per batch from x; (delta = y - x, stats)."""
    x = as64(params)
    y = as64(params)
    state = tx_init(tx, y)
    stats = _new_stats()
    for bx, by, bw in batches:
        loss_sum, grad_sum, weight_sum, count = model.sums(y, bx, by, bw)
        if weight_sum == 0.0:
            continue
        g = scale(1.0 / weight_sum, grad_sum)
        u, state, fired = tx_update(tx, g, state, y)
        y = add(y, u)
        stats["loss_sum"] += loss_sum
        stats["weight_sum"] += weight_sum
        stats["examples"] += count
        stats["steps"] += 1
        stats["clipped"] += int(fired)
    return sub(y, x), stats


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def fedsgd_update(params, batches, model, tx):
    """FedSGD (E = 1, B = infinity): the mean gradient of all the client's examples at x, then one optimiser step."""
    x = as64(params)
    stats = _new_stats()
    total = zeros_like(x)
    for bx, by, bw in batches:
        loss_sum, grad_sum, weight_sum, count = model.sums(x, bx, by, bw)
        total = add(total, grad_sum)
        stats["loss_sum"] += loss_sum
        stats["weight_sum"] += weight_sum
        stats["examples"] += count
    if stats["weight_sum"] == 0.0:
        return zeros_like(x), stats
    g = scale(1.0 / stats["weight_sum"], total)
    delta, _, fired = tx_update(tx, g, tx_init(tx, x), x)
    stats["steps"] = 1
    stats["clipped"] = int(fired)
    return delta, stats


CLIENT_UPDATES = {"fedavg": local_update, "fedsgd": fedsgd_update}


# ---------------------------------------------------------------------------------------------------------------------
# Server
# ---------------------------------------------------------------------------------------------------------------------


def _ratio(a, b):
    return a / b if b else float("nan")


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def aggregate(deltas, stats, weighting="examples", update_clip=None):
    """(aggregate, metrics): sum_i w_i clip(delta_i) / sum_i w_i over the clients whose delta is finite.

    weighting="examples": w_i = stats_i["weight_sum"] (over the batches given, so epochs repeat in it); "uniform": 1.
    """
    if weighting not in ("examples", "uniform"):
        raise ValueError(f"weighting {weighting!r}")
    total, total_weight = zeros_like(deltas[0]), 0.0
    sums = _new_stats()
    clients = dropped = clipped_updates = 0
    for delta, s in zip(deltas, stats, strict=True):
        if s["weight_sum"] == 0.0:
            continue
        if not all_finite(delta):
            dropped += 1
            continue
        if update_clip is not None:
            delta, fired = clip_to_norm(delta, update_clip)
            clipped_updates += int(fired)
        w = s["weight_sum"] if weighting == "examples" else 1.0
        total = add(total, scale(w, delta))
        total_weight += w
        clients += 1
        for k in sums:
            sums[k] += s[k]
    mean = scale(1.0 / total_weight, total) if total_weight else total
    metrics = {
        "loss": _ratio(sums["loss_sum"], sums["weight_sum"]),
        "examples": sums["examples"],
        "steps": sums["steps"],
        "clients": clients,
        "dropped": dropped,
        "update_norm": global_norm(mean),
        "clipped_steps": _ratio(sums["clipped"], sums["steps"]),
        "clipped_updates": _ratio(clipped_updates, clients),
    }
    return mean, metrics


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def fedavg_rounds(
    params,
    rounds_of_cohorts,
    model,
    client_tx_factory,
    server_tx,
    weighting="examples",
    update_clip=None,
    algorithm="fedavg",
    empty_round="step",
):
    """Algorithm 1's server loop with a server optimiser: (params, [metrics of each round]).

    rounds_of_cohorts[t][i] is the list of batches of the i-th client of round t.  client_tx_factory() gives the client
    chain, fresh for each client; the state of server_tx lives through all the rounds.
    """
    client_update = CLIENT_UPDATES[algorithm]
    if empty_round not in ("step", "skip"):
        raise ValueError(f"empty_round {empty_round!r}")
    x = as64(params)
    server_state = tx_init(server_tx, x)
    history = []
    for cohort in rounds_of_cohorts:
        deltas, stats = [zeros_like(x)], [_new_stats()]  # a weightless client, so that a cohort may be empty
        for batches in cohort:
            delta, s = client_update(x, batches, model, client_tx_factory())
            deltas.append(delta)
            stats.append(s)
        mean, metrics = aggregate(deltas, stats, weighting, update_clip)
        if metrics["clients"] > 0 or empty_round == "step":
            pseudo_gradient = scale(-1.0, mean)
            u, server_state, _ = tx_update(server_tx, pseudo_gradient, server_state, x)
            x = add(x, u)
        history.append(metrics)
    return x, history


# ---------------------------------------------------------------------------------------------------------------------
# Centralised references
# ---------------------------------------------------------------------------------------------------------------------


def pool(cohort):
    """All the batches of all the clients of a cohort as one (x, y, weights)."""
    batches = [b for client in cohort for b in client]
    xs = np.concatenate([np.asarray(x, np.float64) for x, _, _ in batches])
    ys = np.concatenate([np.asarray(y) for _, y, _ in batches])
    ws = np.concatenate([np.ones(len(x)) if w is None else np.asarray(w, np.float64) for x, _, w in batches])
    return xs, ys, ws


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def gradient_descent(params, x, y, model, lr, steps, clip=None, weights=None):
    """params after `steps` of params -= lr * g, g the gradient of the pooled mean loss, clipped to norm `clip`."""
    p = as64(params)
    for _ in range(steps):
        g = model.grad(p, x, y, weights)
        if clip is not None:
            g, _ = clip_to_norm(g, clip)
        p = sub(p, scale(lr, g))
    return p
