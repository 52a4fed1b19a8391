"""A run directory goes on: more rows, new clients, one curve with its seam; the best model; what is refused."""

import json
import shutil

import numpy as np
import pytest
from commands import assert_refused, files_below

from experiments.config import rundir

CLIENTS = {"north": 16, "south": 22, "east": 30}
LATER = {"north": 16, "south": 40, "east": 30, "hill": 14, "harbour": 18}
FLAGS = ("--algorithm=scaffold", "--server=adam(0.03)|average(0.9)", "--client=sgd(0.1)", "--eval_every=2")


def table(path, sizes):
    """Rows of hospitals; those of a longer table begin with those of a shorter one."""
    lines = ["age,sex,clinic,died"]
    for name, count in sizes.items():
        rng = np.random.default_rng(sum(map(ord, name)))
        ages, noise = rng.normal(60, 12, 99)[:count], rng.normal(0, 5, 99)[:count]
        lines += [
            f"{a:.1f},{'fm'[i % 2]},{name},{'yes' if a + e > 60 else 'no'}" for i, (a, e) in enumerate(zip(ages, noise))
        ]
    path.write_text("\n".join(lines) + "\n")
    return f"--task=csv('{path.name}', 'died', by='clinic')"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "first"


@pytest.fixture
def first(cli, trained, tmp_path):
    """``first``, a run of six rounds on three clients."""
    task = table(tmp_path / "first.csv", CLIENTS)
    if not trained.exists():
        assert cli(task, *FLAGS, "--rounds=6", "--workdir=first")[0] == 0
        shutil.copytree(tmp_path / "first", trained)
    else:
        shutil.copytree(trained, tmp_path / "first")
    return task


def test_a_run_goes_on_with_more_rows_and_new_clients_and_its_page_has_one_curve(cli, first, tmp_path):
    task = table(tmp_path / "later.csv", LATER).replace(")", ", like='first')")
    before = files_below(tmp_path / "first")
    code, _, err = cli(task, *FLAGS, "--rounds=10", "--init=first", "--workdir=second")
    assert code == 0
    assert (
        "--init: goes on after round 6 of first, with its server's state and that of 3 clients that stayed; 2 new clients "
        "begin afresh, and 0 are gone." in err
    )
    assert files_below(tmp_path / "first") == before
    rows = rundir.read_rows(tmp_path / "second")
    assert rows[:6] == rundir.read_rows(tmp_path / "first")
    assert [row["round"] for row in rows if "went_on_from" in row] == [7]
    assert (rows[6]["went_on_from"], rows[6]["clients_kept"], rows[6]["clients_new"]) == (6, 3, 2)
    assert "eval/examples_average/auroc" in rows[-1]
    record = rundir.read_config(tmp_path / "second")
    assert (record["init"]["directory"], record["init"]["round"], len(record["init"]["hash"])) == ("first", 6, 32)
    page = (tmp_path / "second/report.html").read_text()
    charts = page.count('aria-label="loss"'), page.count('class="seam"')
    assert charts[0] == 1
    assert charts[1] >= 3  # one in each chart over rounds
    assert "Went on after round 6. Clients: 3 kept, 2 new, 0 gone" in page
    with np.load(tmp_path / "second/average.npz") as average, np.load(tmp_path / "second/params.npz") as params:
        assert set(average.files) == set(params.files)

    # The same command adds nothing, and a kill before the first checkpoint begins again with the same bits.
    done = files_below(tmp_path / "second/checkpoints")
    code, out, _ = cli(task, *FLAGS, "--rounds=10", "--init=first", "--workdir=second")
    assert (code, "Complete already (10 rounds)" in out) == (0, True)
    expected = (tmp_path / "second/params.npz").read_bytes()
    shutil.rmtree(tmp_path / "second/checkpoints")
    assert done
    assert cli(task, *FLAGS, "--rounds=10", "--init=first", "--workdir=second")[0] == 0
    assert (tmp_path / "second/params.npz").read_bytes() == expected
    again = rundir.read_rows(tmp_path / "second")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_a_changed_file_is_refused_with_the_way_to_go_on(cli, first, tmp_path):
    table(tmp_path / "first.csv", LATER)
    before = sorted(tmp_path.rglob("*"))
    outcome = cli(first, *FLAGS, "--rounds=10", "--workdir=first")
    assert_refused(
        outcome, tmp_path, before, "To train on with the data as they are now, write --init=first and another"
    )


def test_what_a_run_cannot_begin_with_is_one_sentence(cli, first, tmp_path):
    (tmp_path / "empty").mkdir()
    other = (tmp_path / "first.csv").read_text().replace(",f,", ",x,", 1)  # a third word, another model
    (tmp_path / "other.csv").write_text(other)
    shutil.copytree(tmp_path / "first", tmp_path / "private")
    shutil.rmtree(tmp_path / "private/checkpoints")
    before = sorted(tmp_path.rglob("*"))
    for flags, words in (
        (("--init=empty",), "--init: empty holds no run"),
        (("--init=first", "--init_params=first"), "leave --init_params out"),
        (("--init=first", "--delta=1e-3"), "--init: the epsilon of --delta is of this run's rounds alone"),
        (("--init=first", "--rounds=6"), "--rounds=6 counts the 6 rounds of --init=first: ask for more"),
        (("--init=private",), "has no checkpoints, as a private run that is complete: take its parameters"),
        (("--init=first", "--algorithm=fedavg"), "is of scaffold, not fedavg: go on with scaffold, or begin anew"),
        (("--init=first", "--task=csv('other.csv', 'died', by='clinic')"), "has other features or classes"),
        (("--init_params=first", "--task=csv('other.csv', 'died', by='clinic')"), "params.npz is of another model"),
        (("--patience=3",), "--patience waits for a better value of a metric: give --metric, too"),
        (("--metric=examples/auroc", "--delta=1e-3"), "which the epsilon of --delta does not cover"),
    ):
        assert_refused(cli(first, *FLAGS, "--workdir=new", *flags), tmp_path, before, words)


def test_parameters_alone_begin_anew_and_the_best_model_is_kept(cli, first, tmp_path):
    flags = (first, "--client=sgd(3.0)", "--eval_every=1", "--init_params=first", "--workdir=new", "--rounds=30")
    code, out, _ = cli(*flags, "--metric=examples/loss", "--patience=2")
    assert code == 0
    rows, record = rundir.read_rows(tmp_path / "new"), rundir.read_config(tmp_path / "new")
    assert (rows[0]["round"], record["init_params"]["directory"]) == (1, "first")
    losses = [row["eval/examples/loss"] for row in rows]
    best = int(np.argmin(losses))
    assert record["best"] == {"metric": "examples/loss", "value": losses[best], "round": best + 1}
    assert len(rows) == best + 3 < 30  # it waited for two evaluations
    assert f"ended early        after {len(rows)} of 30 rounds: 2 evaluations brought no better examples/loss" in out
    assert "best.npz" in out
    with np.load(tmp_path / "new/best.npz") as kept, np.load(tmp_path / "new/params.npz") as params:
        assert set(kept.files) == set(params.files)
        assert any(np.any(kept[name] != params[name]) for name in kept.files)
    code, out, _ = cli(*flags, "--metric=examples/loss", "--patience=2")
    assert (code, f"Complete already ({len(rows)} rounds)" in out) == (0, True)
    assert json.loads((tmp_path / "new/config.json").read_text())["best"] == record["best"]
