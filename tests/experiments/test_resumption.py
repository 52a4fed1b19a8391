"""Run directories: what a run leaves, who may go on with it, damage, kills and Control-C."""

import errno
import io
import json
import pathlib
import random
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
from commands import QUICK, assert_refused, files_below, saved

from experiments.config import rundir


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    return tmp_path_factory.mktemp("one_run") / "here"


@pytest.fixture
def here(cli, one_run, tmp_path):
    """``here``, a copy of a run of three rounds."""
    if not one_run.exists():
        assert cli(*QUICK, f"--workdir={one_run}")[0] == 0
    return pathlib.Path(shutil.copytree(one_run, tmp_path / "here"))


def test_a_run_leaves_what_the_readme_says_and_the_same_command_adds_nothing(cli, tmp_path, unrendered, monkeypatch):
    monkeypatch.setattr(rundir, "save_picture", unrendered)
    code, out, err = cli(*QUICK, "--workdir=here")
    assert code == 0
    assert "held-out examples" in out
    assert "6 clients" in err
    here = tmp_path / "here"
    found = {p.name for p in here.iterdir()}
    assert found == {
        *("checkpoints", "clients.npz", "config.json", "clipping.png", "curves.png", "metrics.jsonl", "params.npz"),
        *("report.html", "tensorboard"),
    }
    assert all((here / name).stat().st_size > 10_000 for name in ("clipping.png", "curves.png"))
    rows = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert "eval/examples/loss" in rows[-1]
    with np.load(here / "params.npz") as params:
        assert set(params.files) == {"params/Dense_0/kernel", "params/Dense_0/bias"}
    before = (here / "metrics.jsonl").read_bytes()
    code, out, _ = cli(*QUICK, "--workdir=here")
    assert code == 0
    assert "Complete already (3 rounds)" in out
    assert (here / "metrics.jsonl").read_bytes() == before


def test_more_rounds_go_on_and_another_configuration_is_refused(cli, here, tmp_path):
    code, _, err = cli(*QUICK, "--workdir=here", "--rounds=5")
    assert code == 0
    assert "here was to have 3 rounds, and has 3: its pictures, its page and its params.npz will be those of" in err
    assert [row["round"] for row in rundir.read_rows(here)] == [1, 2, 3, 4, 5]
    assert rundir.read_config(here)["rounds"] == 5
    before, whole = sorted(tmp_path.rglob("*")), files_below(tmp_path)
    for flag, words in (
        ("--seed=1", "holds a run with --seed=0, not 1"),
        ("--rounds=4", "--rounds=4 is less than the 5 rounds that here has"),
        ("--rounds=99999999999999999999", "--rounds must be a whole number between 1 and 10000000"),
    ):
        assert_refused(cli(*QUICK, "--workdir=here", flag), tmp_path, before, words)
    unsaid = cli(QUICK[0], QUICK[2], "--workdir=here")
    assert_refused(unsaid, tmp_path, before, "a run of 5 rounds: write --rounds=5 for that one, or --rounds=150 to")
    assert files_below(tmp_path) == whole


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rundir, "appending", lambda path: Full())
        code, _, err = cli(*QUICK, "--workdir=here")
    assert (code, err.count("error: --workdir: here cannot be written: No space left on device.")) == (2, 1)
    assert cli(*QUICK, "--workdir=here")[0] == 0
    assert len(rundir.read_rows(tmp_path / "here")) == 3


