"""A run directory as a model: ``load(directory).predict(raw)``."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import files, tree
from fedjax_clip.core.types import Array, InvalidInput, Params
from fedjax_clip.data.sources import archives
from fedjax_clip.tasks import inputs
from fedjax_clip.tasks import predictor as descriptions
from fedjax_clip.tasks.base import restored
from fedjax_clip.tasks.predictor import Predictor
from fedjax_clip.training.scores import auroc, calibration_error

PARAMS = "params", "best", "average"  # files of a run directory
CHUNK = 1024  # examples that a device gets at once


class Predictions(NamedTuple):
    """What a model says of N examples.

    Attributes:
      prediction: ``[N]``: the name of the likeliest class, or a number in the target's units.
      probability: ``[N, classes]``, in the order of ``Model.names``; ``None`` for a number.

    Example:
      >>> fc.tasks.Predictions(np.array(["no", "yes"]), np.array([[0.9, 0.1], [0.2, 0.8]])).prediction[1]
      np.str_('yes')
    """

    prediction: np.ndarray
    probability: np.ndarray | None


class Model:
    """A trained model with the way from raw input to its own and from its outputs to their meaning.

    Args:
      predictor: a task's ``predictor``.
      params: the trained parameters.

    Attributes:
      names: of the classes, or of the target if the model predicts a number.
      columns: of a table, the names of an encoded row's entries; else empty.
      shape, dtype: of one encoded example, as ``apply`` takes them.

    Raises:
      InvalidInput: parameters of other shapes than the description's.

    Example:
      >>> task = fc.tasks.digits(hidden=())
      >>> model = fc.tasks.Model(task.predictor, task.init(key))
      >>> model.predict(task.data.examples["x"][:3]).probability.shape
      (3, 10)
    """

    def __init__(self, predictor: Predictor, params: Params):
        self._module, self._input, shapes = _built(predictor)
        self.predictor = predictor
        self.params = restored(tree.flatten_with_names(params), shapes, "The parameters")
        self.columns: tuple[str, ...] = tuple(self._input.names)
        self.shape, self.dtype = self._input.shape, np.dtype(self._input.dtype)
        output = predictor.output
        self.classified = "classes" in output
        self.names = tuple(output["classes"]) if self.classified else (output["target"],)
        self.target: str | None = output.get("target")
        self._apply = jax.jit(self.apply)

    def apply(self, params: Params, x: Array) -> Array:
        """The model as a pure function of encoded examples: what ``fc.export`` writes.

        Args:
          params: of this model's structure.
          x: ``[N, *shape]``, as ``encode`` makes them.

        Returns:
          Probabilities ``[N, classes]`` (of the next character ``[N, T, characters]``), or numbers ``[N]`` in the
          target's units.
        """
        outputs = jnp.asarray(self._module.apply(params, self._input.features(x)))
        if not self.classified:
            scale, mean = (np.float32(self.predictor.output[name]) for name in ("scale", "mean"))
            values = outputs[:, 0] * scale + mean
            return jnp.exp(np.float32(np.log(10)) * values) if self.predictor.output.get("log10") else values
        if outputs.shape[-1] == 1:
            positive = jax.nn.sigmoid(outputs)
            return jnp.concatenate([1 - positive, positive], axis=-1)
        return jax.nn.softmax(outputs, axis=-1)

    def encode(self, raw: Any) -> np.ndarray:
        """Raw input as an array ``[N, *shape]``. It takes what ``predict`` takes."""
        return self._input.encode(raw)

    def predict(self, raw: Any) -> Predictions:
        """Predictions for new data.

        Args:
          raw: for a table the path of a CSV file or columns by name (a dict, a DataFrame); for arrays ``[N, ...]`` or
            the path of a file .npz or .npy; for texts a list or the path of a file .txt, a text on each line.

        Raises:
          InvalidInput: a missing column, a word or a missing value that training had no place for, a wrong shape ...
        """
        x = self.encode(raw)
        padded = np.concatenate([x, np.repeat(x[:1], -len(x) % min(CHUNK, len(x)), axis=0)])
        size = min(CHUNK, len(x))
        parts = [self._apply(self.params, padded[i : i + size]) for i in range(0, len(padded), size)]
        found = np.concatenate([np.asarray(part) for part in parts])[: len(x)]
        if not self.classified:
            return Predictions(found, None)
        if found.ndim == 3:  # the characters after the last one
            found = found[np.arange(len(x)), np.count_nonzero(x, axis=1) - 1]
        return Predictions(np.array(self.names)[found.argmax(1)], found)

    def score(self, raw: Any, predictions: Predictions | None = None) -> dict[str, float]:
        """Scores where the truth is known: the target column of a table, the field ``y`` of arrays.

        Args:
          raw: as for ``predict``.
          predictions: those for ``raw``, if they are known.

        Returns:
          ``{"examples": ..., "accuracy": ..., "auroc": ...}`` or ``{"examples": ..., "rmse": ...}``; empty if there is
          no target. ``examples`` counts those whose target is known.
        """
        truth, known = self._truth(raw)
        if not known.any():
            return {}
        found = self.predict(raw) if predictions is None else predictions
        scores = {"examples": float(known.sum())}
        if found.probability is None:
            told = np.log10(found.prediction) if self.predictor.output.get("log10") else found.prediction
            return scores | {"rmse": float(np.sqrt(np.mean((told[known].astype(np.float64) - truth[known]) ** 2)))}
        probability, truth = found.probability[known], truth[known].astype(np.int64)
        scores["accuracy"] = float(np.mean(probability.argmax(1) == truth))
        if len(self.names) == 2:
            positive = probability[:, 1]
            scores |= {"auroc": auroc(positive, truth)} if 0 < truth.sum() < len(truth) else {}
            scores["ece"] = calibration_error(positive, truth)
        return scores

    def _truth(self, raw: Any) -> tuple[np.ndarray, np.ndarray]:
        """The targets ``[N]`` as class numbers or in the units of ``rmse``, and which of them are known."""
        nothing = np.zeros(0), np.zeros(0, bool)
        if self.predictor.kind == "array":
            arrays = inputs.read_arrays(raw)
            if "y" not in arrays:
                return nothing
            y, count = np.asarray(arrays["y"]), len(arrays["x"])
            if y.shape != (count,) or y.dtype.kind not in "iu":
                raise InvalidInput(f"Labels y must be {count} whole numbers, not {y.dtype} of shape {y.shape}.")
            return y, np.ones(count, bool)
        if self.predictor.kind != "table":
            return nothing
        table, _ = inputs.read_table(raw)
        if self.target not in table:
            return nothing
        return inputs.targets(table, self.predictor.output)


def save(model: Model, directory: files.PathLike) -> None:
    """Writes what ``load`` reads: ``model.json`` and ``params.npz``, as a run of ``experiments.run`` has them.

    Args:
      model: the model.
      directory: where to write; made when needed.

    Raises:
      InvalidInput: a directory that cannot be written.

    Example:
      >>> task = fc.tasks.digits(hidden=())
      >>> fc.tasks.save(fc.tasks.Model(task.predictor, task.init(key)), "mine")
    """
    path = files.expanded(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        files.write(path / "model.json", json.dumps(model.predictor.json(), indent=2) + "\n")
        files.write_npz(path / "params.npz", tree.flatten_with_names(model.params))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}.") from None


def load(directory: files.PathLike, params: str = "params") -> Model:
    """The model that ``experiments.run`` has trained and left in a run directory.

    It reads ``model.json`` and ``params.npz``. No code in them is run.

    Args:
      directory: of a complete run.
      params: ``"params"``, those of the last round; ``"best"`` or ``"average"``, if the run kept them.

    Raises:
      InvalidInput: no such run, one whose task cannot be applied to new data, parameters that it has not kept, damaged
        files.

    Example:
      >>> task = fc.tasks.digits(hidden=())
      >>> fc.tasks.save(fc.tasks.Model(task.predictor, task.init(key)), "trained")
      >>> model = fc.tasks.load("trained")
      >>> predictions = model.predict(task.evaluation["clients"].examples["x"])
      >>> len(predictions.prediction) == task.evaluation["clients"].num_examples
      True
    """
    path = files.expanded(directory)
    file = files.regular(path / "model.json")
    if not file.exists():
        if (path / "params.npz").exists():
            why = "its task does not say how its model is applied to new data (Task's predictor)"
        elif (path / "config.json").exists():
            why = "its run is not complete: give its command again"
        else:
            why = "name a run directory, as experiments.run writes it"
        raise InvalidInput(f"{path} has no model.json: {why}.")
    try:
        record = json.loads(file.read_bytes())
        if record["format"] != descriptions.FORMAT:
            raise InvalidInput(
                f"{file} is of format {record['format']}, and this version of the library reads {descriptions.FORMAT}."
            )
        told = Predictor(*(record[name] for name in ("kind", "model", "input", "output")))
        _, _, shapes = _built(told)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError) as error:
        raise InvalidInput(f"{file} is damaged: put it back, or remove {path} to train anew.") from error
    found = path / f"{params}.npz"
    if params not in PARAMS or not found.exists():
        kept = [name for name in PARAMS if (path / f"{name}.npz").exists()]
        raise InvalidInput(f"{path} has kept no parameters {params!r}; it has {' and '.join(kept) or 'none'}.")
    return Model(told, restored(archives.read_npz(found), shapes, str(found)))


def _built(told: Predictor) -> tuple[Any, Any, Any]:
    """The module, the input and the parameters' shapes that a description tells of."""
    module, given = descriptions.module(told.model), inputs.KINDS[told.kind](**told.input)
    example = jax.ShapeDtypeStruct((1, *given.shape), given.dtype)
    return module, given, jax.eval_shape(lambda x: module.init(jax.random.key(0), given.features(x)), example)
