"""Tables: features prepared by federated statistics, or by public bounds of each column."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_clip import models
from fedjax_clip.core import checks, files
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import frames, partition, quality, statistics, tables
from fedjax_clip.data.population import FederatedData
from fedjax_clip.tasks import inputs, loading
from fedjax_clip.tasks.base import Task, binary_classifier, make, penalised, regressor, widths
from fedjax_clip.tasks.inputs import Column
from fedjax_clip.tasks.predictor import Predictor, described
from fedjax_clip.training.scores import OverClients, Summary, Values, auroc, calibration_error

FITTED = "quantiles, means and standard deviations from the clients' exact data: give {}"
COUNTED = "the number of examples of each class: give balance='client'"
SETS = "examples", "clients"


def csv(
    path: Any,
    target: str,
    by: str | None = None,
    num_clients: int = 10,
    hidden: Sequence[int] = (),
    tail: float = 0.01,
    l2: float = 0.0,
    held_out: float = 0.2,
    seed: int = 0,
    bounds: tables.Bounds | str | None = None,
    held_out_clients: float = 0.0,
    balance: str | None = None,
    like: files.PathLike | None = None,
) -> Task:
    """A local CSV file: a column of two words or of 0 and 1 is classified, a column of other numbers regressed.

    All other columns are features, prepared as those of ``heart``. With ``by``, the scores include the
    accuracy and AUROC (or root mean square error) of the clients in the mean, and of the worst. A client of one class
    has no AUROC.

    Args:
      path: the file, UTF-8 with a header; in Python also a pandas DataFrame, which counts as the file that its
        ``to_csv(index=False)`` writes, so that its first row is row 2 in a message.
      target: the column to predict; rows without it are left out, with a warning.
      by: the column that names each row's client; without it rows are dealt evenly to ``num_clients``.
      num_clients: clients to deal rows to.
      hidden, tail, l2, held_out, seed: as for ``heart``; ``held_out`` is of each client's rows, and of each class of
        them, so that a rare class is on both sides if a client has two rows of it.
      bounds: public bounds of the columns, including the target, as an epsilon needs: ``{"age": (0, 120), "sex": ("f",
        "m"), "died": ("no", "yes")}``, or in a flag ``'age:0:120;sex:f,m;died:no,yes'``. Then no statistics are used:
        numbers are clipped to their bounds and scaled to [-1, 1], a missing one is 0 with an indicator, an unknown word
        is ``"other"``, and ``tail`` is ignored. Other columns are left out.
      held_out_clients: fraction of the clients that is never trained on, at least one; they are the set ``"clients"``.
      balance: as for ``heart``; the held-out sets are not weighed.
      like: a complete run's directory. Columns are prepared as for its model, by the statistics, words and classes of
        its rows, so that training can go on from it (``--init``); ``tail`` is ignored. Other columns are left out.

    Raises:
      InvalidInput: a file that is not a table, an unknown column, a column without values, a target with one value or
        with more than two words, a column of numbers in which a few entries are none, a column that identifies rows;
        ``like`` together with ``bounds``, or of a model of another target ...

    Example:
      >>> from pathlib import Path
      >>> _ = Path("clinic.csv").write_text("age,died\\n63,yes\\n,no\\n150,no\\n41,yes\\n")
      >>> task = fc.tasks.csv("clinic.csv", "died", num_clients=2, bounds="age:0:120;died:no,yes")
      >>> task.data.examples["x"].shape, task.fitted
      ((2, 2), '')
    """
    path = tables.Frame(path) if frames.is_frame(path) else path
    if like is not None and bounds is not None:
        raise InvalidInput("like and bounds both say how columns are prepared: give one of them.")
    told: Any
    if like is not None:
        rows, x, y, told = _like(path, target, by, like)
        populations = _split(path, rows, x, y, by, num_clients, held_out, held_out_clients, seed)
        return task(weighed(populations, balance), hidden, l2, compare=by is not None, **told)
    if bounds is None:
        table = _read(path, (target,), by, words=() if by is None else (by,))
        rows, x, y, columns, output = _as_they_are(path, table, target, by)
        found = _split(path, rows, x, y, by, num_clients, held_out, held_out_clients, seed)
        populations, columns = prepare(found, columns, tail)
        fitted = FITTED.format("what is publicly known of each column, as bounds='age:0:120;sex:f,m'")
        told = {"given": {"columns": columns}, "output": output, "compare": by is not None}
        return task(weighed(populations, balance), hidden, l2, fitted=fitted, **told)
    known = tables.read_bounds(bounds)
    table = _read(path, (target, *known), by, words=None)
    rows, x, y, of_target, given, output = _by_bounds(path, table, target, by, known)
    populations = _split(path, rows, x, y, by, num_clients, held_out, held_out_clients, seed)
    told = {"given": given, "output": output, "compare": by is not None}
    fitted = COUNTED if balance == "population" else ""
    return task(weighed(populations, balance), hidden, l2, fitted=fitted, target=of_target, **told)


def pooled(values: Values, data: FederatedData) -> dict[str, float]:
    """AUROC and calibration error over the examples of all clients."""
    labels = data.fields()["y"]
    return {name: f(values["probability"], labels) for name, f in (("auroc", auroc), ("ece", calibration_error))}


def _read(path: str, needed: Sequence[str], by: str | None, words: Sequence[str] | None) -> tables.Table:
    """A file in which the needed columns are."""
    table = tables.read_csv(path, words)
    for name in (*needed, *(() if by is None else (by,))):
        tables.named(table, name, path)
    return table


def _as_they_are(
    path: str, table: tables.Table, target: str, by: str | None
) -> tuple[Any, np.ndarray, np.ndarray, list[Column], dict[str, Any]]:
    """The rows with a target, features yet to be prepared, the target, and what is known of both."""
    wanted = tables.column(table, target)
    for name in [name for name in table if name != by]:
        tables.column(table, name)  # refuses infinite numbers, while rows still have the file's numbering
        if wrong := tables.suspect(table, name):
            raise InvalidInput(f"{path}: {wrong}")
    table = _known(path, table, target, ~np.isnan(wanted) if wanted.dtype.kind == "f" else wanted != "")
    values, y, times = np.unique(table[target], return_inverse=True, return_counts=True)
    if len(values) < 2:
        raise InvalidInput(f"{path}: column {target!r} takes the one value {values[0].item()!r}: it needs two.")
    if len(values) > 2 and values.dtype.kind != "f":
        rarest = values[times.argmin()]
        named = ", ".join(map(repr, values[:6].tolist())) + (", …" if len(values) > 6 else "")
        raise InvalidInput(
            f"{path}: column {target!r} takes {len(values)} values: {named}. The rarest is {rarest.item()!r}, as in "
            f"row {np.flatnonzero(wanted == rarest)[0] + 2}. A target is two words, 0 and 1, or numbers."
        )
    features = [name for name in table if name not in (target, by)]
    if not features:
        raise InvalidInput(
            f"{path} has no column but {' and '.join(map(repr, table))}: there is nothing to learn from."
        )
    numbers = [name for name in features if table[name].dtype.kind == "f"]
    if empty := [name for name in numbers if np.isnan(table[name]).all()]:
        raise InvalidInput(f"{path}: column {empty[0]!r} is missing in every row: leave it out.")
    words = {name: tables.levels(table[name]) for name in features if name not in numbers}
    x, _ = tables.encode(table, numbers, words)
    output: dict[str, Any] = {"target": target}
    if len(values) > 2:
        return table, x, table[target].astype(np.float32), columns_of(numbers, words), output
    output["classes"] = [value if isinstance(value, str) else f"{value:g}" for value in values.tolist()]
    return table, x, y.astype(np.int32), columns_of(numbers, words), output


def _by_bounds(
    path: str, table: tables.Table, target: str, by: str | None, bounds: tables.Bounds
) -> tuple[Any, np.ndarray, np.ndarray, Sequence[float] | None, dict[str, Any], dict[str, Any]]:
    """The rows with a target, features of each row alone, the target, its bounds if numeric, and what is known."""
    if target not in bounds:
        raise InvalidInput(f"bounds: the target {target!r} is missing: add '{target}:no,yes', or its bounds.")
    features = {name: of for name, of in bounds.items() if name not in (target, by)}
    if not features:
        raise InvalidInput(f"bounds: they name no column but {target!r}: there is nothing to learn from.")
    of_target: Any = bounds[target]
    given, output = within_bounds(features), {"target": target}
    if not isinstance(of_target[0], str):
        numbers = tables.numbers(tables.named(table, target))
        table = _known(path, table | {target: numbers}, target, ~np.isnan(numbers))
        return table, tables.within(table, features)[0], table[target], of_target, given, output
    if len(of_target) != 2:
        raise InvalidInput(f"bounds: the target {target!r} has {len(of_target)} words; it must have two, or bounds.")
    table = _known(path, table, target, np.isin(tables.named(table, target), of_target))
    y = (table[target] == of_target[1]).astype(np.int32)
    return table, tables.within(table, features)[0], y, None, given, output | {"classes": list(of_target)}


def _like(
    path: Any, target: str, by: str | None, directory: files.PathLike
) -> tuple[Any, np.ndarray, np.ndarray, dict[str, Any]]:
    """The rows with a target, features and target as a model takes them, and what ``task`` is told of both."""
    known = loading.load(directory).predictor
    output = known.output
    if known.kind != "table" or output.get("target") != target or {"log10", "at_least"} & output.keys():
        raise InvalidInput(f"like: {directory} has no model of a table's column {target!r}: leave like out.")
    table = _read(path, (target,), by, words=None)
    y, there = inputs.targets(table, output)
    given = inputs.Table(**known.input)
    encoded = given.encode(table if isinstance(path, tables.Frame) else path)[there]
    x = np.asarray(given.features(jnp.asarray(encoded)))
    table = _known(path, table, target, there)
    public = known.input.get("public", False)
    told: dict[str, Any] = {"given": known.input}
    told["output"] = {name: output[name] for name in ("target", "classes") if name in output}
    told["fitted"] = "" if public else FITTED.format("bounds='age:0:120;sex:f,m' in place of like")
    if "classes" in output:
        return table, x, y[there].astype(np.int32), told
    mean, scale = output["mean"], output["scale"]
    told |= {"target": (mean - scale, mean + scale)} if public else {"moments": (mean, scale)}
    return table, x, y[there], told


def _known(path: str, table: tables.Table, target: str, known: np.ndarray) -> tables.Table:
    """The rows whose target is known."""
    if not known.any():
        raise InvalidInput(f"{path}: column {target!r} is missing in every row.")
    if not known.all():
        warnings.warn(
            f"{path}: {np.sum(~known)} of {len(known)} rows are left out, for lack of their {target!r}.", stacklevel=4
        )
    return {name: values[known] for name, values in table.items()}


def _split(
    path: str,
    table: tables.Table,
    x: np.ndarray,
    y: np.ndarray,
    by: str | None,
    num_clients: int,
    held_out: float,
    held_out_clients: float,
    seed: int,
) -> tuple[FederatedData, ...]:
    """The rows of a file by client: to train on, held out, and those of held-out clients, if there are such."""
    owner = np.arange(len(y)) % num_clients if by is None else _owners(path, table, by)
    if len(np.unique(owner)) == len(y):
        cure = "num_clients must be smaller" if by is None else "by must be a column that rows share, or be left out"
        raise InvalidInput(f"{path}: no client has two rows, so there is nothing to hold out: {cure}.")
    data = partition.natural({"x": x, "y": y, "owner": owner}, "owner")
    return split(data, held_out, held_out_clients, seed, label="y" if y.dtype.kind == "i" else None)


def split(
    data: FederatedData, held_out: float, held_out_clients: float, seed: int, label: str | None = None
) -> tuple[FederatedData, ...]:
    """``(train, examples)``, or ``(train, examples, clients)`` if whole clients are held out."""
    checks.fraction("held_out", held_out)
    checks.fraction("held_out_clients", held_out_clients, zero=True)
    if not held_out_clients:
        return data.split_examples(held_out, seed, label)
    train, clients = data.split_clients(held_out_clients, seed)
    return *train.split_examples(held_out, seed, label), clients


def weighed(populations: Sequence[FederatedData], balance: str | None) -> tuple[FederatedData, ...]:
    """The populations, with class weights on the first one's examples if ``balance`` asks for them."""
    train, *rest = populations
    if balance not in (None, "population", "client"):
        raise InvalidInput(f"balance must be 'population' or 'client', not {balance!r}.")
    if balance and train.fields()["y"].dtype.kind != "i":
        raise InvalidInput(f"balance={balance!r} weighs two classes, and the target is a number: leave balance out.")
    if balance:
        train = quality.weigh_classes(train, 2, per_client=balance == "client")
    return train, *rest


