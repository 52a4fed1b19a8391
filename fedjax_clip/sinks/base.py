"""What a sink is, and several as one."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Self

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput, Row


class Sink:
    """Sends each round's row somewhere, once: rows up to the round ``last`` are skipped.

    A sink is for one run, and opens nothing before its first row. To write a sink of your own, implement ``begin``,
    ``write`` and ``end``; any function of a row will do as well.

    Attributes:
      id: of the tracker's run, to go on with it; set once it has begun.
      last: the last round that was sent.
      config: settings that the tracker keeps with the run.
      name: of the tracker's run; ``None`` if the tracker makes one up, empty if its runs have none.

    Example:
      >>> class Printed(fc.sinks.Sink):
      ...   def write(self, round, row):
      ...     print(round, sorted(row)[:2])
      >>> with Printed() as sink:
      ...   sink({"round": 1.0, "loss": 0.5, "clients": 8.0})
      1 ['clients', 'loss']
    """

    name: str | None = ""

    def __init__(self, id: str | None = None, config: Mapping[str, Any] | None = None) -> None:
        self.id, self.last, self.config = id, 0, dict(config or {})
        self._begun = False

    def __call__(self, row: Row) -> None:
        """Sends a row, unless its round has been sent."""
        round = int(row["round"])
        if not self._begun:
            self.begin(round)
            self._begun = True
        if round > self.last:
            self.write(round, {name: float(x) for name, x in row.items() if name != "round"})
            self.last = round

    def begin(self, round: int) -> None:
        """Opens what rows are written to, before the row of this round; may raise ``last``."""

    def write(self, round: int, row: Row) -> None:
        """Sends the values of a round."""
        raise NotImplementedError

    def end(self, failed: bool) -> None:
        """Sends what is left, and closes what ``begin`` has opened."""

    def close(self, failed: bool = False) -> None:
        """Ends the tracker's run, if it has begun; the next row would go on with it."""
        if self._begun:
            self._begun = False
            self.end(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, exception: Any, traceback: Any) -> None:
        self.close(exception is not None)


def several(*sinks: Callable[[Row], None]) -> Sink:
    """One sink of several: each gets every row, in this order.

    Args:
      sinks: functions of a row; those with a ``close`` are closed.

    Raises:
      InvalidInput: something that is not a function.

    Example:
      >>> rows = []
      >>> with fc.sinks.several(rows.append, fc.sinks.tensorboard("events")) as sink:
      ...   result = fc.train(algorithm, data, params, rounds=2, cohort_size=10, on_round=sink)
      >>> len(rows)
      2
    """
    for sink in sinks:
        checks.takes("A sink", sink, 1, "a row")
    return _Several(sinks)


def imported(name: str, extra: str = "") -> Any:
    """The package ``name``, which comes with an extra of the same name unless another is given."""
    try:
        return __import__(name)
    except ImportError as error:
        raise InvalidInput(
            f"This sink needs {name}, which is not installed: pip install 'fedjax_clip[{extra or name}]'"
        ) from error


class _Several(Sink):
    def __init__(self, sinks: tuple[Callable[[Row], None], ...]):
        super().__init__()
        self.sinks = sinks

    def __call__(self, row: Row) -> None:
        for sink in self.sinks:
            sink(row)

    def close(self, failed: bool = False) -> None:
        with contextlib.ExitStack() as stack:
            for sink in self.sinks:
                if isinstance(sink, Sink):
                    stack.callback(sink.close, failed)
                elif callable(close := getattr(sink, "close", None)):
                    stack.callback(close)
