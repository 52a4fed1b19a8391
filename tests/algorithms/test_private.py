"""Private parameters and each client's own model: against NumPy loops, limiting cases, and what crosses the wire."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import COHORTS, Run, assert_close, assert_identical, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.core import tree
from fedjax_clip.training import scores as scoring
from fedjax_clip.uplink.base import Uplink

N, SIZES, BATCH, LR, TAU = 4, (4, 8, 2, 6), 2, 0.1, 1.5
ROUNDS = ([0, 2, 3], [1, 3], [3, 0, 1], [2, 1])


def intercepts(seed=0):
    """Linear regressions with one slope and an intercept for each client; full batches."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sum(SIZES), 3)).astype(np.float32)
    owner = np.repeat(np.arange(N), SIZES)
    y = (x @ [1.0, -2.0, 0.5] + 3.0 * owner + 0.1 * rng.normal(size=len(x))).astype(np.float32)
    return fc.FederatedData({"x": x, "y": y}, np.concatenate([[0], np.cumsum(SIZES)]), list("abcd"))


def squared(params, batch, key):
    error = batch["x"] @ params["slope"] + params["own"] - batch["y"]
    return 0.5 * error**2, {"error": error}


START = {"slope": np.zeros(3, np.float32), "own": np.float32(0.25)}


