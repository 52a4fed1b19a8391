"""Scores that distinguish replays with and without a canary, and the bounds on epsilon that follow."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fedjax_clip.privacy.canaries import Seen

SCORES = 4  # number of attacks in ``scores``
FIT = 1 / 3  # share of the replays to which a score is fitted
CHOOSE = 1 / 4  # share of the canaries of one run that choose the threshold
GUESSED = 1 / 5  # share of the others that the f-DP bound guesses to be present
MOST = 4000  # the most canaries of one run: the bounds get slow for more


class Law(NamedTuple):
    """The claimed noise and neighbouring relation, for a likelihood ratio.

    Attributes:
      noise_multiplier: z, of one round.
      strategy: ``[R, R]`` of the noise over the rounds; the identity if rounds are independent.
      opposed: whether another update replaces the canary where it is absent.
    """

    noise_multiplier: float
    strategy: np.ndarray
    opposed: bool


def likelihood_ratio(law: Law, seen: Seen, canary: int = 0) -> np.ndarray:
    """``[L]`` log likelihood ratio of present against absent, under the claimed law of the noise.

    ``(C u)'(C y)`` if its rounds u are known, else ``sum_t log(1 - q + q exp(...))``, since the attacker does not know
    the rounds in which it was drawn.

    Args:
      law: the claimed law.
      seen: the attacker's view of the replays.
      canary: its number.

    Source: Neyman and Pearson (1933); Nasr et al. (2021), "Adversary Instantiation", for the canary.
    """
    z, q = law.noise_multiplier, seen.chance[canary]
    noisy = seen.moved[:, canary] @ law.strategy.T
    if np.all((q == 0) | (q == 1)):
        return noisy @ (law.strategy @ q)
    spread = 1.4826 * np.median(np.abs(noisy - np.median(noisy)))  # z, in units of the canary's move
    y = noisy * (z / (spread or 1.0)) @ law.strategy
    norm = np.sum(law.strategy**2, axis=0)

    def mixed(sign: int) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.logaddexp(np.log(1 - q), np.log(q) + (sign * y - norm / 2) / z**2).sum(1)

    return mixed(1) - mixed(-1) if law.opposed else mixed(1)


def discriminant(features: np.ndarray, present: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """``[L]`` Fisher's linear discriminant, fitted to some replays: the likelihood ratio of any Gaussian noise.

    It uses no knowledge of the mechanism, so it finds gaps in the noise: a leaf without noise, noise that two rounds or
    two leaves share, rounds whose noise cancels.

    Args:
      features: ``[L, F]``.
      present, fit: bool ``[L]``: whether the canary is present, and whether to fit on the replay.
    """
    spread = np.std(features[fit], axis=0)
    x = (features - np.mean(features[fit], axis=0)) / np.where(spread > 0, spread, 1.0)
    means = [np.mean(x[fit & which], axis=0) for which in (present, ~present)]
    within = x[fit] - np.where(present[fit, None], *means)
    covariance = within.T @ within / len(within) + 1e-9 * np.eye(x.shape[1])
    return x @ np.linalg.solve(covariance, means[0] - means[1])


def exact_values(values: np.ndarray, present: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """``[L]`` evidence from numbers that recur to the last bit: zeros, constants, the few values of coarse noise.

    ``sum_i log(c1(v_i) / c0(v_i))`` with the counts of a value in fitted replays with and without the canary. Values
    that occur in none of them are ignored.

    Args:
      values: ``[L, F]``.
      present, fit: as for ``discriminant``.

    Source: Mironov (2012), "On Significance of the Least Significant Bits for Differential Privacy", for values that
    reveal the noise.
    """
    found, place = np.unique(values, return_inverse=True)
    place = place.reshape(values.shape)
    counts = [np.bincount(place[fit & which].ravel(), minlength=len(found)) + 0.5 for which in (present, ~present)]
    seen = counts[0] + counts[1] > 1
    evidence = np.where(seen, np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum()), 0.0)
    return evidence[place].sum(1)


def support(values: np.ndarray, present: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """``[L]`` count of numbers in ranges that only replays with the canary reached, less those only without it.

    Args:
      values, present, fit: as for ``exact_values``.
    """

    def outside(which: np.ndarray) -> np.ndarray:
        low, high = np.min(values[fit & which], axis=0), np.max(values[fit & which], axis=0)
        return np.sum((values < low) | (values > high), axis=1)

    return outside(~present) - outside(present)


def scores(seen: Seen, law: Law) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """``(name, score [K], present [K])`` of each attack on the first canary; a higher score means rather present.

    The K replays are those that were not used for fitting.
    """
    present, length = seen.present[:, 0], len(seen.present)
    fit = np.arange(length) < FIT * length
    yield "likelihood ratio", likelihood_ratio(law, seen), present
    updates = _finite(seen.updates)
    published = [_finite(x) for x in seen.published.values()]
    sizes = np.log(np.maximum(np.linalg.norm(updates, axis=-1), 1e-30))
    broken = np.sum(~np.isfinite(seen.updates), axis=(1, 2))[:, None]
    features = [updates.reshape(length, -1), sizes, broken, *published]
    yield "linear discriminant", discriminant(np.concatenate(features, axis=1), present, fit)[~fit], present[~fit]
    yield "support", support(updates.reshape(length, -1), present, fit)[~fit], present[~fit]
    exact = [exact_values(x.reshape(length, -1), present, fit) for x in (updates, *published)]
    yield "exact values", np.sum(exact, axis=0)[~fit], present[~fit]


def bound(score: np.ndarray, present: np.ndarray, significance: float, delta: float, seed: int) -> float:
    """Lower bound of epsilon at a delta, from independent replays, by jax-privacy.

    Args:
      score: ``[L]``.
      present: bool ``[L]``, a fair coin each.
      significance: probability that the bound fails.
      delta: of the guarantee.
      seed: of the split into halves: one half chooses the threshold, the other half gives the bound.

    Source: Clopper and Pearson (1934), as in Nasr et al. (2021).
    """
    from jax_privacy.auditing import CanaryScoreAuditor, Split

    auditor = CanaryScoreAuditor(score[present], score[~present])
    return float(auditor.epsilon_clopper_pearson(significance, delta, False, threshold_strategy=Split(seed=seed)))


def one_run(
    score: np.ndarray, present: np.ndarray, significance: float, delta: float, gaussian: bool, seed: int
) -> tuple[str, float]:
    """``(estimator, lower bound of epsilon)`` from several canaries in a run: scores are dependent, coins are not.

    Only the bound without f-DP makes no assumption, but it is empty unless delta is far below the significance.

    Args:
      score, present, significance, delta, seed: as for ``bound``; of all canaries in all runs.
      gaussian: whether the claim is a Gaussian mechanism, which the f-DP bound assumes.

    Source: Steinke, Nasr and Jagielski (2023), "Privacy Auditing with One (1) Training Run"; Mahloujifar, Melis and
    Chaudhuri (2024), "Auditing f-Differential Privacy in One Run".
    """
    from jax_privacy.auditing import CanaryScoreAuditor, Explicit, Split

    score, present = score[:MOST], present[:MOST]
    if not gaussian:
        auditor = CanaryScoreAuditor(score[present], score[~present])
        options = {"threshold_strategy": Split(CHOOSE, seed)}
        return "one run", float(auditor.epsilon_one_run(significance, delta, **options))
    chosen = np.arange(len(score)) < CHOOSE * len(score)
    threshold = Explicit(float(np.quantile(score[chosen], 1 - GUESSED)))
    auditor = CanaryScoreAuditor(score[~chosen & present], score[~chosen & ~present])
    return "one run, f-DP", float(auditor.epsilon_one_run_fdp(significance, delta, threshold_strategy=threshold))


def _finite(x: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.clip(np.asarray(x, np.float64), -1e18, 1e18), nan=1e18)
