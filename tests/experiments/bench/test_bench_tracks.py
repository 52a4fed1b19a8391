"""ClipBench's problems and rules: outcomes that the literature knows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fedjax_clip as fc
from experiments.bench import tracks
from experiments.bench.core import lanes
from experiments.bench.core.problem import MEASURING, Measure
from experiments.bench.rules import RULES

PAPER = {"client_lr": 0.01, "threshold": 5.0, "server_lr": 1.0}  # of EPISODE's synthetic problem


@pytest.fixture(autouse=True)
def compiled_as_all_tests_are(monkeypatch, unrendered):
    monkeypatch.setattr(lanes, "FAST", {})


def trained(track, rule, points, seeds=1):
    """An outcome on the first measuring runs."""
    rule = RULES[rule]
    points = [{k: p[k] for k in rule.knobs} for p in points]
    return lanes.run(track, rule, points, lanes.plan(track, track.measuring[:seeds], rule.fresh))


@functools.cache
def quartic_ends(rule):
    """``(heterogeneities, starts) -> (last x, drops)`` without noise, at the paper's rate and threshold."""
    measures = {"x": Measure(lambda params, _: params["x"])}
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

    bank = lanes.plan(tracks.heavy_tails(rounds=200), MEASURING[:1])
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


def test_no_two_rules_are_the_same_program():
    names = "fedavg", "celgc", "layer", "coordinate", "delta", "episode", "episode_full"
    assert len({lanes.fingerprint(lanes.probe(), RULES[name]) for name in names}) == len(names)


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
