"""Corrections, travelling moments and selection: row by row with the oracles, and their limiting cases."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import corrections as oracle
from oracles import rounds as plain
from oracles import selection
from problems import Run, assert_close, assert_identical, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.algorithms.drift import oort

BATCH, LR = 2, 0.1
EQUAL, RAGGED = (4, 4, 4, 4), (4, 8, 2, 6)
COHORTS = [[0, 2, 3], [1, 3], [3, 0, 1], [2, 1], [0, 1, 2, 3]]
WORK = fc.extend.LocalWork(BATCH, shuffle=False)
UNIFORM = fc.reduce.uniform_mean()
B, W = np.arange(3), 3 + np.arange(12)  # the places of the leaves in a flat vector, in their order


@functools.cache
def people(sizes):
    return population(sizes)


def flat(tree):
    return np.concatenate([np.ravel(tree["b"]), np.ravel(tree["w"])]).astype(np.float64)


START = flat(parameters())


def examples(sizes, i, step):
    start, stop = people(sizes).offsets[i : i + 2]
    first = start + BATCH * step
    return (people(sizes).examples[k][first : min(first + BATCH, stop)] for k in "xy")


def gradient(sizes, i, v, step, round):
    x, y = examples(sizes, i, step)
    logits = x @ v[W].reshape(4, 3) + v[B]
    slopes = np.exp(logits - logits.max(-1, keepdims=True))
    slopes = (slopes / slopes.sum(-1, keepdims=True) - np.eye(3)[y]) / len(y)
    return np.concatenate([slopes.sum(0), (x.T @ slopes).ravel()])


def setting(sizes):
    """The first arguments of an oracle."""
    return START, functools.partial(gradient, sizes), COHORTS, [n // BATCH for n in sizes], LR


def trained(make, sizes=EQUAL, cohorts=COHORTS, loss=softmax_loss, tx=None, **options):
    """``(server, client states, metrics)`` after the rounds."""
    algorithm = make(loss, optax.sgd(LR) if tx is None else tx, **options)
    return Run(algorithm, people(sizes), WORK).rounds(parameters(), cohorts)


def check(server, rows, rtol=2e-4, atol=2e-5):
    np.testing.assert_allclose(flat(server.params), rows["x"][-1], rtol=rtol, atol=atol)


def test_fedcm_is_the_oracles():
    make = functools.partial(fc.drift.fedcm, alpha=0.3, rate=LR)
    rows = oracle.fedcm(*setting(EQUAL), 0.3)
    server, _, history = trained(make, reducer=UNIFORM)
    check(server, rows)
    np.testing.assert_allclose(flat(server.own), rows["D"][-1], rtol=1e-3, atol=1e-5)
    assert history[-1]["direction_norm"] == pytest.approx(np.linalg.norm(rows["D"][-1]), rel=1e-3)
    told, _, said = trained(make, reducer=UNIFORM, steps=2)
    assert_close((told.params, told.own), (server.params, server.own))
    assert said[0]["bytes_up"] == history[0]["bytes_up"] - 3 * 4  # no number of steps


def test_fedcm_of_unequal_steps_keeps_the_paths_length():
    """D is the mean path over the mean number of steps; the oracle divides each path by its own."""
    server, _, _ = trained(functools.partial(fc.drift.fedcm, alpha=0.3, rate=LR), RAGGED, COHORTS[:1], reducer=UNIFORM)
    moved = flat(server.params) - START
    np.testing.assert_allclose(flat(server.own), -moved / (LR * np.mean([2, 1, 3])), rtol=1e-4, atol=1e-6)


def test_fedcm_of_alpha_one_is_fedavg_to_the_bit():
    server, _, _ = trained(functools.partial(fc.drift.fedcm, alpha=1.0, rate=LR), RAGGED)
    assert_identical(server.params, trained(fc.fedavg, RAGGED)[0].params)


def test_fedcm_takes_noise_once_it_is_told_the_steps():
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.2), fc.uplink.gaussian(0.1))
    make = functools.partial(fc.drift.fedcm, alpha=0.3, rate=LR, uplink=link, reducer=fc.reduce.fixed_mean(3))
    with pytest.raises(fc.InvalidInput, match="noise"):
        make(softmax_loss, optax.sgd(LR))
    server, _, _ = trained(functools.partial(make, steps=2), cohorts=COHORTS[:1])
    moved = flat(server.params) - START
    np.testing.assert_allclose(flat(server.own), -moved / (LR * 2), rtol=1e-4, atol=1e-6)  # of what was released


def test_sharpness_aware_is_the_oracles_and_of_radius_zero_plain():
    for rho in (0.0, 0.3):
        server, _, _ = trained(fc.fedavg, RAGGED, reducer=UNIFORM, gradient=fc.local.sharpness_aware(rho))
        check(server, oracle.fedsam(*setting(RAGGED), rho))
        if rho == 0:
            assert_identical(server.params, trained(fc.fedavg, RAGGED, reducer=UNIFORM)[0].params)
    per_example = fc.local.per_example_gradient(fc.clipping.clip_by_global_norm(0.3))
    plainly, _, _ = trained(fc.scaffold, gradient=per_example)
    sharply, _, _ = trained(fc.scaffold, gradient=fc.local.sharpness_aware(0.0, per_example))
    assert_identical(sharply, plainly)
    with pytest.raises(fc.InvalidInput, match="counts one"):
        fc.local.sharpness_aware(0.1, fc.local.private_gradient(1.0, 1.0))
    with pytest.raises(fc.InvalidInput, match="rho"):
        fc.local.sharpness_aware(-0.1)


def test_sharpness_aware_stays_where_the_gradient_is_zero():
    batch = {"x": jnp.zeros((2, 4)), "y": jnp.zeros(2, jnp.int32)}
    got, _ = fc.local.sharpness_aware(0.5)(
        lambda params, batch, key: 0 * params["w"].sum() + batch["x"][:, 0], parameters(), batch, jnp.ones(2), None
    )
    assert_identical(got, jax.tree.map(jnp.zeros_like, got))


@pytest.mark.parametrize("p", [1.0, 0.4])
def test_scaffnew_is_the_oracles(p):
    everyone = [[0, 1, 2, 3]] * 4
    server, clients, history = trained(
        functools.partial(fc.drift.scaffnew, p=p, rate=LR), (8, 8, 8, 8), everyone, reducer=UNIFORM
    )
    took = [int(min(row["coin"], 4)) for row in history]
    coins = [last == k + 1 for last in took for k in range(last)]
    rows = oracle.scaffnew(START, functools.partial(gradient, (8, 8, 8, 8)), coins, 4, LR, p)
    np.testing.assert_allclose(flat(server.params), rows["x"][-1, 0], rtol=2e-4, atol=2e-5)
    h = np.concatenate([clients.own[0]["b"], clients.own[0]["w"].reshape(4, -1)], axis=1)
    np.testing.assert_allclose(h, rows["h"][-1], rtol=1e-3, atol=1e-4)


def test_scaffnew_keeps_the_mean_of_its_variates_zero_under_sampling():
    _, clients, history = trained(functools.partial(fc.drift.scaffnew, p=0.5, rate=LR), reducer=UNIFORM)
    assert len({row["coin"] for row in history}) > 1
    h = jax.tree.leaves(clients.own[0])
    assert all(np.abs(x).max() > 1e-3 for x in h)
    assert all(np.abs(x.sum(0)).max() < 1e-5 for x in h)


def test_scaffnew_of_p_one_is_one_gradient_step():
    server, _, _ = trained(functools.partial(fc.drift.scaffnew, p=1.0, rate=LR), cohorts=[[0, 1, 2, 3]] * 3)
    one = fc.extend.LocalWork(BATCH, steps=1, shuffle=False)
    expected = Run(fc.fedavg(softmax_loss, optax.sgd(LR)), people(EQUAL), one).rounds(parameters(), [[0, 1, 2, 3]] * 3)
    assert_close(server.params, expected[0].params)


@pytest.mark.parametrize("by_leaf", [True, False])
def test_fedadamw_is_the_oracles(by_leaf):
    blocks = [B, W] if by_leaf else [[i] for i in range(15)]
    options = {"alpha": 0.4, "b1": 0.8, "b2": 0.9, "eps": 1e-3}
    rows = oracle.fedadamw(*setting(EQUAL), lam=0.05, blocks=blocks, **options)
    make = functools.partial(fc.drift.fedadamw, rate=LR, decay=0.05, by_leaf=by_leaf, **options)
    server, _, _ = trained(make, reducer=UNIFORM)
    check(server, rows, 1e-3, 1e-4)
    np.testing.assert_allclose(flat(server.own.direction), rows["D"][-1], rtol=1e-2, atol=1e-3)
    second = jax.tree.map(lambda v, x: np.broadcast_to(v, x.shape), server.own.second, server.params)
    np.testing.assert_allclose(flat(second), rows["V"][-1], rtol=1e-3, atol=1e-6)
    assert float(server.own.steps) == 2 * len(COHORTS)


def test_fedadamw_in_its_first_round_without_correction_is_adamw_at_each_client():
    make = functools.partial(fc.drift.fedadamw, rate=LR, alpha=0.0, decay=0.05)
    expected = trained(fc.fedavg, RAGGED, COHORTS[:1], tx=optax.adamw(LR, weight_decay=0.05))[0]
    assert_close(trained(make, RAGGED, COHORTS[:1])[0].params, expected.params)


def test_fedmuon_is_the_oracles():
    rows = oracle.fedmuon(*setting(EQUAL), alpha=0.4, beta=0.8, matrices=[(W, (4, 3))])
    server, _, _ = trained(functools.partial(fc.drift.fedmuon, rate=LR, alpha=0.4, beta=0.8), reducer=UNIFORM)
    check(server, rows, 1e-3, 1e-4)
    np.testing.assert_allclose(flat(server.own.momentum), rows["M"][-1], rtol=1e-3, atol=1e-4)


def test_fedmuon_without_matrices_and_momentum_is_fedavg():
    def vectors(params, batch, key):
        return softmax_loss({"w": params["w"].reshape(4, 3), "b": params["b"]}, batch, key)

    start = {"w": parameters()["w"].ravel(), "b": parameters()["b"]}
    results = [
        Run(make(vectors, optax.sgd(LR)), people(RAGGED), WORK).rounds(start, COHORTS)[0].params
        for make in (functools.partial(fc.drift.fedmuon, rate=LR, alpha=0.0, beta=0.0), fc.fedavg)
    ]
    assert_close(*results)


def test_a_clip_of_raw_gradients_stands_before_the_moments():
    clip = fc.clipping.clip_by_global_norm(0.1)
    for make in (fc.drift.fedadamw, fc.drift.fedmuon):
        _, _, history = trained(functools.partial(make, rate=LR, gradient_tx=clip), cohorts=COHORTS[:1])
        assert history[0]["clipped_steps"] == 1.0


def calibrated_loss(params, batch, key):
    logits = fc.drift.calibrated(batch["x"] @ params["w"] + params["b"], batch)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def calibrated_gradient(sizes, tau, i, v, step, round):
    x, y = examples(sizes, i, step)
    start, stop = people(sizes).offsets[i : i + 2]
    counts = np.bincount(people(sizes).examples["y"][start:stop], minlength=3)
    _, slopes = oracle.fedlc_loss(x @ v[W].reshape(4, 3) + v[B], y, counts, tau, own=True)
    slopes = slopes / len(y)
    return np.concatenate([slopes.sum(0), (x.T @ slopes).ravel()])


@pytest.mark.parametrize("epochs", [1, 2])
def test_fedlc_is_the_oracles(epochs):
    start, _, cohorts, steps, rate = setting(RAGGED)

    def again(i, v, step, round):
        return calibrated_gradient(RAGGED, 0.8, i, v, step % steps[i], round)

    algorithm = fc.drift.fedlc(fc.fedavg(calibrated_loss, optax.sgd(LR), reducer=UNIFORM), 0.8, classes=3)
    work = fc.extend.LocalWork(BATCH, epochs=epochs, shuffle=False)
    rows = plain.fedavg(start, again, cohorts[:2], [epochs * n for n in steps], rate)
    server, _, _ = Run(algorithm, people(RAGGED), work).rounds(parameters(), cohorts[:2])
    check(server, rows)


def test_fedlc_of_temperature_zero_is_the_algorithm_to_the_bit():
    for make in (fc.fedavg, fc.scaffold):
        calibrating = functools.partial(lambda make, *a, **k: fc.drift.fedlc(make(*a, **k), 0.0, classes=3), make)
        assert_identical(trained(calibrating, RAGGED, loss=calibrated_loss)[0], trained(make, RAGGED)[0])


def test_fedlc_refuses_what_it_could_not_calibrate():
    with pytest.raises(fc.InvalidInput, match="does not look at the margins"):
        trained(lambda *a: fc.drift.fedlc(fc.fedavg(*a), 1.0, classes=3))
    with pytest.raises(fc.InvalidInput, match="integers 'label'"):
        trained(lambda *a: fc.drift.fedlc(fc.fedavg(*a), 1.0, classes=3, label="label"), loss=calibrated_loss)
    with pytest.raises(fc.InvalidInput, match="temperature"):
        fc.drift.fedlc(fc.fedavg(calibrated_loss, optax.sgd(LR)), -1.0, classes=3)


@pytest.mark.parametrize("weighted", [True, False])
def test_fedexp_is_the_oracles(weighted):
    rows = oracle.fedexp(*setting(EQUAL)[:2], [[0, 1, 2, 3]] * 5, [2] * 4, LR, 1e-3)
    reducer = fc.reduce.weighted_mean() if weighted else UNIFORM  # of equal clients
    server, _, _ = trained(
        fc.fedavg, cohorts=[[0, 1, 2, 3]] * 5, uplink=fc.uplink.fedexp(epsilon=1e-3), reducer=reducer
    )
    check(server, rows)
    assert max(rows["eta_g"]) > 1  # it extrapolates


def losses(v):
    """Of each client at a flat vector: the mean over its examples."""
    sizes = people(RAGGED).offsets
    x, y = (people(RAGGED).examples[k] for k in "xy")
    logits = x @ v[W].reshape(4, 3) + v[B]
    every = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(y)), y]
    return np.array([every[start:stop].mean() for start, stop in itertools.pairwise(sizes)])


@pytest.mark.parametrize("make", [fc.fedavg, fc.scaffold])
def test_power_of_choice_trains_the_oracles_clients(make):
    rows = [START]
    chosen = []
    for ids in COHORTS:  # at each round from what plain training has made of the clients chosen so far
        chosen.append(selection.power_of_choice(losses(rows[-1]), ids, 2))
        expected, clients, _ = trained(make, RAGGED, chosen, reducer=UNIFORM)
        rows.append(flat(expected.params))
    assert chosen != [ids[:2] for ids in COHORTS]
    choosing = lambda *a, **k: fc.drift.power_of_choice(make(*a, **k), 2)  # noqa: E731
    server, states, history = trained(choosing, RAGGED, reducer=UNIFORM)
    assert_close((server, states), (expected, clients))
    assert [(row["clients"], row["asked"]) for row in history] == [(2, len(ids)) for ids in COHORTS]
    assert [row["candidates"] for row in history] == [len(ids) for ids in COHORTS]


def test_power_of_choice_of_all_candidates_is_the_algorithm():
    every = lambda *a, **k: fc.drift.power_of_choice(fc.scaffold(*a, **k), 4)  # noqa: E731
    server, states, _ = trained(every, RAGGED)
    assert_close((server, states), trained(fc.scaffold, RAGGED)[:2])


def test_whoever_trains_was_sent_the_model_once_whatever_is_sent():
    """As asked candidates of Power-of-Choice and Oort they have it; a code on the way down changes its price alone."""
    same = lambda algorithm: algorithm  # noqa: E731
    wrappers = (same, lambda a: fc.drift.power_of_choice(a, 2), lambda a: fc.drift.oort(a, 4, 4))
    for outside in (same, lambda a: fc.compressed_broadcast(a, fc.compression.qsgd(8))):
        makers = [lambda *a, i=inside, o=outside, **k: o(i(fc.fedavg(*a, **k))) for inside in wrappers]
        sent = [[row["bytes_down"] for row in trained(make, RAGGED)[2]] for make in makers]
        assert sent[1:] == [sent[0]] * 2


def test_power_of_choice_refuses_what_would_hide_the_losses():
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.2), fc.uplink.gaussian(0.1))
    private = fc.fedavg(softmax_loss, optax.sgd(LR), uplink=link, reducer=fc.reduce.fixed_mean(3))
    with pytest.raises(fc.InvalidInput, match="covers"):
        fc.drift.power_of_choice(private, 2)
    with pytest.raises(fc.InvalidInput, match="round before round 1"):
        fc.drift.power_of_choice(fc.episode_plus(softmax_loss, optax.sgd(LR), threshold=0.3), 2)
    with pytest.raises(fc.InvalidInput, match="clients"):
        fc.drift.power_of_choice(fc.fedavg(softmax_loss, optax.sgd(LR)), 0)


# Oort


@pytest.mark.parametrize(("number", "preferred"), [(1, np.inf), (7, np.inf), (7, 1.5)])
def test_oorts_utilities_are_the_oracles(number, preferred):
    rng = np.random.default_rng(number)
    tried = np.arange(12) % 3 > 0
    stat, last = rng.uniform(1, 9, 12), rng.integers(1, number + 1, 12)
    seconds = rng.uniform(1, 3, 12)
    durations = None if preferred == np.inf else seconds[tried]
    want = selection.oort_utilities(stat[tried], last[tried], number, durations, preferred, normalise=True)
    given = (np.float32(stat), np.int32(last), tried, jnp.int32(number), np.float32(seconds))
    got = np.asarray(oort.utilities(*given, preferred, 2.0))
    np.testing.assert_allclose(got[tried], want, rtol=1e-5, atol=1e-6)
    assert not got[~tried].any()


def choosing(clients=2, **options):
    return lambda *a, **k: fc.drift.oort(fc.fedavg(*a, **k), clients, 4, **options)


def test_oort_remembers_the_oracles_statistical_utility_at_the_servers_model():
    server, _, _ = trained(choosing(), RAGGED, [[0, 1, 2, 3]])
    tried, _ = server.own
    assert (tried.last > 0).sum() == 2
    x, y = (people(RAGGED).examples[k] for k in "xy")
    logits = x @ START[W].reshape(4, 3) + START[B]
    every = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(y)), y]
    bounds = people(RAGGED).offsets
    want = [selection.oort_statistical(every[i:j]) for i, j in itertools.pairwise(bounds)]
    np.testing.assert_allclose(tried.utility * np.mean(RAGGED), np.where(tried.last > 0, want, 0), rtol=1e-5)


def test_oort_tries_everybody_and_then_those_of_the_pool():
    """Without exploration: the first two come in again unless others are of more use."""
    server, _, history = trained(choosing(first=1.0, least=0.0, decay=0.0), RAGGED, [[0, 1, 2, 3]] * 2)
    tried, _ = server.own
    assert [row["explored"] for row in history] == [2, 2]  # round 1 explores, round 2 does not
    assert sorted(tried.last.tolist()) == [0, 0, 2, 2]
    _, _, history = trained(choosing(first=1.0, least=1.0), RAGGED, [[0, 1, 2, 3]] * 3)
    assert [row["explored"] for row in history] == [2, 4, 4]
    assert [row["clients"] for row in history] == [2, 2, 2]


def test_oort_draws_from_its_pool_in_proportion():
    """One place for two clients of unequal utility, 400 rounds of their own keys."""
    algorithm = choosing(1, first=0.0, least=0.0, confidence=0.0)(softmax_loss, optax.sgd(LR))
    run = Run(algorithm, people(EQUAL), WORK)
    server, clients = run.start(parameters())
    tried = fc.drift.Tried(jnp.float32([9, 2, 5, 0]), jnp.int32([1, 1, 1, 0]))
    cohort = jax.tree.map(lambda x: x[0], run.cohort([0, 1, 2], 0, clients))

    @jax.jit
    def who(key):
        before = server._replace(own=(tried, ()), round=jnp.int32(4))
        return jnp.argmax(algorithm.round(before, cohort, key)[0].own[0].last)

    seen = np.bincount([who(jax.random.key(s)) for s in range(400)], minlength=3)
    utility = selection.oort_utilities([9, 2, 5], [1, 1, 1], 5, normalise=True)
    ids, chances = selection.oort_pool(utility, 1, confidence=0.0)
    assert ids == [0, 1, 2]
    np.testing.assert_allclose(seen / 400, chances, atol=4 * 0.5 / 20)


def test_oort_prefers_the_fast_among_the_untried():
    quick = choosing(1, seconds=[1e-6, 1, 1, 1])
    server, _, _ = trained(quick, RAGGED, [[0, 1, 2, 3]])
    assert np.flatnonzero(server.own[0].last).tolist() == [0]


def test_oort_of_all_candidates_is_the_algorithm():
    every = lambda *a, **k: fc.drift.oort(fc.scaffold(*a, **k), 4, 4)  # noqa: E731
    server, states, _ = trained(every, RAGGED)
    plain_server, plain_states, _ = trained(fc.scaffold, RAGGED)
    assert_close((server._replace(own=server.own[1]), states), (plain_server, plain_states))


def test_oort_refuses_what_it_cannot_do():
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.2), fc.uplink.gaussian(0.1))
    average = fc.fedavg(softmax_loss, optax.sgd(LR))
    private = fc.fedavg(softmax_loss, optax.sgd(LR), uplink=link, reducer=fc.reduce.fixed_mean(3))
    for call, words in (
        (lambda: fc.drift.oort(private, 2, 4), "oort sees each client's loss"),
        (lambda: fc.drift.oort(average, 0, 4), "oort's clients"),
        (lambda: fc.drift.oort(average, 2, 4, seconds=[1, 2]), "seconds must be 4 positive numbers"),
        (lambda: fc.drift.oort(average, 2, 4, first=1.5), "oort's first"),
        (lambda: fc.train(fc.drift.oort(average, 2, 9), people(EQUAL), parameters(), rounds=1), "names client 8"),
    ):
        with pytest.raises(fc.InvalidInput, match=words):
            call()
