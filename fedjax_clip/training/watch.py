"""Early checks of a run's data and loss: updates that are not finite, labels without a class, padding that counts."""

import weakref
from collections.abc import Mapping

import jax
import numpy as np

from fedjax_clip.core import loss, stateful
from fedjax_clip.core.types import Algorithm, InvalidInput, Params, PerExampleLoss
from fedjax_clip.data.planning import LocalWork
from fedjax_clip.data.population import FederatedData

MEET = (
    "per_example_loss gives an example another loss in another batch (as batch normalisation in training mode does, or "
    "pairs within a batch), and some batches are padded with copies of their first example: the results are not those "
    "of the examples alone. Choose a batch_size that divides every client's number of examples, or compute examples "
    "apart; a model's batch normalisation belongs into fc.local.with_state. If you accept it, ignore this warning."
)
SEEN = (
    "with_state: examples of weight 0 change the losses of others or the model's state: give the example weights that "
    "loss_and_state gets to the model, such as fc.models.BatchNorm()(x, weights) or the mask= of Flax's BatchNorm."
)
_MEET: weakref.WeakKeyDictionary[PerExampleLoss, bool] = weakref.WeakKeyDictionary()  # an answer goes with its loss


def examples_meet(per_example_loss: PerExampleLoss, data: FederatedData, params: Params, work: LocalWork) -> bool:
    """Whether padding changes the loss of other examples in its batch; checked once for each loss, on a first batch."""
    if isinstance(per_example_loss, stateful.Stateful):
        _check_mask(per_example_loss, data, params)
        return False
    size = min(work.largest_batch(data.sizes), data.num_examples)
    if size < 2 or not (work.pads(data.sizes) or data.lives is not None):
        return False
    try:
        if per_example_loss not in _MEET:
            first = jax.tree.map(lambda x: x[:size], data.examples)
            _MEET[per_example_loss] = loss.examples_meet(per_example_loss, params, first)
        return _MEET[per_example_loss]
    except Exception:  # the round raises the same error, with its place; or the loss takes no weak reference
        return False


def _check_mask(per_example_loss: stateful.Stateful, data: FederatedData, params: Params) -> None:
    """Refuses a loss with state to which examples of weight 0 matter; checked once for each loss."""
    size = min(stateful.ROWS, data.num_examples)
    try:
        if per_example_loss not in _MEET:
            first = jax.tree.map(lambda x: x[:size], data.examples)
            _MEET[per_example_loss] = size > 2 and stateful.sees_padding(per_example_loss, params, first)
    except InvalidInput:
        raise
    except Exception:  # as above
        return
    if _MEET[per_example_loss]:
        raise InvalidInput(SEEN)


class Watch:
    """Checks each block's metrics, and stops a run with bad labels or, if asked, with updates that are not finite.

    Args:
      algorithm, params, data: of the run.
    """

    def __init__(self, algorithm: Algorithm, params: Params, data: FederatedData):
        self.params, self.data = params, data
        self.suspected = algorithm.loss  # of labels without a class
        if self.suspected is not None and negative(data):
            refuse_unknown(self.suspected, params, data)
        if (parts := algorithm.parts) and (parts.uplink.promises.noise or parts.reducer.hides):
            self.suspected = None  # stopping in a certain round would reveal which clients it drew

    def check(self, columns: dict[str, np.ndarray], rounds: range) -> None:
        """Checks the metrics ``[R]`` of some rounds, and removes ``dropped_ids`` from them.

        Raises:
          InvalidInput: a label without a class; under ``non_finite="stop"``, a client's update that is not finite.
        """
        sound = np.all(np.isfinite(columns.get("loss", 0))) and not np.any(columns.get("dropped", 0))
        if self.suspected is not None and not sound:
            refuse_unknown(self.suspected, self.params, self.data)
            self.suspected = None  # once is enough
        for round, ids in zip(rounds, columns.pop("dropped_ids", ())):
            if named := [self.data.name(i) for i in sorted(ids) if i >= 0]:
                more = " and perhaps more" if len(named) == len(ids) else ""
                raise InvalidInput(
                    f"Round {round + 1}: the updates of clients {', '.join(named)}{more} are not finite. Lower the "
                    "client's learning rate, put a clip in front of it, or leave such updates out (non_finite='drop')."
                )


def negative(data: FederatedData) -> bool:
    """Whether an integer field ``[N]`` has a negative value."""
    return any(y.min() < 0 for y in _candidates(data).values())


def refuse_unknown(per_example_loss: PerExampleLoss, params: Params, data: FederatedData) -> None:
    """Refuses a label that the model has no output for, and names its client.

    A field holds classes if an example's loss is finite with label 0 and NaN with the largest integer, as for optax's
    cross-entropy. Negative labels are refused too: optax takes -1 for the last class.

    Args:
      per_example_loss: evaluated on the first example, with other labels.
      params: of the model.
      data: the population.

    Raises:
      InvalidInput: such a label.
    """
    for name, y in _candidates(data).items():

        def finite(label: int, name: str = name, y: np.ndarray = y) -> bool:
            batch = {**jax.tree.map(lambda x: x[:1], data.examples), name: np.array([label], y.dtype)}
            return bool(np.isfinite(loss.example_values(per_example_loss, params, batch, None, 1)["loss"][0]))

        largest = min(np.iinfo(y.dtype).max, 2**31 - 1)
        try:
            classes = finite(0) and not finite(largest)
            unknown = [label for label in (int(y.min()), int(y.max())) if classes and (label < 0 or not finite(label))]
        except Exception:  # the loss cannot be evaluated on one example: the round will raise its error
            continue
        if unknown:
            example = int(np.argmax(y == unknown[0]))
            client = int(np.searchsorted(data.offsets, example, side="right")) - 1
            raise InvalidInput(
                f"Client {data.name(client)!r} has {name}={unknown[0]} (example {example}), and the model has no such "
                "class: number the classes from 0, and give the model an output for each."
            )


def _candidates(data: FederatedData) -> dict[str, np.ndarray]:
    """The integer fields ``[N]``."""
    if not isinstance(data.examples, Mapping):
        return {}
    fields = {name: x for name, x in data.examples.items() if isinstance(x, np.ndarray)}
    return {name: x for name, x in fields.items() if x.ndim == 1 and x.dtype.kind in "iu"}
