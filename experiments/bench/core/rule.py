"""A competitor on a track: an algorithm with knobs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

import fedjax_clip as fc
from experiments.bench.core.tuning import Point, Range
from fedjax_clip.core.types import PerExampleLoss

Build = Callable[[PerExampleLoss, Mapping[str, Any]], fc.extend.Algorithm]
RATE, STEP, SERVER = ("client_lr",), ("client_lr", "threshold"), ("client_lr", "threshold", "server_lr")
RATES = ("client_lr", "server_lr")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule, the knobs for its tuning, and its cost.

    Attributes:
      build: ``(loss, point) -> algorithm``; the point has a number for each knob, which may be traced.
      knobs: of ``client_lr``, ``threshold`` and ``server_lr`` those that the rule has.
      ranges: its own range of a knob, where the track's would mean nothing.
      fresh: batches that a client takes in a round before those of its local steps.
      passes: gradients on each batch of the local steps.
      note: what is clipped, and what the threshold is.
      fixed: numbers of a point that are no knobs; rules that differ in them alone share a program.
      points: if given, the rule is measured at all of these points, and not tuned.
    """

    build: Build
    knobs: tuple[str, ...] = STEP
    ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)
    fresh: int = 0
    passes: int = 1
    note: str = ""
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    points: Sequence[Point] = ()

    def space(self, ranges: Mapping[str, Range]) -> dict[str, Range]:
        """The knobs' ranges on a track."""
        return {knob: self.ranges.get(knob, ranges[knob]) for knob in self.knobs}

    def gradients(self, steps: int) -> int:
        """Gradients of one batch that a client computes in a round."""
        return self.fresh + self.passes * steps


PLAIN = Rule(lambda loss, point: fc.fedavg(loss, optax.sgd(point["client_lr"])), RATE, note="no clip")
