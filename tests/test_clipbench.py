"""ClipBench: outcomes that the literature knows, and the binary as its user meets it."""

import dataclasses
import functools
import json
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
from test_sources import write_fashion_mnist

import fedjax_clip as fc
from experiments import clipbench, clipbench_report
from experiments import clipbench_lanes as lanes
from experiments import clipbench_tracks as tracks
from experiments.rules import RULES, Rule
from fedjax_clip.clipping import parts

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def compiled_as_all_tests_are(monkeypatch):
    monkeypatch.setattr(lanes, "FAST", {})


@functools.cache
def quartic_ends(rule):
    """``(heterogeneities, starts) -> (last x, late drops)`` without noise, threshold 5."""
    measures = {"x": tracks.Measure(lambda params, _: params["x"])}
    track = dataclasses.replace(tracks.quartic(1.0, noise=0.0), measures=measures)
    cohorts, _ = lanes.plan_seeds(track, 1)

    @functools.partial(jax.jit, compiler_options=lanes.FAST)
    @jax.vmap
    def ends(h, start):
        examples = {"c": jnp.stack([h, -2 * h]), "noise": jnp.zeros(2), "optimum": jnp.zeros(2)}
        out, dropped = lanes.train_one(track, RULES[rule], 5.0, {"x": start}, jax.random.key(0), cohorts, examples)
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
    """Eight steps overflow from 10 on; from 8 they do not yet. Their updates are dropped, so x stays."""
    starts, hs = np.array([4, 8, 10, 50]), np.full(4, 4)
    for rule, survives in {"fedavg": 2, "scaffold": 2, "episode": 4, "celgc": 4}.items():
        x, dropped = quartic_ends(rule)(hs, starts)
        assert np.array_equal(x == starts, np.arange(4) >= survives), rule
        assert np.array_equal(dropped > 0, np.arange(4) >= survives), rule
    assert np.abs(quartic_ends("episode")(hs, starts)[0] - quartic_optimum(4)).max() < 1e-5


@pytest.mark.parametrize(("numbers", "clipped"), [((3, -3, -3), 1.5), ((6, -2, -2, -2), 5 / 3)])
def test_a_clipped_mean_is_biased_and_a_memory_is_not(numbers, clipped):
    """Clipped gradient descent ends where one clipped gradient balances the others: -2.5, or -5/3 in place of 0."""
    track = tracks.three_numbers(numbers)
    for rule in ("celgc", "clip21", "clip21_sgd2m", "normec"):
        distance = lanes.run(track, RULES[rule], [1.0], seeds=1).measured["distance"]
        assert abs(distance - (clipped if rule == "celgc" else 0)) < 1e-4, rule


def test_the_closer_a_clip_is_to_the_noise_the_better_it_bears_heavy_tails():
    def errors(rule, threshold):
        @functools.partial(jax.jit, compiler_options=lanes.FAST)
        @functools.partial(jax.vmap, in_axes=(0, None))
        @functools.partial(jax.vmap, in_axes=(None, 0))
        def of(df, key):
            track = tracks.heavy_tails(df, rounds=200)
            out, _ = lanes.train_one(track, RULES[rule], threshold, track.start(0), key, cohorts, examples)
            return out["squared distance"]

        track = tracks.heavy_tails(rounds=200)
        (cohorts, _), examples = lanes.plan_seeds(track, 1), track.data.examples
        return np.median(of(np.float32([1.2, 1.5]), jax.vmap(jax.random.key)(np.arange(5))), axis=1)

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
    track = tracks.client_sampling()
    gap = {
        rule: lanes.run(track, RULES[rule], [2.5, 5.0], seeds=2).measured["gap"].mean(axis=1)
        for rule in ("episode", "celgc", "episode_plus", "scaffold_clip")
    }
    for good in ("episode_plus", "scaffold_clip"):
        for bad in ("episode", "celgc"):
            assert np.all(1e4 * gap[good] < gap[bad])


