"""How rules compare on a track: scores, intervals and ranks."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from experiments.bench.core.problem import Track
from experiments.bench.core.rule import Rule
from experiments.bench.core.tuning import best

LEVEL = 0.05
QUARTERS = 4


@dataclasses.dataclass(frozen=True)
class Standing:
    """A rule's results on a track.

    Attributes:
      track, name, rule: the pair.
      entry: its line of the results.
    """

    track: Track
    name: str
    rule: Rule
    entry: Mapping[str, Any]

    @property
    def costs(self) -> np.ndarray:
        """``[S]`` of each measuring run, the lower the better: ``1 - accuracy``, or an error's logarithm."""
        return self.track.cost(np.array(next(iter(self.entry["measured"].values())), float))

    @property
    def diverged(self) -> int:
        """In how many of the measuring runs."""
        return sum(self.entry["diverged"])

    @property
    def score(self) -> float:
        """The mean accuracy, or the geometric mean of the errors; in the digits that are shown."""
        return math.nan if self.diverged else float(self.shown(self.costs.mean()))

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts by the score as it is shown; among equal scores the cheaper rule comes first."""
        if self.diverged:
            return (1, self.diverged, 0.0, 0.0, 0.0)
        gradients = self.rule.gradients(self.track.steps)
        return (0, 0, -self.score if self.track.accuracy else self.score, self.traffic("bytes_up"), gradients)

    def shown(self, cost: float) -> str:
        """The accuracy of a cost, in four decimals, or the error, in four digits."""
        return f"{1 - cost:.4f}" if self.track.accuracy else f"{math.exp(cost):.4g}"

    def value(self) -> str:
        """The score and its 95% interval over runs, Student's t on the costs."""
        if self.diverged:
            return f"diverged in {self.diverged} of {len(self.costs)}"
        if not self.track.accuracy and self.score <= self.track.resolution:
            return f"≤ {self.track.resolution:g}"
        _, low, high = interval(self.costs)
        ends = (high, low) if self.track.accuracy else (low, high)
        return f"{self.shown(self.costs.mean())} [{', '.join(map(self.shown, ends))}]"

    def other(self, name: str) -> float:
        """Mean of another measure."""
        return float(np.mean(np.array(self.entry["measured"][name], float)))

    def traffic(self, name: str) -> float:
        """Mean bytes of a client and round; of ``..._entropy``, where no code has a bound, those that travelled."""
        found = self.entry["traffic"]
        return float(np.mean(found.get(name, found.get(name.removesuffix("_entropy")))))

    def against(self, first: "Standing", comparisons: int) -> tuple[float, float, float]:
        """``cost - the first's``, run by run: mean and ends of its interval, corrected for so many comparisons.

        All rules train on the same cohorts, so the effect of a run on both cancels.
        """
        return interval(self.costs - first.costs, LEVEL / max(1, comparisons))

    def compared(self, first: "Standing", comparisons: int) -> str:
        """The difference of accuracies, or the ratio of errors, to the first, with its corrected interval."""
        if self is first or self.diverged:
            return "–"
        mean, low, high = self.against(first, comparisons)
        if self.track.accuracy:
            return f"{-mean:+.4f} [{-high:+.4f}, {-low:+.4f}]"
        return "×" + "{:.3g} [{:.3g}, {:.3g}]".format(*(math.exp(min(x, 700)) for x in (mean, low, high)))

    def equals(self, first: "Standing", comparisons: int) -> bool:
        """Whether that interval contains zero."""
        if self.diverged or first.diverged:
            return False
        _, low, high = self.against(first, comparisons)
        return low <= 0 <= high

    def ends(self) -> str:
        """Knobs whose best value stands at an end of their range."""
        space = self.rule.space(self.track.ranges)
        found = ((k, space[k].end(v)) for k, v in self.entry["best"].items())
        return ", ".join(f"{knob} {end}" for knob, end in found if end)

    def knob(self, name: str) -> str:
        """Its tuned value."""
        return f"{self.entry['best'][name]:.3g}" if name in self.entry["best"] else "–"

    def tried(self) -> tuple[int, int, int]:
        """``(failed, near, first)``: trials that failed; of the first stage those near the best trial, and its trials.

        Near: within 2% of accuracy, or a factor of two.
        """
        costs = np.array([t["cost"] for t in self.entry["trials"]], float)
        near = costs <= costs[best(costs)] + (0.02 if self.track.accuracy else math.log(2))
        half = len(costs) // 2
        return int(np.sum(~np.isfinite(costs))), int(np.sum(near[:half])), half

    def profile(self) -> list[tuple[float, float, float | None]]:
        """``(from, to, cost of the best trial there)`` for each quarter of the threshold's range."""
        if "threshold" not in self.rule.knobs:
            return []
        threshold = self.rule.space(self.track.ranges)["threshold"]
        found: list[float | None] = [None] * QUARTERS
        for trial in self.entry["trials"]:
            quarter = min(int(QUARTERS * threshold.place(trial["threshold"])), QUARTERS - 1)
            if trial["cost"] is not None:
                found[quarter] = min(trial["cost"], math.inf if found[quarter] is None else found[quarter])
        ends = [float(f"{threshold.at(i / QUARTERS):.2g}") for i in range(QUARTERS + 1)]
        return list(zip(ends[:-1], ends[1:], found, strict=True))


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[Any, Any, Any]:
    """Mean of ``[..., S]`` over S, and both ends of its interval ``1 - level`` of Student's t: infinite for S = 1."""
    count, centre = values.shape[-1], values.mean(axis=-1)
    if count < 2:
        return centre, centre - math.inf, centre + math.inf
    # Not t.interval, which is NaN if all values are equal.
    half = scipy.stats.t.ppf(1 - level / 2, count - 1) * values.std(axis=-1, ddof=1) / math.sqrt(count)
    return centre, centre - half, centre + half


def ranks(rows: Sequence[Standing]) -> list[str]:
    """``1, 2=, 2=, 4, –``: scores that are shown equal share a rank; a rule that diverged has none."""
    scores = [
        None if row.diverged else max(row.score, 0 if row.track.accuracy else row.track.resolution) for row in rows
    ]
    return ["–" if score is None else f"{scores.index(score) + 1}{'=' * (scores.count(score) > 1)}" for score in scores]
