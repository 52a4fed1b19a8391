"""How a trained model is applied to new data, as plain JSON data: ``model.json`` of a run directory."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from fedjax_clip import models

FORMAT = 1
_CLASSES: dict[str, Any] = {c.__name__: c for c in (models.MLP, models.CNN, models.ResNet, models.BagOfWords)}
_CLASSES |= {c.__name__: c for c in (models.CharLSTM, models.Transformer)}


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A description of a model that can be applied to new data. It holds numbers, text, lists and dicts only.

    Attributes:
      kind: what the raw input is: ``"table"``, ``"array"``, ``"words"`` or ``"characters"``.
      model: ``{"class": "MLP", "hidden": [], "num_outputs": 1}``: a class of ``fc.models`` and its arguments.
      input: how raw input becomes the model's, see ``fedjax_clip/tasks/inputs.py``.
      output: ``{"classes": [...]}``: the names of the classes, or ``{"mean": ..., "scale": ...}`` of a number. Those of
        a table also have its ``"target"``, a column.

    Example:
      >>> task = fc.tasks.digits(hidden=(64,))
      >>> task.predictor.kind, task.predictor.model
      ('array', {'class': 'MLP', 'hidden': [64], 'num_outputs': 10})
    """

    kind: str
    model: Mapping[str, Any]
    input: Mapping[str, Any]
    output: Mapping[str, Any]

    def json(self) -> dict[str, Any]:
        """What ``model.json`` holds."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def described(model: nn.Module) -> dict[str, Any]:
    """A module of ``fc.models`` as its class and its arguments."""
    fields = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    arguments = {name: getattr(model, name) for name in fields}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    return {"class": type(model).__name__, **plain}


def module(description: Mapping[str, Any]) -> nn.Module:
    """The module that ``described`` describes. Only classes of ``fc.models`` are made, so no other code runs."""
    arguments = dict(description)
    made = _CLASSES[arguments.pop("class")]
    return made(**{name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()})


def of_arrays(model: nn.Module, shape: Sequence[int], dtype: Any, classes: Sequence[str]) -> Predictor:
    """The predictor of a classifier of arrays; a type uint8 is divided by 255 (``base.scaled``)."""
    given = {"shape": [int(size) for size in shape], "dtype": str(dtype)}
    return Predictor("array", described(model), given, {"classes": list(classes)})
