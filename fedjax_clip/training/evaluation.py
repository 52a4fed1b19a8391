"""Held-out scores: means over examples, scores of each client, and scores that are not means, such as AUROC."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from fedjax_clip.core import checks, metrics, tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.loss import batch_loss, example_values
from fedjax_clip.core.types import Algorithm, Array, InvalidInput, Metrics, Params, PerExampleLoss, PyTree, Row
from fedjax_clip.data.population import FederatedData, check_sets
from fedjax_clip.placement import Mesh
from fedjax_clip.training import owned
from fedjax_clip.training.processes import ALONE, Processes
from fedjax_clip.training.states import of as states_of

Values: TypeAlias = dict[str, np.ndarray]  # of each example [N]: its loss and what the loss reports besides
Summary: TypeAlias = Callable[[Values, FederatedData], Mapping[str, float]]


def evaluator(
    per_example_loss: PerExampleLoss,
    sets: Mapping[str, FederatedData],
    *,
    algorithm: Algorithm | None = None,
    population: FederatedData | None = None,
    summarise: Summary | None = None,
    batch_size: int = 1024,
    devices: Mesh | None = None,
) -> "Evaluator":
    """Evaluates a model on held-out sets: means over all examples, or over the examples of each client.

    ``sum_i w_i v_i / sum_i w_i`` over the examples i, with example weights w. The value v is the loss, the accuracy, or
    another metric that the loss reports. One compiled program evaluates ``batch_size`` examples at a time, for all sets
    with the same fields. The host sums in float64. Only the last batch of a set is padded, and padding has weight 0.

    Args:
      per_example_loss: the training loss; called with ``key=None``, so nothing in it is random.
      sets: populations by name, such as ``{"examples": held_out_examples, "clients": held_out_clients}``.
      algorithm: if its clients have models of their own (``algorithm.personal``), each client's examples are judged by
        the model of the training client of the same name. Other clients are new and begin with the server's model.
      population: the training population, which gives the clients' names; needed with such an algorithm.
      summarise: ``(values of every example {name: [N]}, set) -> {name: score}``, for scores that are not means, such as
        the area under a ROC curve.
      batch_size: examples at a time.
      devices: a mesh of ``fc.placement.mesh`` for a model that is split over devices; this process's rows share the
        examples. By default the first device evaluates a whole model.

    Returns:
      An ``Evaluator``: ``evaluate(params)``, or ``evaluate(params, clients)`` with the clients' states ``[M, ...]``,
      gives ``{"examples/loss": ..., "examples/accuracy": ..., ...}``; ``evaluate.per_client(params)`` gives
      ``{"examples/loss": float64[C], ...}`` of the C clients of each set.

    Raises:
      InvalidInput: sets that are not populations by name; no ``population`` where one is needed; (when called) a loss
        of the wrong shape.

    Example:
      >>> evaluate = fc.evaluator(per_example_loss, {"examples": held_out, "clients": held_out_clients})
      >>> result = fc.train(algorithm, data, params, rounds=100, cohort_size=10, evaluate=evaluate)
      >>> result.history[-1]["eval/clients/accuracy"] > 0.8
      True
      >>> worst = evaluate.per_client(result.params)["clients/loss"].argmax()
      >>> name = held_out_clients.name(worst)  # of the client that the model serves worst
    """
    check_sets("sets", sets)
    checks.kind("algorithm", algorithm, Algorithm | None, "an algorithm such as fc.fedavg(...)")
    checks.kind("population", population, FederatedData | None, "the FederatedData that is trained on")
    checks.kind("devices", devices, Mesh | None, "a mesh such as fc.placement.mesh(clients=4, model=2)")
    batch_size = checks.count("batch_size", batch_size)
    if algorithm is None or algorithm.personal is None:
        algorithm = None
    elif population is None:
        raise InvalidInput(
            "This algorithm's clients have models of their own: give fc.evaluator the population that trains."
        )
    return Evaluator(per_example_loss, sets, algorithm, population, summarise, batch_size, devices and devices.mine)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """The evaluator that ``fc.evaluator`` returns."""

    per_example_loss: PerExampleLoss
    sets: Mapping[str, FederatedData]
    algorithm: Algorithm | None  # if its clients have models of their own
    population: FederatedData | None
    summarise: Summary | None
    batch_size: int
    devices: Mesh | None  # of this process

    def __call__(self, params: Params, clients: PyTree = ()) -> Row:
        """Means over all examples of each set, and what ``summarise`` makes of them.

        Args:
          params: the model's parameters.
          clients: the training clients' states ``[M, ...]``, for an algorithm with models of their own.

        Returns:
          ``{"set/loss": ..., "set/name": ...}``.
        """
        return self.shared(params, clients, ALONE)

    def shared(self, params: Params, clients: PyTree, processes: Processes) -> Row:
        """The same scores, where each process evaluates its share of the batches and learns the values of all."""
        scores: Row = {}
        for name, data in self.sets.items():
            values = self.values(name, params, clients, processes)
            found = {key: _mean(x.astype(np.float64), data.weights) for key, x in values.items()}
            scores |= metrics.prefixed(name, found | dict(self.summarise(values, data) if self.summarise else {}))
        return scores

    def per_client(self, params: Params, clients: PyTree = ()) -> Values:
        """The same means over the examples of each client alone, which show the clients that the model serves badly.

        Args:
          params, clients: as for a call.

        Returns:
          ``{"set/loss": float64[C], ...}``, C the clients of the set.
        """
        scores: Values = {}
        for name, data in self.sets.items():
            weights = np.ones(data.num_examples) if data.weights is None else np.asarray(data.weights, np.float64)
            totals = np.add.reduceat(weights, data.offsets[:-1])
            for key, x in self.values(name, params, clients).items():
                sums = np.add.reduceat(_counted(x.astype(np.float64), weights) * weights, data.offsets[:-1])
                scores[f"{name}/{key}"] = np.divide(sums, totals, out=np.full(len(sums), np.nan), where=totals > 0)
        return scores

    @jax.transfer_guard("allow")
    def values(self, name: str, params: Params, clients: PyTree = (), processes: Processes = ALONE) -> Values:
        """The values of every example of a set, ``{"loss": [N], name: [N]}``."""
        data = self.sets[name]
        size = min(self.batch_size, max(data.num_examples for data in self.sets.values()))
        params, parts = self._sent(params), []  # once, not with each batch
        states = self._states(data, params, clients, processes)
        turn = np.arange(processes.count * size).reshape(processes.count, size)  # each process takes one batch in turn
        for start in range(0, data.num_examples, turn.size):
            index = np.minimum(start + turn, data.num_examples - 1)  # the last one fills the batch
            batch = jax.tree.map(lambda x, index=index: x[index[processes.number]], data.examples)
            parts.append(jax.device_get(self._batch(params, states(index), batch)))
        found = {name: processes.gather(np.stack([part[name] for part in parts])) for name in parts[0]}
        return {name: np.swapaxes(x, 0, 1).ravel()[: data.num_examples] for name, x in found.items()}

    def _sent(self, params: Params) -> Params:
        """The parameters on the first device, or split over those of each row."""
        if self.devices is None:
            return jax.device_put(params)
        return jax.tree.map(jax.device_put, params, self.devices.whole(params))

    def _states(
        self, data: FederatedData, params: Params, clients: PyTree, processes: Processes
    ) -> Callable[[np.ndarray], PyTree]:
        """The states of the clients that own this process's of some examples, by the numbers ``[P, B]`` of all."""
        if self.algorithm is None or self.population is None:
            return lambda index: ()
        number = {self.population.name(c): c for c in range(self.population.num_clients)}
        trained = np.array([number.get(data.name(c), -1) for c in range(data.num_clients)])
        client_of = np.repeat(trained, data.sizes)
        kept, new = states_of(clients), self.algorithm.init_client(params)

        def states(index: np.ndarray) -> PyTree:
            client = client_of[index[processes.number]]

            def state(own: Any, begin: Any) -> np.ndarray:
                known = (client >= 0).reshape(-1, *[1] * np.ndim(begin))
                return np.where(known, own, begin)

            return jax.tree.map(state, owned.look_up(kept, client_of[index], processes), new)

        return states

    @functools.cached_property
    def _batch(self) -> Callable[[Params, PyTree, PyTree], dict[str, Array]]:
        """The compiled program: values of one batch, each example under the model that its client uses."""
        loss, personal = self.per_example_loss, self.algorithm and self.algorithm.personal

        @jax.jit
        def batch_values(params, states, batch):
            if self.devices is not None and len(jax.tree.leaves(batch)[0]) % len(self.devices) == 0:
                batch = jax.lax.with_sharding_constraint(batch, self.devices.sharding())
            if personal is None:
                return example_values(loss, params, batch, None, len(jax.tree.leaves(batch)[0]))

            def one(state, example):
                alone = jax.tree.map(lambda x: x[None], example)
                values = example_values(loss, personal(params, state), alone, None, 1)
                return {name: x[0] for name, x in values.items()}

            return jax.vmap(one)(states, batch)

        return batch_values


