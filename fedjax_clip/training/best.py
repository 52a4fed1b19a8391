"""The best model of a run, and when to stop since no better one comes."""

from typing import Any, NamedTuple

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput, Params, Row
from fedjax_clip.training import metric


class Best(NamedTuple):
    """Keeps the best model by a metric of the evaluation, and stops when none better has come for a while.

    A model is compared after each evaluation (``eval_every`` of ``fc.train``). Of equal values the first counts, and
    every number is better than NaN. The metric's name says whether higher is better, see
    ``fc.extend.metrics.higher_is_better``. Checkpoints hold the best model, too.

    Args:
      metric: its name in the rows, with or without ``eval/`` in front.
      patience: evaluations without a better value after which training stops; ``None`` never stops it.

    Example:
      >>> sets = {"examples": held_out}
      >>> result = fc.train(
      ...     *(algorithm, data, params), rounds=50, eval_every=1,
      ...     evaluate=fc.evaluator(per_example_loss, sets), best=fc.extend.Best("examples/loss", patience=3)
      ... )
      >>> bool(result.best.value <= min(row["eval/examples/loss"] for row in result.history))
      True

    Source: Prechelt (1998), "Early Stopping - But When?", criterion UP for the patience.
    """

    metric: str
    patience: int | None = None


class Kept(NamedTuple):
    """The best model so far.

    Attributes:
      params: its parameters.
      value: of the metric; NaN before the first evaluation.
      round: after which it was evaluated, from 1; 0 before the first evaluation.
      since: evaluations without a better one since then.

    Example:
      >>> result.best is None  # without fc.train(best=...)
      True
    """

    params: Params
    value: Any
    round: Any
    since: Any

    @property
    def found(self) -> bool:
        """Whether there has been an evaluation."""
        return int(self.round) > 0


def check(best: Any, evaluated: bool) -> None:
    """Refuses what is no ``Best``.

    Raises:
      InvalidInput: says what to give.
    """
    checks.kind("best", best, Best, 'an fc.extend.Best, such as fc.extend.Best("examples/accuracy", patience=5)')
    checks.kind("best: metric", best.metric, str, "the name of a metric")
    if best.patience is not None:
        checks.count("best: patience", best.patience)
    if not evaluated:
        raise InvalidInput(f"best compares models by {best.metric}, which is an evaluation's: give evaluate, too.")


def begin(params: Params) -> Kept:
    """Before the first evaluation."""
    return Kept(params, np.float64(np.nan), np.int64(0), np.int64(0))


def seen(best: Best, kept: Kept, row: Row, models: dict[str, Params]) -> Kept:
    """The best model after an evaluation.

    Args:
      best: the settings.
      kept: before the evaluation.
      row: with the evaluation's values.
      models: ``{name of a metric: the parameters that it is of}``.

    Raises:
      InvalidInput: no such metric.
    """
    by = metric.named(best.metric, models, "best")
    value = row[by.name]
    if kept.found and not by.better(value, float(kept.value)):
        return kept._replace(since=np.int64(kept.since + 1))
    return Kept(models[by.name], np.float64(value), np.int64(row["round"]), np.int64(0))


def enough(best: Best | None, kept: Any) -> bool:
    """Whether the patience is at its end."""
    return best is not None and best.patience is not None and int(kept.since) >= best.patience
