"""Scores of evaluated values: of a set, of each of its clients, and those that are not means, such as AUROC."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.population import FederatedData
from fedjax_clip.training.metric import Metric

Values: TypeAlias = dict[str, np.ndarray]  # of each example [N]: its loss and what the loss reports besides
Summary: TypeAlias = Callable[[Values, FederatedData], Mapping[str, float]]


def counted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The values, set to 0 where the weight is 0, so that a NaN of padding does not spread."""
    return np.where(weights > 0, values, 0)


def client_means(values: Values, data: FederatedData) -> Values:
    """The mean of each value over the examples of each client, ``{name: float64[M]}``, by example weights.

    Args:
      values: of every example, ``{name: [N]}``.
      data: the population that they are from.

    Example:
      >>> table = fc.FederatedData.from_clients({"ann": {"x": np.zeros(2)}, "bob": {"x": np.zeros(1)}})
      >>> client_means({"loss": np.array([1.0, 2.0, 5.0])}, table)["loss"].tolist()
      [1.5, 5.0]
    """
    weights = np.ones(data.num_examples) if data.weights is None else np.asarray(data.weights, np.float64)
    totals, means = np.add.reduceat(weights, data.offsets[:-1]), {}
    for name, x in values.items():
        sums = np.add.reduceat(counted(x.astype(np.float64), weights) * weights, data.offsets[:-1])
        means[name] = np.divide(sums, totals, out=np.full(len(sums), np.nan), where=totals > 0)
    return means


@dataclasses.dataclass(frozen=True)
class OverClients:
    """A summary that also compares clients: the mean over them, the worst client's, and the mean of the worst tenth.

    These are ``score_mean``, ``score_worst`` and ``score_worst_tenth``; a tenth of n clients is ``max(1, n // 10)``.
    A client without a score, such as the AUROC of one class, does not count. If no client has one, all are NaN.

    Attributes:
      summary: ``(values of every example {name: [N]}, set) -> {name: score}``, of a set, and of each client alone.
      scores: the scores to compare: of the summary, or means of values, such as ``"accuracy"``.
      each: whether ``score/client`` is given as well, for every client.

    Example:
      >>> def summary(values, data):
      ...   return {"largest_error": values["loss"].max()}
      >>> compared = fc.tasks.OverClients(summary, ("largest_error",))
      >>> table = fc.FederatedData.from_clients({"ann": {"x": np.zeros(2)}, "bob": {"x": np.zeros(1)}})
      >>> compared({"loss": np.array([1.0, 2.0, 5.0])}, table)
      {'largest_error': np.float64(5.0), 'largest_error_mean': 3.5, 'largest_error_worst': 5.0,
       'largest_error_worst_tenth': 5.0}
    """

    summary: Summary
    scores: tuple[str, ...]
    each: bool = False

    def __call__(self, values: Values, data: FederatedData) -> dict[str, float]:
        found = dict(self.summary(values, data))
        for score, of in self.of_clients(values, data).items():
            known = of[~np.isnan(of)] if not np.isnan(of).all() else of[:1]
            found |= {f"{score}/{data.name(c)}": float(x) for c, x in enumerate(of) if self.each}
            found[f"{score}_mean"] = float(known.mean())
            worst = known[np.argsort(-Metric(score).cost(known), kind="stable")]
            found[f"{score}_worst"] = float(worst[0])
            found[f"{score}_worst_tenth"] = float(worst[: max(1, len(worst) // 10)].mean())
        return found

    def of_clients(self, values: Values, data: FederatedData) -> Values:
        """The compared scores of each client alone, ``{score: float64[M]}``.

        Args:
          values: of every example, ``{name: [N]}``.
          data: the population that they are from.
        """
        found, own = client_means(values, data), []
        for c, (start, stop) in enumerate(itertools.pairwise(data.offsets)):
            own.append(self.summary({name: x[start:stop] for name, x in values.items()}, data.select([c])))
        found |= {score: np.array([of[score] for of in own], np.float64) for score in own[0]}
        if missing := [score for score in self.scores if score not in found]:
            raise InvalidInput(f"OverClients compares {missing[0]!r}, which is no score; there is {', '.join(found)}.")
        return {score: found[score] for score in self.scores}


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive example scores above a negative one, ties counting half.

    From ranks: ``(sum of the positives' ranks - P (P + 1) / 2) / (P N)``.

    Args:
      scores: ``[n]``, larger where positive is likelier.
      labels: ``[n]`` of 0 and 1.

    Returns:
      Between 0 and 1; NaN where one of the classes is missing, or a score is NaN.

    Example:
      >>> auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
      0.75

    Source: Hanley and McNeil (1982), "The Meaning and Use of the Area under a ROC Curve".
    """
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True, equal_nan=False)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]  # ties share the mean of their ranks
    positive = np.asarray(labels).astype(bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative or np.isnan(scores).any():
        return float("nan")
    above = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of predicted probabilities: ``sum_b n_b / n |mean label - mean probability|``.

    Over ``bins`` equal bins of the probability. With few examples it is far from 0 by chance.

    Args:
      probabilities: ``[n]`` of the positive class.
      labels: ``[n]`` of 0 and 1.
      bins: number of bins.

    Returns:
      Between 0 and 1; NaN where a probability is NaN.

    Example:
      >>> calibration_error(np.array([0.25, 0.25, 0.25, 0.25]), np.array([0, 0, 0, 1]))
      0.0

    Source: Naeini, Cooper and Hauskrecht (2015), "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
    """
    # scikit-learn has the curve of such bins, without the counts that weigh them, and is no dependency of the library.
    if np.isnan(probabilities).any():
        return float("nan")
    bin = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    gap = np.bincount(bin, np.asarray(labels, np.float64) - probabilities, bins)
    return float(np.abs(gap).sum() / len(bin))
