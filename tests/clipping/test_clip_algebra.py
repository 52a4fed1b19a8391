"""Every norm, scope and shape: the guarantee, for any input of either type."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from problems import assert_close

from fedjax_clip import InvalidInput, clipping

NORMS = {"l1": (clipping.l1, 1), "l2": (clipping.l2, 2), "linf": (clipping.linf, np.inf)}
SCOPES = {
    "whole": (clipping.whole, lambda t: [np.concatenate([x.ravel() for x in t.values()])]),
    "layer": (clipping.layer, lambda t: [np.concatenate([t["a/b"], t["a/w"].ravel()]), t["c"]]),
    "groups": (
        lambda: clipping.groups({"first": "^a", "second": "."}),
        lambda t: [np.concatenate([t["a/b"], t["a/w"].ravel()]), t["c"]],
    ),
    "unit": (clipping.unit, lambda t: [t["a/b"], *t["a/w"].T, t["c"]]),
    "element": (clipping.element, lambda t: [x[None] for x in np.concatenate([x.ravel() for x in t.values()])]),
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
sizes = st.one_of(
    st.just(0.0),
    st.floats(-2, 2, width=32),
    st.floats(1e-20, 1e-10),
    st.floats(1e10, 2.0**50),
    st.floats(-(2.0**50), -1e10),
)
trees = st.fixed_dictionaries(
    {
        "a/b": hnp.arrays(np.float32, (3,), elements=sizes),
        "a/w": hnp.arrays(np.float32, (2, 3), elements=sizes),
        "c": hnp.arrays(np.float32, (2,), elements=sizes),
    }
)


def nested(flat, dtype):
    return {"a": {"b": flat["a/b"].astype(dtype), "w": flat["a/w"].astype(dtype)}, "c": flat["c"].astype(dtype)}


def flat(tree):
    return {"a/b": tree["a"]["b"], "a/w": tree["a"]["w"], "c": tree["c"]}


def groups_of(scope, tree):
    arrays = {k: np.asarray(v).astype(np.float64) for k, v in flat(tree).items()}
    return SCOPES[scope][1](arrays)


def apply(tx, updates, params=None):
    return tx.update(updates, tx.init(updates), params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "scope"), [*itertools.product(NORMS, SCOPES)])
def test_hard_clips_bound_every_group_and_keep_its_direction(norm, scope, dtype):
    make, order = NORMS[norm]
    close = 1e-5 if dtype == "float32" else 2e-2
    tx = jax.jit(lambda u, bound: apply(clipping.clip(bound, norm=make(), scope=SCOPES[scope][0]()), u)[0])

    @settings(deadline=None, max_examples=15)
    @given(trees, st.floats(1e-3, 1e3))
    def holds(values, bound):
        updates = nested(values, DTYPES[dtype])
        clipped = tx(updates, bound)
        assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, clipped, updates))
        for before, after in zip(groups_of(scope, updates), groups_of(scope, clipped), strict=True):
            size = np.linalg.norm(before, order)
            assert np.linalg.norm(after, order) <= bound * (1 + close)
            factor = min(1.0, bound / size) if size else 1.0
            np.testing.assert_allclose(after, before * factor, rtol=2 * close, atol=1e-30)

    holds()


# Each with the length that it gives to a group of length n, at threshold 2.
SHAPES = {
    "smooth": (clipping.smooth(0.5), lambda n: 2 * n / (0.5 + n)),
    "normalise": (clipping.normalise(), lambda n: 2.0 if n else 0.0),
    "delta": (clipping.delta_floor(0.25), lambda n: max(0.25 * n, min(n, 2.0))),
    "two sided": (clipping.two_sided(0.5), lambda n: min(max(n, 0.5), 2.0) if n else 0.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_each_shape_guarantees(shape, scope, dtype):
    factor, length = SHAPES[shape]
    close = 1e-5 if dtype == "float32" else 2e-2
    tx = jax.jit(lambda u: apply(clipping.clip(2.0, scope=SCOPES[scope][0](), shape=factor), u)[0])

    @settings(deadline=None, max_examples=15)
    @given(trees)
    def holds(values):
        updates = nested(values, DTYPES[dtype])
        for before, after in zip(groups_of(scope, updates), groups_of(scope, tx(updates)), strict=True):
            size = np.linalg.norm(before)
            if not 0 < size < 1e-18:  # whose square is not a normal float32
                np.testing.assert_allclose(np.linalg.norm(after), length(size), rtol=close, atol=1e-30)

    holds()


TRANSFORMS = {
    "global norm": clipping.clip_by_global_norm(1.0),
    "layers": clipping.clip(1.0, scope=clipping.layer()),
    "auto": clipping.auto_clip(50, window=4),
    "z": clipping.z_clip(warmup=0),
    "agc": clipping.adaptive_gradient_clip(0.1),
    "smoothed": clipping.smoothed_clip(1.0),
    "normalised": clipping.normalised(1.0),
    "delta": clipping.delta_clip(1.0, 0.1),
    "two sided": clipping.two_sided_clip(0.1, 1.0),
    "u": clipping.u_clip(clipping.clip_by_global_norm(1.0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_zero_stays_zero(name):
    zeros = jax.tree.map(
        jnp.zeros_like, nested({"a/b": np.ones(3), "a/w": np.ones((2, 3)), "c": np.ones(2)}, np.float32)
    )
    clipped, state = apply(TRANSFORMS[name], zeros, jax.tree.map(jnp.ones_like, zeros))
    assert_close(clipped, zeros)
    assert jax.tree.structure(state) == jax.tree.structure(TRANSFORMS[name].init(zeros))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_nan_never_passes_for_a_number(name, bad):
    """So the client is dropped. An infinity may become the bound, where elements are clipped one by one."""
    updates = {"a": {"b": np.float32([1, bad, 1]), "w": np.ones((2, 3), np.float32)}, "c": np.ones(2, np.float32)}
    clipped, state = apply(TRANSFORMS[name], updates, jax.tree.map(np.ones_like, updates))
    value = clipped["a"]["b"][1]
    assert not np.isfinite(value) or (np.isinf(bad) and name == "two sided" and value == 1.0)
    if name in ("auto", "z"):  # and leaves no trace in the history
        after, _ = TRANSFORMS[name].update(jax.tree.map(np.ones_like, updates), state)
        assert_close(after, jax.tree.map(np.ones_like, updates))


KEEPING = {
    "auto": clipping.auto_clip(50, window=8),
    "auto by layer": clipping.clip(clipping.percentile(50, window=8), scope=clipping.layer()),
    "z": clipping.z_clip(),
    "z at once": clipping.z_clip(warmup=2),
    "z by unit": clipping.clip(clipping.z_score(), scope=clipping.unit()),
    "z of l1": clipping.clip(clipping.z_score(), norm=clipping.l1()),
    "u": clipping.u_clip(clipping.clip_by_global_norm(1.0)),
    "u of z": clipping.u_clip(clipping.z_clip(warmup=4)),
}


@functools.partial(jax.jit, static_argnums=0)
def run_clip(name, gradients):
    """Norms of what comes out and the last output, of gradients ``[T, 4]``."""
    tx = KEEPING[name]

    def step(state, g):
        out, state = tx.update({"g": g}, state)
        return state, out["g"]

    outs = jax.lax.scan(step, tx.init({"g": gradients[0]}), gradients)[1]
    return jnp.linalg.norm(outs, axis=1), outs[-1]


@pytest.mark.parametrize("name", KEEPING)
def test_one_absurd_gradient_neither_kills_nor_disables_a_clip_that_remembers(name):
    rng = np.random.default_rng(0)
    usual = (np.ones(4) + 0.1 * rng.normal(size=(80, 4))).astype(np.float32)
    usual *= 0.9 / np.linalg.norm(usual, axis=1).max()
    for place in (0, 3, 40):
        for bad in (np.nan, np.inf, 1e30, 5e18, 1e9):
            gradients = usual.copy()
            gradients[place] = bad
            gradients[70] = 1000 * usual[70]  # an outlier of the ordinary kind
            norms, last = run_clip(name, gradients)
            assert not np.isfinite(norms[place]) or place == 0 or norms[place] < 10, (place, bad)
            assert norms[70] < 10, (place, bad)
            if not name.startswith("u"):  # which still gives back the ordinary outlier
                np.testing.assert_allclose(last, usual[-1], rtol=0.2)
            assert np.isfinite(norms[place + 1 :]).all()
            assert (norms[place + 10 :] > 0.5).all(), (place, bad)  # and not everything is clipped away


def test_a_threshold_for_each_group():
    updates = {"body": np.float32([3, 4]), "head": np.float32([6, 8])}
    scope = clipping.groups({"head": "head", "body": "."})
    clipped, state = apply(clipping.clip(clipping.fixed({"head": 1.0, "body": 10.0}), scope=scope), updates)
    assert_close(clipped, {"body": np.float32([3, 4]), "head": np.float32([0.6, 0.8])})
    assert state.fired == {"body": 0.0, "head": 1.0}
    report = clipping.clip_report(state)
    assert sorted(report) == [
        *("clipped", "clipped/body", "clipped/head", "norm/body", "norm/head", "threshold/body", "threshold/head")
    ]
    with pytest.raises(InvalidInput, match="no threshold for the group 'rest'"):
        apply(clipping.clip(clipping.fixed({"head": 1.0}), scope=clipping.groups({"head": "head"})), updates)


def test_a_scheduled_threshold_counts_its_updates():
    tx = clipping.clip(clipping.scheduled(optax.linear_schedule(1.0, 3.0, 2)))
    state, lengths = tx.init(np.zeros(1, np.float32)), []
    for _ in range(4):
        clipped, state = tx.update(np.float32([10.0]), state)
        lengths.append(float(clipped[0]))
    assert lengths == [1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: clipping.clip(0.0),
        lambda: clipping.clip(clipping.fixed({"a": -1.0})),
        lambda: clipping.auto_clip(101),
        lambda: clipping.z_clip(0.0),
        lambda: clipping.adaptive_gradient_clip(-0.1),
        lambda: clipping.smoothed_clip(1.0, 0.0),
        lambda: clipping.groups({"a": "("}),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_built(make):
    with pytest.raises(InvalidInput):
        make()
