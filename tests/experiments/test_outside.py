"""Components of one's own: a file outside of the repository, named by ``--import``, that flags then name."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest

import fedjax_clip as fc
from experiments.config import algorithms, components, outside, own_scores, rundir

MODULE = '''
"""What a researcher writes: an algorithm, a clip, a link, a reducer, a compressor, a sampler, a schedule, a task."""

import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc
from fedjax_clip.core import tree

NUMBER = 3


def fedexp(loss, client_tx, *, epsilon=1e-3, uplink=None, reducer=None):
    """FedExP (Jhunjhunwala et al. 2023): the server's step is max(1, mean ||u_i||^2 / 2 (||mean u||^2 + epsilon))."""

    def round(now):
        def client_fn(x, client, key):
            y, _, _, report = client.local_steps(x, key)
            u = optax.tree.sub(y, x)
            return (u, tree.norm(u) ** 2), client.state.own, report

        answer = now.exchange(client_fn, now.server.params)
        u, square = answer.update
        eta = jnp.maximum(1.0, square / (2 * (tree.norm(u) ** 2 + epsilon)))
        return now.step(answer, optax.tree.scale(eta, u), metrics={"eta": eta})

    return fc.extend.algorithm(round, loss, client_tx, uplink=uplink, reducer=reducer, beside=[None])


def halved(max_norm):
    """Clips to half of what is asked."""
    return fc.clipping.clip_by_global_norm(max_norm / 2)


def doubled():
    """A link that doubles each update."""
    return fc.uplink.at_client(optax.scale(2.0))


def bounded_mean(bound=0.1):
    return fc.reduce.norm_bounded(bound, fc.reduce.uniform_mean())


def coarse():
    return fc.compression.qsgd(2)


def first(cohort_size):
    return fc.data.sampling.round_robin(cohort_size)


def flat(rate):
    return optax.constant_schedule(rate)


def line(num_clients=4):
    return fc.tasks.linear_regression(num_clients)


def number(x=1):
    return x


def no_algorithm(loss, client_tx):
    return loss


def broken(x):
    return {}[x]


def gini(values, data, of="loss"):
    means = np.sort([part.mean() for part in np.split(values[of], data.offsets[1:-1])])
    n = len(means)
    return {f"gini_{of}": 2 * np.sum(np.arange(1, n + 1) * means) / (n * means.sum()) - (n + 1) / n}


def twice(values, data):
    return {"loss": 1.0}


def text(values, data):
    return {"text": "much"}


def failing(loss, client_tx):
    return fc.extend.algorithm(lambda now: now.nothing, loss, client_tx)


def counting(loss, client_tx, **parts):
    def round(now):
        def client_fn(x, client, key):
            y, _, _, report = client.local_steps(x, key)
            return optax.tree.sub(y, x), client.state.own, report | {"clients": jnp.ones(())}

        return now.step(now.exchange(client_fn, now.server.params))

    return fc.extend.algorithm(round, loss, client_tx, **parts)


def weighing():
    return optax.add_decayed_weights(0.1)
