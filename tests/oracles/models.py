"""Models: the loss of one example, and its gradient worked out by hand."""

import numpy as np
from oracles.trees import add, as64, scale, zeros_like


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
