"""DataFrames where arrays are taken: what becomes of each type of column, and what is refused."""

import numpy as np
import pandas as pd
import pytest

import fedjax_clip as fc
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition, tables

ROWS = 6


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "y": pd.array([1, 0, 1, 1, 0, 0], dtype="Int64"),
            "x": np.linspace(0, 1, ROWS, dtype=np.float32),
            "half": pd.array([1.5, None, 2, 0, 1, 3], dtype="Float64"),
            "old": pd.array([True, False] * 3, dtype="boolean"),
            "sure": [True, False, True] * 2,
            "ward": pd.Categorical(["b", "a", "b", "a", "b", "b"]),
            "level": pd.Categorical([3, 5, 3, 5, 3, 3]),
            "note": pd.array(list("uvwxyz"), dtype="string"),
            "vector": [np.full(2, i) for i in range(ROWS)],
        },
        index=[f"row {i}" for i in range(ROWS)],
    )


def test_each_type_becomes_the_array_that_says_the_same(frame):
    data = partition.natural(frame, by="ward", keep=True)
    assert data.names == ["a", "b"]
    order = [1, 3, 0, 2, 4, 5]
    expected = {
        "y": np.array([1, 0, 1, 1, 0, 0]),
        "x": np.linspace(0, 1, ROWS, dtype=np.float32),
        "half": np.array([1.5, np.nan, 2, 0, 1, 3]),
        "old": np.array([True, False] * 3),
        "sure": np.array([True, False, True] * 2),
        "ward": np.array(list("babab" + "b"), object),
        "level": np.array([3, 5, 3, 5, 3, 3]),
        "note": np.array(list("uvwxyz"), object),
        "vector": np.repeat(np.arange(ROWS)[:, None], 2, axis=1),
    }
    assert set(data.fields()) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(data.fields()[name], array[order])
        assert data.fields()[name].dtype == array.dtype, name


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pd.to_datetime(["2026-01-01"] * ROWS), "dates or times .datetime64"),
        (pd.to_datetime(["2026-01-01"] * ROWS, utc=True), "dates or times .datetime64"),
        (pd.to_timedelta(range(ROWS)), "dates or times .timedelta64"),
        (pd.period_range("2026", periods=ROWS), "dates or times .period"),
        (list(pd.to_datetime(["2026-01-01"] * ROWS).date), "dates or times .object"),
        (pd.array([1, None, 1, 1, None, 0], dtype="Int64"), "no value in 2 of 6 rows, first in row 1"),
        (["a", "b", "c", None, "d", "e"], "no value in 1 of 6 rows, first in row 3"),
        (pd.Categorical(["a", "b", None] * 2), "no value in 2 of 6 rows"),
        ([np.ones(1 + (i == 4)) for i in range(ROWS)], r"arrays of different shapes, \(1,\) and \(2,\)"),
    ],
)
def test_what_an_array_cannot_say_is_refused_with_its_column(frame, column, words):
    with pytest.raises(InvalidInput, match=f"Field 'bad' .*{words}") as refusal:
        partition.iid(frame.assign(bad=column), num_clients=2)
    assert "\n" not in str(refusal.value)


def test_every_door_takes_a_frame(frame):
    small = frame[["x", "y"]]
    arrays = {"x": small["x"].to_numpy(), "y": small["y"].to_numpy(np.int64)}
    for deal in (
        lambda e: partition.iid(e, 2, seed=1),
        lambda e: partition.dirichlet(e, 2, 0.5, seed=1),
        lambda e: partition.quantity_skew(e, 2, seed=1),
        lambda e: partition.shards(e, 2, 1, seed=1),
        lambda e: fc.FederatedData(e, [0, 2, 6]),
        lambda e: fc.FederatedData.from_assignment(e, pd.Series([0, 1, 1, 0, 1, 1], dtype="Int64")),
        lambda e: fc.FederatedData.from_clients({"ann": e, "bob": e}),
    ):
        data, expected = deal(small), deal(arrays)
        np.testing.assert_array_equal(data.offsets, expected.offsets)
        for name, x in expected.fields().items():
            np.testing.assert_array_equal(data.fields()[name], x)
    weighed = fc.FederatedData(small, [0, 6], weights=pd.Series([1, 2, 1, 1, 1, 1], dtype="Int64"))
    assert weighed.client_weights.tolist() == [7]


