"""Raw input of each kind, as ``model.json`` describes it: a table, arrays, texts.

Each kind has ``encode``, from raw data to one array (on the host), and ``features``, from that array to the model's
input (in JAX, so it is part of an exported model). ``shape`` and ``dtype`` are of one encoded example.
"""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import tables
from fedjax_clip.data.sources import archives, text
from fedjax_clip.tasks.base import scaled

Column: TypeAlias = dict[str, Any]  # {"name": "age", "low": ..., ...} or {"name": "sex", "words": ["f", "m"], ...}


class Table:
    """Rows of a table. A row is encoded as its numbers, NaN where missing, and its words, one-hot.

    Args:
      columns: of numbers: ``{"name", "low", "high", "fill", "mean", "scale", "indicator"}``: a number is clipped to
        low and high, a missing one becomes ``fill``, and the model gets ``(number - mean) / scale``. Optional:
        ``"missing"``, numbers that stand for a missing value. Of words: ``{"name", "words", "missing", "other"}``:
        whether there is a level for missing and for other words.
      public: whether public bounds prepared the rows (``csv(bounds=)``): an entry that is not a number is missing, and
        each number is followed by its indicator. Otherwise all indicators come last.
    """

    def __init__(self, columns: Sequence[Column], public: bool = False):
        self.columns, self.public = columns, public
        self.names: list[str] = []
        order: list[int] = []
        indicators: list[int] = []
        limits: list[tuple[float, ...]] = []
        self.shape = (sum(len(levels(column)) for column in columns),)
        for column in columns:
            place = len(self.names)
            self.names += levels(column)
            order += range(place, len(self.names))
            if "words" in column:
                limits += [(0, 1, 0, 0, 1)] * (len(self.names) - place)
                continue
            if column["indicator"]:
                (order if public else indicators).append(self.shape[0] + place)
            low, high = (column[name] for name in ("low", "high"))
            limits.append(
                (
                    -np.inf if low is None else low,
                    np.inf if high is None else high,
                    *(column[name] for name in ("fill", "mean", "scale")),
                )
            )
        self._order = np.array(order + indicators)
        self._limits = np.array(limits, np.float64).T
        self.dtype: Any = np.float32

    def features(self, x: jax.Array) -> jax.Array:
        """Encoded rows ``[N, d]`` as the model takes them."""
        low, high, fill, mean, scale = self._limits
        near = mean.astype(np.float32)  # the mean in two parts: x - near is exact where x is near
        low, high, fill, scale, rest = (v.astype(np.float32)[None] for v in (low, high, fill, scale, mean - near))
        missing = jnp.isnan(x)
        x = jnp.where(missing, fill, jnp.clip(x, low, high))
        x = (x - near[None] - rest) / scale
        return jnp.concatenate([x, missing.astype(x.dtype)], axis=1)[:, self._order]

    def encode(self, raw: Any) -> np.ndarray:
        """``[N, d]`` of a CSV file, or of columns by name."""
        table, place = read_table(raw)
        parts = [self._words(c, table, place) if "words" in c else self._number(c, table, place) for c in self.columns]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _number(self, column: Column, table: tables.Table, place: "Place") -> np.ndarray:
        values = tables.named(table, column["name"], place.path)
        numbers = tables.numbers(values)
        if not self.public:
            for wrong, why in ((tables.unreadable(values), "is no number"), (np.isinf(numbers), "is not finite")):
                if wrong.any():
                    row = int(wrong.argmax())
                    raise InvalidInput(f"{place(row)}column {column['name']!r} holds {values[row].item()!r}: it {why}.")
        numbers = np.where(np.isin(numbers, column.get("missing", [])), np.nan, numbers)
        most = float(np.finfo(np.float32).max)
        return np.clip(numbers, -most, most)[:, None]

    def _words(self, column: Column, table: tables.Table, place: "Place") -> np.ndarray:
        name, words = column["name"], column["words"]
        values = tables.named(table, name, place.path)
        values = np.array([f"{v:g}" for v in values.tolist()]) if values.dtype.kind == "f" else values
        missing = values == ""
        other = ~np.isin(values, words) & ~missing
        if not column["missing"] and (missing.any() or (other.any() and not column["other"])):
            row = int((missing | other).argmax())
            what = f"holds {values[row].item()!r}" if other[row] else "is empty"
            known = ", ".join(map(repr, words[:8])) + (", ..." if len(words) > 8 else "")
            raise InvalidInput(f"{place(row)}column {name!r} {what}, as nowhere in the training data; it had {known}.")
        if other.any() and not column["other"]:
            warnings.warn(
                f"{place.path or 'The table'}: {other.sum()} rows have a word in column {name!r} that the training "
                f"data did not have, such as {values[other.argmax()].item()!r}; they count as missing.",
                stacklevel=5,
            )
        hot = [values == word for word in words]
        hot += [missing if column["other"] else missing | other] if column["missing"] else []
        hot += [other] if column["other"] else []
        return np.stack(hot, axis=1)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row is, for messages: rows of a file are counted with its header."""

    path: str = ""

    def __call__(self, row: int) -> str:
        return f"{self.path}: row {row + 2}, " if self.path else f"Row {row}, "


def targets(table: tables.Table, output: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A table's targets ``[N]`` as class numbers or in the units of ``rmse``, and which of them are known.

    Args:
      table: with the target among its columns.
      output: of a ``Predictor`` of tables.
    """
    values = table[output["target"]]
    numbers = tables.numbers(values)
    if "classes" not in output:
        with np.errstate(divide="ignore", invalid="ignore"):
            truth = np.log10(numbers) if output.get("log10") else numbers
        return truth, np.isfinite(truth)
    if "at_least" in output:
        return numbers >= output["at_least"], ~np.isnan(numbers)
    words = values if values.dtype.kind != "f" else np.array([f"{v:g}" for v in values.tolist()])
    of_class = tables.numbers(np.array(output["classes"]))
    same = [(words == name) | (numbers == of) for name, of in zip(output["classes"], of_class, strict=True)]
    return np.argmax(same, axis=0), np.any(same, axis=0)


