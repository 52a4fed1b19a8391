"""Accounting of noise that clients add as integers."""

import math

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.tree import size
from fedjax_clip.core.types import InvalidInput, Params
from fedjax_clip.privacy import renyi
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink import Noise, Uplink


def distributed(uplink: Uplink, params: Params, reducer: Reducer, colluding: int = 0) -> renyi.Curve:
    """The privacy loss of a round of ``fc.uplink.discrete_gaussian`` or ``skellam``, as an argument of ``epsilon``.

    The neighbouring relation is zero-out: one client's messages are those of a zero update, with noise. A round is
    counted with the noise of t clients, the fewest whose sum is ever opened. k clients who collude with the server know
    their own noise and subtract it. The noise of t - k clients remains, ``sqrt((t - k) / t)`` of it.

    The server of a secure sum knows who takes part. Under ``poisson`` and ``uniform`` the only gain from sampling is
    therefore that rounds without a client cost it nothing (``fc.privacy.renyi.in_sight``).

    Args:
      uplink: a chain that ends on a grid with noise.
      params: of the model; only the number of elements matters.
      reducer: ``fc.reduce.modular_sum(...)``, with its threshold t.
      colluding: k, the clients of a round that collude with the server; below t. Against a server that also lies, the
        protocol needs ``2 t > n + k`` (``fc.secure``).

    Raises:
      InvalidInput: no noise on a grid; discrete Gaussian noise under half a step, for which no bound is known; at least
        as many colluding clients as the threshold.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.5), fc.uplink.skellam(1.0))
      >>> curve = fc.privacy.distributed(uplink, params, fc.reduce.modular_sum(50), colluding=5)
      >>> fc.privacy.epsilon(curve, fc.data.sampling.round_robin(50), num_clients=10_000, rounds=1000, delta=1e-5)

    Source: Kairouz, Liu and Steinke (2021), Proposition 14; Agarwal, Kairouz and Liu (2021), Theorem 3.5.
    """
    promises = uplink.promises
    if promises.grid is None or promises.noise is not Noise.SHARES or reducer.threshold is None:
        raise InvalidInput(
            "No noise on a grid: let the uplink end on discrete_gaussian(z) or skellam(z), under a modular sum."
        )
    colluding = checks.count("colluding", colluding, 0)
    if colluding >= reducer.threshold:
        raise InvalidInput(
            f"With {colluding} colluding clients and a threshold of {reducer.threshold}, a sum may hold one other "
            "client's message, or none: give the modular sum a threshold above colluding."
        )
    grid = promises.grid(size(params), reducer.denominator, reducer.threshold)
    l2, l1, stddev = float(grid.l2), float(grid.l1), float(grid.stddev)
    honest = grid.clients - colluding
    if stddev == 0:
        return lambda orders, sensitivity: np.full(len(orders), math.inf)
    if grid.noise == "gaussian" and stddev < 0.5:
        raise renyi.TooNarrow(f"discrete_gaussian is {stddev:.2g} steps wide here, under 1/2: give the grid more bits.")
    if grid.noise == "gaussian":
        return renyi.discrete_gaussian(l2, l1, stddev, honest, grid.dim)
    return renyi.skellam(l2, l1, honest * stddev**2)
