"""Data quality and imbalance: functions from populations to populations.

Statistics come from sums that clients send (``fedjax_clip.data.statistics``). Every client then changes its own
examples. The statistics are exact, so the training's epsilon does not cover them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import draws
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.statistics import check_field, check_labels, label_counts, moments, quantiles

Columns: TypeAlias = Sequence[int] | slice
# Fitted to one population, applied to any. Those of this module return a ``functools.partial``, and its keywords are
# what was fitted.
Step: TypeAlias = Callable[[FederatedData], Callable[[FederatedData], FederatedData]]


def prepare(populations: Sequence[FederatedData], *steps: Step) -> tuple[FederatedData, ...]:
    """Applies steps in order to all populations; each step is fitted to the FIRST population alone, the training one.

    Example:
      >>> train = fc.FederatedData.from_clients({"ann": {"x": np.array([[1.0], [np.nan]], np.float32)}})
      >>> (train,) = fc.data.quality.prepare([train], fc.data.quality.impute(), fc.data.quality.standardise(slice(1)))
      >>> train.examples["x"].tolist()  # the column, and whether it was missing
      [[0.0, 0.0], [0.0, 1.0]]
    """
    for step in steps:
        apply = step(populations[0])
        populations = [apply(population) for population in populations]
    return tuple(populations)


def winsorise(tail: float = 0.01, columns: Columns = slice(None), field: str = "x") -> Step:
    """Moves outliers to the federated ``tail`` and ``1 - tail`` quantiles; clients send counts.

    Args:
      tail: between 0 and 0.5.
      columns: of ``field``, ``[N, d]``; leave out rare indicators, which would become constant.
      field: float32; NaN is a missing value and stays.

    Raises:
      InvalidInput: a tail out of range, no such field.

    Example:
      >>> table = fc.FederatedData.from_clients({"ann": {"x": np.float32([[1], [2], [3], [900]])}})
      >>> (cut,) = fc.data.quality.prepare([table], fc.data.quality.winsorise(tail=0.25))
      >>> cut.examples["x"].max() < 900
      np.True_

    Source: Tukey (1962), "The Future of Data Analysis".
    """
    checks.within("tail", tail, 0, np.nextafter(0.5, 0))

    def fit(data):
        low, high = quantiles(_narrow(data, field, columns), [tail, 1 - tail], field)
        return functools.partial(_clip, field=field, columns=columns, low=low, high=high)

    return fit


def impute(field: str = "x") -> Step:
    """Fills missing values (NaN) with the federated mean of their column and appends indicators of missing values.

    Clients send counts and totals, no examples. A column gets an indicator at all clients if one client misses a value.

    Args:
      field: floats ``[N, d]``; becomes ``[N, d + indicators]``.

    Raises:
      InvalidInput: a column that is missing at every client.

    Example:
      >>> table = fc.FederatedData.from_clients({"ann": {"x": np.float32([[1], [3], [np.nan]])}})
      >>> (filled,) = fc.data.quality.prepare([table], fc.data.quality.impute())
      >>> filled.examples["x"].tolist()  # the column, and whether it was missing
      [[1.0, 0.0], [3.0, 0.0], [2.0, 1.0]]

    Source: Little and Rubin, "Statistical Analysis with Missing Data", on means and indicators, and their limits.
    """

    def fit(data):
        x = check_field(data, field)
        count, mean, _ = moments(data, field)
        if (empty := np.flatnonzero(count == 0)).size:
            raise InvalidInput(f"Column {empty[0]} of {field!r} is missing at every client: leave it out.")
        indicated = count < data.num_examples
        return functools.partial(_fill, field=field, fill=mean.astype(x.dtype), indicated=indicated)

    return fit


def standardise(columns: Columns = slice(None), field: str = "x") -> Step:
    """``(x - mean) / std`` by the federated mean and standard deviation of each column; a constant becomes 0.

    Clients send counts, totals and sums of squares about the mean.

    Args:
      columns: of ``field``, ``[N, d]``.
      field: floats; NaN is a missing value and stays.

    Example:
      >>> table = fc.FederatedData.from_clients({"ann": {"x": np.float32([[1], [3]])}})
      >>> (scaled,) = fc.data.quality.prepare([table], fc.data.quality.standardise())
      >>> scaled.examples["x"].tolist()
      [[-1.0], [1.0]]
    """

    def fit(data):
        _, mean, std = moments(_narrow(data, field, columns), field)
        scale = np.where(std > 1e-7 * np.abs(mean), std, 1)  # a smaller deviation is the rounding of a constant
        return functools.partial(_scale, field=field, columns=columns, mean=mean, scale=scale)

    return fit


def weigh_classes(data: FederatedData, num_classes: int, label: str = "y", per_client: bool = False) -> FederatedData:
    """Example weights that give all classes equal weight: ``w_k = n / (K n_k)``, times existing weights.

    Args:
      data: the population.
      num_classes: K.
      label: the field of classes ``0 .. K - 1``.
      per_client: whether n, n_k and K are each client's own (K: the classes that it has), so that each client's classes
        weigh equally. Otherwise they are those of all clients together, from sums of label counts.

    Raises:
      InvalidInput: a class that occurs at no client.

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"y": np.array([0, 0, 0, 1])}})
      >>> fc.data.quality.weigh_classes(data, 2).weights.round(2).tolist()
      [0.67, 0.67, 0.67, 2.0]

    Source: King and Zeng (2001), "Logistic Regression in Rare Events Data".
    """
    labels, owner = check_labels(data, num_classes, label), _owner(data)
    if per_client:
        counts = _counts(data, labels, num_classes)
        weights = data.sizes[:, None] / np.maximum((counts > 0).sum(1, keepdims=True) * counts, 1)
        weights = weights[owner, labels]
    else:
        weights = (data.num_examples / (num_classes * _all_present(data, num_classes, label)))[labels]
    return dataclasses.replace(data, weights=weights if data.weights is None else weights * data.weights)


def oversample(
    data: FederatedData, num_classes: int, label: str = "y", per_client: bool = True, seed: int = 0
) -> FederatedData:
    """Repeats examples of rarer classes; every example stays.

    Args:
      data: the population.
      num_classes: K.
      label: the field of classes ``0 .. K - 1``.
      per_client: whether each class of a client becomes as frequent as the client's most frequent one. Otherwise every
        client repeats class k ``max_j n_j / n_k`` times, up to rounding, with n from sums of label counts.
      seed: chooses the examples that are repeated once more than others.

    Raises:
      InvalidInput: a class that occurs at no client, unless ``per_client``.

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"y": np.array([0, 0, 0, 1])}})
      >>> fc.data.quality.oversample(data, 2).examples["y"].tolist()
      [0, 0, 0, 1, 1, 1]
    """
    return _resample(data, num_classes, label, per_client, seed, np.max)


def undersample(
    data: FederatedData, num_classes: int, label: str = "y", per_client: bool = True, seed: int = 0
) -> FederatedData:
    """Leaves out examples of more frequent classes; every client keeps at least one of each class that it has.

    Arguments as for ``oversample``. With ``per_client`` each class becomes as frequent as the client's rarest one.
    Otherwise every client keeps ``min_j n_j / n_k`` of its class k, up to rounding.

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"y": np.array([0, 0, 0, 1])}})
      >>> fc.data.quality.undersample(data, 2).examples["y"].tolist()
      [0, 1]
    """
    return _resample(data, num_classes, label, per_client, seed, np.min)


def flip_labels(
    data: FederatedData,
    rate: float,
    num_classes: int,
    label: str = "y",
    clients: Sequence[int] | None = None,
    seed: int = 0,
) -> FederatedData:
    """Symmetric label noise: with probability ``rate`` an example gets one of the K - 1 other labels.

    Args:
      data: the population.
      rate: between 0 and 1.
      num_classes: K, at least 2.
      label: the field of classes ``0 .. K - 1``.
      clients: the clients whose labels flip; all by default.
      seed: of the draws.

    Example:
      >>> noisy = fc.data.quality.flip_labels(data, rate=0.2, num_classes=10, clients=[0, 1, 2])
    """
    labels = check_labels(data, num_classes, label)
    if num_classes < 2:
        raise InvalidInput("A label can only be flipped where there are two classes.")
    hit = _hit(data, rate, clients, (seed, 1, np.arange(data.num_examples)))
    step = 1 + draws.mix(seed, 2, np.arange(data.num_examples)).astype(np.int64) % (num_classes - 1)
    return _with(data, label, np.where(hit, (labels + step) % num_classes, labels).astype(labels.dtype))


def drop_values(
    data: FederatedData, rate: float, field: str = "x", clients: Sequence[int] | None = None, seed: int = 0
) -> FederatedData:
    """Each value becomes missing (NaN) with probability ``rate``, for experiments; see ``impute``.

    Args:
      data: the population.
      rate: between 0 and 1.
      field: floats ``[N, d]``.
      clients: the clients whose values drop; all by default.
      seed: of the draws.

    Example:
      >>> table = fc.FederatedData.from_clients({"ann": {"x": np.ones((100, 2), np.float32)}})
      >>> gaps = fc.data.quality.drop_values(table, rate=0.1)
      >>> 0 < np.isnan(gaps.examples["x"]).mean() < 0.2
      np.True_
    """
    return _spoil(data, rate, field, clients, seed, 3, lambda x: np.nan)


def add_outliers(
    data: FederatedData,
    rate: float,
    scale: float = 100.0,
    field: str = "x",
    clients: Sequence[int] | None = None,
    seed: int = 0,
) -> FederatedData:
    """Multiplies each value by ``scale`` with probability ``rate``, like a wrong unit, for experiments.

    Arguments as for ``drop_values``; see ``winsorise``.

    Example:
      >>> table = fc.FederatedData.from_clients({"ann": {"x": np.ones((100, 2), np.float32)}})
      >>> fc.data.quality.add_outliers(table, rate=0.1).examples["x"].max()
      np.float32(100.0)
    """
    checks.number("scale", scale)
    return _spoil(data, rate, field, clients, seed, 4, lambda x: scale * x)


def _spoil(data, rate, field, clients, seed, purpose, spoilt) -> FederatedData:
    x = check_field(data, field)
    if x.ndim != 2 or x.dtype.kind != "f":
        raise InvalidInput(f"Field {field!r} must hold floats [N, d], not {x.dtype} of shape {x.shape}.")
    words = seed, purpose, np.arange(len(x))[:, None], np.arange(x.shape[1])
    return _with(data, field, np.where(_hit(data, rate, clients, words), spoilt(x), x).astype(x.dtype))


def _hit(data: FederatedData, rate: float, clients: Sequence[int] | None, words: tuple) -> np.ndarray:
    checks.within("rate", rate, 0, 1)
    checks.seed("seed", words[0])
    hit = draws.uniform(*words) < rate
    if clients is None:
        return hit
    chosen = np.isin(_owner(data), checks.client_numbers("clients", clients, data.num_clients, twice=True))
    return hit & chosen.reshape(-1, *[1] * (hit.ndim - 1))


def _resample(data, num_classes, label, per_client, seed, goal) -> FederatedData:
    labels, owner = check_labels(data, num_classes, label), _owner(data)
    seed = checks.seed("seed", seed)
    counts = _counts(data, labels, num_classes)
    if per_client:
        present = np.ma.masked_equal(counts, 0)
        targets = np.broadcast_to(goal(present, axis=1, keepdims=True), counts.shape)
    else:
        total = _all_present(data, num_classes, label)
        targets = np.maximum(1, np.round(goal(total) / total * counts))
    group = owner * num_classes + labels
    size, target = counts.ravel()[group], np.asarray(targets, np.int64).ravel()[group]
    order = np.lexsort((draws.mix(seed, 5, np.arange(len(group))), group))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.searchsorted(group[order], group[order])
    return data.take(np.repeat(np.arange(len(group)), target // size + (rank < target % size)))


def _all_present(data: FederatedData, num_classes: int, label: str) -> np.ndarray:
    total = label_counts(data, num_classes, label)
    if (absent := np.flatnonzero(total == 0)).size:
        raise InvalidInput(f"Class {absent[0]} of {label!r} occurs at no client: nothing can balance it.")
    return total


def _counts(data: FederatedData, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """``[M, K]`` label counts; each client knows its row."""
    pairs = _owner(data) * num_classes + labels
    return np.bincount(pairs, minlength=data.num_clients * num_classes).reshape(-1, num_classes)


def _owner(data: FederatedData) -> np.ndarray:
    return np.repeat(np.arange(data.num_clients), data.sizes)


def _narrow(data: FederatedData, field: str, columns: Columns) -> FederatedData:
    return _with(data, field, check_field(data, field)[:, columns])


def _clip(data: FederatedData, field: str, columns: Columns, low: np.ndarray, high: np.ndarray) -> FederatedData:
    return _map(data, field, columns, lambda x: np.clip(x, low, high))


def _fill(data: FederatedData, field: str, fill: np.ndarray, indicated: np.ndarray) -> FederatedData:
    x = check_field(data, field)
    missing = np.isnan(x)
    filled = np.concatenate([np.where(missing, fill, x), missing[:, indicated].astype(x.dtype)], axis=1)
    return _with(data, field, filled)


def _scale(data: FederatedData, field: str, columns: Columns, mean: np.ndarray, scale: np.ndarray) -> FederatedData:
    return _map(data, field, columns, lambda x: ((x - mean) / scale).astype(x.dtype))


def _map(data: FederatedData, field: str, columns: Columns, change: Callable[[np.ndarray], np.ndarray]):
    x = check_field(data, field).copy()
    x[:, columns] = change(x[:, columns])
    return _with(data, field, x)


def _with(data: FederatedData, field: str, values: np.ndarray) -> FederatedData:
    return dataclasses.replace(data, examples={**data.examples, field: values})
