"""Parameters, batches and optimisers on which the oracle is compared with JAX and optax."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from oracles import optimisers

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


PAIRS = {
    "sgd": (lambda: optimisers.sgd(0.1), lambda: optax.sgd(0.1)),
    "momentum": (lambda: optimisers.sgd(0.1, 0.9), lambda: optax.sgd(0.1, momentum=0.9)),
    "nesterov": (lambda: optimisers.sgd(0.1, 0.9, True), lambda: optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adam": (lambda: optimisers.adam(0.05), lambda: optax.adam(0.05)),
    "adam-eps": (lambda: optimisers.adam(0.05, 0.8, 0.9, 1e-2), lambda: optax.adam(0.05, b1=0.8, b2=0.9, eps=1e-2)),
    "rmsprop": (lambda: optimisers.rmsprop(0.05), lambda: optax.rmsprop(0.05)),
    "rmsprop-eps": (lambda: optimisers.rmsprop(0.05, 0.7, 0.1), lambda: optax.rmsprop(0.05, decay=0.7, eps=0.1)),
    "adagrad": (lambda: optimisers.adagrad(0.05), lambda: optax.adagrad(0.05)),
    "adagrad-zero": (
        lambda: optimisers.adagrad(0.05, 0.0, 0.1),
        lambda: optax.adagrad(0.05, initial_accumulator_value=0.0, eps=0.1),
    ),
    "yogi": (lambda: optimisers.yogi(0.05), lambda: optax.yogi(0.05)),
    "yogi-b": (lambda: optimisers.yogi(0.05, 0.8, 0.9, 1e-2), lambda: optax.yogi(0.05, b1=0.8, b2=0.9, eps=1e-2)),
    "clip-norm": (
        lambda: [optimisers.clip_by_global_norm(1.5), optimisers.sgd(0.1)],
        lambda: optax.chain(optax.clip_by_global_norm(1.5), optax.sgd(0.1)),
    ),
    "clip-value": (
        lambda: [optimisers.clip(0.3), optimisers.sgd(0.1)],
        lambda: optax.chain(optax.clip(0.3), optax.sgd(0.1)),
    ),
    "clip-decay-momentum": (
        lambda: [optimisers.clip_by_global_norm(0.5), optimisers.add_decayed_weights(0.1), optimisers.sgd(0.1, 0.9)],
        lambda: optax.chain(
            optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
        ),
    ),
    "decay-clip-adam": (
        lambda: [optimisers.add_decayed_weights(0.3), optimisers.clip_by_global_norm(1.0), optimisers.adam(0.1)],
        lambda: optax.chain(optax.add_decayed_weights(0.3), optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    ),
}
