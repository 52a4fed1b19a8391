"""FedAvg and FedSGD against a NumPy loop written from the papers, and their limiting cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import averaging, models, optimisers, trees
from problems import (
    COHORTS,
    ENTRIES,
    Run,
    assert_close,
    assert_identical,
    clipped_sgd,
    parameters,
    population,
    softmax_loss,
)

import fedjax_clip as fc
from experiments.config import registry

CLIENTS = {
    "sgd": (lambda: optax.sgd(0.2), lambda: optimisers.sgd(0.2)),
    "clip, sgd": (lambda: clipped_sgd, lambda: [optimisers.clip_by_global_norm(0.7), optimisers.sgd(0.2)]),
    "clip by value, sgd": (
        lambda: optax.chain(fc.clipping.clip_by_value(0.1), optax.sgd(0.2)),
        lambda: [optimisers.clip(0.1), optimisers.sgd(0.2)],
    ),
    "momentum": (lambda: optax.sgd(0.2, momentum=0.9), lambda: optimisers.sgd(0.2, momentum=0.9)),
    "decay, sgd": (
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.2)),
        lambda: [optimisers.add_decayed_weights(0.1), optimisers.sgd(0.2)],
    ),
    "adam": (lambda: optax.adam(0.05), lambda: optimisers.adam(0.05)),
    "rmsprop": (lambda: optax.rmsprop(0.05), lambda: optimisers.rmsprop(0.05)),
}

SERVERS = {
    "sgd": (lambda: optax.sgd(1.0), lambda: optimisers.sgd(1.0)),
    "momentum": (lambda: optax.sgd(1.0, momentum=0.9), lambda: optimisers.sgd(1.0, momentum=0.9)),
    "adam": (lambda: optax.adam(0.03), lambda: optimisers.adam(0.03)),
    "yogi": (lambda: optax.yogi(0.03), lambda: optimisers.yogi(0.03)),
    "adagrad": (lambda: optax.adagrad(0.03), lambda: optimisers.adagrad(0.03)),
}


def test_every_registered_algorithm_obeys_the_laws():
    assert {entry.split(",")[0] for entry in ENTRIES} >= set(registry.ALGORITHMS)


def batches_of(run: Run, ids: list[int], round: int) -> list[list[tuple]]:
    """What each client trains on, planned for it alone and read back from the arrays."""
    out = []
    for id in ids:
        cohort = jax.tree.map(lambda x: x[0], dataclasses.replace(run, resident=False).cohort([id], round, ()))
        rows = range(int(cohort.first[0]), int(cohort.first[0] + cohort.num_steps[0]))
        batches, weight = cohort.batches, np.asarray(cohort.example_weight, np.float64)
        out.append([(np.asarray(batches["x"][r], np.float64), batches["y"][r], weight[r]) for r in rows])
    return out


def compare(algorithm, client_tx, server_tx, name="fedavg", **options):
    run = Run(algorithm, population())
    server, _, history = run.rounds(parameters(), COHORTS)
    rounds = [batches_of(run, ids, r) for r, ids in enumerate(COHORTS)]
    params, expected = averaging.fedavg_rounds(
        trees.as64(parameters()), rounds, models.MODELS["softmax"], client_tx, server_tx(), algorithm=name, **options
    )
    assert_close(server.params, params, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(history, expected, strict=True):
        for key in ("loss", "examples", "steps", "clients", "dropped", "update_norm"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, err_msg=key)
        if "clipped_steps" in ours:
            np.testing.assert_allclose(ours["clipped_steps"], theirs["clipped_steps"], rtol=1e-6)
    return history, expected


@pytest.mark.parametrize("client", CLIENTS)
def test_fedavg_is_the_loop_of_the_paper_for_every_client_optimiser(client):
    ours, theirs = CLIENTS[client]
    compare(fc.fedavg(softmax_loss, ours()), theirs, SERVERS["sgd"][1])


@pytest.mark.parametrize("server", SERVERS)
def test_fedavg_is_the_loop_of_the_paper_for_every_server_optimiser(server):
    ours, theirs = SERVERS[server]
    compare(fc.fedavg(softmax_loss, clipped_sgd, ours()), CLIENTS["clip, sgd"][1], theirs)


def test_fedsgd_is_the_loop_of_the_paper():
    compare(fc.fedsgd(softmax_loss, clipped_sgd), CLIENTS["clip, sgd"][1], SERVERS["sgd"][1], "fedsgd")


def test_uniform_average_and_clipped_updates_are_the_loop_of_the_paper():
    algorithm = fc.fedavg(
        softmax_loss, clipped_sgd, uplink=fc.uplink.clip_by_global_norm(0.1), reducer=fc.reduce.uniform_mean()
    )
    ours, theirs = compare(algorithm, CLIENTS["clip, sgd"][1], SERVERS["sgd"][1], weighting="uniform", update_clip=0.1)
    fractions = [m["clipped_updates"] for m in theirs]
    np.testing.assert_allclose([m["uplink/clipped"] for m in ours], fractions, rtol=1e-6)
    assert max(fractions) > 0


# Whole numbers and powers of two, so that float32 arithmetic is exact and "equal" means equal.
DYADIC = fc.FederatedData(
    {
        "x": np.array([[1, 2], [3, 0], [-1, 1], [2, 2], [0, 1], [4, -2], [1, 1], [-2, 3]], np.float32),
        "y": np.array([1, -2, 3, 0, 2, 1, -1, 4], np.float32),
    },
    [0, 3, 4, 8],
)


def squared_loss(params, batch, key):
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]) ** 2


ZERO = {"w": np.zeros(2, np.float32)}


@pytest.mark.parametrize("make", [fc.fedavg, fc.fedsgd])
def test_one_full_batch_step_of_everyone_is_gradient_descent_to_the_last_bit(make):
    result = fc.train(make(squared_loss, optax.sgd(2.0**-4)), DYADIC, ZERO, rounds=3, batch_size=None)
    x, y, w = DYADIC.examples["x"], DYADIC.examples["y"], ZERO["w"]
    for _ in range(3):
        w = w - np.float32(2.0**-4) * (x.T @ (x @ w - y)) / np.float32(8)
    np.testing.assert_array_equal(result.params["w"], w)


def test_one_full_batch_step_of_fedavg_is_fedsgd_whatever_the_data():
    one_step = fc.extend.LocalWork(batch_size=None)
    average = Run(fc.fedavg(softmax_loss, clipped_sgd), population(), one_step)
    gradient = Run(fc.fedsgd(softmax_loss, clipped_sgd), population(), one_step)
    (server, _, history), (expected, _, _) = (run.rounds(parameters(), COHORTS) for run in (average, gradient))
    assert_close(server, expected, rtol=1e-6, atol=1e-7)  # y - x rounds where fedsgd sends the step itself
    assert all(m["steps"] == 3 for m in history)


def test_fedsgd_does_not_depend_on_the_batch_size():
    runs = [Run(fc.fedsgd(softmax_loss, clipped_sgd), population(), fc.extend.LocalWork(b)) for b in (1, 4, None)]
    first, *others = [run.rounds(parameters(), COHORTS)[0] for run in runs]
    for other in others:
        assert_close(other, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bound", [1e6, np.inf])
def test_a_clip_that_never_binds_is_no_clip_to_the_last_bit_where_arithmetic_is_exact(bound):
    def train(tx, **options):
        return fc.train(fc.fedavg(squared_loss, tx, **options), DYADIC, ZERO, rounds=2, batch_size=None).params

    plain = train(optax.sgd(2.0**-4))
    assert_identical(train(optax.chain(fc.clipping.clip_by_global_norm(bound), optax.sgd(2.0**-4))), plain)
    assert_identical(train(optax.sgd(2.0**-4), uplink=fc.uplink.clip_by_global_norm(bound)), plain)


@pytest.mark.parametrize("bound", [1e6, np.inf])
def test_a_clip_that_never_binds_is_no_clip(bound):
    clip = fc.clipping.clip_by_global_norm(bound)
    clipped = Run(fc.fedavg(softmax_loss, optax.chain(clip, optax.sgd(0.2))), population())
    link = Run(fc.fedavg(softmax_loss, optax.sgd(0.2), uplink=fc.uplink.clip_by_global_norm(bound)), population())
    plain = Run(fc.fedavg(softmax_loss, optax.sgd(0.2)), population()).rounds(parameters(), COHORTS)[0]
    for run, metric in ((clipped, "clipped_steps"), (link, "uplink/clipped")):
        server, _, history = run.rounds(parameters(), COHORTS)
        # With a clip in between, XLA contracts other multiply-adds: the last bit may differ.
        assert_close(server.params, plain.params, rtol=1e-6, atol=1e-7)
        assert all(m[metric] == 0 for m in history)


def test_hyperparameters_may_be_traced():
    run = Run(fc.fedavg(softmax_loss, clipped_sgd), population())
    server, clients = run.start(parameters())
    cohort = jax.tree.map(lambda x: x[0], run.cohort([0, 1, 2], 0, clients))

    @jax.jit
    @jax.vmap
    def norms(bound, lr):
        client_tx = optax.chain(fc.clipping.clip_by_global_norm(bound), optax.sgd(lr))
        algorithm = fc.fedavg(softmax_loss, client_tx, uplink=fc.uplink.clip_by_global_norm(bound))
        return algorithm.round(server, cohort, jax.random.key(0))[2]["update_norm"]

    grid = norms(jnp.array([0.01, 0.1, 10.0]), jnp.array([0.1, 0.1, 0.1]))
    assert np.all(np.diff(grid) > 0)


def test_example_weights_weigh_the_loss_and_the_average():
    """A weight of 2 is worth the example twice over."""
    data = population((2, 3))
    weights = np.array([2, 1, 1, 1, 3], np.float32)
    repeat = np.repeat(np.arange(5), weights.astype(int))
    doubled = fc.FederatedData(jax.tree.map(lambda x: x[repeat], data.examples), [0, 3, 8])
    weighted = dataclasses.replace(data, weights=weights)
    algorithm = fc.fedavg(softmax_loss, optax.sgd(0.2))
    results = [
        fc.train(algorithm, d, parameters(), rounds=3, batch_size=None, shuffle=False).params
        for d in (weighted, doubled)
    ]
    assert_close(*results, rtol=1e-5, atol=1e-6)


def test_mixed_precision_keeps_parameters_and_gradients_in_float32():
    seen = []

    def loss(params, batch, key):
        seen.extend(jax.tree.leaves(jax.tree.map(lambda x: x.dtype, (params, batch["x"]))))
        return softmax_loss(params, batch, key)

    run = Run(fc.fedavg(fc.local.mixed_precision(loss), clipped_sgd), population())
    server, _, _ = run.rounds(parameters(), COHORTS)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(server.params))
    exact = Run(fc.fedavg(softmax_loss, clipped_sgd), population()).rounds(parameters(), COHORTS)[0]
    assert_close(server.params, exact.params, rtol=0, atol=0.02)
    assert any(np.any(x != y) for x, y in zip(server.params.values(), exact.params.values(), strict=True))


def test_a_client_that_would_keep_an_infinity_is_dropped_and_keeps_the_old_state():
    def loss(params, batch, key):
        return 0.5 * (batch["x"] * params["w"] - batch["y"]) ** 2

    y = np.float32([1, 2, 1, 1e20])  # a gradient whose square Adam cannot hold, and a step that looks like any other
    data = fc.FederatedData({"x": np.ones(4, np.float32), "y": y}, [0, 2, 4])
    algorithm = fc.fedavg(loss, optax.adam(0.1), keep_opt_state=True)
    result = fc.train(algorithm, data, {"w": np.float32(0)}, rounds=2, devices=jax.local_devices()[:1])
    assert [(row["clients"], row["dropped"]) for row in result.history] == [(1, 1), (1, 1)]
    counts, moments = result.state.clients.own[0].count, result.state.clients.own[0].nu["w"]
    assert counts.tolist() == [2, 0]
    assert moments[0] > 0
    assert moments[1] == 0
