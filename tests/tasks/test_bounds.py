"""What a task computes of its clients' data before training: it says so, or no row has a say in another's features."""

import sys

import jax
import numpy as np
import optax
import pytest
from test_tabular import clinic, fit, installed, with_private

import fedjax_clip as fc
from experiments.config import registry, spec
from fedjax_clip import tasks
from fedjax_clip.data import statistics, tables

BOUNDS = "age:0:120;blood:0:200;sex:f,m;died:no,yes"


def without_last_clinic(path, changed):
    """The same table without the clinic ``c``, or with other patients there."""
    rows = path.read_text().splitlines()
    other = [row if ",c," not in row else "999,1e9,x,c,yes" for row in rows] if changed else None
    kept = other or [row for row in rows if ",c," not in row]
    (path.parent / "neighbour.csv").write_text("\n".join(kept) + "\n")
    return str(path.parent / "neighbour.csv")


def seen(task):
    """All that the clients a and b hold, and the model's shapes."""
    held = [task.data.client(c) for c in (0, 1)] + [task.evaluation["examples"].client(c) for c in (0, 1)]
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(task.init, jax.random.key(0)))
    return jax.tree.map(lambda x: x.tobytes(), held), shapes


@pytest.mark.parametrize("changed", [False, True])
def test_within_bounds_no_client_has_a_say_in_anothers_features(tmp_path, changed):
    """The attack: whether clinic c takes part, with whom, is read off the other clinics' features."""
    path = tmp_path / "clinic.csv"
    clinic(path)
    neighbour = without_last_clinic(path, changed)
    private = [seen(tasks.csv(p, "died", by="clinic", bounds=BOUNDS)) for p in (str(path), neighbour)]
    assert private[0] == private[1]
    exact = [seen(tasks.csv(p, "died", by="clinic")) for p in (str(path), neighbour)]
    assert exact[0] != exact[1]


def test_an_epsilon_is_refused_where_statistics_went_before_and_the_sentence_says_what_to_give(tmp_path):
    path = clinic(tmp_path / "clinic.csv")
    with pytest.raises(fc.InvalidInput) as error:
        tasks.refuse_fitted(tasks.csv(path, "died", by="clinic"))
    assert str(error.value) == (
        "An epsilon counts the training alone, and this task has computed quantiles, means and standard deviations from "
        "the clients' exact data: give what is publicly known of each column, as bounds='age:0:120;sex:f,m', or train "
        "without --delta."
    )
    tasks.refuse_fitted(spec.one(f"csv({path!r}, 'died', by='clinic', bounds={BOUNDS!r})", registry.TASKS, "--task"))


def test_the_number_of_classes_is_known_beforehand_or_is_no_secret(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=rng.normal(size=(40, 3)), y=np.arange(40) % 3)
    with pytest.raises(fc.InvalidInput, match="the number of classes from the clients' labels: give classes=10, say"):
        tasks.refuse_fitted(tasks.npz(tmp_path / "mine.npz"))
    task = tasks.npz(tmp_path / "mine.npz", classes=10)
    tasks.refuse_fitted(task)
    assert task.init(jax.random.key(0))["params"]["Dense_1"]["bias"].shape == (10,)
    with pytest.raises(fc.InvalidInput, match="Labels y run up to 2, and 2 classes from 0 to 1"):
        tasks.npz(tmp_path / "mine.npz", classes=2)
    tasks.refuse_fitted(tasks.digits())


def private(name):
    """The task in the form that an epsilon asks for, or ``None``."""
    tabular = "heart", "ames", "schools", "chem97", "insteval", "movielens"
    return registry.TASKS[name](public=True) if name in tabular else None


@pytest.mark.skipif(not installed(), reason='needs pip install "fedjax_clip[tabular]"')
@pytest.mark.parametrize(
    "name", ["heart", "ames", "schools", "chem97", "insteval", "movielens", "digits", "linear_regression", "two_nodes"]
)
def test_what_asks_the_clients_for_sums_says_so(name, monkeypatch):
    asked = []
    real = statistics.federated_sums
    for module in list(sys.modules.values()):
        if getattr(module, "federated_sums", None) is real:
            monkeypatch.setattr(module, "federated_sums", lambda *args: asked.append(name) or real(*args))
    task = registry.TASKS[name]()
    assert bool(task.fitted) == bool(asked)
    asked.clear()
    if (task := private(name)) is not None:
        tasks.refuse_fitted(task)
        assert not asked
    if name in ("heart", "ames", "schools", "chem97"):
        x, y = (np.concatenate([d.fields()[f] for d in (task.data, *task.evaluation.values())]) for f in "xy")
        assert np.abs(x).max() <= 1
        assert np.abs(y).max() <= 1
        within = x[(x != 0) & (x != 1) & (x != -1)]
        assert within.std() > 0.1  # bounds so wide that all values are alike would teach nothing


