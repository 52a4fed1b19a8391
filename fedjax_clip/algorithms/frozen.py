"""Partial training: a part of the model that stays as it is, and need not be sent."""

import dataclasses

from fedjax_clip.algorithms.base import kind
from fedjax_clip.algorithms.wrapping import around, check_made, split_by
from fedjax_clip.core import checks, stateful, tree
from fedjax_clip.core.types import Algorithm


def partially_frozen(algorithm: Algorithm, frozen: str) -> Algorithm:
    """Any algorithm for the parameters u of a model ``(f, u)`` whose other part f stays as it is.

    It trains u on ``u -> per_example_loss((f, u))``. Clients have f already: only u is sent, and no clip, link, reducer
    or optimiser sees f. This fine-tunes a large model by adapters (``fc.lora``), or by its head alone.
    ``server.params`` is the whole model, so f is an argument of the compiled rounds and of the evaluation, not a
    constant in them; every point of a sweep has a copy of it. Checkpoints hold u alone: a run resumes with its own f.

    Args:
      algorithm: any made by ``fc.fedavg`` and its like or by ``fc.extend.algorithm``, of the whole model's loss.
      frozen: regular expression, found in the names of the leaves of f (``"params/block0/query/kernel"``).

    Returns:
      An ``Algorithm``; ``bytes_down`` and ``bytes_up`` are those of u.

    Raises:
      InvalidInput: no such algorithm, no regular expression, or (when a run begins) one that is found in no leaf or in
        all of them.

    Example:
      >>> algorithm = fc.partially_frozen(fc.fedavg(per_example_loss, optax.sgd(0.1)), "Conv")

    Source: Hu et al. (2022), "LoRA", section 4, for adapters.
    """
    check_made("partially_frozen", algorithm)
    checks.pattern("frozen", frozen)

    def split(params):
        return split_by("frozen", frozen, params)

    def init(params):
        return algorithm.init(split(params)[1])._replace(params=tree.as_arrays(params))

    def init_client(params):
        return algorithm.init_client(split(params)[1])

    def inside(run):
        def round(server, cohort, key):
            f, u = split(server.params)

            def on_u(client_fn):
                def work(shared, client, key):
                    whole = client.per_example_loss
                    loss = stateful.rebased(whole, lambda u: tree.join(f, u))
                    return client_fn(shared, dataclasses.replace(client, per_example_loss=loss), key)

                return work

            after, clients, metrics = run(server._replace(params=u), around(cohort, on_u), key)
            return after._replace(params=tree.join(f, after.params)), clients, metrics

        return round

    def personal(params, state):
        f, u = split(params)
        assert algorithm.personal is not None
        return tree.join(f, algorithm.personal(u, state))

    return algorithm._replace(
        init=init,
        init_client=init_client,
        round=inside(algorithm.round),
        start=inside(algorithm.start) if algorithm.start else None,
        personal=personal if algorithm.personal else None,
        broadcasts=False,
        name=f"partially_frozen({kind(algorithm)})",
        frozen="|".join(f"(?:{pattern})" for pattern in (algorithm.frozen, frozen) if pattern),
    )
