"""TFDS, without a network: its data, their cache, and what goes wrong."""

import importlib.util
import json
import os
import threading

import numpy as np
import pytest

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import sources
from fedjax_clip.data.sources import tfds_cache


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def prepared(tfds, tmp_path_factory):
    from digits_tfds import build_digits_tfds

    data_dir = tmp_path_factory.mktemp("tfds")
    assert build_digits_tfds(data_dir) == data_dir / "fedjax_digits" / "1.0.0"
    return data_dir


@pytest.fixture
def read(prepared, tmp_path):
    def read(name="fedjax_digits", **keywords):
        return sources.tfds(name, **{"data_dir": prepared, "cache_dir": tmp_path / "cache"} | keywords)

    return read


@pytest.fixture
def no_tfds(monkeypatch):
    def refuse():
        raise AssertionError("TFDS is asked again")

    return lambda: monkeypatch.setattr(tfds_cache, "import_tfds", refuse)


def test_tfds_gives_the_same_digits(read):
    data, expected = read(by="client_id"), sources.digits()
    assert data.names == expected.names
    assert set(data.examples) == {"x", "y"}
    np.testing.assert_array_equal(data.offsets, expected.offsets)
    assert data.examples["x"].dtype == np.uint8
    np.testing.assert_array_equal(data.examples["x"] / np.float32(16), expected.examples["x"])
    np.testing.assert_array_equal(data.examples["y"], expected.examples["y"])


def test_tfds_flat_examples(read):
    examples = read()
    assert set(examples) == {"x", "y", "client_id"}
    assert all(isinstance(x, np.memmap) for x in examples.values())
    assert examples["client_id"][0] == b"form00"
    assert read(split="train[:10]")["x"].shape == (10, 8, 8, 1)
    assert set(read(fields=["label"])) == {"y"}
    assert set(read(image="label", label="image")) == {"x", "y", "client_id"}


@pytest.mark.parametrize("by", [None, "client_id"])
def test_a_second_call_reads_the_cache_alone(read, no_tfds, by):
    first = read(by=by)
    no_tfds()
    second = read(by=by)
    for one, two in ((first, second),) if by is None else ((first.examples, second.examples),):
        assert all(isinstance(x, np.memmap) for x in two.values())
        assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}
    with pytest.raises(AssertionError, match="asked again"):
        read(split="train[:5]", by=by)


