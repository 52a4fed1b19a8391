"""Streams: every example is there when it should be, and nowhere else; the same bits whoever resumes them."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import parameters, population, softmax_loss

import fedjax_clip as fc
from experiments.config import registry, spec
from fedjax_clip.data import lives
from fedjax_clip.training import identity

streams = fc.data.stream
SIZES = (6, 9, 4, 7, 12, 5)


def seen(cohort, first_round):
    """``{(round, client): example numbers}`` that clients train on."""
    found = {}
    for d, r, s in np.argwhere(cohort.ids >= 0):
        first, steps = cohort.first[d, r, s], cohort.num_steps[d, r, s]
        rows, weight = cohort.batches["n"][d, r], cohort.example_weight[d, r]
        batches = [rows[i][weight[i] > 0].tolist() for i in range(first, first + steps)]
        found[first_round + int(r), int(cohort.ids[d, r, s])] = batches
    return found


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_clients_train_on_the_examples_that_live_and_on_no_others(data):
    sizes = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    total, offsets = sum(sizes), np.concatenate([[0], np.cumsum(sizes)])
    rounds = st.lists(st.integers(0, 6), min_size=total, max_size=total)
    start, end = np.array(data.draw(rounds)), np.array(data.draw(rounds))
    weights = np.arange(1.0, total + 1) if data.draw(st.booleans()) else None
    stream = streams.between(fc.FederatedData({"n": np.arange(total)}, offsets, weights=weights), start, end)
    alive = [{i for i in range(total) if start[i] <= r < end[i]} for r in range(7)]
    own = [set(range(a, b)) for a, b in itertools.pairwise(offsets.tolist())]

    size, work = data.draw(st.integers(1, 4)), fc.extend.LocalWork(data.draw(st.integers(1, 5)))
    draw = fc.data.sampling.poisson(min(size, len(sizes))).sample
    sampler = fc.data.sampling.Sampler(draw)  # cohorts of any size, also of nobody
    first = data.draw(st.integers(0, 6))
    counts = [lives.sizes_of(stream)(r) for r in range(7)]
    assert [c.tolist() for c in counts] == [[len(a & o) for o in own] for a in alive]
    weigh = (lambda i: 1.0) if weights is None else (lambda i: weights[i])
    totals = lives.total_weights(stream, 0, 7)
    np.testing.assert_allclose(totals, [sum(map(weigh, a)) for a in alive])
    present = [set(np.flatnonzero(c).tolist()) for c in counts]
    if any(0 < len(p) < min(size, len(sizes)) for p in present):
        return  # a sampler refuses more clients than there are
    ids = [sampler.draw(counts[r], 3, r) for r in range(first, 7)]
    assert all(set(drawn.tolist()) <= there for drawn, there in zip(ids, present[first:]))

    plan = fc.extend.plan_rounds(stream, ids, work, seed=3, first_round=first, num_devices=2)
    together = seen(plan, first)
    assert sorted(together) == sorted((first + r, int(c)) for r, drawn in enumerate(ids) for c in drawn)
    for (r, c), batches in together.items():
        assert sorted(sum(batches, [])) == sorted(alive[r] & own[c])
        assert all(len(batch) == min(work.batch_size, max(sizes)) for batch in batches[:-1])
        alone = fc.extend.plan_rounds(stream, [np.array([c])], work, seed=3, first_round=r)
        assert seen(alone, r) == {(r, c): batches}  # a function of (seed, round, client)
        assert alone.weight[0, 0, 0] == pytest.approx(sum(map(weigh, alive[r] & own[c])))


def labelled(sizes=SIZES, classes=5, seed=0):
    labels = np.random.default_rng(seed).integers(classes, size=sum(sizes)).astype(np.int32)
    labels[:classes] = np.arange(classes)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return fc.FederatedData({"y": labels, "x": np.arange(sum(sizes))}, offsets, [f"c{i}" for i in range(len(sizes))])


def test_classes_come_in_groups_at_once_or_one_by_one():
    data = labelled()
    y = data.examples["y"]
    sharp = streams.classes(data, groups=3, every=10).lives  # 0 and 1, 2 and 3, 4
    group = np.array([0, 0, 1, 1, 2])[y]
    np.testing.assert_array_equal(sharp[:, 0], 10 * group)
    np.testing.assert_array_equal(sharp[:, 1], np.where(group < 2, 10 * group + 10, streams.ENDLESS))
    assert np.all(streams.classes(data, groups=3, every=10, stay=True).lives[:, 1] == streams.ENDLESS)

    soft = streams.classes(data, groups=3, every=10, over=8).lives
    late = soft - sharp
    assert late[group > 0, 0].min() >= 0
    assert late[group > 0, 0].max() <= 7
    assert len(set(late[group > 0, 0].tolist())) > 3  # each example at its own round
    assert np.all(late[group == 0, 0] == 0)


def test_clients_come_and_leave_and_recent_examples_slide():
    data = labelled()
    late = streams.clients(data, 2, start=7)
    gone = streams.clients(late, ["c0", "c1"], end=9)
    gone = streams.clients(gone, [2], start=1, end=3)
    sizes = lives.sizes_of(gone)
    there = {r: np.flatnonzero(sizes(r)).tolist() for r in (0, 1, 3, 7, 9)}
    assert there == {0: [0, 1, 3], 1: [0, 1, 2, 3], 3: [0, 1, 3], 7: [0, 1, 3, 4, 5], 9: [3, 4, 5]}

    window = streams.in_order(data, rounds=12, window=6)
    for c, r in itertools.product(range(6), range(20)):
        own = window.lives[data.offsets[c] : data.offsets[c + 1]]
        place = np.flatnonzero((own[:, 0] <= r) & (r < own[:, 1]))
        n = SIZES[c]
        assert place.tolist() == [j for j in range(n) if j * 12 // n <= r < j * 12 // n + 6]


def test_drift_shows_each_example_in_one_form_at_a_time():
    data = labelled()
    turned = streams.drift(data, lambda e: {**e, "y": 4 - e["y"]}, at=5, over=6)
    for r in range(14):
        alive = (turned.lives[:, 0] <= r) & (r < turned.lives[:, 1])
        x, y = turned.examples["x"][alive], turned.examples["y"][alive]
        assert sorted(x.tolist()) == list(range(sum(SIZES)))
        changed = y != data.examples["y"][x]
        assert changed.any() == (r >= 5)
        if r >= 11:
            np.testing.assert_array_equal(y, 4 - data.examples["y"][x])
    owner = np.repeat(np.arange(6), data.sizes)
    np.testing.assert_array_equal(owner[turned.examples["x"]], np.repeat(np.arange(6), turned.sizes))


def old_in_buffer(stream, kept, client, round):
    """Examples of a client whose life has ended before a round, and which of them are kept in it."""
    own = np.arange(stream.offsets[client], stream.offsets[client + 1])
    start, end = stream.lives[own].T
    old = own[(end <= round) & (start < end)]
    return old.tolist(), [i for i in old.tolist() if kept.lives[i, 1] > round]


@pytest.mark.parametrize("seed", range(3))
def test_buffers_hold_what_their_sources_say(seed):
    """A reservoir: the smallest random numbers of all that ended. Balanced: no class has two more than another could."""
    data = labelled((30, 41, 5), classes=5, seed=seed)
    stream = streams.classes(data, groups=5, every=3, over=2, seed=seed)
    plain, fair = streams.reservoir(stream, 6, seed), streams.balanced(stream, 6, seed=seed)
    for kept in (plain, fair):
        np.testing.assert_array_equal(kept.lives[:, 0], stream.lives[:, 0])
        assert np.all(kept.lives[:, 1] >= stream.lives[:, 1])
    for client, round in itertools.product(range(3), range(20)):
        old, held = old_in_buffer(stream, plain, client, round)
        assert len(held) == min(6, len(old))
        old, held = old_in_buffer(stream, fair, client, round)
        assert len(held) == min(6, len(old))
        has, may = (np.bincount(data.examples["y"][i], minlength=5) for i in (held, old))
        for k, j in itertools.product(range(5), range(5)):
            assert has[j] == may[j] or has[k] <= has[j] + 1  # k has more only if j has no more to give


def test_a_reservoir_keeps_every_old_example_equally_often():
    data = fc.FederatedData({"x": np.arange(24)}, [0, 24])
    stream = streams.in_order(data, rounds=24, window=4)  # one by one
    kept = [streams.reservoir(stream, 6, seed).lives for seed in range(400)]
    often = np.mean([lives[:, 1] > 30 for lives in kept], axis=0)
    assert np.abs(often - 6 / 24).max() < 4.5 * np.sqrt(0.25 * 0.75 / 400)


def test_held_out_examples_belong_to_the_phase_in_which_such_examples_first_come():
    data = labelled()
    stream = streams.clients(streams.classes(data, groups=2, every=50), 2, start=100)
    parts = streams.phases(stream, data)
    for start, part in parts.items():
        index = part.examples["x"]
        late, new = index >= data.offsets[4], data.examples["y"][index] >= 3
        assert np.all(np.where(late, 100, np.where(new, 50, 0)) == start)
    left_out = (np.arange(sum(SIZES)) >= data.offsets[4]) & (data.examples["y"] < 3)  # gone before these clients come
    assert sum(part.num_examples for part in parts.values()) == np.sum(~left_out)
    strangers = dataclasses.replace(data, names=[f"new{i}" for i in range(6)])
    assert sorted(streams.phases(stream, strangers)) == [0, 50]


# Training


CLIENT_TX = optax.chain(fc.clipping.clip_by_global_norm(0.7), optax.sgd(0.2))
PLAIN = fc.fedavg(softmax_loss, CLIENT_TX)


def stream_of_three():
    data = population(SIZES)
    grown = streams.clients(streams.classes(data, groups=3, every=4), 2, start=8)
    return streams.reservoir(grown, 2)


def train(data, rounds=12, algorithm=PLAIN, **options):
    options = {"cohort_size": 3, "batch_size": 3, "seed": 5, "devices": jax.devices()[:1], **options}
    return fc.train(algorithm, data, parameters(), rounds=rounds, **options)


def test_a_stream_resumes_anywhere_to_the_last_bit_and_notices_another_one(tmp_path):
    stream = stream_of_three()
    whole = train(stream)
    for rounds in (3, 9, 12):
        parted = train(stream, rounds, checkpoints=tmp_path / "run", rounds_per_dispatch=2)
    jax.tree.map(np.testing.assert_array_equal, parted.params, whole.params)
    assert [row["examples"] for row in parted.history] == [row["examples"] for row in whole.history[9:]]
    with pytest.raises(fc.InvalidInput, match="the rounds in which the examples are there have changed"):
        train(streams.between(stream, end=11), 13, checkpoints=tmp_path / "run")
    assert identity.hashes(population()).keys() < identity.hashes(stream).keys()


def test_a_stream_in_which_all_stays_is_no_stream():
    data = population(SIZES)
    plain, same = train(data, 3), train(streams.between(data), 3)
    jax.tree.map(np.testing.assert_array_equal, plain.params, same.params)
    for a, b in zip(plain.history, same.history):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_one_program_trains_all_rounds():
    """As often as without a stream the loss is traced, although clients have ever more examples."""

    def traced(data):
        times = []
        algorithm = fc.fedavg(lambda *args: times.append(1) or softmax_loss(*args), CLIENT_TX)
        train(data, 12, algorithm, rounds_per_dispatch=2)
        return len(times)

    assert traced(stream_of_three()) == traced(population(SIZES))


def test_a_servers_mean_over_clients_counts_those_that_have_not_come_yet():
    algorithm = fc.scaffold(softmax_loss, CLIENT_TX, reducer=fc.reduce.uniform_mean())
    state = train(stream_of_three(), 5, algorithm).state
    assert all(not x[4:].any() and x[:4].any() for x in jax.tree.leaves(state.clients.own))  # two come in round 8
    for c, own in zip(jax.tree.leaves(state.server.own), jax.tree.leaves(state.clients.own)):
        np.testing.assert_allclose(c, np.mean(own, axis=0), rtol=1e-4, atol=1e-6)


def test_a_sweep_over_a_stream_trains_as_train_does():
    stream = stream_of_three()
    options = {"cohort_size": 3, "batch_size": 3, "evaluation": {"all": population()}}
    (swept,) = fc.sweep(
        lambda hyper: fc.fedavg(softmax_loss, optax.sgd(hyper["rate"])),
        {"rate": [0.2]},
        stream,
        parameters(),
        softmax_loss,
        rounds=9,
        seeds=[5],
        **options,
    )
    alone = train(stream, 9, fc.fedavg(softmax_loss, optax.sgd(0.2)))
    scores = fc.evaluator(softmax_loss, {"all": population()})(alone.params)
    assert swept.metrics["eval/all/loss"] == pytest.approx(scores["all/loss"], rel=1e-5)


def test_what_a_stream_cannot_serve_is_said():
    stream = stream_of_three()
    with pytest.raises(
        fc.InvalidInput, match=r"In round 0 of the stream 4 clients have examples. A cohort of 5 clients"
    ):
        train(stream, cohort_size=5)
    clock = fc.data.clock.synchronous(fc.data.sampling.uniform(2), fc.data.speeds.lognormal())
    with pytest.raises(fc.InvalidInput, match="give a stream a sampler"):
        train(stream, cohort_size=None, sampler=clock)
    with pytest.raises(fc.InvalidInput, match=r"Client '4' has no examples in round 1 of the stream"):
        fc.extend.plan(stream, np.array([4]), fc.extend.LocalWork(2), seed=0, round=1)
    with pytest.raises(fc.InvalidInput, match="all examples stay|these stay for ever"):
        streams.reservoir(population(), 3)
    with pytest.raises(fc.InvalidInput, match="no client 'zoe'"):
        streams.clients(labelled(), ["zoe"], start=3)
    with pytest.raises(fc.InvalidInput, match="label='z' is no field of the examples; they have x, y"):
        streams.classes(population(), label="z")
    with pytest.raises(fc.InvalidInput, match="same fields, shapes and types"):
        streams.drift(population(), lambda e: {"x": e["x"]}, at=3)
    with pytest.raises(fc.InvalidInput, match="lives must be two rounds"):
        dataclasses.replace(population(), lives=np.zeros(3, int))
    with pytest.raises(fc.InvalidInput, match="holds no stream"):
        fc.data.sources.save_npz(stream, "stream.npz")
    with pytest.raises(fc.InvalidInput, match="not computed for a stream"):
        work, sampler = fc.extend.LocalWork(2), fc.data.sampling.uniform(2)
        fc.privacy.record_epsilons(1.0, stream, work, sampler, 3, 1e-5)
    task = fc.tasks.stream(fc.tasks.linear_regression(), [lambda data: streams.in_order(data, 5)])
    with pytest.raises(fc.InvalidInput, match="this task is a stream: train without --delta"):
        fc.tasks.refuse_fitted(task)


def test_a_stream_is_written_in_a_flag():
    text = "stream(digits, [classes(groups=2, every=50), clients(3, start=100), balanced(20)])"
    task = spec.one(text, registry.TASKS, "--task")
    names = [
        f"{name}_from_{start}"
        for name, starts in (("examples", (0, 50, 100)), ("clients", (0, 50)))
        for start in starts
    ]
    assert list(task.evaluation) == names
    assert np.array_equal(np.unique(task.data.lives[:, 0]), [0, 50, 100])
    wrong = text.replace("balanced", "balance")
    with pytest.raises(fc.InvalidInput, match='unknown component "balance"; did you mean "balanced"'):
        spec.one(wrong, registry.TASKS, "--task")
    with pytest.raises(fc.InvalidInput, match="text is written in quotes"):
        spec.one("npz(died)", registry.TASKS, "--task")


# Scores


def test_scores_are_their_papers_formulas():
    matrix = np.random.default_rng(0).uniform(size=(5, 5))
    last = len(matrix)
    a = {(k, j): matrix[k - 1, j - 1] for k in range(1, last + 1) for j in range(1, last + 1)}  # as the papers number
    transfer = sum(a[last, i] - a[i, i] for i in range(1, last)) / (last - 1)
    forgot = sum(max(a[k, j] for k in range(1, last)) - a[last, j] for j in range(1, last)) / (last - 1)
    assert streams.average_accuracy(matrix) == pytest.approx(sum(a[last, i] for i in range(1, last + 1)) / last)
    assert streams.backward_transfer(matrix) == pytest.approx(transfer)
    assert streams.forgetting(matrix) == pytest.approx(forgot)

    names = [f"eval/{j}/accuracy" for j in range(5)]
    history = [{"round": 7.0 * (i + 1), **dict(zip(names, row))} for i, row in enumerate(matrix)]
    np.testing.assert_array_equal(streams.accuracies(history, names, [7, 14, 21, 28, 35]), matrix)
    with pytest.raises(fc.InvalidInput, match="no 'eval/0/accuracy' after round 8"):
        streams.accuracies(history, names, [8, 14, 21, 28, 35])
    with pytest.raises(fc.InvalidInput, match=r"must be \[T, T\] with T at least 2"):
        streams.forgetting(np.ones((1, 1)))
