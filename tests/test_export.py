"""Exported models: every form predicts what the model predicts, and is readable without this library."""

import json
import sys

import jax
import numpy as np
import pytest

import fedjax_clip as fc
from fedjax_clip import models, tasks
from fedjax_clip.tasks.predictor import Predictor, described, of_arrays

NUMBER = {"name": "age", "low": 20.0, "high": 90.0, "fill": 50.0, "mean": 2000.0, "scale": 3.0, "indicator": True}
WORD = {"name": "sex", "words": ["f", "m"], "missing": True, "other": False}
TABLE = {"columns": [NUMBER, WORD]}
ROWS = {"age": [np.nan, 99, 30], "sex": ["f", "", "m"]}
LETTERS = {"length": 10, "encoding": "ascii"}
CASES = {
    "table": (
        Predictor("table", described(models.MLP((4,), 1)), TABLE, {"classes": ["no", "yes"], "target": "t"}),
        ROWS,
    ),
    "price": (
        Predictor(
            "table", described(models.MLP((), 1)), TABLE, {"target": "t", "mean": 5.0, "scale": 0.01, "log10": True}
        ),
        ROWS,
    ),
    "picture": (
        of_arrays(models.CNN(3, (4,), 8), (6, 6, 1), "uint8", "abc"),
        np.arange(108).reshape(3, 6, 6, 1).astype(np.uint8),
    ),
    "tweet": (
        Predictor(
            "words",
            described(models.BagOfWords(3, 50, 4)),
            {"num_words": 4, "vocabulary": 50},
            {"classes": list("abc")},
        ),
        ["good day", "", "a b c d e f"],
    ),
    "letters": (
        Predictor(
            "characters",
            described(models.Transformer(128, 10, 8, 1, 2)),
            LETTERS,
            {"classes": [chr(c) for c in range(128)]},
        ),
        ["to be", "or not to be"],
    ),
}


def made(name):
    predictor, raw = CASES[name]
    _, _, shapes = tasks.loading._built(predictor)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), shapes)
    model = tasks.Model(predictor, params)
    return model, raw, model.encode(raw)


@pytest.mark.parametrize("name", CASES)
def test_stablehlo_predicts_what_the_model_predicts(name, tmp_path):
    model, raw, x = made(name)
    wanted = np.asarray(model.apply(model.params, x))
    pytest.importorskip("flatbuffers")
    fc.export.stablehlo(model, tmp_path / "m.stablehlo")
    read = jax.export.deserialize(bytearray((tmp_path / "m.stablehlo").read_bytes()))
    assert {"cpu", "cuda", "tpu"} <= set(read.platforms)
    for size in (1, 3):
        np.testing.assert_allclose(read.call(x[:size]), wanted[:size], rtol=1e-5, atol=1e-6)
    last = wanted[np.arange(len(x)), np.count_nonzero(x, axis=1) - 1] if wanted.ndim == 3 else wanted
    found = model.predict(raw)
    np.testing.assert_allclose(found.prediction if found.probability is None else found.probability, last, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", CASES)
def test_onnx_predicts_what_the_model_predicts(name, tmp_path):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _, x = made(name)
    wanted = np.asarray(model.apply(model.params, x))
    fc.export.onnx(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for size in (1, 3):
        np.testing.assert_allclose(session.run(["y"], {"x": x[:size]})[0], wanted[:size], rtol=1e-5, atol=1e-6)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["model.json"])["kind"] == model.predictor.kind
    assert json.loads(told["columns"]) == list(model.columns)


def test_safetensors_hold_the_parameters_by_name(tmp_path):
    model, _, _ = made("table")
    fc.export.safetensors(model, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert json.loads(header["__metadata__"]["model.json"]) == model.predictor.json()
    arrays = fc.core.tree.flatten_with_names(model.params)
    assert set(header) == {"__metadata__", *arrays}
    for name, x in arrays.items():
        start, end = header[name]["data_offsets"]
        read = np.frombuffer(content[8 + size :][start:end], "<f4").reshape(header[name]["shape"])
        np.testing.assert_array_equal(read, x)
    numpy = pytest.importorskip("safetensors.numpy")
    for name, x in numpy.load_file(tmp_path / "m.safetensors").items():
        np.testing.assert_array_equal(x, arrays[name])


def test_what_is_no_model_or_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(fc.InvalidInput, match=r"fc\.tasks\.load"):
        fc.export.safetensors({"w": 1}, tmp_path / "m")
    model, _, _ = made("table")
    with pytest.raises(fc.InvalidInput, match="cannot be written"):
        fc.export.safetensors(model, tmp_path / "no/m")
    for name, export in (("jax2onnx", fc.export.onnx), ("flatbuffers", fc.export.stablehlo)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            fc.InvalidInput, match=rf"{name}, which is not installed: pip install 'fedjax_clip\[export\]'"
        ):
            export(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
