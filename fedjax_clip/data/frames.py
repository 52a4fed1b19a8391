"""DataFrames of pandas as arrays. This library does not import pandas: whoever gives a DataFrame has imported it."""

import collections
import sys
from typing import Any

import jax
import numpy as np

from fedjax_clip.core.types import InvalidInput, PyTree


def is_frame(x: Any) -> bool:
    """Whether ``x`` is a DataFrame."""
    return "pandas" in sys.modules and isinstance(x, sys.modules["pandas"].DataFrame)


def is_column(x: Any) -> bool:
    """Whether ``x`` is a Series, an index or an array of a type that NumPy lacks, such as Int64 or category."""
    if "pandas" not in sys.modules:
        return False
    pandas = sys.modules["pandas"]
    return isinstance(x, pandas.Series | pandas.Index | pandas.api.extensions.ExtensionArray)


def columns(frame: Any, of: str = "") -> dict[str, np.ndarray]:
    """A DataFrame as a dict of its columns, each a field; its index is left out.

    Args:
      frame: the DataFrame.
      of: its owner, for the error message.

    Raises:
      InvalidInput: a column twice, or one of which ``array`` makes no array.

    Example:
      >>> import pandas as pd
      >>> columns(pd.DataFrame({"x": [0.5, 1.0], "y": pd.array([1, 0], dtype="Int64")}))["y"]
      array([1, 0])
    """
    names = [str(name) for name in frame.columns]
    if twice := [name for name, times in collections.Counter(names).items() if times > 1]:
        raise InvalidInput(f"Column {twice[0]!r}{of} occurs more than once: rename one of them.")
    return {name: array(f"Field {name!r}{of}", frame.iloc[:, i]) for i, name in enumerate(names)}


def matrix(name: str, frame: Any) -> np.ndarray:
    """A DataFrame of numbers as ``[N, columns]``, in the order of its columns.

    Args:
      name: for the error message.
      frame: the DataFrame.

    Raises:
      InvalidInput: a column that does not hold numbers.
    """
    found = {column: array(f"{name}: column {column!r}", frame[column]) for column in frame.columns}
    for column, x in found.items():
        if x.ndim != 1 or x.dtype.kind not in "biuf":
            raise InvalidInput(
                f"{name} is a table whose column {str(column)!r} holds {x.dtype} of shape {x.shape}, and one array "
                "needs numbers: leave the column out, or encode it, as pandas.get_dummies does."
            )
    return np.column_stack(list(found.values())) if found else np.empty((len(frame), 0))


def ordered(tree: PyTree, first: PyTree, of: str) -> PyTree:
    """A client's examples with the columns of each table in the order of the first client's: a matrix has no names.

    Args:
      tree: the client's examples.
      first: the first client's.
      of: the client, for the error message.

    Raises:
      InvalidInput: a table in a dict with other columns than the first client's.
    """

    def order(x: Any, y: Any) -> Any:
        if not (is_frame(x) and is_frame(y)) or x.columns.equals(y.columns):
            return x
        if len(x.columns) != len(y.columns) or set(x.columns) != set(y.columns):
            raise InvalidInput(
                f"A table{of} has the columns {list(x.columns)}, and the first client's {list(y.columns)}: give all "
                "clients the same."
            )
        return x[y.columns]

    return jax.tree.map(order, tree, first) if str(jax.tree.structure(tree)) == str(jax.tree.structure(first)) else tree


def array(name: str, column: Any) -> np.ndarray:
    """A Series as an array: numbers and bools keep their type, words and categories are objects of text.

    A missing number of a type with fractions is NaN. Entries that are arrays or lists of one shape are stacked.

    Args:
      name: for the error message.
      column: a Series, an index or an extension array.

    Raises:
      InvalidInput: dates, and entries that are missing where an array cannot say so.
    """
    pandas = sys.modules["pandas"]
    column = pandas.Series(column)
    kind, types = column.dtype, pandas.api.types
    if isinstance(kind, pandas.CategoricalDtype):
        column, kind = column.astype(kind.categories.dtype if column.notna().all() else object), kind.categories.dtype
    refuse_dates(name, column)
    if types.is_float_dtype(kind):
        return column.to_numpy(_numpy(kind), na_value=np.nan)
    if (missing := np.flatnonzero(column.isna())).size:
        raise InvalidInput(
            f"{name} has no value in {missing.size} of {len(column)} rows, first in row {missing[0]}, and an array of "
            f"{kind} cannot say so: fill them, or leave the rows out."
        )
    if types.is_bool_dtype(kind):
        return column.to_numpy(bool)
    if types.is_integer_dtype(kind):
        return column.to_numpy(_numpy(kind))
    entries = column.to_numpy(object)
    if any(isinstance(entry, np.ndarray | list) for entry in entries):
        shapes = sorted({np.shape(entry) for entry in entries})
        if len(shapes) > 1:
            raise InvalidInput(
                f"{name} holds arrays of different shapes, {shapes[0]} and {shapes[1]}: bring them to one shape."
            )
        return np.stack([np.asarray(entry) for entry in entries])
    return entries


def refuse_dates(name: str, column: Any) -> None:
    """Refuses a Series of dates, times or spans of time.

    Args:
      name: for the error message.
      column: the Series.

    Raises:
      InvalidInput: it holds such.
    """
    pandas = sys.modules["pandas"]
    kind, types = column.dtype, pandas.api.types
    dates = types.is_datetime64_any_dtype(kind) or types.is_timedelta64_dtype(kind)
    if types.is_object_dtype(kind):
        dates = types.infer_dtype(column) in ("date", "datetime", "time", "timedelta")
    if dates or isinstance(kind, pandas.PeriodDtype | pandas.IntervalDtype):
        raise InvalidInput(
            f"{name} holds dates or times ({kind}), and no model takes them: make numbers of them, such as days since "
            "a day, (column - day).dt.days."
        )


def _numpy(kind: Any) -> np.dtype:
    """NumPy's type for the numbers of a type of pandas: Int64, an Arrow type, a sparse one."""
    return np.dtype(getattr(kind, "numpy_dtype", getattr(kind, "subtype", kind)))
