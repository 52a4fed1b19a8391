"""The sinks of ``--sinks``: each gets every round of a run directory once, however often the run is stopped."""

import hashlib
import json
import warnings
from collections.abc import Callable
from typing import Any, Self

from experiments.config import registry, rundir, spec
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput, Row
from fedjax_clip.sinks import Sink

KEPT = "sinks.json"


def read(text: str) -> dict[str, Sink]:
    """The sinks of ``--sinks`` by name; none of them has begun. A name tells apart what is spelt differently."""
    calls, built = spec.parse(text, "--sinks"), spec.build(text, registry.SINKS, "--sinks")
    found = {}
    for call, sink in zip(calls, built, strict=True):
        name = f"{call.name}-{hashlib.sha256(repr(call).encode()).hexdigest()[:8]}"  # the text may hold a password
        if name in found:
            raise InvalidInput(f"--sinks: {call.name} is there twice with the same arguments: leave one out.")
        found[name] = sink if isinstance(sink, Sink) else _Function(sink)
    return found


class Tracking:
    """Sends a run's rows to its sinks.

    The run directory has the rows. ``sinks.json`` in it says of each sink which run of a tracker it goes on with, and
    which round it has got. So a resumed run sends nothing twice and leaves nothing out, and a new sink gets the earlier
    rounds, too. A sink that fails on the way is left out until the run ends: training goes on.

    Args:
      sinks: of ``read``.
      directory: of the run.
      late: whether all rows are sent at the end. A tracker notes the time of each row, and the time that a round took
        could reveal its cohort.
    """

    def __init__(self, sinks: dict[str, Sink], directory: rundir.RunDirectory, late: bool) -> None:
        self.sinks, self.directory, self.late = sinks, directory, late
        self.kept: dict[str, Any] = {}
        self.begun, self.failed = False, set[str]()

    def __enter__(self) -> Self:
        if self.sinks:
            self.kept = _kept(self.directory)
        for name, sink in self.sinks.items():
            sink.config = sink.config or dict(self.directory.config)
            if sink.name is None:
                sink.name = self.directory.path.name
            if known := self.kept.get(name):
                sink.id, sink.last = known["id"], known["last"]
        return self

    def __call__(self, row: Row) -> None:
        """Sends a row that the directory has."""
        if self.late or not self.sinks:
            return
        rows = [row] if self.begun else self.directory.rows()
        self.begun = True
        self._send(rows)

    def __exit__(self, kind: Any, exception: Any, traceback: Any) -> None:
        if kind is None and self.sinks:
            self.failed.clear()
            self._send(self.directory.rows())
        for name, sink in self.sinks.items():
            try:
                sink.close(failed=kind is not None)
            except Exception as error:
                _warn(name, error)

    def _send(self, rows: list[Row]) -> None:
        for name, sink in self.sinks.items():
            try:
                for row in rows if name not in self.failed else []:
                    sink(row)
            except InvalidInput:
                raise
            except Exception as error:  # of a server, a disk, a tracker
                self.failed.add(name)
                _warn(name, error)
        now = {name: {"id": sink.id, "last": sink.last} for name, sink in self.sinks.items() if sink.last}
        if now and self.kept != (self.kept | now):
            self.kept |= now
            files.write(self.directory.path / KEPT, json.dumps(self.kept, indent=2) + "\n")


class _Function(Sink):
    """A function of one's own as a sink."""

    def __init__(self, function: Callable[[Row], None]) -> None:
        super().__init__()
        self.function = function

    def write(self, round: int, row: Row) -> None:
        self.function({"round": float(round), **row})

    def end(self, failed: bool) -> None:
        if callable(close := getattr(self.function, "close", None)):
            close()


def _kept(directory: rundir.RunDirectory) -> dict[str, Any]:
    path = directory.path / KEPT
    try:
        found = json.loads(files.regular(path).read_bytes())
        good = all(isinstance(x["last"], int) and isinstance(x["id"], str | None) for x in found.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        good = False
    if not good:
        raise InvalidInput(f"{path} is damaged: put it back, or remove it to send all rows again, as a new run.")
    return found


def _warn(name: str, error: Exception) -> None:
    why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    warnings.warn(
        f"--sinks: {name.rsplit('-', 1)[0]} fails ({why}). Training goes on, and the run directory has all rows: the "
        "same command sends what is missing.",
        stacklevel=2,
    )
