"""The oracle checked against finite differences, jax.grad, optax 0.2.8 in a plain loop, and sums done by hand."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import averaging as o

D, H, K = 4, 5, 3


@contextlib.contextmanager
def x64():
    """float64 in JAX for this block alone: other tests in the process are left in float32."""
    with jax.enable_x64(True):
        yield


def make_params(name, seed=0):
    r = np.random.default_rng(seed)
    if name == "linear":
        return {"w": r.normal(size=D), "b": np.array(r.normal())}
    if name == "softmax":
        return {"w": r.normal(size=(D, K)), "b": r.normal(size=K)}
    return {"w1": r.normal(size=(D, H)), "b1": r.normal(size=H), "w2": r.normal(size=(H, K)), "b2": r.normal(size=K)}


def make_batch(name, n=6, seed=0, weighted=True):
    r = np.random.default_rng(seed + 100)
    y = r.normal(size=n) if name == "linear" else r.integers(0, K, size=n)
    return r.normal(size=(n, D)), y, (r.uniform(0.2, 2.0, size=n) if weighted else None)


def make_cohort(name, sizes=((4, 3), (5,), (2, 2, 6)), seed=0, weighted=True):
    return [[make_batch(name, n, seed + 10 * i + j, weighted) for j, n in enumerate(s)] for i, s in enumerate(sizes)]


def jax_mean_loss(name, p, x, y, w):
    """The same losses written a second time, batched, for jax.grad."""
    if name == "linear":
        losses = 0.5 * (x @ p["w"] + p["b"] - y) ** 2
    else:
        z = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"] if name == "mlp" else x @ p["w"] + p["b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(z, y)
    return jnp.sum(w * losses) / jnp.sum(w)


def close(a, b, rtol=1e-12, atol=1e-14):
    assert set(a) == set(b)
    for k in a:
        assert np.shape(a[k]) == np.shape(b[k]), k
        np.testing.assert_allclose(np.asarray(a[k]), np.asarray(b[k]), rtol=rtol, atol=atol, err_msg=k)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", list(o.MODELS))
def test_gradient_against_central_differences(name, weighted):
    model, p = o.MODELS[name], make_params(name)
    x, y, w = make_batch(name, weighted=weighted)
    weights = np.ones(len(x)) if w is None else w

    def mean(q):
        return np.sum(weights * model.losses(q, x, y)) / np.sum(weights)

    g = model.grad(p, x, y, w)
    for k in p:
        assert g[k].shape == p[k].shape
        assert g[k].dtype == np.float64
        for index in np.ndindex(p[k].shape):
            h = 1e-5
            up, down = o.as64(p), o.as64(p)
            up[k][index] += h
            down[k][index] -= h
            assert g[k][index] == pytest.approx((mean(up) - mean(down)) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", list(o.MODELS))
def test_gradient_and_loss_against_jax(name):
    model, p = o.MODELS[name], make_params(name)
    x, y, w = make_batch(name)
    with x64():
        loss, g = jax.value_and_grad(lambda q: jax_mean_loss(name, q, x, y, w))(jax.tree.map(jnp.asarray, p))
    assert model.mean_loss(p, x, y, w) == pytest.approx(float(loss), rel=1e-13)
    close(model.grad(p, x, y, w), g)


def test_losses_by_hand():
    p = {"w": np.array([1.0, -2.0]), "b": np.array(0.5)}
    np.testing.assert_allclose(o.linear.losses(p, np.array([[3.0, 1.0], [0.0, 0.0]]), np.array([0.0, 0.5])), [1.125, 0])
    flat = {"w": np.zeros((2, 4)), "b": np.zeros(4)}
    np.testing.assert_allclose(o.softmax.losses(flat, np.ones((1, 2)), np.array([2])), [np.log(4.0)])
    far = {"w": np.zeros((2, 2)), "b": np.array([1e4, -1e4])}  # no overflow in the log-sum-exp
    np.testing.assert_allclose(o.softmax.losses(far, np.ones((2, 2)), np.array([0, 1])), [0.0, 2e4])


@pytest.mark.parametrize("name", list(o.MODELS))
def test_weight_zero_rows_are_never_read(name):
    model, p = o.MODELS[name], make_params(name)
    x, y, w = make_batch(name)
    padded_x = np.concatenate([x, np.full((2, D), np.nan)])
    padded = padded_x, np.concatenate([y, y[:2]]), np.concatenate([w, [0.0, 0.0]])
    close(model.grad(p, *padded), model.grad(p, x, y, w), rtol=0, atol=0)
    assert model.sums(p, *padded)[3] == len(x)
    close(model.grad(p, x, y, np.zeros(len(x))), o.zeros_like(p))


# --- optimisers ------------------------------------------------------------------------------------------------------

PAIRS = {
    "sgd": (lambda: o.sgd(0.1), lambda: optax.sgd(0.1)),
    "momentum": (lambda: o.sgd(0.1, 0.9), lambda: optax.sgd(0.1, momentum=0.9)),
    "nesterov": (lambda: o.sgd(0.1, 0.9, True), lambda: optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adam": (lambda: o.adam(0.05), lambda: optax.adam(0.05)),
    "adam-eps": (lambda: o.adam(0.05, 0.8, 0.9, 1e-2), lambda: optax.adam(0.05, b1=0.8, b2=0.9, eps=1e-2)),
    "rmsprop": (lambda: o.rmsprop(0.05), lambda: optax.rmsprop(0.05)),
    "rmsprop-eps": (lambda: o.rmsprop(0.05, 0.7, 0.1), lambda: optax.rmsprop(0.05, decay=0.7, eps=0.1)),
    "adagrad": (lambda: o.adagrad(0.05), lambda: optax.adagrad(0.05)),
    "adagrad-zero": (
        lambda: o.adagrad(0.05, 0.0, 0.1),
        lambda: optax.adagrad(0.05, initial_accumulator_value=0.0, eps=0.1),
    ),
    "yogi": (lambda: o.yogi(0.05), lambda: optax.yogi(0.05)),
    "yogi-b": (lambda: o.yogi(0.05, 0.8, 0.9, 1e-2), lambda: optax.yogi(0.05, b1=0.8, b2=0.9, eps=1e-2)),
    "clip-norm": (
        lambda: [o.clip_by_global_norm(1.5), o.sgd(0.1)],
        lambda: optax.chain(optax.clip_by_global_norm(1.5), optax.sgd(0.1)),
    ),
    "clip-value": (lambda: [o.clip(0.3), o.sgd(0.1)], lambda: optax.chain(optax.clip(0.3), optax.sgd(0.1))),
    "clip-decay-momentum": (
        lambda: [o.clip_by_global_norm(0.5), o.add_decayed_weights(0.1), o.sgd(0.1, 0.9)],
        lambda: optax.chain(
            optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
        ),
    ),
    "decay-clip-adam": (
        lambda: [o.add_decayed_weights(0.3), o.clip_by_global_norm(1.0), o.adam(0.1)],
        lambda: optax.chain(optax.add_decayed_weights(0.3), optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    ),
}


@pytest.mark.parametrize("which", list(PAIRS))
def test_optimiser_against_optax(which):
    mine, theirs = (f() for f in PAIRS[which])
    r = np.random.default_rng(3)
    p = make_params("softmax")
    # Sizes from tiny (eps matters) to large (clips fire), and one gradient that is exactly zero.
    grads = [o.scale(s, {k: r.normal(size=v.shape) for k, v in p.items()}) for s in (1.0, 1e-4, 0.0, 3.0, 1e-3, 0.5)]
    with x64():
        q = jax.tree.map(jnp.asarray, p)
        states, opt_state = o.tx_init(mine, p), theirs.init(q)
        for g in grads:
            u, states, _ = o.tx_update(mine, g, states, p)
            v, opt_state = theirs.update(jax.tree.map(jnp.asarray, g), opt_state, q)
            assert all(a.dtype == jnp.float64 for a in jax.tree.leaves(v))
            close(u, v, rtol=1e-12)
            p, q = o.add(p, u), optax.apply_updates(q, v)
        close(p, q, rtol=1e-12)


def test_optimisers_by_hand():
    p = {"w": np.array([0.0, 0.0])}
    g = {"w": np.array([3.0, -4.0])}

    def steps(tx, n):
        state, out = o.tx_init(tx, p), []
        for _ in range(n):
            u, state, fired = o.tx_update(tx, g, state, p)
            out.append((u["w"], fired))
        return out

    np.testing.assert_allclose([u for u, _ in steps(o.sgd(0.1, 0.5), 3)], -0.1 * np.outer([1, 1.5, 1.75], g["w"]))
    np.testing.assert_allclose([u for u, _ in steps(o.sgd(0.1, 0.5, True), 2)], -0.1 * np.outer([1.5, 1.75], g["w"]))
    np.testing.assert_allclose(steps(o.adam(0.1, eps=0.0), 1)[0][0], [-0.1, 0.1])
    np.testing.assert_allclose(steps(o.rmsprop(0.1, 0.75, 0.0), 1)[0][0], [-0.2, 0.2])
    np.testing.assert_allclose(steps(o.adagrad(1.0, 16.0, 0.0), 1)[0][0], [-3 / 5, 4 / np.sqrt(32)])
    for c, expected, fired in [(1.0, [-0.6, 0.8], True), (5.0, [-3, 4], False), (9.0, [-3, 4], False)]:
        u, f = steps([o.clip_by_global_norm(c), o.sgd(1.0)], 1)[0]
        np.testing.assert_allclose(u, expected)
        assert f is fired
    u, f = steps([o.clip(3.5), o.sgd(1.0)], 1)[0]
    np.testing.assert_allclose(u, [-3, 3.5])
    assert f is True
    assert steps([o.clip(4.0), o.sgd(1.0)], 1)[0][1] is False


def test_clipping_a_zero_gradient_is_safe():
    zero = {"w": np.zeros(3)}
    for c in (0.0, 1.0):
        u, fired = o.clip_to_norm(zero, c)
        assert not fired
        assert np.all(u["w"] == 0.0)


# --- local work ------------------------------------------------------------------------------------------------------


def jax_local(name, p, batches, tx):
    """Local training once more, with jax.grad and optax."""
    q0 = q = jax.tree.map(jnp.asarray, p)
    state = tx.init(q)
    for x, y, w in batches:
        g = jax.grad(lambda t, x=x, y=y, w=w: jax_mean_loss(name, t, x, y, w))(q)
        u, state = tx.update(g, state, q)
        q = optax.apply_updates(q, u)
    return jax.tree.map(lambda a, b: np.asarray(a - b), q, q0)


@pytest.mark.parametrize("which", ["sgd", "nesterov", "clip-decay-momentum", "clip-value", "adam", "rmsprop"])
@pytest.mark.parametrize("name", list(o.MODELS))
def test_local_update_against_jax_and_optax(name, which):
    p, batches = make_params(name), make_cohort(name)[2]
    mine, theirs = (f() for f in PAIRS[which])
    delta, stats = o.local_update(p, batches, o.MODELS[name], mine)
    with x64():
        expected = jax_local(name, p, batches, theirs)
    close(delta, expected, rtol=1e-9, atol=1e-12)
    assert stats["steps"] == len(batches)
    assert stats["examples"] == sum(len(x) for x, _, _ in batches)
    assert stats["weight_sum"] == pytest.approx(sum(np.sum(w) for _, _, w in batches))


def test_local_update_by_hand():
    # f(w, b) = (2 w + b - 4)^2 / 2 from (0, 0), lr 0.1: residuals -4, then g = (-8, -4), so (0.8, 0.4), residual -2.
    batch = (np.array([[2.0]]), np.array([4.0]), np.array([3.0]))
    p = {"w": np.zeros(1), "b": np.array(0.0)}
    delta, stats = o.local_update(p, [batch, batch], o.linear, [o.sgd(0.1)])
    close(delta, {"w": np.array([0.8 + 0.4]), "b": np.array(0.4 + 0.2)})
    assert stats == {"loss_sum": 3 * (8.0 + 2.0), "weight_sum": 6.0, "steps": 2, "clipped": 0, "examples": 2}
    # Norms are sqrt(80) and sqrt(20): a clip at 5 shrinks the first step alone, to 5/sqrt(80) of itself.
    delta, stats = o.local_update(p, [batch], o.linear, [o.clip_by_global_norm(5.0), o.sgd(0.1)])
    assert o.global_norm(delta) == pytest.approx(0.5)
    assert stats["clipped"] == 1
    one = {"w": np.array([0.8]), "b": np.array(0.4)}
    assert o.local_update(one, [batch], o.linear, [o.clip_by_global_norm(5.0), o.sgd(0.1)])[1]["clipped"] == 0


def test_padding_batch_takes_no_step():
    p, batches = make_params("softmax"), make_cohort("softmax")[0]
    x, y, w = batches[0]
    padding = (np.full_like(x, np.nan), y, np.zeros_like(w))
    tx = [o.add_decayed_weights(0.1), o.sgd(0.1, 0.9)]
    plain = o.local_update(p, batches, o.softmax, tx)
    padded = o.local_update(p, [*batches, padding], o.softmax, tx)
    close(padded[0], plain[0], rtol=0, atol=0)
    assert padded[1] == plain[1]
    plain = o.fedsgd_update(p, batches, o.softmax, tx)
    padded = o.fedsgd_update(p, [padding, *batches], o.softmax, tx)
    close(padded[0], plain[0], rtol=0, atol=0)
    assert padded[1] == plain[1]


# --- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("name", list(o.MODELS))
def test_fedsgd_is_centralised_gradient_descent(name, clip):
    """Weighted by examples, FedSGD is GD on the pooled mean loss; a clip of the mean sits in the server's chain."""
    p, cohort = make_params(name), make_cohort(name)
    server = [o.sgd(0.3)] if clip is None else [o.clip_by_global_norm(clip), o.sgd(0.3)]
    got, history = o.fedavg_rounds(p, [cohort] * 4, o.MODELS[name], lambda: [o.sgd(1.0)], server, algorithm="fedsgd")
    x, y, w = o.pool(cohort)
    close(got, o.gradient_descent(p, x, y, o.MODELS[name], 0.3, 4, clip=clip, weights=w), rtol=1e-10)
    assert history[0]["loss"] == pytest.approx(o.MODELS[name].mean_loss(p, x, y, w))
    assert [h["steps"] for h in history] == [3] * 4
    assert history[0]["examples"] == len(x)


