"""Tasks: data, a model, a loss and its metrics, ready to train."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip import models
from fedjax_clip.data import partition, sources
from fedjax_clip.data.population import FederatedData
from fedjax_clip.typing import Array, InvalidInput, Params, PerExampleLoss


@dataclasses.dataclass(frozen=True)
class Task:
    """A federated learning problem.

    Attributes:
      data: the population to train on.
      evaluation: held-out populations by name, ``{"examples": ..., "clients": ...}``.
      init: ``key -> params``.
      per_example_loss: ``(params, batch, key) -> (losses[B], {metric: values[B]})``.
    """

    data: FederatedData
    evaluation: Mapping[str, FederatedData]
    init: Callable[[Array], Params]
    per_example_loss: PerExampleLoss


def classifier(model: nn.Module) -> PerExampleLoss:
    """Softmax cross-entropy and ``accuracy`` of a Flax module of logits, on batches ``{"x", "y"}``.

    Inputs of type uint8 (images) are divided by 255.
    """

    def per_example_loss(params, batch, key):
        logits = jnp.asarray(model.apply(params, _scaled(batch["x"])))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"accuracy": (jnp.argmax(logits, -1) == batch["y"]).astype(jnp.float32)}

    return per_example_loss


def regressor(model: nn.Module) -> PerExampleLoss:
    """Half the squared error of a Flax module with one output, on batches ``{"x", "y"}``."""

    def per_example_loss(params, batch, key):
        return 0.5 * (jnp.asarray(model.apply(params, batch["x"]))[:, 0] - batch["y"]) ** 2

    return per_example_loss


def digits(
    hidden: Sequence[int] = (128,), held_out_forms: float = 0.2, held_out_examples: float = 0.2, seed: int = 0
) -> Task:
    """Handwritten digits by the form on which they were written: 14 natural clients, no download.

    Args:
      hidden: widths of the MLP's hidden layers.
      held_out_forms: fraction of the forms that is never trained on.
      held_out_examples: fraction of the other forms' examples that is never trained on.
      seed: of both splits.

    Source: Alpaydin and Kaynak (1998), the UCI test set in scikit-learn.
    """
    return classification(sources.digits(), hidden, held_out_forms, held_out_examples, seed)


def npz(
    path: str,
    by: str | None = None,
    num_clients: int | None = None,
    alpha: float | None = None,
    hidden: Sequence[int] = (128,),
    seed: int = 0,
) -> Task:
    """Classification of a local ``.npz`` with fields ``x`` and ``y``.

    Args:
      path: the file; see ``fc.sources.npz``.
      by: the field that names each example's client; without it (and without offsets in the file) examples are
        dealt to ``num_clients``: evenly, or with Dirichlet(``alpha``) label skew.
      num_clients: clients to deal examples to, 10 by default.
      alpha: label skew, smaller is more skewed.
      hidden: widths of the MLP's hidden layers.
      seed: of the partition and of the splits.
    """
    return classification(_deal(sources.npz(path, by), num_clients, 10, alpha, seed), hidden, seed=seed)


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
) -> Task:
    """Classification of any TFDS data set of images and labels, by default dealt to 100 clients.

    Arguments as for ``npz`` and ``fc.sources.tfds``.
    """
    examples = sources.tfds(name, split, data_dir, by, download=download)
    return classification(_deal(examples, num_clients, 100, alpha, seed), hidden, seed=seed)


def classification(
    data: FederatedData,
    hidden: Sequence[int] = (128,),
    held_out_clients: float = 0.2,
    held_out_examples: float = 0.2,
    seed: int = 0,
) -> Task:
    """An MLP on any population of ``{"x": [N, ...], "y": int[N]}``; whole clients and examples are held out."""
    hidden = (hidden,) if isinstance(hidden, int) else hidden
    fields = data.fields()
    if missing := {"x", "y"} - set(fields):
        raise InvalidInput(
            f"Classification needs fields x and y: {sorted(missing)} is missing; there is {sorted(fields)}."
        )
    labels = fields["y"]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        found = f"{labels.dtype} of shape {labels.shape}, beginning {labels.flat[:3].tolist()}"
        raise InvalidInput(f"Labels y must be whole numbers from 0, one an example, not {found}.")
    inputs = fields["x"]
    if not np.issubdtype(inputs.dtype, np.number):
        raise InvalidInput(f"Inputs x must be numbers, not {inputs.dtype}.")
    if inputs.dtype != np.uint8:
        inputs = inputs.astype(np.float32)
        if (bad := np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(1))).size:
            raise InvalidInput(f"Inputs x of example {bad[0]} are not finite, as are those of {bad.size} in all.")
    data = dataclasses.replace(data, examples={"x": inputs, "y": labels.astype(np.int32)})
    if any(not isinstance(width, int) or width < 1 for width in hidden):
        raise InvalidInput(f"hidden must be widths of at least 1, not {hidden}.")
    train, clients = data.split_clients(held_out_clients, seed)
    train, examples = train.split_examples(held_out_examples, seed)
    model = models.MLP(tuple(hidden), int(labels.max()) + 1)
    return _task(train, {"examples": examples, "clients": clients}, model, classifier(model))


def linear_regression(num_clients: int = 100, noise: float = 0.1, seed: int = 0) -> Task:
    """y = 2x + 1 + noise over ``num_clients`` clients of 10 examples: must end near weight 2, bias 1."""
    _check_positive(num_clients=num_clients)
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (10 * num_clients, 1)).astype(np.float32)
    y = (2 * x[:, 0] + 1 + noise * rng.normal(size=len(x))).astype(np.float32)
    return _regression({"x": x, "y": y}, num_clients, models.MLP((), 1))


def mlp_regression(num_clients: int = 20, seed: int = 0) -> Task:
    """sin(3x) on clients that each see one stretch of the axis; for Adam and 10 local epochs."""
    _check_positive(num_clients=num_clients)
    rng = np.random.default_rng(seed)
    centre = np.repeat(np.linspace(-0.9, 0.9, num_clients), 40)
    x = (centre + 0.1 * rng.normal(size=centre.shape))[:, None].astype(np.float32)
    y = (np.sin(3 * x[:, 0]) + 0.05 * rng.normal(size=len(x))).astype(np.float32)
    return _regression({"x": x, "y": y}, num_clients, models.MLP((32,), 1))


def relu_classifier(num_clients: int = 10, seed: int = 0) -> Task:
    """A 10-100-10 ReLU network on ten Gaussian classes in ten dimensions, with Dirichlet(1) label skew."""
    _check_positive(num_clients=num_clients)
    rng = np.random.default_rng(seed)
    y = rng.integers(10, size=200 * num_clients).astype(np.int32)
    x = (2.0 * np.eye(10)[y] + 0.5 * rng.normal(size=(len(y), 10))).astype(np.float32)
    data = partition.dirichlet({"x": x, "y": y}, num_clients, alpha=1.0, seed=seed)
    train, examples = data.split_examples(0.2, seed)
    model = models.MLP((100,), 10)
    return _task(train, {"examples": examples}, model, classifier(model))


def two_nodes() -> Task:
    """Distributed gradient descent on two nodes: 0.5 (w - 3)^2 and 0.5 (w + 1)^2, whose optimum is w = 1."""
    data = FederatedData.from_clients(
        {name: {"x": np.zeros((1, 1), np.float32), "y": np.full(1, y, np.float32)} for name, y in (("a", 3), ("b", -1))}
    )

    def per_example_loss(params, batch, key):
        return 0.5 * (params["w"] - batch["y"]) ** 2

    return Task(data, {"examples": data}, lambda key: {"w": jnp.zeros((), jnp.float32)}, per_example_loss)


def _regression(examples: dict[str, np.ndarray], num_clients: int, model: nn.Module) -> Task:
    owner = np.repeat(np.arange(num_clients), len(examples["y"]) // num_clients)
    train, held_out = FederatedData.from_assignment(examples, owner).split_examples(0.2)
    return _task(train, {"examples": held_out}, model, regressor(model))


def _task(
    train: FederatedData, evaluation: Mapping[str, FederatedData], model: nn.Module, loss: PerExampleLoss
) -> Task:
    sample = _scaled(jnp.zeros((1, *train.fields()["x"].shape[1:]), train.fields()["x"].dtype))
    return Task(train, evaluation, lambda key: model.init(key, sample), loss)


def _deal(data, num_clients: int | None, default: int, alpha: float | None, seed: int) -> FederatedData:
    if isinstance(data, FederatedData):
        if num_clients is not None or alpha is not None:
            raise InvalidInput("The data have clients of their own: num_clients and alpha have nothing to say.")
        return data
    num_clients = default if num_clients is None else num_clients
    if alpha is None:
        return partition.iid(data, num_clients, seed)
    return partition.dirichlet(data, num_clients, alpha, seed=seed)


def _scaled(x: Array) -> Array:
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InvalidInput(f"{name} must be at least 1, not {value}.")
