"""Clips from papers, each against a NumPy loop written from its formula alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import catalogue as oracle
from problems import assert_close, assert_identical

from fedjax_clip import clipping


def test_a_clip_is_before_or_after_weight_decay_as_the_chain_says():
    grads, params = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([10.0, 0.0])}
    clip, decay = clipping.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1)
    for tx, out in ((optax.chain(clip, decay), [1.6, 0.8]), (optax.chain(decay, clip), [1 / 2**0.5, 1 / 2**0.5])):
        assert_close(tx.update(grads, tx.init(params), params)[0]["w"], np.array(out, np.float32), rtol=1e-6)


def transformed(tx, gradients, params=None):
    update = jax.jit(tx.update)
    state, out = tx.init(params if params is not None else gradients[0]), []
    for g in gradients:
        u, state = update(g, state, params)
        out.append(np.asarray(u))
    return np.array(out)


def heavy_tailed(count=80, seed=0):
    return np.random.default_rng(seed).standard_t(2, size=(count, 4)).astype(np.float32)


@pytest.mark.parametrize("percent", [0, 10, 50, 90, 100])
def test_autoclip(percent):
    gs = heavy_tailed()
    assert_close(transformed(clipping.auto_clip(percent), gs), np.array(oracle.autoclip(gs, percent)), rtol=1e-4)
    assert_identical(transformed(clipping.auto_clip(percent), gs)[0], gs[0])


def test_a_rolling_percentile_forgets():
    gs = np.array([[100.0], *[[1.0]] * 9, [50.0]], np.float32)
    out = transformed(clipping.auto_clip(50, window=5), gs)
    assert_close(out[-1], np.float32([1.0]))
    assert_identical(out[:-1], np.minimum(gs[:-1], [[100.0]]))


@pytest.mark.parametrize("z", [1.0, 2.5])
def test_zclip(z):
    gs = heavy_tailed()
    wanted = np.array(oracle.zclip(gs, z=z, warmup=10))
    assert_close(transformed(clipping.z_clip(z, warmup=10), gs), wanted, rtol=1e-3, atol=1e-5)
    assert np.any(wanted != gs)
    same = np.full((60, 4), 0.5, np.float32)
    assert_identical(transformed(clipping.z_clip(warmup=10), same), same)


def test_u_clip_gives_back_what_it_takes():
    gs = heavy_tailed()
    tx = clipping.u_clip(clipping.clip_by_global_norm(1.0))
    out = transformed(tx, gs)
    assert_close(out, np.array(oracle.u_clip(gs, 1.0)), rtol=1e-4, atol=1e-5)
    state = tx.init(gs[0])
    for g in gs:
        _, state = tx.update(g, state)
    assert_close(out.sum(0) - gs.sum(0), -np.asarray(state[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0])
def test_delta_gclip(delta):
    gs = heavy_tailed()
    out = transformed(clipping.delta_clip(0.7, delta), gs)
    assert_close(out, np.array(oracle.delta_gclip(gs, 0.7, delta)), rtol=1e-5)
    norms = np.linalg.norm(gs, axis=1)
    assert np.all(np.linalg.norm(out, axis=1) >= delta * norms * (1 - 1e-5))


def test_agc_is_the_formula_and_optax_and_scale_free():
    rng = np.random.default_rng(0)
    w, g = (rng.normal(size=(6, 5)).astype(np.float32) for _ in range(2))
    tx = clipping.adaptive_gradient_clip(0.1)

    def apply(tx, w, g):
        return np.asarray(tx.update({"w": g}, tx.init({"w": w}), {"w": w})[0]["w"])

    assert_close(apply(tx, w, g), oracle.agc(g, w, 0.1, 1e-3), rtol=1e-5)
    assert_close(apply(tx, w, g), apply(optax.adaptive_grad_clip(0.1, 1e-3), w, g), rtol=1e-5)
    assert_close(apply(tx, 8 * w, 8 * g), 8 * apply(tx, w, g), rtol=1e-5)


SHAPES = [
    (),
    (5,),
    (1, 5),
    (5, 1),
    (4, 3),
    (4, 2, 3),
    (1, 2, 3),
    (2, 3, 1),
    (3, 3, 2, 4),
    (1, 1, 2, 4),
    (2, 2, 2, 2, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agc_has_the_units_of_optax_whatever_the_rank(shape):
    rng = np.random.default_rng(0)
    w, g = ({"w": rng.normal(size=shape).astype(np.float32)} for _ in range(2))
    ours, theirs = (
        jax.jit(tx.update)(g, tx.init(w), w)[0]
        for tx in (clipping.adaptive_gradient_clip(0.1), optax.adaptive_grad_clip(0.1))
    )
    assert_close(ours, theirs, rtol=1e-5)


def test_a_unit_of_an_attention_is_one_output_of_one_head():
    g = {"w": np.ones((9, 2, 4), np.float32) * np.arange(8, dtype=np.float32).reshape(2, 4)}
    clipped = clipping.clip(3.0, scope=clipping.unit())
    out = np.asarray(clipped.update(g, clipped.init(g))[0]["w"])
    np.testing.assert_allclose(np.linalg.norm(out, axis=0), np.minimum(3.0 * np.arange(8), 3).reshape(2, 4), rtol=1e-6)