def test_a_new_rule_is_in_the_report_by_itself_and_nothing_runs_twice(tmp_path, monkeypatch):
    def half(loss, threshold, client_lr, num_clients):
        tx = optax.chain(fc.clipping.clip_by_global_norm(threshold / 2), optax.sgd(client_lr))
        return fc.fedavg(loss, tx)

    monkeypatch.setitem(RULES, "half", Rule(half, note="half of the threshold"))
    arguments = {"tracks": ["three_numbers"], "rules": ["celgc", "half"], "seeds": 2, "quick": True}
    assert clipbench.bench(workdir=tmp_path, **arguments) == 2
    report = (tmp_path / "report.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("| half |") and "half of the threshold" in line]
    assert (tmp_path / "three_numbers.png").read_bytes().startswith(b"\x89PNG")

    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    halved, celgc = json.loads(lines[1]), json.loads(lines[0])
    assert halved["rule"] == "half"
    assert halved["measured"] != celgc["measured"]
    assert clipbench.bench(workdir=tmp_path, **arguments) == 0
    assert (tmp_path / "results.jsonl").read_text() == "".join(lines)
    assert (tmp_path / "report.md").read_text() == report

    (tmp_path / "results.jsonl").write_text(lines[0] + lines[1][:-20])  # killed while it wrote
    assert clipbench.bench(workdir=tmp_path, **arguments, should_stop=lambda: True) == 0
    assert clipbench.bench(workdir=tmp_path, **arguments) == 1
    again = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert again[1]["measured"] == halved["measured"]
    assert clipbench.bench(workdir=tmp_path, **(arguments | {"rules": ["celgc"], "quick": False})) == 1  # another grid


def test_what_has_changed_runs_again(tmp_path, monkeypatch):
    """A rule that computes something else, be it for its entry or for the library; data; but not a note."""

    def run_again():
        return clipbench.bench(["three_numbers"], ["celgc"], 1, tmp_path, quick=True)

    celgc, hard = RULES["celgc"], parts.hard
    assert run_again() == 1
    monkeypatch.setitem(RULES, "celgc", dataclasses.replace(celgc, note="other words", uploads=2))
    assert run_again() == 0
    monkeypatch.setattr(parts, "hard", lambda: lambda norm, threshold: 0.9 * hard()(norm, threshold))
    assert (run_again(), run_again()) == (1, 0)
    monkeypatch.setattr(parts, "hard", lambda: lambda norm, threshold: 0.8 * hard()(norm, threshold))
    assert run_again() == 1
    monkeypatch.setitem(tracks.TRACKS, "three_numbers", lambda: [tracks.three_numbers((3, -3, -4))])
    assert run_again() == 1


def test_no_two_rules_are_the_same_program():
    assert (
        len(
            {
                lanes.fingerprint(lanes.probe(), RULES[name])
                for name in ("fedavg", "celgc", "layer", "coordinate", "delta")
            }
        )
        == 5
    )


def summary_of(report, track):
    return next(line for line in report.splitlines() if line.startswith(f"| {track} |"))


def test_digits_are_learnt_with_a_clip_and_without(tmp_path):
    clipbench.bench(["digits"], ["celgc", "fedavg"], 1, tmp_path, quick=True)
    report = (tmp_path / "report.md").read_text()
    assert summary_of(report, "digits").split("|")[2].strip() in ("celgc", "fedavg")
    for rule in ("celgc", "fedavg"):
        row = summary_of(report[report.index("## digits") :], rule)
        assert float(row.split("|")[3].split("[")[0]) > 0.6, row  # chance is 0.1


def test_fashion_mnist_is_a_track_where_it_is_there(tmp_path, monkeypatch, capsys):
    read = fc.sources.fashion_mnist
    monkeypatch.setattr(fc.sources, "fashion_mnist", functools.partial(read, directory=tmp_path))
    few = {name: tracks.TRACKS[name] for name in ("three_numbers", "fashion_mnist")}
    monkeypatch.setattr(clipbench, "TRACKS", few)
    with pytest.raises(fc.InvalidInput, match="apt-get install dataset-fashion-mnist"):
        clipbench.bench(["fashion_mnist"], ["celgc"], 1, tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()
    assert clipbench.bench(None, ["celgc"], 1, tmp_path / "out", quick=True) == 1
    missing = [line for line in capsys.readouterr().err.splitlines() if "Without the track fashion_mnist" in line]
    assert len(missing) == 1
    assert "apt-get install dataset-fashion-mnist" in missing[0]

    for split in ("train", "t10k"):
        write_fashion_mnist(tmp_path, split, 200)
    assert clipbench.bench(None, ["celgc"], 1, tmp_path / "out", quick=True) == 1
    assert summary_of((tmp_path / "out" / "report.md").read_text(), "fashion_mnist")


def test_lanes_one_by_one_are_lanes_side_by_side(monkeypatch):
    track = dataclasses.replace(tracks.client_sampling(rounds=20), rounds=20)
    together = lanes.run(track, RULES["celgc"], [1.0, 5.0], 2)
    monkeypatch.setattr(lanes, "SMALL", 0)
    monkeypatch.setattr(lanes, "_PROGRAMS", {})
    apart = lanes.run(track, RULES["celgc"], [1.0, 5.0], 2)
    assert len({x.item() for x in together.measured["gap"].flat}) == 4
    for name, x in together.measured.items():
        np.testing.assert_allclose(apart.measured[name], x, rtol=1e-4)


def test_rules_are_told_apart_seed_by_seed():
    """A difference that every seed shows counts, though the seeds themselves differ more."""
    track = dataclasses.replace(tracks.three_numbers(), accuracy=True)

    def row(*values):
        entry = {"config": {"grid": [1.0]}, "measured": {"m": [values]}, "diverged": [[False] * len(values)]}
        timings = {"compile_seconds": 0.0, "run_seconds": 0.0}
        return clipbench_report.Standing.of(track, "celgc", RULES["celgc"], entry | timings)

    first = row(0.5, 0.7, 0.9)
    assert not first.equals(row(0.48, 0.68, 0.885), track)
    assert first.equals(row(0.48, 0.72, 0.88), track)
    assert first.equals(first, track)


def test_what_diverges_is_shown(tmp_path, monkeypatch):
    blow_up = Rule(lambda loss, c, lr, n: fc.fedavg(loss, optax.sgd(c)), grid=(0.05, 1e3), note="knob: the rate")
    monkeypatch.setattr(clipbench, "RULES", {"blow_up": blow_up, "never": dataclasses.replace(blow_up, grid=(1e3,))})
    clipbench.bench(["three_numbers"], ["blow_up", "never"], 1, tmp_path, quick=True)
    report = (tmp_path / "report.md").read_text()
    assert "1 of 2" in report
    assert "| never | 1000 | diverged |" in report
    assert report.count("nobody") == 0
    summary = next(line for line in report.splitlines() if line.startswith("| three_numbers |"))
    assert summary.startswith("| three_numbers | blow_up | 0.05 |")
    assert summary.endswith("| never |")


def standing(values, accuracy=True):
    track = dataclasses.replace(tracks.three_numbers(), accuracy=accuracy, resolution=1e-6)
    entry = {
        "config": {"grid": [1.0, 2.0, 4.0, 8.0]},
        "measured": {"m": [[v] for v in values]},
        "diverged": [[v is None] for v in values],
        "compile_seconds": 0.0,
        "run_seconds": 0.0,
    }
    return track, clipbench_report.Standing.of(track, "celgc", RULES["celgc"], entry)


@pytest.mark.parametrize(
    ("values", "accuracy", "best", "width"),
    [
        ((0.5, 0.90, 0.905, 0.5), True, 2, "2×"),
        ((0.5, 0.90, 0.905, None), True, 2, "2×"),
        ((0.90, 0.90, 0.90, 0.90), True, 0, "≥ 8×"),
        ((1.0, 0.5, 0.52, 3.0), False, 1, "2×"),
        ((None, None, 0.52, 3.0), False, 2, "1×"),
        ((None, None, None, None), False, 0, "–"),
    ],
)
def test_the_width_is_that_of_the_range_around_the_best(values, accuracy, best, width):
    track, row = standing(values, accuracy)
    assert (row.best, row.width(track)) == (best, width)


def test_the_interval_is_students():
    values = np.array([[0.1, 0.4, 0.2], [1.0, np.inf, 1.0]])
    centre, low, high = clipbench_report.interval(values, median=False)
    wanted = scipy.stats.t.interval(0.95, 2, np.mean(values[0]), scipy.stats.sem(values[0]))
    assert np.allclose([low[0], high[0]], wanted)
    assert centre[1] == np.inf
    assert clipbench_report.interval(values, median=True)[0].tolist() == [0.2, 1.0]


def test_every_rule_takes_a_threshold_that_is_traced():
    """So that a grid is one program."""
    track = tracks.three_numbers(rounds=3)
    cohorts, _ = lanes.plan_seeds(track, 1)
    for name, rule in RULES.items():
        assert rule.note
        assert rule.uploads in (1, 2)
        of = functools.partial(lanes.train_one, track, rule)
        args = jnp.float32(0.5), {"x": jnp.float32(0)}, jax.random.key(0), cohorts, track.data.examples
        out, _ = jax.eval_shape(of, *args)
        assert out["distance"].shape == (), name


@pytest.mark.parametrize(
    ("flag", "culprit"),
    [("--rules=celgc,episod", "episod"), ("--tracks=quartics", "quartics"), ("--seeds=0", "--seeds")],
)
def test_bad_input_ends_in_a_sentence(flag, culprit, tmp_path):
    if flag.startswith("--rules"):
        command = [sys.executable, "-m", "experiments.clipbench", flag, f"--workdir={tmp_path / 'out'}"]
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
    arguments = {"tracks": ["quartic"], "rules": ["celgc"], "seeds": 1}
    with pytest.raises(fc.InvalidInput, match=culprit):
        clipbench.bench(**(arguments | {name: [value] if name == "tracks" else int(value)}), workdir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(fc.InvalidInput, match="cannot be written"):
        clipbench.bench(["quartic"], ["celgc"], 1, tmp_path / "file" / "out")
    (tmp_path / "results.jsonl").write_text("not a result\n")
    with pytest.raises(fc.InvalidInput, match="something else"):
        clipbench.bench(["quartic"], ["celgc"], 1, tmp_path)


def test_the_advice_quotes_the_report():
    """``track rule@threshold value`` in docs/choosing-a-clip.md is what docs/clipbench/report.md says."""
    text = " ".join((REPOSITORY / "docs" / "choosing-a-clip.md").read_text().split())
    report = (REPOSITORY / "docs" / "clipbench" / "report.md").read_text()
    quoted = re.findall(r"`([a-z_]+(?:, H=\d)?) ([a-z_0-9]+)(?:@([\d.]+))? ([\d.e+-]+)`", text)
    assert len(quoted) > 50
    of_tracks = [span for span in text.split("`")[1::2] if " " in span and re.split("[, ]", span)[0] in tracks.TRACKS]
    assert len(quoted) == len(of_tracks)
    for track, rule, threshold, value in quoted:
        section = report[report.index(f"## {track}\n") :]
        row = [cell.strip() for cell in re.search(rf"^\| {rule} \|.*$", section, re.M).group().split("|")[1:-1]]
        found = dict(pair.split(": ") for pair in row[-1].split(", ")) if threshold else {"": row[2].split()[0]}
        assert found[threshold] == value, (track, rule, threshold)
