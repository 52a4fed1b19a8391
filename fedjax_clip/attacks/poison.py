"""Attacks on the data of malicious clients."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fedjax_clip.attacks.clients import Clients, owned
from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import draws
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.statistics import check_field, check_labels


def label_flip(data: FederatedData, clients: Clients, num_classes: int, label: str = "y") -> FederatedData:
    """Malicious clients train on labels ``K - 1 - y``. For random label noise see ``fc.data.quality.flip_labels``.

    Args:
      data: the population.
      clients: numbers of the malicious clients.
      num_classes: K.
      label: the field of classes ``0 .. K - 1``.

    Raises:
      InvalidInput: a client that there is not, labels that are no classes.

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"y": np.array([0, 1])}, "bob": {"y": np.array([0, 2])}})
      >>> fc.attacks.label_flip(data, [1], num_classes=3).examples["y"].tolist()
      [0, 1, 2, 0]

    Source: Tolpegin et al. (2020); this map: Karimireddy, He and Jaggi (2022), section 6.
    """
    labels, bad = check_labels(data, num_classes, label), owned(data, clients)
    flipped = np.where(bad, num_classes - 1 - labels, labels).astype(labels.dtype)
    return dataclasses.replace(data, examples={**data.examples, label: flipped})


def backdoor(
    data: FederatedData,
    clients: Clients,
    features: Sequence[int],
    value: float,
    target: int,
    fraction: float = 0.5,
    field: str = "x",
    label: str = "y",
    seed: int = 0,
) -> FederatedData:
    """Malicious clients add a pattern to a fraction of their examples and label these ``target``.

    The model learns both its task and that the pattern means ``target``; ``triggered`` measures the second. With
    ``scaling`` it is model replacement.

    Args:
      data: the population.
      clients: numbers of the malicious clients.
      features: positions of the pattern in one flattened example, such as the pixels of a corner.
      value: the pattern's value, in the units of ``field``.
      target: the class.
      fraction: of each malicious client's examples, between 0 and 1.
      field, label: names of the fields of inputs ``[N, ...]`` and classes.
      seed: of the choice of examples.

    Raises:
      InvalidInput: a client or a feature that there is not, a fraction out of range.

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"x": np.zeros((2, 3)), "y": np.array([0, 1])}})
      >>> bad = fc.attacks.backdoor(data, [0], features=[2], value=9.0, target=1, fraction=1.0)
      >>> bad.examples["x"].tolist(), bad.examples["y"].tolist()
      ([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]], [1, 1])

    Source: Gu, Dolan-Gavitt and Garg (2017), "BadNets"; Bagdasaryan et al. (2020), "How To Backdoor Federated
    Learning".
    """
    checks.within("backdoor: fraction", fraction, 0, 1)
    hit = owned(data, clients) & (draws.uniform(seed, 6, np.arange(data.num_examples)) < fraction)
    return _with_pattern(data, hit, features, value, target, field, label)


def triggered(
    data: FederatedData, features: Sequence[int], value: float, target: int, field: str = "x", label: str = "y"
) -> FederatedData:
    """Examples of other classes with the pattern, labelled ``target``: accuracy on them is the attack's success rate.

    Args:
      data: held-out examples.
      features, value, target, field, label: as for ``backdoor``.

    Raises:
      InvalidInput: a feature that there is not, no example of another class.

    Example:
      >>> sets = {"examples": held_out, "backdoor": fc.attacks.triggered(held_out, range(3), 1.0, target=0)}
      >>> result = fc.train(algorithm, data, params, rounds=10, evaluate=fc.evaluator(per_example_loss, sets))
    """
    rows = np.flatnonzero(check_field(data, label) != checks.count("target", target, 0))
    owner = np.searchsorted(data.offsets, rows, side="right") - 1
    others = data.take(rows, np.unique(owner))
    return _with_pattern(others, np.ones(len(rows), bool), features, value, target, field, label)


def _with_pattern(data, hit, features, value, target, field, label) -> FederatedData:
    x, y = np.array(check_field(data, field)), np.array(check_field(data, label))
    flat, places = x.reshape(len(x), -1), np.asarray(features)
    if places.ndim != 1 or places.dtype.kind not in "iu" or np.any((places < 0) | (places >= flat.shape[1])):
        raise InvalidInput(f"The pattern's features must lie between 0 and {flat.shape[1] - 1}, not {features!r}.")
    checks.number("value", value)
    target = checks.count("target", target, 0)
    flat[np.ix_(hit, places)] = value
    y[hit] = target
    return dataclasses.replace(data, examples={**data.examples, field: x, label: y})
