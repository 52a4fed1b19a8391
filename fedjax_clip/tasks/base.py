"""The type of a task, and the losses that tasks share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.core import checks, files, tree
from fedjax_clip.core.loss import calibrated
from fedjax_clip.core.stateful import with_state
from fedjax_clip.core.types import Array, InvalidInput, Params, PerExampleLoss
from fedjax_clip.data.population import FederatedData
from fedjax_clip.tasks.predictor import Predictor, of_arrays
from fedjax_clip.training.scores import Summary


class Sample(NamedTuple):
    """What a model of text answers to a prompt, beside the true answer.

    Example:
      >>> fc.tasks.Sample("To be, or not to be?", "That is the question.", "No.").generated
      'No.'
    """

    prompt: str
    answer: str
    generated: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A federated learning problem.

    Attributes:
      data: the population to train on.
      evaluation: held-out populations by name, ``{"examples": ..., "clients": ...}``.
      init: ``key -> params``.
      per_example_loss: ``(params, batch, key) -> (losses[B], {metric: values[B]})``.
      summarise: scores of a held-out population that are not means, see ``fc.evaluator``.
      frozen: the parameters that stay fixed, see ``fc.partially_frozen``; ``None`` if all train.
      fitted: the statistics computed exactly from the clients' data before training, and the alternative to give. No
        epsilon of the training covers them, see ``refuse_fitted``. Empty if there are none.
      predictor: how the model is applied to new data, see ``load``; ``None`` if it cannot be.
      samples: ``params -> [Sample, ...]``, what the model generates for held-out prompts; ``None`` if it cannot.
      save: ``(params, directory)`` writes the model as other programs read it; ``None`` if it cannot be.
      evaluated_at_once: held-out examples that fit in memory together.

    Example:
      >>> task = fc.tasks.digits()
      >>> algorithm = fc.fedavg(task.per_example_loss, optax.sgd(0.1))
      >>> result = fc.train(algorithm, task.data, task.init(key), rounds=5)
    """

    data: FederatedData
    evaluation: Mapping[str, FederatedData]
    init: Callable[[Array], Params]
    per_example_loss: PerExampleLoss
    summarise: Summary | None = None
    frozen: str | None = None
    fitted: str = ""
    predictor: Predictor | None = None
    samples: Callable[[Params], Sequence[Sample]] | None = None
    save: Callable[[Params, files.PathLike], None] | None = None
    evaluated_at_once: int = 1024


def refuse_fitted(task: Task) -> None:
    """Refuses a task that used its clients' data before training, because no epsilon would cover that.

    A quantile is one client's value, a mean moves with each client, and the accountant sees the training alone.

    Args:
      task: to be trained under a claimed epsilon.

    Raises:
      InvalidInput: the task computed exact statistics; the message says what to give instead.

    Example:
      >>> fc.tasks.refuse_fitted(fc.tasks.digits())
    """
    if task.data.lives is not None:
        raise InvalidInput(
            "An epsilon counts clients that are there in all rounds with the same examples, and this task is a stream: "
            "train without --delta."
        )
    if task.fitted:
        raise InvalidInput(
            f"An epsilon counts the training alone, and this task has computed {task.fitted}, or train without --delta."
        )


def classifier(model: nn.Module) -> PerExampleLoss:
    """Softmax cross-entropy and ``accuracy`` of a Flax module of logits, on batches ``{"x", "y"}``.

    Inputs of type uint8 (images) are divided by 255. Loss and gradient are NaN for a label outside 0 to classes - 1.

    Args:
      model: a module that maps ``[B, ...]`` to logits ``[B, classes]``.

    Example:
      >>> per_example_loss = fc.tasks.classifier(fc.models.MLP((128,), 10))
    """

    def per_example_loss(params, batch, key):
        logits = jnp.asarray(model.apply(params, scaled(batch["x"])))
        return cross_entropy(calibrated(logits, batch), batch["y"]), {"accuracy": hits(logits, batch["y"])}

    return per_example_loss


