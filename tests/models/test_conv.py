"""Our convolution is Flax's: same parameters, outputs and gradients, however it is transformed."""

import functools
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

import fedjax_clip as fc
from fedjax_clip.models import CNN, Conv, conv_general_dilated, max_pool_2x2, warn_slow_convolutions

CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


def normal(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def same(ours, theirs, rtol=1e-4):
    """Equal types and, relative to the largest entry, values."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10 * max(1.0, np.abs(b).max(initial=0)))


def pair(conv, x, w):
    """Output and both gradients, with a cotangent that differs everywhere."""
    y, pull = jax.vjp(conv, x, w)
    return y, pull(normal(*y.shape).astype(y.dtype))


def both(x_shape, w_shape, *args, dtype="float32", wrap=lambda f: f, **kwargs):
    x, w = normal(*x_shape, dtype=dtype), normal(*w_shape, dtype=dtype, seed=1)
    for conv in (conv_general_dilated, jax.lax.conv_general_dilated):
        run = functools.partial(pair, lambda x, w, conv=conv: conv(x, w, *args, **kwargs))
        yield jax.jit(wrap(run))(x, w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (1, 3))], ids=["same", "valid", "explicit"])
@pytest.mark.parametrize(("kernel", "strides"), [((3, 3), 1), ((5, 5), 2), ((1, 1), 1), ((2, 4), (3, 1))])
def test_a_layer_is_flax_s(kernel, strides, padding, dtype):
    x = normal(3, 8, 7, 2, dtype=dtype)
    layers = [cls(5, kernel, strides, padding, dtype=dtype) for cls in (Conv, nn.Conv)]
    params = [layer.init(jax.random.key(0), x) for layer in layers]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert set(params[0]["params"]) == {"kernel", "bias"}

    same(*(pair(layer.apply, params[0], x) for layer in layers), rtol=1e-4 if dtype == "float32" else 4e-2)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    def pick(low, high):
        return data.draw(st.integers(low, high))

    rank = pick(1, 3)
    kernel = [pick(1, 5 - rank) for _ in range(rank)]
    strides, lhs_dilation, rhs_dilation = ([pick(1, 3) for _ in range(rank)] for _ in range(3))
    padding = [(pick(0, 3), pick(0, 3)) for _ in range(rank)]
    image = [pick(size * by, size * by + 4) for size, by in zip(kernel, rhs_dilation)]
    channels, features = pick(1, 3), pick(1, 3)
    spec = {1: ("NWC", "WIO", "NWC"), 2: CHANNELS_LAST, 3: ("NHWDC", "HWDIO", "NHWDC")}[rank]
    options = {"lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation, "dimension_numbers": spec}
    same(*both((pick(1, 3), *image, channels), (*kernel, channels, features), strides, padding, **options))


@pytest.mark.parametrize("strides", [1, 2])
def test_a_kernel_for_every_client(strides):
    args = ((strides, strides), "SAME", None, None, CHANNELS_LAST)
    for clients in (1, 4):
        same(*both((clients, 3, 8, 8, 2), (clients, 3, 3, 2, 5), *args, wrap=jax.vmap))
    same(*both((3, 8, 8, 2), (4, 3, 3, 2, 5), *args, wrap=lambda f: jax.vmap(f, (None, 0))))
    same(*both((4, 3, 8, 8, 2), (3, 3, 2, 5), *args, wrap=lambda f: jax.vmap(f, (0, None))))
    same(*both((2, 3, 8, 4, 8, 2), (3, 3, 2, 4, 5), *args, wrap=lambda f: jax.vmap(jax.vmap(f, (2, 3)), (0, None))))


def test_no_grouped_or_backward_convolution_is_compiled():
    x, w = normal(4, 3, 8, 8, 2), normal(4, 3, 3, 2, 5)

    def loss(x, w):
        return jnp.sum(conv_general_dilated(x, w, (2, 2), "SAME", None, None, CHANNELS_LAST) ** 2)

    for run, args in ((jax.grad(loss, (0, 1)), (x[0], w[0])), (jax.vmap(jax.grad(loss, (0, 1))), (x, w))):
        lines = [line for line in jax.jit(run).lower(*args).as_text().splitlines() if "stablehlo.convolution" in line]
        assert len(lines) >= 2  # of three, where the loss's value is not wanted, and each distinct one stands once
        for line in lines:
            assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line
            assert "batch_group_count = 1" in line
            assert "feature_group_count = 1" in line


def test_numerical_gradients_up_to_the_second():
    def conv(x, w):
        return jnp.tanh(conv_general_dilated(x, w, (2, 1), ((1, 0), (0, 2)), (1, 2), (2, 1), CHANNELS_LAST))

    with jax.enable_x64(True):
        args = normal(2, 5, 4, 2, dtype="float64"), normal(2, 3, 2, 3, dtype="float64")
        check_grads(conv, args, order=2, modes=["rev"])


@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((2, 6, 6, 4), (3, 3, 2, 4), {"dimension_numbers": CHANNELS_LAST, "feature_group_count": 2}),
        ((4, 6, 6, 2), (3, 3, 2, 4), {"dimension_numbers": CHANNELS_LAST, "batch_group_count": 2}),
        ((2, 3, 6, 6), (4, 3, 3, 3), {"dimension_numbers": None}),
        ((2, 2, 6, 3), (3, 3, 3, 4), {"dimension_numbers": CHANNELS_LAST}),  # no room for the kernel
        ((0, 6, 6, 3), (3, 3, 3, 4), {"dimension_numbers": CHANNELS_LAST}),
    ],
    ids=["groups", "batch groups", "channels first", "empty output", "empty batch"],
)
def test_what_does_not_fit_goes_to_lax(x, w, options):
    same(*both(x, w, (1, 1), "VALID", **options))


def test_half_precision_accumulates_in_float32():
    x, w = jnp.ones((1, 1, 1, 4096), jnp.bfloat16), jnp.full((1, 1, 4096, 1), 1 / 256, jnp.bfloat16)
    y = conv_general_dilated(x, w, (1, 1), "VALID", None, None, CHANNELS_LAST)
    assert y.dtype == jnp.bfloat16
    assert y.item() == 16


def test_what_lax_refuses_is_refused():
    with pytest.raises(ValueError, match="String padding"):
        conv_general_dilated(
            normal(1, 4, 4, 1), normal(2, 2, 1, 1), (1, 1), "SAME", (2, 2), dimension_numbers=CHANNELS_LAST
        )


def test_an_unknown_lowering_is_refused():
    with pytest.raises(fc.InvalidInput, match="'fastest'"):
        conv_general_dilated(normal(1, 4, 4, 1), normal(2, 2, 1, 1), (1, 1), "SAME", lowering="fastest")


def test_every_lowering_is_the_same():
    args = ((1, 1), "SAME", None, None, CHANNELS_LAST)
    first, *rest = (
        next(both((4, 2, 6, 6, 2), (4, 3, 3, 2, 3), *args, lowering=name, wrap=jax.vmap))
        for name in ("auto", "canonical", "unrolled", "xla")
    )
    for other in rest:
        same(first, other)


def test_unrolled_convolutions_are_xla_s_one_by_one_up_to_the_second_derivative():
    x, w = normal(3, 2, 6, 6, 2), normal(3, 3, 3, 2, 4)

    def slopes(lowering):
        def conv(x, w):
            return jnp.sin(conv_general_dilated(x, w, (1, 1), "SAME", None, None, CHANNELS_LAST, lowering=lowering))

        def total(x, w):
            return sum(jnp.sum(jnp.cos(slope)) for slope in jax.grad(lambda x, w: jnp.sum(conv(x, w)), (0, 1))(x, w))

        return jax.jit(jax.vmap(functools.partial(pair, conv))), jax.jit(jax.vmap(jax.grad(total, (0, 1))))

    for ours, theirs in zip(slopes("unrolled"), slopes("xla"), strict=True):
        same(ours(x, w), theirs(x, w))
    text = slopes("unrolled")[0].lower(x, w).as_text()
    assert "[f, 0, 1, b]" in text  # XLA's own gradient to the kernel
    assert "group_count = 1" in text
    assert not re.search(r"group_count = [^1]|stablehlo.while", text)


def test_another_platform_keeps_xla_s_convolution():
    x, w = normal(2, 8, 8, 2), normal(3, 3, 2, 5)
    run = jax.jit(
        lambda x, w: pair(lambda x, w: conv_general_dilated(x, w, (1, 1), "SAME", None, None, CHANNELS_LAST), x, w)
    )
    text = run.trace(x, w).lower(lowering_platforms=("tpu",)).as_text()
    assert "[f, 0, 1, b]" in text  # XLA's own gradient to the kernel
    assert "[f, 0, 1, b]" not in run.trace(x, w).lower(lowering_platforms=("cpu",)).as_text()


def test_a_program_for_a_tpu_computes_in_blocks():
    x, layer = normal(2, 8, 8, 2), Conv(5, (3, 3), activation=nn.relu)
    params = layer.init(jax.random.key(0), x)

    def lowered(apply, platform):
        run = jax.jit(lambda params, x: pair(apply, params, x))
        return run.trace(params, x).lower(lowering_platforms=(platform,)).as_text()

    assert "tensor<2x4x4x20xf32>" in lowered(layer.apply, "tpu")
    assert "tensor<2x4x4x20xf32>" not in lowered(layer.apply, "cpu")


def test_it_runs_under_shard_map_with_its_checks():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    x, w = normal(2, 6, 6, 2), normal(3, 3, 2, 3)

    def grad(x, w):
        def loss(w):
            return jnp.sum(conv_general_dilated(x, w, (1, 1), "SAME", None, None, CHANNELS_LAST) ** 2)

        return jax.grad(loss)(w)

    split, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.jit(jax.shard_map(grad, mesh=mesh, in_specs=(split, whole), out_specs=whole))
    same(mapped(x, w), grad(x, w))


@pytest.mark.parametrize("activation", [nn.relu, nn.silu, None])  # increasing, not increasing
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {}),
        ((4, 3), {"padding": ((2, 1), (1, 3)), "use_bias": False}),
        ((3, 3), {"padding": "CIRCULAR", "strides": (1, 2), "mask": np.ones((3, 3, 2, 5), np.float32)}),  # never blocks
    ],
)
@pytest.mark.usefixtures("form")
def test_activation_and_pooling_in_a_layer_are_those_behind_it(kernel, options, activation, pooled):
    x = normal(3, 8, 6, 2)
    layers = [Conv(5, kernel, activation=activation, max_pool=pooled, **options), nn.Conv(5, kernel, **options)]
    params = [layer.init(jax.random.key(0), x) for layer in layers]
    jax.tree.map(np.testing.assert_array_equal, *params)

    def theirs(params, x):
        y = (activation or (lambda y: y))(layers[1].apply(params, x))
        return nn.max_pool(y, (2, 2), (2, 2)) if pooled else y

    same(*(pair(apply, params[0], x) for apply in (layers[0].apply, theirs)))


class PlainCNN(nn.Module):
    """Flax's own layers throughout."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID", name="Conv_0")(x))
        x = nn.relu(nn.Conv(6, (3, 3), padding="VALID", name="Conv_1")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(5, name="Dense_1")(nn.relu(nn.Dense(8, name="Dense_0")(x)))


def cross_entropy(model):
    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    return loss


@pytest.fixture(params=["cpu", "tpu"])
def form(request, monkeypatch):
    """Runs, on this CPU, what another platform would."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default=None, **forms: forms.get(request.param, default)(*args)
    )


@pytest.mark.usefixtures("form")
def test_a_cnn_trains_as_flax_s_does():
    x, y = normal(3, 6, 10, 12, 1), jnp.arange(18).reshape(3, 6) % 5
    models = CNN(5, (4, 6), 8), PlainCNN()
    params = [model.init(jax.random.key(0), x[0]) for model in models]
    jax.tree.map(np.testing.assert_array_equal, *params)

    def train(loss, params, x, y):
        def step(params, batch):
            value, grads = jax.value_and_grad(loss)(params, *batch)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

        return jax.lax.scan(step, params, (x, y))

    ours, theirs = (jax.jit(functools.partial(train, cross_entropy(model))) for model in models)
    same(ours(params[0], x, y), theirs(params[0], x, y))

    clients = jnp.stack([x, x[::-1]]), jnp.stack([y, y[::-1]])
    ours = jax.jit(jax.vmap(functools.partial(train, cross_entropy(models[0])), (None, 0, 0)))(params[0], *clients)
    for client in range(2):
        alone = theirs(params[0], clients[0][client], clients[1][client])
        same(jax.tree.map(lambda leaf, client=client: leaf[client], ours), alone)


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (7, 5, 1)])
def test_max_pool_is_flax_s(shape):
    x = jnp.round(normal(*shape))  # many ties

    def run(pool):
        y, pull = jax.vjp(pool, x)
        return y, pull(normal(*y.shape))

    same(run(max_pool_2x2), run(lambda x: nn.max_pool(x, (2, 2), (2, 2))), rtol=0)
    x = x.at[(..., slice(0, 4, 3), 1, 0)].set(jnp.nan)
    np.testing.assert_array_equal(max_pool_2x2(x), nn.max_pool(x, (2, 2), (2, 2)))


def test_a_warning_names_the_layer_to_use():
    x, y = jax.ShapeDtypeStruct((6, 12, 12, 1), jnp.float32), jax.ShapeDtypeStruct((6,), jnp.int32)
    for model, slow in ((PlainCNN(), True), (CNN(5, (4, 6), 8), False), (fc.models.MLP((8,), 5), False)):
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        gradient = jax.grad(cross_entropy(model))

        def looped(params, x, y, gradient=gradient):
            return jax.lax.fori_loop(0, 3, lambda _, p: jax.tree.map(jnp.add, p, jax.jit(gradient)(p, x, y)), params)

        assert not warn_slow_convolutions(gradient, params, x, y, platform="gpu")
        for traced in (gradient, jax.make_jaxpr(looped)(params, x, y)):
            args = (params, x, y) if traced is gradient else ()
            if slow:
                with pytest.warns(UserWarning, match=r"use fedjax_clip\.models\.Conv in place of nn\.Conv") as caught:
                    assert warn_slow_convolutions(traced, *args)
                assert len(caught) == 1
                assert caught[0].filename == __file__
            else:
                assert not warn_slow_convolutions(traced, *args)


def test_importing_the_layers_starts_no_device():
    code = "import fedjax_clip.models; from jax._src import xla_bridge; assert not xla_bridge._backends"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2])
