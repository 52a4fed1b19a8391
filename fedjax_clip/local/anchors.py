"""Losses that keep old knowledge in a stream: EWC and LwF.

Both compare the model with an older one. The old model's arrays are not constants of the loss, which the program would
contain and which each phase would compile again. They are parameters that stay fixed, beside the model's own::

    {"model": ..., "anchor": ..., "fisher": ...}    EWC
    {"model": ..., "teacher": ..., "known": ...}    LwF

``fc.partially_frozen`` keeps all but ``model`` as they are: arguments of the compiled rounds, of which nothing is sent.
One program serves all phases, and between two of them the host replaces these arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput, Params, PerExampleLoss
from fedjax_clip.data import lives
from fedjax_clip.data.population import FederatedData
from fedjax_clip.local.gradients import per_example_gradient

_NO_CLASS = -1e30  # the logit of a class that the teacher does not know: no probability, and no NaN


def ewc(per_example_loss: PerExampleLoss, strength: float) -> PerExampleLoss:
    """Elastic weight consolidation: parameters that mattered to earlier phases are held near their old values.

    ``l(theta) + strength / 2 sum_i F_i (theta_i - a_i)^2`` with the Fisher information F and the anchor a, in training
    only. The parameters are those of ``anchored``.

    Args:
      per_example_loss: the loss of the model alone.
      strength: lambda, at least 0.

    Returns:
      A loss of ``{"model", "anchor", "fisher"}``.

    Raises:
      InvalidInput: a strength that is negative or not a number.

    Example:
      >>> loss = fc.local.ewc(per_example_loss, strength=100.0)
      >>> algorithm = fc.partially_frozen(fc.fedavg(loss, client_tx), "^(anchor|fisher)/")
      >>> first = fc.train(algorithm, data, fc.local.anchored(params), rounds=2).params
      >>> fisher = fc.local.fisher(per_example_loss, first["model"], data)
      >>> second = fc.train(algorithm, data, fc.local.consolidated(first, fisher), rounds=2).params

    Source: Kirkpatrick et al. (2017), "Overcoming Catastrophic Forgetting in Neural Networks", equation 3.
    """
    checks.within("ewc: strength", strength, 0, finite=True)

    def loss(params, batch, key):
        out = per_example_loss(params["model"], batch, key)
        if key is None:
            return out
        pulls = jax.tree.map(
            lambda x, a, f: jnp.sum(f * jnp.square(x - a)), params["model"], params["anchor"], params["fisher"]
        )
        return _plus(out, strength / 2 * sum(jax.tree.leaves(pulls)))

    return loss


def anchored(params: Params) -> dict[str, Params]:
    """The parameters of ``ewc`` before there is anything to keep: a Fisher information of zero.

    Args:
      params: of the model.

    Example:
      >>> sorted(fc.local.anchored(params))
      ['anchor', 'fisher', 'model']
    """
    zeros = jax.tree.map(lambda x: np.zeros_like(np.asarray(x)), params)
    return {"model": params, "anchor": zeros, "fisher": zeros}


def consolidated(params: dict[str, Params], fisher: Params) -> dict[str, Params]:
    """The parameters of ``ewc`` after a phase: its model is held, too.

    The penalties of all phases are one: ``sum_p F_p (theta - a_p)^2`` equals ``F (theta - a)^2`` up to a constant, with
    ``F = sum_p F_p`` and the mean anchor ``a = sum_p F_p a_p / F``. So any number of phases takes the memory of one.

    Args:
      params: ``{"model", "anchor", "fisher"}`` after the phase.
      fisher: the Fisher information of the phase, of ``fc.local.fisher``.

    Example:
      >>> ones = jax.tree.map(np.ones_like, params)
      >>> whole = fc.local.consolidated(fc.local.anchored(params), ones)
      >>> bool((whole["anchor"]["w"] == params["w"]).all())
      True

    Source: Kirkpatrick et al. (2017), section 2.1: two penalties, or one of the sums. The algebra is this library's.
    """

    def anchor(x: Any, a: Any, old: Any, new: Any) -> np.ndarray:
        x, a, old, new = (np.asarray(value) for value in (x, a, old, new))
        both = old + new
        return np.where(both > 0, (old * a + new * x) / np.where(both > 0, both, 1), x).astype(x.dtype)

    anchors = jax.tree.map(anchor, params["model"], params["anchor"], params["fisher"], fisher)
    total = jax.tree.map(lambda old, new: np.asarray(old) + np.asarray(new), params["fisher"], fisher)
    return {"model": params["model"], "anchor": anchors, "fisher": total}


def fisher(
    per_example_loss: PerExampleLoss,
    params: Params,
    data: FederatedData,
    round: int | None = None,
    batch_size: int = 256,
) -> Params:
    """The diagonal of the empirical Fisher information: the mean square of the examples' gradients.

    ``sum_i w_i (grad l_i)^2 / sum_i w_i`` over all clients' examples i. It is the mean of the clients' own, weighted by
    their examples, so a server needs one vector of each client. It is computed here in one place, and no privacy
    guarantee of the training covers it.

    Args:
      per_example_loss: the loss of the model alone, a negative log likelihood; called with ``key=None``.
      params: of the model.
      data: the population.
      round: of a stream: the examples that live in it; all by default.
      batch_size: examples at a time; as many gradients are in memory.

    Returns:
      A pytree like ``params``.

    Raises:
      InvalidInput: a round in which nobody has an example.

    Example:
      >>> information = fc.local.fisher(per_example_loss, params, data)
      >>> information["w"].shape
      (64, 10)

    Source: Kirkpatrick et al. (2017), section 2.1; with the labels of the data, the empirical Fisher information of
    Martens (2020), "New Insights and Perspectives on the Natural Gradient Method", section 11.
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    batch_size = min(checks.count("batch_size", batch_size), data.num_examples)
    params = tree.as_arrays(tree.parameters(params))
    numbers = np.arange(data.num_examples)
    if round is not None and (sizes := lives.sizes_of(data)) is not None:
        present = np.flatnonzero(sizes(checks.count("round", round, 0)))
        listed = lives.seen(data, present, np.full(len(present), round)).listed
        numbers = numbers[:0] if listed is None else listed
    if not len(numbers):
        raise InvalidInput(f"In round {round} of the stream nobody has an example: there is no Fisher information.")
    squared = per_example_gradient(optax.stateless_with_tree_map(lambda g, _: jnp.square(g)))

    evaluated: Any = None  # no key: nothing is random

    @jax.jit
    def step(params, total, batch, weights):
        mean, _ = squared(per_example_loss, params, batch, weights, evaluated)
        return jax.tree.map(lambda t, m: t + m * jnp.sum(weights).astype(m.dtype), total, mean)

    total, weight = jax.tree.map(jnp.zeros_like, params), 0.0
    for first in range(0, len(numbers), batch_size):
        index = numbers[np.minimum(np.arange(first, first + batch_size), len(numbers) - 1)]
        weights = np.ones(batch_size, np.float32) if data.weights is None else data.weights[index].astype(np.float32)
        weights[len(numbers) - first :] = 0
        batch = jax.tree.map(lambda x: jnp.asarray(x[index]), data.examples)  # noqa: B023 (called here and now)
        total, weight = step(params, total, batch, jnp.asarray(weights)), weight + float(weights.sum(dtype=np.float64))
    return jax.tree.map(lambda t: np.asarray(t) / np.asarray(weight, t.dtype), total)


