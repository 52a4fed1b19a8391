"""Renyi curves of noise that clients add as integers, and what sampling the clients makes of any such curve.

A curve is ``(orders [k], sensitivity) -> epsilon [k]`` of one round: sensitivity 1 where a client's message is there or
zero, 2 where one message replaces another.
"""

import math
from collections.abc import Callable

import numpy as np

from fedjax_clip.typing import InvalidInput

Curve = Callable[[np.ndarray, float], np.ndarray]

ORDERS = np.array([*range(2, 129), 160, 192, 256, 512, 1024])


class TooNarrow(InvalidInput):
    """Noise of less than half a step, of which nothing is known."""


def discrete_gaussian(l2: float, l1: float, stddev: float, clients: int, dim: int) -> Curve:
    """The sum of ``clients`` discrete Gaussians in each of ``dim`` coordinates, which is nearly one.

    ``min(a/2 (D/s)^2 + tau d, a/2 ((D/s)^2 + 2 D1/s tau + tau^2 d), a/2 (D/s + tau sqrt(d))^2)`` with ``s^2 = clients
    stddev^2`` and ``tau = 10 sum_{k<clients} exp(-2 pi^2 stddev^2 k / (k + 1))``.

    Args:
      l2, l1: D and D1, one client's sensitivities in steps of the grid.
      stddev: of one client's noise, in steps; 1/2 or more.
      clients: whose noise is in the sum.
      dim: d.

    Source: Kairouz, Liu and Steinke (2021), Proposition 14.
    """
    k = np.arange(1, clients)
    tau = 10 * np.sum(np.exp(-2 * (math.pi * stddev) ** 2 * k / (k + 1)))
    total = stddev * math.sqrt(clients)

    def curve(orders: np.ndarray, sensitivity: float) -> np.ndarray:
        d2, d1 = sensitivity * l2 / total, sensitivity * l1 / total
        apart = orders / 2 * d2**2 + tau * dim
        crossed = orders / 2 * (d2**2 + 2 * d1 * tau + tau**2 * dim)
        return np.minimum(np.minimum(apart, crossed), orders / 2 * (d2 + tau * math.sqrt(dim)) ** 2)

    return curve


def skellam(l2: float, l1: float, variance: float) -> Curve:
    """Skellam noise: ``a D^2 / (2 mu) + min(((2a - 1) D^2 + 6 D1) / (4 mu^2), 3 D1 / (2 mu))`` at order a.

    Args:
      l2, l1: D and D1, one client's sensitivities in steps of the grid.
      variance: mu, of the sum's noise, in steps squared.

    Source: Agarwal, Kairouz and Liu (2021), Theorem 3.5.
    """

    def curve(orders: np.ndarray, sensitivity: float) -> np.ndarray:
        d2, d1 = (sensitivity * l2) ** 2, sensitivity * l1
        more = np.minimum(((2 * orders - 1) * d2 + 6 * d1) / (4 * variance**2), 3 * d1 / (2 * variance))
        return orders * d2 / (2 * variance) + more

    return curve


def gaussian(noise_multiplier: float) -> Curve:
    """``a / (2 z^2)``, of what the server adds beside the clients' noise.

    Args:
      noise_multiplier: z.
    """
    return lambda orders, sensitivity: orders * (sensitivity / noise_multiplier) ** 2 / 2


def poisson_sampled(curve: Curve, rate: float) -> np.ndarray:
    """``[len(ORDERS)]``: a round of which each client is part with this probability.

    Args:
      curve: of a round.
      rate: q, in (0, 1).

    Source: Zhu and Wang (2019), "Poisson Subsampled Renyi Differential Privacy", Theorem 5.
    """

    def log_terms(order: int) -> np.ndarray:
        j = np.arange(order + 1)
        terms = _log_binomials(order) + j * math.log(rate) + (order - j) * math.log1p(-rate)
        terms[2:] += (j[2:] - 1) * curve(j[2:], 1) + np.where(j[2:] > 2, math.log(3), 0)
        return terms

    return _capped(log_terms, curve(ORDERS, 1))


def fixed_size_sampled(curve: Curve, rate: float) -> np.ndarray:
    """``[len(ORDERS)]``: a round of a fixed number of clients, drawn without replacement; a client is replaced.

    Args:
      curve: of a round.
      rate: the fraction of the clients that take part, in (0, 1).

    Source: Wang, Balle and Kasiviswanathan (2019), "Subsampled Renyi Differential Privacy and Analytical Moments
    Accountant", Theorem 9.
    """

    def log_terms(order: int) -> np.ndarray:
        j = np.arange(2, order + 1)
        terms = _log_binomials(order)[2:] + j * math.log(rate) + (j - 1) * curve(j, 2) + math.log(2)
        second = curve(j[:1], 2)[0]
        if second < math.log(2):  # 4 (e^x - 1) < 2 e^x
            terms[0] += math.log(2) + math.log(-math.expm1(-second))
        return np.concatenate([[0.0], terms])

    return _capped(log_terms, curve(ORDERS, 2))


def _capped(log_terms: Callable[[int], np.ndarray], unsampled: np.ndarray) -> np.ndarray:
    sampled = [np.logaddexp.reduce(log_terms(order)) / (order - 1) for order in ORDERS.tolist()]
    return np.minimum(np.maximum(sampled, 0), unsampled)


def _log_binomials(order: int) -> np.ndarray:
    log_factorials = np.cumsum(np.log(np.maximum(np.arange(order + 1), 1)))
    return log_factorials[-1] - log_factorials - log_factorials[::-1]
