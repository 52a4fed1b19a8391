"""What all benchmarks share: fair tuning, lanes, intervals and ranks."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from experiments.bench import clip as clipbench
from experiments.bench import tracks
from experiments.bench.core import lanes, problem, standing, table, tuning
from experiments.bench.core.tuning import Range
from experiments.bench.rules import RULES
from experiments.config import rundir


@pytest.fixture(autouse=True)
def compiled_as_all_tests_are(monkeypatch, unrendered):
    monkeypatch.setattr(lanes, "FAST", {})


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


def test_a_fold_is_a_population_of_its_own():
    """Only its clients are drawn, and N is their number: so a memory is of them all."""
    track = dataclasses.replace(tracks.client_sampling(rounds=20), rounds=20)
    runs = [problem.Run(0, np.array([1, 2, 5])), problem.Run(1)]
    bank = lanes.plan(track, runs)
    _, _, everybody, cohorts, _ = bank.nth(bank.arrays, 0)
    assert set(cohorts.ids.ravel()) == {1, 2, 5}
    assert sorted(i for i in everybody.ids if i >= 0) == [1, 2, 5]
    assert set(cohorts.num_clients) == {3}
    assert set(cohorts.total_weight) == {3.0}
    _, _, everybody, cohorts, _ = bank.nth(bank.arrays, 1)
    assert sorted(everybody.ids) == list(range(8))
    assert (set(cohorts.num_clients), set(cohorts.total_weight)) == ({8}, {8.0})


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


def standing_of(values, diverged=None, accuracy=True, trials=(), name="celgc"):
    track = dataclasses.replace(tracks.three_numbers(), accuracy=accuracy, resolution=1e-6)
    entry = {
        "measured": {"m": list(values)},
        "diverged": diverged or [False] * len(values),
        "best": {"client_lr": 0.1, "threshold": 1.0},
        "traffic": {"bytes_up": [4.0], "bytes_down": [4.0]},
        "trials": [{"threshold": t, "cost": c} for t, c in trials],
    }
    return standing.Standing(track, name, RULES[name], entry)


def test_rules_are_told_apart_seed_by_seed():
    """A difference that every seed shows counts, though the seeds themselves differ more."""
    first = standing_of((0.5, 0.7, 0.9))
    assert not first.equals(standing_of((0.48, 0.68, 0.885)), 1)
    assert first.equals(standing_of((0.48, 0.72, 0.88)), 1)
    assert first.equals(first, 1)
    assert not first.equals(standing_of((0.5, 0.7, 0.9), [False, True, False]), 1)
    ratio = standing_of((1.0, 2.0), accuracy=False).against(standing_of((0.5, 1.0), accuracy=False), 1)
    assert np.allclose(np.exp(ratio), 2)


def test_the_more_comparisons_the_wider_the_interval():
    """Bonferroni: of ten comparisons each has the level 0.5%."""
    first, other = standing_of((0.5, 0.7, 0.9)), standing_of((0.48, 0.68, 0.885))
    assert not other.equals(first, 1)
    assert other.equals(first, 30)
    difference = other.costs - first.costs
    wanted = scipy.stats.t.interval(1 - 0.05 / 10, 2, difference.mean(), scipy.stats.sem(difference))
    assert np.allclose(other.against(first, 10)[1:], wanted)


def test_ranks_are_those_of_the_digits_that_are_shown():
    rows = [standing_of(values) for values in ((0.93004, 0.93004), (0.92996, 0.92996), (0.9, 0.9), (0.5, 0.5))]
    rows[3] = standing_of((0.5, 0.5), [True, False])
    assert [row.value() for row in rows[:2]] == ["0.9300 [0.9300, 0.9300]"] * 2
    assert standing.ranks(rows) == ["1=", "1=", "3", "–"]
    assert rows[3].value() == "diverged in 1 of 2"
    assert sorted(rows, key=lambda row: row.order)[-1] is rows[3]
    errors = [standing_of(values, accuracy=False) for values in ((1e-9, 1e-8), (1e-7, 1e-7), (2e-6, 2e-6))]
    assert [row.value().split(" [")[0] for row in errors] == ["≤ 1e-06", "≤ 1e-06", "2e-06"]
    assert standing.ranks(errors) == ["1=", "1=", "3"]


def test_rules_that_all_diverge_are_drawn(tmp_path):
    rows = [standing_of((1.0, 1.0), [True, False], accuracy=False, trials=[(0.1, None), (9.0, None)])]
    rundir.save_picture(tmp_path / "lost.png", clipbench.draw(rows[0].track, rows))
    assert (tmp_path / "lost.png").exists()


def test_trials_by_quarter_of_the_range_and_how_many_are_near():
    trials = [(0.1, 3.0), (0.2, None), (0.5, 2.0), (1.0, 0.0), (2.0, 0.5), (29.0, 1.0)]
    row = standing_of((1.0, 1.0), accuracy=False, trials=trials)
    assert [cost for _, _, cost in row.profile()] == [3.0, 0.0, 0.5, 1.0]
    assert (row.profile()[0][0], row.profile()[-1][1]) == (0.1, 30)
    assert row.tried() == (1, 0, 3)
    assert standing_of((1.0,), trials=[(0.1, 0.1), (0.2, 0.105), (1.0, 0.09), (2.0, 0.2)]).tried() == (0, 2, 2)
    assert standing_of((1.0,), trials=trials, name="fedavg").profile() == []


def test_the_interval_is_students():
    values = np.array([[0.1, 0.4, 0.2], [1.0, 2.0, 1.0]])
    _, low, high = standing.interval(values)
    wanted = scipy.stats.t.interval(0.95, 2, np.mean(values[0]), scipy.stats.sem(values[0]))
    assert np.allclose([low[0], high[0]], wanted)
    assert np.isinf(standing.interval(values[:, :1])[1]).all()


def test_a_bar_in_a_cell_is_no_column():
    assert table.table(["rule", "clips"], [["smoothed", "C g / (C + |g|)"]])[-1] == r"| smoothed | C g / (C + \|g\|) |"