def test_fedavg_with_one_full_batch_is_fedsgd():
    p = make_params("mlp")
    cohort = make_cohort("mlp", sizes=((4,), (7,), (3,)))

    def run(weighting, algorithm):
        return o.fedavg_rounds(
            p,
            [cohort] * 3,
            o.mlp,
            lambda: [o.clip_by_global_norm(0.5), o.sgd(0.2)],
            o.adam(0.1),
            weighting=weighting,
            update_clip=0.08,
            algorithm=algorithm,
        )

    for weighting in ("examples", "uniform"):
        (fedavg, history), (fedsgd, history_sgd) = run(weighting, "fedavg"), run(weighting, "fedsgd")
        close(fedavg, fedsgd, rtol=1e-10)  # (x + u) - x against u
        for h, h_sgd in zip(history, history_sgd, strict=True):
            assert h == pytest.approx(h_sgd, rel=1e-10)


def test_one_client_and_a_server_of_rate_one_is_plain_training():
    p, client = make_params("softmax"), make_cohort("softmax")[2]
    got, _ = o.fedavg_rounds(p, [[client]] * 2, o.softmax, lambda: [o.sgd(0.2)], o.sgd(1.0))
    delta, _ = o.local_update(p, client * 2, o.softmax, [o.sgd(0.2)])
    close(got, o.add(p, delta))


