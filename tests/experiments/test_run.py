"""The binary as its user meets it: bad input, presets, run directories, kills and resumption."""

import errno
import fcntl
import functools
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import generated
import jax
import numpy as np
import pytest

import fedjax_clip as fc
from experiments.config import binary, problem, rundir
from fedjax_clip.core import files, tree
from fedjax_clip.training.checkpoint import Checkpoints

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def cli(binaries):
    return functools.partial(binaries, "run")


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    return tmp_path_factory.mktemp("one_run") / "here"


@pytest.fixture
def here(cli, one_run, tmp_path):
    """``here``, a copy of a run of three rounds."""
    if not one_run.exists():
        assert cli(*QUICK, f"--workdir={one_run}")[0] == 0
    return pathlib.Path(shutil.copytree(one_run, tmp_path / "here"))


QUICK = ("--task=linear_regression(num_clients=6)", "--rounds=3", "--cohort_size=3")


def saved(path, **arrays):
    np.savez(path, **arrays)
    return f"--task=npz({str(path)!r})"


def bad_files(tmp_path):
    x, y = np.ones((12, 2), np.float32), np.arange(12) % 2
    names = np.array(["a", "b", "b"])
    (tmp_path / "corrupt.npz").write_bytes(b"PK\x03\x04 this is no archive")
    good = tmp_path / "good.npz"
    np.savez(good, x=x, y=y)
    (tmp_path / "truncated.npz").write_bytes(good.read_bytes()[:200])
    (tmp_path / "file").write_text("")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    return {
        "an empty client": (saved(tmp_path / "a.npz", x=x, y=y, offsets=[0, 3, 3, 12]), "has no examples"),
        "duplicate names": (saved(tmp_path / "b.npz", x=x, y=y, offsets=[0, 2, 4, 12], names=names), "'b'"),
        "an empty data set": (saved(tmp_path / "c.npz", x=x[:0], y=y[:0]), "no examples"),
        "fields of different length": (saved(tmp_path / "d.npz", x=x, y=y[:5]), "x: 12, y: 5"),
        "labels that are text": (saved(tmp_path / "e.npz", x=x, y=np.array(list("ab" * 6))), "Labels y"),
        "labels that are fractions": (saved(tmp_path / "f.npz", x=x, y=y + 0.5), "Labels y"),
        "labels with gaps": (
            saved(tmp_path / "k.npz", x=x, y=np.where(y == 0, 10001, 90210)),
            "run up to 90210: number",
        ),
        "labels without end": (
            saved(tmp_path / "l.npz", x=x, y=np.uint64(2**32) + np.arange(12, dtype=np.uint64)),
            "run",
        ),
        "labels below zero": (saved(tmp_path / "m.npz", x=x, y=y - 1), "whole numbers from 0"),
        "no labels": (saved(tmp_path / "g.npz", x=x), "['y'] is missing"),
        "pickled objects": (saved(tmp_path / "h.npz", x=np.array([{}] * 12), y=y), "h.npz"),
        "inputs of no width": (saved(tmp_path / "width.npz", x=x[:, :0], y=y), "nothing to learn from"),
        "a corrupt file": (f"--task=npz({str(tmp_path / 'corrupt.npz')!r})", "corrupt.npz"),
        "a truncated file": (f"--task=npz({str(tmp_path / 'truncated.npz')!r})", "truncated.npz"),
        "an unknown client field": (f"--task=npz({str(good)!r}, by='hospital')", "hospital"),
        "more clients than examples": (f"--task=npz({str(good)!r}, num_clients=13)", "13"),
        "a negative Dirichlet parameter": (f"--task=npz({str(good)!r}, num_clients=2, alpha=-1.0)", "-1.0"),
        "inputs that are not finite": (
            saved(tmp_path / "i.npz", x=np.where(x > 0, np.nan, x), y=y),
            "example 0",
        ),
        "clients twice over": (
            saved(tmp_path / "j.npz", x=x, y=y, h=y)[:-1] + ", by='h', num_clients=3)",
            "name their own clients",
        ),
        "a run directory under a file": (f"--workdir={tmp_path / 'file' / 'run'}", "cannot be written"),
        "a run directory of something else": (f"--workdir={other}", "holds files but no run"),
    }


