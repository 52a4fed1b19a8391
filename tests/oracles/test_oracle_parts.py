"""The oracle's models and optimisers, checked against finite differences, jax.grad, optax 0.2.8, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import models, optimisers, trees
from oracles.cases import PAIRS, D, close, jax_mean_loss, make_batch, make_params, x64


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", list(models.MODELS))
def test_gradient_against_central_differences(name, weighted):
    model, p = models.MODELS[name], make_params(name)
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
            up, down = trees.as64(p), trees.as64(p)
            up[k][index] += h
            down[k][index] -= h
            assert g[k][index] == pytest.approx((mean(up) - mean(down)) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", list(models.MODELS))
def test_gradient_and_loss_against_jax(name):
    model, p = models.MODELS[name], make_params(name)
    x, y, w = make_batch(name)
    with x64():
        loss, g = jax.value_and_grad(lambda q: jax_mean_loss(name, q, x, y, w))(jax.tree.map(jnp.asarray, p))
    assert model.mean_loss(p, x, y, w) == pytest.approx(float(loss), rel=1e-13)
    close(model.grad(p, x, y, w), g)


def test_losses_by_hand():
    p = {"w": np.array([1.0, -2.0]), "b": np.array(0.5)}
    np.testing.assert_allclose(
        models.linear.losses(p, np.array([[3.0, 1.0], [0.0, 0.0]]), np.array([0.0, 0.5])), [1.125, 0]
    )
    flat = {"w": np.zeros((2, 4)), "b": np.zeros(4)}
    np.testing.assert_allclose(models.softmax.losses(flat, np.ones((1, 2)), np.array([2])), [np.log(4.0)])
    far = {"w": np.zeros((2, 2)), "b": np.array([1e4, -1e4])}  # no overflow in the log-sum-exp
    np.testing.assert_allclose(models.softmax.losses(far, np.ones((2, 2)), np.array([0, 1])), [0.0, 2e4])


@pytest.mark.parametrize("name", list(models.MODELS))
def test_weight_zero_rows_are_never_read(name):
    model, p = models.MODELS[name], make_params(name)
    x, y, w = make_batch(name)
    padded_x = np.concatenate([x, np.full((2, D), np.nan)])
    padded = padded_x, np.concatenate([y, y[:2]]), np.concatenate([w, [0.0, 0.0]])
    close(model.grad(p, *padded), model.grad(p, x, y, w), rtol=0, atol=0)
    assert model.sums(p, *padded)[3] == len(x)
    close(model.grad(p, x, y, np.zeros(len(x))), trees.zeros_like(p))


@pytest.mark.parametrize("which", list(PAIRS))
def test_optimiser_against_optax(which):
    mine, theirs = (f() for f in PAIRS[which])
    r = np.random.default_rng(3)
    p = make_params("softmax")
    # Sizes from tiny (eps matters) to large (clips fire), and one gradient that is exactly zero.
    grads = [
        trees.scale(s, {k: r.normal(size=v.shape) for k, v in p.items()}) for s in (1.0, 1e-4, 0.0, 3.0, 1e-3, 0.5)
    ]
    with x64():
        q = jax.tree.map(jnp.asarray, p)
        states, opt_state = optimisers.tx_init(mine, p), theirs.init(q)
        for g in grads:
            u, states, _ = optimisers.tx_update(mine, g, states, p)
            v, opt_state = theirs.update(jax.tree.map(jnp.asarray, g), opt_state, q)
            assert all(a.dtype == jnp.float64 for a in jax.tree.leaves(v))
            close(u, v, rtol=1e-12)
            p, q = trees.add(p, u), optax.apply_updates(q, v)
        close(p, q, rtol=1e-12)


def test_optimisers_by_hand():
    p = {"w": np.array([0.0, 0.0])}
    g = {"w": np.array([3.0, -4.0])}

    def steps(tx, n):
        state, out = optimisers.tx_init(tx, p), []
        for _ in range(n):
            u, state, fired = optimisers.tx_update(tx, g, state, p)
            out.append((u["w"], fired))
        return out

    np.testing.assert_allclose(
        [u for u, _ in steps(optimisers.sgd(0.1, 0.5), 3)], -0.1 * np.outer([1, 1.5, 1.75], g["w"])
    )
    np.testing.assert_allclose(
        [u for u, _ in steps(optimisers.sgd(0.1, 0.5, True), 2)], -0.1 * np.outer([1.5, 1.75], g["w"])
    )
    np.testing.assert_allclose(steps(optimisers.adam(0.1, eps=0.0), 1)[0][0], [-0.1, 0.1])
    np.testing.assert_allclose(steps(optimisers.rmsprop(0.1, 0.75, 0.0), 1)[0][0], [-0.2, 0.2])
    np.testing.assert_allclose(steps(optimisers.adagrad(1.0, 16.0, 0.0), 1)[0][0], [-3 / 5, 4 / np.sqrt(32)])
    for c, expected, fired in [(1.0, [-0.6, 0.8], True), (5.0, [-3, 4], False), (9.0, [-3, 4], False)]:
        u, f = steps([optimisers.clip_by_global_norm(c), optimisers.sgd(1.0)], 1)[0]
        np.testing.assert_allclose(u, expected)
        assert f is fired
    u, f = steps([optimisers.clip(3.5), optimisers.sgd(1.0)], 1)[0]
    np.testing.assert_allclose(u, [-3, 3.5])
    assert f is True
    assert steps([optimisers.clip(4.0), optimisers.sgd(1.0)], 1)[0][1] is False


def test_clipping_a_zero_gradient_is_safe():
    zero = {"w": np.zeros(3)}
    for c in (0.0, 1.0):
        u, fired = trees.clip_to_norm(zero, c)
        assert not fired
        assert np.all(u["w"] == 0.0)