def classifier_with_state(model: nn.Module) -> PerExampleLoss:
    """``classifier`` of a module with ``batch_stats``, as a loss of ``fc.local.with_state``.

    Args:
      model: a module of ``(x [B, ...], weights [B] or None)``, such as ``fc.models.ResNet(10, norm="batch")``.

    Example:
      >>> per_example_loss = fc.tasks.classifier_with_state(fc.models.ResNet(10, norm="batch"))
    """

    def loss_and_state(params, batch, weights, key):
        logits, changed = model.apply(params, scaled(batch["x"]), weights, mutable=["batch_stats"])
        values = {"accuracy": hits(logits, batch["y"])}
        return cross_entropy(calibrated(logits, batch), batch["y"]), values, {**params, **changed}

    return with_state(loss_and_state)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Softmax cross-entropy ``[...]`` of logits ``[..., classes]``; NaN, gradient included, if a label has no class.

    optax's takes -1 for the last class. Beyond the last class its loss is NaN, but its gradient is finite.
    """
    known = (labels >= 0) & (labels < logits.shape[-1])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses * jnp.where(known, 1, jnp.nan).astype(losses.dtype)


def regressor(model: nn.Module) -> PerExampleLoss:
    """Half the squared error of a Flax module with one output, on batches ``{"x", "y"}``.

    Args:
      model: a module that maps ``[B, ...]`` to ``[B, 1]``.

    Example:
      >>> per_example_loss = fc.tasks.regressor(fc.models.MLP((), 1))  # linear regression
    """

    def per_example_loss(params, batch, key):
        predicted = jnp.asarray(model.apply(params, batch["x"]))[:, 0]
        return 0.5 * (predicted - batch["y"].astype(predicted.dtype)) ** 2

    return per_example_loss


def binary_classifier(model: nn.Module) -> PerExampleLoss:
    """Logistic loss, ``accuracy`` and ``probability`` of the positive class, on batches ``{"x", "y"}``.

    Args:
      model: a Flax module from ``x [B, ...]`` to one logit, ``[B, 1]``.

    Example:
      >>> per_example_loss = fc.tasks.binary_classifier(fc.models.MLP((), 1))  # logistic regression
    """

    def per_example_loss(params, batch, key):
        logits = jnp.asarray(model.apply(params, batch["x"]))[:, 0]
        right = (logits > 0) == (batch["y"] == 1)
        values = {"accuracy": right.astype(jnp.float32), "probability": jax.nn.sigmoid(logits)}
        return optax.losses.sigmoid_binary_cross_entropy(logits, batch["y"].astype(logits.dtype)), values

    return per_example_loss


def penalised(per_example_loss: PerExampleLoss, l2: float) -> PerExampleLoss:
    """Adds ``l2 / 2 * (sum of the kernels' squares)`` in training, not in evaluation: ridge for a linear regressor.

    Args:
      per_example_loss: the loss without the penalty.
      l2: at least 0; parameters of more than one axis count as kernels.

    Raises:
      InvalidInput: an l2 that is negative or not a number.

    Example:
      >>> loss = fc.tasks.penalised(fc.tasks.regressor(fc.models.MLP((), 1)), l2=0.01)  # ridge regression
    """
    checks.within("l2", l2, 0, finite=True)

    def loss(params, batch, key):
        out = per_example_loss(params, batch, key)
        losses, values = out if isinstance(out, tuple) else (out, {})
        squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params) if x.ndim > 1]
        return losses + (0 if key is None else l2 / 2 * sum(squares)), values

    return loss


def make(
    train: FederatedData,
    evaluation: Mapping[str, FederatedData],
    model: nn.Module,
    loss: PerExampleLoss,
    classes: Sequence[str] = (),
) -> Task:
    """A task that trains a Flax module on the field ``x``; names of ``classes`` let it be applied to new arrays."""
    if 0 in (shape := train.fields()["x"].shape[1:]):
        raise InvalidInput(f"Inputs x have the shape {shape}: there is nothing to learn from.")
    dtype = train.fields()["x"].dtype
    sample = scaled(jnp.zeros((1, *shape), dtype))
    predictor = of_arrays(model, shape, dtype, classes) if classes else None
    return Task(train, evaluation, lambda key: model.init(key, sample), loss, predictor=predictor)


def restored(arrays: Mapping[str, np.ndarray], shapes: Params, what: str) -> Params:
    """Named arrays in the structure of ``shapes``.

    Args:
      arrays: as ``params.npz`` holds them.
      shapes: of the model's parameters, as ``jax.eval_shape`` gives them.
      what: holds the arrays, for the message.

    Raises:
      InvalidInput: an array is missing, is not the model's or has another shape.
    """
    wanted = {name: x.shape for name, x in tree.named_leaves(shapes)}
    found = {name: x.shape for name, x in arrays.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InvalidInput(f"{what} does not fit the model: {name} is {found.get(name)}, not {wanted.get(name)}.")
    return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in wanted])


def scaled(x: Array) -> Array:
    """Inputs of type uint8 (images) divided by 255."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def hits(logits: Array, labels: Array) -> Array:
    """1.0 where the largest of the logits ``[..., classes]`` is the label's ``[...]``, else 0.0.

    The first of several, or the first NaN, counts as the largest: ``jnp.argmax``, of reductions that a GPU fuses.
    """
    largest = (logits == jnp.max(logits, axis=-1, keepdims=True)) | jnp.isnan(logits)
    number = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    first = jnp.min(jnp.where(largest, number, logits.shape[-1]), axis=-1)
    return (first == labels.astype(jnp.int32)).astype(jnp.float32)


def widths(hidden: int | Sequence[int]) -> tuple[int, ...]:
    """The widths of hidden layers, checked."""
    given = hidden if isinstance(hidden, Iterable) and not isinstance(hidden, str) else (hidden,)
    return tuple(checks.count("hidden, a width,", width, most=2**20) for width in given)


def check_positive(**values: int) -> None:
    """Refuses a number below 1, or one whose data would not fit in memory, by its name."""
    for name, value in values.items():
        checks.count(name, value, most=10**6)
