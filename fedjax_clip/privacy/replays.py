"""Accounting by simulation: epsilon of samplers whose privacy losses do not compose analytically.

The privacy loss of a run is drawn many times, from a fixed seed, with a client and without. An epsilon is accepted if
its estimated delta lies far enough below the required one. A wrong epsilon passes with probability ``FALSE`` at most
(Chernoff's bound for a mean of numbers between 0 and 1). Delta falls as epsilon grows, so this holds for the least
accepted epsilon, too.
"""

import functools
import math

import numpy as np
import scipy.special

FALSE = 1e-7
DRAWS = 400.0  # at least this over delta, so that about as many draws have a loss beyond epsilon
FEWEST = 2**18
MOST = 2**32  # random numbers at most; for a smaller delta, no amplification is claimed
AT_ONCE = 2**24


def balls_in_bins(strategy: np.ndarray | None, bins: int, z: float, rounds: int, delta: float) -> float:
    """Epsilon of ``fc.data.sampling.balls_in_bins``: the likelihood is a mean over a client's bins.

    Args:
      strategy: C, ``[R, R]``; the identity by default.
      bins: number of bins.
      z: noise multiplier.
      rounds: that count, of R.
      delta: of the guarantee.

    Source: Choquette-Choo et al. (2024), "Near Exact Privacy Amplification for Matrix Mechanisms".
    """
    means = np.zeros((bins, rounds))
    for own in range(min(bins, rounds)):
        if strategy is None:
            means[own, own::bins] = 1 / z
        else:
            means[own] = strategy[:rounds, own:rounds:bins].sum(axis=1) / z
    projected = np.asarray(np.linalg.qr(means.T, mode="r")).T  # [bins, bins], which determines the losses
    squares = np.sum(projected**2, axis=1) / 2
    count = max(FEWEST, math.ceil(DRAWS / delta))
    if count * projected.size > MOST:
        return math.inf
    rng = np.random.default_rng(0)

    def losses(there: bool) -> np.ndarray:
        found = []
        for start in range(0, count, size := max(1, AT_ONCE // projected.size)):
            few = min(size, count - start)
            seen = rng.standard_normal((few, projected.shape[1]))
            if there:
                seen += projected[rng.integers(0, len(projected), few)]
            ratios = seen @ projected.T - squares
            largest = ratios.max(axis=1)
            found.append(largest + np.log(np.mean(np.exp(ratios - largest[:, None]), axis=1)))
        return np.concatenate(found)

    return _least(losses(True), -losses(False), delta)


def b_min_sep(p: float, separation: int, column: np.ndarray, z: float, rounds: int, delta: float) -> float:
    """Epsilon of ``fc.data.sampling.b_min_sep``, by jax-privacy's losses.

    Args:
      p: probability with which a rested client takes part.
      separation: rounds between two of a client's.
      column: C's first column, no longer than ``separation``.
      z, rounds, delta: as for ``balls_in_bins``.
    """
    from jax_privacy.batch_selection import BMinSepSampling
    from jax_privacy.experimental.monte_carlo import sample_generation

    strategy = BMinSepSampling(sampling_prob=p, iterations=rounds, min_sep=separation)
    count = max(FEWEST, math.ceil(DRAWS / delta))
    if count * rounds > MOST / 4:  # a round of jax-privacy's takes longer than a draw of ours
        return math.inf
    rng = np.random.default_rng(0)

    def losses(there: bool) -> np.ndarray:
        size = max(1, AT_ONCE // rounds)
        draw = functools.partial(sample_generation.get_privacy_loss_sample, strategy, z, column, rng, there)
        with np.errstate(divide="ignore"):  # if p is 1
            return np.concatenate([draw(min(size, count - start))[0] for start in range(0, count, size)])

    return _least(losses(True), losses(False), delta)


def _least(with_client: np.ndarray, without: np.ndarray, delta: float) -> float:
    """The least epsilon, to 1e-4, whose delta both sets of draws confirm; infinite if there is none."""
    draws = [np.sort(x) for x in (with_client, without)]

    def sure(epsilon: float) -> bool:
        for losses in draws:
            beyond = losses[np.searchsorted(losses, epsilon) :]
            found = float(np.sum(-np.expm1(epsilon - beyond))) / len(losses)
            apart = scipy.special.rel_entr(found, delta) + scipy.special.rel_entr(1 - found, 1 - delta)
            if found >= delta or len(losses) * apart < math.log(2 / FALSE):
                return False
        return True

    if sure(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not sure(high):
        low, high = high, 2 * high
        if high > 1e6:
            return math.inf
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if sure(middle) else (middle, high)
    return high
