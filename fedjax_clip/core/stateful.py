"""Losses of models with state that no gradient trains, such as the statistics of batch normalisation.

The state lies among the parameters: leaves whose names match a pattern. A local step replaces them by what the loss
returns, and steps on the other leaves alone. An ordinary loss has no such leaves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import (
    Gradient,
    awake,
    batch_gradient,
    batch_terms,
    check_parameters,
    gradient_and_terms,
)
from fedjax_clip.core.types import Array, Batch, InvalidInput, Metrics, Params, PerExampleLoss, PyTree

ROWS = 8  # on a CPU, XLA's products round a row alike, whatever multiple of it there are
LEAST = 16  # rows of a training step: sums over examples round alike in batches of one shape only

# (params, batch, weights[B], key) -> (losses[B], {name: values[B]}, params); neither weights nor key in evaluation
LossAndState = Callable[[Params, Batch, Any, Any], tuple[Array, dict[str, Array], Params]]


def with_state(loss_and_state: LossAndState, state: str = "^batch_stats/") -> "Stateful":
    """A loss whose model changes a part s of its parameters itself: ``s <- s'`` in a local step, without a gradient.

    Clients begin a round with the server's s, and the server takes ``s + mean (s_i' - s)`` with the algorithm's
    reducer. Only the other parameters have gradients. Clips, client and server optimisers, corrections and links see
    those alone, so s travels unclipped and uncompressed. To keep s at each client, add its names to the pattern of
    ``fc.partially_private``; with those of the norms this is FedBN.

    Padding is exact: the model is given the example weights, and must leave out examples of weight 0. A batch is filled
    up by examples of weight 0: to a multiple of 8 and, in training, at least 16. Batch sizes that fill up to the same
    one therefore give the same bits, and others differ by the rounding of sums. An evaluation on a CPU gives the same
    bits in batches of any size.

    Args:
      loss_and_state: ``(params, batch, weights, key) -> (losses[B], {name: values[B]}, params)``, the last one with the
        new state in it. ``weights [B]`` is 0 for padding. In evaluation weights and key are ``None``: then the model
        uses its state and changes nothing.
      state: regular expression, found in the names of the leaves of s, such as ``"batch_stats/BatchNorm_0/mean"``.

    Returns:
      A loss, for an algorithm and for ``fc.evaluator``. Wrappers of losses such as ``mixed_precision`` do not take it.

    Raises:
      InvalidInput: no function of four arguments, no regular expression; (when an algorithm is made) a gradient of
        single examples; (when a run begins) a pattern that is found in no leaf, state under noise or in a secure sum,
        or a loss to which examples of weight 0 matter.

    Example:
      >>> model = fc.models.ResNet(10, (1, 1), width=8, norm="batch")
      >>> def loss_and_state(variables, batch, weights, key):
      ...   x = batch["x"].reshape(-1, 8, 8, 1)
      ...   logits, changed = model.apply(variables, x, weights, mutable=["batch_stats"])
      ...   losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
      ...   return losses, {"accuracy": logits.argmax(-1) == batch["y"]}, {**variables, **changed}
      >>> algorithm = fc.fedavg(fc.local.with_state(loss_and_state), optax.sgd(0.1))
      >>> fedbn = fc.partially_private(algorithm, "BatchNorm")

    Source: Ioffe and Szegedy (2015), "Batch Normalization"; Li et al. (2021), "FedBN".
    """
    checks.takes("loss_and_state", loss_and_state, 4, "(params, batch, weights, key)")
    checks.pattern("state", state)
    return Stateful(loss_and_state, state)


@dataclasses.dataclass(frozen=True, eq=False)
class Stateful:
    """The loss that ``with_state`` returns; called as any loss, in evaluation.

    Attributes:
      function: ``loss_and_state``.
      pattern: found in the names of the state's leaves.
      whole: from the parameters that this loss is given to those of ``function``.

    Example:
      >>> losses, values = per_example_loss(params, {"x": np.zeros((1, 64)), "y": np.zeros(1, int)}, None)
    """

    function: LossAndState
    pattern: str
    whole: Callable[[Params], Params] = lambda params: params

    def __call__(self, params: Params, batch: Batch, key: None = None) -> tuple[Array, dict[str, Array]]:
        size = len(jax.tree.leaves(batch)[0])
        losses, values = self.single(params, _filled(batch, -size % ROWS), key)
        return losses[:size], {name: x[:size] for name, x in values.items()}

    def single(self, params: Params, batch: Batch, key: None = None) -> tuple[Array, dict[str, Array]]:
        """An evaluation of the batch as it is, for examples that are evaluated one by one."""
        if key is not None:
            raise InvalidInput(
                "A loss of fc.local.with_state trains within an algorithm only, which knows its state: give it to the "
                "algorithm itself, not to a function around it."
            )
        return self._result(params, batch, None, None)[:2]

    def step(
        self, params: Params, state: PyTree, batch: Batch, weights: Array, key: Array
    ) -> tuple[Array, dict[str, Array], PyTree]:
        """``(losses, values, new state)`` in training.

        Args:
          params: the trained leaves.
          state: the others.
          batch, weights, key: of the step.
        """
        if not jax.tree.leaves(state):
            names = ", ".join(name for name, _ in tree.named_leaves(params))
            raise InvalidInput(
                f"with_state: state={self.pattern!r} is found in none of the parameters that train, {names}: frozen "
                "state needs no with_state, but a loss in which the model uses it as it is."
            )
        losses, values, after = self._result(tree.join(state, params), batch, weights, key)
        try:
            new = jax.tree.map(lambda s, x: None if s is None else x, state, after, is_leaf=lambda s: s is None)
            new = jax.tree.map(lambda s, x: jax.lax.stop_gradient(jnp.reshape(x, s.shape).astype(s.dtype)), state, new)
        except (TypeError, ValueError) as error:
            raise InvalidInput(
                "loss_and_state must return the parameters as it got them, with the new state in them, such as "
                f"{{**variables, **changed}} of Flax: {error}"
            ) from None
        return losses, values, new

    def _result(self, params: Params, batch: Batch, weights: Any, key: Any) -> Any:
        made = self.function(self.whole(params), batch, weights, key)
        if not isinstance(made, tuple) or len(made) != 3:
            raise InvalidInput("loss_and_state must return (losses[B], {name: values[B]}, params).")
        return made


def split(per_example_loss: PerExampleLoss, params: Params) -> tuple[PyTree, Params]:
    """``(state, what is trained)``, with None elsewhere; ``((), params)`` for a loss without state."""
    return tree.split(params, per_example_loss.pattern) if isinstance(per_example_loss, Stateful) else ((), params)


def join(state: PyTree, trained: Params) -> Params:
    """The inverse of ``split``."""
    return trained if isinstance(state, tuple) and not state else tree.join(state, trained)


def rebased(per_example_loss: PerExampleLoss, whole: Callable[[Params], Params]) -> PerExampleLoss:
    """The loss as a function of other parameters: ``u -> per_example_loss(whole(u))``."""
    if isinstance(per_example_loss, Stateful):
        before = per_example_loss.whole
        return dataclasses.replace(per_example_loss, whole=lambda u: before(whole(u)))
    return lambda u, batch, key: per_example_loss(whole(u), batch, key)


def gradient_and_state(
    gradient: Gradient,
    per_example_loss: PerExampleLoss,
    params: Params,
    state: PyTree,
    batch: Batch,
    weights: Array,
    key: Array,
) -> tuple[PyTree, Metrics, PyTree]:
    """``(*gradient(per_example_loss, params, batch, weights, key), state after the step)``.

    Args:
      gradient: ``batch_gradient`` or ``gradient_and_terms``; any, if the loss has no state.
      per_example_loss: with or without state.
      params: what is trained.
      state: of ``split``.
      batch, weights, key: of the step.
    """
    if not isinstance(per_example_loss, Stateful):
        return *gradient(per_example_loss, params, batch, weights, key), state
    check_gradient(gradient, per_example_loss)
    check_parameters(params)
    stateful, more = per_example_loss, max(LEAST - len(weights), -len(weights) % ROWS)
    batch, weights = _filled(batch, more), jnp.pad(weights, (0, more))

    def mean_loss(params):
        made = []

        def plain(params, batch, key):
            losses, values, new = stateful.step(params, state, batch, weights, key)
            made.append(new)
            return losses, values

        terms = batch_terms(plain, params, batch, weights, key)
        total, weight = (jnp.sum(x) for x in terms["loss"])
        return total / tree.or_one(weight), (terms, made[0])

    grads, (terms, new) = jax.grad(mean_loss, has_aux=True)(params)
    return grads, terms if gradient is gradient_and_terms else jax.tree.map(jnp.sum, terms), new


def check_gradient(gradient: Gradient, per_example_loss: PerExampleLoss) -> None:
    """Refuses gradients of single examples where there are none."""
    if isinstance(per_example_loss, Stateful) and gradient not in (batch_gradient, gradient_and_terms):
        raise InvalidInput(
            "A loss of fc.local.with_state has no gradient of one example, since examples of a batch share statistics: "
            "leave gradient= out, or use group normalisation."
        )


def sees_padding(per_example_loss: Stateful, params: Params, batch: Batch) -> bool:
    """Whether examples of weight 0 change the losses of others, or the state.

    Args:
      per_example_loss: with state.
      params: pytree of parameters.
      batch: pytree of ``[B, ...]``, B at least 3, of different examples.
    """
    size = len(jax.tree.leaves(batch)[0])
    half = size // 2
    index = np.arange(size)
    weights = (index < half).astype(np.float32)

    @jax.jit
    def seen(params, batch):
        state, trained = split(per_example_loss, params)
        losses, _, new = per_example_loss.step(trained, state, batch, jnp.asarray(weights), jax.random.key(0))
        return losses[:half], new

    params = jax.tree.map(awake, params)
    one, other = (
        jax.tree.leaves(seen(params, jax.tree.map(lambda x, i=i: x[np.where(index < half, index, i)], batch)))
        for i in (0, size - 1)
    )
    return not all(np.allclose(x, y, rtol=1e-3, atol=0, equal_nan=True) for x, y in zip(one, other, strict=True))


def _filled(batch: Batch, more: int) -> Batch:
    """The batch with ``more`` copies of its first example behind it."""
    if not more:
        return batch
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(jnp.asarray(x[:1]), more, 0)]), batch)
