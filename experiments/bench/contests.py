"""The problems of the leaderboard: data of small networks, in which clients differ in one way each."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc
from fedjax_clip.core.types import Array, Params, PerExampleLoss
from fedjax_clip.data.population import FederatedData

HIDDEN = 32


@dataclasses.dataclass(frozen=True)
class Contest:
    """A problem.

    Attributes:
      data: the clients that train.
      evaluation: ``examples``, held out of each client, and ``clients`` that never train, where there are enough.
      init: ``key -> params``.
      loss, calibrated: per-example losses; the second one looks at the margins that FedLC asks for.
      classes: how many.
      cohort: clients a round.
      rounds: of a training.
      steps: local steps.
      note: how the clients differ.
    """

    data: FederatedData
    evaluation: Mapping[str, FederatedData]
    init: Callable[[Array], Params]
    loss: PerExampleLoss
    calibrated: PerExampleLoss | None
    classes: int
    cohort: int
    rounds: int = 60
    steps: int = 5
    batch_size: int = 10
    head: str = "Dense_1"
    body: str = "Dense_0"
    note: str = ""


def _of(data: FederatedData, cohort: int, note: str, held_out_clients: float = 0.2) -> Contest:
    task = fc.tasks.classification(data, (HIDDEN,), held_out_clients, held_out_examples=1 / 3)
    classes = int(np.max(data.fields()["y"])) + 1
    model = fc.models.MLP((HIDDEN,), classes)

    def calibrated(params: Params, batch: Mapping[str, Array], key: Any) -> tuple[Array, dict[str, Array]]:
        logits = fc.drift.calibrated(model.apply(params, batch["x"]), batch)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}

    made = task.data, task.evaluation, task.init, task.per_example_loss, calibrated
    return Contest(*made, classes, cohort, note=note)


@functools.cache
def _digits() -> FederatedData:
    return fc.data.sources.digits()


def _dealt(clients: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures ``[clients, n, 8, 8, 1]`` and labels, dealt evenly."""
    digits, rng = _digits().examples, np.random.default_rng(0)
    each = len(digits["y"]) // clients
    order = rng.permutation(len(digits["y"]))[: each * clients].reshape(clients, each)
    return digits["x"][order], digits["y"][order]


def _population(x: np.ndarray, y: np.ndarray) -> FederatedData:
    clients, each = y.shape
    fields = {"x": x.reshape(-1, *x.shape[2:]), "y": y.ravel()}
    return FederatedData(fields, np.arange(clients + 1) * each, [f"client{c:02d}" for c in range(clients)])


def by_form() -> Contest:
    """Digits by the form on which they were written, the natural clients."""
    return _of(_digits(), 6, "forms, three of them held out")


def rotated() -> Contest:
    """Digits of four groups of clients, rotated by 0, 90, 180 and 270 degrees."""
    x, y = _dealt(20)
    turned = np.stack([np.rot90(own, c % 4, (1, 2)) for c, own in enumerate(x)])
    return _of(_population(turned, y), 8, "four groups, whose digits are rotated by 90 degrees each")


def noisy() -> Contest:
    """Digits with noise on the pictures, from none at the first client to a standard deviation of 1 at the last."""
    x, y = _dealt(20)
    rng = np.random.default_rng(1)
    spread = np.linspace(0, 1, len(x)).reshape(-1, *[1] * (x.ndim - 1))
    return _of(
        _population((x + spread * rng.normal(size=x.shape)).astype(np.float32), y), 8, "noise that grows by client"
    )


def shards() -> Contest:
    """Digits of two classes at each client."""
    data = fc.data.partition.shards(_digits().examples, 20, classes_per_client=2)
    return _of(data, 8, "two classes at each client")


def dirichlet() -> Contest:
    """Digits with label skew, Dirichlet(0.1)."""
    data = fc.data.partition.dirichlet(_digits().examples, 20, alpha=0.1)
    return _of(data, 8, "label skew, Dirichlet(0.1)")


def heart() -> Contest:
    """Heart disease at four hospitals, each of which lacks other values."""
    task = fc.tasks.heart(hidden=(HIDDEN,), held_out=1 / 3)
    made = task.data, task.evaluation, task.init, task.per_example_loss, None
    return Contest(*made, classes=2, cohort=4, note="four hospitals, each of which lacks other values")


CONTESTS: Mapping[str, Callable[[], Contest]] = types.MappingProxyType(
    {
        "digits by form": by_form,
        "digits rotated": rotated,
        "digits shards": shards,
        "digits dirichlet": dirichlet,
        "digits noisy": noisy,
        "heart": heart,
    }
)


def start(contest: Contest, seed: int, several: int = 1) -> Params:
    """Initial parameters of a seed: one model, or several."""
    key = jax.random.key(seed)
    params = jax.tree.map(np.asarray, contest.init(key))
    return params if several == 1 else fc.clusters.stacked(params, several, key)