def _mean(values: np.ndarray, weights: Any) -> float:
    """The weighted mean; NaN if all weights are 0, as in a row of training."""
    if weights is None:
        return float(np.mean(values))
    return float(np.average(_counted(values, weights), weights=weights)) if np.any(weights) else math.nan


def _counted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The values, set to 0 where the weight is 0, so that a NaN of padding does not spread."""
    return np.where(weights > 0, values, 0)


ROWS_BATCH = 256


class Rows(NamedTuple):
    """Examples to evaluate on inside a compiled program, by ``number [T, B]``, and their weights, 0 where padded."""

    number: Array | np.ndarray
    weight: Array | np.ndarray


def rows(data: FederatedData, index: np.ndarray, least: int = 0) -> Rows:
    """These examples of ``data`` in batches, with room for ``least`` of them."""
    size = min(ROWS_BATCH, max(least, len(index)))
    shape = -(-max(least, len(index)) // size), size
    padded, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    padded.flat[: len(index)] = index
    weight.flat[: len(index)] = 1.0 if data.weights is None else data.weights[index]
    return Rows(padded, weight)


def measure(per_example_loss: PerExampleLoss, params: Params, examples: PyTree, rows: Rows, due: Array) -> Metrics:
    """An evaluator's means inside a compiled program, summed in float32; nothing is computed unless ``due``."""
    batches = Cohort((), (), (), (), rows.number, rows.weight, population=examples)  # type: ignore[arg-type] # no clients

    def report(i: Array) -> Metrics:
        out = batch_loss(per_example_loss, params, *batches.read(i), None)[1]
        return {name: value for name, value in out.items() if isinstance(value, metrics.Mean)}

    count = jnp.where(due, jnp.int32(len(rows.number)), 0)
    report, zeros = tree.traced(report, 0)
    total = jax.lax.fori_loop(0, count, lambda i, acc: metrics.add(acc, report(i)), zeros)
    return metrics.finish(total)


