"""A trained model and new data: features as in training, and what a model cannot be applied to."""

import json
import warnings

import jax
import numpy as np
import pytest

import fedjax_clip as fc
from fedjax_clip import tasks

ROWS = [
    f"{'' if i % 7 == 0 else 20 + i},{95 + 3 * (i % 9)},{'fm'[i % 2]},{'abc'[i % 3]},{i % 9 > 4}" for i in range(60)
]
CSV = "\n".join(["age,blood,sex,clinic,died", *ROWS]) + "\n"
BOUNDS = "age:0:120;sex:f,m;died:False,True"


def model_of(task):
    return tasks.Model(task.predictor, task.init(jax.random.key(0)))


def sorted_rows(x):
    return x[np.lexsort(np.round(x, 3).T)]


@pytest.mark.parametrize("options", [{}, {"tail": 0.0}, {"bounds": BOUNDS}])
def test_a_file_is_prepared_as_it_was_for_training(tmp_path, options):
    (tmp_path / "t.csv").write_text(CSV)
    task = tasks.csv(str(tmp_path / "t.csv"), "died", by="clinic", **options)
    model = model_of(task)
    found = np.asarray(model._input.features(model.encode(tmp_path / "t.csv")))
    trained = np.concatenate([data.examples["x"] for data in (task.data, *task.evaluation.values())])
    np.testing.assert_allclose(sorted_rows(found), sorted_rows(trained), atol=1e-6)
    assert found.shape[1] == trained.shape[1] > len(model.columns)


