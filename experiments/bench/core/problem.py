"""The problem that rules compete on, and the runs that they are tuned and measured on."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import fedjax_clip as fc
from experiments.bench.core.tuning import Range
from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput, Params, PerExampleLoss


@dataclasses.dataclass(frozen=True)
class Measure:
    """``mean of of(params, judged) over the last window rounds``, after each round's step.

    ``judged`` are the examples that the run is judged on; padded ones have the ``"weight"`` 0.
    """

    of: Callable[[Params, Any], Any]
    window: int = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """One training from which a score comes.

    Attributes:
      seed: of start, cohorts and noise.
      clients: ``[N]`` indices of the clients that train; ``None``: all.
      judged: examples that the measures see; ``None``: those of all clients.
    """

    seed: int
    clients: np.ndarray | None = None
    judged: Mapping[str, np.ndarray] | None = None


TUNING = tuple(Run(1000 + i) for i in range(4))
MEASURING = tuple(Run(i) for i in range(16))


@dataclasses.dataclass(frozen=True)
class Track:
    """A problem on which rules are compared.

    Attributes:
      name: in the report.
      data, loss: the clients and what they minimise.
      start: ``seed -> params``.
      measures: what is measured, by name; rules are ranked by the first.
      ranges: of ``client_lr``, ``threshold`` and ``server_lr``, for rules without a range of their own.
      rounds, cohort_size, work: of the training.
      accuracy: True: the measure is an accuracy, and rules are compared by differences. False: it is an error, and they
        are compared by ratios.
      resolution: errors below it count as equal.
      sampler: ``cohort_size -> sampler``.
      width: how many clients train side by side; all of them by default.
      tuning, measuring: the runs that knobs are chosen on, and those that are reported.
      trials: points of its knobs that each rule may try; an even number.
    """

    name: str
    data: fc.FederatedData
    loss: PerExampleLoss
    start: Callable[[int], Params]
    measures: Mapping[str, Measure]
    ranges: Mapping[str, Range]
    rounds: int
    cohort_size: int
    work: fc.extend.LocalWork
    accuracy: bool = False
    resolution: float = 1e-6
    sampler: Callable[[int], fc.data.sampling.Sampler] = fc.data.sampling.uniform
    width: int | None = None
    tuning: Sequence[Run] = TUNING
    measuring: Sequence[Run] = MEASURING
    trials: int = 128

    def quick(self) -> "Track":
        """The same on few rounds, seeds and trials."""
        rounds = min(self.rounds, 40)
        measures = {k: Measure(m.of, min(m.window, rounds // 4)) for k, m in self.measures.items()}
        tuning, measuring = self.tuning[:2], self.measuring[:2]
        return dataclasses.replace(self, rounds=rounds, measures=measures, trials=4, tuning=tuning, measuring=measuring)

    @property
    def measure(self) -> str:
        """What rules are ranked by."""
        return next(iter(self.measures))

    @property
    def steps(self) -> int:
        """Local steps of each client in a round."""
        assert isinstance(self.work.steps, int)
        return self.work.steps

    def cost(self, values: np.ndarray) -> np.ndarray:
        """What is averaged over runs, the lower the better: ``1 - accuracy``, or the logarithm of an error."""
        return 1 - values if self.accuracy else np.log(np.maximum(values, self.resolution))


def sized(tracks: Iterable[Track], trials: int | None, quick: bool = False) -> list[Track]:
    """The tracks with another number of trials, or with few rounds, seeds and trials.

    Args:
      tracks: problems.
      trials: points of its knobs that each rule may try; ``None``: as many as the track says.
      quick: few of all.

    Raises:
      InvalidInput: no even number of trials.
    """
    if trials is not None and checks.count("--trials", trials, 2) % 2:
        raise InvalidInput(
            f"--trials must be an even number of at least 2, not {trials}: they are tried in two stages."
        )
    chosen = [t if trials is None else dataclasses.replace(t, trials=trials) for t in tracks]
    return [t.quick() if quick else t for t in chosen]
