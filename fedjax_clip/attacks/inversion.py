"""Gradient inversion: what a server that reads one client's message learns of that client's examples."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import batch_loss
from fedjax_clip.core.types import Array, Batch, InvalidInput, Params, PerExampleLoss, PyTree


def dense_inputs(weights: Array, bias: Array) -> Array:
    """The input of a dense layer from its gradient: exact for one example, whatever follows the layer.

    With ``y = x W + b``, ``dW = x g^T`` and ``db = g``, so ``x = dW db / ||db||^2``, which is also the least-squares
    solution under noise. A scale common to both, such as a learning rate or a clip of the whole message, cancels. For a
    batch it is a mixture of the inputs. Zero for a gradient of zero.

    Args:
      weights: ``[d, k]`` gradient of W, or a client's update of it.
      bias: ``[k]`` that of b.

    Returns:
      ``[d]``.

    Raises:
      InvalidInput: shapes that are not those of a dense layer.

    Example:
      >>> x, g = np.array([1.0, 2.0]), np.array([0.5, -0.5, 0.25])
      >>> fc.attacks.dense_inputs(np.outer(x, g), g).tolist()
      [1.0, 2.0]

    Source: Phong et al. (2018), "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption", section 3.
    """
    weights, bias = jnp.asarray(weights), jnp.asarray(bias)
    if weights.ndim != 2 or bias.shape != weights.shape[1:]:
        raise InvalidInput(
            f"dense_inputs needs gradients [d, k] of weights and [k] of a bias, not {weights.shape} and {bias.shape}."
        )
    return tree.divided(tree.weighted_sum(bias, weights.T), tree.or_one(jnp.sum(jnp.square(bias))))


def label_of(bias: Array) -> Array:
    """The label of the one example that a gradient of a softmax's bias is of: the class of its only negative entry.

    Args:
      bias: ``[K]`` gradient of the last layer's bias; for an update, which is minus a gradient, its negative.

    Returns:
      int32, the class.

    Example:
      >>> int(fc.attacks.label_of(np.array([0.2, -0.7, 0.5])))
      1

    Source: Zhao, Mopuri and Bilen (2020), "iDLG: Improved Deep Leakage from Gradients".
    """
    return jnp.argmin(jnp.asarray(bias)).astype(jnp.int32)


def inverted(
    per_example_loss: PerExampleLoss,
    params: Params,
    gradient: PyTree,
    batch: Batch,
    key: Array,
    field: str = "x",
    steps: int = 300,
    tx: optax.GradientTransformation | None = None,
    match: Literal["squares", "cosine"] = "squares",
) -> tuple[Array, Array]:
    """Deep leakage from gradients (DLG): searches inputs whose gradient matches the one that was sent.

    ``min_x D(grad L(params, x), gradient)`` from normal noise, by a first-order optimiser in place of the paper's
    L-BFGS. D is the sum of squared differences, or ``1 - cos``, which a clip of the message does not change. The
    attacker knows the model, the loss and the labels (``label_of``). The loss must be twice differentiable: with ReLU
    the search stalls.

    Args:
      per_example_loss: the clients' loss; it is called without a key, as in evaluation.
      params: the model that the client was sent.
      gradient: the mean gradient of the batch, like ``params``; of an SGD step it is the update over minus the rate.
      batch: pytree of ``[B, ...]`` with the right shapes and all that the attacker knows; ``batch[field]`` is replaced.
      key: of the start.
      field: of the inputs, floats.
      steps: of the optimiser.
      tx: the optimiser; Adam with 0.1 by default.
      match: D.

    Returns:
      ``(inputs [B, ...], mismatch)``: the inputs found, and D at them.

    Raises:
      InvalidInput: a field that there is not, or that is not floats; steps that are not a whole number of at least 1.

    Example:
      >>> batch = {"x": data.examples["x"][:1], "y": data.examples["y"][:1]}
      >>> gradient = jax.grad(lambda p: per_example_loss(p, batch, None)[0].mean())(params)
      >>> x, mismatch = fc.attacks.inverted(per_example_loss, params, gradient, batch, key, steps=2)

    Source: Zhu, Liu and Han (2019), "Deep Leakage from Gradients", Algorithm 1; Geiping et al. (2020), "Inverting
    Gradients", equation 4, for the cosine.
    """
    steps = checks.count("inverted: steps", steps)
    if match not in ("squares", "cosine"):
        raise InvalidInput(f"inverted: match must be 'squares' or 'cosine', not {match!r}.")
    if field not in batch or not jnp.issubdtype(jnp.asarray(batch[field]).dtype, jnp.floating):
        raise InvalidInput(f"inverted: batch[{field!r}] must be floats, which the attack searches.")
    tx = optax.adam(0.1) if tx is None else tx
    apart = _squares if match == "squares" else _angle

    def mismatch(x):
        guess = {**batch, field: x}
        weights = jnp.full(len(x), 1 / len(x), jnp.float32)
        got = jax.grad(lambda p: batch_loss(per_example_loss, p, guess, weights, None)[0])(params)
        return apart(got, gradient)

    def step(_, state):
        x, kept = state
        updates, kept = tx.update(jax.grad(mismatch)(x), kept, x)
        return tree.apply_updates(x, updates), kept

    x = jax.random.normal(key, jnp.shape(batch[field]), jnp.asarray(batch[field]).dtype)
    x, _ = jax.lax.fori_loop(0, steps, step, (x, tx.init(x)))
    return x, mismatch(x)


def _squares(a: PyTree, b: PyTree) -> Array:
    return tree.total([jnp.sum(jnp.square(x - y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)])


def _angle(a: PyTree, b: PyTree) -> Array:
    inner = tree.total([jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)])
    return 1 - inner / tree.or_one(tree.norm(a) * tree.norm(b))
