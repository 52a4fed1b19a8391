"""Optimisers in NumPy, with the constants of optax 0.2.8 and its places of eps.

Each object holds constants only: init(params) -> state; update(g, state, params) -> (u, state, fired).  A tx is one such
object or a list of them applied in order; x <- x + u.
"""

import numpy as np
from oracles.trees import add, clip_to_norm, full_like, scale, zeros_like


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
