"""FederatedData: what it refuses, and that no split loses or doubles an example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition
from fedjax_clip.data.population import FederatedData, check_fields

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)

populations = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(lambda sizes: population(sizes))
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**32 - 1)


def population(sizes, weights=True):
    n = sum(sizes)
    examples = {"x": np.arange(2 * n).reshape(n, 2), "id": np.arange(n)}
    names = [f"client{c}" for c in range(len(sizes))]
    return FederatedData(examples, np.cumsum([0, *sizes]), names, np.arange(1.0, n + 1) if weights else None)


def owners(data):
    """``{example id: name of its client}``, once each."""
    ids = data.examples["id"].tolist()
    assert len(set(ids)) == len(ids)
    return {i: data.name(c) for c in range(data.num_clients) for i in data.client(c)["id"].tolist()}


def check_whole(data, *parts):
    """The parts hold every example of ``data`` once, with its client, pixels and weight."""
    joined = {}
    for part in parts:
        assert not joined.keys() & owners(part).keys()
        joined |= owners(part)
        np.testing.assert_array_equal(part.examples["x"], data.examples["x"][part.examples["id"]])
        np.testing.assert_array_equal(part.weights, data.weights[part.examples["id"]])
        assert part.sizes.min() >= 1
    assert joined == owners(data)


@SETTINGS
@given(populations, fractions, seeds)
def test_split_examples_keeps_everything_once(data, fraction, seed):
    if data.sizes.max() == 1:
        with pytest.raises(InvalidInput, match="nothing to hold out"):
            data.split_examples(fraction, seed)
        return
    train, held_out = data.split_examples(fraction, seed)
    check_whole(data, train, held_out)
    assert train.num_clients == data.num_clients
    assert held_out.num_clients == np.sum(data.sizes > 1)
    again = data.split_examples(fraction, seed)[1]
    np.testing.assert_array_equal(held_out.examples["id"], again.examples["id"])


def test_a_rare_class_is_on_both_sides_and_a_class_of_one_is_held_out_at_times():
    sizes = np.array([20, 10, 2, 1])
    y = np.zeros(33, int)
    y[[3, 17]] = y[25] = y[31] = 1  # two of 20, one of 10, one of 2
    data = FederatedData({"y": y, "id": np.arange(33)}, np.cumsum([0, *sizes]))
    alone = []
    for seed in range(60):
        train, held_out = data.split_examples(0.2, seed, label="y")
        assert sorted([*train.examples["id"], *held_out.examples["id"]]) == list(range(33))
        assert train.num_clients == 4
        first = held_out.client(0)
        assert (held_out.name(0), len(first["y"]), first["y"].sum()) == ("0", 5, 1)  # round(3.6) of 18, one of 2
        alone.append(25 in held_out.examples["id"])
    assert 4 < sum(alone) < 20  # with probability 0.2


@SETTINGS
@given(populations, fractions, seeds)
def test_split_clients_keeps_everything_once(data, fraction, seed):
    if data.num_clients == 1:
        with pytest.raises(InvalidInput, match="one client"):
            data.split_clients(fraction, seed)
        return
    train, held_out = data.split_clients(fraction, seed)
    check_whole(data, train, held_out)
    assert not set(train.names) & set(held_out.names)


@SETTINGS
@given(populations, st.data())
def test_select_is_those_clients_in_that_order(data, draw):
    clients = draw.draw(st.permutations(range(data.num_clients)))[: draw.draw(st.integers(1, data.num_clients))]
    chosen = data.select(clients)
    assert chosen.names == [data.name(c) for c in clients]
    for i, c in enumerate(clients):
        jax.tree.map(np.testing.assert_array_equal, chosen.client(i), data.client(c))
    np.testing.assert_array_equal(chosen.weights, data.weights[chosen.examples["id"]])


@SETTINGS
@given(populations, seeds)
def test_from_assignment_and_from_clients_agree(data, seed):
    order = np.random.default_rng(seed).permutation(data.num_examples)
    owner = np.repeat(np.arange(data.num_clients), data.sizes)
    mixed = FederatedData.from_assignment(jax.tree.map(lambda x: x[order], data.examples), owner[order], data.names)
    assert owners(mixed) == owners(data)
    joined = FederatedData.from_clients({data.name(c): data.client(c) for c in range(data.num_clients)})
    assert joined.names == data.names
    jax.tree.map(np.testing.assert_array_equal, joined.examples, data.examples)


def test_take_keeps_clients_of_the_index():
    data = population([2, 3, 1])
    some = data.take(np.array([1, 2, 4, 5]))
    assert owners(some) == {1: "client0", 2: "client1", 4: "client1", 5: "client2"}
    assert data.take(np.array([5, 2, 3]), np.array([2, 1])).names == ["client2", "client1"]


def test_nothing_is_copied():
    data = population([2, 3])
    assert np.shares_memory(data.client(1)["x"], data.examples["x"])


def test_a_series_is_its_values_in_their_order():
    pandas = pytest.importorskip("pandas")

    def shuffled(values):
        return pandas.Series(values, index=[2, 0, 1])

    data = FederatedData({"y": shuffled([5, 6, 7])}, [0, 1, 2, 3], shuffled(["a", "b", "c"]), shuffled([1.0, 2.0, 3.0]))
    assert [data.name(c) for c in range(3)] == ["a", "b", "c"]
    chosen = data.select(shuffled([2, 0, 1]))
    assert chosen.examples["y"].tolist() == [7, 5, 6]
    assert chosen.weights.tolist() == [3.0, 1.0, 2.0]
    held = [part.examples["y"].tolist() for part in data.split_clients(0.5)]
    plain = FederatedData({"y": np.array([5, 6, 7])}, [0, 1, 2, 3])
    assert held == [part.examples["y"].tolist() for part in plain.split_clients(0.5)]
    grouped = FederatedData.from_assignment({"y": shuffled([5, 6, 7])}, shuffled([1, 0, 1]))
    assert grouped.examples["y"].tolist() == [6, 5, 7]
    assert partition.natural({"y": np.ones(3), "who": shuffled(["b", "a", "b"])}, "who").names == ["a", "b"]


def test_what_devices_hold_exactly_is_taken():
    numbers = {"a": np.ones(3, ">f4"), "b": np.array([1, 2, 2**31 - 1]), "c": np.array([1e38, -np.inf, np.nan])}
    others = {"d": jnp.ones(3, jnp.bfloat16), "e": np.ma.array([1, 2, 3]), "f": np.array([True, False, True])}
    data = FederatedData(numbers | others, [0, 3])
    check_fields(data)
    assert data.examples["a"].dtype == np.float32
    with jax.enable_x64(True):
        check_fields(FederatedData({"y": np.array([3e9, 1], np.int64), "x": np.array([1e300, 1])}, [0, 2]))


def test_half_precision_weights_do_not_overflow():
    data = FederatedData({"x": np.ones(70_000)}, [0, 70_000], weights=np.ones(70_000, np.float16))
    assert data.client_weights.tolist() == [70_000]


def test_repr_and_default_names():
    data = FederatedData({"x": np.ones((3, 2), np.float32)}, [0, 1, 3])
    assert repr(data) == "FederatedData(2 clients, 3 examples, x: ('float32', (2,)))"
    assert data.name(1) == "1"


X3 = {"x": np.ones((3, 2))}


class Table:
    columns = ("a", "b")


class Sparse:
    """NumPy makes an array of no axes of it, as of a matrix of SciPy."""


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: FederatedData({}, [0, 3]), "The data set is empty"),
        (lambda: FederatedData({"x": np.ones((0, 2))}, [0, 0]), "The data set is empty"),
        (lambda: FederatedData({"x": [1, 2, 3]}, [0, 3]), "Field 'x/0' is a single value"),
        (lambda: FederatedData({"x": np.ones(3), "y": np.ones(4)}, [0, 3]), "differ in length: x: 3, y: 4"),
        (lambda: FederatedData(X3, [0]), "at least one client"),
        (lambda: FederatedData(X3, [[0, 3]]), "at least one client"),
        (lambda: FederatedData(X3, [0.0, 1.5, 3.0]), "offsets must be integers"),
        (lambda: FederatedData(X3, [0, 2]), "from 0 to the 3 examples, not from 0 to 2"),
        (lambda: FederatedData(X3, [1, 3]), "not from 1 to 3"),
        (lambda: FederatedData(X3, [0, 2, 2, 3]), "Client '1' has no examples"),
        (lambda: FederatedData(X3, [0, 3, 2, 3], ["a", "b", "c"]), "Client 'b' has no examples"),
        (lambda: FederatedData(X3, [0, 3], ["a", "b"]), "2 client names for 1 clients"),
        (lambda: FederatedData(X3, [0, 1, 3], ["a", "a"]), "Client name 'a' occurs more than once"),
        (lambda: FederatedData(X3, [0, 3], weights=np.ones(2)), "3 numbers between 1e-12 and 1e"),
        (lambda: FederatedData(X3, [0, 3], weights=np.array([1, 0, 1])), "3 numbers between 1e-12 and 1e"),
        (lambda: FederatedData(X3, [0, 3], weights=np.array([1, np.nan, 1])), "3 numbers between 1e-12 and 1e"),
        (lambda: FederatedData(X3, [0, 3], weights=np.array([1, 3e38, 1])), "3 numbers between 1e-12 and 1e"),
        (lambda: FederatedData(X3, [0, 3], weights=np.array([1, 1e-320, 1])), "3 numbers between 1e-12 and 1e"),
        (lambda: FederatedData(X3, [0, 1, 3], [1, "1"]), "Client name '1' occurs more than once"),
        (lambda: FederatedData(X3, [0, 1, 3], [b"a", "a"]), "Client name 'a' occurs more than once"),
        (lambda: FederatedData(X3, [0, 3], "a"), "names must be .clients., one name each"),
        (lambda: FederatedData.from_clients({1: X3, "1": X3}), "Two clients have the name '1', as text"),
        (lambda: FederatedData.from_clients([X3]), "clients must be {client name: examples}, not list"),
        (
            lambda: FederatedData.from_clients({"a": {"x": np.ones(2, np.uint8)}, "b": {"x": np.ones(2, np.float32)}}),
            "Field 'x' of client 'b' holds float32, that of client 'a' uint8",
        ),
        (lambda: FederatedData({"x": np.ma.array([1, 2, 3], mask=[0, 1, 0])}, [0, 3]), "'x' has masked values"),
        (lambda: FederatedData({"x": Table()}, [0, 3]), "Field 'x' is a table .Table., not an array"),
        (lambda: FederatedData({"x": Sparse()}, [0, 3]), "Field 'x' is a Sparse, not an array"),
        (lambda: FederatedData({"x": jax.random.split(jax.random.key(0), 3)}, [0, 3]), "NumPy makes no array"),
        (lambda: FederatedData(X3, [0, 3], weights=["a", "b", "c"]), "3 numbers between 1e-12"),
        (
            lambda: check_fields(FederatedData({"y": np.array([1, 3e9], np.int64)}, [0, 2])),
            "'y' holds 3000000000 .*int32",
        ),
        (lambda: check_fields(FederatedData({"y": np.array([0, 2**32], np.uint64)}, [0, 2])), "keep as 0 .uint32"),
        (lambda: check_fields(FederatedData({"x": np.array([[1, 1], [1, 1e300]])}, [0, 2])), "example 1.* keep as inf"),
        (lambda: check_fields(FederatedData({"x": np.ones(3, np.longdouble)}, [0, 3])), "not numbers that JAX holds"),
        (lambda: check_fields(FederatedData({"x": np.zeros(3, [("a", "f4")])}, [0, 3])), "not numbers that JAX holds"),
        (lambda: check_fields(FederatedData({"x": np.ones(3, complex)}, [0, 3])), "not numbers that JAX holds"),
        (lambda: FederatedData.from_clients({}), "it has no clients"),
        (lambda: FederatedData.from_clients({"a": {}}), "client 'a' must be arrays"),
        (lambda: FederatedData.from_clients({"a": {"x": 3}}), "client 'a' must be arrays"),
        (lambda: FederatedData.from_clients({"a": X3, "b": {"z": np.ones(2)}}), "'b' has other fields than client 'a'"),
        (
            lambda: FederatedData.from_clients({"a": X3, "b": {"x": np.ones((3, 5))}}),
            "'b' has examples of shape .*, in field 'x'",
        ),
        (
            lambda: FederatedData.from_clients({"a": {"x": np.ones(2), "y": np.ones(1)}}),
            "'a' differ in length: x has 2, y has 1",
        ),
        (lambda: FederatedData.from_clients({"a": X3, "b": {"x": np.ones((0, 2))}}), "Client 'b' has no examples"),
        (lambda: FederatedData.from_assignment(X3, [0, 1]), "for each of the 3 examples"),
        (lambda: FederatedData.from_assignment(X3, [0, 1, -1]), "for each of the 3 examples"),
        (lambda: FederatedData.from_assignment(X3, [0.0, 1.0, 0.0]), "client_of must be integers"),
        (lambda: FederatedData.from_assignment(X3, [0, 0, 2]), "Client '1' has no examples"),
        (lambda: population([2, 3]).select([]), "No client is selected"),
        (lambda: population([2, 3]).select([2]), "numbered 0 to 1"),
        (lambda: population([2, 3]).select([-1]), "numbered 0 to 1"),
        (lambda: population([2, 3]).select([1, 0, 1]), "'client1' is selected more than once"),
        (lambda: population([2, 3]).take([0, 5]), "numbered 0 to 4"),
        (lambda: population([2, 3]).take([3, 0]), "client by client"),
        (lambda: population([2, 3]).take([0, 3], np.array([1])), "client by client"),
        (lambda: population([2, 3]).take([True, False]), "index must be integers"),
        (lambda: population([2, 3]).split_examples(1.0), "between 0 and 1, both excluded, not 1.0"),
        (lambda: population([2, 3]).split_clients(float("nan")), "between 0 and 1, both excluded, not nan"),
    ],
)
def test_bad_populations_are_refused_in_one_sentence(build, sentence):
    with pytest.raises(InvalidInput, match=sentence) as error:
        build()
    assert "\n" not in str(error.value)