BAD_FLAGS = {
    "an unknown task": ("--task=digit", 'did you mean "digits"'),
    "an unknown algorithm": ("--algorithm=fedavgg", 'did you mean "fedavg"'),
    "an unknown sampler": ("--sampler=unifrom", 'did you mean "uniform"'),
    "an unknown argument": ("--algorithm=fedavg(keep_opt=True)", 'did you mean "keep_opt_state"'),
    "an unknown flag": ("--cohort_sizes=3", "cohort_size"),
    "a value that is no number": ("--rounds=many", "rounds"),
    "a fraction of a round": ("--rounds=2.5", "error: --rounds must be a whole number, not 2.5."),
    "a delta that is no number": ("--delta=tiny", "error: --delta must be a number, not tiny."),
    "no rounds": ("--rounds=0", "--rounds must be a whole number between 1 and 10000000, not 0"),
    "no evaluation": ("--eval_every=0", "--eval_every"),
    "a negative batch size": ("--batch_size=-1", "--batch_size"),
    "a negative seed": ("--seed=-1", "--seed"),
    "no clients": ("--cohort_size=0", "--cohort_size"),
    "a cohort larger than the population": ("--cohort_size=12", "more than the 11 training clients"),
    "no devices": ("--devices=0", "--devices"),
    "a negative clip": ("--client=clip_by_global_norm(-1.0)|sgd(0.1)", "positive number, not -1.0"),
    "a clip of zero": ("--client=clip_by_global_norm(0)|sgd(0.1)", "positive number, not 0"),
    "a NaN clip": ("--client=clip_by_global_norm(nan)|sgd(0.1)", "positive number, not nan"),
    "a clip of text": ("--client=clip_by_global_norm('1')|sgd(0.1)", "--client"),
    "a NaN clip of the update": ("--uplink=clip_by_global_norm(nan)", "--uplink"),
    "an algorithm without its threshold": ("--algorithm=episode", "missing a required argument: 'threshold'"),
    "an episode without a threshold": ("--algorithm=episode(0)", "positive number, not 0"),
    "a quantile over 1": ("--uplink=quantile_clip(0.1, 1.5)", "between 0 and 1, not 1.5"),
    "a percentile of text": ("--client=auto_clip('ten')|sgd(0.1)", "between 0 and 100, not 'ten'"),
    "a negative pull": ("--client=proximal(-1)|sgd(0.1)", "of at least 0, not -1"),
    "a history that nobody keeps": ("--client=sgd(0.1)|auto_clip(10, 0)", "between 1 and 1000000, not 0"),
    "a momentum over 1": ("--algorithm=mime(2.0)", "between 0 and 1, not 2.0"),
    "no regulariser": ("--algorithm=feddyn(0.0)", "positive number, not 0.0"),
    "no clients at once": ("--clients_per_chunk=0", "--clients_per_chunk must be a whole number between 1 and"),
    "a negative learning rate": ("--client=sgd(-0.1)", "learning rate must be a positive, finite number"),
    "an infinite learning rate": ("--server=sgd(inf)", "learning rate must be a positive, finite number"),
    "no optimiser": ("--client=", "--client: the chain needs an optimiser"),
    "a clip without an optimiser": ("--client=clip_by_global_norm(0.5)", "the chain needs an optimiser"),
    "no learning rate": ("--client=sgd(None)", "learning rate must be a positive, finite number, not None"),
    "a learning rate that is true": (
        "--client=sgd(True)",
        "learning rate must be a positive, finite number, not True",
    ),
    "a learning rate of text": ("--client=sgd('a')", "must be a number, not 'a'"),
    "a decay above one": ("--server=adam(0.01, b1=2)", "b1 must be a number of at least 0 and below 1"),
    "steps of words": ("--local_steps=many", 'unknown component "many" (valid: budget)'),
    "part of a batch": ("--batch_size=2.5", "--batch_size must be a whole number of at least 0, not 2.5"),
    "epochs of the algorithm": ("--algorithm=fedavg(local_epochs=2)", 'fedavg has no argument "local_epochs"'),
    "a run directory that cannot be": ("--workdir=/proc/nope", "--workdir: /proc/nope cannot be written"),
    "code": ("--client=__import__('os').system('touch owned')", "--client"),
    "code in an argument": ("--client=sgd(open('owned', 'w'))", "--client"),
    "no local epochs": ("--local_epochs=0", "--local_epochs must be a whole number"),
    "half a local step": ("--local_steps=0.5", "--local_steps must be a whole number of at least 1, not 0.5"),
    "a negative staleness": ("--algorithm=fedbuff(max_staleness=-1)", "whole number between 0 and 100000, not -1"),
    "a discount that grows": ("--algorithm=fedbuff(exponent=-1.0)", "exponent must be a number of at least 0"),
    "speeds that are none": (
        "--sampler=buffered(3, 4)",
        "speeds must be speeds such as fc.data.speeds.lognormal(), not int",
    ),
    "more at work than there are": (
        "--sampler=buffered(lognormal, 9)",
        "need a population of 16 clients at least, not 11",
    ),
    "a buffer that never fills": ("--sampler=buffered(lognormal, 7)", "7 clients at work cannot fill a buffer of 8"),
    "fewer asked than kept": (
        "--sampler=synchronous(lognormal, 3)",
        "select must be at least the cohort's size, 8, not 3",
    ),
    "a deadline that has passed": (
        "--sampler=synchronous(lognormal, deadline=0)",
        "deadline, in seconds, must be a positive number",
    ),
    "all drop out": (
        "--sampler=synchronous(lognormal, dropout=1.0)",
        "dropout, a probability, must be a number of at least 0 and below 1, not 1.0",
    ),
    "no time for a batch": ("--batch_size=budget(lognormal, 0, 3)", "Seconds a step must be a positive, finite number"),
    "a batch of words": ("--batch_size=many", 'unknown component "many"'),
    "no time for a step": (
        "--local_steps=budget(lognormal, 0, 3)",
        "Seconds a step must be a positive, finite number",
    ),
    "no speeds": ("--sampler=synchronous", "missing a required argument: 'speeds'"),
    "a window that never opens": ("--sampler=available(duty=0)", "--sampler"),
    "a hidden layer without units": ("--task=digits(hidden=(0,))", "hidden"),
    "all forms held out": ("--task=digits(held_out_forms=1.0)", "between 0 and 1"),
    "noise without a bound": ("--uplink=gaussian(1.0)", "put a clip"),
    "a clip of integers": (
        "--uplink=clip_by_global_norm(1.0)|integer_grid|clip_by_global_norm(1.0)",
        "move integer_grid, discrete_gaussian or skellam to the chain's end",
    ),
    "masks without a grid": ("--reducer=pairwise_masks", "integer_grid() last in the uplink"),
    "epsilon without noise": ("--delta=0.01", "no link of --uplink is noise on the sum"),
    "a target without delta": ("--target_epsilon=1", "needs one of discrete_gaussian(), gaussian(), skellam()"),
    "an attacker that there is not": ("--uplink=sign_flip((0, 99))", "names client 99, and there is none"),
    "a compressor that goes inside": ("--downlink=qsgd(8)", '"qsgd" goes inside of one of these: difference, model'),
    "noise without a number": ("--uplink=clip_by_global_norm(1.0)|gaussian()", "gaussian has no number: write"),
    "a number of 4000 digits": (f"--client=sgd({'1' * 4000})", "is too large: 2**63 is the limit"),
    "more rounds than there is memory for": (
        "--rounds=1000000000",
        "--rounds must be a whole number between 1 and 10000000",
    ),
    "more devices than XLA stands": ("--devices=300", "--devices must be a whole number between 1 and 128, not 300"),
    "more devices than there are": ("--devices=127", "--devices=127 is more than there are: "),
    "more rounds at once than there is memory for": ("--rounds_per_dispatch=1000000000", "between 1 and 10000"),
    "a batch of all there is": (
        "--batch_size=1000000000000",
        "--batch_size must be a whole number between 0 and 2147483647",
    ),
    "a window without end": (
        "--client=auto_clip(10, 1000000000)|sgd(0.1)",
        "window must be a whole number between 1 and",
    ),
    "a sketch of a terabyte": ("--uplink=count_sketch(5, 1000000000)", "are a sketch of more than 1 GiB"),
    "a plan of gigabytes": ("--local_steps=1000000000", "are too many to plan: lower local_epochs"),
    "a model of terabytes": ("--task=digits(hidden=(1000000, 1000000))", "GiB of parameters, and the machine"),
    "a layer without end": (
        "--task=digits(hidden=(1000000000,))",
        "a width, must be a whole number between 1 and 1048576",
    ),
    "past models without end": ("--algorithm=fedbuff(max_staleness=1000000000)", "between 0 and 100000"),
    "a file without end": ("--task=csv('/dev/zero', target='x')", "/dev/zero is no file"),
    "a file whose name is not UTF-8": ("--task=npz('\udcff.npz')", "has bytes that are not UTF-8"),
    "a directory with too long a name": (f"--workdir={'x' * 300}", "is too long for a path"),
    "a directory with too long a path": (f"--workdir={'x/' * 2000}", "is too long for a path"),
    "a home that there is not": ("--workdir=~nobody-of-this-name/x", "there is no such home directory"),
    "two tasks": ("--task=digits|digits", "--task"),
    "a file that is not there": ("--task=npz('nowhere.npz')", "nowhere.npz"),
    "an unknown TFDS data set": ("--task=tfds('no_such_data_set')", "no_such_data_set"),
    "a flagfile that is not there": ("--flagfile=nowhere.flags", "nowhere.flags"),
    "a stray argument": ("digits", "unexpected argument 'digits'"),
}


