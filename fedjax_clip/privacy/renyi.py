"""Renyi curves of the integer noise that clients add, and their change by rounds without a given client.

A curve is ``(orders [k], sensitivity) -> epsilon [k]`` of one round. The sensitivity is 1 if a client's message is
replaced by zero, and 2 if it is replaced by another message.
"""

import math
from collections.abc import Callable

import numpy as np

from fedjax_clip.core.types import InvalidInput

Curve = Callable[[np.ndarray, float], np.ndarray]

ORDERS = np.array([*range(2, 129), 160, 192, 256, 512, 1024])


class TooNarrow(InvalidInput):
    """Noise of less than half a step, for which no bound is known."""


def discrete_gaussian(l2: float, l1: float, stddev: float, clients: int, dim: int) -> Curve:
    """The sum of ``clients`` discrete Gaussians in each of ``dim`` coordinates, which is nearly one.

    ``min(a/2 (D/s)^2 + tau d, a/2 ((D/s)^2 + 2 D1/s tau + tau^2 d), a/2 (D/s + tau sqrt(d))^2)`` with ``s^2 = clients
    stddev^2`` and ``tau = 10 sum_{k<clients} exp(-2 pi^2 stddev^2 k / (k + 1))``.

    Args:
      l2, l1: D and D1, one client's sensitivities in steps of the grid.
      stddev: of one client's noise, in steps; 1/2 or more.
      clients: number of clients whose noise is in the sum.
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
    """``a / (2 z^2)``, for the Gaussian noise that the server adds besides the clients' noise.

    Args:
      noise_multiplier: z.
    """
    return lambda orders, sensitivity: orders * (sensitivity / noise_multiplier) ** 2 / 2


def in_sight(curve: Curve, rate: float) -> np.ndarray:
    """``[len(ORDERS)]`` of a round in which each client takes part with this probability, visibly to the adversary.

    ``log(1 - q + q exp((a - 1) epsilon(a))) / (a - 1)``: participation has the same law in both neighbouring runs, so
    the moment is the mean over it, and 1 where the client is absent. Sampling hides no client from a server that it
    answers, nor from an adversary who sees the number of clients in a sum.

    Args:
      curve: of a round.
      rate: q, in (0, 1): cohort over clients.

    Source: Mironov (2017), "Renyi Differential Privacy", Definition 3, of the pair (who takes part, the sum).
    """
    exponent = (ORDERS - 1) * curve(ORDERS, 1)
    return np.logaddexp(math.log1p(-rate), math.log(rate) + exponent) / (ORDERS - 1)
