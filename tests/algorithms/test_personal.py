"""Own models: row by row with the oracles, and their limiting cases."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from oracles import personal as oracle
from problems import Run, assert_close, assert_identical

import fedjax_clip as fc

SIZES, BATCH, LR = (4, 8, 2, 6), 2, 0.1
STEPS = [n // BATCH for n in SIZES]
COHORTS = [[0, 2, 3], [1, 3], [3, 0, 1], [2, 1], [0, 1, 2, 3]]
START = np.array([0.25, 0.5, -0.5, 1.0])  # b, then w: the order of the leaves
UNIFORM = fc.reduce.uniform_mean()
WORK = fc.extend.LocalWork(BATCH, shuffle=False)


@functools.cache
def regressions():
    """Clients with slopes of their own, in two groups."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(sum(SIZES), 3)).astype(np.float32)
    sign = np.where(np.repeat(np.arange(4), SIZES) % 2 == 0, 1.0, -1.0)
    y = sign * (x @ [1.0, -2.0, 0.5] + 1.0) + 0.1 * rng.normal(size=len(x))
    return fc.FederatedData({"x": x, "y": y.astype(np.float32)}, np.concatenate([[0], np.cumsum(SIZES)]))


def squared(params, batch, key):
    return 0.5 * (batch["x"] @ params["w"] + params["b"][0] - batch["y"]) ** 2


def tree_of(flat):
    return {"b": np.float32(flat[:1]), "w": np.float32(flat[1:])}


def flat(tree):
    return np.concatenate([np.asarray(tree["b"]), np.asarray(tree["w"])], axis=-1).astype(np.float64)


def examples(i, step=None):
    """``[1, x]`` and y of a client: of a batch, or of all of them."""
    start, stop = regressions().offsets[i : i + 2]
    if step is not None:
        start, stop = start + BATCH * (step % STEPS[i]), start + BATCH * (step % STEPS[i]) + BATCH
    x, y = (regressions().examples[k][start:stop].astype(np.float64) for k in "xy")
    return np.column_stack([np.ones(len(x)), x]), y


def gradient(i, v, step, round):
    a, y = examples(i, step)
    return a.T @ (a @ v - y) / len(y)


def curvature(i, v, u, step, round):
    a, _ = examples(i, step)
    return a.T @ (a @ u) / len(a)


def loss(i, v, round=None):
    a, y = examples(i)
    return np.mean((a @ v - y) ** 2) / 2


def trained(make, start=None, cohorts=COHORTS, **options):
    """``(server, client states, metrics)`` after the rounds."""
    return Run(make(squared, optax.sgd(LR), **options), regressions(), WORK).rounds(
        tree_of(START) if start is None else start, cohorts
    )


def check(make, rows, own=None, parts=None, **options):
    """The library's server and own models after the last round are the oracle's last rows."""
    server, clients, history = trained(make, **options)
    np.testing.assert_allclose(flat(server.params), rows["x"][-1], rtol=2e-4, atol=2e-5)
    if own is not None:
        np.testing.assert_allclose(flat(own(clients)), rows["v"][-1], rtol=2e-4, atol=2e-5)
    return history


RUN = (START, gradient, COHORTS, STEPS, LR)


def test_ditto_is_the_oracles_and_its_server_is_fedavgs():
    rows = oracle.ditto(*RUN, LR, 0.7)
    check(functools.partial(fc.personal.ditto, strength=0.7), rows, lambda c: c.own, reducer=UNIFORM)


def test_ditto_and_mr_mtl_of_strength_zero_are_local_training():
    """Each client on its own, in the rounds in which it came; exact, since the same program steps it."""
    local = oracle.ditto(*RUN, LR, 0.0)["v"][-1]
    for make in (fc.personal.ditto, fc.personal.mr_mtl):
        server, clients, _ = trained(functools.partial(make, strength=0.0))
        moved, elsewhere, _ = trained(functools.partial(make, strength=0.0), start=None, reducer=fc.reduce.median())
        np.testing.assert_allclose(flat(clients.own), local, rtol=1e-4, atol=1e-5)
        assert_identical(clients.own, elsewhere.own)  # whatever the server does
        assert np.any(flat(server.params) != flat(moved.params))


