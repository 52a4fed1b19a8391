"""Clients whose losses are quadratics, on which the oracles of several papers are checked."""

import numpy as np


def family(centres, scales=1.0):
    """``(gradient, clean, loss)`` of ``f_i(x) = sum a_i (x - c_i)^2 / 2``; the first with a shift by step and round."""
    centres = np.asarray(centres)
    scales = np.broadcast_to(scales, centres.shape)

    def clean(i, x, step, t):
        return scales[i] * (x - centres[i])

    def gradient(i, x, step, t):
        return clean(i, x, step, t) + 0.05 * (step + 1) * np.sin(t + i + np.arange(centres.shape[1]))

    def loss(i, x, t):
        return np.sum(scales[i] * (x - centres[i]) ** 2) / 2.0

    return gradient, clean, loss


def close(a, b, **kw):
    np.testing.assert_allclose(a, b, **{"rtol": 1e-12, "atol": 1e-12, **kw})
