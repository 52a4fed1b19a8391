"""Pictures and .npz files, all without a network."""

import io
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
from generated import write_fashion_mnist, write_idx

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import sources
from fedjax_clip.data.population import FederatedData


def same(one, two):
    assert one.names == two.names
    np.testing.assert_array_equal(one.offsets, two.offsets)
    assert one.fields().keys() == two.fields().keys()
    for name, x in one.fields().items():
        assert x.dtype == two.fields()[name].dtype
        np.testing.assert_array_equal(x, two.fields()[name])
    assert (one.weights is None) == (two.weights is None)
    if one.weights is not None:
        np.testing.assert_array_equal(one.weights, two.weights)


def test_digits_are_14_forms():
    data = sources.digits()
    assert data.names == [f"form{i:02d}" for i in range(14)]
    assert data.num_examples == 1797
    assert data.sizes.min() == 122
    assert data.sizes.max() == 130
    x, y = data.examples["x"], data.examples["y"]
    assert x.shape == (1797, 8, 8, 1)
    assert x.dtype == np.float32
    assert (x.min(), x.max()) == (0, 1)
    assert y.dtype == np.int32
    assert set(y) == set(range(10))
    for c in range(14):
        start = data.client(c)["y"][:15]
        np.testing.assert_array_equal(start, (start[0] + np.arange(15)) % 10)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InvalidInput, match=r'pip install "fedjax_clip\[data\]"'):
        sources.digits()


