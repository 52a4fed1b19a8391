"""FedAvg and FedSGD against a NumPy loop written from the papers, and their limiting cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import averaging as oracle
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
from fedjax_clip.core.loss import examples_meet

CLIENTS = {
    "sgd": (lambda: optax.sgd(0.2), lambda: oracle.sgd(0.2)),
    "clip, sgd": (lambda: clipped_sgd, lambda: [oracle.clip_by_global_norm(0.7), oracle.sgd(0.2)]),
    "clip by value, sgd": (
        lambda: optax.chain(fc.clipping.clip_by_value(0.1), optax.sgd(0.2)),
        lambda: [oracle.clip(0.1), oracle.sgd(0.2)],
    ),
    "momentum": (lambda: optax.sgd(0.2, momentum=0.9), lambda: oracle.sgd(0.2, momentum=0.9)),
    "decay, sgd": (
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.2)),
        lambda: [oracle.add_decayed_weights(0.1), oracle.sgd(0.2)],
    ),
    "adam": (lambda: optax.adam(0.05), lambda: oracle.adam(0.05)),
    "rmsprop": (lambda: optax.rmsprop(0.05), lambda: oracle.rmsprop(0.05)),
}
SERVERS = {
    "sgd": (lambda: optax.sgd(1.0), lambda: oracle.sgd(1.0)),
    "momentum": (lambda: optax.sgd(1.0, momentum=0.9), lambda: oracle.sgd(1.0, momentum=0.9)),
    "adam": (lambda: optax.adam(0.03), lambda: oracle.adam(0.03)),
    "yogi": (lambda: optax.yogi(0.03), lambda: oracle.yogi(0.03)),
    "adagrad": (lambda: optax.adagrad(0.03), lambda: oracle.adagrad(0.03)),
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
    params, expected = oracle.fedavg_rounds(
        oracle.as64(parameters()), rounds, oracle.MODELS["softmax"], client_tx, server_tx(), algorithm=name, **options
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


def test_a_loss_that_is_not_one_number_an_example_is_refused():
    algorithm = fc.fedavg(lambda p, b, k: jnp.mean(softmax_loss(p, b, k)[0]), optax.sgd(0.1))
    with pytest.raises(fc.InvalidInput, match=r"one loss for each example, shape \(12,\), not \(\)"):
        fc.train(algorithm, population(), parameters(), rounds=1)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fc.fedavg(softmax_loss, 0.1), "client_tx must be an optax optimiser"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), 0.1), "server_tx must be an optax optimiser"),
        (lambda: fc.fedavg(softmax_loss, fc.uplink.clip_by_global_norm(1.0)), "client_tx is an uplink"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), uplink=optax.clip(1.0)), "at_client"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), reducer=fc.reduce.uniform_mean), "uniform_mean()"),
        (lambda: fc.evaluator(softmax_loss, population()), "in a dict by name"),
        (lambda: train(parameters()), "data must be a FederatedData"),
        (lambda: train(population(), sampler="uniform"), "sampler must be"),
        (lambda: train(population(), sampler=fc.data.sampling.uniform(2), cohort_size=2), "give one of them"),
        (lambda: train(population(), evaluate=softmax_loss), "evaluate must be a function of the parameters"),
        (lambda: train(population(), evaluate=lambda params, clients: {}), "evaluate must be a function of the par"),
        (
            lambda: train(population(), uplink=link(lambda u, s, c, ctx: u)),
            "encode must return (message, client_state, report)",
        ),
        (lambda: train(population(), uplink=link(lambda u, s, c, ctx: (u, c, 0.5))), "the last a dict"),
        (
            lambda: train(population(), uplink=link(lambda u, s, c, ctx: (u, jnp.ones(2), {}))),
            "encode must return the client_state in the form it got it, {}, not {'': 'float32[2]'}",
        ),
        (lambda: train(population(), uplink=link(decode=lambda a, s, r, ctx: a)), "decode must return"),
        (lambda: train(fc.FederatedData({"x": np.array(["a"])}, [0, 1])), "Field 'x' holds <U1"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd), "client_tx is the function sgd itself"),
        (
            lambda: fc.scaffold(softmax_loss, functools.partial(optax.adam, b1=0.5)),
            "function adam itself",
        ),
        (lambda: fc.fedavg(softmax_loss, fc.clipping.clip_by_global_norm), "function clip_by_global_norm itself"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), optax.sgd), "not the function sgd (without its parentheses?)"),
        (
            lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), reducer=fc.reduce.uniform_mean),
            "not the function uniform_mean",
        ),
        (lambda: loss_of(lambda p, b, k: b["y"] == 1), "floating-point losses, not bool"),
        (lambda: loss_of(lambda p, b, k: b["y"]), "floating-point losses, not int32"),
        (lambda: loss_of(lambda p, b, k: [*softmax_loss(p, b, k)]), "one loss for each example, shape (12,), not list"),
        (lambda: loss_of(lambda p, b, k: None), "one loss for each example, shape (12,), not NoneType"),
        (lambda: loss_of(lambda p, b, k: (b["x"][:, 0], b["y"])), "must return losses[B], or (losses[B], {name"),
        (lambda: loss_of(lambda p, b: b["x"][:, 0]), "per_example_loss must be a function of (params, batch, key)"),
        (lambda: loss_of("loss"), "per_example_loss must be a function of (params, batch, key)"),
        (lambda: fc.train(softmax_loss, population(), parameters(), rounds=1), "not the function softmax_loss"),
        (lambda: train_from({}), "params hold nothing to train"),
        (lambda: train_from({"w": "a"}), "Parameter 'w' must be an array of numbers, not 'a'"),
        (lambda: train_from(lambda key: parameters()), "Parameter 'params' must be an array of numbers, not <function"),
        (lambda: train_from({"w": np.zeros((4, 3), int), "b": np.zeros(3)}), "Parameter 'w' holds int32"),
        (lambda: train(population(), rounds=2.5), "rounds must be a whole number of at least 1, not 2.5"),
        (lambda: train(population(), clients_per_chunk=-3), "clients_per_chunk must be a whole number"),
        (lambda: train(population(), devices=[]), "devices must be one or more different devices"),
        (lambda: train(population(), devices=["cpu"]), "A device must be one of jax.local_devices(), not str"),
        (lambda: train(population(), local_epochs=2, local_steps=3), "local_epochs and local_steps both say"),
        (
            lambda: train(population(), evaluate=lambda params: 3.0),
            "What an evaluation returns must be numbers by name",
        ),
        (lambda: train(population(), evaluate=lambda params: {"a": "b"}), "one number for each name, not {'a': 'b'}"),
        (lambda: train(population(), on_round=3), "on_round must be a function of a row"),
        (
            lambda: train(population(), checkpoints=3),
            "checkpoints must be a directory, or fc.extend.Checkpoints(directory)",
        ),
        (
            lambda: fc.sweep(3, {"lr": [0.1]}, population(), parameters(), softmax_loss, rounds=1),
            "build must be a function",
        ),
        (
            lambda: fc.sweep(abs, [0.1], population(), parameters(), softmax_loss, rounds=1),
            "points must be values by name",
        ),
        (lambda: loss_of(reporting("round")), "reports 'round', a name that the library fills itself"),
        (lambda: loss_of(reporting("seconds")), "Taken are bytes_down"),
        (lambda: loss_of(reporting("eval/x")), "begin with client_norm/"),
        (lambda: loss_of(reporting(3)), "names that are text, not 3"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(fc.InvalidInput) as error:
        call()
    assert message in str(error.value)


def loss_of(per_example_loss):
    return fc.train(fc.fedavg(per_example_loss, optax.sgd(0.1)), population(), parameters(), rounds=1)


def train_from(params):
    return fc.train(fc.fedavg(softmax_loss, optax.sgd(0.1)), population(), params, rounds=1)


def reporting(name):
    return lambda params, batch, key: (softmax_loss(params, batch, key)[0], {name: batch["x"][:, 0]})


def train(data, uplink=None, **options):
    algorithm = fc.fedavg(softmax_loss, optax.sgd(0.1), uplink=uplink)
    return fc.train(algorithm, data, parameters(), **{"rounds": 1, **options})


def test_parameters_may_be_numbers_of_python():
    """As arrays of no axes."""

    def loss(params, batch, key):
        return 0.5 * (batch["x"][:, 0] * params["w"] - 1) ** 2

    runs = [fc.train(fc.fedavg(loss, optax.sgd(0.1)), population(), {"w": w}, rounds=1) for w in (0.5, np.float32(0.5))]
    assert runs[0].params["w"] == runs[1].params["w"] != 0.5


def link(encode=lambda u, s, c, ctx: (u, c, {}), decode=lambda a, s, r, ctx: (a, s, {})):
    return fc.uplink.Uplink(lambda params: (), lambda params: (), encode, decode)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    checkpoints = fc.extend.Checkpoints(tmp_path)
    train(population(), checkpoints=checkpoints)
    with pytest.raises(fc.InvalidInput, match="seed=0, not 1"):
        train(population(), checkpoints=checkpoints, seed=1)


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


def normalised_loss(params, batch, key):
    """Batch normalisation in training mode: every example sees the others."""
    x = batch["x"]
    return softmax_loss(params, {**batch, "x": (x - x.mean(0)) / (x.std(0) + 1e-3)}, key)


def contrastive_loss(params, batch, key):
    """The pairs within a batch."""
    embedded = batch["x"] @ params["w"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(embedded @ embedded.T, jnp.arange(len(embedded)))


def test_padding_is_warned_of_where_examples_see_each_other():
    assert all(make().loss is not None for make in ENTRIES.values())
    algorithm = fc.fedavg(normalised_loss, optax.sgd(0.1))
    with pytest.warns(UserWarning, match="another loss in another batch .* Choose a batch_size that divides every"):
        fc.train(algorithm, population((4, 6)), parameters(), rounds=1, batch_size=4, devices=jax.local_devices()[:1])
    batch, zeros = population((6,)).examples, jax.tree.map(np.zeros_like, parameters())
    for loss, meet in ((normalised_loss, True), (contrastive_loss, True), (softmax_loss, False)):
        for params in (parameters(), zeros):  # where all examples have one and the same loss
            assert examples_meet(loss, params, batch) == meet


@pytest.mark.parametrize(
    ("sizes", "batch_size", "pads"),
    [((4, 8), 4, False), ((4, 6), 4, True), ((6,), 12, False), ((4, 8), 12, True), ((5, 5), None, False)],
)
def test_which_batches_are_padded(sizes, batch_size, pads):
    assert fc.extend.LocalWork(batch_size).pads(np.array(sizes)) == pads


def test_a_loss_is_tried_once_and_only_where_batches_are_padded(compilations):
    def loss(*args):
        return softmax_loss(*args)

    def programs(sizes, seed):
        compilations.clear()
        algorithm = fc.fedavg(loss, optax.sgd(0.1))
        fc.train(algorithm, population(sizes), parameters(), rounds=1, batch_size=4, seed=seed)
        return len(compilations)

    programs((4, 4), 0)  # with all that any training compiles
    assert programs((4, 4), 1) == 1
    assert programs((4, 6), 2) == 2
    assert programs((4, 6), 3) == 1