def columns_of(numbers: Sequence[str], words: Mapping[str, Sequence[str]]) -> list[Column]:
    """Columns as ``inputs.Table`` takes them, yet without statistics, in the order of ``tables.encode``."""
    found: list[Column] = [{"name": name} for name in numbers]
    for name, levels in words.items():
        missing = "missing" in levels
        known = [level for level in levels if level != "missing"]
        found.append({"name": name, "words": known, "missing": missing, "other": False})
    return found


def within_bounds(bounds: tables.Bounds) -> dict[str, Any]:
    """The input of a predictor whose columns are prepared by public bounds, as by ``tables.within``."""
    columns: list[Column] = []
    for name, of in bounds.items():
        if isinstance(of[0], str):
            columns.append({"name": name, "words": list(of), "missing": True, "other": True})
            continue
        low, high = map(float, of)
        middle = (low + high) / 2
        column = {"low": low, "high": high, "fill": middle, "mean": middle, "scale": (high - low) / 2}
        columns.append({"name": name, **column, "indicator": True})
    return {"columns": columns, "public": True}


def prepare(
    populations: Sequence[FederatedData], columns: Sequence[Column], tail: float
) -> tuple[tuple[FederatedData, ...], list[Column]]:
    """Prepares features by the first population's statistics, and adds these to the columns; numbers come first."""
    names = [column for column in columns if "words" not in column]
    numbers = slice(len(names))
    steps = [quality.winsorise(tail, numbers)] if tail else []
    fitted: list[Any] = []
    for step in (*steps, quality.impute(), quality.standardise(numbers)):
        fitted.append(step(populations[0]))
        populations = [fitted[-1](data) for data in populations]
    filled, scaled = (found.keywords for found in fitted[-2:])
    low, high = (fitted[0].keywords[name].tolist() if tail else [None] * len(names) for name in ("low", "high"))
    known = [
        {
            **column,
            "low": low[i],
            "high": high[i],
            "fill": float(filled["fill"][i]),
            "mean": float(scaled["mean"][i]),
            "scale": float(scaled["scale"][i]),
            "indicator": bool(filled["indicated"][i]),
        }
        for i, column in enumerate(names)
    ]
    return tuple(populations), [*known, *columns[len(names) :]]