def test_fedavg_is_the_average_of_local_models():
    """Algorithm 1 literally: w_{t+1} = sum_k (n_k / n) w_{t+1}^k."""
    p, cohort = make_params("mlp"), make_cohort("mlp", weighted=False)
    got, _ = o.fedavg_rounds(p, [cohort], o.mlp, lambda: o.sgd(0.2), o.sgd(1.0))
    expected, n = o.zeros_like(p), [sum(len(x) for x, _, _ in c) for c in cohort]
    for client, n_k in zip(cohort, n, strict=True):
        w_k = o.add(p, o.local_update(p, client, o.mlp, o.sgd(0.2))[0])
        expected = o.add(expected, o.scale(n_k / sum(n), w_k))
    close(got, expected)


@pytest.mark.parametrize("server", ["sgd", "momentum", "adam", "adagrad", "yogi"])
def test_rounds_against_jax_and_optax(server):
    name, clip = "mlp", 0.1
    p = make_params(name)
    rounds = [make_cohort(name, seed=1000 * t) for t in range(3)]
    mine, theirs = (f() for f in PAIRS[server])
    client_mine, client_theirs = PAIRS["clip-norm"]
    got, history = o.fedavg_rounds(p, rounds, o.mlp, client_mine, mine, update_clip=clip)
    with x64():
        q = jax.tree.map(jnp.asarray, p)
        state, norms, shrunk = theirs.init(q), [], []
        for cohort in rounds:
            deltas = [jax_local(name, q, c, client_theirs()) for c in cohort]
            shrunk.append(np.mean([float(optax.tree.norm(d)) > clip for d in deltas]))
            deltas = [optax.clip_by_global_norm(clip).update(jax.tree.map(jnp.asarray, d), None)[0] for d in deltas]
            w = np.array([sum(np.sum(b[2]) for b in c) for c in cohort])
            mean = jax.tree.map(lambda *d, w=w: sum(a * b for a, b in zip(w, d, strict=True)) / sum(w), *deltas)
            u, state = theirs.update(jax.tree.map(jnp.negative, mean), state, q)
            q = optax.apply_updates(q, u)
            norms.append(float(optax.tree.norm(mean)))
    close(got, q, rtol=1e-9, atol=1e-12)
    assert [h["update_norm"] for h in history] == pytest.approx(norms)
    assert [h["clipped_updates"] for h in history] == pytest.approx(shrunk)
    assert all(h["steps"] == 6 and h["clients"] == 3 and h["dropped"] == 0 and h["examples"] == 22 for h in history)


