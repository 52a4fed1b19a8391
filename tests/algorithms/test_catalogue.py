"""Every algorithm of the catalogue against a NumPy loop written from its formula alone, and its limiting cases."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import catalogue as oracle
from problems import assert_close, assert_identical

import fedjax_clip as fc
from fedjax_clip import clipping, uplink
from fedjax_clip.training.loop import client_states
from fedjax_clip.training.states import InMemory
from fedjax_clip.uplink.base import Context

N, BATCH, SIZES = 5, 2, (4, 8, 2, 6, 4)  # full batches, so that means over batches are means over examples
ROUNDS = ([0, 2, 3], [1, 3, 4], [3, 0, 1], [4, 2, 0])  # clients come again, and some late
ALL = ([0, 1, 2, 3, 4],) * 4


def problem(scale=1.0):
    """Linear regressions whose optima differ: ``(data, loss, x0, grad for the oracle)``."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), 3)).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    truth = scale * rng.normal(size=(N, 3))
    owner = np.repeat(np.arange(N), SIZES)
    y = (np.sum(x * truth[owner], 1) + 0.3 * rng.normal(size=len(x))).astype(np.float32)
    data = fc.FederatedData({"x": x, "y": y}, offsets)

    def loss(params, batch, key):
        return 0.5 * jnp.square(batch["x"] @ params["w"] - batch["y"])

    def grad(i, w, rows):
        error = x[rows].astype(np.float64) @ w - y[rows]
        return x[rows].T.astype(np.float64) @ error / len(rows)

    return data, loss, np.array([1.0, -2.0, 0.5], np.float32), grad


def run(algorithm, rounds=ROUNDS, scale=1.0):
    """The parameters after each round."""
    data, _, start, _ = problem(scale)
    params = {"w": start}
    server, clients = algorithm.init(params), client_states(algorithm, params, N)
    step, out = jax.jit(algorithm.round), []
    for r, ids in enumerate(rounds):
        cohort = fc.extend.plan(
            data, np.array(ids), fc.extend.LocalWork(BATCH, shuffle=False), seed=0, round=r, state=clients
        )
        server, states, metrics = step(server, jax.tree.map(lambda x: x[0], cohort), jax.random.key(0))
        InMemory(clients).scatter(cohort.ids, jax.tree.map(lambda x: x[None], states))
        assert metrics["dropped"] == 0
        out.append(np.asarray(server.params["w"]))
    return np.array(out)


