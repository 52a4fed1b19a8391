"""Bad input: one sentence that names it, exit code 2, and nothing left behind."""

import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from commands import QUICK, REPOSITORY, assert_refused, saved

from experiments.config import problem


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
    "an average before the step": ("--server=average(0.9)|sgd(1.0)", "--server: average comes last"),
    "a client's average": ("--client=sgd(0.1)|average(0.9)", "--client: average keeps a mean of the server's"),
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
    "a model over devices that are not there": (
        "--model_parallel=127",
        "--model_parallel=127 must divide the number of devices, ",
    ),
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


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_one_sentence_and_exit_code_2(cli, case, tmp_path):
    flag, words = BAD_FLAGS[case]
    assert_refused(cli(flag), tmp_path, [], words)


def test_bad_files_are_one_sentence_and_exit_code_2(cli, tmp_path):
    for flag, words in bad_files(tmp_path).values():
        before = sorted(tmp_path.rglob("*"))
        quick = () if flag.startswith("--task") else QUICK
        assert_refused(cli(flag, *quick), tmp_path, before, words)


def test_what_fits_in_no_memory_is_one_sentence(cli, tmp_path, monkeypatch):
    for error in (
        MemoryError("Unable to allocate 7 TiB"),
        OverflowError("too large"),
        RuntimeError("RESOURCE_EXHAUSTED"),
    ):
        monkeypatch.setattr(problem, "initial", mock.Mock(side_effect=error))
        assert_refused(cli(*QUICK), tmp_path, [], "this needs more memory than there is, or a number is too large")


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


def test_help_fits_a_person(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert out.index("--task=digits ") < out.index("--sampler=uniform ") < out.index("Components:")
    assert "clip_by_global_norm(max_norm)" in out


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