def lwf(
    per_example_loss: PerExampleLoss,
    logits: Callable[[Params, Any], Array],
    strength: float = 1.0,
    temperature: float = 2.0,
) -> PerExampleLoss:
    """Learning without forgetting: on new examples the model answers about old classes as the old model does.

    ``l + strength * cross_entropy(softmax(t / T), softmax(z / T))`` in training only, with the logits t of the old
    model and z of the new one, over the classes that the old model knows. The parameters are those of ``taught``. No
    old example is kept.

    Args:
      per_example_loss: the loss of the model alone.
      logits: ``(params, batch) -> [B, K]``, of the model alone.
      strength: lambda_o, at least 0.
      temperature: T, positive.

    Returns:
      A loss of ``{"model", "teacher", "known"}``.

    Raises:
      InvalidInput: numbers out of range.

    Example:
      >>> logits = lambda params, batch: batch["x"].reshape(-1, 64) @ params["w"] + params["b"]
      >>> loss = fc.local.lwf(per_example_loss, logits)
      >>> algorithm = fc.partially_frozen(fc.fedavg(loss, client_tx), "^(teacher/|known)")
      >>> first = fc.train(algorithm, data, fc.local.taught(params, np.zeros(10)), rounds=2).params
      >>> second = fc.train(algorithm, data, fc.local.taught(first["model"], np.arange(10) < 5), rounds=2).params

    Source: Li and Hoiem (2016), "Learning without Forgetting", section 3, without its warm-up of new layers: all
    classes share one layer from the start. Hinton et al. (2015) multiply by T^2; Li and Hoiem do not.
    """
    checks.within("lwf: strength", strength, 0, finite=True)
    checks.positive("lwf: temperature", temperature, finite=True)

    def loss(params, batch, key):
        out = per_example_loss(params["model"], batch, key)
        if key is None:
            return out
        known = params["known"] > 0
        old, new = (
            jnp.where(known, logits(params[which], batch) / temperature, _NO_CLASS) for which in ("teacher", "model")
        )
        answers = jnp.where(known, jax.nn.softmax(old), 0) * jnp.where(known, jax.nn.log_softmax(new), 0)
        return _plus(out, -strength * jnp.sum(answers, axis=-1))

    return loss


def taught(params: Params, known: Any) -> dict[str, Params]:
    """The parameters of ``lwf``: the model, and as its teacher the same model.

    Args:
      params: of the model.
      known: ``[K]``, which classes the teacher knows; of none it teaches nothing.

    Example:
      >>> fc.local.taught(params, np.arange(10) < 5)["known"].tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    return {"model": params, "teacher": jax.tree.map(np.asarray, params), "known": np.asarray(known).astype(np.float32)}


def _plus(out: Any, more: Any) -> Any:
    """The loss's answer with ``more`` added to the losses."""
    return (out[0] + more, out[1]) if isinstance(out, tuple) else out + more
