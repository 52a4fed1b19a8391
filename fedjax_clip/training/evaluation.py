"""Held-out scores: means over examples, scores of each client, and scores that are not means, such as AUROC."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks, metrics, tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.loss import batch_loss, example_values
from fedjax_clip.core.types import (
    Algorithm,
    Array,
    ClientState,
    InvalidInput,
    Metrics,
    Params,
    PerExampleLoss,
    PyTree,
    Row,
)
from fedjax_clip.data.population import FederatedData, check_sets
from fedjax_clip.placement import Mesh
from fedjax_clip.training import owned
from fedjax_clip.training.processes import ALONE, Processes
from fedjax_clip.training.scores import OverClients, Summary, Values, client_means, counted
from fedjax_clip.training.states import of as states_of


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
        the area under a ROC curve. ``fc.tasks.OverClients(summarise, ...)`` compares clients by such scores, too.
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


MODELS_BYTES = 2**28  # of the models with which a batch is evaluated, if each client has its own


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
            scores |= metrics.prefixed(name, found | self.summary(values, data))
        return scores

    def summary(self, values: Values, data: FederatedData) -> Row:
        """What ``summarise`` makes of a set's values."""
        return {name: float(x) for name, x in self.summarise(values, data).items()} if self.summarise else {}

    def names(self, params: Params) -> list[str]:
        """The names of all scores, ``["set/loss", ...]``; nothing is evaluated.

        Args:
          params: the model's parameters, or their shapes.
        """
        found: list[str] = []
        for name, data in self.sets.items():
            one = jax.tree.map(lambda x: x[:1], data.examples)
            shapes = jax.eval_shape(
                lambda p, x: example_values(self.per_example_loss, self._any(p), x, None, 1), params, one
            )
            values = {key: np.zeros(data.num_examples, x.dtype) for key, x in shapes.items()}
            found += [f"{name}/{key}" for key in values | self.summary(values, data)]
        return found

    def _any(self, params: Params) -> Params:
        """The parameters of some client's model."""
        if self.algorithm is None:
            return params
        assert self.algorithm.personal is not None
        return self.algorithm.personal(params, self.algorithm.init_client(params))

    def per_client(self, params: Params, clients: PyTree = ()) -> Values:
        """The same means over the examples of each client alone, which show the clients that the model serves badly.

        With a ``summarise`` that compares clients (``OverClients``), also each client's own scores; NaN for a client
        that has none.

        Args:
          params, clients: as for a call.

        Returns:
          ``{"set/loss": float64[C], ...}``, C the clients of the set.
        """
        scores: Values = {}
        for name, data in self.sets.items():
            values = self.values(name, params, clients)
            own = self.summarise.of_clients(values, data) if isinstance(self.summarise, OverClients) else {}
            scores |= metrics.prefixed(name, client_means(values, data) | own)
        return scores

    @jax.transfer_guard("allow")
    def values(self, name: str, params: Params, clients: PyTree = (), processes: Processes = ALONE) -> Values:
        """The values of every example of a set, ``{"loss": [N], name: [N]}``."""
        data = self.sets[name]
        params, parts = self._sent(params), []  # once, not with each batch
        size = min(self.batch_size, max(data.num_examples for data in self.sets.values()))
        if self.algorithm is not None:  # each example of a batch has a model of its own
            size = min(size, max(1, MODELS_BYTES // max(1, tree.nbytes(self._any(params)))))
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
        kept, new = states_of(clients), _without_links(self.algorithm.init_client(params))

        def states(index: np.ndarray) -> PyTree:
            client = client_of[index[processes.number]]

            def state(own: Any, begin: Any) -> np.ndarray:
                known = (client >= 0).reshape(-1, *[1] * np.ndim(begin))
                return np.where(known, own, begin)

            return jax.tree.map(state, _without_links(owned.look_up(kept, client_of[index], processes)), new)

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

            return _each_by_its_own(loss, personal, params, states, batch)

        return batch_values


def _each_by_its_own(
    loss: PerExampleLoss, personal: Callable[[Params, PyTree], Params], params: Params, states: PyTree, batch: PyTree
) -> dict[str, Array]:
    """The values of a batch, each example under the model of its client's state, ``[B, ...]``."""
    loss = getattr(loss, "single", loss)  # one example of a model with state is not filled up to more

    def one(state: PyTree, example: PyTree) -> dict[str, Array]:
        alone = jax.tree.map(lambda x: x[None], example)
        values = example_values(loss, personal(params, state), alone, None, 1)
        return {name: x[0] for name, x in values.items()}

    return jax.vmap(one)(states, batch)


def _without_links(state: PyTree) -> PyTree:
    """A client's state without that of its links, of which no model depends."""
    return state._replace(uplink=()) if isinstance(state, ClientState) else state


def _mean(values: np.ndarray, weights: Any) -> float:
    """The weighted mean; NaN if all weights are 0, as in a row of training."""
    if weights is None:
        return float(np.mean(values))
    return float(np.average(counted(values, weights), weights=weights)) if np.any(weights) else math.nan


ROWS_BATCH = 256


class Rows(NamedTuple):
    """Examples to evaluate on inside a compiled program, by ``number [T, B]``, and their weights, 0 where padded.

    ``owner`` is the number of the training client whose examples they are, -1 of a client that did not train.
    """

    number: Array | np.ndarray
    weight: Array | np.ndarray
    owner: Array | np.ndarray


def rows(data: FederatedData, index: np.ndarray, trained: FederatedData, least: int = 0) -> Rows:
    """These examples of ``data`` in batches, with room for ``least`` of them; clients train under the same names."""
    size = min(ROWS_BATCH, max(least, len(index)))
    shape = -(-max(least, len(index)) // size), size
    padded, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    padded.flat[: len(index)] = index
    weight.flat[: len(index)] = 1.0 if data.weights is None else data.weights[index]
    owner, number = np.full(shape, -1, np.int32), {trained.name(c): c for c in range(trained.num_clients)}
    client = np.searchsorted(data.offsets, index, side="right") - 1
    owner.flat[: len(index)] = np.array([number.get(data.name(c), -1) for c in range(data.num_clients)])[client]
    return Rows(padded, weight, owner)


def measure(
    per_example_loss: PerExampleLoss,
    params: Params,
    examples: PyTree,
    rows: Rows,
    due: Array,
    algorithm: Algorithm,
    clients: PyTree,
) -> Metrics:
    """An evaluator's means inside a compiled program, summed in float32; nothing is computed unless ``due``.

    Where clients have models of their own, each example is judged by that of its client, of states ``[M, ...]``.
    """
    batches = Cohort((), (), (), (), rows.number, rows.weight, population=examples)  # type: ignore[arg-type] # no clients
    personal = algorithm.personal

    def report(i: Array) -> Metrics:
        batch, weight = batches.read(i)
        if personal is not None:
            state = states_of_owners(jax.lax.dynamic_index_in_dim(jnp.asarray(rows.owner), i, keepdims=False))
            values = _each_by_its_own(per_example_loss, personal, params, state, batch)
            return {name: metrics.Mean.of(x, weight) for name, x in values.items()}
        out = batch_loss(per_example_loss, params, batch, weight, None)[1]
        return {name: value for name, value in out.items() if isinstance(value, metrics.Mean)}

    def states_of_owners(owner: Array) -> PyTree:
        def state(own: Array, begin: Any) -> Array:
            known = (owner >= 0).reshape(-1, *[1] * jnp.ndim(begin))
            return jnp.where(known, own[jnp.maximum(owner, 0)], begin)

        return jax.tree.map(state, _without_links(clients), _without_links(algorithm.init_client(params)))

    count = jnp.where(due, jnp.int32(len(rows.number)), 0)
    report, zeros = tree.traced(report, 0)
    total = jax.lax.fori_loop(0, count, lambda i, acc: metrics.add(acc, report(i)), zeros)
    return metrics.finish(total)