def test_a_matrix_keeps_the_order_of_the_first_clients_columns(frame):
    both = fc.FederatedData.from_clients(
        {"ann": {"x": frame[["x", "half"]], "y": frame["y"]}, "bob": {"x": frame[["half", "x"]], "y": frame["y"]}}
    )
    ann, bob = both.client(0)["x"], both.client(1)["x"]
    assert ann.shape == (ROWS, 2)
    np.testing.assert_array_equal(ann, bob)
    with pytest.raises(InvalidInput, match=r"client 'bob' has the columns .*the first client's \['x', 'half'\]"):
        fc.FederatedData.from_clients({"ann": {"x": frame[["x", "half"]]}, "bob": {"x": frame[["x", "sure"]]}})
    with pytest.raises(InvalidInput, match="a table whose column 'note' holds object"):
        fc.FederatedData.from_clients({"ann": {"x": frame[["x", "note"]]}})


def test_a_column_twice_is_refused(frame):
    twice = pd.concat([frame, frame[["x"]]], axis=1)
    with pytest.raises(InvalidInput, match="Column 'x' occurs more than once"):
        partition.iid(twice, 2)
    with pytest.raises(InvalidInput, match="The DataFrame: column 'x' occurs more than once"):
        fc.tasks.csv(twice, "y")


@pytest.mark.parametrize(
    "options", [{}, {"by": "ward"}, {"bounds": "age:0:100;sex:f,m;beds:0:5;died:no,yes;old:True,False"}]
)
def test_a_table_is_that_of_the_file_that_it_writes(tmp_path, options):
    draws, rows = np.random.default_rng(0), 60
    frame = pd.DataFrame(
        {
            "age": draws.integers(20, 90, rows).astype(float),
            "sex": pd.Categorical(draws.choice(["f", "m"], rows)),
            "beds": pd.array(draws.integers(0, 5, rows), dtype="Int64"),
            "old": pd.array(draws.random(rows) < 0.5, dtype="boolean"),
            "pulse": draws.random(rows).astype(np.float32),
            "digits": [str(i % 7) for i in range(rows)],
            "ward": draws.integers(0, 3, rows),
            "died": pd.array(draws.choice(["no", "yes"], rows), dtype="string"),
        }
    )
    for row, name in enumerate(("age", "sex", "beds", "old")):
        frame.loc[row, name] = None
    frame.to_csv(tmp_path / "table.csv", index=False)
    given, read = fc.tasks.csv(frame, "died", **options), fc.tasks.csv(str(tmp_path / "table.csv"), "died", **options)
    assert given.data.names == read.data.names
    for name, x in read.data.fields().items():
        np.testing.assert_allclose(given.data.fields()[name], x, atol=1e-6)


def test_a_table_that_cannot_be_learned_from_is_refused_as_a_file_is():
    frame = pd.DataFrame({"age": [63.0, 50.0], "died": ["no", "yes"]})
    with pytest.raises(InvalidInput, match="The DataFrame: there is no column 'dead'; there is 'died'"):
        fc.tasks.csv(frame, "dead")
    with pytest.raises(InvalidInput, match="The DataFrame: column 'born' holds dates or times"):
        fc.tasks.csv(frame.assign(born=pd.Timestamp("2026-01-01")), "died")
    with pytest.raises(InvalidInput, match="The DataFrame needs at least one column and one row"):
        tables.read_csv(tables.Frame(frame.iloc[:0]))


def test_a_history_is_a_frame():
    history = [{"round": 1.0, "loss": 2.0}, {"round": 2.0, "loss": 1.0, "eval/examples/loss": 1.5}]
    frame = pd.DataFrame(history).set_index("round")
    assert frame["eval/examples/loss"].dropna().to_dict() == {2.0: 1.5}
