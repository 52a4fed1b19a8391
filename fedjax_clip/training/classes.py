"""Labels that are no class of the model: found when a run's losses look like it, and named."""

from collections.abc import Mapping

import jax
import numpy as np

from fedjax_clip.core.loss import example_values
from fedjax_clip.core.types import InvalidInput, Params, PerExampleLoss
from fedjax_clip.data.population import FederatedData


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
            return bool(np.isfinite(example_values(per_example_loss, params, batch, None, 1)["loss"][0]))

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
