"""What shows a run while it goes: TensorBoard and a bar of progress."""

import math
import os
import warnings
from typing import Any

from fedjax_clip.core import files
from fedjax_clip.core.files import PathLike
from fedjax_clip.core.types import Row
from fedjax_clip.sinks.base import Sink, imported


def tensorboard(directory: PathLike, timed: bool = True) -> Sink:
    """TensorBoard's event files, written by tensorboardX.

    Args:
      directory: for the files; a run that resumes goes on in the same one.
      timed: whether events hold the time; if not, they hold the round in its place.

    Raises:
      InvalidInput: tensorboardX is not installed.

    Example:
      >>> with fc.sinks.tensorboard("events") as sink:
      ...   result = fc.train(algorithm, data, params, rounds=2, cohort_size=10, on_round=sink)
    """
    return _TensorBoard(imported("tensorboardX", "experiments"), files.expanded(directory), timed)


def progress(rounds: int | None = None, metric: str | None = None) -> Sink:
    """A bar of rounds with loss, held-out accuracy, clipped fraction and clients per second, if rows have them.

    It is a widget in a notebook and text in a terminal.

    Args:
      rounds: the number of rounds, if it is known.
      metric: a score to show first, with or without ``eval/`` in front.

    Raises:
      InvalidInput: tqdm is not installed.

    Example:
      >>> with fc.sinks.progress(2) as sink:
      ...   result = fc.train(algorithm, data, params, rounds=2, cohort_size=10, on_round=sink)
    """
    return _Progress(imported("tqdm", "experiments"), rounds, metric)


class _TensorBoard(Sink):
    def __init__(self, module: Any, directory: os.PathLike[str], timed: bool):
        super().__init__()
        self.module, self.directory, self.timed = module, directory, timed

    def begin(self, round: int) -> None:
        self.events = self.module.SummaryWriter(str(self.directory), purge_step=round, flush_secs=10)

    def write(self, round: int, row: Row) -> None:
        for name, value in row.items():
            if math.isfinite(value):
                self.events.add_scalar(name, value, round, None if self.timed else round)

    def end(self, failed: bool) -> None:
        self.events.close()


class _Progress(Sink):
    """Shows some of a row's values beside the bar."""

    ALWAYS = (
        ("loss", "loss", ".3f"),
        ("epsilon", "epsilon", ".3f"),
        ("eval/examples/accuracy", "accuracy", ".3f"),
        ("eval/clients/accuracy", "new clients", ".3f"),
        ("clipped_steps", "clipped", ".0%"),
    )

    def __init__(self, module: Any, rounds: int | None, metric: str | None):
        super().__init__()
        self.rounds, name = rounds, (metric or "").removeprefix("eval/")
        chosen = {f"eval/{name}": (f"eval/{name}", name, ".3f")} if name else {}
        self.values = (chosen | {value[0]: value for value in self.ALWAYS if value[0] not in chosen}).values()
        self.shown: dict[str, str] = {}

    def begin(self, round: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a notebook without widgets gets text
            from tqdm.auto import tqdm
        self.bar = tqdm(total=self.rounds, initial=round - 1, unit="round", dynamic_ncols=True, mininterval=0.2)

    def write(self, round: int, row: Row) -> None:
        self.shown |= {name: format(row[key], form) for key, name, form in self.values if key in row}
        if "seconds" in row:
            self.shown["clients/s"] = f"{row['clients'] / row['seconds']:,.0f}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def end(self, failed: bool) -> None:
        self.bar.close()