DAMAGE = {
    "deleted": (lambda text: None, "metrics.jsonl lacks the rows of rounds 1 to 3, which are done"),
    "cut": (lambda text: text[: len(text) // 2], "lacks the rows of rounds 2 to 3"),
    "with a hole": (lambda text: "".join(text.splitlines(keepends=True)[::2]), "line 2 is not the row of round 2"),
    "with another name": (lambda text: text.replace('"round"', '"rouod"', 1), "line 1 is not the row of round 1"),
    "of no rows": (lambda text: "[1]\n" + text, "line 1 is not the row"),
}


def test_a_damaged_history_is_said_and_not_lost(cli, here, tmp_path):
    file = here / "metrics.jsonl"
    text = file.read_text()
    for spoil, words in DAMAGE.values():
        file.unlink()
        if spoil(text) is not None:
            file.write_text(spoil(text))
        before, whole = sorted(tmp_path.rglob("*")), files_below(tmp_path)
        assert_refused(cli(*QUICK, "--workdir=here", "--rounds=5"), tmp_path, before, words)
        assert files_below(tmp_path) == whole
        file.write_text(text)


def test_links_in_a_run_directory_are_refused_and_files_of_others_stay(cli, here, tmp_path):
    (tmp_path / "thesis").write_text("mine")
    for name in ("curves.png", ".lock", "metrics.tmp", "tensorboard/events", "report.html", "config.json"):
        link, kept = here / name, tmp_path / "kept"
        if link.exists():
            link.rename(kept)
        link.symlink_to(tmp_path / "thesis")
        before = sorted(tmp_path.rglob("*"))
        words = f"here/{name} is a link, and a run directory holds files of its own"
        assert_refused(cli(*QUICK, "--workdir=here", "--rounds=5"), tmp_path, before, words)
        link.unlink()
        if kept.exists():
            kept.rename(link)
    assert (tmp_path / "thesis").read_text() == "mine"


def test_a_directory_in_use_is_refused_and_a_failed_start_leaves_none(cli, tmp_path):
    with rundir.RunDirectory(tmp_path / "here", {}):
        code, _, err = cli(*QUICK, "--workdir=here")
        assert (code, err.count("in use by another run")) == (2, 1)
    assert not (tmp_path / "here").exists()


def test_replaced_data_are_not_trained_on_under_the_old_name(cli, tmp_path):
    x, y = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2
    task = saved(tmp_path / "mine.npz", x=x, y=y, note=np.array(["text"] * 40))
    assert cli(task, "--rounds=2", "--workdir=here")[0] == 0
    told = {False: "evaluated on other held-out data", True: "is of a run on other data: the values of field 'y' have"}
    found = set()
    for i in range(8):
        saved(tmp_path / "mine.npz", x=x, y=np.where(np.arange(40) == i, 1 - y, y))
        before = files_below(tmp_path)
        code, _, err = cli(task, "--rounds=3", "--workdir=here")
        assert code == 2
        found.add(next(trained for trained, words in told.items() if words in err))
        assert files_below(tmp_path) == before
    assert found == {False, True}


def test_a_corrupt_checkpoint_is_named_and_nothing_is_lost(cli, here, tmp_path):
    for path in (tmp_path / "here/checkpoints/3").rglob("*"):
        if path.is_file() and path.name != "commit_success.txt":
            path.write_bytes(b"garbage")
    before = sorted(tmp_path.rglob("*"))
    assert_refused(cli(*QUICK, "--workdir=here", "--rounds=5"), tmp_path, before, "checkpoints/3")


ALONE = "--devices=1"  # as in this process


def test_killed_twice_it_ends_with_the_same_bits(kills, cli, tmp_path):
    assert cli(*kills.FLAGS, ALONE, f"--workdir={tmp_path / 'undisturbed'}")[0] == 0
    rng = random.Random(1)  # which kills after 5 rows and after 29
    for _ in range(2):
        kills.kill(tmp_path / "killed", rng, ALONE)
    kills.finish(tmp_path / "killed", ALONE)
    assert kills.outcome(tmp_path / "killed") == kills.outcome(tmp_path / "undisturbed")


def test_control_c_saves_and_says_how_to_go_on(kills, cli, tmp_path):
    process = kills.start(tmp_path / "run", ALONE)
    while kills.count_rows(tmp_path / "run") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    if process.returncode != 0:  # 0 if it was done before the signal came
        assert process.returncode == 128 + signal.SIGINT
        assert "the same command goes on from there" in out
        assert "Traceback" not in err
    assert cli(*kills.FLAGS, ALONE, f"--workdir={tmp_path / 'run'}")[0] == 0
    assert [row["round"] for row in kills.outcome(tmp_path / "run")[1]] == list(range(1, kills.ROUNDS + 1))
