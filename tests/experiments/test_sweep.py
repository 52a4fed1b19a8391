"""The sweep's binary as its user meets it."""

import functools
import json
import pathlib
import signal

import made_hospitals
import numpy as np
import pytest

from experiments.config import binary, optimisers, spec
from fedjax_clip.core.types import InvalidInput

QUICK = (
    *("--task=linear_regression(num_clients=6)", "--rounds=3", "--cohort_size=3", "--workdir=here"),
    "--client=clip_by_global_norm({clip})|sgd({lr})",
    "--points=grid(lr=log(0.01, 1, 3), clip=(0.5, inf))",
)


@pytest.fixture
def cli(binaries):
    return functools.partial(binaries, "sweep")


def lines(path="here"):
    return [json.loads(line) for line in (pathlib.Path(path) / "results.jsonl").read_text().splitlines()]


class StopAfterTwo:
    """A Ctrl-C that comes at the second question."""

    signal = None
    asked = 0

    def __init__(self, told):
        pass

    def __call__(self):
        self.asked += 1
        if self.asked == 2:
            self.signal = signal.SIGINT
        return self.signal is not None


def test_stopped_it_goes_on_and_its_best_flags_are_a_run(cli, binaries, monkeypatch, tmp_path):
    settings = (*QUICK, "--seeds=2", "--points_per_chunk=2", "--devices=1")
    with monkeypatch.context() as patched:
        patched.setattr(binary, "Stopping", StopAfterTwo)
        code, out, _ = cli(*settings)
    assert (code, "the same command goes on" in out) == (128 + signal.SIGINT, True)
    first = lines()
    assert 0 < len(first) < 12
    with (tmp_path / "here/results.jsonl").open("a") as file:
        file.write('{"point": 5, "se')  # as a kill would leave it

    code, out, err = cli(*settings)
    assert code == 0, err
    entries = lines()
    assert entries[: len(first)] == first
    assert sorted((e["point"], e["seed"]) for e in entries) == [(p, s) for p in range(6) for s in range(2)]
    assert entries[0]["values"] == {"lr": "0.01", "clip": "0.5"}
    assert {p.name for p in (tmp_path / "here").iterdir()} == {
        *("best.flags", "config.json", "results.jsonl", "sweep.png", "table.md")
    }
    losses = np.array([[e["metrics"]["eval/examples/loss"] for e in entries if e["point"] == p] for p in range(6)])
    table = (tmp_path / "here/table.md").read_text().splitlines()
    assert table[0] == "| lr | clip | rounds | eval/examples/loss |"
    best = int(np.argmin(losses.mean(1)))
    half = 12.706 * losses[best].std(ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
    assert table[2].endswith(f"| 3 | {losses[best].mean():.4g} ± {half:.2g} |")
    values = next(e["values"] for e in entries if e["point"] == best)
    assert table[2].startswith(f"| {values['lr']} | {values['clip']} |")
    assert [float(row.split("|")[4].split("±")[0]) for row in table[2:8]] == pytest.approx(
        sorted(losses.mean(1)), rel=1e-3
    )

    assert cli(*settings)[0] == 0  # complete: nothing is added
    assert lines() == entries
    code, _, err = cli(*settings, "--rounds=4")
    assert (code, err.count("holds a run with --rounds=3, not 4")) == (2, 1)

    code, out, err = binaries("run", "--flagfile=here/best.flags", "--workdir=best")
    assert code == 0, err
    last = json.loads((tmp_path / "best/metrics.jsonl").read_text().splitlines()[-1])
    seed_0 = next(e for e in entries if e["seed"] == 0 and e["point"] == best)
    assert last["eval/examples/loss"] == pytest.approx(seed_0["metrics"]["eval/examples/loss"], rel=1e-4)


def test_folds_and_halving_of_a_random_set(cli, tmp_path):
    points = "--points=random(4, lr=log(0.01, 1), clip=linear(0.1, 2))"
    default_cohort = (flag for flag in QUICK[:-1] if "cohort_size" not in flag)
    server = "--server=sgd(1.0)|clip_by_global_norm(1e6)"
    code, out, err = cli(*default_cohort, points, "--folds=2", "--halving=2", server)
    assert code == 0, err
    assert err.startswith("The smallest fold trains 3 clients: cohorts are of 3, not 6.\n")
    assert "3 a round" in err
    assert "--server: clip_by_global_norm stands behind the optimiser and bounds its steps" in err
    entries = lines()
    assert {e["fold"] for e in entries} == {0, 1}
    assert {e["metrics"]["round"] for e in entries} == {2, 3}
    assert "somewhat too narrow" in (tmp_path / "here/table.md").read_text()
    assert "--client=clip_by_global_norm(" in (tmp_path / "here/best.flags").read_text()
    assert out.startswith("eval/fold/loss")


def test_points_are_ranked_by_the_auroc_of_the_worst_hospital(cli, tmp_path):
    made_hospitals.write(tmp_path / "h.csv", sizes={"a": 60, "b": 40, "c": 40, "d": 20})
    task = "csv('h.csv', 'died', by='hospital', held_out=0.5)"
    settings = ("--rounds=2", "--client=sgd({lr})", "--points=grid(lr=(0.001, 0.03, 1))", "--workdir=here")
    code, out, err = cli(f"--task={task}", *settings, "--metric=examples/auroc_worst")
    assert code == 0, err
    scores = {e["values"]["lr"]: e["metrics"]["eval/examples/auroc_worst"] for e in lines()}
    best, *others = sorted(scores, key=scores.get, reverse=True)
    assert scores[best] > scores[others[-1]]
    table = (tmp_path / "here/table.md").read_text().splitlines()
    assert table[0].startswith("| lr | rounds | eval/examples/auroc_worst | eval/examples/accuracy |")
    assert [float(row.split("|")[3]) for row in table[2:5]] == [float(f"{scores[p]:.4g}") for p in (best, *others)]
    assert out.startswith(f"eval/examples/auroc_worst  {scores[best]:.4g}")
    flags = (tmp_path / "here/best.flags").read_text()
    assert f"by eval/examples/auroc_worst, {scores[best]:.4g}: lr={best}" in flags
    code, out, err = cli(f"--task={task}", *settings, "--workdir=there", "--metric=examples/auroc_least")
    assert (code, out) == (2, "")
    assert "--metric=examples/auroc_least is not measured; there is examples/accuracy, examples/loss, " in err
    assert "examples/auroc_worst" in err


BAD = {
    "no points": ((QUICK[4],), "--points is missing"),
    "a placeholder without values": ((QUICK[4], "--points=grid(lr=(0.1, 1))"), "{clip} is given no values"),
    "values without a placeholder": ((*QUICK[4:], "--server=sgd(1.0)", "--client=sgd({lr})"), "clip is nowhere used"),
    "a grid without a number of values": ((QUICK[4], "--points=grid(lr=log(0.1, 1), clip=(1, 2))"), "how many of lr"),
    "a random set of values": ((QUICK[4], "--points=random(3, lr=(1, 2), clip=log(1, 2))"), "lr is none"),
    "a range through zero": ((QUICK[4], "--points=grid(lr=log(0, 1, 3), clip=(1, 2))"), "log needs 0 < low < high"),
    "an empty grid": ((QUICK[4], "--points=grid(lr=(), clip=(1, 2))"), "a grid needs one value or more of lr"),
    "a grid of grids": ((QUICK[4], "--points=grid(lr=((1, 2), (3, 4)), clip=1)"), "one value or more of lr"),
    "points without end": ((QUICK[4], "--points=grid(lr=log(1, 2, 100000000000), clip=1)"), "between 1 and 10000"),
    "products without end": (
        (QUICK[4], "--points=grid(lr=log(1, 2, 1000), clip=log(1, 2, 1000))"),
        "between 1 and 10000, not 1000000",
    ),
    "seeds without end": ((*QUICK[4:], "--seeds=100000000000"), "--seeds must be a whole number between 1 and 10000"),
    "an unknown kind of set": ((QUICK[4], "--points=gird(lr=(1, 2))"), 'did you mean "grid"'),
    "a rate below zero": (
        (QUICK[4], "--points=grid(lr=(-1, 2), clip=(1, 2))"),
        "learning rate must be a positive, finite number",
    ),
    "a whole number swept": (
        ("--local_steps={n}", "--points=grid(n=(1, 2))"),
        '--local_steps: "{n}" cannot stand here',
    ),
    "a number that decides what is compiled": (
        ("--client=sgd(0.1)", "--uplink=top_k({k})", "--points=grid(k=(1, 2))"),
        "A swept number decides what is compiled",
    ),
    "an unknown metric": ((*QUICK[4:], "--metric=accuracy"), "there is examples/loss"),
    "no seeds": ((*QUICK[4:], "--seeds=0"), "--seeds must be a whole number between 1 and 10000"),
    "one fold": ((*QUICK[4:], "--folds=1"), "--folds=1 would leave nothing"),
    "more folds than clients": (
        (*QUICK[4:], "--folds=7"),
        "num_folds, of clients, must be a whole number between 2 and 6",
    ),
    "a cohort that folds cannot fill": (
        (*QUICK[4:], "--folds=2", "--cohort_size=4"),
        "--cohort_size=4 is more than the 3 training clients",
    ),
    "no halving": ((*QUICK[4:], "--halving=1"), "--halving must be a whole number between 2 and 10000"),
    "folds of nothing": ((*QUICK[4:], "--fold_over=examples"), "--fold_over says nothing without --folds"),
    "a clock": ((*QUICK[4:], "--sampler=buffered(lognormal(), concurrency=3)", "--cohort_size=2"), "is a clock"),
    "a flag of privacy": ((*QUICK[4:], "--delta=0.01"), "--delta has no effect here"),
    "a flag of runs only": ((*QUICK[4:], "--eval_every=5"), "--eval_every has no effect here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(cli, case, tmp_path):
    arguments, words = BAD[case]
    code, out, err = cli(*QUICK[:4], *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert words in err
    assert not list(tmp_path.iterdir())


def test_help_names_the_flags_of_both(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert "random(30, name=log(0.01, 1)" in out
    assert "--folds" in out
    assert "--delta" not in out


def test_a_run_refuses_a_placeholder(cli, binaries, tmp_path):
    code, out, err = binaries("run", "--client=sgd({lr})")
    assert (code, out) == (2, "")
    assert "error: --client: {lr} has no value" in err
    assert not list(tmp_path.iterdir())


def test_placeholders_are_found_and_filled():
    text = "a(1, {x})|b(two=[{y}, c({z})])"
    assert spec.placeholders(text, "--t") == {"x", "y", "z"}
    parts = {"a": lambda *args: args, "b": lambda two: two, "c": lambda x: ("c", x)}
    assert spec.build(text, parts, "--t", parts, {"x": 1, "y": 2, "z": 3}) == [(1, 1), [2, ("c", 3)]]
    for bad in ("a({})", "a({1})", "a({x, y})", "a({'x'})", "{x}", "a({x: 1})", "a(-{x})"):
        with pytest.raises(InvalidInput, match="cannot stand here|--t"):
            spec.build(bad, parts, "--t", parts, {"x": 1, "y": 2})


def test_every_placeholder_may_stand_where_a_component_takes_a_number():
    optimisers.server_tx("sgd({r}, momentum={m})", {"r": 0.1, "m": 0.9})
    with pytest.raises(InvalidInput, match="momentum must be a number of at least 0 and below 1"):
        optimisers.server_tx("sgd({r}, momentum={m})", {"r": 0.1, "m": 1.5})
