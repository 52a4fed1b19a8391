"""Populations in .npz files."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_clip.core import checks, files
from fedjax_clip.core.files import PathLike
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition
from fedjax_clip.data.population import FederatedData, count_examples

# Arrays of a saved population that are not fields of its examples.
_RESERVED = "offsets", "names", "weights"


def npz(path: PathLike, by: str | None = None) -> dict[str, Any] | FederatedData:
    """Reads a local .npz file; each array in it is a field ``[N, ...]``.

    A file that holds ``offsets``, as ``save_npz`` writes it, is a population already;
    a field ``"a/b"`` is then the field ``"b"`` of the field ``"a"``.

    Args:
      path: the file. Pickled objects in it are never loaded.
      by: the field that names each example's client, see ``partition.natural``.

    Returns:
      The examples as a dict, or a ``FederatedData`` if ``by`` is given or the file
      holds ``offsets``.

    Raises:
      InvalidInput: a file that is missing, damaged, empty, pickled or inconsistent.

    Example:
      >>> fc.data.sources.save_npz(fc.data.sources.digits(), "digits.npz")
      >>> fc.data.sources.npz("digits.npz").num_clients
      14
    """
    path = files.expanded(path)
    arrays = read_npz(path)
    try:
        if "offsets" not in arrays:
            count_examples(arrays)
            return arrays if by is None else partition.natural(arrays, by)
        if by is not None:
            raise InvalidInput(f"It holds a population already: it cannot be grouped by {by!r} again.")
        offsets = arrays.pop("offsets")
        names, weights = arrays.pop("names", None), arrays.pop("weights", None)
        if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
            raise InvalidInput(f"names must be strings [clients], not {names.dtype} of shape {names.shape}.")
        examples = _nest(arrays)
        return FederatedData(examples, offsets, None if names is None else names.tolist(), weights)
    except InvalidInput as e:
        raise InvalidInput(f"{path}: {e}") from e


def save_npz(data: FederatedData, path: PathLike) -> None:
    """Writes a population to one .npz file, whole or not at all; ``npz`` reads it back.

    Equal populations give equal bytes.

    Args:
      data: the population; its examples are a dict of arrays, possibly nested.
      path: the file, replaced if it is there.

    Raises:
      InvalidInput: a stream, a field that .npz cannot hold, a path that cannot be written.

    Example:
      >>> fc.data.sources.save_npz(data, "mine.npz")
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    if data.lives is not None:
        raise InvalidInput("An .npz file holds no stream: save the population before its rules, and apply them again.")
    path = files.expanded(path)
    fields = _flatten(data.examples)
    for name, x in fields.items():
        if name.split("/")[0] in _RESERVED:
            raise InvalidInput(f"Field {name!r} has a name that .npz files keep for the clients: rename it.")
        if x.dtype.kind not in "biufcSUmM":
            raise InvalidInput(f"Field {name!r} holds {x.dtype}, which an .npz file cannot hold: convert it.")
    arrays = fields | {"offsets": data.offsets}
    if data.names is not None:
        arrays["names"] = np.array([data.name(c) for c in range(data.num_clients)])
    if data.weights is not None:
        arrays["weights"] = np.asarray(data.weights)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_npz(path, arrays)
    except OSError as e:
        raise InvalidInput(f"{path} cannot be written: {e.strerror or e}.") from e


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, of any lengths; their size in memory is checked before they are read."""
    try:
        with open(files.regular(path), "rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise InvalidInput(f"{path} is not an .npz file: it holds one bare array.")
            if zipfile.is_zipfile(file):
                _check_members(path, zipfile.ZipFile(file))
            file.seek(0)
            loaded: Any = np.load(file, allow_pickle=False)
            arrays = {name: loaded[name] for name in loaded.files}
    except FileNotFoundError as e:
        raise InvalidInput(f"There is no file {path}.") from e
    except InvalidInput:
        raise
    except Exception as e:  # a damaged file makes NumPy raise almost anything
        if "pickle" in str(e) or "Object arrays" in str(e):
            raise InvalidInput(f"{path} is not plain arrays; pickled Python objects are never loaded.") from e
        raise InvalidInput(
            f"{path} is not a whole .npz file: {str(e).splitlines()[0] if str(e) else type(e).__name__}."
        ) from e
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise InvalidInput(f"{path} holds {name!r}, which is not an array.")
    if not arrays:
        raise InvalidInput(f"{path} is empty: it holds no arrays.")
    return arrays


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses arrays that do not fit in memory, and arrays whose header and size disagree."""
    files.check_fits(path, sum(member.file_size for member in archive.infolist()))
    for member in archive.infolist():
        with archive.open(member) as file:
            if file.read(6) != np.lib.format.MAGIC_PREFIX:
                continue
            file.seek(0)
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            promised = math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and promised != member.file_size - file.tell():
                raise ValueError(
                    f"{member.filename} promises {promised:,} bytes and has {member.file_size - file.tell():,}"
                )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as ``{"a/b": leaf}``."""
    if not isinstance(tree, Mapping):
        if not prefix or isinstance(tree, list | tuple):
            raise InvalidInput("Only examples that are a dict of arrays, possibly nested, can be saved.")
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, x in tree.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise InvalidInput(f"The field name {name!r} cannot be saved: it must be a string without '/'.")
        flat |= _flatten(x, f"{prefix}/{name}" if prefix else name)
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, x in flat.items():
        *above, name = path.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise InvalidInput(f"Field {path!r} lies within another field.")
        if name in node:
            raise InvalidInput(f"Another field lies within field {path!r}.")
        node[name] = x
    return tree