def test_aggregate_by_hand():
    def client(weight_sum, loss_sum, steps, clipped, examples):
        return {
            "weight_sum": weight_sum,
            "loss_sum": loss_sum,
            "steps": steps,
            "clipped": clipped,
            "examples": examples,
        }

    deltas = [{"w": np.array(v)} for v in ([3.0, 4.0], [0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0], [9.0, 9.0])]
    stats = [client(1.0, 4.0, 2, 1, 2), client(3.0, 2.0, 3, 0, 3)]
    stats += [client(5.0, np.nan, 7, 7, 5), client(2.0, 1.0, 1, 1, 1)]
    stats.append(client(0.0, 0.0, 0, 0, 0))  # an empty client: no say, however odd its delta
    mean, m = o.aggregate(deltas, stats)
    np.testing.assert_allclose(mean["w"], [0.75, 1.75])
    expected = {
        "loss": 1.5,
        "examples": 5,
        "steps": 5,
        "clients": 2,
        "dropped": 2,
        "clipped_steps": 0.2,
        "clipped_updates": 0.0,
    }
    assert m == {**expected, "update_norm": pytest.approx(np.hypot(0.75, 1.75))}
    np.testing.assert_allclose(o.aggregate(deltas, stats, "uniform")[0]["w"], [1.5, 2.5])
    mean, m = o.aggregate(deltas, stats, "uniform", update_clip=2.5)
    np.testing.assert_allclose(mean["w"], [0.75, 1.5])
    assert m["clipped_updates"] == 0.5
    with pytest.raises(ValueError):
        o.aggregate(deltas, stats, "median")


