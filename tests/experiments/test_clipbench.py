"""ClipBench: outcomes that the literature knows, fair tuning, and the binary as its user meets it."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from generated import write_fashion_mnist

import fedjax_clip as fc
from experiments.bench import clip as clipbench
from experiments.bench import contest, lanes, standings, tracks, tuning
from experiments.bench import report as clipbench_report
from experiments.bench.rules import RULES, Rule
from experiments.bench.tuning import Range
from experiments.config import rundir
from fedjax_clip.clipping import parts

REPOSITORY = pathlib.Path(__file__).parents[2]
PAPER = {"client_lr": 0.01, "threshold": 5.0, "server_lr": 1.0}  # of EPISODE's synthetic problem


@pytest.fixture(autouse=True)
def compiled_as_all_tests_are(monkeypatch):
    monkeypatch.setattr(lanes, "FAST", {})


def trained(track, rule, points, seeds=1):
    """An outcome on the first measuring runs."""
    rule = RULES[rule]
    points = [{k: p[k] for k in rule.knobs} for p in points]
    return lanes.run(track, rule, points, lanes.plan(track, track.measuring[:seeds], rule.fresh))


@functools.cache
def quartic_ends(rule):
    """``(heterogeneities, starts) -> (last x, drops)`` without noise, at the paper's rate and threshold."""
    measures = {"x": tracks.Measure(lambda params, _: params["x"])}
    track = dataclasses.replace(tracks.quartic(1.0, noise=0.0), measures=measures)
    bank = lanes.plan(track, track.measuring[:1], RULES[rule].fresh)
    _, *inputs, _ = bank.nth(bank.arrays, 0)

    @functools.partial(jax.jit, compiler_options=lanes.FAST)
    @jax.vmap
    def ends(h, start):
        examples = {"c": jnp.stack([h, -2 * h]), "noise": jnp.zeros(2), "optimum": jnp.zeros(2)}
        inputs_there = ({"x": start}, *inputs, examples)
        out, dropped, _ = lanes.train_one(track, RULES[rule], PAPER, inputs_there, examples)
        return out["x"], dropped

    return lambda hs, starts: jax.tree.map(np.asarray, ends(np.float32(hs), np.float32(starts)))


def quartic_optimum(h):
    return np.roots([4, -9, -h, 1]).real.max()


def test_the_quartic_ends_where_the_paper_says():
    for rule, ends in {
        "episode": (2.311366, 2.597886),
        "fedavg": (2.299622, 2.432799),
        "celgc": (2.300027, None),
    }.items():
        found, _ = quartic_ends(rule)([1, 4], [1, 1])
        assert abs(found[0] - ends[0]) < 5e-6
        assert abs(found[1] - (ends[1] or 1.65)) < (5e-6 if ends[1] else 0.02)  # celgc stops at its threshold's edge


def test_clients_that_differ_break_clipped_fedavg_and_not_episode():
    hs = np.arange(1, 9)
    optimum = np.array([quartic_optimum(h) for h in hs])
    episode, celgc, fedavg = (
        np.abs(quartic_ends(r)(hs, np.ones(8))[0] - optimum) for r in ("episode", "celgc", "fedavg")
    )
    assert np.all(episode < 1e-5)
    assert np.all(celgc > 0.01)
    assert np.all(celgc[1:] > fedavg[1:])  # with H = 1 the clip hardly fires
    assert np.all(np.diff(celgc) > 0)


def test_from_afar_only_clipped_rules_arrive():
    """From 8 on plain steps overflow, be it in the first round only: their updates are dropped, so they diverged."""
    starts, hs = np.array([4, 8, 12, 50]), np.full(4, 4)
    for rule, survives in {"fedavg": 1, "scaffold": 1, "episode": 4, "episode_plus": 4, "celgc": 4}.items():
        x, dropped = quartic_ends(rule)(hs, starts)
        assert np.array_equal(dropped > 0, np.arange(4) >= survives), rule
        if rule.startswith("episode"):
            assert np.abs(x - quartic_optimum(4)).max() < (1e-5 if rule == "episode" else 2e-3)


