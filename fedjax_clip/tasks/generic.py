"""Classification of flat or small inputs by an MLP: digits, a local file, any TFDS data set."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_clip import models
from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition, sources
from fedjax_clip.data.population import FederatedData
from fedjax_clip.tasks.base import Task, classifier, make, widths


def digits(
    hidden: Sequence[int] = (128,), held_out_forms: float = 0.2, held_out_examples: float = 0.2, seed: int = 0
) -> Task:
    """Handwritten digits by the form on which they were written: 14 natural clients, no download.

    Args:
      hidden: widths of the MLP's hidden layers.
      held_out_forms: fraction of the forms that is never trained on.
      held_out_examples: fraction of the other forms' examples that is never trained on.
      seed: of both splits.

    Raises:
      InvalidInput: data that cannot be read or learned from, fractions or widths out of range.

    Example:
      >>> task = fc.tasks.digits(hidden=(64,))

    Source: Alpaydin and Kaynak (1998), the UCI test set in scikit-learn.
    """
    return classification(sources.digits(), hidden, held_out_forms, held_out_examples, seed, classes=10)


def npz(
    path: str,
    by: str | None = None,
    num_clients: int | None = None,
    alpha: float | None = None,
    hidden: Sequence[int] = (128,),
    seed: int = 0,
    classes: int | None = None,
) -> Task:
    """Classification of a local ``.npz`` with fields ``x`` and ``y``.

    Args:
      path: the file; see ``fc.data.sources.npz``.
      by: the field that names each example's client; without it (and without offsets in the file) examples are
        dealt to ``num_clients``: evenly, or with Dirichlet(``alpha``) label skew.
      num_clients: clients to deal examples to, 10 by default.
      alpha: label skew, smaller is more skewed.
      hidden: widths of the MLP's hidden layers.
      seed: of the partition and of the splits.
      classes: see ``classification``.

    Raises:
      InvalidInput: data that cannot be read or learned from, fractions or widths out of range.

    Example:
      >>> np.savez("mine.npz", x=np.zeros((4, 2)), y=np.array([0, 1, 0, 1]), hospital=np.array(["a", "a", "b", "b"]))
      >>> task = fc.tasks.npz("mine.npz", by="hospital")
    """
    data = deal(sources.npz(path, by), num_clients, 10, alpha, seed)
    return classification(data, hidden, seed=seed, classes=classes)


def tfds(
    name: str,
    split: str = "train",
    data_dir: str | None = None,
    by: str | None = None,
    num_clients: int | None = None,
    alpha: float | None = None,
    download: bool = False,
    hidden: Sequence[int] = (128,),
    seed: int = 0,
    classes: int | None = None,
) -> Task:
    """Classification of any TFDS data set of images and labels, by default divided among 100 clients.

    Arguments as for ``npz`` and ``fc.data.sources.tfds``.

    Raises:
      InvalidInput: data that cannot be read or learned from, fractions or widths out of range.

    Example:
      >>> task = fc.tasks.tfds("mnist", num_clients=100, alpha=0.1)  # doctest: +SKIP
    """
    examples = sources.tfds(name, split, data_dir, by, download=download)
    return classification(deal(examples, num_clients, 100, alpha, seed), hidden, seed=seed, classes=classes)


def huggingface(
    path: Any,
    x: str = "image",
    y: str = "label",
    by: str | None = None,
    num_clients: int | None = None,
    alpha: float | None = None,
    hidden: Sequence[int] = (128,),
    seed: int = 0,
    classes: int | None = None,
) -> Task:
    """Classification of a data set of Hugging Face's ``datasets``: a local file, or the data set itself.

    Args:
      path: see ``fc.data.sources.huggingface``.
      x, y: the columns of inputs and classes.
      by: the column that names each example's client; without it examples are dealt as for ``npz``.
      num_clients, alpha, hidden, seed, classes: as for ``npz``.

    Raises:
      InvalidInput: data that cannot be read or learned from, fractions or widths out of range.

    Example:
      >>> import datasets
      >>> rows = {"dose": [[0.5], [1.0], [2.0], [0.0]], "died": [0, 1, 1, 0], "ward": ["a", "b", "a", "b"]}
      >>> task = fc.tasks.huggingface(datasets.Dataset.from_dict(rows), x="dose", y="died", by="ward")
    """
    data = deal(sources.huggingface(path, {"x": x, "y": y}, by), num_clients, 10, alpha, seed)
    return classification(data, hidden, seed=seed, classes=classes)


def classification(
    data: FederatedData,
    hidden: Sequence[int] = (128,),
    held_out_clients: float = 0.2,
    held_out_examples: float = 0.2,
    seed: int = 0,
    classes: int | None = None,
) -> Task:
    """An MLP on any population of ``{"x": [N, ...], "y": int[N]}``; whole clients and examples are held out.

    Args:
      data: any population of these fields.
      hidden: widths of the hidden layers.
      held_out_clients: fraction of the clients that is never trained on.
      held_out_examples: fraction of the other clients' examples that is never trained on.
      seed: of both splits.
      classes: the number of classes, public as an epsilon needs; computed from the labels if ``None``.

    Raises:
      InvalidInput: data that cannot be read or learned from, fractions or widths out of range.

    Example:
      >>> task = fc.tasks.classification(fc.data.partition.dirichlet(digits.examples, 50, alpha=0.1))
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    fields = data.fields()
    if missing := {"x", "y"} - set(fields):
        raise InvalidInput(
            f"Classification needs fields x and y: {sorted(missing)} is missing; there is {sorted(fields)}."
        )
    labels = fields["y"]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        found = f"{labels.dtype} of shape {labels.shape}, beginning {labels.flat[:3].tolist()}"
        raise InvalidInput(f"Labels y must be whole numbers from 0, one an example, not {found}.")
    last = int(labels.max())
    if classes is not None:
        if last >= checks.count("classes", classes, most=2**20):
            raise InvalidInput(f"Labels y run up to {last}, and {classes} classes from 0 to {classes - 1}.")
    elif last > 2 * (several := len(np.unique(labels))) + 10:  # the model gets an output for each class
        raise InvalidInput(
            f"Labels y take {several} values and run up to {last}: number the classes from 0, as "
            "np.unique(y, return_inverse=True)[1] does."
        )
    inputs = fields["x"]
    if inputs.dtype.kind not in "iuf":
        raise InvalidInput(f"Inputs x must be numbers, not {inputs.dtype}.")
    if inputs.dtype != np.uint8:
        with np.errstate(over="ignore"):
            inputs = inputs.astype(np.float32)
        if (bad := np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(1))).size:
            raise InvalidInput(f"Inputs x of example {bad[0]} are not finite, as are those of {bad.size} in all.")
    data = dataclasses.replace(data, examples={"x": inputs, "y": labels.astype(np.int32)})
    train, clients = data.split_clients(held_out_clients, seed)
    train, examples = train.split_examples(held_out_examples, seed)
    model = models.MLP(widths(hidden), last + 1 if classes is None else classes)
    words = (data.labels or {}).get("y", ())
    names = [words[label] if label < len(words) else str(label) for label in range(model.num_outputs)]
    task = make(train, {"examples": examples, "clients": clients}, model, classifier(model), names)
    fitted = "the number of classes from the clients' labels: give classes=10, say" if classes is None else ""
    return dataclasses.replace(task, fitted=fitted)


def deal(data, num_clients: int | None, default: int, alpha: float | None, seed: int) -> FederatedData:
    """Deals examples to clients, evenly or with label skew; a population keeps its own clients."""
    if isinstance(data, FederatedData):
        if num_clients is not None or alpha is not None:
            raise InvalidInput("The data name their own clients: leave num_clients and alpha out.")
        return data
    num_clients = default if num_clients is None else num_clients
    if alpha is None:
        return partition.iid(data, num_clients, seed)
    return partition.dirichlet(data, num_clients, alpha, seed=seed)
