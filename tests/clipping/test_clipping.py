"""Clips of a step: optax's results, their guarantee for every input, and when they say that they fired."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from problems import assert_close, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import clipping
from fedjax_clip.core import metrics, tree

trees = st.fixed_dictionaries(
    {
        "w": hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**49), 2.0**49, width=32)),
        "b": hnp.arrays(np.float32, (5,), elements=st.floats(-(2.0**49), 2.0**49, width=32)),
    }
)
bounds = st.floats(1e-6, 1e6)


def apply(tx, updates):
    return tx.update(updates, tx.init(updates))


@settings(deadline=None, max_examples=50)
@given(trees, bounds)
def test_clip_by_global_norm_is_optax_and_holds_its_bound(updates, bound):
    clipped, state = apply(clipping.clip_by_global_norm(bound), updates)
    expected, _ = apply(optax.clip_by_global_norm(bound), updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-30), clipped, expected)
    assert tree.norm(clipped) <= bound * (1 + 1e-5)
    norm = np.sqrt(sum(np.sum(np.square(x.astype(np.float64))) for x in updates.values()))
    if abs(norm / bound - 1) > 1e-5:
        assert bool(state.fired[""]) == (norm > bound)


@settings(deadline=None, max_examples=50)
@given(trees, bounds)
def test_clip_by_value_is_optax_and_holds_its_bound(updates, bound):
    clipped, state = apply(clipping.clip_by_value(bound), updates)
    jax.tree.map(np.testing.assert_array_equal, clipped, apply(optax.clip(bound), updates)[0])
    assert all(np.max(np.abs(x)) <= np.float32(bound) for x in clipped.values())
    assert bool(state.fired[""]) == any(np.any(np.abs(x) > np.float32(bound)) for x in updates.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("clip", [clipping.clip_by_global_norm, clipping.clip_by_value])
def test_zero_stays_zero_and_types_stay(clip, dtype):
    zeros = {"w": jnp.zeros((2, 3), dtype), "b": jnp.zeros(4, dtype)}
    clipped, state = apply(clip(0.5), zeros)
    assert all(x.dtype == dtype and not np.any(x) for x in jax.tree.leaves(clipped))
    assert not state.fired[""]
    large, state = apply(clip(0.5), jax.tree.map(lambda x: x + 100, zeros))
    assert all(x.dtype == dtype for x in jax.tree.leaves(large))
    assert state.fired[""]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_pass_for_a_step(bad):
    updates = {"w": np.ones((2, 3), np.float32), "b": np.array([1, bad], np.float32)}
    clipped, state = apply(clipping.clip_by_global_norm(1.0), updates)
    assert not np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(clipped)])).all()
    assert state.fired[""]


def test_a_watched_transform_is_found_anywhere_in_a_chain():
    clip = clipping.clip_by_global_norm(1.0)
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.chain(clip, optax.trace(0.9)), optax.scale(-0.1))
    params = {"w": jnp.full((4, 4), 0.1)}
    for gradient, fired in ((10.0, True), (0.01, False)):
        grads = {"w": jnp.full((4, 4), gradient)}
        _, state = tx.update(grads, tx.init(params), params)
        assert bool(clipping.clip_report(state)["clipped"].total) == fired
    assert clipping.clip_report(optax.adam(0.1).init(params)) == {}


def test_the_norm_may_be_mapped_and_differentiated():
    x = {"w": jnp.arange(12.0).reshape(2, 2, 3) + 1, "b": jnp.ones((2, 2))}
    norms = jax.vmap(tree.norm)(x)
    np.testing.assert_allclose(norms, [tree.norm(jax.tree.map(lambda v, i=i: v[i], x)) for i in range(2)], rtol=1e-6)
    gradient = jax.grad(tree.norm)({"w": jnp.array([[3.0, 4.0]])})["w"]
    np.testing.assert_allclose(gradient, [[0.6, 0.8]], rtol=1e-6)


def boxed(kind):
    """``(parameters of two dense layers of Flax, forward)``, each in a box or bare."""
    x = np.ones((1, 2), np.float32)
    if kind == "nnx":

        class Model(nnx.Module):
            def __init__(self, rngs):
                self.first, self.second = nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

            def __call__(self, x):
                return self.second(self.first(x))

        graph, params = nnx.split(Model(nnx.Rngs(0)))
        return params, lambda params, x: nnx.merge(graph, params)(x)
    wrap = {"bare": lambda f, _: f, "logical": nn.with_logical_partitioning, "partitioned": nn.with_partitioning}[kind]
    kernel, bias = wrap(nn.initializers.lecun_normal(), ("in", "out")), wrap(nn.initializers.zeros, ("out",))
    first, second = (nn.Dense(n, kernel_init=kernel, bias_init=bias) for n in (3, 1))
    params = {"first": first.init(jax.random.key(0), x)["params"], "second": second.init(jax.random.key(1), x[:, :1])}
    params["second"] = second.init(jax.random.key(1), np.ones((1, 3), np.float32))["params"]
    return params, lambda params, x: second.apply(
        {"params": params["second"]}, first.apply({"params": params["first"]}, x)
    )


NAMES = ["first/bias", "first/kernel", "second/bias", "second/kernel"]


@pytest.mark.parametrize("kind", ["bare", "nnx", "logical", "partitioned"])
def test_rules_by_name_do_not_meet_the_boxes_of_flax(kind):
    params, forward = boxed(kind)
    assert list(tree.flatten_with_names(params)) == NAMES
    zeros = jax.tree.map(jnp.zeros_like, params)
    scopes = {
        clipping.layer(): {"first", "second"},
        clipping.groups({"kernels": "kernel$", "rest": "."}): {"kernels", "rest"},
        clipping.unit(): set(NAMES),
    }
    for scope, groups in scopes.items():
        assert set(clipping.clip(1.0, scope=scope).init(zeros).norm) == groups
    matching, rest = tree.split(params, "first/kernel$")
    assert [name for name, _ in tree.named_leaves(matching)] == ["first/kernel"]
    assert_close(tree.join(matching, rest), params)

    def loss(params, batch, key):
        return jnp.square(forward(params, batch["x"])[:, 0] - 1)

    data = fc.FederatedData({"x": np.ones((4, 2), np.float32)}, [0, 2, 4])
    tuned = fc.lora(loss, params, rank=1)
    assert list(tuned.init(jax.random.key(0))["adapters"]) == ["first/kernel", "second/kernel"]
    if kind == "partitioned":  # which wants a mesh of those axes where the model is applied
        return
    frozen = fc.partially_frozen(fc.fedavg(loss, optax.sgd(0.1)), "^first/.*s$")
    private = fc.partially_private(fc.fedavg(loss, optax.sgd(0.1)), "^second/bias$")
    for algorithm, still in ((frozen, "first/bias"), (private, "second/bias")):
        after = dict(tree.named_leaves(fc.train(algorithm, data, params, rounds=1, devices=jax.devices()[:1]).params))
        moved = {name for name, x in tree.named_leaves(params) if np.any(after[name] != x)}
        assert moved == set(NAMES) - {still}


def test_a_key_called_value_is_a_name():
    assert list(tree.flatten_with_names({"value": 1, "a": {"value": 2}})) == ["a/value", "value"]


@jax.jit
def deciles(values):
    total = jax.tree.map(lambda x: jnp.sum(x, 0), jax.vmap(metrics.Histogram.of)(values))
    return [total.quantile(q) for q in (0.1, 0.5, 0.9)]


@pytest.mark.parametrize("scale", [1.0, 2e-10, 2e5, 2.0**-60, 2.0**60])  # wherever float32 has a norm
def test_quantiles_of_norms_are_within_a_bin(scale):
    values = (scale * np.exp(np.random.default_rng(0).normal(size=500))).astype(np.float32)
    for found, q in zip(deciles(values), (0.1, 0.5, 0.9), strict=True):
        assert abs(np.log2(found / np.quantile(values, q))) < 0.126  # half a bin, and what is between two values


def test_odd_norms_have_their_bins_too():
    odd = jax.vmap(metrics.Histogram.of)(jnp.array([0.0, jnp.nan, jnp.inf, 1.8e19]))
    assert jnp.sum(odd.counts, 1).tolist() == [1, 0, 0, 1]
    assert odd.counts[0, 0] == odd.counts[3, -1] == 1
    assert deciles(jnp.zeros(500)) == [0, 0, 0]
    assert np.isnan(deciles(jnp.full(500, jnp.nan))).all()


@pytest.mark.parametrize("clip", [fc.uplink.clip_by_global_norm(0.3), fc.uplink.quantile_clip(0.3)])
def test_who_is_clipped(clip):
    def row(clients, link):
        algorithm = fc.fedavg(softmax_loss, optax.sgd(0.5), uplink=link)
        return fc.train(algorithm, population().select(clients), parameters(), rounds=1, shuffle=False).history[0]

    groups = {"first": [0, 1], "rest": [2, 3, 4, 5], "nobody": [99]}
    together = row(range(6), fc.uplink.by_group(clip, groups))
    for name in ("first", "rest"):
        assert together[f"uplink/clipped/{name}"] == pytest.approx(row(groups[name], clip)["uplink/clipped"])
    assert together["uplink/clipped/first"] != together["uplink/clipped/rest"]
    assert np.isnan(together["uplink/clipped/nobody"])


def test_what_clips_did_is_drawn():
    steps = optax.chain(clipping.clip_by_global_norm(1.0), clipping.clip(0.2, scope=clipping.layer()), optax.sgd(0.1))
    link = fc.uplink.with_bias(fc.uplink.quantile_clip(0.1))
    result = fc.train(fc.fedavg(softmax_loss, steps, uplink=link), population(), parameters(), rounds=3)
    row = result.history[-1]
    assert 0 < row["client_norm/p10"] <= row["client_norm/p50"] <= row["client_norm/p90"]
    assert row["clipped_clients"] >= row["clipped_steps"] > 0
    titles = [axes.get_title(loc="left") for axes in fc.plots.clipping(result.history).axes]
    wanted = ["fraction clipped", "thresholds", "norms before the clip", "bias of the aggregate (1: none)"]
    assert titles == wanted
    plain = fc.train(fc.fedavg(softmax_loss, optax.sgd(0.1)), population(), parameters(), rounds=1)
    assert fc.plots.clipping(plain.history) is None