def test_one_dropped_update_is_divergence():
    """Of 1000 updates one is dropped, in round 1, and the model ends 0.3 from the optimum."""
    outcome = trained(tracks.quartic(4.0, noise=0.0, start=8.0), "fedavg", [PAPER])
    assert outcome.measured["distance"] < 1
    assert outcome.diverged.all()


@pytest.mark.parametrize(("numbers", "clipped"), [((3, -3, -3), 1.5), ((6, -2, -2, -2), 5 / 3)])
def test_a_clipped_mean_is_biased_and_a_memory_is_not(numbers, clipped):
    """Clipped gradient descent ends where one clipped gradient balances the others: -2.5, or -5/3 in place of 0."""
    track = tracks.three_numbers(numbers)
    for rule in ("celgc", "clip21", "clip21_sgd2m", "normec"):
        distance = trained(track, rule, [PAPER | {"client_lr": 0.05, "threshold": 1.0}]).measured["distance"]
        assert abs(distance - (clipped if rule == "celgc" else 0)) < 1e-4, rule


def test_the_closer_a_clip_is_to_the_noise_the_better_it_bears_heavy_tails():
    """At one rate, as the literature has it."""

    def errors(rule, threshold):
        @functools.partial(jax.jit, compiler_options=lanes.FAST)
        @functools.partial(jax.vmap, in_axes=(0, None))
        @functools.partial(jax.vmap, in_axes=(None, 0))
        def of(df, key):
            track = tracks.heavy_tails(df, rounds=200)
            point = {"client_lr": 0.05, "threshold": threshold, "server_lr": 1.0}
            out, _, _ = lanes.train_one(track, RULES[rule], point, (start, key, *rest), track.data.examples)
            return out["squared distance"]

        keys = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(np.arange(5))
        return np.median(of(np.float32([1.2, 1.5]), keys), axis=1)

    bank = lanes.plan(tracks.heavy_tails(rounds=200), tracks.MEASURING[:1])
    start, _, *rest = bank.nth(bank.arrays, 0)
    rules = {"fedavg": 1.0, "clipped_update": 25.0, "celgc": 5.0, "coordinate": 5 / 10**0.5}
    fedavg, update, step, coordinate = (errors(*item) for item in rules.items())
    assert np.all(fedavg > 3 * update)
    assert np.all(update > 1.5 * step)
    assert np.all(step > 1.5 * coordinate)


def test_the_noise_is_students():
    loss, batch = tracks.heavy_tails(1.5).loss, {"b": np.zeros((100_000, 10), np.float32)}
    noise = jax.jacobian(lambda x: loss({"x": x}, jax.tree.map(lambda b: b[:1], batch), jax.random.key(0)))(
        jnp.zeros(10)
    )
    assert noise.shape == (1, 10)
    first = {"x": jnp.zeros(10).at[0].set(1.0)}  # the losses are then 1/2 + the noise's first elements
    drawn = np.asarray(loss(first, batch, jax.random.key(0))) - 0.5
    assert scipy.stats.kstest(drawn, scipy.stats.t(1.5).cdf).pvalue > 0.01


def test_stored_gradients_bear_client_sampling():
    points = [{"client_lr": 0.002, "threshold": threshold, "server_lr": 1.0} for threshold in (2.5, 5.0)]
    gap = {
        rule: trained(tracks.client_sampling(), rule, points, seeds=2).measured["gap"].mean(axis=1)
        for rule in ("episode", "celgc", "episode_plus", "scaffold_clip")
    }
    for good in ("episode_plus", "scaffold_clip"):
        for bad in ("episode", "celgc"):
            assert np.all(1e4 * gap[good] < gap[bad])


