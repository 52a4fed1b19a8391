"""The comparison of defences: its problems, that it resumes, what its report says, and what it refuses."""

import subprocess
import sys

import generated
import jax
import numpy as np
import pytest
from problems import parameters, population, softmax_loss

import fedjax_clip as fc
from experiments.bench import robust
from experiments.bench.threats import ATTACKS, DEFENCES, Problem, long_tail, mnist
from fedjax_clip.reduce import Roster


def tiny() -> Problem:
    data = population(sizes=(8,) * 9)
    return Problem(
        "tiny",
        data,
        population(sizes=(30,), seed=3),
        {k: x[:5] for k, x in data.examples.items()},
        softmax_loss,
        lambda seed: parameters(seed=seed),
        bad=(0, 1),
        pattern={"features": [3], "value": 6.0, "target": 1},
        client_lr=0.1,
        rounds=12,
        work=fc.extend.LocalWork(batch_size=4, steps=2),
        clips=(np.inf, 0.1),
        attacks=tuple(ATTACKS),
    )


def test_a_comparison_is_reported_and_goes_on_where_it_was(tmp_path):
    stops = iter([False, True])
    options = {"seeds": 2, "workdir": tmp_path}
    assert robust.compare([tiny()], ["backdoor"], ["mean", "FLTrust"], **options, should_stop=lambda: next(stops)) == 1
    assert robust.compare([tiny()], ["backdoor"], ["mean", "FLTrust"], **options) == 1
    assert robust.compare([tiny()], ["backdoor"], ["mean", "FLTrust"], **options) == 0
    report = (tmp_path / "report.md").read_text()
    assert "9 clients, 2 of them bad, all in every round; 12 rounds" in report
    for title in (
        "accuracy, no clip",
        "accuracy, messages bounded by 0.1",
        "success of the backdoor (lower is better)",
    ):
        assert f"**{title}" in report
    assert report.count("| backdoor | ") == 4
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_every_attack_can_be_mounted_on_every_defence():
    problem = tiny()
    for attack in ATTACKS.values():
        for name in DEFENCES:
            if name != "bucketed Krum":  # five buckets are too few for two bad ones
                track = robust._track(problem, attack, DEFENCES[name], "tiny", seeds=1, quick=True)
                assert track.data.num_clients == 9 + DEFENCES[name].trusted
                build = robust._builder(problem, attack, DEFENCES[name])
                assert isinstance(build(softmax_loss, {"threshold": 0.1}), fc.extend.Algorithm)


def test_the_long_tail_is_sorted_and_halves_with_each_class(tmp_path):
    generated.write_mnist(tmp_path, count=60)
    with pytest.raises(fc.InvalidInput, match="mnist"):
        long_tail(str(tmp_path / "nowhere"), (4, 8), 16, 10)
    problem = long_tail(str(tmp_path), (), 16, 10)
    counts = np.bincount(problem.data.examples["y"], minlength=10)
    assert np.all(np.diff(problem.data.examples["y"]) >= 0)  # client after client
    assert np.all(counts[1:] <= 0.75 * counts[:-1])
    assert problem.data.num_clients == 24
    for attacks, defences in ((["ALIE"], None), (None, ["FLTrust"])):
        with pytest.raises(fc.InvalidInput, match="long_tail"):
            robust.compare([problem], attacks, defences, 1, tmp_path / "out", quick=True)
    assert set(problem.published) == set(problem.defences) <= set(DEFENCES)
    assert len(mnist(str(tmp_path)).bad) < mnist(str(tmp_path)).data.num_clients / 2


def test_the_long_tails_dropout_is_of_training_only(tmp_path):
    generated.write_mnist(tmp_path, count=60)
    plain, dropping = (long_tail(str(tmp_path), (4,), 16, 10, dropout) for dropout in (False, True))
    params, batch = dropping.start(0), {k: x[:5] for k, x in plain.data.examples.items()}
    np.testing.assert_array_equal(dropping.loss(params, batch, None)[0], plain.loss(params, batch, None)[0])
    assert np.all(dropping.loss(params, batch, jax.random.key(0))[0] != plain.loss(params, batch, None)[0])


def test_krum_squared_is_the_authors():
    rows = np.random.default_rng(4).standard_t(2, (7, 5)).astype(np.float32) * 1e-12
    reducer = DEFENCES["Krum squared"].reducer(tiny(), 9)
    acc = reducer.zero({"w": rows[0]}, Roster(np.arange(8), jax.random.key(0)))
    got = reducer.finish(reducer.add(acc, {"w": rows}, np.ones(7, np.float32)), None)["w"]
    squares = np.sum(np.square((rows[:, None] - rows).astype(np.float64)), axis=-1)
    scores = np.sort(squares**2, axis=1)[:, 1:6].sum(1)  # without itself, of n - 2 nearest
    np.testing.assert_array_equal(got, rows[np.argmin(scores)])
    assert np.argmin(scores) != np.argmin(np.sort(squares, axis=1)[:, 1:6].sum(1))  # Blanchard's


def test_the_binary_refuses_what_there_is_not(tmp_path):
    command = [sys.executable, "-m", "experiments.bench.robust", f"--workdir={tmp_path / 'out'}", "--attacks=sign flop"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown attack 'sign flop'; did you mean 'sign flip'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
