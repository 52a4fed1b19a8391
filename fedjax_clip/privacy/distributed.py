"""What noise that clients add as integers costs a round."""

import math

import numpy as np

from fedjax_clip.privacy import renyi
from fedjax_clip.reduce import Reducer
from fedjax_clip.tree import size
from fedjax_clip.typing import InvalidInput, Params
from fedjax_clip.uplink import Noise, Uplink


def distributed(uplink: Uplink, params: Params, reducer: Reducer) -> renyi.Curve:
    """What a round of ``fc.uplink.discrete_gaussian`` or ``skellam`` costs, to hand to ``epsilon``.

    Neighbours are two runs in one of which a client's messages are those of a zero update (with noise), or those of
    another client where cohorts are drawn without replacement. A round is counted with the noise of the threshold's
    clients, the fewest that are ever added up. For who sees sums only: the amplification by sampling holds for those
    who are not told who took part, as the server is.

    Args:
      uplink: a chain that ends on a grid with noise.
      params: of the model; only their number matters.
      reducer: ``fc.reduce.modular_sum(...)``, with its threshold.

    Raises:
      InvalidInput: no noise on a grid; discrete Gaussian noise under half a step, which is no Gaussian any more.

    Example:
      >>> curve = fc.privacy.distributed(uplink, params, fc.reduce.modular_sum(50))
      >>> fc.privacy.epsilon(curve, fc.sampling.uniform(50), num_clients=10_000, rounds=1000, delta=1e-5)

    Source: Kairouz, Liu and Steinke (2021), Proposition 14; Agarwal, Kairouz and Liu (2021), Theorem 3.5; Zhu and Wang
    (2019), Theorem 5; Wang, Balle and Kasiviswanathan (2019), Theorem 9.
    """
    promises = uplink.promises
    if promises.grid is None or promises.noise is not Noise.SHARES or reducer.threshold is None:
        raise InvalidInput(
            "No noise on a grid: let the uplink end on discrete_gaussian(z) or skellam(z), under a modular sum."
        )
    grid = promises.grid(size(params), reducer.denominator, reducer.threshold)
    l2, l1, stddev = float(grid.l2), float(grid.l1), float(grid.stddev)
    if stddev == 0:
        return lambda orders, sensitivity: np.full(len(orders), math.inf)
    if grid.noise == "gaussian" and stddev < 0.5:
        raise renyi.TooNarrow(f"discrete_gaussian is {stddev:.2g} steps wide here, under 1/2: give the grid more bits.")
    if grid.noise == "gaussian":
        return renyi.discrete_gaussian(l2, l1, stddev, grid.clients, grid.dim)
    return renyi.skellam(l2, l1, grid.clients * stddev**2)