@pytest.mark.parametrize("knobs", [1, 2, 3])
def test_all_rules_have_equally_many_trials(knobs):
    """Half of them everywhere, half around the best of those; all inside of the ranges."""
    space = {name: Range(0.01, 100.0) for name in "abc"[:knobs]}
    asked = []

    def evaluate(points):
        asked.append(points)
        return np.array([sum((math.log10(x) - 0.4) ** 2 for x in p.values()) for p in points])

    points, costs = tuning.search(space, 32, evaluate)
    assert [len(some) for some in asked] == [16, 16]
    assert points == asked[0] + asked[1]
    assert len({tuple(p.values()) for p in points}) == 32
    assert all(0.01 <= x <= 100 for p in points for x in p.values())
    best, sides = asked[0][tuning.best(costs[:16])], 4 * 2 * 16 ** (-1 / knobs)
    for name in space:
        tried = np.log10([p[name] for p in asked[0]])
        assert np.histogram(tried, bins=4, range=(-2, 2))[0].min() > 0
        around = np.log10([p[name] for p in asked[1]])
        assert around.max() - around.min() <= min(4, sides) + 1e-3
        assert around.min() <= math.log10(best[name]) <= around.max()
    assert costs[16:].min() < costs[:16].min()


def test_failed_trials_are_never_best_and_ends_are_told():
    space = {"rate": Range(1e-3, 1.0)}
    points, costs = tuning.search(
        space, 8, lambda points: np.array([math.inf if p["rate"] > 0.1 else -p["rate"] for p in points])
    )
    assert points[tuning.best(costs)]["rate"] <= 0.1
    assert points[tuning.best(costs)]["rate"] == max(p["rate"] for p, c in zip(points, costs) if math.isfinite(c))
    assert (Range(1, 100).end(1.1), Range(1, 100).end(10), Range(1, 100).end(99)) == ("low", "", "high")
    assert (Range(0, 1, log=False).at(0.25), Range(0, 1, log=False).place(0.25)) == (0.25, 0.25)


def test_nobody_is_measured_on_what_it_was_tuned_on(monkeypatch):
    """Seeds are others; of real data the clients that a trial is judged on do not train in it, and are not measured."""
    drawn = {
        split: {"x": np.random.default_rng(seed).integers(0, 256, (400, 28, 28, 1), np.uint8), "y": np.arange(400) % 10}
        for seed, split in enumerate(("train", "test"))
    }
    monkeypatch.setattr(fc.data.sources, "fashion_mnist", drawn.get)
    for name, make in tracks.TRACKS.items():
        for track in make():
            assert not {run.seed for run in track.tuning} & {run.seed for run in track.measuring}
            assert len({run.seed for run in track.measuring}) == len(track.measuring) >= 8
            if not track.accuracy:
                continue
            pixels = {x.tobytes() for x in track.data.examples["x"]}
            judged = [run.judged["x"][run.judged["weight"] > 0] for run in (*track.tuning, track.measuring[0])]
            for run, shown in zip(track.tuning, judged):
                own = np.concatenate([track.data.client(c)["x"] for c in run.clients])
                assert len(own) + len(shown) == track.data.num_examples, name
                assert not {x.tobytes() for x in own} & {x.tobytes() for x in shown}, name
            assert sum(map(len, judged[:-1])) == track.data.num_examples  # each client is judged in one fold
            assert not pixels & {x.tobytes() for x in judged[-1]}, name


def test_a_fold_is_a_population_of_its_own():
    """Only its clients are drawn, and N is their number: so a memory is of them all."""
    track = dataclasses.replace(tracks.client_sampling(rounds=20), rounds=20)
    runs = [tracks.Run(0, np.array([1, 2, 5])), tracks.Run(1)]
    bank = lanes.plan(track, runs)
    _, _, everybody, cohorts, _ = bank.nth(bank.arrays, 0)
    assert set(cohorts.ids.ravel()) == {1, 2, 5}
    assert sorted(i for i in everybody.ids if i >= 0) == [1, 2, 5]
    assert set(cohorts.num_clients) == {3}
    assert set(cohorts.total_weight) == {3.0}
    _, _, everybody, cohorts, _ = bank.nth(bank.arrays, 1)
    assert sorted(everybody.ids) == list(range(8))
    assert (set(cohorts.num_clients), set(cohorts.total_weight)) == ({8}, {8.0})


