"""The oracle's rounds, checked against jax.grad and optax 0.2.8 in a plain loop, and sums done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import averaging, models, optimisers, trees
from oracles.cases import PAIRS, D, close, jax_mean_loss, make_cohort, make_params, x64


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
@pytest.mark.parametrize("name", list(models.MODELS))
def test_local_update_against_jax_and_optax(name, which):
    p, batches = make_params(name), make_cohort(name)[2]
    mine, theirs = (f() for f in PAIRS[which])
    delta, stats = averaging.local_update(p, batches, models.MODELS[name], mine)
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
    delta, stats = averaging.local_update(p, [batch, batch], models.linear, [optimisers.sgd(0.1)])
    close(delta, {"w": np.array([0.8 + 0.4]), "b": np.array(0.4 + 0.2)})
    assert stats == {"loss_sum": 3 * (8.0 + 2.0), "weight_sum": 6.0, "steps": 2, "clipped": 0, "examples": 2}
    # Norms are sqrt(80) and sqrt(20): a clip at 5 shrinks the first step alone, to 5/sqrt(80) of itself.
    delta, stats = averaging.local_update(
        p, [batch], models.linear, [optimisers.clip_by_global_norm(5.0), optimisers.sgd(0.1)]
    )
    assert trees.global_norm(delta) == pytest.approx(0.5)
    assert stats["clipped"] == 1
    one = {"w": np.array([0.8]), "b": np.array(0.4)}
    assert (
        averaging.local_update(one, [batch], models.linear, [optimisers.clip_by_global_norm(5.0), optimisers.sgd(0.1)])[
            1
        ]["clipped"]
        == 0
    )


def test_padding_batch_takes_no_step():
    p, batches = make_params("softmax"), make_cohort("softmax")[0]
    x, y, w = batches[0]
    padding = (np.full_like(x, np.nan), y, np.zeros_like(w))
    tx = [optimisers.add_decayed_weights(0.1), optimisers.sgd(0.1, 0.9)]
    plain = averaging.local_update(p, batches, models.softmax, tx)
    padded = averaging.local_update(p, [*batches, padding], models.softmax, tx)
    close(padded[0], plain[0], rtol=0, atol=0)
    assert padded[1] == plain[1]
    plain = averaging.fedsgd_update(p, batches, models.softmax, tx)
    padded = averaging.fedsgd_update(p, [padding, *batches], models.softmax, tx)
    close(padded[0], plain[0], rtol=0, atol=0)
    assert padded[1] == plain[1]


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("name", list(models.MODELS))
def test_fedsgd_is_centralised_gradient_descent(name, clip):
    """Weighted by examples, FedSGD is GD on the pooled mean loss; a clip of the mean sits in the server's chain."""
    p, cohort = make_params(name), make_cohort(name)
    server = [optimisers.sgd(0.3)] if clip is None else [optimisers.clip_by_global_norm(clip), optimisers.sgd(0.3)]
    got, history = averaging.fedavg_rounds(
        p, [cohort] * 4, models.MODELS[name], lambda: [optimisers.sgd(1.0)], server, algorithm="fedsgd"
    )
    x, y, w = averaging.pool(cohort)
    close(got, averaging.gradient_descent(p, x, y, models.MODELS[name], 0.3, 4, clip=clip, weights=w), rtol=1e-10)
    assert history[0]["loss"] == pytest.approx(models.MODELS[name].mean_loss(p, x, y, w))
    assert [h["steps"] for h in history] == [3] * 4
    assert history[0]["examples"] == len(x)