def expected(function, rounds=ROUNDS, scale=1.0, **options):
    data, _, start, grad = problem(scale)

    def batches(i):
        return np.split(np.arange(data.offsets[i], data.offsets[i + 1]), SIZES[i] // BATCH)

    plans = [{i: batches(i) for i in ids} for ids in rounds]
    weights = {i: SIZES[i] for i in range(N)}
    return function(start.astype(np.float64), grad, plans, weights, **options)


LOSS = problem()[1]
SGD = optax.sgd(0.1)


def clipped(tau):
    return optax.chain(clipping.clip_by_global_norm(tau), SGD)


def memory(*args, lr=0.2, **options):
    return fc.fedsgd(LOSS, optax.sgd(1.0), optax.sgd(lr), uplink=uplink.memory(*args, **options))


TAU = 1.5

CASES = {
    "celgc": (fc.fedavg(LOSS, clipped(TAU)), oracle.celgc, {"lr": 0.1, "tau": TAU}),
    "clipped minibatch": (
        fc.fedsgd(LOSS, optax.sgd(1.0), optax.chain(clipping.clip_by_global_norm(TAU), SGD)),
        oracle.clipped_minibatch,
        {"lr": 0.1, "tau": TAU},
    ),
    "episode": (fc.episode(LOSS, SGD, threshold=TAU, fresh_batches=1), oracle.episode, {"lr": 0.1, "tau": TAU}),
    "episode, never clipped": (
        fc.episode(LOSS, SGD, threshold=1e3, fresh_batches=1),
        oracle.episode,
        {"lr": 0.1, "tau": 1e3},
    ),
    "scaffoldclip": (
        fc.scaffold(LOSS, clipped(TAU), reducer=fc.reduce.uniform_mean()),
        lambda x, grad, rounds, weights, **k: oracle.scaffold(x, grad, rounds, dict.fromkeys(weights, 1.0), **k),
        {"lr": 0.1, "tau": TAU, "num_clients": N},
    ),
    "fat-pr": (
        fc.fedavg(LOSS, SGD, optax.sgd(0.7), uplink=uplink.clip_by_global_norm(0.1 * TAU)),
        oracle.fat_pr,
        {"lr": 0.1, "server_lr": 0.7, "tau": TAU},
    ),
    "update clip": (
        fc.fedavg(LOSS, SGD, uplink=uplink.clip_by_global_norm(0.2)),
        oracle.update_clip,
        {"lr": 0.1, "bound": 0.2},
    ),
    "quantile clip": (
        fc.fedavg(LOSS, SGD, uplink=uplink.quantile_clip(0.3, 0.6, 0.4)),
        lambda *a, **k: oracle.quantile_clip(*a, **k)[0],
        {"lr": 0.1, "c0": 0.3, "target_unclipped_quantile": 0.6, "rate": 0.4},
    ),
    "zeroing, clip": (
        fc.fedavg(
            LOSS,
            SGD,
            uplink=uplink.chain(uplink.zeroing(0.2, 0.7, 0.5, 1.5, 0.05), uplink.quantile_clip(0.3, 0.6, 0.4)),
        ),
        lambda *a, **k: oracle.zero_then_clip(*a, **k)[0],
        {
            **{"lr": 0.1, "zero0": 0.2, "zero_quantile": 0.7, "zero_rate": 0.5, "multiplier": 1.5, "increment": 0.05},
            **{"c0": 0.3, "clip_quantile": 0.6, "clip_rate": 0.4},
        },
    ),
    "bi2clip": (
        fc.fedavg(
            LOSS,
            optax.chain(clipping.two_sided_clip(0.2, 1.0), SGD),
            optax.chain(clipping.two_sided_clip(0.05, 0.1), optax.sgd(0.9)),
        ),
        oracle.bi2clip,
        {"lr": 0.1, "server_lr": 0.9, "d": 0.2, "u": 1.0, "server_d": 0.05, "server_u": 0.1},
    ),
    "centered": (
        fc.fedavg(LOSS, SGD, uplink=uplink.chain(uplink.relative_to_last(), uplink.clip_by_global_norm(0.2))),
        oracle.centered,
        {"lr": 0.1, "tau": 0.2},
    ),
    "centered, three iterations": (
        fc.fedavg(LOSS, SGD, uplink=uplink.relative_to_last(), reducer=fc.reduce.centered_mean(0.2, 3)),
        oracle.centered_often,
        {"lr": 0.1, "tau": 0.2, "iterations": 3},
    ),
    "fedprox": (
        fc.fedavg(LOSS, optax.chain(fc.local.proximal(0.5), clipped(TAU))),
        oracle.fedprox,
        {"lr": 0.1, "tau": TAU, "mu": 0.5},
    ),
    "fednova": (fc.fednova(LOSS, clipped(TAU)), oracle.fednova, {"lr": 0.1, "tau": TAU}),
    "feddyn": (
        fc.feddyn(LOSS, clipped(TAU), alpha=0.3),
        oracle.feddyn,
        {"lr": 0.1, "tau": TAU, "alpha": 0.3, "num_clients": N},
    ),
    "mimelite": (
        fc.mime(LOSS, clipped(TAU), beta=0.7, lite=True),
        oracle.mime_lite,
        {"lr": 0.1, "tau": TAU, "beta": 0.7},
    ),
    "mime": (fc.mime(LOSS, clipped(TAU), beta=0.7), oracle.mime, {"lr": 0.1, "tau": TAU, "beta": 0.7}),
}


@pytest.mark.parametrize("scale", [1.0, 5.0])  # gradients around the threshold, and far over it
@pytest.mark.parametrize("name", CASES)
def test_the_numpy_loop(name, scale):
    algorithm, function, options = CASES[name]
    assert_close(
        run(algorithm, scale=scale), np.array(expected(function, scale=scale, **options)), rtol=1e-4, atol=1e-5
    )


PLAIN, CELGC = fc.fedavg(LOSS, SGD), CASES["celgc"][0]  # each compiled once


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (fc.fedavg(LOSS, clipped(1e9)), PLAIN),
        (fc.scaffold(LOSS, clipped(1e9)), fc.scaffold(LOSS, SGD)),
        (fc.fedavg(LOSS, optax.chain(fc.local.proximal(0.0), clipped(TAU))), CELGC),
        (memory(clipping.clip_by_global_norm(TAU), 1.0, 1.0), memory(clipping.clip_by_global_norm(TAU))),
        (
            fc.fedavg(LOSS, SGD, uplink=uplink.chain(uplink.relative_to_last(), uplink.clip_by_global_norm(1e9))),
            PLAIN,
        ),
        (fc.fedavg(LOSS, SGD, uplink=uplink.with_bias(uplink.identity())), PLAIN),
        (fc.mime(LOSS, clipped(TAU), beta=0.0, lite=True), CELGC),
        (fc.fedavg(LOSS, optax.chain(clipping.two_sided_clip(0.0, 1e9), SGD)), PLAIN),
        (fc.fedavg(LOSS, optax.chain(clipping.delta_clip(TAU, 1.0), SGD)), PLAIN),
        (fc.fedavg(LOSS, optax.chain(clipping.delta_clip(TAU, 0.0), SGD)), CELGC),
        (
            fc.fedavg(LOSS, SGD, gradient=fc.local.per_example_gradient(clipping.clip_by_global_norm(1e9))),
            PLAIN,
        ),
    ],
    ids=range(11),
)
def test_limiting_cases(one, other):
    assert_close(run(one), run(other), rtol=1e-6, atol=1e-6)


