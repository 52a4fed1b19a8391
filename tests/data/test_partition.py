"""Every partition deals each example once, leaves nobody empty and repeats itself for a seed."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)

PARTITIONS = {
    "iid": partition.iid,
    "dirichlet": lambda e, m, seed: partition.dirichlet(e, m, 0.3, seed=seed),
    "dirichlet_tiny_alpha": lambda e, m, seed: partition.dirichlet(e, m, 1e-3, seed=seed),
    "dirichlet_huge_alpha": lambda e, m, seed: partition.dirichlet(e, m, 1e3, seed=seed),
    "dirichlet_least_alpha": lambda e, m, seed: partition.dirichlet(e, m, 5e-324, seed=seed),
    "dirichlet_most_alpha": lambda e, m, seed: partition.dirichlet(e, m, 1e308, seed=seed),
    "quantity_skew": partition.quantity_skew,
    "quantity_most_skew": lambda e, m, seed: partition.quantity_skew(e, m, 1e308, seed),
    "shards": lambda e, m, seed: partition.shards(e, m, 1, seed=seed),
}


def examples(num, num_classes=5):
    ids = np.arange(num)
    return {"x": np.stack([ids, -ids], 1), "y": (ids * 7 % num_classes).astype(np.int32), "id": ids}


def check(data, given_examples, num_clients):
    assert data.num_clients == num_clients
    assert data.sizes.min() >= 1
    ids = data.examples["id"]
    np.testing.assert_array_equal(np.sort(ids), given_examples["id"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[ids]), data.examples, given_examples)


@pytest.mark.parametrize("name", PARTITIONS)
@SETTINGS
@given(num=st.integers(1, 120), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_every_example_once_nobody_empty_same_again(name, num, share, seed):
    given_examples, num_clients = examples(num), max(1, round(share * num))
    data = PARTITIONS[name](given_examples, num_clients, seed=seed)
    check(data, given_examples, num_clients)
    again = PARTITIONS[name](given_examples, num_clients, seed=seed)
    np.testing.assert_array_equal(data.offsets, again.offsets)
    np.testing.assert_array_equal(data.examples["id"], again.examples["id"])


@pytest.mark.parametrize("name", PARTITIONS)
def test_one_example_each(name):
    data = PARTITIONS[name](examples(40), 40, seed=3)
    assert data.sizes.tolist() == [1] * 40


@pytest.mark.parametrize("name", [n for n in PARTITIONS if n != "dirichlet_most_alpha"])
def test_seeds_differ(name):
    one, two = (PARTITIONS[name](examples(100), 5, seed=s) for s in (0, 1))
    assert one.examples["id"].tolist() != two.examples["id"].tolist()


@SETTINGS
@given(num=st.integers(1, 200), share=st.floats(0, 1))
def test_iid_sizes_differ_by_one(num, share):
    assert np.ptp(partition.iid(examples(num), max(1, round(share * num))).sizes) <= 1


def test_dirichlet_alpha_sets_the_skew():
    def largest_share(alpha):
        data = partition.dirichlet(examples(5000), 10, alpha)
        counts = np.array([np.bincount(data.client(c)["y"], minlength=5) for c in range(10)])
        return (counts.max(0) / counts.sum(0)).mean()

    sharp, middle, flat = map(largest_share, (1e-3, 1.0, 1e3))
    assert sharp > 0.97
    assert 0.2 < middle < 0.6
    assert flat < 0.12


def test_quantity_skew_sizes():
    sizes = {sigma: partition.quantity_skew(examples(5000), 10, sigma).sizes for sigma in (0.0, 0.5, 2.0)}
    assert sizes[0.0].tolist() == [500] * 10
    assert np.ptp(sizes[0.0]) < np.ptp(sizes[0.5]) < np.ptp(sizes[2.0])


def test_shards_hold_few_classes():
    data = partition.shards(examples(1000, 10), 25, 2)
    assert set(data.sizes) == {40}
    assert max(len(np.unique(data.client(c)["y"])) for c in range(25)) == 2


def test_nested_fields_and_seed_types():
    tree = {"x": {"a": np.arange(6), "b": np.ones((6, 2))}, "y": np.arange(6) % 2}
    data = partition.dirichlet(tree, np.int64(3), 1, seed=np.uint32(7))
    assert sorted(data.examples["x"]["a"].tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (np.array(["f10", "f2", "f10", "f1"]), ["f1", "f2", "f10"]),
        (np.array([b"f10", b"f2", b"f10", b"f1"]), ["f1", "f2", "f10"]),
        (np.array(["f10", b"f2", "f10", "f1"], dtype=object), ["f1", "f2", "f10"]),
        (np.array([10, -2, 10, 3]), ["-2", "3", "10"]),
        (np.array([10, 2, 10, 3], np.uint8), ["2", "3", "10"]),
        (np.array(["2", "b", "", "é7"]), ["", "2", "b", "é7"]),
        (np.array(["a1", "a01", "a001", "a" + "9" * 5000]), ["a001", "a01", "a1", "a" + "9" * 5000]),
    ],
)
def test_natural_names(keys, names):
    given_examples = {"x": np.arange(4), "who": keys}
    data = partition.natural(given_examples, "who")
    assert data.names == names
    assert set(data.examples) == {"x"}
    kept = partition.natural(given_examples, "who", keep=True)
    for c in range(kept.num_clients):
        assert {k.decode() if isinstance(k, bytes) else str(k) for k in kept.client(c)["who"]} == {kept.name(c)}


@SETTINGS
@given(st.lists(st.text(max_size=4).filter(lambda s: "\0" not in s), min_size=1, max_size=30))
def test_natural_keeps_every_example_once_in_order(keys):
    given_examples = examples(len(keys)) | {"who": np.array(keys)}
    data = partition.natural(given_examples, "who")
    check(data, {k: v for k, v in given_examples.items() if k != "who"}, len(set(keys)))
    for c in range(data.num_clients):
        ids = data.client(c)["id"].tolist()
        assert ids == [i for i, key in enumerate(keys) if key == data.name(c)]


GIVEN = examples(20)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: partition.iid(GIVEN, 0), "num_clients must be a whole number of at least 1, not 0"),
        (lambda: partition.iid(GIVEN, 21), "20 examples cannot serve 21 clients"),
        (lambda: partition.iid(GIVEN, 2.5), "num_clients must be a whole number of at least 1, not 2.5"),
        (lambda: partition.iid(GIVEN, 2, seed=-1), "seed must be a whole number between 0 and 4294967295, not -1"),
        (lambda: partition.iid(GIVEN, 2, seed="a"), "seed must be a whole number"),
        (lambda: partition.iid(np.ones(3), 2), "must be a dict of arrays"),
        (lambda: partition.iid({}, 2), "must be a dict of arrays"),
        (lambda: partition.iid({"x": np.ones((0, 3))}, 1), "The data set is empty"),
        (lambda: partition.iid({"x": np.ones(3), "y": np.ones(2)}, 1), "differ in length"),
        (lambda: partition.iid({"x": 3.0}, 1), "'x' is a single value"),
        (lambda: partition.dirichlet(GIVEN, 2, 0), "alpha must be a positive, finite number"),
        (lambda: partition.dirichlet(GIVEN, 2, -1.0), "alpha must be a positive, finite number"),
        (lambda: partition.dirichlet(GIVEN, 2, float("nan")), "alpha must be a positive, finite number"),
        (lambda: partition.dirichlet(GIVEN, 2, float("inf")), "alpha must be a positive, finite number"),
        (lambda: partition.dirichlet(GIVEN, 2, "much"), "alpha must be a positive, finite number"),
        (lambda: partition.dirichlet(GIVEN, 2, 1, label="Y"), "no field 'Y' in the examples; there is 'x' or 'y'"),
        (lambda: partition.dirichlet({"labels": GIVEN["y"]}, 2, 1, label="label"), "there is 'labels'"),
        (lambda: partition.dirichlet({"y": np.array(["a", "b"])}, 2, 1), "'y' is no label: it must hold one integer"),
        (lambda: partition.dirichlet({"y": np.ones(2)}, 2, 1), "not float64"),
        (lambda: partition.dirichlet({"y": np.ones((2, 3), int)}, 2, 1), "of shape \\(3,\\)"),
        (lambda: partition.quantity_skew(GIVEN, 2, -0.1), "sigma must be a finite number of at least 0"),
        (lambda: partition.quantity_skew(GIVEN, 2, float("inf")), "sigma must be a finite number of at least 0"),
        (lambda: partition.shards(GIVEN, 2, 0), "classes_per_client must be a whole number of at least 1"),
        (lambda: partition.shards(GIVEN, 2, 6), "cannot have 6 classes: field 'y' has 5"),
        (lambda: partition.shards(GIVEN, 11, 2), "11 clients of 2 classes each need 22 examples: there are 20"),
        (lambda: partition.natural(GIVEN, "who"), "no field 'who'"),
        (lambda: partition.natural(GIVEN, "x"), "'x' cannot name clients"),
        (lambda: partition.natural({"x": np.ones(3)}, "x"), "not float64"),
        (lambda: partition.natural({"who": np.arange(3)}, "who"), "no field but 'who'"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(build, sentence):
    with pytest.raises(InvalidInput, match=sentence) as error:
        build()
    assert "\n" not in str(error.value)


def plotted(num_clients, num_classes=10):
    return partition.dirichlet({"y": np.arange(4000) % num_classes}, num_clients, 0.3)


@pytest.mark.parametrize(("num_clients", "num_classes"), [(1, 1), (14, 10), (40, 20), (41, 10), (14, 62), (300, 62)])
def test_plot_writes_a_picture(tmp_path, num_clients, num_classes):
    path = tmp_path / "picture.png"
    figure = partition.plot(plotted(num_clients, num_classes), path=path)
    assert f"{num_clients} clients, 4,000 examples" in figure.get_suptitle()
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_plot_bars_are_the_counts():
    data = plotted(6)
    axes = partition.plot(data, num_classes=12).axes[0]
    assert len(axes.containers) == 12
    for k, bars in enumerate(axes.containers):
        expected = [np.sum(data.client(c)["y"] == k) for c in range(6)]
        assert [bar.get_width() for bar in bars] == expected


def test_plot_names_may_hold_anything():
    names = ["$x^$", "a very long name of a hospital 1", "_", "a\\b"]
    data = partition.natural({"y": np.arange(8) % 2, "who": np.array(names * 2)}, "who")
    partition.plot(data).canvas.draw()


def test_plot_refuses_in_one_sentence(tmp_path):
    data = plotted(4)
    for keywords, sentence in (
        ({"label": "z"}, "no field 'z'"),
        ({"num_classes": 3}, "Labels run from 0 to 9, outside 0 to 2"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1"),
        ({"path": tmp_path / "none" / "a.png"}, "cannot be saved"),
        ({"path": tmp_path / "a.nothing"}, "cannot be saved"),
    ):
        with pytest.raises(InvalidInput, match=sentence):
            partition.plot(data, **keywords)


def test_imports_stay_light():
    code = "import sys, fedjax_clip.data.partition, fedjax_clip.data.sources\n"
    code += "print([m for m in ('matplotlib', 'sklearn', 'tensorflow_datasets', 'array_record') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