def test_fedavg_with_one_full_batch_is_fedsgd():
    p = make_params("mlp")
    cohort = make_cohort("mlp", sizes=((4,), (7,), (3,)))

    def run(weighting, algorithm):
        return averaging.fedavg_rounds(
            p,
            [cohort] * 3,
            models.mlp,
            lambda: [optimisers.clip_by_global_norm(0.5), optimisers.sgd(0.2)],
            optimisers.adam(0.1),
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
    got, _ = averaging.fedavg_rounds(
        p, [[client]] * 2, models.softmax, lambda: [optimisers.sgd(0.2)], optimisers.sgd(1.0)
    )
    delta, _ = averaging.local_update(p, client * 2, models.softmax, [optimisers.sgd(0.2)])
    close(got, trees.add(p, delta))


def test_fedavg_is_the_average_of_local_models():
    """Algorithm 1 literally: w_{t+1} = sum_k (n_k / n) w_{t+1}^k."""
    p, cohort = make_params("mlp"), make_cohort("mlp", weighted=False)
    got, _ = averaging.fedavg_rounds(p, [cohort], models.mlp, lambda: optimisers.sgd(0.2), optimisers.sgd(1.0))
    expected, n = trees.zeros_like(p), [sum(len(x) for x, _, _ in c) for c in cohort]
    for client, n_k in zip(cohort, n, strict=True):
        w_k = trees.add(p, averaging.local_update(p, client, models.mlp, optimisers.sgd(0.2))[0])
        expected = trees.add(expected, trees.scale(n_k / sum(n), w_k))
    close(got, expected)


@pytest.mark.parametrize("server", ["sgd", "momentum", "adam", "adagrad", "yogi"])
def test_rounds_against_jax_and_optax(server):
    name, clip = "mlp", 0.1
    p = make_params(name)
    rounds = [make_cohort(name, seed=1000 * t) for t in range(3)]
    mine, theirs = (f() for f in PAIRS[server])
    client_mine, client_theirs = PAIRS["clip-norm"]
    got, history = averaging.fedavg_rounds(p, rounds, models.mlp, client_mine, mine, update_clip=clip)
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
    mean, m = averaging.aggregate(deltas, stats)
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
    np.testing.assert_allclose(averaging.aggregate(deltas, stats, "uniform")[0]["w"], [1.5, 2.5])
    mean, m = averaging.aggregate(deltas, stats, "uniform", update_clip=2.5)
    np.testing.assert_allclose(mean["w"], [0.75, 1.5])
    assert m["clipped_updates"] == 0.5
    with pytest.raises(ValueError):
        averaging.aggregate(deltas, stats, "median")


def test_a_client_gone_to_nan_is_dropped():
    p, cohort = make_params("softmax"), make_cohort("softmax")
    x, y, w = cohort[1][0]
    for poison in (np.nan, np.inf):
        bad = [(np.where(np.arange(D) == 0, poison, x), y, w)]
        for algorithm in ("fedavg", "fedsgd"):
            args = (
                models.softmax,
                lambda: [optimisers.clip_by_global_norm(1.0), optimisers.sgd(0.1)],
                optimisers.sgd(1.0),
                "examples",
                0.5,
                algorithm,
            )
            got, history = averaging.fedavg_rounds(p, [[cohort[0], bad, cohort[2]]], *args)
            without, history_without = averaging.fedavg_rounds(p, [[cohort[0], cohort[2]]], *args)
            close(got, without, rtol=0, atol=0)
            assert history == [{**history_without[0], "dropped": 1}]


def test_round_with_nobody_left():
    p, cohort = make_params("linear"), make_cohort("linear")
    x, y, w = cohort[0][0]
    bad = [(x * np.nan, y, w)]
    server = optimisers.sgd(1.0, 0.5)
    for empty in ([bad], []):
        args = models.linear, lambda: optimisers.sgd(0.1), server
        first, _ = averaging.fedavg_rounds(p, [cohort], *args)
        skipped, history = averaging.fedavg_rounds(p, [cohort, empty], *args, empty_round="skip")
        close(skipped, first, rtol=0, atol=0)
        stepped, _ = averaging.fedavg_rounds(p, [cohort, empty], *args)
        close(trees.sub(stepped, first), trees.scale(0.5, trees.sub(first, p)))  # momentum alone
        assert history[1]["clients"] == 0
        assert history[1]["dropped"] == len(empty)
        assert np.isnan(history[1]["loss"])
        assert history[1]["update_norm"] == 0.0


def test_inputs_are_left_alone():
    p, cohort = make_params("mlp"), make_cohort("mlp")
    before = trees.as64(p)
    averaging.fedavg_rounds(p, [cohort] * 2, models.mlp, lambda: optimisers.adam(0.1), optimisers.yogi(0.1))
    averaging.gradient_descent(p, *averaging.pool(cohort)[:2], models.mlp, 0.1, 2)
    close(p, before, rtol=0, atol=0)
