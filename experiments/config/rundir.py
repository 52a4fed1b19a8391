"""A run's directory: configuration, a row of metrics for each round, TensorBoard events, pictures, checkpoints."""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import shutil
import sys
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self, TextIO

import jax
import numpy as np

import fedjax_clip as fc
from experiments.config import lock
from fedjax_clip.core import files
from fedjax_clip.core import secret as secrets
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.tasks import Predictor
from fedjax_clip.training import agreement
from fedjax_clip.training.processes import Processes

KEY = "secret.key"


class RunDirectory:
    """Writes a run, and continues one of the same configuration; refuses one of another.

    Use it as a context: it keeps other processes out. A run that cannot start leaves nothing behind, and no link in the
    directory is followed: it holds files of its own.

    Args:
      path: the directory; made when needed.
      config: all that the results depend on.
      rounds: the number of rounds of the run, if its rows are rounds.
      explicit: whether the user gave the number of rounds; only then a run with another number is continued.
      held_out: a hash of each held-out set, by name; checkpoints hold that of the training data.
      claim: its privacy claim (``privacy.claim``), if any. Then ``secret`` keeps a key here until ``seal``.
      processes: those that train together, if there are several; each of them opens and enters the directory.
      origin: what the run begins with, if that is another run: for ``config.json``.
      earlier: the rows of that run's rounds, which become this one's.

    Attributes:
      about: a line on the problem, for ``config.json``; set it before the first row.
      extends: a line on the earlier number of rounds, if it has changed.

    Raises:
      InvalidInput: a path that cannot be written, or that holds a run of another configuration, with more rounds,
        damaged, or something else.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        config: Mapping[str, Any],
        rounds: int | None = None,
        explicit: bool = True,
        held_out: Mapping[str, str] | None = None,
        claim: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
        origin: Mapping[str, Any] | None = None,
        earlier: Sequence[fc.extend.Row] = (),
    ):
        self.origin, self.earlier = dict(origin or {}), list(earlier)
        self.processes = processes or Processes(jax.local_devices()[:1])
        self.path = files.expanded(path)
        self.config = dict(config)
        self.rounds, self.explicit, self.held_out = rounds, explicit, dict(held_out or {})
        self.claim = None if claim is None else dict(claim)
        self._keeps_key = claim is not None and claim["private_seed"] is None
        mode = 0o700 if self._keeps_key else 0o777  # they hold client states, and noise to be subtracted
        self.checkpoints = fc.extend.Checkpoints(self.path / "checkpoints", mode=mode)
        self.about = self.extends = ""
        self._events: Any = None
        self._rows: Any = None
        self._check()

    def _check(self) -> None:
        whole = os.fsencode(self.path.absolute())
        if len(whole) > 3000 or b"\0" in whole or any(len(part) > 255 for part in whole.split(b"/")):
            raise InvalidInput(f"--workdir: {str(self.path)[:60]!r}... is too long for a path, or holds a zero byte.")
        existing = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if os.path.lexists(p))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise InvalidInput(f"--workdir: {self.path} cannot be written, since {existing} is no writable directory.")
        if existing != self.path.absolute() or not self._begun():
            return
        for folder, folders, names in os.walk(self.path):
            if links := [name for name in (*folders, *names) if os.path.islink(os.path.join(folder, name))]:
                link = os.path.join(folder, links[0])
                raise InvalidInput(
                    f"--workdir: {link} is a link, and a run directory holds files of its own: remove it, or choose "
                    "another directory."
                )
        record = read_config(self.path)
        found = record["config"]
        for name in dict.fromkeys([*self.config, *found]):
            if found.get(name) != self.config.get(name):
                held, asked = found.get(name), self.config.get(name)
                has = f"no --{name}" if held is None else f"--{name}={held!r}"
                wants = "without" if asked is None else repr(asked)
                raise InvalidInput(
                    f"--workdir: {self.path} holds a run with {has}, not {wants}; choose another (with "
                    f"--init={self.path} it goes on from this run), or remove it."
                )
        if self.held_out and record.get("held_out", self.held_out) != self.held_out:
            raise InvalidInput(
                f"--workdir: {self.path} holds a run that was evaluated on other held-out data. To train on with "
                f"the data as they are now, write --init={self.path} and another --workdir; else go on with the former "
                "data, choose another directory, or remove it."
            )
        for name, begun in self.origin.items():
            if record.get(name, begun)["hash"] != begun["hash"]:
                raise InvalidInput(
                    f"--{name}: {begun['directory']} has changed since {self.path} began with it: put it back, or "
                    "choose another --workdir."
                )
        if self.sealed:
            self._check_sealed(record.get("rounds"))
        if self.rounds is not None:
            self._check_rounds(record.get("rounds"))

    def _begun(self) -> bool:
        """Whether there is more than a run leaves that is killed before its first row."""
        names = {p.name for p in self.path.iterdir() if not p.name.startswith(".shared-")}
        kept = any(not p.name.startswith(".shared-") for p in (self.path / "checkpoints").glob("*"))
        return kept or not names <= {".lock", KEY, f"{KEY}.new", "checkpoints"}

    def _check_sealed(self, planned: Any) -> None:
        """Refuses to resume without the key of all rounds so far."""
        kept = len(self.rows())
        if kept != planned or not (self.path / "params.npz").exists():
            raise InvalidInput(
                f"--workdir: {self.path / KEY}, from which the noise of {kept} rounds was drawn, is gone: put it back, "
                f"or remove {self.path} to train anew."
            )
        if self.rounds is not None and self.rounds > kept:
            raise InvalidInput(
                f"--rounds={self.rounds}: {self.path} is a private run that was complete after {kept} rounds, and its "
                "secret key was removed, so no more can be added: name another --workdir."
            )

    def _check_rounds(self, planned: Any) -> None:
        """Refuses to drop finished rounds, and to add rounds without an explicit --rounds."""
        kept, saved = len(self.rows()), self._saved()
        if kept < saved:
            raise InvalidInput(
                f"--workdir: {self.path / 'metrics.jsonl'} lacks the rows of rounds {kept + 1} to {saved}, which are "
                f"done: put the file back, or remove {self.path} to train anew."
            )
        assert self.rounds is not None
        if self.rounds < kept:
            raise InvalidInput(
                f"--rounds={self.rounds} is less than the {kept} rounds that {self.path} has: name another --workdir, "
                "or remove this one, to train fewer."
            )
        if planned in (None, self.rounds):
            return
        if not self.explicit:
            raise InvalidInput(
                f"--workdir: {self.path} holds a run of {planned} rounds: write --rounds={planned} for that one, or "
                f"--rounds={self.rounds} to train it on."
            )
        self.extends = (
            f"{self.path} was to have {planned} rounds, and has {kept}: its pictures, its page and its params.npz will "
            f"be those of round {self.rounds}."
        )

    def _saved(self) -> int:
        """Rounds done at the newest checkpoint, by its name: Orbax would wait for all processes."""
        folder = self.path / "checkpoints"
        return max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=0) if folder.exists() else 0

    def __enter__(self) -> Self:
        with self.processes.together():
            self._enter()
        try:
            agreement.share(self.processes, self.path)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _enter(self) -> None:
        lock.check()
        made = [p for p in (self.path.absolute(), *self.path.absolute().parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.taken(self.path / ".lock")
        except BlockingIOError:
            raise InvalidInput(f"--workdir: {self.path} is in use by another run.") from None
        except OSError as error:
            raise InvalidInput(f"--workdir: {self.path} cannot be written: {error.strerror}.") from None
        try:
            self._check()  # another run may have started meanwhile
        except InvalidInput:
            os.close(self._lock)
            raise
        self._made = made

    def __exit__(self, kind: Any, exception: Any, traceback: Any) -> None:
        try:
            self.close()
        except OSError as error:
            exception = error
        with contextlib.suppress(OSError):
            if self._keeps_key and not (self.path / "config.json").exists():  # it did not start
                secrets.remove(self.path / KEY)
            (self.path / ".lock").unlink()
            with contextlib.suppress(OSError):  # of a run that did not start, it is empty
                (self.path / "checkpoints").rmdir()
            if not any(self.path.iterdir()):
                for path in self._made:
                    path.rmdir()
        os.close(self._lock)
        if isinstance(exception, OSError) and not isinstance(exception, BrokenPipeError):
            # Otherwise TensorBoard's thread repeats the error in its own tracebacks when the process ends.
            sys.unraisablehook = lambda unraisable: None
            threading.excepthook = lambda arguments: None
            raise InvalidInput(
                f"--workdir: {self.path} cannot be written: {exception.strerror or exception}. What was saved before "
                "is whole, and the same command goes on from there."
            ) from None

    def secret(self) -> secrets.Secret:
        """The secret of the run's noise and cohorts, kept here until ``seal``, because a resume needs it."""
        with self.processes.together():  # the first makes it, and the others read it
            if self.processes.number == 0:
                secrets.Secret.kept(self.path / KEY)
        return secrets.Secret.kept(self.path / KEY)

    @property
    def sealed(self) -> bool:
        """Whether the run is complete: it has rounds, and its key is removed, which is its last act."""
        return self._keeps_key and not os.path.lexists(self.path / KEY) and bool(self.rows())

    def seal(self) -> None:
        """Removes the secret key, and then the checkpoints, after all other files of the run are written.

        Checkpoints hold client states, and noise that later rounds would have subtracted. The removal of the key
        completes the run: if the run is killed before, it can be resumed; if after, this step is repeated.
        """
        if self._keeps_key:
            for name in ("config.json", "metrics.jsonl", "params.npz"):
                files.sync(files.regular(self.path / name))
            secrets.remove(self.path / KEY)
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def params(self) -> dict[str, np.ndarray]:
        """The parameters at the end, by name."""
        return read_params(self.path)

    def rows(self) -> list[fc.extend.Row]:
        """All whole rows on disk, in order."""
        return read_rows(self.path)

    def add(self, row: fc.extend.Row) -> None:
        """Appends the row of one round."""
        if self._rows is None:
            self._start(int(row["round"]))
        self._rows.write(_line(row))
        self._rows.flush()
        self._events(row)

    def _start(self, round: int) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        earlier = [row for row in self.rows() if row["round"] < round]  # a kill may have left rows past the checkpoint
        earlier = earlier or self.earlier
        self.record()
        files.write(self.path / "metrics.jsonl", "".join(_line(row) for row in earlier))
        withheld = self.claim is not None and self.claim["withheld"]
        timed = not withheld  # the wall time could reveal the cohort
        self._events = fc.sinks.tensorboard(self.path / "tensorboard", timed)
        self._rows = appending(self.path / "metrics.jsonl")

    def record(self) -> None:
        """Writes ``config.json``, unless it exists with the same number of rounds."""
        path = self.path / "config.json"
        if not path.exists():
            versions = {"python": platform.python_version(), "jax": jax.__version__, "fedjax_clip": fc.__version__}
            devices = [str(d) for d in jax.local_devices()]
            record = {"config": self.config, "about": self.about, "versions": versions, "devices": devices}
            record |= {"held_out": self.held_out} if self.held_out else {}
            record |= {"privacy": self.claim} if self.claim else {}
            record |= self.origin
        elif (record := read_config(self.path)).get("rounds") == self.rounds:
            return
        files.write(path, json.dumps(record | ({"rounds": self.rounds} if self.rounds else {}), indent=2) + "\n")

    def finish(
        self,
        params: Mapping[str, np.ndarray],
        clients: Mapping[str, np.ndarray],
        others: Mapping[str, Mapping[str, np.ndarray]] | None = None,
        best: Mapping[str, Any] | None = None,
        model: Predictor | None = None,
    ) -> None:
        """Writes ``params.npz``, ``clients.npz`` (scores of each client, if any are told) and the pictures.

        Args:
          params: at the end, by name.
          clients: scores of each client.
          others: parameters of other models, by the names of their files.
          best: of the best model: metric, value and round, for ``config.json``.
          model: describes how the parameters are applied to new data, for ``model.json``.
        """
        if model is not None:
            files.write(self.path / "model.json", json.dumps(model.json(), indent=2) + "\n")
        for name, arrays in {"params": params, **(others or {})}.items():
            files.write_npz(self.path / f"{name}.npz", arrays)
        if clients:
            files.write_npz(self.path / "clients.npz", clients)
        if best is not None:
            record = read_config(self.path) | {"best": dict(best)}
            files.write(self.path / "config.json", json.dumps(record, indent=2) + "\n")
        self.draw()
        self.close()

    def keep_samples(self, before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]) -> None:
        """Writes ``samples.json``: what the model generated for held-out prompts, before training and after it."""
        if after:
            text = json.dumps({"before": list(before), "after": list(after)}, indent=2, ensure_ascii=False)
            files.write(self.path / "samples.json", text + "\n")

    def draw(self) -> None:
        """Draws ``curves.png``, and ``clipping.png`` if anything was clipped, from the rows so far."""
        title = f"{self.config.get('task')}    {self.config.get('algorithm')}    {self.config.get('client')}"
        rows = self.rows()
        if (curves := fc.plots.curves(rows, title)).axes:
            save_picture(self.path / "curves.png", curves)
        if (clipping := fc.plots.clipping(rows, title)) is not None:
            save_picture(self.path / "clipping.png", clipping)

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._events.close()


