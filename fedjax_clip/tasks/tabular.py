"""Tables: features prepared by federated statistics, or by public bounds of each column."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_clip import models
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition, quality, statistics, tables
from fedjax_clip.data.population import FederatedData
from fedjax_clip.tasks.base import Task, binary_classifier, make, penalised, regressor, widths
from fedjax_clip.training.evaluation import Summary, Values, auroc, calibration_error

FITTED = "quantiles, means and standard deviations from the clients' exact data: give {}"


def csv(
    path: str,
    target: str,
    by: str | None = None,
    num_clients: int = 10,
    hidden: Sequence[int] = (),
    tail: float = 0.01,
    l2: float = 0.0,
    held_out: float = 0.2,
    seed: int = 0,
    bounds: tables.Bounds | str | None = None,
) -> Task:
    """A local CSV file: a column of two words or of 0 and 1 is classified, a column of other numbers regressed.

    All other columns are features, prepared as those of ``heart``.

    Args:
      path: the file, UTF-8 with a header.
      target: the column to predict; rows without it are left out, with a warning.
      by: the column that names each row's client; without it rows are dealt evenly to ``num_clients``.
      num_clients: clients to deal rows to.
      hidden, tail, l2, held_out, seed: as for ``heart``; ``held_out`` is of each client's rows.
      bounds: public bounds of the columns, including the target, as an epsilon needs: ``{"age": (0, 120), "sex": ("f",
        "m"), "died": ("no", "yes")}``, or in a flag ``'age:0:120;sex:f,m;died:no,yes'``. Then no statistics are used:
        numbers are clipped to their bounds and scaled to [-1, 1], a missing one is 0 with an indicator, an unknown word
        is ``"other"``, and ``tail`` is ignored. Other columns are left out.

    Raises:
      InvalidInput: a file that is not a table, an unknown column, a column without values, a target with one value or
        with more than two words, a column of numbers in which a few entries are none, a column that identifies rows ...

    Example:
      >>> from pathlib import Path
      >>> _ = Path("clinic.csv").write_text("age,died\\n63,yes\\n,no\\n150,no\\n41,yes\\n")
      >>> task = fc.tasks.csv("clinic.csv", "died", num_clients=2, bounds="age:0:120;died:no,yes")
      >>> task.data.examples["x"].shape, task.fitted
      ((2, 2), '')
    """
    if bounds is None:
        table = _read(path, (target,), by, words=() if by is None else (by,))
        rows, x, y, num_numbers = _as_they_are(path, table, target, by)
        populations = prepare(_split(path, rows, x, y, by, num_clients, held_out, seed), num_numbers, tail)
        fitted = FITTED.format("what is publicly known of each column, as bounds='age:0:120;sex:f,m'")
        return task(populations, ["examples"], hidden, l2, fitted=fitted)
    known = tables.read_bounds(bounds)
    table = _read(path, (target, *known), by, words=None)
    rows, x, y, of_target = _by_bounds(path, table, target, by, known)
    populations = _split(path, rows, x, y, by, num_clients, held_out, seed)
    return task(populations, ["examples"], hidden, l2, target=of_target)


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
) -> tuple[Any, np.ndarray, np.ndarray, int]:
    """The rows with a target, features yet to be prepared, the target, and how many features are numbers."""
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
    x, _ = tables.encode(table, numbers, [name for name in features if name not in numbers])
    return table, x, y.astype(np.int32) if len(values) == 2 else table[target].astype(np.float32), len(numbers)


def _by_bounds(
    path: str, table: tables.Table, target: str, by: str | None, bounds: tables.Bounds
) -> tuple[Any, np.ndarray, np.ndarray, Sequence[float] | None]:
    """The rows with a target, features of each row alone, the target, and the bounds of a numeric target."""
    if target not in bounds:
        raise InvalidInput(f"bounds: the target {target!r} is missing: add '{target}:no,yes', or its bounds.")
    features = {name: of for name, of in bounds.items() if name not in (target, by)}
    if not features:
        raise InvalidInput(f"bounds: they name no column but {target!r}: there is nothing to learn from.")
    of_target: Any = bounds[target]
    if not isinstance(of_target[0], str):
        numbers = tables.numbers(tables.named(table, target))
        table = _known(path, table | {target: numbers}, target, ~np.isnan(numbers))
        return table, tables.within(table, features)[0], table[target], of_target
    if len(of_target) != 2:
        raise InvalidInput(f"bounds: the target {target!r} has {len(of_target)} words; it must have two, or bounds.")
    table = _known(path, table, target, np.isin(tables.named(table, target), of_target))
    return table, tables.within(table, features)[0], (table[target] == of_target[1]).astype(np.int32), None


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
    seed: int,
) -> tuple[FederatedData, FederatedData]:
    """The rows of a file by client, to train on and held out."""
    owner = np.arange(len(y)) % num_clients if by is None else _owners(path, table, by)
    if len(np.unique(owner)) == len(y):
        cure = "num_clients must be smaller" if by is None else "by must be a column that rows share, or be left out"
        raise InvalidInput(f"{path}: no client has two rows, so there is nothing to hold out: {cure}.")
    return partition.natural({"x": x, "y": y, "owner": owner}, "owner").split_examples(held_out, seed)


def prepare(populations: Sequence[FederatedData], num_numbers: int, tail: float) -> tuple[FederatedData, ...]:
    """Prepares features by the first population's statistics; the first ``num_numbers`` columns are numbers."""
    numbers = slice(num_numbers)
    trimming = [quality.winsorise(tail, numbers)] if tail else []
    return quality.prepare(populations, *trimming, quality.impute(), quality.standardise(numbers))


def task(
    populations: Sequence[FederatedData],
    held_out: Sequence[str],
    hidden: Sequence[int],
    l2: float,
    summarise: Summary = pooled,
    fitted: str = "",
    target: Sequence[float] | None = None,
) -> Task:
    """A task with logistic loss for integers y, else with the squared error of scaled y; the first population trains.

    Real y are scaled to [-1, 1] by the bounds ``target`` if given, else standardised.
    """
    model = models.MLP(widths(hidden), 1)
    if populations[0].fields()["y"].dtype.kind == "i":
        loss = binary_classifier(model)
    elif target is not None:
        populations = [_with_target(data, tables.scale(data.fields()["y"], target)[0]) for data in populations]
        loss, summarise = regressor(model), _root_mean_square((target[1] - target[0]) / 2, zero="middle")
    else:
        _, mean, std = map(float, statistics.moments(populations[0], "y"))
        populations = [_with_target(data, (data.fields()["y"] - mean) / std) for data in populations]
        best = () if hidden else (closed_form(populations[0], l2),)
        loss, summarise = regressor(model), _root_mean_square(std, *best)
    task = make(populations[0], dict(zip(held_out, populations[1:], strict=True)), model, penalised(loss, l2))
    return dataclasses.replace(task, summarise=summarise, fitted=fitted)


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
