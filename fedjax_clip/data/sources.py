"""Real data: scikit-learn's digits by writer, local .npz files, and anything that TFDS knows.

Nothing heavy is imported before it is needed, and nothing is downloaded unasked.
"""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fedjax_clip.data import partition
from fedjax_clip.data.population import FederatedData, count_examples
from fedjax_clip.typing import InvalidInput

PathLike = str | os.PathLike[str]

_INSTALL = 'pip install "fedjax_clip[data]"'

# Where each of the 14 NIST forms begins: the template of labels on a form repeats in file order.
_FORMS = [0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667, 1797]

# Arrays of a saved population that are not fields of its examples.
_RESERVED = "offsets", "names", "weights"


def digits() -> FederatedData:
    """1797 handwritten digits; the clients are the 14 NIST forms on which they were written.

    Returns:
      ``{"x": float32 [8, 8, 1] in 0 .. 1, "y": int32}``, clients ``form00 .. form13``.

    Raises:
      InvalidInput: scikit-learn is not installed.

    Example:
      >>> digits()
      FederatedData(14 clients, 1797 examples, x: ('float32', (8, 8, 1)), y: ('int32', ()))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise InvalidInput(f"The digits come with scikit-learn, which is not installed: {_INSTALL}") from e
    bunch = load_digits()
    examples = {"x": (bunch.images[..., None] / 16).astype(np.float32), "y": bunch.target.astype(np.int32)}
    return FederatedData(examples, np.array(_FORMS), [f"form{i:02d}" for i in range(len(_FORMS) - 1)])


def npz(path: PathLike, by: str | None = None) -> dict[str, Any] | FederatedData:
    """Reads a local .npz file; each array in it is a field ``[N, ...]``.

    A file that holds ``offsets``, as ``save_npz`` writes it, is a population already;
    a field ``"a/b"`` is then the field ``"b"`` of the field ``"a"``.

    Args:
      path: the file. Pickled objects in it are never loaded.
      by: the field that says whose each example is, see ``partition.natural``.

    Returns:
      The examples as a dict, or a ``FederatedData`` if ``by`` is given or the file
      holds ``offsets``.

    Raises:
      InvalidInput: a file that is missing, damaged, empty, pickled or inconsistent.

    Example:
      >>> save_npz(digits(), "/tmp/digits.npz")
      >>> npz("/tmp/digits.npz").num_clients
      14
    """
    path = Path(path)
    arrays = _read_npz(path)
    try:
        if "offsets" not in arrays:
            count_examples(arrays)
            return arrays if by is None else partition.natural(arrays, by)
        if by is not None:
            raise InvalidInput(f"It holds a population already: it cannot be grouped by {by!r} again.")
        offsets, names, weights = (arrays.pop(name, None) for name in _RESERVED)
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
      InvalidInput: a field that .npz cannot hold, a path that cannot be written.
    """
    path = Path(path)
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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "x") as archive:
            for name, x in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(x), allow_pickle=False)
        os.replace(temporary, path)
    except OSError as e:
        raise InvalidInput(f"{path} cannot be written: {e.strerror or e}.") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def tfds(
    name: str,
    split: str = "train",
    data_dir: PathLike | None = None,
    by: str | None = None,
    image: str = "image",
    label: str = "label",
    cache_dir: PathLike | None = None,
    fields: Sequence[str] | None = None,
    download: bool = False,
) -> dict[str, np.ndarray] | FederatedData:
    """Reads a TFDS data set, without TensorFlow: converted once to arrays, then memory-mapped.

    The values stay as they are stored: an image is uint8 0 .. 255, to be scaled in
    the model or the task, where it costs a quarter of the memory and of the transfer.
    Text is an array of bytes. A later call reads the cache alone and does not import
    TFDS; it goes back to TFDS when what is prepared under ``data_dir`` has changed.

    Args:
      name: ``"mnist"``, ``"emnist/byclass"``, ``"mnist:3.0.1"`` ...
      split: ``"train"``, ``"test"``, ``"train[:10%]"``, ``"train+test"`` ...
      data_dir: where TFDS keeps prepared data; by default $TFDS_DATA_DIR, else
        ``~/tensorflow_datasets``.
      by: the field that says whose each example is, see ``partition.natural``.
      image: the field that becomes ``x``.
      label: the field that becomes ``y``; all others keep their names, and the
        parts of a nested field are called ``"attributes/age"``.
      cache_dir: where the arrays are kept; by default $FEDJAX_CLIP_CACHE, else
        ``~/.cache/fedjax_clip``.
      fields: the fields to read, by their names in TFDS; all if ``None``.
      download: whether to fetch and prepare a data set that is not yet prepared in
        the array_record format. Without a network TFDS tries for minutes.

    Returns:
      The examples as a dict of memory-mapped arrays, or a ``FederatedData`` over
      them if ``by`` is given.

    Raises:
      InvalidInput: missing packages, an unknown name or split, data that is not
        prepared, fields whose shape varies from example to example ...

    Example:
      >>> path = build_digits_tfds("/tmp/tfds")
      >>> tfds("fedjax_digits", data_dir="/tmp/tfds", by="client_id", cache_dir="/tmp/cache").num_clients
      14
    """
    data_dir = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()
    cache_dir = Path(cache_dir or os.environ.get("FEDJAX_CLIP_CACHE") or "~/.cache/fedjax_clip").expanduser()
    fields = None if fields is None else sorted(fields)
    request = {"name": name, "split": split, "data_dir": str(data_dir), "by": by, "fields": fields, "layout": 1}
    digest = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]
    entry = cache_dir / "tfds" / re.sub(r"[^\w.-]+", "_", f"{name}-{split}-{digest}")
    try:
        loaded = _open_entry(entry)
        if loaded is None:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with _locked(entry.with_name(entry.name + ".lock")):
                loaded = _open_entry(entry)
                if loaded is None:
                    convert = lambda to: _convert(to, name, split, data_dir, by, fields, download)  # noqa: E731
                    _write_entry(entry, convert)
                    loaded = _open_entry(entry)
    except OSError as e:
        raise InvalidInput(f"The cache {cache_dir} cannot be used: {e.strerror or e}.") from e
    if loaded is None:
        raise InvalidInput(f"The data set {name!r} changes under {data_dir} while it is read.")
    examples, meta = loaded
    for old, new, usual in ((image, "x", "image"), (label, "y", "label")):
        if old in examples:
            if new != old and new in examples:
                raise InvalidInput(f"Field {old!r} of {name!r} cannot become {new!r}: there is such a field already.")
            examples = {new if field == old else field: x for field, x in examples.items()}
        elif old != usual:
            _no_field(old, examples, name)
    if by is None:
        return examples
    return FederatedData(examples, np.array(meta["offsets"]), meta["names"])


