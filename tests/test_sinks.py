"""Sinks against the real trackers, offline: what they hold is what was trained, each round once."""

import json
import math
import pathlib
import struct
import time
import warnings

import pytest

from fedjax_clip import sinks
from fedjax_clip.core.types import InvalidInput

ROWS = [{"round": float(r), "loss": 1.0 / r, "uplink/0/threshold (max)": float(r), "clients": 5.0} for r in range(1, 6)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def events(directory):
    """``{(name, step): value}`` of TensorBoard's files, by tensorboardX's own protocol."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(pathlib.Path(directory).glob("events*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 16 + length
    return found


def test_tensorboard_holds_every_finite_value():
    rows = [*ROWS, {"round": 6.0, "loss": math.nan}]
    with sinks.tensorboard("events") as sink:
        for row in rows:
            sink(row)
    found = events("events")
    assert found["loss", 4] == 0.25
    assert ("loss", 6) not in found
    assert len(found) == 15


def test_several_sinks_get_every_row_and_are_closed():
    class Closable(list):
        closed = 0

        def __call__(self, row):
            self.append(row)

        def close(self):
            self.closed += 1

    one, other = Closable(), []
    with sinks.several(one, other.append, sinks.tensorboard("events")) as sink:
        for row in ROWS:
            sink(row)
    assert list(one) == other == ROWS
    assert one.closed == 1
    assert len(events("events")) == 15
    with pytest.raises(InvalidInput, match="A sink must be a function of a row"):
        sinks.several(3)


def test_a_round_is_sent_once():
    class Kept(sinks.Sink):
        def __init__(self):
            super().__init__()
            self.rows = []

        def write(self, round, row):
            self.rows.append((round, row))

    sink = Kept()
    for row in [*ROWS[:3], *ROWS[1:]]:
        sink(row)
    assert [round for round, _ in sink.rows] == [1, 2, 3, 4, 5]
    assert sink.rows[3][1] == {name: x for name, x in ROWS[3].items() if name != "round"}


def test_the_bar_counts_rounds(capsys):
    with sinks.progress(5) as sink:
        for row in ROWS:
            sink(row | {"seconds": 0.5})
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "5/5" in shown
    assert "loss=0.200" in shown
    assert "clients/s=10" in shown


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    import sys

    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InvalidInput, match=rf"needs {name}.*pip install 'fedjax_clip\[{name}\]'"):
            getattr(sinks, name)()


@pytest.fixture
def mlflow():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("mlflow")


@pytest.mark.filterwarnings("ignore")  # MLflow's own, of SQLAlchemy
def test_mlflow_holds_each_round_once_also_of_a_run_that_goes_on(mlflow):
    with sinks.mlflow("sqlite:///m.db", config={"client": "sgd(0.1)", "delta": None}) as sink:
        for row in ROWS[:3]:
            sink(row)
    client = mlflow.MlflowClient("sqlite:///m.db")
    assert client.get_run(sink.id).info.status == "FINISHED"
    with pytest.raises(KeyboardInterrupt), sinks.mlflow("sqlite:///m.db", id=sink.id) as again:
        for row in ROWS[1:]:  # resumed from round 1
            again(row)
        raise KeyboardInterrupt
    run = client.get_run(sink.id)
    assert run.info.status == "FAILED"
    assert run.data.params == {"client": "sgd(0.1)", "delta": "None"}
    assert [(m.step, m.value) for m in client.get_metric_history(sink.id, "loss")] == [
        (r, 1.0 / r) for r in range(1, 6)
    ]
    assert "uplink/0/threshold _max_" in run.data.metrics
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.filterwarnings("ignore")
def test_mlflow_refuses_a_store_in_one_sentence(mlflow):
    with pytest.raises(InvalidInput, match="mlflow: the store nonsense://x cannot be used") as refusal:
        sinks.mlflow("nonsense://x")(ROWS[0])
    assert "\n" not in str(refusal.value)


def records(path):
    """The records of a ``.wandb`` file: a log of LevelDB behind 7 bytes, whose pieces lie in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, found = path.read_bytes(), 7, b"", []
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(parts))
            parts = b""
    return found


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_holds_the_rows_and_nothing_of_the_machine(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with sinks.wandb("digits", name="first", directory="here", config={"client": "sgd(0.1)"}) as sink:
        for row in ROWS[:3]:
            sink(row)
    time.sleep(1.1)  # W&B names a directory by the second, and would write over the first
    with sinks.wandb("digits", directory="here", id=sink.id) as again:
        again.last = 3
        for row in ROWS:
            again(row)
    for _ in range(100):  # W&B's own process writes the last rows a moment after the end
        files = sorted(pathlib.Path("here/wandb").glob(f"offline-run-*-{sink.id}/run-{sink.id}.wandb"))
        found = [record for path in files for record in records(path)]
        if sum(record.WhichOneof("record_type") == "history" for record in found) == 5:
            break
        time.sleep(0.2)
    steps = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            assert record.history.step.num not in steps
            steps[record.history.step.num] = items["loss"]
    assert steps == {r: 1.0 / r for r in range(1, 6)}
    (run, *_) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_id) == ("digits", "first", sink.id)
    assert any(item.key == "client" for item in run.config.update)
    kinds = {record.WhichOneof("record_type") for record in found}
    assert not kinds & {"stats", "output", "output_raw", "environment", "files"}, kinds
    assert run.host == "-"


def test_wandb_knows_its_modes():
    with pytest.raises(InvalidInput, match="mode must be 'offline' or 'online', not 'disabled'"):
        sinks.wandb(mode="disabled")