def assert_refused(outcome, directory, before, *words):
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert err.count("error:") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_one_sentence_and_exit_code_2(cli, case, tmp_path):
    flag, words = BAD_FLAGS[case]
    assert_refused(cli(flag), tmp_path, [], words)


def test_bad_files_are_one_sentence_and_exit_code_2(cli, tmp_path):
    for flag, words in bad_files(tmp_path).values():
        before = sorted(tmp_path.rglob("*"))
        quick = () if flag.startswith("--task") else QUICK
        assert_refused(cli(flag, *quick), tmp_path, before, words)


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


def test_two_parameters_of_one_name_are_refused_before_training():
    with pytest.raises(fc.InvalidInput, match="Two arrays are called 'a/b', since a key has '/' in it: rename one"):
        tree.flatten_with_names({"a": {"b": np.zeros(2)}, "a/b": np.zeros(2)})


def test_parameters_may_be_called_as_the_arguments_of_savez(tmp_path):
    files.write_npz(tmp_path / "x.npz", {"file": np.ones(2), "allow_pickle": np.zeros(1)})
    with np.load(tmp_path / "x.npz") as arrays:
        assert {name: x.tolist() for name, x in arrays.items()} == {"file": [1, 1], "allow_pickle": [0]}


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


def test_what_fits_in_no_memory_is_one_sentence(cli, tmp_path, monkeypatch):
    for error in (
        MemoryError("Unable to allocate 7 TiB"),
        OverflowError("too large"),
        RuntimeError("RESOURCE_EXHAUSTED"),
    ):
        monkeypatch.setattr(problem, "initial", mock.Mock(side_effect=error))
        assert_refused(cli(*QUICK), tmp_path, [], "this needs more memory than there is, or a number is too large")