def by_client(values: np.ndarray, data: FederatedData) -> dict[str, np.ndarray]:
    """The values of each client's examples, ``{name: [n_c]}``.

    Args:
      values: ``[N]``, of all examples in the order in which they are stored.
      data: the population that they are from.

    Example:
      >>> table = fc.FederatedData.from_clients({"ann": {"x": np.zeros(2)}, "bob": {"x": np.zeros(1)}})
      >>> by_client(np.array([0.1, 0.2, 0.3]), table)["ann"].tolist()
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
      Between 0 and 1; NaN where one of the classes is missing, or a score is NaN.

    Example:
      >>> auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
      0.75

    Source: Hanley and McNeil (1982), "The Meaning and Use of the Area under a ROC Curve".
    """
    ranks = scipy.stats.rankdata(scores)
    positive = np.asarray(labels).astype(bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    above = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of predicted probabilities: ``sum_b n_b / n |mean label - mean probability|``.

    Over ``bins`` equal bins of the probability. With few examples it is far from 0 by chance.

    Args:
      probabilities: ``[n]`` of the positive class.
      labels: ``[n]`` of 0 and 1.
      bins: number of bins.

    Example:
      >>> calibration_error(np.array([0.25, 0.25, 0.25, 0.25]), np.array([0, 0, 0, 1]))
      0.0

    Source: Naeini, Cooper and Hauskrecht (2015), "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
    """
    # scikit-learn has the curve of such bins, without the counts that weigh them, and is no dependency of the library.
    bin = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    gap = np.bincount(bin, np.asarray(labels, np.float64) - probabilities, bins)
    return float(np.abs(gap).sum() / len(bin))
