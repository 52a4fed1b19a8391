"""Reads run directories."""

import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

import fedjax_clip as fc
from experiments.config import privacy, rundir
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.sources import archives
from fedjax_clip.training.metric import Metric

PRIMARY = ("accuracy", "auroc", "loss")


class Run(NamedTuple):
    """The content of a run directory.

    Attributes:
      name: distinguishes the run from the others on the page.
      record: ``config.json``.
      rows: of ``metrics.jsonl``.
      clients: ``{"set/metric": [M]}`` of ``clients.npz``; empty while the run is not complete.
      complete: whether no secret key is kept for more rounds.
      samples: ``{"before": [...], "after": [...]}`` of ``samples.json``: what a model of text generated.
    """

    name: str
    record: dict[str, Any]
    rows: list[fc.extend.Row]
    clients: dict[str, np.ndarray]
    complete: bool = True
    samples: Mapping[str, Sequence[Mapping[str, str]]] = MappingProxyType({})

    @property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    @property
    def private(self) -> dict[str, str]:
        """The run's privacy statement; empty without a claim."""
        claim = self.record.get("privacy")
        return dict(privacy.statement(claim, self.rows[-1], self.complete)) if claim else {}

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """``(rounds, values)`` of a metric, where there is one."""
        points = np.array([(row["round"], row[key]) for row in self.rows if key in row], float).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    @property
    def seams(self) -> list[tuple[float, str]]:
        """``(round, note)`` where the run went on from another one's state, and with which clients."""
        found = [row for row in self.rows if "went_on_from" in row]
        who = ("clients_kept", "kept"), ("clients_new", "new"), ("clients_gone", "gone")
        return [
            (
                row["went_on_from"],
                f"Went on after round {row['went_on_from']:.0f}. Clients: "
                + ", ".join(f"{row.get(key, 0):.0f} {word}" for key, word in who),
            )
            for row in found
        ]

    def cumulative(self, *keys: str) -> np.ndarray:
        """``[R]`` these metrics, added up to and with each row."""
        return np.cumsum([sum(row.get(key, 0.0) for key in keys) for row in self.rows])

    @property
    def metric(self) -> tuple[str, str]:
        """The held-out set and the score that ``--metric`` names, ``("examples", "auroc_worst")``; empty without."""
        where, _, score = str(self.config.get("metric") or "").removeprefix("eval/").rpartition("/")
        return where, score

    def primary(self, name: str) -> str:
        """The score by which clients of a set are compared: that of ``--metric``, or accuracy, AUROC or the loss."""
        of_clients = [key.removeprefix(f"{name}/") for key in self.clients]
        here = [score for score in (compared(self.metric[1], of_clients)[0], *PRIMARY) if score in of_clients]
        known = [score for score in here if not np.isnan(self.clients[f"{name}/{score}"]).all()]
        return (known or here or [""])[0]

    def served(self, name: str, metric: str) -> np.ndarray:
        """The clients of a set by number, worst served first, without those that have no such score.

        Such is the AUROC of one class: it is NaN, and the client's loss is finite.
        """
        values = self.clients[f"{name}/{metric}"]
        loss = self.clients.get(f"{name}/loss", np.full(len(values), np.nan))
        order = worst_first(values, metric)
        return order[~(np.isnan(values) & np.isfinite(loss))[order]]


def load(directories: Sequence[pathlib.Path]) -> list[Run]:
    """Reads run directories, and finds a name for each.

    If there is one setting in which all of them differ, that is their name; else it is their directory.

    Raises:
      InvalidInput: a directory that holds no run, a run without rounds, files that cannot be read.
    """
    runs = [_load(directory) for directory in directories]
    choices = [[_named(key, run.config.get(key, "")) for run in runs] for key in differing(runs)]
    choices = choices if len(choices) == 1 else []
    choices += [[directory.resolve().name for directory in directories], [str(directory) for directory in directories]]
    names = next((names for names in choices if len(set(names)) == len(runs)), choices[-1])
    return [run._replace(name=name) for run, name in zip(runs, names, strict=True)]


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if len({value(run.config.get(key, "")) for run in runs}) > 1]