def test_a_client_gone_to_nan_is_dropped():
    p, cohort = make_params("softmax"), make_cohort("softmax")
    x, y, w = cohort[1][0]
    for poison in (np.nan, np.inf):
        bad = [(np.where(np.arange(D) == 0, poison, x), y, w)]
        for algorithm in ("fedavg", "fedsgd"):
            args = o.softmax, lambda: [o.clip_by_global_norm(1.0), o.sgd(0.1)], o.sgd(1.0), "examples", 0.5, algorithm
            got, history = o.fedavg_rounds(p, [[cohort[0], bad, cohort[2]]], *args)
            without, history_without = o.fedavg_rounds(p, [[cohort[0], cohort[2]]], *args)
            close(got, without, rtol=0, atol=0)
            assert history == [{**history_without[0], "dropped": 1}]


def test_round_with_nobody_left():
    p, cohort = make_params("linear"), make_cohort("linear")
    x, y, w = cohort[0][0]
    bad = [(x * np.nan, y, w)]
    server = o.sgd(1.0, 0.5)
    for empty in ([bad], []):
        args = o.linear, lambda: o.sgd(0.1), server
        first, _ = o.fedavg_rounds(p, [cohort], *args)
        skipped, history = o.fedavg_rounds(p, [cohort, empty], *args, empty_round="skip")
        close(skipped, first, rtol=0, atol=0)
        stepped, _ = o.fedavg_rounds(p, [cohort, empty], *args)
        close(o.sub(stepped, first), o.scale(0.5, o.sub(first, p)))  # momentum alone
        assert history[1]["clients"] == 0
        assert history[1]["dropped"] == len(empty)
        assert np.isnan(history[1]["loss"])
        assert history[1]["update_norm"] == 0.0


def test_inputs_are_left_alone():
    p, cohort = make_params("mlp"), make_cohort("mlp")
    before = o.as64(p)
    o.fedavg_rounds(p, [cohort] * 2, o.mlp, lambda: o.adam(0.1), o.yogi(0.1))
    o.gradient_descent(p, *o.pool(cohort)[:2], o.mlp, 0.1, 2)
    close(p, before, rtol=0, atol=0)
