"""Gradients of a batch: with a clip on each example's part, private, or sharpness-aware."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_clip import clipping
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Array, Batch, InvalidInput, Metrics, Params, PerExampleLoss, PyTree
from fedjax_clip.uplink import lattice


def per_example_gradient(example_tx: optax.GradientTransformation) -> Gradient:
    """A ``batch_gradient`` that passes each example's own gradient through a clip before the mean.

    ``sum_b w_b clip(grad l_b) / sum_b w_b``. Guarantee: with a hard clip to C, one example of weight w moves the mean
    by at most ``2 C w / sum w``: the sensitivity of DP-SGD. Takes the memory of a batch of gradients.

    Args:
      example_tx: a clip without a state of its own.

    Returns:
      What ``fc.fedavg`` takes for its ``gradient``.

    Example:
      >>> fc.fedavg(per_example_loss, optax.sgd(0.1), gradient=fc.local.per_example_gradient(fc.clipping.clip(1.0)))

    Source: Abadi et al. (2016), Algorithm 1, without its noise.
    """
    checks.kind("example_tx", example_tx, optax.GradientTransformation, "an optax transform")

    def gradient(per_example_loss, params, batch, weights, key):
        def weighed(clipped, weight):
            return jax.tree.map(lambda g: tree.scaled(weight, tree.wide(g)), clipped)

        total, report = _sum(example_tx, weighed, per_example_loss, params, batch, weights, key)
        weight = tree.or_one(report["loss"].weight)
        mean = jax.tree.map(lambda g: tree.divided(g, weight), total)
        return optax.tree.cast_like(mean, params), report

    return gradient


# Not jax_privacy.clipped_grad, which clips by the global norm only and has neither example weights nor a lattice.
def _sum(
    example_tx: optax.GradientTransformation,
    message: Callable[[PyTree, Array], PyTree],
    per_example_loss: PerExampleLoss,
    params: Params,
    batch: Batch,
    weights: Array,
    key: Array,
) -> tuple[PyTree, Metrics]:
    """``sum_b message(clip(grad l_b), w_b)``, and the batch's report."""
    tx = optax.with_extra_args_support(example_tx)

    def one(example, weight):
        alone = jax.tree.map(lambda x: x[None], example)
        grads, report = batch_gradient(per_example_loss, params, alone, weight[None], key)
        clipped, state = tx.update(grads, tx.init(params), params)
        seen = {f"example_{name}": value for name, value in clipping.clip_report(state).items()}
        live = weight > 0
        seen = jax.tree.map(lambda x: jnp.where(live, x, 0), seen)
        return message(clipped, weight), report | seen

    return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), jax.vmap(one)(batch, weights))


def private_gradient(max_norm: float | Array, noise_multiplier: float | Array) -> Gradient:
    """DP-SGD's gradient at a client, private for each record: ``(sum_b clip_C(grad l_b) + N(0, (z C)^2)) / B``.

    B is the number of examples in the batch, and C the clip's bound. Guarantee: each step is a Gaussian mechanism of
    noise multiplier z for the contribution of one record; ``fc.privacy.record_epsilons`` gives epsilon over a run.
    Examples count equally: ``fc.train`` refuses data with unequal example weights. A record whose gradient is not
    finite adds zero under the same noise, so nothing reveals it. Takes the memory of a batch of gradients.

    As in ``fc.uplink.gaussian``, clipped gradients are truncated to whole steps of a lattice, and integer noise is
    added to their sum of integers, so the guarantee holds for the released bits, not only for real numbers.

    Args:
      max_norm: C, on the norm of each example's gradient; positive, may be traced.
      noise_multiplier: z >= 0, ratio of the sum's noise to C; may be traced.

    Returns:
      What ``fc.fedavg`` takes for its ``gradient``.

    Raises:
      InvalidInput: a bound that is not positive, negative noise.

    Example:
      >>> fc.fedavg(per_example_loss, optax.sgd(0.1), gradient=fc.local.private_gradient(1.0, 2.0))

    Source: Abadi et al. (2016), "Deep Learning with Differential Privacy", Algorithm 1; ``uplink/lattice.py``.
    """
    checks.positive("private_gradient: max_norm", max_norm, finite=True)
    checks.within("private_gradient: noise_multiplier", noise_multiplier, 0, finite=True)
    clip = clipping.clip_by_global_norm(max_norm)
    clipped, silent = per_example_gradient(clip), lattice.is_zero(noise_multiplier)

    def gradient(per_example_loss, params, batch, weights, key):
        loss_key, noise_key = jax.random.split(key)
        present = (weights > 0).astype(jnp.float32)
        if silent:
            return clipped(per_example_loss, params, batch, present, loss_key)
        steps = lattice.lattice(max_norm, noise_multiplier, len(weights))

        def message(clipped, present):
            return jax.tree.map(lambda x: jnp.where(present > 0, x, 0), lattice.truncated(clipped, steps))

        total, report = _sum(clip, message, per_example_loss, params, batch, present, loss_key)
        noised = jax.tree.map(jnp.add, total, lattice.noise(noise_key, total, steps))
        mean = lattice.values(noised, steps.step / jnp.maximum(jnp.sum(present), 1))
        return optax.tree.cast_like(mean, params), report

    gradient.counts_alike = True  # type: ignore[attr-defined] # ``fc.train`` refuses examples that weigh differently
    return gradient


def sharpness_aware(rho: float | Array, gradient: Gradient = batch_gradient) -> Gradient:
    """SAM's gradient: ``g(y + rho g(y) / ||g(y)||)``, taken where the loss of the batch is about largest near y.

    Both gradients are of the same batch with the same randomness; the report is that at y. With ``rho=0``, or where
    the gradient is zero, it is the plain gradient to the bit. It takes twice the time. In ``fc.fedavg`` this is FedSAM.

    Args:
      rho: radius of the neighbourhood, at least 0; may be traced.
      gradient: what gives g, such as ``fc.local.per_example_gradient(clip)``. Not ``private_gradient``: SAM uses each
        record twice in a step.

    Returns:
      What ``fc.fedavg`` takes for its ``gradient``.

    Raises:
      InvalidInput: a negative rho; ``private_gradient``.

    Example:
      >>> fc.fedavg(per_example_loss, client_tx, gradient=fc.local.sharpness_aware(0.05))

    Source: Qu et al. (2022), "Generalized Federated Learning via Sharpness Aware Minimization", Algorithm 1; Foret et
    al. (2021), "Sharpness-Aware Minimization for Efficiently Improving Generalization", equation 2.
    """
    checks.within("sharpness_aware: rho", rho, 0, finite=True)
    checks.kind("sharpness_aware: gradient", gradient, Callable, "such as fc.local.per_example_gradient(clip)")
    if getattr(gradient, "counts_alike", False):
        raise InvalidInput(
            "sharpness_aware takes two gradients of a batch at each step, and private_gradient's accounting counts "
            "one: take fc.local.per_example_gradient(clip), or leave sharpness_aware out."
        )

    def sharp(per_example_loss, params, batch, weights, key):
        here, report = gradient(per_example_loss, params, batch, weights, key)
        length = rho / tree.or_one(tree.norm(here))
        return gradient(per_example_loss, tree.add_scaled(params, length, here), batch, weights, key)[0], report

    return sharp