def oracle(data, rounds):
    """FedSim with clipped steps on (u, v_i): ``(u, v)`` after the rounds."""
    u, v = np.zeros(3), np.full(N, 0.25)
    for ids in rounds:
        updates = []
        for i in ids:
            w, b = u.copy(), v[i]
            rows = np.arange(data.offsets[i], data.offsets[i + 1])
            for batch in np.split(rows, len(rows) // BATCH):
                x, y = data.examples["x"][batch].astype(np.float64), data.examples["y"][batch]
                error = x @ w + b - y
                slope, own = x.T @ error / BATCH, error.mean()
                factor = min(1.0, TAU / np.sqrt(slope @ slope + own**2))
                w, b = w - LR * factor * slope, b - LR * factor * own
            updates.append((SIZES[i], w - u))
            v[i] = b
        u = u + sum(n * d for n, d in updates) / sum(n for n, _ in updates)
    return u, v


def clipped(**options):
    tx = optax.chain(fc.clipping.clip_by_global_norm(TAU), optax.sgd(LR))
    return fc.partially_private(fc.fedavg(squared, tx, **options), "own")


def test_it_is_the_loop_of_the_paper():
    data = intercepts()
    run = Run(clipped(), data, fc.extend.LocalWork(BATCH, shuffle=False))
    server, clients, history = run.rounds(START, ROUNDS)
    u, v = oracle(data, ROUNDS)
    assert_close(server.params["slope"], u.astype(np.float32), rtol=1e-4)
    assert_close(clients.private["own"], v.astype(np.float32), rtol=1e-4)
    assert server.params["own"] == START["own"]
    assert any(row["clipped_steps"] > 0 for row in history)
    assert history[0]["clipped_steps"] <= 1


def test_private_parameters_fit_clients_that_one_model_cannot():
    data = intercepts()
    algorithm = fc.partially_private(fc.fedavg(squared, optax.sgd(LR)), "own")
    evaluate = fc.evaluator(squared, {"seen": data}, algorithm=algorithm, population=data)
    private = fc.train(algorithm, data, START, rounds=150, evaluate=evaluate)
    shared = fc.train(
        fc.fedavg(squared, optax.sgd(LR)), data, START, rounds=150, evaluate=fc.evaluator(squared, {"seen": data})
    )
    assert private.history[-1]["eval/seen/loss"] < 0.01
    assert shared.history[-1]["eval/seen/loss"] > 1.0
    assert_close(private.state.clients.private["own"], np.float32([0, 3, 6, 9]), atol=0.2)


def test_a_private_leaf_that_does_nothing_leaves_fedavg():
    run = Run(fc.fedavg(softmax_loss, optax.sgd(0.2), optax.adam(0.1)), population())
    idle = {**parameters(), "idle": np.ones(2, np.float32)}
    algorithm = fc.partially_private(fc.fedavg(softmax_loss, optax.sgd(0.2), optax.adam(0.1)), "idle")
    server, clients, history = Run(algorithm, population()).rounds(idle, COHORTS)
    plain, _, expected = run.rounds(parameters(), COHORTS)
    assert_identical({k: server.params[k] for k in plain.params}, plain.params)
    assert_identical(history, expected)
    assert_identical(clients.private["idle"], np.ones((6, 2), np.float32))


def test_only_shared_leaves_cross_the_wire_and_meet_the_server_optimiser():
    seen = []

    def encode(update, state, client_state, ctx):
        seen.append({name: x.shape for name, x in tree.named_leaves(update)})
        return update, client_state, {}

    link = Uplink(lambda p: (), lambda p: (), encode, lambda aggregate, state, report, ctx: (aggregate, state, report))
    algorithm = clipped(server_tx=optax.adamw(0.1, weight_decay=0.5), uplink=link)
    server, _, _ = Run(algorithm, intercepts(), fc.extend.LocalWork(BATCH)).rounds(START, ROUNDS)
    assert all(shapes == {"slope": (3,)} for shapes in seen)
    assert seen
    assert server.params["own"] == START["own"]  # neither moved nor decayed
    assert {x.shape for x in jax.tree.leaves(server.opt_state)} == {(), (3,)}


def test_a_client_whose_own_part_is_lost_is_dropped_and_keeps_the_old_one():
    def loss(params, batch, key):
        losses, values = squared(params, batch, key)
        nothing = params["own"] - jax.lax.stop_gradient(params["own"])
        return losses + jnp.where(
            batch["lost"], jnp.inf, 0.0
        ) * nothing, values  # infinite in this leaf's gradient only

    lost = np.repeat(np.arange(N) == 2, SIZES)  # the client of a single step: nothing tells it but its own part
    data = dataclasses.replace(intercepts(), examples={**intercepts().examples, "lost": lost})
    algorithm = fc.partially_private(fc.fedavg(loss, optax.sgd(LR)), "own")
    server, clients, history = Run(algorithm, data, fc.extend.LocalWork(BATCH)).rounds(START, [[0, 2]])
    assert history[0]["dropped"] == 1
    assert clients.private["own"][2] == START["own"]
    assert clients.private["own"][0] != START["own"]
    assert np.all(np.isfinite(server.params["slope"]))


@pytest.mark.parametrize(
    ("private", "words"), [("(", "regular expression"), ("user", "none or all"), (".", "none or all")]
)
def test_patterns_that_cannot_be_are_one_sentence(private, words):
    with pytest.raises(fc.InvalidInput, match=words):
        fc.partially_private(fc.fedavg(squared, optax.sgd(0.1)), private).init(START)


def test_clients_are_evaluated_with_their_own_model_and_new_ones_with_the_first():
    data = intercepts()
    algorithm = clipped()
    own = np.float32([1, 2, 3, 4])
    clients = fc.extend.ClientState((), (), {"own": own, "slope": None})
    params = {"slope": np.float32([1, 0, -1]), "own": np.float32(0.25)}
    held_out = fc.FederatedData(data.examples, data.offsets, ["d", "new", "a", "c"], np.linspace(1, 2, sum(SIZES)))
    gathered = {}

    def summarise(values, data):
        gathered.update(values)
        return {"worst": values["loss"].max()}

    options = {"algorithm": algorithm, "population": data, "summarise": summarise, "batch_size": 7}
    evaluate = fc.evaluator(squared, {"set": held_out}, **options)
    scores = evaluate(params, clients)
    intercept = np.repeat([4, 0.25, 1, 3], SIZES)
    losses = 0.5 * (data.examples["x"] @ params["slope"] + intercept - data.examples["y"]) ** 2
    np.testing.assert_allclose(gathered["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(scores["set/loss"], np.average(losses, weights=held_out.weights), rtol=1e-5)
    np.testing.assert_allclose(scores["set/worst"], losses.max(), rtol=1e-5)


def test_without_a_model_of_ones_own_it_is_the_evaluator():
    data = dataclasses.replace(population(), weights=np.linspace(0.5, 2, population().num_examples))
    algorithm = fc.fedavg(softmax_loss, optax.sgd(0.1))
    sets = {"a": data, "b": population()}
    ours = fc.evaluator(softmax_loss, sets, algorithm=algorithm, batch_size=8)(parameters(), ())
    theirs = fc.evaluator(softmax_loss, sets, batch_size=8)(parameters())
    assert ours == theirs


def test_auroc_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = np.r_[0, 1, rng.integers(2, size=rng.integers(1, 40))]
        scores = rng.integers(6, size=len(labels)) / 5  # with ties
        np.testing.assert_allclose(scoring.auroc(scores, labels), metrics.roc_auc_score(labels, scores))
    assert np.isnan(scoring.auroc(np.array([0.1, 0.9]), np.array([1, 1])))


def test_calibration_error_is_the_sum_over_bins():
    rng = np.random.default_rng(0)
    p = np.r_[0.0, 1.0, rng.random(200)]
    y = (rng.random(202) < p**2).astype(int)
    expected = 0.0
    for b in range(10):
        inside = (p >= b / 10) & ((p < (b + 1) / 10) | (b == 9))
        if inside.any():
            expected += inside.mean() * abs(y[inside].mean() - p[inside].mean())
    np.testing.assert_allclose(scoring.calibration_error(p, y), expected)
    assert expected > 0.1


def test_what_is_frozen_is_an_argument_of_the_round_and_goes_nowhere():
    def scaffold(loss):
        link = fc.uplink.quantile_clip(0.3)
        return fc.scaffold(loss, optax.adam(0.05), optax.adam(0.03, eps=1e-3), uplink=link)

    fixed = np.float32([0.5, -1.0, 2.0])
    start = {**parameters(), "b": fixed}
    algorithm = fc.partially_frozen(scaffold(softmax_loss), "^b$")
    closed_over = scaffold(lambda params, batch, key: softmax_loss({**params, "b": fixed}, batch, key))
    run, other = Run(algorithm, population()), Run(closed_over, population())
    server, clients, history = run.rounds(start, COHORTS)
    expected, expected_clients, expected_history = other.rounds({"w": start["w"]}, COHORTS)
    assert_identical(server.params["b"], fixed)
    assert_close(jax.tree.leaves(server._replace(params=server.params["w"])), jax.tree.leaves(expected))
    assert_close(jax.tree.leaves(clients), jax.tree.leaves(expected_clients))
    assert_close(history, expected_history)  # bytes among them

    def constants(run, params):
        server, clients = run.start(params)
        cohort = jax.tree.map(lambda x: x[0], run.cohort(COHORTS[0], 0, clients))
        return jax.make_jaxpr(run.algorithm.round)(server, cohort, jax.random.key(0)).consts

    assert any(np.shape(x) == fixed.shape for x in constants(other, {"w": start["w"]}))
    assert not any(np.shape(x) == fixed.shape for x in constants(run, start))


def test_a_part_may_be_frozen_and_another_private():
    start = {"own": np.float32(1), "slope": np.zeros(3, np.float32), "w": np.ones(2, np.float32)}
    algorithm = fc.partially_frozen(fc.partially_private(fc.fedavg(squared, optax.sgd(LR)), "own"), "^slope")
    kept = algorithm.init_client(start)
    assert jax.tree.leaves(kept) == [1]
    assert_identical(algorithm.personal({**start, "own": np.float32(3)}, kept), start)
    assert fc.partially_frozen(fc.fedavg(squared, optax.sgd(LR)), "^slope").personal is None
    for frozen, says in (("nothing", "found in some of the parameters, not none or all: own, slope, w"), (".", "all")):
        with pytest.raises(fc.InvalidInput, match=says):
            fc.partially_frozen(fc.fedavg(squared, optax.sgd(LR)), frozen).init(start)
    with pytest.raises(fc.InvalidInput, match=r"frozen: '\(' is not a regular expression"):
        fc.partially_frozen(fc.fedavg(squared, optax.sgd(LR)), "(")
    with pytest.raises(fc.InvalidInput, match="sends something else"):
        fc.compressed_broadcast(algorithm, fc.compression.qsgd(8))