def test_mr_mtl_is_the_oracles_with_the_mean_of_all_clients():
    rows = oracle.mr_mtl(*RUN, 0.7, over="all")
    check(functools.partial(fc.personal.mr_mtl, strength=0.7), rows, lambda c: c.own, reducer=UNIFORM)


def test_pfedme_is_the_oracles():
    rows = oracle.pfedme(*RUN, 0.05, 4.0, 3, start="w")
    make = functools.partial(fc.personal.pfedme, strength=4.0, rate=0.05, inner_steps=3)
    check(make, rows, lambda c: c.own)


def test_pfedme_of_one_inner_step_that_undoes_the_strength_is_fedavg():
    server, _, _ = trained(functools.partial(fc.personal.pfedme, strength=8.0, rate=0.125, inner_steps=1))
    assert_close(server.params, trained(fc.fedavg, reducer=UNIFORM)[0].params)


def test_apfl_is_the_oracles_and_its_server_is_fedavgs():
    rows = oracle.apfl(*RUN, LR, 0.3)
    check(functools.partial(fc.personal.apfl, alpha=0.3), rows, lambda c: c.own, reducer=UNIFORM)


def test_apfl_whose_clients_adapt_alpha_is_the_oracles():
    rows = oracle.apfl(*RUN, LR, 0.3, alpha_eta=0.05)
    make = functools.partial(fc.personal.apfl, alpha=0.3, alpha_rate=0.05)
    check(make, rows, lambda c: c.own[0], reducer=UNIFORM)
    server, clients, _ = trained(make, reducer=UNIFORM)
    np.testing.assert_allclose(clients.own[1], rows["alpha"][-1], rtol=2e-4, atol=2e-5)
    assert len(set(np.round(rows["alpha"][-1], 3))) > 2
    mine = make(squared, optax.sgd(LR)).personal(server.params, jax.tree.map(lambda x: x[1], clients))
    a = rows["alpha"][-1][1]
    np.testing.assert_allclose(flat(mine), a * rows["v"][-1][1] + (1 - a) * rows["x"][-1], rtol=2e-4, atol=2e-5)