def test_a_user_has_no_say_in_the_others_ratings_once_their_bounds_are_known():
    rng = np.random.default_rng(0)
    user, item = np.repeat(np.arange(9), 8), np.tile(np.arange(8), 9)
    rating = rng.integers(1, 6, 72).astype(np.float32)
    other = np.where(user == 8, 1e9, rating)  # the last user says something else
    both = [tasks.ratings(user, item, r, rank=2, bounds=(1, 5)) for r in (rating, other)]
    for first, second in zip(*([d.data.client(c) for c in range(8)] for d in both)):
        assert all(first[field].tobytes() == second[field].tobytes() for field in ("x", "y", "share"))
    starts = [jax.tree.map(np.asarray, task.init(jax.random.key(0))) for task in both]
    jax.tree.map(np.testing.assert_array_equal, *starts)
    tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.5))
    scores = fit(both[0], tx, 3, with_private("user"), server_tx=optax.adam(0.05)).history[-1]
    assert {"eval/examples/rmse", "eval/examples/rmse_of_middle"} < scores.keys()
    assert "eval/examples/rmse_of_mean" not in scores


@pytest.mark.skipif(not installed(), reason='needs pip install "fedjax_clip[tabular]"')
def test_class_weights_from_all_hospitals_are_fitted_and_ones_own_are_not():
    with pytest.raises(fc.InvalidInput, match="the number of examples of each class: give balance='client'"):
        tasks.refuse_fitted(tasks.heart(public=True, balance="population"))
    tasks.refuse_fitted(tasks.heart(public=True, balance="client"))


def test_features_within_bounds_are_those_of_a_person_with_a_pencil(tmp_path):
    (tmp_path / "t.csv").write_text("age,sex,y\n0,f,-5\n30,m,0\n,x,5\nold,,50\ninf,f,\n-9,m,2.5\n1_0,f,1\n")
    table = tables.read_csv(tmp_path / "t.csv", words=None)
    x, names = tables.within(table, tables.read_bounds("age:0:120; sex:f, m"))
    assert names == ["age", "age=missing", "sex=f", "sex=m", "sex=missing", "sex=other"]
    assert x.tolist() == [
        [-1, 0, 1, 0, 0, 0],
        [-0.5, 0, 0, 1, 0, 0],
        [0, 1, 0, 0, 0, 1],
        [0, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 0],
        [-1, 0, 0, 1, 0, 0],
        [0, 1, 1, 0, 0, 0],
    ]
    with pytest.warns(UserWarning, match="1 of 7 rows are left out"):
        task = tasks.csv(tmp_path / "t.csv", "y", num_clients=2, bounds={"age": (0, 120), "y": (-10, 10)})
    y = np.concatenate([task.data.examples["y"], task.evaluation["examples"].examples["y"]])
    assert sorted(y.tolist()) == pytest.approx([-0.5, 0, 0.1, 0.25, 0.5, 1])
    assert task.data.examples["x"].shape[1] == 2


def test_a_table_within_bounds_is_learnt_as_well(tmp_path):
    task = tasks.csv(clinic(tmp_path / "clinic.csv"), "died", by="clinic", bounds=BOUNDS)
    row = fit(task, optax.sgd(1.0)).history[-1]
    assert row["eval/examples/accuracy"] > 0.8
    assert row["eval/examples/auroc"] > 0.9


BAD = {
    "age": "bounds: 'age' is neither a column's bounds, 'age:0:120', nor its words",
    "age:0:many": "bounds: 'age:0:many' is neither",
    "age:120:0": "bounds: 'age' runs from 120 to 0: its bounds must rise",
    "age:0:inf": "bounds: a bound of 'age' must be a number between",
    "age:0:nan": "bounds: a bound of 'age' must be a number between",
    "sex:f,f": "bounds: 'sex' needs two numbers",
    "": "bounds: they are empty",
    "age:0:120": "bounds: the target 'died' is missing: add 'died:no,yes'",
    "died:no,yes": "bounds: they name no column but 'died'",
    "age:0:120;died:no,yes,maybe": "the target 'died' has 3 words",
    "agee:0:120;died:no,yes": "no column 'agee'; there is 'age'",
    "age:0:120;died:alive,dead": "column 'died' is missing in every row",
}


@pytest.mark.parametrize("bounds", BAD)
def test_bounds_that_are_none_are_one_sentence(bounds, tmp_path):
    text = f"csv({clinic(tmp_path / 'clinic.csv')!r}, 'died', bounds={bounds!r})"
    with pytest.raises(fc.InvalidInput) as error:
        spec.one(text, registry.TASKS, "--task")
    assert BAD[bounds] in str(error.value)
    assert "\n" not in str(error.value)


def test_bounds_of_other_kinds_are_refused():
    for given, words in (
        (3, "bounds must be a dict or text such as 'age:0:120;sex:f,m', not int"),
        ({"age": 3}, "what is known of 'age' must be two numbers or all words, not int"),
        ({"age": (0, 1, 2)}, "'age' needs two numbers"),
        ({"age": (0, "1")}, "'age' needs two numbers"),
    ):
        with pytest.raises(fc.InvalidInput, match=words):
            tables.read_bounds(given)
