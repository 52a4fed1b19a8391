"""``--sinks``: rows reach each tracker once, whatever stops the run, and only what a private run may publish."""

import json
import sys

import pytest
from commands import QUICK

MODULE = """
import json, pathlib

def to_file(path="rows.jsonl", fails_at=0):
    def sink(row):
        if row["round"] == fails_at:
            raise ConnectionError("no answer")
        with open(path, "a") as file:
            file.write(json.dumps(row) + chr(10))
    return sink
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_sinks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "--import=my_sinks"
    sys.modules.pop("my_sinks", None)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sink_gets_the_rows_of_the_run_directory_once(own, cli, tmp_path):
    flags = (*QUICK, "--workdir=run", own)
    assert cli(*flags)[0] == 0  # without a sink
    assert cli(*flags, "--sinks=my_sinks.to_file()")[0] == 0  # complete: it gets all rows afterwards
    assert [row["round"] for row in rows(tmp_path / "rows.jsonl")] == [1, 2, 3]
    assert cli(*flags, "--sinks=my_sinks.to_file()")[0] == 0
    code, _, err = cli(*flags, "--sinks=my_sinks.to_file()|my_sinks.to_file('other.jsonl')", "--rounds=5")
    assert code == 0, err
    assert [row["round"] for row in rows(tmp_path / "rows.jsonl")] == [1, 2, 3, 4, 5]
    assert rows(tmp_path / "other.jsonl") == rows(tmp_path / "run/metrics.jsonl")


def test_rows_past_the_checkpoint_of_a_killed_run_are_not_sent_again(own, cli, tmp_path):
    flags = (*QUICK, "--workdir=run", own, "--sinks=my_sinks.to_file()")
    assert cli(*flags, "--checkpoint_every=2")[0] == 0
    import shutil

    for path in (tmp_path / "run/checkpoints").iterdir():  # as if the last checkpoint had not been reached
        if path.name == "3":
            shutil.rmtree(path)
    (tmp_path / "run/params.npz").unlink()
    code, _, err = cli(*flags, "--rounds=4")
    assert code == 0, err
    assert [row["round"] for row in rows(tmp_path / "rows.jsonl")] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:--sinks")
def test_a_sink_that_fails_on_the_way_ends_nothing(own, cli, tmp_path):
    flags = (*QUICK, "--workdir=run", own)
    code, _, err = cli(*flags, "--sinks=my_sinks.to_file(fails_at=2)")
    assert code == 0, err
    assert len(rows(tmp_path / "run/metrics.jsonl")) == 3
    assert [row["round"] for row in rows(tmp_path / "rows.jsonl")] == [1]
    assert [kept["last"] for kept in json.loads((tmp_path / "run/sinks.json").read_text()).values()] == [1]


def test_a_private_run_sends_what_it_publishes_and_not_before_its_end(own, cli, tmp_path):
    private = ("--sampler=poisson", "--delta=1e-3", "--uplink=clip_by_global_norm(0.5)|gaussian(2.0)")
    code, _, err = cli(*QUICK, *private, "--workdir=run", own, "--sinks=my_sinks.to_file()|tensorboard('tb')")
    assert code == 0, err
    sent = rows(tmp_path / "rows.jsonl")
    assert sent == rows(tmp_path / "run/metrics.jsonl")
    assert "epsilon" in sent[0]
    assert not {"seconds", "clients", "loss"} & set(sent[0])


def test_what_names_no_sink_is_refused(own, cli, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for text, words in (
        ("wandbb('x')", 'unknown component "wandbb"'),
        ("my_sinks.to_file()|my_sinks.to_file()", "is there twice"),
        ("json.dumps('x')", "add --import=json"),
        ("tensorboard('a', config=3)", 'has no argument "config"'),
    ):
        code, _, err = cli(*QUICK, own, f"--sinks={text}")
        assert code == 2
        assert words in err
        assert "Traceback" not in err
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_one_run_for_a_run_directory(cli, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    flags = (*QUICK, "--workdir=run", "--sinks=mlflow('sqlite:///m.db', 'lines')")
    assert cli(*flags)[0] == 0
    assert cli(*flags, "--rounds=5")[0] == 0
    client = mlflow.MlflowClient("sqlite:///m.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lines").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["client"].startswith("clip_by_global_norm")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5]