def test_a_home_directory_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rundir.RunDirectory("~/here", {}).path == tmp_path / "here"


def test_a_file_is_replaced_whole_and_a_link_by_itself(tmp_path):
    thesis, link = tmp_path / "thesis", tmp_path / "link"
    thesis.write_text("mine")
    link.symlink_to(thesis)
    files.write(link, "new")
    assert (thesis.read_text(), link.read_text(), link.is_symlink()) == ("mine", "new", False)
    with pytest.raises(ZeroDivisionError), files.replacing(link) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert link.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "thesis"}
    link.unlink()
    link.symlink_to(thesis)
    with pytest.raises(OSError, match="symbolic link"):
        rundir.appending(link)


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


def test_who_waited_for_a_lock_that_is_removed_takes_the_new_one(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(file, operation):
        calls.append(file)
        if len(calls) == 1:  # another run ended in between
            (tmp_path / "here/.lock").unlink()
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with rundir.RunDirectory(tmp_path / "here", {}):
        assert (tmp_path / "here/.lock").exists()
        with pytest.raises(fc.InvalidInput, match="in use by another run"), rundir.RunDirectory(tmp_path / "here", {}):
            pass
    assert len(calls) == 3
    assert not (tmp_path / "here").exists()


def test_a_flag_file_holds_flags_of_this_program_only(cli, tmp_path):
    target = tmp_path / "thesis"
    target.write_text("mine")
    (tmp_path / "b.flags").write_text("# one within another\n\n  --flagfile=a.flags\n")
    lines = ["--run_with_profiling", f"--profile_file={target}", "--pdb_post_mortem", f"-log_dir={tmp_path}"]
    for line in [*lines, "--norun_with_profiling", "--undefok=rouds", "--helpfull", "--helpxml", "--only_check_args"]:
        (tmp_path / "a.flags").write_text(f"--rounds=2\n{line}\n")
        before = sorted(tmp_path.rglob("*"))
        name = line.lstrip("-").removeprefix("no").split("=")[0]
        for argument in ("--flagfile=a.flags", "--flagfile=b.flags", line):
            assert_refused(cli(argument), tmp_path, before, f"--{name} is no flag of this program")
    for content, words in (
        (b"\x80\x00\xff", "--flagfile=a.flags is not text"),
        (b"\x80\xff", r"unexpected argument '\udc80\udcff'"),
        (b"--flagfile=/dev/zero", "--flagfile=/dev/zero is no file"),
        (b"--flagfile=b.flags", "--flagfile=b.flags names itself, by way of b.flags and a.flags"),
        (b"--flagfile=nowhere", "--flagfile=nowhere cannot be read: No such file or directory"),
        (b"#" * 2**21, "has 2,097,152 bytes: that is no list of flags"),
    ):
        (tmp_path / "a.flags").write_bytes(content)
        assert_refused(cli("--flagfile=b.flags"), tmp_path, before, words)
    assert_refused(cli("--flagfile", "/dev/zero"), tmp_path, before, "--flagfile=/dev/zero is no file")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(cli("--flagfile=pipe"), tmp_path, sorted(tmp_path.rglob("*")), "--flagfile=pipe is no file")
    assert target.read_text() == "mine"


def config():
    return json.loads(pathlib.Path("here/config.json").read_text())["config"]


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


def files_below(directory):
    """What each file holds, but for the names of devices and the time."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_clients_that_diverge_are_said_to_be_dropped(cli):
    code, out, _ = cli(*QUICK, "--client=sgd(1e30)")
    assert code == 0
    assert "rounds: their updates were not finite" in out


def test_a_corrupt_checkpoint_is_named_and_nothing_is_lost(cli, here, tmp_path):
    for path in (tmp_path / "here/checkpoints/3").rglob("*"):
        if path.is_file() and path.name != "commit_success.txt":
            path.write_bytes(b"garbage")
    before = sorted(tmp_path.rglob("*"))
    assert_refused(cli(*QUICK, "--workdir=here", "--rounds=5"), tmp_path, before, "checkpoints/3")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):

    state = fc.extend.State({"w": np.zeros(3, np.float32)}, (), {})
    Checkpoints(tmp_path).save(1, state)
    assert Checkpoints(tmp_path).restore(state)[0] == 1
    for other in ({"w": np.zeros(4, np.float32)}, {"v": np.zeros(3, np.float32)}, {"w": np.zeros(3, np.int32)}):
        with pytest.raises(fc.InvalidInput, match="another model"):
            Checkpoints(tmp_path).restore(fc.extend.State(other, (), {}))


def test_devices_wait_for_each_other_longer_than_xla_would_have_them(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one_of_mine=1")
    monkeypatch.setattr(jax, "local_devices", list)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    binary.configure_jax(1)
    patient, _, mine = os.environ["XLA_FLAGS"].rpartition(" ")
    assert "--xla_cpu_collective_call_terminate_timeout_seconds=86400" in patient
    assert mine == "--xla_one_of_mine=1"


def test_what_the_environment_tells_jax_stands(monkeypatch, tmp_path):
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.setattr(jax, "local_devices", list)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    binary.configure_jax(None)
    assert not {"jax_compilation_cache_dir", "jax_num_cpu_devices"} & told.keys()
    binary.configure_jax(2)
    assert told["jax_num_cpu_devices"] == 2
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("FEDJAX_CLIP_CACHE", str(tmp_path))
    binary.configure_jax(None)
    assert told["jax_compilation_cache_dir"] == str(tmp_path / "xla")


def test_a_platform_without_a_device_is_answered_with_a_sentence(monkeypatch):
    def nothing():
        raise AssertionError

    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(jax, "local_devices", nothing)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(fc.InvalidInput, match="no device for JAX_PLATFORMS='cuda': leave it unset"):
        binary.configure_jax(None)


def test_help_fits_a_person(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert out.index("--task=digits ") < out.index("--sampler=uniform ") < out.index("Components:")
    assert "clip_by_global_norm(max_norm)" in out


PRESETS = sorted((REPOSITORY / "experiments/presets").glob("*.flags"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_preset_opens_with_its_command_time_and_result_and_runs(cli, preset, tmp_path, monkeypatch):
    generated.install(tmp_path / "generated", monkeypatch)
    head = [line for line in preset.read_text().splitlines() if line.startswith("#")]
    assert head[0] == f"# python -m experiments.run --flagfile=experiments/presets/{preset.name}"
    assert head[1].startswith("# Time: ")
    assert "Ends at: " in head[1]
    if preset.stem == "shakespeare_transformer":  # run with shakespeare_lora, which goes on from its model
        return
    if preset.stem == "shakespeare_lora":
        base = preset.with_name("shakespeare_transformer.flags")
        assert cli(f"--flagfile={base}", "--rounds=1", "--cohort_size=2")[0] == 0
    code, out, _ = cli(f"--flagfile={preset}", "--rounds=2", "--cohort_size=2")
    assert code == 0
    assert "2 rounds" in out


def test_a_target_epsilon_is_met_in_the_last_row(cli, tmp_path):
    private = ("--uplink=quantile_clip(0.5, bits_noise=2.0)|gaussian()", "--delta=0.01", "--sampler=poisson")
    code, out, _ = cli(*QUICK, *private, "--target_epsilon=5", "--workdir=run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert code == 0
    assert " at delta 0.01, of this run" in out
    spent = [row["epsilon"] for row in rows]
    assert spent == sorted(spent)
    assert 4.99 < spent[-1] <= 5
    assert "ended early" not in out

    noise = ("--uplink=clip_by_global_norm(0.5)|gaussian(4.0)", "--delta=0.01", "--sampler=poisson")
    code, out, _ = cli(*QUICK, *noise, "--target_epsilon=0.28", "--workdir=short")
    assert code == 0
    assert "ended early        after 2 of 3 rounds: one more round would pass --target_epsilon=0.28" in out


def test_only_what_is_sent_is_accounted_for_on_a_grid(cli, tmp_path):
    """On a coarse grid epsilon depends on how many parameters there are; the slope stays with its client."""
    private = ("--algorithm=partially_private('kernel')", "--uplink=clip_by_global_norm(1.0)|skellam(0.4, 8)")
    code, out, err = cli(
        *QUICK, *private, "--client=sgd(0.1)|clip_by_global_norm(1.0)", "--delta=0.01", "--workdir=run"
    )
    assert code == 0
    assert "who sees the sums of all rounds and no message, nor who took part" in out
    assert "--client: clip_by_global_norm stands behind the optimiser and bounds its steps" in err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.skellam(0.4, 8))
    reducer = fc.reduce.modular_sum(3)
    one, two = (fc.privacy.distributed(link, np.zeros(size), reducer) for size in (1, 2))
    sampler = fc.data.sampling.uniform(3)
    assert rows[0]["epsilon"] == pytest.approx(fc.privacy.epsilon(one, sampler, 6, 1, 0.01))
    assert rows[0]["epsilon"] != pytest.approx(fc.privacy.epsilon(two, sampler, 6, 1, 0.01), rel=1e-4)


def test_linear_regression_ends_near_two_and_one(cli):
    code, _, _ = cli(f"--flagfile={REPOSITORY}/experiments/presets/linear_regression.flags", "--workdir=here")
    assert code == 0
    with np.load("here/params.npz") as params:
        np.testing.assert_allclose(params["params/Dense_0/kernel"], [[2]], atol=0.05)
        np.testing.assert_allclose(params["params/Dense_0/bias"], [1], atol=0.05)


def test_two_nodes_meet_at_their_joint_optimum(cli):
    assert cli(f"--flagfile={REPOSITORY}/experiments/presets/two_nodes.flags", "--workdir=here")[0] == 0
    with np.load("here/params.npz") as params:
        np.testing.assert_allclose(params["w"], 1, atol=1e-3)


def test_the_default_run_reaches_its_accuracies(cli):
    assert cli("--workdir=here")[0] == 0
    last = rundir.RunDirectory("here", config()).rows()[-1]
    assert last["eval/examples/accuracy"] > 0.95
    assert last["eval/clients/accuracy"] > 0.90


def test_a_tfds_data_set_with_natural_clients_trains_without_a_network(cli, tmp_path, monkeypatch):
    from digits_tfds import build_digits_tfds

    monkeypatch.setenv("FEDJAX_CLIP_CACHE", str(tmp_path / "cache"))
    build_digits_tfds(tmp_path / "tfds")
    task = f"--task=tfds('fedjax_digits', data_dir={str(tmp_path / 'tfds')!r}, by='client_id')"
    code, out, err = cli(task, "--rounds=2", "--workdir=here")
    assert code == 0, err
    assert "11 clients" in err
    assert "held-out clients" in out


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


def test_the_module_runs_as_the_readme_writes_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "--task=digit"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --task")
    assert not list(tmp_path.iterdir())