def value(setting: Any) -> str:
    """A setting in readable form; ``None`` if it was not set."""
    return "by default" if setting is None else str(setting) or "–"


def compared(metric: str, known: Collection[str]) -> tuple[str, str]:
    """``("auroc", "worst")`` of ``"auroc_worst"``, if the score itself is known; ``(metric, "")`` of others."""
    for how in ("mean", "worst", "worst_tenth"):
        score = metric.removesuffix(f"_{how}")
        if score != metric and score in known:
            return score, how
    return metric, ""


def worst_first(values: np.ndarray, metric: str) -> np.ndarray:
    """``[M]`` clients in order, worst served first; a client without a finite value is the worst."""
    return np.argsort(-Metric(metric).cost(values), kind="stable")


def worst_tenth(values: np.ndarray, metric: str) -> float:
    """The mean over the worst-served tenth of the clients, at least one."""
    return float(values[worst_first(values, metric)[: max(1, len(values) // 10)]].mean())


def _named(key: str, setting: Any) -> str:
    return setting if isinstance(setting, str) and setting else f"{key}={value(setting)}"


def _load(directory: pathlib.Path) -> Run:
    path = directory / "config.json"
    try:
        record = json.loads(files.regular(path).read_bytes())
        path = directory / "metrics.jsonl"
        rows = rundir.read_rows(directory)
        rounds = [float(row["round"]) for row in rows]
        clients: dict[str, np.ndarray] = {}
        if (path := directory / "clients.npz").exists():
            clients = archives.read_npz(path)
        _check_clients(clients)
        samples: dict[str, Any] = {}
        if (path := directory / "samples.json").exists():
            samples = json.loads(files.regular(path).read_bytes())
        _check_samples(samples)
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidInput(f"{directory} holds no run: there is no {path.name}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidInput(f"{path} cannot be read: it is not what a run writes.") from None
    kinds: tuple[tuple[str, type, Any], ...] = ("config", dict, None), ("versions", dict, {}), ("devices", list, [])
    if not isinstance(record, dict) or any(not isinstance(record.get(k, x), kind) for k, kind, x in kinds):
        raise InvalidInput(f"{directory / 'config.json'} is not a run's configuration.")
    if (directory / "results.jsonl").exists():
        raise InvalidInput(
            f"{directory} is a sweep's, and a page is of runs: look at its table.md and sweep.png, or train its best "
            f"point by python -m experiments.run --flagfile={directory / 'best.flags'}, which makes a page."
        )
    if not rounds:
        raise InvalidInput(f"{directory} holds a run without a round: there is nothing to show.")
    run = Run("", record, rows, clients, not (directory / rundir.KEY).exists(), samples)
    try:
        _ = run.private
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InvalidInput(f"{directory / 'config.json'} is not a run's configuration.") from None
    return run


def _check_samples(samples: Any) -> None:
    """Raises unless they are lists of what a model answered, as many before training as after it."""
    if samples:
        for one in (*samples["before"], *samples["after"]):
            if not all(isinstance(one[key], str) for key in ("prompt", "answer", "generated")):
                raise ValueError(one)
        if len(samples["before"]) != len(samples["after"]):
            raise ValueError(samples)


def _check_clients(clients: Mapping[str, np.ndarray]) -> None:
    """Raises unless each set has names, sizes and at least one score, of as many clients."""
    for name in {key.split("/")[0] for key in clients}:
        names, _ = clients[f"{name}/client"], clients[f"{name}/examples"]
        scores = [x for key, x in clients.items() if key.split("/")[0] == name and key != f"{name}/client"]
        if (
            names.ndim != 1
            or not len(names)
            or any(x.shape != names.shape or x.dtype.kind not in "iuf" for x in scores)
        ):
            raise ValueError(name)
        if not any(f"{name}/{metric}" in clients for metric in PRIMARY):
            raise KeyError(name)