def test_fashion_mnist_is_read_from_idx_files(tmp_path):
    x, y = write_fashion_mnist(tmp_path)
    read = sources.fashion_mnist(directory=tmp_path)
    assert (read["x"].dtype, read["y"].dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(read["x"], x[..., None])
    np.testing.assert_array_equal(read["y"], y)
    x, y = write_fashion_mnist(tmp_path, "t10k", 3)
    np.testing.assert_array_equal(sources.fashion_mnist("test", tmp_path)["x"], x[..., None])


def test_fashion_mnist_says_what_is_wrong(tmp_path):
    with pytest.raises(InvalidInput, match="apt-get install dataset-fashion-mnist"):
        sources.fashion_mnist(directory=tmp_path)
    with pytest.raises(InvalidInput, match="'valid'"):
        sources.fashion_mnist("valid", tmp_path)
    images, labels = (tmp_path / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    x, y = write_fashion_mnist(tmp_path)
    for damage, says in {
        lambda: write_idx(images, x, kind=13): "images.* is not an idx file",
        lambda: write_idx(images, x, cut=-1): "images.* is not an idx file",
        lambda: write_idx(images, x, cut=5): "images.* is not an idx file",
        lambda: write_idx(labels, y[:-1]): "7 pictures and 6 labels",
        lambda: write_idx(labels, x): "labels.* is not an idx file",
        lambda: labels.write_bytes(labels.read_bytes()[:-9]): "labels.* cannot be read",
        lambda: labels.write_bytes(b"no gzip"): "labels.* cannot be read",
    }.items():
        write_fashion_mnist(tmp_path)
        damage()
        with pytest.raises(InvalidInput, match=says):
            sources.fashion_mnist(directory=tmp_path)


@pytest.mark.skipif(not os.path.isdir(sources.FASHION_MNIST), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_has_a_thousand_test_pictures_of_each_class():
    test = sources.fashion_mnist("test")
    assert test["x"].shape == (10_000, 28, 28, 1)
    assert test["x"].max() == 255
    assert np.bincount(test["y"]).tolist() == [1000] * 10


def nested():
    examples = {"x": {"image": np.arange(12, dtype=np.uint8).reshape(6, 2), "text": np.array(list("abcdéf"))}}
    examples["y"] = np.arange(6)
    return FederatedData(examples, [0, 1, 6], ["ann", "bøb"], np.linspace(0.5, 1, 6))


@pytest.mark.parametrize("data", [sources.digits(), nested(), FederatedData({"file": np.ones(3)}, [0, 3])])
def test_npz_round_trip(tmp_path, data):
    path = tmp_path / "new" / "data.npz"
    sources.save_npz(data, path)
    same(sources.npz(path), data)
    first = path.read_bytes()
    sources.save_npz(data, path)
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == ["data.npz"]


def test_npz_fields_and_grouping(tmp_path):
    path = tmp_path / "plain.npz"
    np.savez_compressed(path, x=np.arange(6).reshape(3, 2), who=np.array(["b", "a", "b"]))
    assert set(sources.npz(path)) == {"x", "who"}
    data = sources.npz(path, by="who")
    assert data.names == ["a", "b"]
    assert data.client(1)["x"].tolist() == [[0, 1], [4, 5]]


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"


def archive(**members):
    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name.replace("_npy", ".npy"), content)

    return write


def damaged(path):
    sources.save_npz(sources.digits(), path)
    content = bytearray(path.read_bytes())
    content[5000:5100] = bytes(100 * [255])
    path.write_bytes(content)


def truncated(path):
    sources.save_npz(sources.digits(), path)
    path.write_bytes(path.read_bytes()[:-2000])


def saved(**arrays):
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: None, "There is no file"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: path.write_bytes(b""), "not a whole .npz file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no archive"), "not a whole .npz file"),
        (lambda path: path.write_bytes(b"some text"), "not plain arrays"),
        (lambda path: path.write_bytes(pickle.dumps({"x": 1})), "never loaded"),
        (lambda path: path.write_bytes(npy(np.ones(3))), "holds one bare array"),
        (damaged, "not a whole .npz file"),
        (truncated, "not a whole .npz file"),
        (archive(), "holds no arrays"),
        (archive(x_npy=b"\x93NUMPY\x01\x00"), "not a whole .npz file"),
        (archive(x_npy=npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (")), "not a whole .npz file"),
        (
            archive(x_npy=npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1" + 17 * "0" + ",)}")),
            "whole .npz",
        ),
        (archive(notes=b"text"), "'notes', which is not an array"),
        (saved(x=np.array([{}, {}])), "never loaded"),
        (saved(x=np.float32(3)), "'x' is a single value"),
        (saved(x=np.ones(0)), "The data set is empty"),
        (saved(x=np.ones(3), y=np.ones(2)), "differ in length"),
        (saved(x=np.ones(3), offsets=np.array([0, 2])), "offsets must run from 0 to the 3 examples"),
        (saved(x=np.ones(3), offsets=np.array([0.0, 3.0])), "offsets must be integers"),
        (saved(x=np.ones(3), offsets=np.array([0, 3]), names=np.array([1])), "names must be strings"),
        (saved(x=np.ones(3), offsets=np.array([0, 1, 3]), names=np.array(["a", "a"])), "more than once"),
        (saved(x=np.ones(3), offsets=np.array([0, 3]), weights=-np.ones(3)), "3 numbers between 1e-12 and 1e"),
        (saved(offsets=np.array([0, 3])), "The data set is empty"),
        (saved(offsets=np.array([0, 1]), a=np.ones(1), **{"a/b": np.ones(1)}), "within another field"),
        (saved(offsets=np.array([0, 1]), **{"a/b": np.ones(1), "a": np.ones(1)}), "within field 'a'"),
    ],
)
def test_bad_npz_is_refused_with_its_name(tmp_path, write, sentence):
    path = tmp_path / "data.npz"
    write(path)
    with pytest.raises(InvalidInput, match=sentence) as error:
        sources.npz(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_npz_grouping_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    sources.save_npz(nested(), path)
    with pytest.raises(InvalidInput, match="holds a population already"):
        sources.npz(path, by="y")
    np.savez(path, x=np.ones(3), client_ids=np.arange(3))
    with pytest.raises(InvalidInput, match="no field 'client_id' in the examples; there is 'client_ids'"):
        sources.npz(path, by="client_id")


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        (np.ones(3), "a dict of arrays"),
        ({"x": [np.ones(3)]}, "a dict of arrays"),
        ({"a/b": np.ones(3)}, "'a/b' cannot be saved"),
        ({"names": np.ones(3)}, "'names' has a name"),
        ({"x": np.array([None] * 3)}, "'x' holds object"),
    ],
)
def test_what_npz_cannot_hold(tmp_path, examples, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        sources.save_npz(FederatedData(examples, [0, 3]), tmp_path / "data.npz")
    assert not os.listdir(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "data.npz"
    sources.save_npz(nested(), path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(InvalidInput, match="cannot be written: No space left on device"):
        sources.save_npz(sources.digits(), path)
    monkeypatch.undo()
    same(sources.npz(path), nested())
    assert os.listdir(tmp_path) == ["data.npz"]