def levels(column: Column) -> list[str]:
    """The names of a column's encoded entries."""
    name = column["name"]
    if "words" not in column:
        return [name]
    marks = [mark for mark in ("missing", "other") if column[mark]]
    return [f"{name}={word}" for word in [*column["words"], *marks]]


def read_table(raw: Any) -> tuple[tables.Table, Place]:
    """A table from a CSV file, all as text, or from columns by name, such as a dict or a DataFrame of pandas."""
    if isinstance(raw, str | os.PathLike):
        return tables.read_csv(raw, None), Place(str(raw))
    if not hasattr(raw, "items"):
        raise InvalidInput(f"A table is the path of a CSV file, or columns by name, not {type(raw).__name__}.")
    table = {str(name): _column(values) for name, values in raw.items()}
    lengths = {name: len(values) for name, values in table.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise InvalidInput(f"The columns of a table must have one length, at least 1, not {lengths}.")
    return table, Place()


def _column(values: Any) -> np.ndarray:
    found = np.asarray(values)
    if found.ndim != 1:
        raise InvalidInput(f"A column holds one value for each row, not an array of shape {found.shape}.")
    if found.dtype.kind in "iuf":
        return found.astype(np.float64)
    absent = [value is None or value != value for value in found.tolist()]
    return np.array(["" if gone else str(v) for v, gone in zip(found.tolist(), absent, strict=True)])


class Arrays:
    """Inputs of a fixed shape, such as pictures.

    Args:
      shape: of one input.
      dtype: ``"uint8"``: numbers from 0 to 255, which the model divides by 255; else ``"float32"``.
    """

    def __init__(self, shape: Sequence[int], dtype: str):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.names: list[str] = []

    def features(self, x: jax.Array) -> jax.Array:
        """Inputs as the model takes them."""
        return scaled(x)

    def encode(self, raw: Any) -> np.ndarray:
        """``[N, ...]`` of an array, or of the field ``x`` of a file ``.npz``, or of a file ``.npy``."""
        path = f"{raw}: " if isinstance(raw, str | os.PathLike) else ""
        x = np.asarray(read_arrays(raw)["x"])
        if x.shape[1:] != self.shape and (*x.shape[1:], 1) == self.shape:
            x = x[..., None]  # pictures without an axis of channels
        if x.ndim == 0 or x.shape[1:] != self.shape or not len(x):
            raise InvalidInput(f"{path}Inputs must have the shape {self._said()}, not {x.shape}.")
        if self.dtype == np.uint8:
            if x.dtype != np.uint8:
                raise InvalidInput(f"{path}Inputs must be of type uint8, from 0 to 255 as in training, not {x.dtype}.")
        elif x.dtype.kind not in "iuf" or not np.isfinite(x).all():
            raise InvalidInput(f"{path}Inputs must be finite numbers, scaled as in training.")
        return x.astype(self.dtype)

    def _said(self) -> str:
        return f"[N, {', '.join(map(str, self.shape))}]"


def read_arrays(raw: Any) -> dict[str, Any]:
    """``{"x": ..., "y": ...}`` of a file ``.npz``, a file ``.npy`` (x alone), a dict, or an array (x alone)."""
    if isinstance(raw, str | os.PathLike):
        path = files.regular(files.expanded(raw))
        if path.suffix == ".npz":
            raw = archives.read_npz(path)
        elif path.suffix == ".npy":
            try:
                raw = {"x": np.load(path, allow_pickle=False)}
            except (OSError, ValueError, EOFError) as error:
                raise InvalidInput(f"{path} cannot be read as an array.") from error
        else:
            raise InvalidInput(f"{path}: this model takes arrays: give a file .npz with a field x, or a file .npy.")
    arrays = dict(raw) if isinstance(raw, Mapping) else {"x": raw}
    if "x" not in arrays:
        raise InvalidInput(f"There is no field x with the inputs; there is {', '.join(map(str, arrays))}.")
    return arrays


class Words:
    """Texts as the hashes of their first words (``fc.data.sources.tweets``).

    Args:
      num_words: words that the model sees.
      vocabulary: number of hash values.
    """

    def __init__(self, num_words: int, vocabulary: int):
        self.shape, self.vocabulary = (num_words,), vocabulary
        self.dtype: Any = np.int32
        self.names: list[str] = []

    def features(self, x: jax.Array) -> jax.Array:
        """Hashes as the model takes them."""
        return x

    def encode(self, raw: Any) -> np.ndarray:
        """``int32 [N, num_words]`` of a list of texts, or of the lines of a file ``.txt``."""
        return text.hashed_words(read_lines(raw), self.shape[0], self.vocabulary)


class Characters:
    """Texts as the codes of their last characters; the model predicts the character that follows.

    Args:
      length: characters that the model sees.
      encoding: ``"ascii"`` or ``"utf-8"``.
    """

    def __init__(self, length: int, encoding: str):
        self.shape, self.encoding = (length,), encoding
        self.dtype: Any = np.int32
        self.names: list[str] = []

    def features(self, x: jax.Array) -> jax.Array:
        """Codes as the model takes them."""
        return x

    def encode(self, raw: Any) -> np.ndarray:
        """``int32 [N, length]``, 0 after the end, of a list of texts, or of the lines of a file ``.txt``."""
        lines = [line.encode(self.encoding, "replace")[-self.shape[0] :] for line in read_lines(raw)]
        if empty := [number for number, line in enumerate(lines) if not line or 0 in line]:
            raise InvalidInput(f"Line {empty[0] + 1} is empty or holds a zero byte: there is nothing to go on from.")
        codes = np.zeros((len(lines), *self.shape), np.int32)
        for row, line in zip(codes, lines, strict=True):
            row[: len(line)] = np.frombuffer(line, np.uint8)
        return codes


def read_lines(raw: Any) -> list[str]:
    """The lines of a UTF-8 file, or texts as they are."""
    if isinstance(raw, str | os.PathLike):
        lines = text.read(files.expanded(raw), "utf-8-sig").splitlines()
    else:
        lines = list(raw)
        if strange := [line for line in lines if not isinstance(line, str)]:
            raise InvalidInput(f"This model takes texts, or the path of a file .txt, not {type(strange[0]).__name__}.")
    if not lines:
        raise InvalidInput("There is no text to predict from.")
    return lines


KINDS: Mapping[str, Any] = {"table": Table, "array": Arrays, "words": Words, "characters": Characters}