class Follower(RunDirectory):
    """The run directory as all processes but the first have it: they share its checkpoints, and write nothing else."""

    def _check(self) -> None: ...

    def _enter(self) -> None: ...

    def __exit__(self, kind: Any, exception: Any, traceback: Any) -> None: ...

    def record(self) -> None: ...


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The content of a run's ``config.json``, ``{"config": {...}, ...}``.

    Raises:
      InvalidInput: the file is missing, or is not a run's configuration.
    """
    try:
        record = json.loads(files.regular(path / "config.json").read_bytes())
    except FileNotFoundError:
        raise InvalidInput(f"--workdir: {path} holds files but no run (no config.json); choose another.") from None
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise InvalidInput(f"--workdir: {path / 'config.json'} is not a run's configuration; choose another.")
    return record


def read_rows(path: pathlib.Path) -> list[fc.extend.Row]:
    """All whole rows of a run directory, in order; a last row that a kill cut short is left out.

    Raises:
      InvalidInput: a file whose rows are not those of rounds 1, 2, 3 ...
    """
    file = path / "metrics.jsonl"
    try:
        lines = files.regular(file).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows: list[fc.extend.Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({k: float("nan") if v is None else float(v) for k, v in row.items()})
            whole = row["round"] == number
        except (ArithmeticError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            whole = False
        if not whole and not line.endswith(b"\n"):
            return rows[: number - 1]
        if not whole:
            raise InvalidInput(
                f"{file}: line {number} is not the row of round {number}, so the file is damaged: put it back, or "
                f"remove {path} to train anew."
            )
    return rows if not lines or lines[-1].endswith(b"\n") else rows[:-1]


def read_params(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The parameters of a run directory, by name.

    Raises:
      InvalidInput: a file that is damaged or missing.
    """
    file = files.regular(path / "params.npz")
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error, MemoryError):
        raise InvalidInput(f"{file} is damaged or missing: put it back, or remove {path} to train anew.") from None


def default_path(config: Mapping[str, Any]) -> pathlib.Path:
    """``runs/digits-fedavg-1a2b3c``: the same for the same configuration, so that the same command goes on."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode()).hexdigest()[:6]
    task, algorithm = (str(config[k]).split("(")[0] for k in ("task", "algorithm"))
    return pathlib.Path("runs") / f"{task}-{algorithm}-{digest}"


def _line(row: fc.extend.Row) -> str:
    return json.dumps({k: v if np.isfinite(v) else None for k, v in row.items()}) + "\n"


def appending(path: pathlib.Path) -> TextIO:
    """Opens a file to append to; links are refused."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "a")


def save_picture(path: pathlib.Path, figure: Any) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