def test_apfl_is_fedavg_at_alpha_zero_and_local_training_at_one():
    plain = trained(fc.fedavg)[0].params
    server, clients, _ = trained(functools.partial(fc.personal.apfl, alpha=0.0))
    mine = fc.personal.apfl(squared, optax.sgd(LR), alpha=0.0).personal(
        server.params, jax.tree.map(lambda x: x[0], clients)
    )
    assert_close(server.params, plain)
    assert_identical(mine, server.params)
    _, clients, _ = trained(functools.partial(fc.personal.apfl, alpha=1.0))
    np.testing.assert_allclose(flat(clients.own), oracle.ditto(*RUN, LR, 0.0)["v"][-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("hessian", "kind"), [("none", "fo"), ("differences", "hf"), ("exact", "exact")])
def test_per_fedavg_is_the_oracles(hessian, kind):
    options = {"rate": 0.2, "hessian": hessian, "delta": 0.1}  # the Hessian is constant: any delta is exact
    rows = oracle.per_fedavg(
        *(START, gradient, COHORTS, STEPS, LR, 0.2), kind, curvature, 0.1, draws=lambda k: (k + 1, k, k + 2)
    )
    check(functools.partial(fc.personal.per_fedavg, **options), rows)


def test_per_fedavg_of_rate_zero_and_reptile_are_fedavg():
    plain = trained(fc.fedavg, reducer=UNIFORM)[0].params
    assert_identical(trained(functools.partial(fc.personal.per_fedavg, rate=0.0))[0].params, plain)
    assert_identical(trained(fc.personal.reptile)[0].params, plain)
    rows = oracle.reptile(*RUN, 0.5, 1)
    check(functools.partial(fc.personal.reptile, server_tx=optax.sgd(0.5)), rows)


def test_fedala_is_the_oracles():
    """The mixture of b and of w, and of w alone; batches begin again where a client has fewer than the steps."""
    for upper, index in ((None, None), ("^w$", [1, 2, 3])):
        rows = oracle.fedala(*RUN, 2.0, (3, 3), index)
        make = functools.partial(fc.personal.fedala, rate=2.0, mix_steps=3, upper=upper)
        _, clients, _ = trained(make, reducer=UNIFORM)
        check(make, rows, lambda c: c.own[0], reducer=UNIFORM)
        np.testing.assert_allclose(flat(clients.own[1]), rows["W"][-1], rtol=1e-3, atol=1e-4)
        assert np.any((rows["W"][-1] > 0) & (rows["W"][-1] < 1))


def test_fedala_that_learns_no_mixture_is_fedavg():
    server, _, _ = trained(functools.partial(fc.personal.fedala, rate=0.0))
    assert_close(server.params, trained(fc.fedavg)[0].params)


def test_fedrep_is_the_oracles():
    """Two passes on the head, then one on the body."""
    heads = [2 * n for n in STEPS]

    def on_its_batch(i, v, k, t):
        return gradient(i, v, k if k < heads[i] else k - heads[i], t)

    rows = oracle.fedrep(START, on_its_batch, COHORTS, STEPS, LR, [0], heads)
    make = functools.partial(fc.personal.fedrep, head="^b$", head_passes=2)
    server, clients, _ = trained(make, reducer=UNIFORM)
    np.testing.assert_allclose(flat(server.params), rows["x"][-1], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(np.asarray(clients.private["b"])[:, 0], rows["v"][-1][:, 0], rtol=2e-4, atol=2e-5)


def test_fedbabu_and_fedbn_are_the_oracles_and_refuse_a_model_without_the_part():
    check(functools.partial(fc.personal.fedbabu, head="^b$", reducer=UNIFORM), oracle.fedbabu(*RUN, [1, 2, 3], 0))
    rows = oracle.partial(*RUN, [0])
    server, clients, _ = trained(functools.partial(fc.personal.fedbn, norms="^b$", reducer=UNIFORM))
    np.testing.assert_allclose(flat(server.params), rows["x"][-1], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(np.asarray(clients.private["b"])[:, 0], rows["v"][-1][:, 0], rtol=2e-4, atol=2e-5)
    for make in (
        functools.partial(fc.personal.fedbn),
        functools.partial(fc.personal.fedrep, head="Dense"),
        functools.partial(fc.personal.fedbabu, head="Dense"),
    ):
        with pytest.raises(fc.InvalidInput, match="must be found in some of the parameters, not none or all: b, w"):
            make(squared, optax.sgd(LR)).init(tree_of(START))


def test_knn_per_is_the_oracles():
    rng = np.random.default_rng(0)
    stored, queries, labels = rng.normal(size=(9, 3)), rng.normal(size=(5, 3)), rng.integers(4, size=9)
    stored[3] = stored[7]  # a tie
    given = rng.dirichlet(np.ones(4), size=5)
    for k, share, scale in ((1, 0.5, 1.0), (4, 0.3, 0.2), (9, 1.0, 3.0)):
        want = oracle.knn_per(stored, labels, queries, given, k, share, scale)
        got = fc.personal.knn_per(stored, labels, queries, given, k=k, share=share, scale=scale)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert_close(fc.personal.knn_per(stored, labels, queries, given, k=3, share=0.0), np.float32(given))
    with pytest.raises(fc.InvalidInput, match="10 neighbours among 9 examples"):
        fc.personal.knn_per(stored, labels, queries, given, k=10, share=0.0)


# Arguments


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fc.personal.ditto(squared, optax.sgd(1.0), strength=-1), "ditto's strength must be a number of at"),
        (lambda: fc.personal.apfl(squared, optax.sgd(1.0), alpha=2), "apfl's alpha must be a number between 0 and 1"),
        (lambda: fc.personal.pfedme(squared, optax.sgd(1.0), inner_steps=0), "inner_steps must be a whole number"),
        (lambda: fc.personal.per_fedavg(squared, optax.sgd(1.0), hessian="half"), "one of none, differences, exact"),
        (lambda: fc.personal.fedrep(squared, optax.sgd(1.0), head="("), "head: .* is not a regular expression"),
        (lambda: fc.clusters.ifca(squared, optax.sgd(1.0), clusters=0), "clusters must be a whole number between"),
        (lambda: fc.fair.q_ffl(squared, optax.sgd(1.0), q=1, rate=0), "rate must be a positive, finite number"),
        (
            lambda: fc.partially_private(fc.personal.ditto(squared, optax.sgd(1.0), strength=1), "^b$"),
            "have models of their own already",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(call, words):
    with pytest.raises(fc.InvalidInput, match=words):
        call()


# New clients


def test_a_new_client_takes_its_half_of_a_round_and_the_server_stays():
    ditto = fc.personal.ditto(squared, optax.sgd(LR), strength=0.7)
    server = ditto.init(tree_of(START))
    states = fc.personal.adapt(ditto, server, regressions(), rounds=2, batch_size=BATCH, seed=3)
    assert_identical(server.params, tree_of(START))
    run = Run(ditto, regressions())
    kept = run.start(tree_of(START))[1]
    for i in range(4):
        v = START.copy()
        for round in range(2):
            index, _ = fc.data.planning.own_batches(SIZES[i], i, fc.extend.LocalWork(BATCH), seed=3, round=round)
            for rows in index:
                a, y = (part[rows] for part in examples(i))
                v = v - LR * (a.T @ (a @ v - y) / BATCH + 0.7 * (v - START))
        np.testing.assert_allclose(flat(jax.tree.map(lambda x, i=i: x[i], states.own)), v, rtol=1e-4, atol=1e-5)
    assert jax.tree.map(np.shape, states) == jax.tree.map(np.shape, kept)


def test_adapting_keeps_links_as_they_were_and_needs_no_reducers_clients():
    """Krum needs three clients, and an error that is fed back is of what was sent: nothing is."""
    link = fc.uplink.error_feedback(fc.uplink.clip_by_global_norm(0.1), fc.compression.top_k(0.5))
    mtl = fc.personal.mr_mtl(squared, optax.sgd(LR), strength=0.7, uplink=link, reducer=fc.reduce.krum(0))
    states = fc.personal.adapt(mtl, mtl.init(tree_of(START)), regressions().select([1]), batch_size=BATCH)
    assert not any(x.any() for x in jax.tree.leaves(states.uplink))
    assert np.any(flat(states.own)[0] != START)


def test_an_algorithm_without_own_models_has_nothing_to_adapt():
    plain = fc.fedavg(squared, optax.sgd(LR))
    with pytest.raises(fc.InvalidInput, match="clients of fedavg use the server's model.*fine_tune"):
        fc.personal.adapt(plain, plain.init(tree_of(START)), regressions())


def test_fine_tuning_judges_on_examples_that_no_step_saw():
    data = regressions()
    number = np.arange(data.num_examples, dtype=np.float32)
    data = dataclasses.replace(data, examples={**data.examples, "number": number})

    def with_number(params, batch, key):
        return squared(params, batch, key), {"number": batch["number"]}

    tuned = fc.personal.fine_tune(with_number, optax.sgd(LR), tree_of(START), data, steps=4, batch_size=None, seed=7)
    train, judged = data.split_examples(0.5, 7)
    assert set(train.examples["number"]).isdisjoint(judged.examples["number"])
    assert tuned.clients.tolist() == [0, 1, 2, 3]
    for c in range(4):
        a, y = (np.asarray(train.client(c)[k], np.float64) for k in "xy")
        a, v = np.column_stack([np.ones(len(a)), a]), START.copy()
        b, z = (np.asarray(judged.client(c)[k], np.float64) for k in "xy")
        b = np.column_stack([np.ones(len(b)), b])
        np.testing.assert_allclose(tuned.before["loss"][c], np.mean((b @ v - z) ** 2) / 2, rtol=1e-4)
        for _ in range(4):
            v = v - LR * a.T @ (a @ v - y) / len(y)
        np.testing.assert_allclose(tuned.after["loss"][c], np.mean((b @ v - z) ** 2) / 2, rtol=1e-4)
        np.testing.assert_allclose(flat(jax.tree.map(lambda x, c=c: x[c], tuned.models)), v, rtol=1e-4)
        assert tuned.before["number"][c] == tuned.after["number"][c] == judged.client(c)["number"].mean()


def test_fine_tuning_of_a_part_leaves_the_rest():
    tuned = fc.personal.fine_tune(squared, optax.sgd(LR), tree_of(START), regressions(), steps=2, part="^b$")
    assert_identical(tuned.models["w"], np.repeat(np.float32(START[None, 1:]), 4, 0))
    assert np.all(tuned.models["b"] != START[0])
