"""Partial training: a part of the model that stays as it is, and need not be sent."""

import re
from collections.abc import Callable

import jax

from fedjax_clip.algorithms.base import kind
from fedjax_clip.core import tree
from fedjax_clip.core.types import Algorithm, InvalidInput, PerExampleLoss


def partially_frozen(
    build: Callable[[PerExampleLoss], Algorithm], per_example_loss: PerExampleLoss, frozen: str
) -> Algorithm:
    """Any algorithm for the parameters u of a model ``(f, u)`` whose other part f stays as it is.

    It trains u on ``u -> per_example_loss((f, u))``. Clients know f beforehand: only u is sent, and no clip, link,
    reducer or optimiser meets f. So is a large model fine-tuned by adapters (``fc.lora``), or by its head alone.
    ``server.params`` is the whole model, so f is an argument of the compiled rounds and of the evaluation, not a
    constant in them; every checkpoint and every point of a sweep has a copy of it.

    Args:
      build: loss -> algorithm, for u.
      per_example_loss: of the whole model, ``(params, batch, key)``.
      frozen: regular expression, found in the names of the leaves of f (``"params/block0/query/kernel"``).

    Returns:
      An ``Algorithm``; ``bytes_down`` and ``bytes_up`` are those of u.

    Raises:
      InvalidInput: no regular expression, or (when a run begins) one that is found in no leaf or in all of them.

    Example:
      >>> algorithm = fc.partially_frozen(lambda loss: fc.fedavg(loss, optax.sgd(0.1)), per_example_loss, "Conv")

    Source: Hu et al. (2022), "LoRA", section 4, for adapters.
    """
    try:
        re.compile(frozen)
    except (re.error, TypeError) as error:
        raise InvalidInput(f"frozen: {frozen!r} is not a regular expression: {error}.") from error
    whole = build(per_example_loss)  # says at once what is wrong

    def split(params):
        """``(f, u, algorithm for u)``."""
        f, u = tree.split(params, frozen)
        if not jax.tree.leaves(f) or not jax.tree.leaves(u):
            names = ", ".join(name for name, _ in tree.named_leaves(params))
            raise InvalidInput(f"frozen={frozen!r} must be found in some of the parameters, not none or all: {names}.")
        return f, u, build(lambda u, batch, key: per_example_loss(tree.join(f, u), batch, key))

    def init(params):
        _, u, algorithm = split(params)
        return algorithm.init(u)._replace(params=tree.as_arrays(params))

    def init_client(params):
        _, u, algorithm = split(params)
        return algorithm.init_client(u)

    def round(server, cohort, key):
        f, u, algorithm = split(server.params)
        server, client_states, metrics = algorithm.round(server._replace(params=u), cohort, key)
        return server._replace(params=tree.join(f, server.params)), client_states, metrics

    def personal(params, state):
        f, u, algorithm = split(params)
        return tree.join(f, algorithm.personal(u, state))

    def start(server, cohort, key):
        f, u, algorithm = split(server.params)
        assert algorithm.start is not None
        server, client_states, metrics = algorithm.start(server._replace(params=u), cohort, key)
        return server._replace(params=tree.join(f, server.params)), client_states, metrics

    inside = whole._replace(init=init, init_client=init_client, round=round, broadcasts=False, loss=per_example_loss)
    inside = inside._replace(name=f"partially_frozen({kind(whole)})")
    return inside._replace(personal=personal if whole.personal else None, start=start if whole.start else None)
