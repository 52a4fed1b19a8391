"""FedEx-LoRA, FLoRA and FlexLoRA: the mean of the clients' products A B, of which a mean of A and of B is not."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.algorithms.base import Round, algorithm
from fedjax_clip.algorithms.lora import Lora
from fedjax_clip.core import checks, keys, stateful, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.metrics import Mean
from fedjax_clip.core.quantised import is_quantised
from fedjax_clip.core.types import Algorithm, Array, ClientTx, InvalidInput, Params, PyTree
from fedjax_clip.reduce import Reducer

FRESH = 2**31 - 5  # folded into the round's key for new adapters


def residual(
    tuned: Lora, client_tx: ClientTx, *, reducer: Reducer | None = None, gradient: Gradient = batch_gradient
) -> Algorithm:
    """FedEx-LoRA: A and B are averaged apart, and the base takes what that leaves out of the mean product.

    With the mean over clients ``<>``: ``W <- W + scale (<A_i B_i> - <A_i> <B_i>)``, ``A <- <A_i>``, ``B <- <B_i>``. The
    adapted matrix is ``W + scale <A_i B_i>``, exactly the mean of the clients' matrices.

    Args:
      tuned: of ``fc.lora``.
      client_tx, reducer, gradient: as for ``fc.fedavg``; without an uplink, since what the server adds up are products
        of what is sent.

    Returns:
      An ``Algorithm`` of adapters and adapted matrices: put ``fc.partially_frozen(..., tuned.untouched)`` around it, so
      that the rest of the base does not take part. ``bytes_up`` are those of A and B. ``bytes_down`` are those of A, B
      and the residual: as the factors that clients sent, or as matrices where these are smaller.

    Raises:
      InvalidInput: no ``Lora``, an argument of the wrong kind.

    Example:
      >>> tuned = fc.lora(per_example_loss, params, rank=2, pattern="w")
      >>> algorithm = fc.adapters.residual(tuned, optax.sgd(0.1))
      >>> result = fc.train(algorithm, data, tuned.init(key), rounds=2)

    Source: Singhal, Ponkshe and Vepakomma (2024), "FedEx-LoRA: Exact Aggregation for Federated and Efficient
    Fine-Tuning of Foundation Models".
    """

    def after(now: Round, adapters: PyTree, mean: PyTree, products: dict[str, Array]) -> tuple[PyTree, PyTree]:
        left = {name: products[name] - x["a"] @ x["b"] for name, x in mean.items()}
        return left, optax.tree.sub(mean, adapters)

    return _made(
        "residual",
        tuned,
        client_tx,
        after,
        lambda size, full, clients: size + jnp.minimum(clients * size, full),
        reducer=reducer,
        gradient=gradient,
    )


def stacked(
    tuned: Lora, client_tx: ClientTx, *, reducer: Reducer | None = None, gradient: Gradient = batch_gradient
) -> Algorithm:
    """FLoRA: the base takes the mean product, whose factors are the clients' stacked, and new adapters begin.

    ``W <- W + scale sum_i p_i A_i B_i``, which is the product of ``[p_1 A_1, p_2 A_2, ...]`` and ``[B_1; B_2; ...]``; A
    is drawn anew and B is zero in every round.

    Args:
      tuned, client_tx, reducer, gradient: as for ``fc.adapters.residual``.

    Returns:
      An ``Algorithm``, to be used like that of ``fc.adapters.residual``. ``bytes_down`` are those of the stack, or of
      the matrices where these are smaller.

    Raises:
      InvalidInput: no ``Lora``, an argument of the wrong kind.

    Example:
      >>> tuned = fc.lora(per_example_loss, params, rank=2, pattern="w")
      >>> algorithm = fc.adapters.stacked(tuned, optax.sgd(0.1))

    Source: Wang et al. (2024), "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations".
    """

    def after(now: Round, adapters: PyTree, mean: PyTree, products: dict[str, Array]) -> tuple[PyTree, PyTree]:
        here = jax.random.fold_in(jax.random.fold_in(keys.threefry(now.key), now.server.round), FRESH)
        return products, optax.tree.sub(tuned.fresh(here), adapters)

    return _made(
        "stacked",
        tuned,
        client_tx,
        after,
        lambda size, full, clients: jnp.minimum(clients * size, full),
        reducer=reducer,
        gradient=gradient,
    )


def decomposed(
    tuned: Lora,
    client_tx: ClientTx,
    ranks: Sequence[int] | np.ndarray | None = None,
    *,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """FlexLoRA: the mean product's best approximation of the adapters' rank; clients may have smaller ranks.

    ``A = U`` and ``B = S V^T`` of the largest singular values of ``<A_i B_i>``. The base stays as it is. A client of
    rank r_i begins with the first r_i columns of A and rows of B, and sends as many.

    Args:
      tuned, client_tx, reducer, gradient: as for ``fc.adapters.residual``.
      ranks: ``[N]``, of each client, from 1 to the adapters'; by default all have the adapters'.

    Returns:
      An ``Algorithm``, to be used like that of ``fc.adapters.residual``. Bytes are those of each client's A and B.
      Metrics: with ``ranks`` ``adapter_rank``, the cohort's mean.

    Raises:
      InvalidInput: no ``Lora``, an argument of the wrong kind, ranks out of range; (when a run begins) another number
        of clients.

    Example:
      >>> tuned = fc.lora(per_example_loss, params, rank=2, pattern="w")
      >>> algorithm = fc.adapters.decomposed(tuned, optax.sgd(0.1))

    Source: Bai et al. (2024), "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
    Resources" (FlexLoRA).
    """

    def after(now: Round, adapters: PyTree, mean: PyTree, products: dict[str, Array]) -> tuple[PyTree, PyTree]:
        best = {name: factors(products[name], x["b"].shape[0]) for name, x in adapters.items()}
        return jax.tree.map(jnp.zeros_like, products), optax.tree.sub(best, adapters)

    return _made(
        "decomposed",
        tuned,
        client_tx,
        after,
        lambda size, full, clients: size,
        ranks,
        reducer=reducer,
        gradient=gradient,
    )


def factors(product: Array, rank: int) -> dict[str, Array]:
    """``{"a", "b"}`` of the nearest matrix of a rank: ``U`` and ``S V^T``."""
    u, s, v = jnp.linalg.svd(product, full_matrices=False)
    return {"a": u[:, :rank], "b": s[:rank, None] * v[:rank]}


After = Callable[[Round, PyTree, PyTree, dict[str, Array]], tuple[dict[str, Array], PyTree]]


def _made(
    name: str,
    tuned: Lora,
    client_tx: ClientTx,
    after: After,
    sends: Callable[[float, float, Array], Array | float],
    ranks: Sequence[int] | np.ndarray | None = None,
    **parts: Any,
) -> Algorithm:
    """An algorithm whose server gets the mean of the products A_i B_i.

    Args:
      after: ``(now, adapters, mean adapters, mean products) -> (changes of the matrices over scale, of the adapters)``.
      sends: ``(bytes of the adapters, of the matrices, number of clients) -> bytes`` that a client is sent.
    """
    checks.kind(f"{name}'s tuned", tuned, Lora, "made by fc.lora")
    own_ranks = None if ranks is None else _ranks(name, ranks)

    def round(now: Round):
        x = now.server.params
        adapters = x["adapters"]
        if (
            tuned.whole
            or any("m" in pair for pair in adapters.values())
            or any(is_quantised(w) for w in jax.tree.leaves(x["base"], is_leaf=is_quantised))
        ):
            raise InvalidInput(
                f"{name} changes the base's matrices by A B alone: give fc.lora no whole= and no dora=, and a base "
                "that is not in few bits, or use fc.fedavg."
            )
        rank = min(pair["b"].shape[0] for pair in adapters.values())
        if own_ranks is not None and own_ranks.max() > rank:
            raise InvalidInput(f"{name}'s ranks must be at most the adapters', {rank}, not {own_ranks.max()}.")

        def client_fn(x, client, key):
            mine = x["adapters"]
            report = {}
            if own_ranks is not None:
                own = jnp.asarray(own_ranks)[client.id]
                mine = {name: _first(pair, own) for name, pair in mine.items()}
                report = {"adapter_rank": Mean.of(own.astype(jnp.float32), jnp.ones(()))}
            loss = stateful.rebased(client.per_example_loss, lambda u: {**x, "adapters": u})
            y, _, _, steps = dataclasses.replace(client, per_example_loss=loss).local_steps(mine, key)
            changes = optax.tree.sub(products(y), products(x["adapters"]))
            update = {"base": _placed(x["base"], changes), "adapters": optax.tree.sub(y, x["adapters"])}
            return update, client.state.own, steps | report

        answer = now.exchange(client_fn, x)
        mean = optax.tree.add(adapters, answer.update["adapters"])
        before = products(adapters)
        moved = dict(tree.named_leaves(answer.update["base"]))
        matrices, pairs = after(now, adapters, mean, {k: p + moved[k].reshape(p.shape) for k, p in before.items()})
        scaled = {k: tuned.scale * change for k, change in matrices.items()}
        update = {"base": _placed(x["base"], scaled), "adapters": pairs}
        metrics = answer.metrics
        share = metrics["adapter_rank"] / rank if "adapter_rank" in metrics else 1.0
        size, full = float(tree.nbytes(adapters)), float(tree.nbytes(before))
        traffic = {
            "bytes_up": metrics["asked"] * size * share,
            "bytes_down": metrics["asked"] * sends(size * share, full, metrics["clients"]),
        }
        return now.step(answer._replace(metrics=metrics | traffic), update)

    made = algorithm(round, tuned.per_example_loss, client_tx, broadcasts=False, **parts)
    return made if own_ranks is None else made._replace(population=max(made.population, len(own_ranks)))


def products(adapters: PyTree) -> dict[str, Array]:
    """``A B`` of each pair."""
    return {name: pair["a"] @ pair["b"] for name, pair in adapters.items()}


def _placed(base: Params, changes: dict[str, Array]) -> Params:
    """A pytree like the base: the changes of matrices in their places, and zeros."""
    named = tree.named_leaves(base)
    leaves = [changes[k].reshape(w.shape).astype(w.dtype) if k in changes else jnp.zeros_like(w) for k, w in named]
    return jax.tree.unflatten(jax.tree.structure(base), leaves)


def _first(pair: dict[str, Array], rank: Array) -> dict[str, Array]:
    """The first columns of A and rows of B; the others are zero, and their gradients, too."""
    kept = (jnp.arange(pair["b"].shape[0], dtype=jnp.int32) < rank).astype(pair["a"].dtype)
    return {"a": pair["a"] * kept, "b": pair["b"] * kept[:, None]}


def _ranks(name: str, ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    found = np.asarray(ranks)
    if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer) or found.min() < 1:
        raise InvalidInput(f"{name}'s ranks must be whole numbers from 1, one for each client.")
    return found.astype(np.int32)
