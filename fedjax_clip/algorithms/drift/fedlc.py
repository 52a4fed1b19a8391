"""FedLC: logits calibrated by the client's own counts of its classes."""

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_clip.algorithms.base import kind
from fedjax_clip.algorithms.wrapping import around, check_made
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import MARGINS
from fedjax_clip.core.types import Algorithm, Array, InvalidInput
from fedjax_clip.local.worker import Worker


def fedlc(algorithm: Algorithm, temperature: float | Array, *, classes: int, label: str = "y") -> Algorithm:
    """Any algorithm, whose clients lower the logit of class c by ``temperature n_c^(-1/4)`` in their local losses.

    ``n_c`` is the number of the client's examples of class c. A rare class has a large margin, so the client trains it
    harder, and other classes drive it down less. The logit of a class that the client lacks becomes minus infinity, so
    the client's steps leave that class alone, whatever the temperature above zero. With ``temperature=0`` it is the
    algorithm itself.

    The loss takes part: it passes its logits through ``fc.drift.calibrated(logits, batch)``, which changes nothing in
    evaluation. Losses of ``fc.tasks`` do so. ``n_c`` is the client's size times the share of class c in the examples of
    the round: exact for whole epochs, an estimate for fewer steps. Clients read their labels once more for it.

    Args:
      algorithm: any made by ``fc.fedavg`` and its like or by ``fc.extend.algorithm``.
      temperature: tau, at least 0; may be traced.
      classes: number of classes.
      label: name of the labels, integers ``[B]``, in a batch, which is a dict.

    Returns:
      An ``Algorithm`` with the same state and messages.

    Raises:
      InvalidInput: an argument of the wrong kind; (when a round is traced) a batch without such labels, or a loss that
        does not look at the margins.

    Example:
      >>> def loss(params, batch, key):
      ...     logits = batch["x"].reshape(-1, 64) @ params["w"] + params["b"]
      ...     logits = fc.drift.calibrated(logits, batch)
      ...     return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
      >>> algorithm = fc.drift.fedlc(fc.fedavg(loss, optax.sgd(0.1)), 1.0, classes=10)

    Source: Zhang et al. (2022), "Federated Learning with Label Distribution Skew via Logits Calibration", equation 8,
    with all classes in the denominator of the softmax.
    """
    check_made("fedlc", algorithm)
    checks.within("fedlc's temperature", temperature, 0, finite=True)
    checks.count("fedlc's classes", classes, 2)

    def calibrating(client_fn):
        def work(shared, client, key):
            margins = _margins(client, temperature, classes, label)

            def loss(params, batch, key):
                here = {**batch, MARGINS: jnp.broadcast_to(margins, (len(batch[label]), classes))}
                _check_read(client.per_example_loss, params, here, key)
                return client.per_example_loss(params, here, key)

            return client_fn(shared, dataclasses.replace(client, per_example_loss=loss), key)

        return work

    def inside(run):
        return lambda server, cohort, key: run(server, around(cohort, calibrating), key)

    return algorithm._replace(
        round=inside(algorithm.round),
        start=inside(algorithm.start) if algorithm.start else None,
        name=f"fedlc({kind(algorithm)})",
    )


def _margins(client: Worker, temperature: float | Array, classes: int, label: str) -> Array:
    """``temperature n_c^(-1/4)`` of each class, float32 ``[classes]``; infinity where the client has none of it."""

    def seen(step):
        batch, weights = client.batch(step)
        labels = batch.get(label) if isinstance(batch, dict) else None
        if labels is None or labels.shape != weights.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise InvalidInput(f"fedlc counts the client's labels: a batch must be a dict with integers {label!r} [B].")
        live = (weights > 0).astype(jnp.float32)
        return live @ jax.nn.one_hot(labels, classes, dtype=jnp.float32), jnp.sum(weights, dtype=jnp.float32)

    zero = jnp.zeros(classes, jnp.float32), jnp.zeros((), jnp.float32)
    counts, weight = client.loop(lambda i, acc: jax.tree.map(jnp.add, acc, seen(i)), zero)
    # Of passes over the same examples each counts once; the scale of example weights cancels.
    counts = counts * (client.weight / tree.or_one(weight))
    present = counts > 0
    quarter = jnp.where(present, counts, 1) ** -0.25
    absent = jnp.where(jnp.asarray(temperature) > 0, jnp.inf, 0.0)
    return jnp.where(present, temperature * quarter, absent).astype(jnp.float32)


def _check_read(per_example_loss, params, batch, key) -> None:
    """Refuses a loss that would ignore the margins, and so be trained as if there were no FedLC."""
    rest = {name: x for name, x in batch.items() if name != MARGINS}
    jaxpr = jax.make_jaxpr(lambda margins: per_example_loss(params, rest | {MARGINS: margins}, key))(batch[MARGINS])
    margins = jaxpr.jaxpr.invars[0]
    if not any(margins is x for equation in jaxpr.jaxpr.eqns for x in equation.invars):
        raise InvalidInput(
            "fedlc calibrates logits, and this loss does not look at the margins: take "
            "fc.drift.calibrated(logits, batch) for its logits."
        )
