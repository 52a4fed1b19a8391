"""The metric that decides: which point of a sweep is best, which round's model is kept, when a run stops."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fedjax_clip.core.metrics import higher_is_better
from fedjax_clip.core.types import InvalidInput


class Metric(NamedTuple):
    """A score of the rows of a history, and which of two values is better.

    Attributes:
      name: as rows have it, such as ``"eval/examples/auroc_worst"``. It says whether higher is better, see
        ``fc.extend.metrics.higher_is_better``.

    Example:
      >>> Metric("eval/examples/auroc_worst").better(0.8, 0.7), Metric("eval/examples/loss").better(0.8, 0.7)
      (True, False)
      >>> Metric("eval/examples/auroc").better(0.5, float("nan"))  # any number is better than none
      True
    """

    name: str

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value is better."""
        return higher_is_better(self.name)

    def better(self, value: float, than: float) -> bool:
        """Whether a value is better than another; equal values are not, and every number is better than NaN."""
        return bool(self.cost(value) < self.cost(than))

    def cost(self, values: Any) -> np.ndarray:
        """The values ``[...]``, negated if higher is better, so that the least is best; infinite if not finite.

        Example:
          >>> Metric("auroc").cost([0.7, float("nan"), 0.8]).argmin()
          np.int64(2)
        """
        values = np.asarray(values, np.float64)
        return np.where(np.isfinite(values), -values if self.higher_is_better else values, np.inf)


def named(text: str, names: Iterable[str], flag: str = "--metric") -> Metric:
    """The metric of a flag.

    Args:
      text: its name, with or without ``eval/`` in front: ``"examples/auroc_worst"``.
      names: those that there are.
      flag: what the error names.

    Raises:
      InvalidInput: no such metric; the message lists those that exist.

    Example:
      >>> named("examples/loss", ["eval/examples/loss", "eval/clients/loss"]).name
      'eval/examples/loss'
    """
    known = list(names)
    for name in (text, f"eval/{text}"):
        if name in known:
            return Metric(name)
    there_is = ", ".join(name.removeprefix("eval/") for name in known) or "none, since nothing is held out"
    raise InvalidInput(f"{flag}={text} is not measured; there is {there_is}.")