def test_episode_is_algorithm_1_and_its_full_pass_has_another_name():
    """A fresh batch and eight steps: nine gradients; with a full pass sixteen."""
    track = tracks.quartic(4.0)
    steps = {
        name: lanes.plan(track, track.tuning[:1], RULES[name].fresh).arrays[3].num_steps.max()
        for name in ("fedavg", "episode", "episode_full")
    }
    assert steps == {"fedavg": 8, "episode": 9, "episode_full": 8}
    gradients = {name: RULES[name].gradients(8) for name in (*steps, "episode_plus", "mimelite_clip")}
    assert gradients == {"fedavg": 8, "episode": 9, "episode_full": 16, "episode_plus": 8, "mimelite_clip": 16}
    few = dataclasses.replace(track, rounds=2)
    sent = {name: trained(few, name, [PAPER]).traffic for name in ("fedavg", "episode")}
    assert {name: (x["bytes_up"].item(), x["bytes_down"].item()) for name, x in sent.items()} == {
        "fedavg": (4, 4),
        "episode": (8, 12),
    }


def test_a_new_rule_is_in_the_report_by_itself_and_nothing_runs_twice(tmp_path, monkeypatch):
    def half(loss, point):
        return RULES["celgc"].build(loss, point | {"threshold": point["threshold"] / 2})

    monkeypatch.setitem(RULES, "half", Rule(half, note="half of the threshold"))
    arguments = {"tracks": ["three_numbers"], "rules": ["celgc", "half"], "trials": 4, "quick": True}
    assert clipbench.bench(workdir=tmp_path, **arguments) == 2
    report = (tmp_path / "report.md").read_text()
    assert [line for line in report.splitlines() if "| half |" in line and "half of the threshold" in line]
    assert (tmp_path / "three_numbers.png").read_bytes().startswith(b"\x89PNG")

    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    halved, celgc = json.loads(lines[1]), json.loads(lines[0])
    assert halved["rule"] == "half"
    assert halved["trials"] != celgc["trials"]
    assert len(halved["trials"]) == len(celgc["trials"]) == 4
    assert clipbench.bench(workdir=tmp_path, **arguments) == 0
    assert (tmp_path / "results.jsonl").read_text() == "".join(lines)
    assert (tmp_path / "report.md").read_text() == report

    (tmp_path / "results.jsonl").write_text(lines[0] + lines[1][:-20])  # killed while it wrote
    assert clipbench.bench(workdir=tmp_path, **arguments, should_stop=lambda: True) == 0
    assert clipbench.bench(workdir=tmp_path, **arguments) == 1
    again = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert again[1]["measured"] == halved["measured"]
    shorter = dataclasses.replace(tracks.three_numbers(rounds=30), measuring=tracks.MEASURING[:3], trials=4)
    found = contest.contest([shorter], {"celgc": RULES["celgc"]}, 2, tmp_path)  # of other numbers
    assert found.done == 1
    assert len(found.standings[0][1][0].entry["trials"]) == 2


def test_what_has_changed_runs_again(tmp_path, monkeypatch):
    """A rule that computes something else, be it for its entry or for the library; data; but not a note."""

    def run_again():
        return clipbench.bench(["three_numbers"], ["celgc"], 2, tmp_path, quick=True)

    celgc, hard = RULES["celgc"], parts.hard
    assert run_again() == 1
    monkeypatch.setitem(RULES, "celgc", dataclasses.replace(celgc, note="other words", passes=2))
    assert run_again() == 0
    monkeypatch.setattr(parts, "hard", lambda: lambda norm, threshold: 0.9 * hard()(norm, threshold))
    assert (run_again(), run_again()) == (1, 0)
    monkeypatch.setattr(parts, "hard", lambda: lambda norm, threshold: 0.8 * hard()(norm, threshold))
    assert run_again() == 1
    monkeypatch.setitem(tracks.TRACKS, "three_numbers", lambda: [tracks.three_numbers((3, -3, -4))])
    assert run_again() == 1


def test_no_two_rules_are_the_same_program():
    names = "fedavg", "celgc", "layer", "coordinate", "delta", "episode", "episode_full"
    assert len({lanes.fingerprint(lanes.probe(), RULES[name]) for name in names}) == len(names)