def task(
    populations: Sequence[FederatedData],
    hidden: Sequence[int],
    l2: float,
    summarise: Summary = pooled,
    fitted: str = "",
    target: Sequence[float] | None = None,
    moments: tuple[float, float] | None = None,
    compare: bool = False,
    given: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | None = None,
) -> Task:
    """A task with logistic loss for integers y, else with the squared error of scaled y; the first population trains.

    Real y are scaled to [-1, 1] by the bounds ``target`` if given, else standardised, by the mean and deviation
    ``moments`` if given. With ``compare``, the scores include those of the clients in the mean, and of the worst.
    ``given`` and ``output`` are those of the task's predictor.
    """
    model = models.MLP(widths(hidden), 1)
    compared: tuple[str, ...] = ("rmse",)
    scale = {}
    if populations[0].fields()["y"].dtype.kind == "i":
        loss, compared = binary_classifier(model), ("auroc", "accuracy")
    elif target is not None:
        populations = [_with_target(data, tables.scale(data.fields()["y"], target)[0]) for data in populations]
        scale = {"mean": (target[0] + target[1]) / 2, "scale": (target[1] - target[0]) / 2}
        loss, summarise = regressor(model), _root_mean_square(scale["scale"], zero="middle")
    else:
        mean, std = moments or tuple(map(float, statistics.moments(populations[0], "y")))[1:]
        populations = [_with_target(data, (data.fields()["y"] - mean) / std) for data in populations]
        best = () if hidden else (closed_form(populations[0], l2),)
        scale = {"mean": mean, "scale": std}
        loss, summarise = regressor(model), _root_mean_square(std, *best)
    if compare:
        summarise = OverClients(summarise, compared)
    task = make(populations[0], dict(zip(SETS, populations[1:])), model, penalised(loss, l2))
    predictor = None
    if given is not None:
        predictor = Predictor("table", described(model), given, {**(output or {}), **scale})
    return dataclasses.replace(task, summarise=summarise, fitted=fitted, predictor=predictor)