'''
QUICK = ("--rounds=2", "--cohort_size=3", "--eval_every=2", "--rounds_per_dispatch=1", "--import=my_module")
LINE = "--task=linear_regression(num_clients=6)"


@pytest.fixture
def cli(binaries, tmp_path, monkeypatch):
    """``experiments.run`` where ``my_module.py`` can be imported."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/my_module.py").write_text(MODULE)
    (tmp_path / "own/my_broken.py").write_text("import os\n\nNUMBER = 1 / 0\n")
    (tmp_path / "own/my_needy.py").write_text("import no_such_package\n")
    (tmp_path / "own/my_exit.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path / "own")
    yield functools.partial(binaries, "run")
    for name in ("my_module", "my_broken", "my_needy", "my_exit"):
        sys.modules.pop(name, None)


def params(path):
    with np.load(path / "params.npz") as arrays:
        return dict(arrays)


def test_an_algorithm_of_ones_own_is_run_and_remembered(cli, tmp_path):
    flags = (*QUICK, LINE, "--algorithm=my_module.fedexp(1e-2)", "--workdir=here")
    code, _, err = cli(*flags)
    assert code == 0, err
    assert [row["eta"] >= 1 for row in rundir.read_rows(tmp_path / "here")] == [True, True]
    config = rundir.read_config(tmp_path / "here")["config"]
    assert (config["import"], config["algorithm"]) == ("my_module", "my_module.fedexp(1e-2)")
    code, out, _ = cli(*flags)
    assert (code, "Complete already (2 rounds)" in out) == (0, True)
    code, _, err = cli(*flags, "--import=json")
    assert (code, "holds a run with --import='my_module', not 'my_module,json'" in err) == (2, True)


def test_what_is_ones_own_does_what_the_same_of_the_library_does(cli, tmp_path):
    mine = (
        *("--task=my_module.line(6)", "--client=my_module.halved(1.0)|sgd(my_module.flat(0.1))"),
        *("--uplink=my_module.doubled()|error_feedback(my_module.coarse)", "--sampler=my_module.first"),
        *("--reducer=my_module.bounded_mean", "--downlink=difference(my_module.coarse())"),
    )
    ours = (
        *(LINE, "--client=clip_by_global_norm(0.5)|sgd(0.1)", "--sampler=round_robin"),
        *("--uplink=my_module.doubled|error_feedback(qsgd(2))", "--downlink=difference(qsgd(2))"),
        "--reducer=norm_bounded(0.1, uniform_mean())",
    )
    for name, flags in (("mine", mine), ("ours", ours)):
        code, _, err = cli(*QUICK, *flags, f"--workdir={name}")
        assert code == 0, err
    one, two = params(tmp_path / "mine"), params(tmp_path / "ours")
    assert one
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_sweep_takes_ones_own_and_says_how_its_best_point_is_run(cli, binaries, tmp_path):
    flags = (
        *("--import=my_module", LINE, "--rounds=2", "--cohort_size=3", "--workdir=here"),
        *("--algorithm=my_module.fedexp({e})", "--points=grid(e=(0.01, 1))"),
    )
    code, out, err = binaries("sweep", *flags)
    assert code == 0, err
    command = "python -m experiments.run --import=my_module --flagfile=here/best.flags"
    assert out.splitlines()[-1].endswith(command)
    code, _, err = cli("--import=my_module", "--flagfile=here/best.flags", "--workdir=best")
    assert code == 0, err
    assert json.loads((tmp_path / "here/config.json").read_text())["config"]["import"] == "my_module"


def test_a_metric_of_ones_own_is_in_the_rows_and_on_the_page(cli, tmp_path):
    flags = (*QUICK, LINE, "--scores=my_module.gini()", "--workdir=here")
    code, out, err = cli(*flags)
    assert code == 0, err
    assert "gini_loss" in out
    found = [
        row["eval/examples/gini_loss"] for row in rundir.read_rows(tmp_path / "here") if "eval/examples/loss" in row
    ]
    assert found
    assert all(0 <= x < 1 for x in found)
    assert "gini_loss" in (tmp_path / "here/report.html").read_text()
    code, _, err = cli(*flags, "--scores=")
    assert (code, "--scores='my_module.gini()'" in err) == (2, True)


def test_scores_of_ones_own_leave_the_comparison_of_clients(monkeypatch, cli, tmp_path):
    monkeypatch.setattr(outside, "modules", lambda: ["my_module"])
    compared = fc.tasks.OverClients(lambda values, data: {"largest": values["loss"].max()}, ("largest",))
    task = dataclasses.replace(fc.tasks.linear_regression(6), summarise=compared)
    summarise = own_scores.added(task, "my_module.gini()").summarise
    data, values = task.evaluation["examples"], {"loss": np.arange(1.0, 1 + task.evaluation["examples"].num_examples)}
    assert summarise(values, data) == {**compared(values, data), "gini_loss": summarise(values, data)["gini_loss"]}
    np.testing.assert_array_equal(
        summarise.of_clients(values, data)["largest"], compared.of_clients(values, data)["largest"]
    )


IN_A_ROUND = {
    "an algorithm that fails": (
        "--algorithm=my_module.failing",
        "'Round' object has no attribute 'nothing' (my_module.py",
    ),
    "a report that the library would overwrite": (
        "--algorithm=my_module.counting",
        "client_fn reports 'clients', a name that the library fills itself: choose another one.",
    ),
    "a link that needs the parameters": (
        "--uplink=my_module.weighing",
        "needs the parameters, and a link sees the update alone: put it into the clients' optimiser.",
    ),
}


@pytest.mark.parametrize("case", IN_A_ROUND)
def test_what_fails_in_a_round_is_one_sentence(cli, case):
    flag, words = IN_A_ROUND[case]
    code, _, err = cli(*QUICK, LINE, flag, "--workdir=here")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err
    assert "Traceback" not in err


def test_an_audit_takes_ones_own(cli, binaries):
    private = ("--sampler=poisson", "--cohort_size=4", "--task=digits(hidden=())", "--rounds=2", "--replays=200")
    uplink = "--uplink=my_module.halved(1.0)|gaussian(2.0)"
    code, out, err = binaries("audit", "--import=my_module", *private, uplink)
    assert code == 0, err
    assert "nothing wrong found" in out


def test_a_private_run_says_that_it_believes_ones_own_code(cli):
    private = ("--delta=0.01", "--sampler=poisson", "--uplink=my_module.halved(1.0)|gaussian(2.0)")
    code, out, err = cli(*QUICK, LINE, *private, "--workdir=here")
    assert code == 0, err
    assert "code of my_module that keeps its promises" in out


BAD = {
    "a module that no flag names": (
        ("--algorithm=json.dumps",),
        '--algorithm: "json.dumps" is from outside of the library: add --import=json, which runs the code of that',
    ),
    "a module beside the one that is named": (("--import=os", "--uplink=os.path.join('a')"), "add --import=os.path"),
    "a module that is not there": (("--import=my_modul",), "--import=my_modul: there is no module my_modul here"),
    "a module within none": (("--import=my_modul.x",), "--import=my_modul.x: there is no module my_modul here"),
    "a module that needs another": (("--import=my_needy",), "--import=my_needy fails: ModuleNotFoundError: No module"),
    "a module that fails": (
        ("--import=my_broken",),
        "--import=my_broken fails: ZeroDivisionError: division by zero (my_broken.py, line 3).",
    ),
    "a module that ends the program": (
        ("--import=my_exit",),
        "--import=my_exit fails: SystemExit: 0 (my_exit.py, line",
    ),
    "a file": (("--import=my_module.py/",), "is a file: write --import=my_module for the file my_module.py"),
    "nothing": (("--import=",), "--import= is not the name of a module"),
    "a name that is missing": (("--algorithm=my_module.fedex()",), "the module my_module has no fedex"),
    "no function": (("--algorithm=my_module.NUMBER",), "my_module.NUMBER is not a function but of type int"),
    "an unknown argument": (
        ("--algorithm=my_module.fedexp(epsilom=1)",),
        'my_module.fedexp has no argument "epsilom"; did you mean "epsilon"? (it is my_module.fedexp(epsilon=0.001))',
    ),
    "a task for an algorithm": (
        ("--algorithm=my_module.no_algorithm",),
        "my_module.no_algorithm must return a thing of type Algorithm, not function.",
    ),
    "a number for a link": (
        ("--uplink=my_module.number(3)",),
        "--uplink: my_module.number must return a thing of type Uplink, not int.",
    ),
    "a number for a task": (("--task=my_module.number",), "must return a thing of type Task, not int."),
    "a number for a reducer": (("--reducer=my_module.number",), "must return a thing of type Reducer, not int."),
    "a number for a sampler": (("--sampler=my_module.number",), "thing of type Sampler or Clock, not int."),
    "a number for a clip": (("--client=my_module.number|sgd(0.1)",), "of type GradientTransformation, not int."),
    "a number for a compressor": (("--downlink=difference(my_module.number())",), "of type Compressor, not int."),
    "no optimiser": (("--client=my_module.halved(1.0)",), "the chain needs an optimiser"),
    "a server's optimiser that is not used": (
        ("--algorithm=my_module.fedexp", "--server=adam(0.1)"),
        "--server: my_module.fedexp has no argument server_tx: leave --server out.",
    ),
    "a function that fails": (
        ("--uplink=my_module.broken('a')",),
        "--uplink: my_module.broken: KeyError: 'a' (my_module.py, line",
    ),
    "a metric of the library": (("--scores=gini",), "write my_module.gini() for the function gini(values, data)"),
    "a metric of what is not measured": (
        (LINE, "--scores=my_module.gini('spam')"),
        "my_module.gini: KeyError: 'spam' (my_module.py, line",
    ),
    "a metric that is there": ((LINE, "--scores=my_module.twice"), "'loss' is measured already: choose another name"),
    "a metric that is no number": ((LINE, "--scores=my_module.text"), "must return numbers, and 'text' is 'much'"),
    "a metric of nothing": ((LINE, "--scores=my_module.coarse"), "must take (values, data), not ()"),
    "an import in a file": (("--flagfile=own/mine.flags",), "has --import, which runs code: write it on the command"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_ones_own_or_no_component_is_one_sentence(cli, case, tmp_path):
    (tmp_path / "own/mine.flags").write_text("# mine\n--import=my_module\n")
    flags, words = BAD[case]
    imports = () if flags[0].startswith("--import") or "json" in flags[0] or "file" in flags[0] else QUICK[-1:]
    code, out, err = cli(*imports, *flags, "--workdir=here")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "here").exists()


def test_help_has_the_flags_of_imported_modules_and_says_that_an_import_runs_code(cli):
    _, out, _ = cli("--help")
    assert "--distributed" in out
    assert "--import" in out
    assert "runs their code" in " ".join(out.split())


def test_a_module_is_read_by_its_names_and_what_they_say_they_return():
    found = components.read(fc.reduce, fc.reduce.Reducer, without=("median",))
    assert {"krum", "weighted_mean", "stacking"} <= set(found)
    assert not {"median", "majority", "check_cohort", "Reducer"} & set(found)
    assert "restacked" not in components.read(fc.attacks, fc.reduce.Reducer)  # imported there


def test_arguments_that_a_binary_knows_are_no_flags_and_reach_the_function():
    def make(a, size, *rest, key=1, more=2):
        return a, size, rest, key, more

    filled = components.filled(make, size=8, more=3, other=4)
    assert filled(1, 5, 6, key=7) == (1, 8, (5, 6), 7, 3)
    with pytest.raises(TypeError, match="size"):
        filled(1, size=2)
    assert components.defaulted(lambda *, a: a, a=5)() == 5


def test_partially_private_takes_any_algorithm():
    assert isinstance(algorithms.ALGORITHMS["partially_private"]("b"), algorithms.Maker)
    with pytest.raises(fc.InvalidInput, match="an algorithm, such as scaffold"):
        algorithms.ALGORITHMS["partially_private"]("b", 3)