def build_digits_tfds(data_dir: PathLike) -> Path:
    """Prepares the digits as the TFDS data set ``fedjax_digits``, without a network.

    Its fields are ``image`` (uint8 ``[8, 8, 1]``, 0 .. 16), ``label`` and
    ``client_id``; clients and order are those of ``digits()``.

    Args:
      data_dir: where TFDS keeps prepared data.

    Returns:
      The directory of the prepared data set.

    Raises:
      InvalidInput: missing packages.
    """
    _import_tfds()
    from fedjax_clip.data.tfds_digits import FedjaxDigits

    digits()
    builder = FedjaxDigits(data_dir=os.fspath(data_dir), file_format="array_record")
    try:
        builder.download_and_prepare()
    except OSError as e:
        raise InvalidInput(f"The digits cannot be prepared under {data_dir}: {e.strerror or e}.") from e
    return Path(builder.data_dir)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    name = None
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InvalidInput(f"{path} is not an .npz file: it holds one bare array.")
        with file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as e:
        raise InvalidInput(f"There is no file {path}.") from e
    except (OSError, EOFError, ValueError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error) as e:
        if isinstance(e, InvalidInput):
            raise
        if "pickle" in str(e) or "Object arrays" in str(e):
            raise InvalidInput(f"{path} is not plain arrays; pickled Python objects are never loaded.") from e
        raise InvalidInput(f"{path} is not a whole .npz file: {_line(e)}") from e
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise InvalidInput(f"{path} holds {name!r}, which is not an array.")
    if not arrays:
        raise InvalidInput(f"{path} is empty: it holds no arrays.")
    return arrays


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
        node[name] = x
    return tree
