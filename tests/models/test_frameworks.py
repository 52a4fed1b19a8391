"""The page on frameworks: its five models are one function, with dropout from the loss's key, and what it refuses."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import fedjax_clip as fc

PAGE = (pathlib.Path(__file__).parents[2] / "docs/frameworks.md").read_text()
DATA = fc.FederatedData(
    {
        "x": np.random.default_rng(0).normal(size=(12, 64)).astype(np.float32),
        "y": np.arange(12, dtype=np.int32) % 10,
    },
    np.array([0, 6, 12]),
)


@pytest.fixture(scope="module")
def page():
    """What the page's programs define."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        if ">>> " not in block:
            exec(block, names)
    return names


FRAMEWORKS = ("nnx", "linen", "haiku", "equinox", "bare")


def given(page, name):
    """The framework's parameters, with the kernels of the model without one."""
    kernels = {(64, 32): page["bare_params"]["w1"], (32, 10): page["bare_params"]["w2"]}

    def fill(x):
        if x.ndim == 2:
            return kernels[x.shape] if x.shape in kernels else kernels[x.shape[::-1]].T
        return x

    def fill_biases(path, x):  # Equinox's biases are random
        return jnp.zeros_like(x) if x.ndim == 1 and "bias" in jax.tree_util.keystr(path) else fill(x)

    return jax.tree_util.tree_map_with_path(fill_biases, page[f"{name}_params"])


def test_all_frameworks_compute_the_same(page):
    losses, squares = {}, {}
    for name in FRAMEWORKS:
        loss = page[f"{name}_loss"]

        def mean(params, loss=loss):
            return loss(params, DATA.examples, None)[0].mean()

        params = given(page, name)
        losses[name] = np.asarray(loss(params, DATA.examples, None)[0])
        squares[name] = float(sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(mean)(params))))
    for name in FRAMEWORKS:
        np.testing.assert_allclose(losses[name], losses["bare"], rtol=1e-4)
        assert squares[name] == pytest.approx(squares["bare"], rel=1e-3)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_dropout_takes_the_losss_key_and_stops_in_evaluation(page, name):
    loss, params = page[f"{name}_loss"], page[f"{name}_params"]
    whole, again = (loss(params, DATA.examples, None)[0] for _ in range(2))
    one, same, other = (loss(params, DATA.examples, jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(whole, again)
    np.testing.assert_array_equal(one, same)
    assert np.any(one != whole)
    assert np.any(one != other)


def test_batch_normalisation_in_training_mode_is_warned_of():
    model = nn.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), DATA.examples["x"])

    def loss(params, batch, key):
        normed, _ = model.apply({**variables, **params}, batch["x"], mutable=["batch_stats"])
        return (normed**2).sum(-1) * batch["x"][:, 0]

    with pytest.warns(UserWarning, match="as batch normalisation in training mode does"):
        fc.train(fc.fedavg(loss, optax.sgd(0.1)), DATA, {"params": variables["params"]}, rounds=1, batch_size=4)


def test_a_key_is_no_parameter():
    params = {"w": np.zeros(3, np.float32), "key": jax.random.key(0)}
    with pytest.raises(fc.InvalidInput, match="'key' is a PRNG key, .* split it off"):
        fc.train(fc.fedavg(lambda p, b, k: b["x"].sum(-1) * p["w"].sum(), optax.sgd(0.1)), DATA, params, rounds=1)