def _with_target(data: FederatedData, y: np.ndarray) -> FederatedData:
    return dataclasses.replace(data, examples={**data.examples, "y": y.astype(np.float32)})


def closed_form(train: FederatedData, l2: float) -> np.ndarray:
    """The linear or ridge regression of y on x on all clients' examples, from sums that clients send.

    ``(sum z z' / N + l2 I) w = sum z y / N`` with z the features and an unpenalised 1. If there are several solutions,
    it is the shortest.

    Returns:
      ``[features + 1]``, the intercept last.
    """

    def products(examples):
        z = np.column_stack([examples["x"], np.ones(len(examples["y"]))]).astype(np.float64)
        return z.T @ z, z.T @ examples["y"]

    gram, moment = (total / train.num_examples for total in statistics.federated_sums(train, products))
    gram[np.diag_indices(len(gram) - 1)] += l2
    return np.linalg.lstsq(gram, moment, rcond=None)[0]


def _root_mean_square(std: float, best: np.ndarray | None = None, zero: str = "mean") -> Summary:
    """``rmse`` in the target's units, and for comparison that of the training mean and of the closed form, if any."""

    def summarise(values, data):
        x, y = (data.fields()[name].astype(np.float64) for name in "xy")
        squares = {"rmse": 2 * values["loss"].astype(np.float64), f"rmse_of_{zero}": y**2}
        if best is not None:
            squares["rmse_of_closed_form"] = (x @ best[:-1] + best[-1] - y) ** 2
        return {name: std * math.sqrt(np.mean(square)) for name, square in squares.items()}

    return summarise


def _owners(path: str, table: tables.Table, by: str) -> np.ndarray:
    owner = tables.column(table, by)
    if (missing := owner == "").any():
        raise InvalidInput(f"{path}: row {np.flatnonzero(missing)[0] + 2} has no {by!r}, which names its client.")
    return owner
