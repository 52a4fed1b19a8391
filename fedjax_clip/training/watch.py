"""What is wrong with the data or the loss of a run, said early: updates that are not finite, labels without a class."""

import weakref
from collections.abc import Mapping

import jax
import numpy as np

from fedjax_clip.core import loss
from fedjax_clip.core.types import Algorithm, InvalidInput, Params, PerExampleLoss
from fedjax_clip.data.planning import LocalWork
from fedjax_clip.data.population import FederatedData

MEET = (
    "per_example_loss gives an example another loss in another batch (as batch normalisation in training mode does, or "
    "pairs within a batch), and some batches are padded with copies of their first example: the results are not those "
    "of the examples alone. Choose a batch_size that divides every client's number of examples, or compute examples "
    "apart. If you accept it, ignore this warning."
)
_MEET: weakref.WeakKeyDictionary[PerExampleLoss, bool] = weakref.WeakKeyDictionary()  # of losses that live


def examples_meet(per_example_loss: PerExampleLoss, data: FederatedData, params: Params, work: LocalWork) -> bool:
    """Whether some batches are padded, and padding counts; looked at once for each loss, on its first batch."""
    size = min(work.largest_batch(data.sizes), data.num_examples)
    if size < 2 or not work.pads(data.sizes):
        return False
    try:
        if per_example_loss not in _MEET:
            first = jax.tree.map(lambda x: x[:size], data.examples)
            _MEET[per_example_loss] = loss.examples_meet(per_example_loss, params, first)
        return _MEET[per_example_loss]
    except Exception:  # a loss that fails does so in the round, which says where; one without weak references is left
        return False


class Watch:
    """Looks at each block's metrics, and stops a run that cannot go well.

    Args:
      algorithm, params, data: of the run.
    """

    def __init__(self, algorithm: Algorithm, params: Params, data: FederatedData):
        self.params, self.data = params, data
        self.suspected = algorithm.loss  # of labels that are no class
        if self.suspected is not None and negative(data):
            refuse_unknown(self.suspected, params, data)
        if (parts := algorithm.parts) and (parts.uplink.promises.noise or parts.reducer.hides):
            self.suspected = None  # to stop in some round would show whom it drew

    def check(self, columns: dict[str, np.ndarray], rounds: range) -> None:
        """Looks at the metrics ``[R]`` of some rounds, and takes the ``dropped_ids`` out of them.

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
    """Whether a field of whole numbers, one an example, has one below zero."""
    return any(y.min() < 0 for y in _candidates(data).values())


def refuse_unknown(per_example_loss: PerExampleLoss, params: Params, data: FederatedData) -> None:
    """Refuses a label that the model has no output for, and names its client.

    A field holds classes if the loss of an example is NaN once it is given the largest number there, and finite with 0.
    optax's cross-entropy is: it takes -1 for the last class, and beyond the last its gradient is finite.

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
        except Exception:  # a loss that cannot be evaluated so: what is wrong will be said elsewhere
            continue
        if unknown:
            example = int(np.argmax(y == unknown[0]))
            client = int(np.searchsorted(data.offsets, example, side="right")) - 1
            raise InvalidInput(
                f"Client {data.name(client)!r} has {name}={unknown[0]} (example {example}), and the model has no such "
                "class: number the classes from 0, and give the model an output for each."
            )


def _candidates(data: FederatedData) -> dict[str, np.ndarray]:
    """The fields of whole numbers ``[N]``."""
    if not isinstance(data.examples, Mapping):
        return {}
    fields = {name: x for name, x in data.examples.items() if isinstance(x, np.ndarray)}
    return {name: x for name, x in fields.items() if x.ndim == 1 and x.dtype.kind in "iu"}
