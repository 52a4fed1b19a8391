"""Tuning: every rule has the same number of trials, on runs that it is not measured on."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats

Point = Mapping[str, float]
EDGE = 0.05  # of a range's length: a knob nearer to an end is reported as standing at it


@dataclasses.dataclass(frozen=True)
class Range:
    """The range in which a knob is searched.

    Attributes:
      low, high: both ends.
      log: whether the search is uniform in the logarithm.
    """

    low: float
    high: float
    log: bool = True

    def at(self, unit: float) -> float:
        """The value at a place from 0 to 1, in four digits, so that a report shows exactly what was run."""
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = ends[0] + unit * (ends[1] - ends[0])
        return float(f"{math.exp(value) if self.log else value:.4g}")

    def place(self, value: float) -> float:
        """The inverse of ``at``."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def end(self, value: float) -> str:
        """``"low"`` or ``"high"`` if the value stands at that end, else nothing."""
        place = self.place(value)
        return "low" if place < EDGE else "high" if place > 1 - EDGE else ""


def search(
    space: Mapping[str, Range], trials: int, evaluate: Callable[[Sequence[Point]], np.ndarray]
) -> tuple[list[Point], np.ndarray]:
    """Tries points of a space in two stages: half of them everywhere, half around the best.

    Both stages are a Halton sequence. The first fills the space. The second fills a box around the first one's best
    point whose sides are twice ``n ** (-1 / knobs)``, the mean distance between the n points of the first stage, and
    which lies inside of the space.

    Args:
      space: range of each knob.
      trials: an even number of points.
      evaluate: ``points -> costs [n]``, the lower the better, NaN or infinite for a failure. Called twice.

    Returns:
      ``(points, costs)``, in the order of the trials.

    Source: Halton (1960), "On the efficiency of certain quasi-random sequences of points".
    """
    half = trials // 2
    places = scipy.stats.qmc.Halton(len(space), scramble=False).random(2 * half + 1)[1:]  # its first point is a corner

    def points(units: np.ndarray) -> list[Point]:
        return [{k: r.at(u) for (k, r), u in zip(space.items(), unit, strict=True)} for unit in units]

    coarse = points(places[:half])
    costs = np.asarray(evaluate(coarse))
    side = min(1.0, 2 * half ** (-1 / len(space)))
    centre = places[best(costs)]
    fine = points(np.clip(centre - side / 2, 0, 1 - side) + side * places[half:])
    return coarse + fine, np.concatenate([costs, evaluate(fine)])


def best(costs: np.ndarray) -> int:
    """The first trial of least cost; failures cost most."""
    return int(np.argmin(np.where(np.isfinite(costs), costs, np.inf)))
