"""``python -m experiments.predict``: from a run directory and a new file to predictions."""

import csv
import functools

import pytest
from commands import assert_refused


@pytest.fixture
def cli(binaries):
    return functools.partial(binaries, "predict")


@pytest.fixture
def trained(binaries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"{20 + i % 50},{'fm'[i % 2]},{'abc'[i % 3]},{'yes' if i % 50 > 25 else 'no'}" for i in range(120)]
    (tmp_path / "train.csv").write_text("age,sex,clinic,died\n" + "\n".join(rows) + "\n")
    task = "--task=csv('train.csv', 'died', by='clinic')"
    code, _, err = binaries("run", task, "--rounds=2", "--client=sgd(1.0)", "--workdir=run")
    assert code == 0, err
    return tmp_path


def test_new_patients_are_predicted(cli, trained):
    (trained / "new.csv").write_text("patient,sex,age,died\n007,f,70,yes\n008,m,,no\n009,f,20,\n")
    code, out, _ = cli("run", "new.csv")
    assert code == 0
    assert "wrote predictions.csv: 3 rows" in out
    assert "not used by the model: patient\n" in out
    assert "of 2 rows whose died is known: accuracy 1, auroc 1" in out
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["patient"] for row in rows] == ["007", "008", "009"]
    assert [row["prediction"] for row in rows] == ["yes", "no", "no"]
    for row in rows:
        assert float(row["probability_no"]) + float(row["probability_yes"]) == pytest.approx(1)

    (trained / "bare.csv").write_text("sex,age\nf,70\n")
    code, out, _ = cli("run", "bare.csv", "--out=bare_predictions.csv")
    assert (trained / "bare_predictions.csv").read_text().startswith("row,prediction,")
    assert "known" not in out

    before = sorted(trained.rglob("*"))
    (trained / "bad.csv").write_text("sex,age,prediction\nf,70,1\n")
    refusals = {
        ("run", "new.csv"): "predictions.csv exists",
        ("run", "none.csv", "--out=o.csv"): "No such file",
        ("run", "--out=o.csv"): "Name a run directory and a file",
        ("run", "bad.csv", "--out=o.csv"): "'prediction'",
        ("run", "new.csv", "--out=no/o.csv"): "No such file",
        (".", "new.csv", "--out=o.csv"): "no model.json: name a run directory",
    }
    before = sorted(trained.rglob("*"))
    for arguments, said in refusals.items():
        assert_refused(cli(*arguments), trained, before, said)
