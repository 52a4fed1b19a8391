"""Several processes on one machine: how they are launched, stopped and ended, and that they train as one would."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import QUICK, REPOSITORY

from experiments import launch
from experiments.config import distributed, rundir
from fedjax_clip.core.types import InvalidInput

PROMPT = 120  # seconds in which any of these processes must end


def launched(*command, processes=2, **options):
    """A launch that has begun."""
    arguments = [sys.executable, "-m", "experiments.launch", f"--processes={processes}", "--devices=1", "--", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True, **options)


def ended(process):
    """``(exit code, stdout, stderr)``, once it has ended."""
    try:
        out, err = process.communicate(timeout=PROMPT)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate(timeout=PROMPT)
        raise
    return process.returncode, out, err


def program(text):
    """A command whose number among the processes is ``me``."""
    head = "import os, signal, sys, time; me = int(os.environ['OMPI_COMM_WORLD_RANK']); "
    return sys.executable, "-c", head + text


def test_process_0_has_the_terminal_and_the_lines_of_others_their_number():
    code, out, err = ended(launched(*program("os.write(1, b'here %d\\n' % me); os.write(2, b'there\\n')"), processes=3))
    assert code == 0
    assert sorted(out.splitlines()) == ["[1] here 1", "[2] here 2", "here 0"]
    assert sorted(err.splitlines()) == ["[1] there", "[2] there", "there"]


@pytest.mark.parametrize(
    ("fate", "code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "Process 1 of 2 ended by SIGKILL, and so all were ended."),
        ("sys.exit(3)", 3, "Process 1 of 2 ended by exit code 3, and so all were ended."),
    ],
)
def test_when_one_fails_the_others_are_ended(monkeypatch, capfd, fate, code, said):
    monkeypatch.setattr(launch, "GRACE", 0.2)
    begun = time.monotonic()
    assert launch.launch(program(f"time.sleep(99 * (me == 0)); {fate}"), 2) == code
    assert time.monotonic() - begun < 30
    assert capfd.readouterr().err.splitlines() == [said]


def test_processes_that_fail_alike_have_said_so_themselves(capfd):
    assert launch.launch(program("sys.exit(2)"), 2) == 2
    assert capfd.readouterr() == ("", "")


def test_a_signal_goes_to_all():
    waits = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); os.write(1, b'ready\\n'); time.sleep(99)"
    process = launched(*program(waits))
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[1] ready\n", "ready\n"]
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: --processes"),
        (["--processes=0", "--", "true"], "--processes: give a whole number between 1 and 256, not 0."),
        (["--processes=2", "--devices=x", "true"], "--devices: give a whole number between 1 and 128, not x."),
        (["--processes=2", "--"], "give the command that each process runs after --"),
        (["--processes=2", "--", "no-such-command"], "no-such-command cannot be started: No such file or directory."),
    ],
)
def test_wrong_arguments_are_one_sentence(capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        sys.exit(launch.main(arguments))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1


def test_a_binary_is_told_to_join_the_others_and_a_slurm_allocation_is_not_asked(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    told = launch.environment("127.0.0.1:5", 4, 3, 2)
    assert (told["JAX_NUM_CPU_DEVICES"], told["JAX_LOCAL_DEVICE_IDS"]) == ("2", "6,7")
    assert "SLURM_JOB_ID" not in told
    binary = ["python", "-m", "experiments.run", "--rounds=3"]
    assert launch._joined(binary) == [*binary, "--distributed=auto"]
    assert launch._joined([*binary, "--distributed=a:1,2,0"]) == [*binary, "--distributed=a:1,2,0"]
    assert launch._joined(["python", "mine.py"]) == ["python", "mine.py"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("4", "--distributed=4 is not understood: write auto, or ADDRESS:PORT,PROCESSES,NUMBER such as"),
        ("host:0,2,1", "is not understood"),
        ("", "--distributed= is not understood"),  # as of a variable that is not set
        ("host:1,0,0", "the number of processes must be 1 or more"),
        ("host:1,2,2", "of 2 processes there is no number 2: they count from 0"),
        ("auto", "nothing here started several processes, neither Slurm nor Open MPI, Kubernetes, a Cloud TPU"),
    ],
)
def test_a_wrong_flag_is_refused_by_the_binary(value, words):
    command = [sys.executable, "-m", "experiments.run", f"--distributed={value}"]
    if value != "auto":  # the others are refused before JAX is asked
        with pytest.raises(InvalidInput, match=words):
            distributed.join(value)
        return
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PROMPT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr


def test_a_port_in_use_and_idle_gpus_are_refused(monkeypatch):
    with launch.socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(InvalidInput, match=r"this port cannot be used here \(Address already in use\)"):
            distributed.join(f"127.0.0.1:{taken.getsockname()[1]},2,0")
    step = {"SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "2"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    words = (
        "2 GPUs and 1 of the tasks, and JAX gives each task one GPU: ask srun for --ntasks-per-node=2, or set JAX_LOCAL"
    )
    with pytest.raises(InvalidInput, match=words):
        distributed.join("auto")


RUN = (*QUICK[:1], "--cohort_size=4", "--checkpoint_every=5", "--eval_every=10", "--algorithm=scaffold")


def test_sigterm_to_one_stops_all_and_the_same_command_ends_as_one_process_does(cli, tmp_path):
    here, binary = tmp_path / "here", (sys.executable, "-m", "experiments.run")
    flags = (*RUN, "--rounds=100", "--rounds_per_dispatch=1")
    process = launched(*binary, *flags, f"--workdir={here}")
    while not (here / "metrics.jsonl").exists():
        assert process.poll() is None, ended(process)
        time.sleep(0.05)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    code, out, _ = ended(process)
    rows = rundir.read_rows(here)
    assert code == 143
    assert out == f"Stopped after round {len(rows)} of 100; the same command goes on from there.\n"
    assert str(len(rows)) in os.listdir(here / "checkpoints")
    assert not (here / ".lock").exists()

    code, out, err = ended(launched(*binary, *flags, f"--workdir={here}"))
    assert code == 0, err
    assert "held-out examples" in out
    assert cli(*flags, f"--workdir={tmp_path / 'alone'}")[0] == 0
    assert [row["round"] for row in rundir.read_rows(here)] == list(range(1, 101))
    with np.load(here / "params.npz") as several, np.load(tmp_path / "alone/params.npz") as one:
        for name in one.files:
            np.testing.assert_allclose(several[name], one[name], rtol=0, atol=1e-6)


def test_several_processes_go_on_from_the_run_of_one(cli, tmp_path):
    assert cli(*RUN, "--rounds=5", f"--workdir={tmp_path / 'first'}")[0] == 0
    more = (*RUN, "--rounds=8", f"--init={tmp_path / 'first'}")
    code, _, err = ended(launched(sys.executable, "-m", "experiments.run", *more, f"--workdir={tmp_path / 'several'}"))
    assert code == 0, err
    assert err.count("--init: goes on after round 5") == 1
    assert cli(*more, f"--workdir={tmp_path / 'alone'}")[0] == 0
    assert [row["round"] for row in rundir.read_rows(tmp_path / "several")] == list(range(1, 9))
    with np.load(tmp_path / "several/params.npz") as several, np.load(tmp_path / "alone/params.npz") as one:
        for name in one.files:
            np.testing.assert_allclose(several[name], one[name], rtol=0, atol=1e-6)


def test_a_sweep_is_dealt_to_processes(binaries, tmp_path):
    points = ("--client=sgd({lr})", "--points=grid(lr=log(0.01, 1, 4))", "--halving=2", "--rounds=4", "--seeds=2")
    flags = (*QUICK[:1], "--cohort_size=3", *points)
    code, _, err = ended(launched(sys.executable, "-m", "experiments.sweep", *flags, f"--workdir={tmp_path / 'here'}"))
    assert code == 0, err
    assert binaries("sweep", *flags, f"--workdir={tmp_path / 'alone'}")[0] == 0
    found = [trials(tmp_path / where / "results.jsonl") for where in ("here", "alone")]
    assert found[0].keys() == found[1].keys()
    for trial, metrics in found[0].items():
        for name, value in metrics.items():
            np.testing.assert_allclose(value, found[1][trial][name], rtol=1e-5, err_msg=f"{trial} {name}")
    assert {p.name for p in (tmp_path / "here").iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()}


def trials(path):
    entries = map(json.loads, path.read_text().splitlines())
    return {(e["point"], e["seed"], e["metrics"]["round"]): e["metrics"] for e in entries}