def row_of(report, track, rule):
    """Its cells, by the head of the table."""
    section = report[report.index(f"## {track}\n") :]
    head = next(line for line in section.splitlines() if line.startswith("| rank |"))
    line = re.search(rf"^\| [^|]* \| {rule} \|.*$", section, re.M).group()
    return dict(zip(*([cell.strip() for cell in re.split(r"(?<!\\)\|", x)[1:-1]] for x in (head, line)), strict=True))


def test_digits_are_learnt_with_a_clip_and_without(tmp_path):
    clipbench.bench(["digits"], ["celgc", "fedavg"], 4, tmp_path, quick=True)
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"^\| digits \| (celgc|fedavg) \|", report, re.M)
    for rule in ("celgc", "fedavg"):
        row = row_of(report, "digits", rule)
        assert float(row["accuracy"].split()[0]) > 0.6, row  # chance is 0.1
        assert row["B up"] == row["B down"] == "38,440"


def test_fashion_mnist_is_a_track_where_it_is_there(tmp_path, monkeypatch, capsys):
    read = fc.data.sources.fashion_mnist
    monkeypatch.setattr(fc.data.sources, "fashion_mnist", functools.partial(read, directory=tmp_path))
    few = {name: tracks.TRACKS[name] for name in ("three_numbers", "fashion_mnist")}
    monkeypatch.setattr(clipbench, "TRACKS", few)
    with pytest.raises(fc.InvalidInput, match="apt-get install dataset-fashion-mnist"):
        clipbench.bench(["fashion_mnist"], ["celgc"], 2, tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()
    assert clipbench.bench(None, ["celgc"], 2, tmp_path / "out", quick=True) == 1
    missing = [line for line in capsys.readouterr().err.splitlines() if "Without the track fashion_mnist" in line]
    assert len(missing) == 1
    assert "apt-get install dataset-fashion-mnist" in missing[0]

    for split in ("train", "t10k"):
        write_fashion_mnist(tmp_path, split, 200)
    assert clipbench.bench(None, ["celgc"], 2, tmp_path / "out", quick=True) == 1
    assert row_of((tmp_path / "out" / "report.md").read_text(), "fashion_mnist", "celgc")


def test_lanes_one_by_one_are_lanes_side_by_side(monkeypatch):
    """And spare ones change nothing."""
    track = dataclasses.replace(tracks.client_sampling(rounds=20), rounds=20)
    points = [{"client_lr": 0.002, "threshold": threshold} for threshold in (1.0, 5.0)]
    bank = lanes.plan(track, track.measuring[:3])
    together = lanes.run(track, RULES["celgc"], points, bank, [0, 2])
    monkeypatch.setattr(lanes, "SMALL", 0)
    monkeypatch.setattr(lanes, "_PROGRAMS", {})
    apart = lanes.run(track, RULES["celgc"], points, bank, [0, 2], lanes=7)
    assert (together.lanes, apart.lanes) == (4, 4)
    assert len({x.item() for x in together.measured["gap"].flat}) == 4
    for name, x in together.measured.items():
        np.testing.assert_allclose(apart.measured[name], x, rtol=1e-4)
    monkeypatch.undo()
    spare = lanes.run(track, RULES["celgc"], points, bank, [2], lanes=4)
    assert spare.lanes == 4
    np.testing.assert_array_equal(spare.measured["gap"][:, 0], together.measured["gap"][:, 1])


def standing(values, diverged=None, accuracy=True, trials=(), name="celgc"):
    track = dataclasses.replace(tracks.three_numbers(), accuracy=accuracy, resolution=1e-6)
    entry = {
        "measured": {"m": list(values)},
        "diverged": diverged or [False] * len(values),
        "best": {"client_lr": 0.1, "threshold": 1.0},
        "traffic": {"bytes_up": [4.0], "bytes_down": [4.0]},
        "trials": [{"threshold": t, "cost": c} for t, c in trials],
    }
    return standings.Standing(track, name, RULES[name], entry)


def test_rules_are_told_apart_seed_by_seed():
    """A difference that every seed shows counts, though the seeds themselves differ more."""
    first = standing((0.5, 0.7, 0.9))
    assert not first.equals(standing((0.48, 0.68, 0.885)), 1)
    assert first.equals(standing((0.48, 0.72, 0.88)), 1)
    assert first.equals(first, 1)
    assert not first.equals(standing((0.5, 0.7, 0.9), [False, True, False]), 1)
    ratio = standing((1.0, 2.0), accuracy=False).against(standing((0.5, 1.0), accuracy=False), 1)
    assert np.allclose(np.exp(ratio), 2)


def test_the_more_comparisons_the_wider_the_interval():
    """Bonferroni: of ten comparisons each has the level 0.5%."""
    first, other = standing((0.5, 0.7, 0.9)), standing((0.48, 0.68, 0.885))
    assert not other.equals(first, 1)
    assert other.equals(first, 30)
    difference = other.costs - first.costs
    wanted = scipy.stats.t.interval(1 - 0.05 / 10, 2, difference.mean(), scipy.stats.sem(difference))
    assert np.allclose(other.against(first, 10)[1:], wanted)


def test_ranks_are_those_of_the_digits_that_are_shown():
    rows = [standing(values) for values in ((0.93004, 0.93004), (0.92996, 0.92996), (0.9, 0.9), (0.5, 0.5))]
    rows[3] = standing((0.5, 0.5), [True, False])
    assert [row.value() for row in rows[:2]] == ["0.9300 [0.9300, 0.9300]"] * 2
    assert standings.ranks(rows) == ["1=", "1=", "3", "–"]
    assert rows[3].value() == "diverged in 1 of 2"
    assert sorted(rows, key=lambda row: row.order)[-1] is rows[3]
    errors = [standing(values, accuracy=False) for values in ((1e-9, 1e-8), (1e-7, 1e-7), (2e-6, 2e-6))]
    assert [row.value().split(" [")[0] for row in errors] == ["≤ 1e-06", "≤ 1e-06", "2e-06"]
    assert standings.ranks(errors) == ["1=", "1=", "3"]


def test_what_diverges_is_shown(tmp_path, monkeypatch):
    def of(low, high):
        return Rule(
            lambda loss, p: fc.fedavg(loss, optax.sgd(p["client_lr"])), ("client_lr",), {"client_lr": Range(low, high)}
        )

    monkeypatch.setattr(clipbench, "RULES", {"blow_up": of(0.01, 1e5), "never": of(1e3, 1e5)})
    clipbench.bench(["three_numbers"], ["blow_up", "never"], 4, tmp_path, quick=True)
    report = (tmp_path / "report.md").read_text()
    assert (row_of(report, "three_numbers", "never")["distance"], report.count("nobody")) == ("diverged in 2 of 2", 0)
    rows = {name: row_of(report, "three_numbers", name) for name in ("blow_up", "never")}
    assert (rows["never"]["rank"], rows["never"]["failed"], rows["blow_up"]["rank"]) == ("–", "4 of 4", "1")
    summary = next(line for line in report.splitlines() if line.startswith("| three_numbers |"))
    assert summary.startswith("| three_numbers | blow_up |")
    assert summary.endswith("| never |")


def test_rules_that_all_diverge_are_drawn(tmp_path):
    rows = [standing((1.0, 1.0), [True, False], accuracy=False, trials=[(0.1, None), (9.0, None)])]
    rundir.save_picture(tmp_path / "lost.png", clipbench_report.draw(rows[0].track, rows))
    assert (tmp_path / "lost.png").exists()


def test_trials_by_quarter_of_the_range_and_how_many_are_near():
    trials = [(0.1, 3.0), (0.2, None), (0.5, 2.0), (1.0, 0.0), (2.0, 0.5), (29.0, 1.0)]
    row = standing((1.0, 1.0), accuracy=False, trials=trials)
    assert [cost for _, _, cost in row.profile()] == [3.0, 0.0, 0.5, 1.0]
    assert (row.profile()[0][0], row.profile()[-1][1]) == (0.1, 30)
    assert row.tried() == (1, 0, 3)
    assert standing((1.0,), trials=[(0.1, 0.1), (0.2, 0.105), (1.0, 0.09), (2.0, 0.2)]).tried() == (0, 2, 2)
    assert standing((1.0,), trials=trials, name="fedavg").profile() == []


def test_the_interval_is_students():
    values = np.array([[0.1, 0.4, 0.2], [1.0, 2.0, 1.0]])
    _, low, high = standings.interval(values)
    wanted = scipy.stats.t.interval(0.95, 2, np.mean(values[0]), scipy.stats.sem(values[0]))
    assert np.allclose([low[0], high[0]], wanted)
    assert np.isinf(standings.interval(values[:, :1])[1]).all()


def test_every_rule_takes_knobs_that_are_traced():
    """So that all trials are one program."""
    track = dataclasses.replace(tracks.three_numbers(rounds=3), rounds=3)
    bank = lanes.plan(track, track.measuring[:1])
    inputs = bank.nth(bank.arrays, 0)
    for name, rule in RULES.items():
        assert rule.note
        assert set(rule.ranges) <= set(rule.knobs) <= set(PAPER)
        of = functools.partial(lanes.train_one, track, rule)
        out, *_ = jax.eval_shape(of, {k: jnp.float32(0.5) for k in rule.knobs}, inputs, track.data.examples)
        assert out["distance"].shape == (), name


@pytest.mark.parametrize(
    ("flag", "culprit"),
    [
        ("--rules=celgc,episod", "episod"),
        ("--tracks=quartics", "quartics"),
        ("--trials=0", "--trials"),
        ("--trials=5", "even"),
    ],
)
def test_bad_input_ends_in_a_sentence(flag, culprit, tmp_path):
    if flag.startswith("--rules"):
        command = [sys.executable, "-m", "experiments.bench.clip", flag, f"--workdir={tmp_path / 'out'}"]
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert culprit in done.stderr
        assert "did you mean 'episode'?" in done.stderr
        assert not (tmp_path / "out").exists()
        return
    name, value = flag[2:].split("=")
    arguments = {"tracks": ["quartic"], "rules": ["celgc"], "trials": 2}
    with pytest.raises(fc.InvalidInput, match=culprit):
        clipbench.bench(**(arguments | {name: [value] if name == "tracks" else int(value)}), workdir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(fc.InvalidInput, match="cannot be written"):
        clipbench.bench(["quartic"], ["celgc"], 2, tmp_path / "file" / "out")
    (tmp_path / "results.jsonl").write_text("not a result\n")
    with pytest.raises(fc.InvalidInput, match="something else"):
        clipbench.bench(["quartic"], ["celgc"], 2, tmp_path)


def test_the_advice_quotes_the_report():
    """``track rule value`` in docs/choosing-a-clip.md is what docs/clipbench/report.md says.

    ``track rule COLUMN=value`` is another cell of the row, ``track rule@from–to value`` the best trial of a quarter.
    """
    text = " ".join((REPOSITORY / "docs" / "choosing-a-clip.md").read_text().split())
    report = (REPOSITORY / "docs" / "clipbench" / "report.md").read_text()
    value = r"[≤ \d.e+-]+|\d+ of \d+|diverged in \d+ of \d+"
    quoted = re.findall(rf"`([a-z_]+(?:, H=\d)?) ([a-z_0-9]+)(@[\d.–]+)?(?: ([a-z_B ]+)=)? ?({value})`", text)
    assert len(quoted) > 40
    names = {name.split(",")[0] for name in tracks.TRACKS}
    spans = [span for span in text.split("`")[1::2] if re.match(r"[a-z_]+(, H=\d)? [a-z]", span)]
    of_tracks = [span for span in spans if re.split("[, ]", span)[0] in names]
    assert len(quoted) == len(of_tracks), of_tracks
    for track, rule, quarter, column, value in quoted:
        row = row_of(report, track, rule)
        if quarter:
            pairs = list(row.values())[-1].split(", ")
            assert f"{quarter[1:]}: {value}" in pairs, (track, rule, quarter)
        elif column:
            assert row[column] == value, (track, rule, column)
        else:
            found = list(row.values())[2].split(" [")[0]
            assert found == value, (track, rule, found)
