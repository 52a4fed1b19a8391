"""The virtual clock: who answers when, by hand, by brute force, and in a run."""

import math

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ENTRIES, assert_identical, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.data import clock, sampling, speeds


def world(num_clients, steps=1, seed=0):
    return clock.World(np.full(num_clients, 10), lambda ids: np.full(len(ids), steps), seed)


def turns(timepiece, world, rounds):
    timeline = clock.Timeline(timepiece, world)
    return [timeline[r] for r in range(rounds)]


def in_turn(count=1):
    return sampling.round_robin(count)


SPEEDS = [speeds.lognormal(2.0, 0.5), speeds.two_tier(1.0, 3.0, slowdown=4.0, slow=0.25)]


@pytest.mark.parametrize("fleet", SPEEDS)
def test_a_client_is_as_fast_whenever_and_with_whomever_it_is_asked(fleet):
    ids = np.arange(100)
    step, message = fleet.seconds(ids, 3)
    assert np.all(step > 0)
    assert np.all(message > 0)
    again = fleet.seconds(ids[::-7], 3)
    assert np.array_equal(again[0], step[::-7])
    assert np.array_equal(again[1], message[::-7])
    assert not np.array_equal(fleet.seconds(ids, 4)[0], step)


def test_lognormal_speeds_have_their_median_and_spread_and_tiers_their_shares():
    step, message = speeds.lognormal(2.0, 0.5, sigma=0.7).seconds(np.arange(20_000), 0)
    for seconds, median in ((step, 2.0), (message, 0.5)):
        z = np.log(seconds / median) / 0.7
        assert abs(z.mean()) < 5 / np.sqrt(20_000)
        assert abs(z.std() - 1) < 5 / np.sqrt(2 * 20_000)
        assert abs(np.mean(np.abs(z) < 1) - 0.6827) < 0.02
    assert abs(np.corrcoef(np.log(step), np.log(message))[0, 1]) < 0.04
    step, message = speeds.two_tier(1.0, 3.0, slowdown=4.0, slow=0.25).seconds(np.arange(20_000), 0)
    assert set(step) == {1.0, 4.0}
    assert np.array_equal(message, 3 * step)
    assert abs(np.mean(step == 4.0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 20_000)


def test_a_synchronous_round_by_hand():
    """Six clients of one step: due after 5, 1, 9, 2, 4 and 4 seconds, a second of each the message."""
    fleet = speeds.measured(np.array([4.0, 0.5, 8.0, 1.5, 3.0, 3.5]), np.array([1.0, 0.5, 1.0, 0.5, 1.0, 0.5]))

    def two(**options):
        first, second = turns(clock.synchronous(in_turn(6), fleet, **options), world(6), 2)
        assert second.metrics["simulated_seconds"] == 2 * first.metrics["simulated_seconds"]
        return first.ids.tolist(), first.metrics["simulated_seconds"], first.metrics["late"]

    assert two() == ([1, 3, 4, 5, 0, 2], 9.0, 0.0)
    assert two(keep=3) == ([1, 3, 4], 4.0, 3.0)
    assert two(keep=5, deadline=4.5) == ([1, 3, 4, 5], 4.5, 2.0)
    assert two(keep=2, deadline=4.5) == ([1, 3], 2.0, 4.0)
    assert two(deadline=0.5) == ([], 0.5, 6.0)
    assert two(deadline=9.0) == ([1, 3, 4, 5, 0, 2], 9.0, 0.0)


def test_a_buffer_by_hand():
    """Clients 0..4 take 2, 3, 7, 2 and 4 seconds; two fill the buffer, three are at work, asked in turn.

    t=0: 0, 1, 2 are sent x_0.   t=2: 0 answers; 3 is sent x_0 (due 4).   t=3: 1 answers: x_1; 4 is sent x_1 (due 7).
    t=4: 3 answers; 0 is sent x_1 (due 6).   t=6: 0 answers: x_2; 1 is sent x_2 (due 9).   t=7: 2 answers, started
    before 4, who does too: x_3; 3 and 0 (1 is at work, 2 and 4 were asked before) are sent x_3, due 9.
    """
    fleet = speeds.measured(np.array([2.0, 3.0, 7.0, 2.0, 4.0]))
    seen = turns(clock.buffered(in_turn(), fleet, buffer_size=2, concurrency=3), world(5), 3)
    assert [t.ids.tolist() for t in seen] == [[0, 1], [3, 0], [2, 4]]
    assert [t.staleness.tolist() for t in seen] == [[0, 0], [1, 0], [2, 1]]
    assert [t.metrics for t in seen] == [{"simulated_seconds": s, "lost": 0.0} for s in (3.0, 6.0, 7.0)]


def test_steps_take_time():
    fleet = speeds.measured(np.array([2.0]), 0.5)
    assert turns(clock.synchronous(in_turn(), fleet), world(1, steps=3), 2)[1].metrics["simulated_seconds"] == 13.0


def test_with_equal_speeds_and_all_in_the_buffer_it_is_synchronous():
    fleet, whom = speeds.lognormal(1.5, 0.25, sigma=0.0), sampling.uniform(4)
    buffered = turns(clock.buffered(whom, fleet, buffer_size=4, concurrency=4), world(20), 8)
    for turn, waited in zip(buffered, turns(clock.synchronous(whom, fleet), world(20), 8), strict=True):
        assert np.array_equal(turn.ids, waited.ids)
        assert not turn.staleness.any()
        assert turn.metrics["simulated_seconds"] == waited.metrics["simulated_seconds"]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_synchronous_rounds_hold_whoever_was_in_time(data):
    num_clients = data.draw(st.integers(1, 30))
    select = data.draw(st.integers(1, num_clients))
    keep = data.draw(st.none() | st.integers(1, select))
    deadline = data.draw(st.sampled_from([0.3, 1.0, 4.0, math.inf]))
    fleet = data.draw(st.sampled_from(SPEEDS))
    dropout = data.draw(st.sampled_from([0.0, 0.4]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    here = world(num_clients, steps=2, seed=seed)
    whom = sampling.uniform(select)
    now = 0.0
    for r, turn in enumerate(
        turns(clock.synchronous(whom, fleet, keep=keep, deadline=deadline, dropout=dropout), here, 6)
    ):
        step, message = fleet.seconds(np.arange(num_clients), seed)
        due = 2 * step + message
        took, now = turn.metrics["simulated_seconds"] - now, turn.metrics["simulated_seconds"]
        asked = whom.sample(here.sizes, seed, r)
        assert set(turn.ids) <= set(asked)
        assert turn.staleness is None
        assert np.all(np.diff(due[turn.ids]) >= 0)  # in the order of their arrival
        assert np.all(due[turn.ids] <= took * (1 + 1e-9))
        assert took <= deadline * (1 + 1e-9)
        assert len(turn.ids) <= (keep or select)
        assert len(turn.ids) + turn.metrics["late"] + turn.metrics["lost"] == select
        if len(turn.ids) < (keep or select):  # then all who were in time and did not drop out are there
            others = np.setdiff1d(asked, turn.ids)
            assert np.sum(due[others] <= deadline) <= turn.metrics["lost"]
        if dropout == 0:
            assert turn.metrics["lost"] == 0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_buffers_fill_as_answers_arrive(data):
    buffer_size = data.draw(st.integers(1, 5))
    concurrency = data.draw(st.integers(buffer_size, 9))
    num_clients = max(3, concurrency + buffer_size - 1) + data.draw(st.integers(0, 5))
    fleet = data.draw(st.sampled_from([*SPEEDS, speeds.lognormal(1.0, sigma=0.0)]))
    dropout = data.draw(st.sampled_from([0.0, 0.3]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    here = world(num_clients, seed=seed)
    whom = data.draw(st.sampled_from([sampling.uniform(2), in_turn(3), sampling.poisson(1.5), sampling.uniform(1)]))
    timepiece = clock.buffered(whom, fleet, buffer_size=buffer_size, concurrency=concurrency, dropout=dropout)
    seen = turns(timepiece, here, 12)
    step, message = fleet.seconds(np.arange(num_clients), seed)
    stepped = [0.0, *(t.metrics["simulated_seconds"] for t in seen)]  # when x_0, x_1, ... came to be
    assert np.all(np.diff(stepped) >= 0)
    for r, turn in enumerate(seen):
        assert len(set(turn.ids.tolist())) == len(turn.ids) == buffer_size
        assert np.all((turn.staleness >= 0) & (turn.staleness <= r))
        for client, s in zip(turn.ids, turn.staleness, strict=True):
            # Sent x_{r-s} while that was the newest, and back before this round was over, after the last one.
            takes = (step + message)[client]
            assert stepped[r - s] + takes <= stepped[r + 1] * (1 + 1e-9)
            assert stepped[r - s + 1] + takes >= stepped[r] * (1 - 1e-9)
    if dropout == 0:
        started = sum(buffer_size for _ in seen) + concurrency  # at most: those that answered, and those at work
        assert started * (step + message).max() >= stepped[-1] * concurrency * (1 - 1e-9)
        assert not any(t.metrics["lost"] for t in seen)


def test_slow_clients_answer_less_often_and_staler():
    fleet = speeds.two_tier(1.0, slowdown=6.0, slow=0.5)
    seen = turns(clock.buffered(sampling.uniform(5), fleet, buffer_size=5, concurrency=20), world(60), 400)
    slow = fleet.seconds(np.arange(60), 0)[0] > 1
    ids, staleness = np.concatenate([t.ids for t in seen]), np.concatenate([t.staleness for t in seen])
    assert staleness[slow[ids]].mean() > 3 * staleness[~slow[ids]].mean()
    assert np.mean(slow[ids]) < np.mean(slow)


def test_dropouts_are_as_many_as_their_probability():
    fleet = speeds.lognormal()
    seen = turns(clock.synchronous(sampling.uniform(50), fleet, dropout=0.2), world(1000), 200)
    lost = sum(t.metrics["lost"] for t in seen) / 10_000
    assert abs(lost - 0.2) < 5 * 0.4 / 100
    seen = turns(
        clock.buffered(sampling.uniform(50), fleet, buffer_size=50, concurrency=100, dropout=0.2), world(1000), 200
    )
    lost = sum(t.metrics["lost"] for t in seen)
    assert abs(lost / (lost + 10_000) - 0.2) < 5 * 0.4 / 100


@pytest.mark.parametrize("kind", ["synchronous", "buffered"])
def test_any_turn_comes_out_the_same_asked_for_in_any_order(kind):
    if kind == "synchronous":
        timepiece = clock.synchronous(sampling.uniform(5), SPEEDS[0], keep=3, dropout=0.1)
    else:
        timepiece = clock.buffered(sampling.uniform(5), SPEEDS[0], buffer_size=3, concurrency=6, dropout=0.1)
    wanted = turns(timepiece, world(30), 10)
    timeline = clock.Timeline(timepiece, world(30))
    for r in (0, 4, 4, 5, 2, 9, 0):
        assert repr(timeline[r]) == repr(wanted[r])
    assert repr(turns(timepiece, world(30, seed=1), 10)) != repr(wanted)


def test_a_million_clients_cost_what_a_thousand_do():
    asked = []

    def seconds(ids, seed):
        asked.append(len(ids))
        return np.ones(len(ids)), np.zeros(len(ids))

    fleet = speeds.Speeds(seconds)
    for timepiece in (
        clock.buffered(sampling.uniform(50), fleet, buffer_size=50, concurrency=200),
        clock.synchronous(sampling.uniform(65), fleet, keep=50),
    ):
        turns(timepiece, world(1_000_000), 20)
    assert max(asked) <= 65
    assert sum(asked) <= 20 * (65 + 50) + 250


def test_a_sampler_that_names_nobody_free_is_given_up():
    stubborn = sampling.Sampler(lambda *_: np.array([0]))
    timepiece = clock.buffered(stubborn, SPEEDS[0], buffer_size=1, concurrency=2)
    with pytest.raises(fc.InvalidInput, match="no client that is free"):
        turns(timepiece, world(3), 1)


def test_speeds_that_are_not_measured_are_missed():
    with pytest.raises(fc.InvalidInput, match="measured for 2 clients; there is none for client 3"):
        turns(clock.synchronous(in_turn(4), speeds.measured(np.ones(2))), world(4), 1)
    for bad in (np.zeros(3), np.ones((2, 2)), np.array([1.0, np.nan])):
        with pytest.raises(fc.InvalidInput):
            speeds.measured(bad)


def test_a_sampler_with_replacement_cannot_serve_clients_that_keep_a_state():
    waiting = clock.synchronous(sampling.by_size(3, replacement=True), SPEEDS[0])
    with pytest.raises(fc.InvalidInput, match="keep a state"):
        fc.train(ENTRIES["fedavg, stateful link"](), population(), parameters(), rounds=1, sampler=waiting)


def test_privacy_is_not_accounted_for_by_who_is_fast():
    with pytest.raises(fc.InvalidInput, match="nobody can account for a clock"):
        fc.privacy.epsilon(1.0, clock.synchronous(sampling.uniform(5), SPEEDS[0]), 100, rounds=10, delta=1e-5)


def test_noise_covers_a_discounted_update():
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(1.0))
    with pytest.raises(fc.InvalidInput, match="fixed denominator"):
        fc.fedbuff(softmax_loss, optax.sgd(0.1), max_staleness=2, uplink=link)
    algorithm = fc.fedbuff(softmax_loss, optax.sgd(0.1), max_staleness=2, uplink=link, reducer=fc.reduce.fixed_mean(3))
    assert algorithm.init(parameters()).own["w"].shape == (3, 4, 3)


TIMEPIECES = {  # whose cohorts are all of one size, so that a run compiles once
    "synchronous": clock.synchronous(sampling.uniform(5), speeds.lognormal(1.0, 0.5), keep=3),
    "buffered": clock.buffered(
        sampling.uniform(3), speeds.lognormal(1.0, 0.5), buffer_size=3, concurrency=4, dropout=0.2
    ),
}


@pytest.mark.parametrize("name", TIMEPIECES)
def test_a_resumed_run_tells_the_same_time_and_ends_with_the_same_bits(name, tmp_path):
    algorithm = fc.fedbuff(softmax_loss, optax.sgd(0.2), max_staleness=3)

    def train(rounds, **options):
        work = {"batch_size": 4, "local_steps": 2, "rounds_per_dispatch": 2}
        return fc.train(
            algorithm, population(), parameters(), rounds=rounds, sampler=TIMEPIECES[name], **work, **options
        )

    straight = train(9)
    train(4, checkpoints=fc.extend.Checkpoints(tmp_path))
    resumed = train(9, checkpoints=fc.extend.Checkpoints(tmp_path))
    assert_identical(resumed.state[:2], straight.state[:2])
    seconds = [row["simulated_seconds"] for row in straight.history]
    assert [row["simulated_seconds"] for row in resumed.history] == seconds[4:]
    assert np.all(np.diff([0.0, *seconds]) >= 0)
    wanted = turns(TIMEPIECES[name], clock.World(population().sizes, lambda ids: np.full(len(ids), 2), 0), 9)
    assert seconds == [turn.metrics["simulated_seconds"] for turn in wanted]
    if name == "buffered":
        staleness = [row["staleness"] for row in straight.history]
        assert staleness == [np.float32(np.mean(turn.staleness)) for turn in wanted]
        assert max(staleness) > 0
