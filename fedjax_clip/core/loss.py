"""The user's loss of one batch: checked, weighted, differentiated."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks, tree
from fedjax_clip.core.metrics import Mean, check_names
from fedjax_clip.core.types import Array, Batch, InvalidInput, Metrics, Params, PerExampleLoss, PyTree

MARGINS = "margins"  # the name under which a loss finds its client's margins in a batch
Gradient = Callable[[PerExampleLoss, Params, Batch, Array, Array], tuple[PyTree, Metrics]]


def batch_loss(
    per_example_loss: PerExampleLoss, params: Params, batch: Batch, weights: Array, key: Array | None
) -> tuple[Array, Metrics]:
    """The weighted sum of a batch's losses, and its report: ``loss``, ``examples`` and the loss's other metrics.

    Args:
      per_example_loss: ``(params, batch, key) -> losses[B]``, or ``(losses[B], {name: values[B]})``. The key is
        ``None`` in evaluation: then nothing is random (no dropout).
      params: pytree of parameters.
      batch: pytree of ``[B, ...]``.
      weights: ``[B]`` example weights, 0 for padding.
      key: PRNG key.

    Raises:
      InvalidInput: a loss that is not one number for each example.
    """
    report = jax.tree.map(jnp.sum, batch_terms(per_example_loss, params, batch, weights, key))
    return report["loss"].total, report


def batch_terms(
    per_example_loss: PerExampleLoss, params: Params, batch: Batch, weights: Array, key: Array | None
) -> Metrics:
    """The report of ``batch_loss`` before it is summed over the examples: ``[B]`` in place of each number."""
    values = example_values(per_example_loss, params, batch, key, len(weights))
    return {name: Mean.each(x, weights) for name, x in values.items()} | {"examples": (weights > 0).astype(jnp.float32)}


def example_values(
    per_example_loss: PerExampleLoss, params: Params, batch: Batch, key: Array | None, size: int
) -> dict[str, Array]:
    """``{"loss": losses[size], name: values[size]}`` of a batch, checked.

    Raises:
      InvalidInput: a loss that is not one number for each example.
    """
    checks.takes("per_example_loss", per_example_loss, 3, "(params, batch, key)")
    out = per_example_loss(params, batch, key)
    if isinstance(out, tuple) and not (len(out) == 2 and isinstance(out[1], Mapping)):
        raise InvalidInput("per_example_loss must return losses[B], or (losses[B], {name: values[B]}).")
    losses, values = out if isinstance(out, tuple) else (out, {})
    check_names(values)
    values = {"loss": losses, **values}
    for name, x in values.items():
        if (shape := getattr(x, "shape", type(x).__name__)) != (size,):
            raise InvalidInput(f"per_example_loss must give one {name} for each example, shape {(size,)}, not {shape}.")
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise InvalidInput(f"per_example_loss must give floating-point losses, not {losses.dtype}: it has no gradient.")
    return values


def examples_meet(per_example_loss: PerExampleLoss, params: Params, batch: Batch) -> bool:
    """Whether the loss of an example depends on others in its batch, as with batch normalisation or pairs.

    The test replaces the second half of the batch by its first example, as padding does, and compares the losses of the
    first half. Parameters that are zero everywhere get other values, since zeros would hide the dependence.

    Args:
      per_example_loss: see ``batch_loss``.
      params: pytree of parameters.
      batch: pytree of ``[B, ...]``, B at least 2, of different examples.

    Example:
      >>> examples_meet(lambda params, batch, key: batch["x"] - jnp.mean(batch["x"]), {}, {"x": np.arange(4.0)})
      True
    """
    size = len(jax.tree.leaves(batch)[0])
    half = size // 2

    @jax.jit
    def losses(params, batch):
        return example_values(per_example_loss, params, batch, jax.random.key(0), size)["loss"][:half]

    params = jax.tree.map(awake, params)
    # Padding copies the first example of a batch.
    index = np.where(np.arange(size) < half, np.arange(size), 0)
    whole, padded = (np.asarray(losses(params, b)) for b in (batch, jax.tree.map(lambda x: x[index], batch)))
    return not np.allclose(whole, padded, rtol=1e-3, atol=0, equal_nan=True)


def awake(x: Any) -> np.ndarray:
    """A parameter, or other values where it is zero everywhere, since zeros hide what depends on it."""
    x = np.asarray(x)
    zeros = jnp.issubdtype(x.dtype, jnp.floating) and not x.any()
    return np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype) if zeros else x


def mixed_precision(per_example_loss: PerExampleLoss, dtype: Any = jnp.bfloat16) -> PerExampleLoss:
    """The same loss computed in ``dtype`` on parameters that stay in float32, as do gradients, clips and averages.

    Args:
      per_example_loss: see ``batch_loss``; a model that sets its own types keeps them.
      dtype: the type to which floating-point parameters and inputs are cast.

    Returns:
      A loss of the same form; losses and metrics come back in float32.

    Example:
      >>> algorithm = fc.fedavg(fc.local.mixed_precision(per_example_loss), client_tx)

    Source: Micikevicius et al. (2018), "Mixed Precision Training"; bfloat16 needs no loss scaling.
    """

    def cast(tree: PyTree, to: Any) -> PyTree:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def loss(params, batch, key):
        return cast(per_example_loss(cast(params, dtype), cast(batch, dtype), key), jnp.float32)

    return loss


def calibrated(logits: Array, batch: Batch) -> Array:
    """The logits less the client's margins, under ``fc.drift.fedlc``; the logits themselves anywhere else.

    Args:
      logits: ``[B, classes]``.
      batch: of the loss; its ``"margins"`` are ``[B, classes]``, if there are any.

    Example:
      >>> fc.drift.calibrated(jnp.array([[2.0, 1.0]]), {"margins": jnp.array([[0.5, jnp.inf]])})
      Array([[ 1.5, -inf]], dtype=float32)
    """
    margins = batch.get(MARGINS) if isinstance(batch, dict) else None
    return logits if margins is None else logits - margins.astype(logits.dtype)


def batch_gradient(
    per_example_loss: PerExampleLoss, params: Params, batch: Batch, weights: Array, key: Array
) -> tuple[PyTree, Metrics]:
    """The gradient of a batch's weighted mean loss, and the batch's report.

    Args:
      per_example_loss: ``(params, batch, key) -> losses[B]``, or ``(losses[B], {name: values[B]})``.
      params: pytree of parameters.
      batch: pytree of ``[B, ...]``.
      weights: ``[B]`` example weights, 0 for padding.
      key: of this batch.

    Example:
      >>> batch = {name: x[:20] for name, x in data.examples.items()}
      >>> start = jax.tree.map(jnp.asarray, params)
      >>> gradient, report = fc.local.batch_gradient(per_example_loss, start, batch, jnp.ones(20), key)
    """
    gradient, terms = gradient_and_terms(per_example_loss, params, batch, weights, key)
    return gradient, jax.tree.map(jnp.sum, terms)


def gradient_and_terms(
    per_example_loss: PerExampleLoss, params: Params, batch: Batch, weights: Array, key: Array
) -> tuple[PyTree, Metrics]:
    """``batch_gradient`` with the report of ``batch_terms``, so that a loop can sum over the examples at its end."""
    check_parameters(params)

    def mean_loss(params):
        terms = batch_terms(per_example_loss, params, batch, weights, key)
        total, weight = (jnp.sum(x) for x in terms["loss"])
        # A batch of padding alone weighs 0: its gradient is then 0, not NaN.
        return total / tree.or_one(weight), terms

    return jax.grad(mean_loss, has_aux=True)(params)


def check_parameters(params: Params) -> None:
    """Refuses parameters that have no gradient, and statistics, which no gradient trains."""
    for name, x in tree.named_leaves(params):
        if name.startswith("batch_stats/"):
            raise InvalidInput(
                f"{name!r} is a statistic of the model, which no gradient trains: give the loss its state "
                "(fc.local.with_state), or freeze the statistics (fc.partially_frozen)."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InvalidInput(
                f"Parameter {name!r} holds {x.dtype} and has no gradient: make it a floating-point array, or freeze it "
                "(fc.partially_frozen)."
            )
