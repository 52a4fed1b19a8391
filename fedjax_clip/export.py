"""A trained model as a file for other programs: StableHLO, ONNX, safetensors.

Each takes a ``fc.tasks.Model``, which ``fc.tasks.load`` reads from a run directory. StableHLO and ONNX hold
``Model.apply`` with the parameters in it: from encoded examples ``[batch, *model.shape]``, any number at a time, to
probabilities or numbers. All that is part of the function comes along: the scale of pictures, and a table's limits,
means and missing values. What ``Model.encode`` does beforehand is for the program around it, and ``model.json`` says
what that is: a table's words are one-hot in the order of ``model.columns``.
"""

import contextlib
import importlib
import io
import json
import logging
import pathlib
import struct
from typing import Any

import jax
import jax.export
import numpy as np

from fedjax_clip.core import checks, files, tree
from fedjax_clip.core.types import Array, InvalidInput
from fedjax_clip.tasks import Model

__all__ = ["onnx", "safetensors", "stablehlo"]

PLATFORMS = "cpu", "cuda", "rocm", "tpu"
OPSET = 21  # of ONNX 1.16 (2024), so that runtimes of phones and browsers read it


def stablehlo(model: Model, path: files.PathLike) -> None:
    """Writes a model as StableHLO with its parameters, as ``jax.export`` serialises it.

    Args:
      model: see ``fc.tasks.load``.
      path: the file, replaced if it is there. ``jax.export.deserialize(bytes).call(x)`` runs it on a CPU, a GPU or a
        TPU, without this library.

    Raises:
      InvalidInput: a thing that is no model; ``flatbuffers`` is not installed.

    Example:
      >>> task = fc.tasks.digits(hidden=())
      >>> fc.export.stablehlo(fc.tasks.Model(task.predictor, task.init(key)), "digits.stablehlo")
      >>> from pathlib import Path
      >>> read = jax.export.deserialize(bytearray(Path("digits.stablehlo").read_bytes()))
      >>> read.call(np.zeros((3, 8, 8, 1), np.float32)).shape
      (3, 10)

    Source: https://docs.jax.dev/en/latest/export/export.html
    """
    (batch,) = jax.export.symbolic_shape("batch")
    example = jax.ShapeDtypeStruct((batch, *_checked(model).shape), model.dtype)
    try:
        importlib.import_module("flatbuffers")
    except ImportError as error:
        raise InvalidInput(
            "StableHLO needs the package flatbuffers, which is not installed: pip install 'fedjax_clip[export]'"
        ) from error
    _write(path, jax.export.export(jax.jit(_function(model)), platforms=PLATFORMS)(example).serialize())


def onnx(model: Model, path: files.PathLike) -> None:
    """Writes a model as ONNX with its parameters: input ``x``, output ``y``, and ``model.json`` among its metadata.

    Args:
      model: see ``fc.tasks.load``.
      path: the file, replaced if it is there.

    Raises:
      InvalidInput: ``jax2onnx`` is not installed or cannot convert the model.

    Example:
      >>> fc.export.onnx(fc.tasks.load("runs/digits"), "digits.onnx")  # doctest: +SKIP

    Source: https://github.com/enpasos/jax2onnx
    """
    example = jax.ShapeDtypeStruct(("batch", *_checked(model).shape), model.dtype)
    try:
        with _quiet():
            jax2onnx = importlib.import_module("jax2onnx")
    except ImportError as error:
        raise InvalidInput(
            "ONNX needs the package jax2onnx, which is not installed: pip install 'fedjax_clip[export]'"
        ) from error
    names = {"input_names": ["x"], "output_names": ["y"]}
    try:
        with _quiet(), _for_any_platform():
            found = jax2onnx.to_onnx(_function(model), [example], opset=OPSET, model_name="fedjax_clip", **names)
    except Exception as error:
        what = model.predictor.model["class"]
        raise InvalidInput(
            f"jax2onnx cannot convert this {what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}. "
            "Export it as StableHLO."
        ) from error
    for name, value in (("model.json", _description(model)), ("columns", json.dumps(model.columns))):
        found.metadata_props.add(key=name, value=value)
    _write(path, found.SerializeToString())


def safetensors(model: Model, path: files.PathLike) -> None:
    """Writes a model's parameters by name as safetensors, with ``model.json`` among the metadata.

    Args:
      model: see ``fc.tasks.load``.
      path: the file, replaced if it is there.

    Raises:
      InvalidInput: a thing that is no model, a type of numbers that the format lacks.

    Example:
      >>> task = fc.tasks.digits(hidden=())
      >>> fc.export.safetensors(fc.tasks.Model(task.predictor, task.init(key)), "digits.safetensors")

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "flax", "model.json": _description(_checked(model))}}
    arrays, end = tree.flatten_with_names(model.params), 0
    for name, x in sorted(arrays.items()):
        if x.dtype.name not in _TYPES:
            raise InvalidInput(f"safetensors has no type {x.dtype} for {name}.")
        header[name] = {"dtype": _TYPES[x.dtype.name], "shape": x.shape, "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    parts = [np.ascontiguousarray(x).astype(x.dtype.newbyteorder("<")).tobytes() for _, x in sorted(arrays.items())]
    _write(path, struct.pack("<Q", len(told)) + told + b"".join(parts))


_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _function(model: Model) -> Any:
    def predict(x: Array) -> Array:
        return model.apply(model.params, x)

    return predict


def _description(model: Model) -> str:
    return json.dumps(model.predictor.json())


def _checked(model: Model) -> Model:
    checks.kind("model", model, Model, "a fc.tasks.Model, as fc.tasks.load gives it")
    return model


def _write(path: files.PathLike, content: bytes | bytearray) -> None:
    out: pathlib.Path = files.expanded(path)
    try:
        with files.replacing(out) as file:
            file.write(content)
    except OSError as error:
        raise InvalidInput(f"{out} cannot be written: {error.strerror}.") from None


@contextlib.contextmanager
def _for_any_platform() -> Any:
    """Traces the default of ``jax.lax.platform_dependent`` (``models.Conv``): ONNX has no platforms of JAX."""
    choice = jax.lax.platform_dependent
    jax.lax.platform_dependent = lambda *args, default, **platforms: default(*args)
    try:
        yield
    finally:
        jax.lax.platform_dependent = choice


@contextlib.contextmanager
def _quiet() -> Any:
    """Drops what jax2onnx says on the way, by print and to the root logger."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
