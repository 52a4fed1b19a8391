"""Federated statistics: sums over clients, and quantities that follow from sums.

Every number here is a function of ``federated_sums`` alone. Each caller thus shows what leaves a client: the message
function of one client, whose result's shape does not depend on the number of its examples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput, PyTree
from fedjax_clip.data import partition
from fedjax_clip.data.population import FederatedData


def federated_sums(data: FederatedData, message: Callable[[PyTree], PyTree]) -> PyTree:
    """``sum_c message(examples of client c)``: the only way in which statistics leave clients.

    Args:
      data: the population.
      message: of ONE client: a pytree of arrays with the same shapes at every client.

    Returns:
      The sum, which is all that the server sees; secure aggregation could compute it.

    Raises:
      InvalidInput: messages whose shapes differ between clients, as rows of examples would.

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"x": np.array([1.0, 2.0])}, "bob": {"x": np.array([5.0])}})
      >>> def client_fn(examples):
      ...   return len(examples["x"]), examples["x"].sum()
      >>> count, total = fc.data.statistics.federated_sums(data, client_fn)
      >>> int(count), float(total)
      (3, 8.0)
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    checks.takes("message", message, 1, "the examples of one client")
    total: Any = None
    for client in range(data.num_clients):
        sent = jax.tree.map(np.asarray, message(data.client(client)))
        shapes = jax.tree.map(np.shape, sent)
        if total is None:
            total, first = sent, shapes
        elif shapes != first:
            raise InvalidInput(
                f"Client {data.name(client)!r} sends {shapes} where {data.name(0)!r} sends {first}: these are no sums."
            )
        else:
            total = jax.tree.map(np.add, total, sent)
    return total


class Moments(NamedTuple):
    """The count, mean and standard deviation of each column; mean and deviation are 0 without values.

    Example:
      >>> moments = fc.data.statistics.Moments(np.array([10]), np.array([0.5]), np.array([0.1]))
    """

    present: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def moments(data: FederatedData, field: str = "x") -> Moments:
    """Counts, means and standard deviations of a field's columns, from two sums. NaN is a missing value.

    ``mean = sum x / n``, then ``std = sqrt(sum (x - mean)^2 / n)``: about the mean, because the difference of two large
    sums would lose digits.

    Args:
      data: the population.
      field: a field of numbers ``[N, ...]``.

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"x": np.array([1.0, np.nan])}, "bob": {"x": np.array([3.0])}})
      >>> present, mean, std = fc.data.statistics.moments(data)
      >>> int(present), float(mean), float(std)
      (2, 2.0, 1.0)
    """
    check_field(data, field)

    def count_and_total(examples):
        x = examples[field].astype(np.float64)
        return (~np.isnan(x)).sum(0), np.nansum(x, axis=0)

    count, total = federated_sums(data, count_and_total)
    mean = total / np.maximum(count, 1)
    squares = federated_sums(data, lambda e: np.nansum((e[field].astype(np.float64) - mean) ** 2, axis=0))
    return Moments(count, mean, np.sqrt(squares / np.maximum(count, 1)))


def quantiles(data: FederatedData, q: Sequence[float], field: str = "x") -> np.ndarray:
    """Quantiles of a field's columns by bisection: the server asks 32 times how many values lie below a number.

    The result is exactly the least value v with ``#(x <= v) >= q n``: the bisection runs over all float32 numbers in
    order, so no range must be known. Clients send counts. But the result is one of the values, so the server learns
    more than a count.

    Args:
      data: the population.
      q: ``[Q]`` between 0 and 1.
      field: a field of float32 ``[N, ...]``; NaN is a missing value.

    Returns:
      float32 ``[Q, ...]``; NaN for a column without values.

    Example:
      >>> data = fc.FederatedData({"x": np.arange(20, dtype=np.float32)}, np.array([0, 3, 20]))
      >>> fc.data.statistics.quantiles(data, [0.5, 0.9]).tolist()
      [9.0, 17.0]
    """
    x = check_field(data, field)
    if x.dtype != np.float32:
        raise InvalidInput(f"Field {field!r} must hold float32 numbers, not {x.dtype}.")
    for level in np.ravel(np.asarray(q, object)):
        checks.within("A quantile", level, 0, 1)
    levels = np.asarray(q, np.float64).reshape(-1, *[1] * (x.ndim - 1))
    count = federated_sums(data, lambda e: (~np.isnan(e[field])).sum(0))
    wanted = np.maximum(1, np.ceil(levels * count))
    shape = np.broadcast_shapes(levels.shape, count.shape)
    low, high = (np.full(shape, _place(np.float32(v)), np.int64) for v in (-np.inf, np.inf))
    low -= 1
    # Invariant: too few values are at most low, and enough are at most high. 32 halvings separate all float32 numbers.
    for _ in range(32):
        middle = (low + high) // 2
        values = _number(middle)
        below = federated_sums(data, lambda e: np.stack([(e[field] <= v).sum(0) for v in values]))  # noqa: B023 (called here)
        enough = below >= wanted
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(count > 0, _number(high), np.float32(np.nan))


def label_counts(data: FederatedData, num_classes: int, label: str = "y") -> np.ndarray:
    """``[K]`` examples of each class in the whole population; clients send their own counts.

    Args:
      data: with labels ``0 .. num_classes - 1`` in a field.
      num_classes: K.
      label: the field.

    Raises:
      InvalidInput: other labels than that.

    Example:
      >>> data = fc.FederatedData({"y": np.array([0, 1, 1, 1])}, np.array([0, 3, 4]))
      >>> fc.data.statistics.label_counts(data, num_classes=2).tolist()
      [1, 3]
    """
    check_labels(data, num_classes, label)
    num_classes = int(num_classes)
    return federated_sums(data, lambda examples: np.bincount(examples[label], minlength=num_classes))


def check_field(data: FederatedData, field: str) -> np.ndarray:
    """A field of the examples, ``[N, ...]``.

    Args:
      data: any population.
      field: its name.

    Raises:
      InvalidInput: no such field.

    Example:
      >>> fc.data.statistics.check_field(data, "y").dtype
      dtype('int32')
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    checks.kind("A field", field, str, "the name of one")
    if not isinstance(data.examples, Mapping) or field not in data.examples:
        raise partition.no_field(field, data.fields())
    return data.examples[field]


def check_labels(data: FederatedData, num_classes: int, label: str) -> np.ndarray:
    """A field of integers ``0 .. num_classes - 1``, ``[N]``.

    Args:
      data: any population.
      num_classes: the number of classes.
      label: the field.

    Raises:
      InvalidInput: other labels than that; it names the client that holds them.

    Example:
      >>> len(fc.data.statistics.check_labels(data, 10, "y")) == data.num_examples
      True
    """
    labels, num_classes = check_field(data, label), checks.count("num_classes", num_classes)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InvalidInput(f"Labels {label!r} must be whole numbers [N], not {labels.dtype} of shape {labels.shape}.")
    if (bad := np.flatnonzero((labels < 0) | (labels >= num_classes))).size:
        client = int(np.searchsorted(data.offsets, bad[0], side="right")) - 1
        raise InvalidInput(
            f"Client {data.name(client)!r} has the label {labels[bad[0]]}: they must run from 0 to {num_classes - 1}."
        )
    return labels


def _place(x: np.float32) -> int:
    """The position of a number in the order of all float32 numbers."""
    bits = int(np.float32(x).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _number(place: np.ndarray) -> np.ndarray:
    """The float32 number at a position of the order."""
    bits = np.abs(place).astype(np.int32)
    return np.where(place < 0, -bits.view(np.float32), bits.view(np.float32))