@pytest.mark.parametrize("options", [{}, {"bounds": BOUNDS}])
def test_more_rows_are_prepared_as_for_the_model_of_a_run(tmp_path, options):
    def csv(name, **options):
        return tasks.csv(str(tmp_path / name), "died", by="clinic", held_out=0.3, **options)

    (tmp_path / "t.csv").write_text(CSV)
    first = csv("t.csv", **options)
    tasks.save(model_of(first), tmp_path / "run")
    again = csv("t.csv", like=tmp_path / "run")
    assert again.predictor.json() == first.predictor.json()
    for name, x in first.data.examples.items():
        np.testing.assert_allclose(again.data.examples[name], x, atol=1e-6)
    (tmp_path / "more.csv").write_text(CSV + "90,400,x,a,True\n35,,f,b,False\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the new word
        more = csv("more.csv", like=tmp_path / "run") if options else None
    if options:
        assert more.predictor.json() == first.predictor.json()
        assert more.data.num_examples + more.evaluation["examples"].num_examples == 62
        tasks.refuse_fitted(more)
    else:
        with pytest.raises(fc.InvalidInput, match="more.csv: row 62, column 'sex' holds 'x', as nowhere in"):
            csv("more.csv", like=tmp_path / "run")
        with pytest.raises(fc.InvalidInput, match="exact data"):
            tasks.refuse_fitted(again)
    with pytest.raises(fc.InvalidInput, match="give one of them"):
        csv("t.csv", like=tmp_path / "run", bounds=BOUNDS)
    with pytest.raises(fc.InvalidInput, match="has no model of a table's column 'blood': leave like out"):
        tasks.csv(str(tmp_path / "t.csv"), "blood", like=tmp_path / "run")


@pytest.mark.parametrize(("name", "public"), [("heart", False), ("heart", True), ("ames", False)])
def test_packaged_tables_are_prepared_as_for_training(name, public, monkeypatch):
    """The columns' spread over all rows tells a wrong statistic, a wrong order and a lost level."""
    raw = {}
    for reader in ("read_csv", "rdataset"):
        original = getattr(fc.data.tables, reader)
        monkeypatch.setattr(
            fc.data.tables, reader, lambda *args, original=original: raw.setdefault("table", original(*args))
        )
    task = getattr(tasks, name)(public=public)
    model = model_of(task)
    found = np.asarray(model._input.features(model.encode(raw["table"])))
    trained = np.concatenate([data.examples["x"] for data in (task.data, *task.evaluation.values())])
    np.testing.assert_allclose(np.sort(found, 0), np.sort(trained, 0), atol=1e-6)
    np.testing.assert_allclose(sorted_rows(found).mean(1).sum(), sorted_rows(trained).mean(1).sum(), rtol=1e-5)
    assert model.score(raw["table"])["examples"] == len(trained)


def test_a_hospital_alone_leaves_out_what_it_never_measured():
    task = tasks.heart(only="Switzerland")
    names = [column["name"] for column in task.predictor.input["columns"]]
    assert "chol" not in names
    assert "age" in names
    assert (
        model_of(task)._input.features(np.zeros((1, len(model_of(task).columns)))).shape[1:]
        == task.data.examples["x"].shape[1:]
    )


def test_numbers_are_predicted_in_their_units(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=80)
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{a},{1000 + 50 * a}\n" for a in x))
    task = tasks.csv(str(tmp_path / "t.csv"), "y", num_clients=4, tail=0.0)
    best = tasks.tabular.closed_form(task.data, 0.0).astype(np.float32)
    model = tasks.Model(task.predictor, {"params": {"Dense_0": {"kernel": best[:1, None], "bias": best[1:]}}})
    assert model.names == ("y",)
    np.testing.assert_allclose(model.predict({"x": [0.0, 2.0]}).prediction, [1000, 1100], rtol=1e-5)
    assert model.score(tmp_path / "t.csv")["rmse"] < 0.01


REFUSED = {
    "no column 'age'": {"sex": ["f"], "blood": [100]},
    "Row 1, column 'age' holds 'old': it is no number": {"age": ["30", "old"], "blood": [1, 1], "sex": ["f", "m"]},
    "Row 0, column 'sex' holds 'x', as nowhere in the training data; it had 'f', 'm'": {
        **{"age": [30], "blood": [100], "sex": ["x"]}
    },
    "Row 0, column 'sex' is empty": {"age": [30], "blood": [100], "sex": [None]},
    "it is not finite": {"age": [np.inf], "blood": [100], "sex": ["f"]},
    "must have one length": {"age": [1, 2], "blood": [1], "sex": ["f"]},
    "path of a CSV file": 7,
}


def test_rows_that_training_had_no_place_for_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text(CSV)
    model = model_of(tasks.csv(str(tmp_path / "t.csv"), "died", by="clinic"))
    for said, raw in REFUSED.items():
        with pytest.raises(fc.InvalidInput, match=said):
            model.predict(raw)
    known = {"age": [np.nan, 30], "blood": [100, 100], "sex": ["f", "m"]}
    assert model.predict(known).probability.shape == (2, 2)
    assert model.score(known) == {}


def test_unknown_words_count_as_missing_where_training_had_missing_ones(tmp_path):
    (tmp_path / "t.csv").write_text(CSV.replace("101,f,", "101,,"))
    model = model_of(tasks.csv(str(tmp_path / "t.csv"), "died", by="clinic"))
    rows = {"age": [30, 30], "blood": [100, 100], "sex": ["", "x"]}
    with pytest.warns(UserWarning, match="1 rows have a word in column 'sex'"):
        found = model.encode(rows)
    np.testing.assert_array_equal(found[0], found[1])
    public = model_of(tasks.csv(str(tmp_path / "t.csv"), "died", by="clinic", bounds=BOUNDS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = public.encode({"age": ["old", ""], "sex": ["x", ""]})
    assert dict(zip(public.columns, found[0]))["sex=other"] == 1
    assert np.isnan(found[:, 0]).all()


def test_a_description_is_plain_data_and_names_no_code(tmp_path):
    task = tasks.digits(hidden=(4,))
    again = json.loads(json.dumps(task.predictor.json()))
    assert again["model"] == {"class": "MLP", "hidden": [4], "num_outputs": 10}
    params = fc.core.tree.flatten_with_names(task.init(jax.random.key(0)))
    np.savez(tmp_path / "params.npz", **params)
    (tmp_path / "model.json").write_text(json.dumps(again))
    x = task.data.examples["x"][:1500:7]
    whole, restored = model_of(task).predict(x), tasks.load(tmp_path).predict(x)
    np.testing.assert_array_equal(whole.probability, restored.probability)
    np.testing.assert_allclose(whole.probability.sum(1), 1, rtol=1e-5)
    assert set(whole.prediction) <= set("0123456789")
    damaged = [
        ("model", {"class": "os.system"}),
        ("kind", "shell"),
        ("format", "0"),
        ("input", {"shape": "x"}),
        ("model", 3),
    ]
    for field, value in damaged:
        (tmp_path / "model.json").write_text(json.dumps(again | {field: value}))
        with pytest.raises(fc.InvalidInput, match=r"model\.json is (damaged|of format)"):
            tasks.load(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(again | {"model": again["model"] | {"hidden": [5]}}))
    with pytest.raises(fc.InvalidInput, match="does not fit the model"):
        tasks.load(tmp_path)
    with pytest.raises(fc.InvalidInput, match="name a run directory"):
        tasks.load(tmp_path / "nowhere")


def test_arrays_keep_their_shape_and_their_scale(tmp_path):
    task = tasks.classification(
        fc.data.partition.iid({"x": np.arange(240, dtype=np.uint8).reshape(20, 3, 4, 1), "y": np.arange(20) % 2}, 5), ()
    )
    model = model_of(task)
    x = np.full((2, 3, 4), 255, np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=[0, 1])
    np.save(tmp_path / "x.npy", x)
    by_hand = np.ones(12) @ model.params["params"]["Dense_0"]["kernel"]
    for raw in (x, tmp_path / "x.npz", str(tmp_path / "x.npy")):
        np.testing.assert_allclose(model.predict(raw).probability[0], jax.nn.softmax(by_hand), rtol=1e-5)
    assert model.score(tmp_path / "x.npz")["accuracy"] == 0.5
    with pytest.raises(fc.InvalidInput, match="Labels y must be 2 whole numbers"):
        model.score({"x": x, "y": [0, 1, 0]})
    for raw, said in ((x / 255, "uint8"), (x[:, :2], "shape"), (tmp_path / "x.txt", "npz"), (x[:0], "shape")):
        with pytest.raises(fc.InvalidInput, match=said):
            model.predict(raw)


def test_texts_are_read_as_for_training(tmp_path):
    (tmp_path / "letters").mkdir()
    for name in "abcd":
        (tmp_path / f"letters/{name}.txt").write_text("to be or not to be é " * 30)
    task = tasks.text_files(str(tmp_path / "letters"), width=8, layers=1, heads=2, length=12)
    model = model_of(task)
    (tmp_path / "new.txt").write_text("to be or not to be\né\n")
    codes = model.encode(tmp_path / "new.txt")
    assert bytes(codes[0].tolist()) == b"or not to be"
    assert codes[1].tolist() == [0xC3, 0xA9] + [0] * 10
    found = model.predict(tmp_path / "new.txt")
    longer = model.predict(["or not to be", "é"])
    np.testing.assert_array_equal(found.probability, longer.probability)
    logits = model._module.apply(model.params, codes[1:, :2])
    np.testing.assert_allclose(found.probability[1], jax.nn.softmax(logits[0, -1]), rtol=1e-4)
    for raw in ([""], [3], [], "nowhere.txt"):
        with pytest.raises(fc.InvalidInput):
            model.predict(raw)
    words = tasks.inputs.Words(4, 100)
    np.testing.assert_array_equal(
        words.encode(["Good, good 42!"]), fc.data.sources.text.hashed_words(["Good, good 42!"], 4, 100)
    )


def test_a_saved_model_is_loaded_with_the_parameters_asked_for(tmp_path):
    task = tasks.digits(hidden=())
    model = model_of(task)
    tasks.save(model, tmp_path / "run")
    np.savez(tmp_path / "run/best.npz", **{n: 0 * x for n, x in fc.core.tree.flatten_with_names(model.params).items()})
    x = task.data.examples["x"][:3]
    np.testing.assert_array_equal(tasks.load(tmp_path / "run").predict(x).probability, model.predict(x).probability)
    np.testing.assert_allclose(tasks.load(tmp_path / "run", "best").predict(x).probability, 0.1)
    for asked in ("average", "../params"):
        with pytest.raises(fc.InvalidInput, match="it has params and best"):
            tasks.load(tmp_path / "run", asked)
    with pytest.raises(fc.InvalidInput, match="cannot be written"):
        tasks.save(model, tmp_path / "run/params.npz")
