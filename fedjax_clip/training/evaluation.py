"""Held-out examples one by one, each under the model that its client uses, and scores that no mean gives."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.loss import example_values
from fedjax_clip.core.metrics import prefixed
from fedjax_clip.core.types import Algorithm, Params, PerExampleLoss, PyTree
from fedjax_clip.data.population import FederatedData, check_sets

Values: TypeAlias = dict[str, np.ndarray]  # of each example [N]: its loss and what the loss says besides
Summary: TypeAlias = Callable[[Values, FederatedData], Mapping[str, float]]


def client_evaluator(
    algorithm: Algorithm,
    per_example_loss: PerExampleLoss,
    population: FederatedData,
    sets: Mapping[str, FederatedData],
    summarise: Summary | None = None,
    batch_size: int = 1024,
) -> Callable[[Params, PyTree], dict[str, float]]:
    """An ``evaluate_clients`` for ``train``: as ``fc.evaluator``, but of the model that each client uses itself.

    That is ``algorithm.personal(params, state)``, where the algorithm has one, of the training client of the same name;
    a client that is not among those that train is new, and uses what it would begin with.

    Args:
      algorithm: the one that trains.
      per_example_loss: called with ``key=None``, so nothing in it is random.
      population: the training population.
      sets: held-out populations by name.
      summarise: ``(values of every example, held-out population) -> {name: score}``, for scores that are not means,
        such as ``auroc``, or that are taken for each client.
      batch_size: examples at a time.

    Returns:
      ``(params, clients [M, ...]) -> {"examples/loss": ..., "examples/accuracy": ..., ...}``.

    Example:
      >>> algorithm = fc.partially_private(per_example_loss, client_tx, private="^b")
      >>> evaluate = fc.extend.client_evaluator(algorithm, per_example_loss, data, {"examples": held_out})
      >>> result = fc.train(algorithm, data, params, rounds=10, evaluate_clients=evaluate)
    """
    values_of = _values_of(per_example_loss, sets, batch_size, algorithm, population)

    def evaluate(params: Params, clients: PyTree) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name, data in sets.items():
            values = values_of(name, params, clients)
            found = {key: float(np.average(x.astype(np.float64), weights=data.weights)) for key, x in values.items()}
            scores |= prefixed(name, found | dict(summarise(values, data) if summarise else {}))
        return scores

    return evaluate


def per_client(
    per_example_loss: PerExampleLoss,
    sets: Mapping[str, FederatedData],
    batch_size: int = 1024,
    *,
    algorithm: Algorithm | None = None,
    population: FederatedData | None = None,
) -> Callable[..., Values]:
    """As ``fc.evaluator``, but for every client by itself: a mean hides whom the model does not serve.

    ``sum_i w_i v_i / sum_i w_i`` over the examples i of each client, with example weights w and v the loss, the
    accuracy, ... Examples are laid end to end, whosever they are, and go ``batch_size`` at a time through one
    compiled program for all sets of the same fields; the sums are the host's, in float64. So ragged clients cost no
    padding but that of the last batch, which no sum sees.

    Args:
      per_example_loss: the training loss; called with ``key=None``, so nothing in it is random.
      sets: populations by name, such as ``{"examples": held_out_examples, "clients": held_out_clients}``.
      batch_size: examples at a time.
      algorithm: if given, each client's own model is used, as in ``fc.extend.client_evaluator``.
      population: the training population; with ``algorithm``.

    Returns:
      ``(params, clients [M, ...] = ()) -> {"examples/loss": float64[M], "examples/accuracy": float64[M], ...}``, M the
      clients of the set.

    Raises:
      InvalidInput: sets that are not populations by name; a loss of the wrong shape.

    Example:
      >>> scores = fc.extend.per_client(per_example_loss, {"clients": held_out_clients})(result.params)
      >>> held_out_clients.name(scores["clients/accuracy"].argmin())  # the client that is served worst
    """
    values_of = _values_of(per_example_loss, sets, batch_size, algorithm, population)

    def evaluate(params: Params, clients: PyTree = ()) -> Values:
        scores: Values = {}
        for name, data in sets.items():
            weights = np.ones(data.num_examples) if data.weights is None else np.asarray(data.weights, np.float64)
            totals = np.add.reduceat(weights, data.offsets[:-1])
            for key, values in values_of(name, params, clients).items():
                sums = np.add.reduceat(weights * values.astype(np.float64), data.offsets[:-1])
                scores[f"{name}/{key}"] = sums / totals
        return scores

    return evaluate


def _values_of(
    per_example_loss: PerExampleLoss,
    sets: Mapping[str, FederatedData],
    batch_size: int,
    algorithm: Algorithm | None,
    population: FederatedData | None,
) -> Callable[[str, Params, PyTree], Values]:
    """``(set, params, clients) -> Values``: the last batch is filled with the last example, and cut off again."""
    check_sets("sets", sets)
    checks.kind("algorithm", algorithm, Algorithm | None, "an algorithm such as fc.fedavg(...)")
    checks.kind("population", population, FederatedData | None, "the FederatedData that is trained on")
    batch_size = checks.count("batch_size", batch_size)
    personal = algorithm.personal if algorithm else None
    names = [population.name(c) for c in range(population.num_clients)] if personal and population else []
    number = {name: c for c, name in enumerate(names)}
    size = min(batch_size, max((data.num_examples for data in sets.values()), default=1))

    @jax.jit
    def batch_values(params, states, batch):
        if personal is None:
            return example_values(per_example_loss, params, batch, None, size)

        def one(state, example):
            alone = jax.tree.map(lambda x: x[None], example)
            values = example_values(per_example_loss, personal(params, state), alone, None, 1)
            return {name: x[0] for name, x in values.items()}

        return jax.vmap(one)(states, batch)

    @jax.transfer_guard("allow")
    def values_of(name: str, params: Params, clients: PyTree) -> Values:
        data = sets[name]
        trained = np.array([number.get(data.name(c), -1) for c in range(data.num_clients)])
        client_of = np.repeat(trained, data.sizes)
        new = algorithm.init_client(params) if algorithm and personal else None
        params, parts = jax.device_put(params), []  # once, not with each batch
        for start in range(0, data.num_examples, size):
            index = np.minimum(np.arange(start, start + size), data.num_examples - 1)
            client = client_of[index]

            def state(kept, begin, client=client):
                known = (client >= 0).reshape(-1, *[1] * np.ndim(begin))
                return np.where(known, kept[np.maximum(client, 0)], begin)

            states = jax.tree.map(state, clients, new) if personal else None
            batch = jax.tree.map(lambda x, index=index: x[index], data.examples)
            parts.append(jax.device_get(batch_values(params, states, batch)))
        return {name: np.concatenate([part[name] for part in parts])[: data.num_examples] for name in parts[0]}

    return values_of


def by_client(values: np.ndarray, data: FederatedData) -> dict[str, np.ndarray]:
    """The values of each client's examples, ``{name: [n_c]}``.

    Args:
      values: ``[N]``, of all examples in the order in which they are stored.
      data: the population that they are from.

    Example:
      >>> table = fc.FederatedData.from_clients({"ann": {"x": np.zeros(2)}, "bob": {"x": np.zeros(1)}})
      >>> fc.extend.evaluation.by_client(np.array([0.1, 0.2, 0.3]), table)["ann"].tolist()
      [0.1, 0.2]
    """
    return dict(zip(map(data.name, range(data.num_clients)), np.split(values, data.offsets[1:-1]), strict=True))


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive example scores above a negative one, ties counting half.

    From ranks: ``(sum of the positives' ranks - P (P + 1) / 2) / (P N)``.

    Args:
      scores: ``[n]``, larger where positive is likelier.
      labels: ``[n]`` of 0 and 1.

    Returns:
      Between 0 and 1; NaN where one of the classes is missing.

    Example:
      >>> fc.extend.evaluation.auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
      0.75

    Source: Hanley and McNeil (1982), "The Meaning and Use of the Area under a ROC Curve".
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positive = np.asarray(labels).astype(bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    above = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of predicted probabilities: ``sum_b n_b / n |mean label - mean probability|``.

    Over ``bins`` equal bins of the probability. Of few examples it is far from 0 by chance.

    Args:
      probabilities: ``[n]`` of the positive class.
      labels: ``[n]`` of 0 and 1.
      bins: how many.

    Example:
      >>> fc.extend.evaluation.calibration_error(np.array([0.25, 0.25, 0.25, 0.25]), np.array([0, 0, 0, 1]))
      0.0

    Source: Naeini, Cooper and Hauskrecht (2015), "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
    """
    bin = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    gap = np.bincount(bin, np.asarray(labels, np.float64) - probabilities, bins)
    return float(np.abs(gap).sum() / len(bin))
