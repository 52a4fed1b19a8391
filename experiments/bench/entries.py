"""What benchmarks write and find again: results that survive a kill."""

import difflib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from experiments.config import rundir
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput

Entry = dict[str, Any]


class Named(Protocol):
    """A track."""

    @property
    def name(self) -> str: ...


class Results:
    """``results.jsonl``: a line for each entry, on the disk as soon as it is there."""

    def __init__(self, path: pathlib.Path):
        self.path, self.file = path, path / "results.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            text = files.regular(self.file).read_text() if self.file.exists() else ""
            whole = text[: text.rfind("\n") + 1]  # a kill may have come in the middle of the last line
            files.write(self.file, whole)
            self.entries: list[Entry] = [json.loads(line) for line in whole.splitlines()]
        except OSError as error:
            raise InvalidInput(f"--workdir: {path} cannot be written: {error.strerror}.") from None
        except ValueError:
            raise InvalidInput(f"--workdir: {self.file} holds something else than results; choose another.") from None

    def find(self, track: Named, rule: str, config: Mapping[str, Any]) -> Entry | None:
        """The entry of this configuration, if it is there."""
        same = (e for e in reversed(self.entries) if (e["track"], e["rule"], e["config"]) == (track.name, rule, config))
        return next(same, None)

    def add(self, entry: Entry) -> None:
        """Appends an entry."""
        line = json.dumps(entry, allow_nan=False)
        with rundir.appending(self.file) as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(json.loads(line))


def check_names(flag: str, kind: str, names: Sequence[str], valid: Mapping[str, Any]) -> None:
    """Refuses names that none has, and none at all."""
    if not names:
        raise InvalidInput(f"{flag}: give at least one {kind} of {', '.join(valid)}.")
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidInput(f"{flag}: unknown {kind} {name!r}{hint} (valid: {', '.join(valid)}).")


def numbers(values: np.ndarray) -> Any:
    """An array as JSON has it: null for what is not finite."""
    if values.ndim:
        return [numbers(row) for row in values]
    return float(values) if np.isfinite(values) else None