def test_clip21_becomes_gradient_descent():
    """After finitely many rounds the differences fit through the clip, and x follows the exact gradients."""
    data, _, _, grad = problem()
    weights = np.array(SIZES) / sum(SIZES)
    xs = run(memory(clipping.clip_by_global_norm(2.0), lr=0.05), rounds=ALL * 10)
    whole = [np.arange(data.offsets[i], data.offsets[i + 1]) for i in range(N)]
    for before, after in itertools.pairwise(xs[20:]):
        g = sum(w * grad(i, before.astype(np.float64), whole[i]) for i, w in enumerate(weights))
        assert_close(after, before - 0.05 * g, rtol=1e-4, atol=1e-5)


def test_the_memory_of_all_clients_is_the_servers():
    algorithm = memory(clipping.clip_by_global_norm(0.3), 0.6, 0.8)
    data, _, start, _ = problem()
    result = fc.train(algorithm, data, {"w": start}, rounds=7, batch_size=BATCH)
    sent = result.state.clients.uplink[1]["w"]
    assert_close(np.average(sent, axis=0, weights=SIZES), result.state.server.uplink["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", [0.25, 0.5, 0.9])
def test_a_quantile_clip_settles_at_the_quantile_of_fixed_norms(target):
    link, norms = uplink.quantile_clip(3.0, target, 0.05), np.linspace(1.0, 2.0, 41, dtype=np.float32)
    bound = link.init({"x": norms[0]})
    context = uplink.Context(jax.random.key(0), jax.random.key(0), jnp.int32(0), jnp.float32(1))

    @jax.jit
    def round(bound):
        reports = jax.vmap(lambda n: link.encode({"x": n}, bound, (), context)[2])(norms)
        report = fc.extend.metrics.finish(jax.tree.map(jnp.sum, reports))
        return link.decode({"x": norms[0]}, bound, report, context)[1]

    for _ in range(400):
        after = round(bound)
        assert abs(np.log(after[""] / bound[""])) <= 0.05 + 1e-6
        bound = after
    assert abs(float(bound[""]) - np.quantile(norms, target)) < 0.06


def test_zeroing_comes_before_the_clip():
    """The clip sees the zero of what was far out, and its quantile counts it as unclipped."""
    link = uplink.chain(uplink.zeroing(1.0, multiplier=2.0, increment=0.0), uplink.quantile_clip(0.5))
    context = uplink.Context(jax.random.key(0), jax.random.key(0), jnp.int32(0), jnp.float32(1))
    state = link.init({"x": jnp.float32(0)})
    for size, sent, zeroed in ((3.0, 0.0, 1), (1.5, 0.5, 0), (0.2, 0.2, 0)):
        message, _, report = link.encode({"x": jnp.float32(size)}, state, ((), ()), context)
        assert_close(message["x"], np.float32(sent))
        assert report["0/zeroed"].total == zeroed
        assert report["1/within"].total == (sent <= 0.2)


def test_centered_clipping_that_never_binds_is_the_mean_and_else_moves_by_tau_an_iteration_at_most():
    def after(reducer, scale=1.0):
        return run(fc.fedavg(LOSS, SGD, uplink=uplink.relative_to_last(), reducer=reducer), scale=scale)

    mean = run(fc.fedavg(LOSS, SGD, reducer=fc.reduce.uniform_mean()))
    for iterations in (1, 3):
        assert_close(after(fc.reduce.centered_mean(np.inf, iterations)), mean, rtol=1e-5, atol=1e-6)
        first = after(fc.reduce.centered_mean(0.01, iterations), scale=100.0)[0] - problem()[2]
        assert 0 < np.linalg.norm(first) <= 0.01 * iterations * (1 + 1e-5)
    for bad in (0, 1.5, True):
        with pytest.raises(fc.InvalidInput, match="whole number"):
            fc.reduce.centered_mean(1.0, bad)


@pytest.mark.parametrize(("norm", "zeroed"), [(None, 1), (clipping.l1(), 1), (clipping.linf(), 0)])
def test_zeroing_measures_in_any_norm(norm, zeroed):
    link = uplink.zeroing(1.5, multiplier=1.0, increment=0.0, norm=norm)
    context = uplink.Context(jax.random.key(0), jax.random.key(0), jnp.int32(0), jnp.float32(1))
    update = {"b": jnp.float32(1.2), "w": jnp.array([[-1.2, 0.0]])}  # norms 2.4, 1.7 and 1.2
    message, _, report = link.encode(update, link.init(None), (), context)
    assert report["zeroed"].total == zeroed
    assert np.any(message["w"]) == (not zeroed)


def test_variates_are_means_of_raw_gradients_even_where_steps_are_clipped():
    data, loss, start, grad = problem(5.0)
    result = fc.train(fc.scaffold(loss, clipped(0.1)), data, {"w": start}, rounds=1, batch_size=BATCH, shuffle=False)
    y, total = start.astype(np.float64), 0
    for rows in np.split(np.arange(4), 2):  # the first client's two steps
        g = grad(0, y, rows)
        total, y = total + g, y - 0.1 * oracle.clip(g, 0.1)
    assert_close(result.state.clients.own["w"][0], (total / 2).astype(np.float32), rtol=1e-5)


def test_an_episode_takes_its_local_steps_on_other_batches_than_its_correction():
    """A client with one batch only sends its gradient; reusing the batch would move it."""
    data, loss, start, _ = problem()
    algorithm = fc.episode(loss, SGD, threshold=1.0, fresh_batches=1)
    result = fc.train(algorithm, data.select([2]), {"w": start}, rounds=1, batch_size=BATCH)
    assert_identical(result.params["w"], start)
    assert result.history[0]["mean_gradient_norm"] > 0


def test_the_threshold_on_gradients_does_not_move_with_the_learning_rate():
    """The paper's gamma is threshold times learning rate: a schedule of the rate keeps the threshold."""
    algorithm = fc.fedavg(LOSS, lambda r: optax.chain(clipping.clip_by_global_norm(0.5), optax.sgd(0.1 / (1 + r))))
    data, _, start, _ = problem(5.0)
    result = fc.train(algorithm, data, {"w": start}, rounds=3, batch_size=BATCH)
    assert [row["step_threshold"] for row in result.history] == [0.5] * 3


@pytest.mark.parametrize("make", [uplink.quantile_clip, uplink.zeroing])
def test_a_bound_that_follows_a_quantile_comes_back_from_the_smallest_number(make):
    link = make(1e-37, 0.5, 20.0)
    x = {"x": jnp.float32(0)}
    bound = link.init(x)
    ctx = Context(jax.random.key(0), jax.random.key(0), jnp.int32(-1), jnp.float32(1))
    for within in (1.0, 1.0, 0.0):  # all updates are zero, twice, and then none
        report = dict.fromkeys(("norm", "zeroed", "clipped"), jnp.float32(0)) | {"within": jnp.float32(within)}
        _, bound, _ = link.decode(x, bound, report, ctx)
    assert all(float(b) > 1e-37 for b in jax.tree.leaves(bound))


def test_each_example_is_clipped_before_the_mean():
    data, loss, start, grad = problem(5.0)
    algorithm = fc.fedavg(
        loss, optax.sgd(0.1), gradient=fc.local.per_example_gradient(clipping.clip_by_global_norm(1.0))
    )
    result = fc.train(algorithm, data.select([0]), {"w": start}, rounds=1, batch_size=4, shuffle=False)
    each = [oracle.clip(grad(0, start.astype(np.float64), np.array([i])), 1.0) for i in range(4)]
    assert_close(result.params["w"], (start - 0.1 * np.mean(each, axis=0)).astype(np.float32), rtol=1e-5)
    assert result.history[0]["example_clipped"] > 0


def test_clients_keep_the_history_of_their_clips():
    data, loss, start, _ = problem()
    tx = optax.chain(clipping.auto_clip(50, window=8), SGD)
    result = fc.train(fc.fedavg(loss, tx, keep_opt_state=True), data, {"w": start}, rounds=3, batch_size=BATCH)
    counts = result.state.clients.own[0].inner[""][1]
    assert counts.tolist() == [3 * size // BATCH for size in SIZES]
    link = uplink.at_client(clipping.auto_clip(50, window=8), keep_state=True)
    result = fc.train(fc.fedavg(loss, SGD, uplink=link), data, {"w": start}, rounds=3, batch_size=BATCH)
    assert result.state.clients.uplink.inner[""][1].tolist() == [3] * N
    with pytest.raises(fc.InvalidInput, match="keep_state=True"):
        fc.fedavg(loss, SGD, uplink=uplink.at_client(clipping.auto_clip(50))).init({"w": start})


def test_bias_is_measured_against_the_plain_mean():
    algorithm = fc.fedavg(LOSS, SGD, uplink=uplink.with_bias(uplink.clip_by_global_norm(0.05)))
    data, _, start, _ = problem()
    row = fc.train(algorithm, data, {"w": start}, rounds=1, batch_size=BATCH).history[0]
    assert 0 < row["uplink/bias/cosine"] < 1
    assert 0 < row["uplink/bias/norm"] < 1
    assert row["uplink/clipped"] == 1