def test_the_cache_is_where_the_environment_says(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_CLIP_CACHE", str(tmp_path / "there"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    sources.tfds("fedjax_digits")
    assert (tmp_path / "there").is_dir()


def test_half_written_leftovers_are_ignored_and_removed(read, tmp_path):
    read()
    cache = tmp_path / "cache" / "tfds"
    (entry,) = (p for p in cache.iterdir() if p.is_dir())
    leftover = entry.with_name(entry.name + ".tmp")
    entry.rename(leftover)
    (leftover / "meta.json").unlink()
    assert read()["x"].shape == (1797, 8, 8, 1)
    assert sorted(p.name for p in cache.iterdir()) == [".lock", entry.name]


@pytest.mark.parametrize("damage", ["no meta", "half meta", "other meta", "no array", "half array", "empty array"])
def test_a_damaged_entry_is_converted_again(read, tmp_path, damage):
    read()
    (entry,) = (p for p in (tmp_path / "cache" / "tfds").iterdir() if p.is_dir())
    meta, array = entry / "meta.json", entry / "1.npy"
    match damage:
        case "no meta":
            meta.unlink()
        case "half meta":
            meta.write_text(meta.read_text()[:20])
        case "other meta":
            meta.write_text("[]")
        case "no array":
            array.unlink()
        case "half array":
            array.write_bytes(array.read_bytes()[:1000])
        case "empty array":
            array.write_bytes(b"")
    assert set(read()) == {"x", "y", "client_id"}


def test_newly_prepared_data_replaces_the_cache(tfds, tmp_path, no_tfds):
    from digits_tfds import build_digits_tfds

    data_dir, cache_dir = tmp_path / "data", tmp_path / "cache"
    info = build_digits_tfds(data_dir) / "dataset_info.json"
    sources.tfds("fedjax_digits", data_dir=data_dir, cache_dir=cache_dir)
    (meta,) = cache_dir.glob("tfds/*/meta.json")
    assert json.loads(meta.read_text())["version"] == "1.0.0"
    before = meta.stat().st_mtime_ns
    os.utime(info, ns=(1, 1))
    sources.tfds("fedjax_digits", data_dir=data_dir, cache_dir=cache_dir)
    (meta,) = cache_dir.glob("tfds/*/meta.json")
    assert meta.stat().st_mtime_ns > before
    info.unlink()
    no_tfds()
    assert len(sources.tfds("fedjax_digits", data_dir=data_dir, cache_dir=cache_dir)["y"]) == 1797


def test_a_failed_conversion_leaves_nothing(read, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InvalidInput, match="No space left on device"):
        read()
    assert [p.name for p in (tmp_path / "cache" / "tfds").iterdir()] == [".lock"]


def test_two_at_once_convert_once(read, monkeypatch):
    calls = []
    convert = tfds_cache._convert
    monkeypatch.setattr(tfds_cache, "_convert", lambda *args: calls.append(1) or convert(*args))
    results = []
    threads = [threading.Thread(target=lambda: results.append(read(by="client_id"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 3


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"name": "fedjax_digit"}, "did you mean 'fedjax_digits'"),
        ({"name": "mnst"}, "did you mean 'mnist'"),
        ({"name": "no such thing/"}, "Parsing builder name string"),
        ({"name": "mnist"}, "'mnist' is not prepared under .*: download=True fetches it"),
        ({"name": "emnist/byclas"}, "BuilderConfig byclas not found"),
        ({"name": "mnist:9.9.9"}, "cannot be loaded at version 9.9.9"),
        ({"split": "tests"}, "Unknown split 'tests'. Should be one of"),
        ({"split": "train[:0]"}, "split 'train\\[:0\\]'"),
        ({"by": "client"}, "no field 'client' in the examples; there is 'client_id'"),
        ({"by": "image"}, "'image' cannot name clients"),
        ({"image": "img"}, "no field 'img'"),
        ({"label": "lable"}, "there is 'label'"),
        ({"fields": ["imag"]}, "there is 'image'"),
        ({"fields": ["client_id"], "by": "client_id"}, "nothing to learn from"),
        ({"fields": []}, "nothing to learn from"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(read, keywords, sentence):
    with pytest.raises(InvalidInput, match=sentence) as error:
        read(**keywords)
    assert "\n" not in str(error.value)


def test_an_unusable_cache(read, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="file/cache cannot be used"):
        read(cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_tfds_without_its_packages(read, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InvalidInput, match=rf'need {package}.*pip install "fedjax_clip\[tfds\]"'):
        read()


def test_stock_data_sets(tfds, tmp_path):
    keywords = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache", "download": True}
    with tfds.testing.mock_data(num_examples=7):
        mnist = sources.tfds("mnist", **keywords)
        reviews = sources.tfds("imdb_reviews", **keywords)
        faces = sources.tfds("celeb_a", fields=["attributes"], label="attributes/Young", **keywords)
        with pytest.raises(InvalidInput, match="Field 'image' of 'voc' is not one text, or numbers of the same shape"):
            sources.tfds("voc", **keywords)
    assert mnist["x"].shape == (7, 28, 28, 1)
    assert mnist["x"].dtype == np.uint8
    assert mnist["y"].shape == (7,)
    assert reviews["text"].dtype.kind == "S"
    assert len(reviews["text"][0]) >= 10
    assert faces["y"].dtype == bool
    assert "attributes/Smiling" in faces
    assert "x" not in faces
