"""A convolution in 2×2 blocks of pixels is the convolution of the pixels, in value and gradients; so is the pooling."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_clip.core import blocks

NUMBERS = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def of_pixels(padding):
    return lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=NUMBERS)


def of_blocks(padding):
    return lambda x, w: blocks.join(blocks.convolution(blocks.split(x), w, padding))


def both(conv, x, w):
    y, pull = jax.vjp(conv, x, w)
    return y, pull(normal(*y.shape))


def same(ours, theirs, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_any_window_and_padding(data):
    window, padding, image = [], [], []
    for _ in range(2):
        low, high = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))  # XLA on a CPU errs below 0
        size = data.draw(st.integers(1, 5)) // 2 * 2 + 6
        window.append(data.draw(st.integers(1, 5).filter(lambda k: (size + low + high - k) % 2)))  # noqa: B023
        padding.append((low, high))
        image.append(size)
    channels, features = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    x, w = normal(2, 2, *image, channels), normal(2, *window, channels, features)
    forms = of_blocks(padding), of_pixels(padding)
    same(*(jax.jit(jax.vmap(functools.partial(both, conv)))(x, w) for conv in forms))  # a kernel for every client


@pytest.mark.parametrize(
    ("image", "kernel", "padding", "pays"),
    [
        ((20, 28, 28, 1), (3, 3, 1, 32), ((0, 0), (0, 0)), True),  # both of the EMNIST CNN's
        ((20, 26, 26, 32), (3, 3, 32, 64), ((0, 0), (0, 0)), True),
        ((20, 32, 32, 3), (3, 3, 3, 64), ((1, 1), (1, 1)), True),
        ((20, 32, 32, 64), (3, 3, 64, 64), ((1, 1), (1, 1)), False),  # as many tiles
        ((20, 32, 32, 128), (3, 3, 128, 128), ((0, 0), (0, 0)), False),  # pixels fill the lanes
        ((20, 28, 28, 1), (1, 1, 1, 32), ((0, 0), (0, 0)), True),
        ((20, 27, 28, 1), (3, 3, 1, 32), ((0, 0), (0, 0)), False),  # odd
        ((20, 28, 28, 1), (2, 3, 1, 32), ((0, 0), (0, 0)), False),  # odd output
        ((20, 2, 2, 1), (3, 3, 1, 32), ((0, 0), (0, 0)), False),  # no output
        ((20, 28, 1), (3, 1, 32), ((0, 0),), False),
    ],
)
def test_where_blocks_pay(image, kernel, padding, pays):
    assert blocks.pays(image, kernel, padding) == pays


def test_pooling():
    x = jnp.round(normal(2, 6, 8, 3)).at[0, :4:3, 1, 0].set(jnp.nan)  # many ties

    def run(pool):
        y, pull = jax.vjp(pool, x)
        return y, pull(normal(*y.shape))

    ours, theirs = run(lambda x: blocks.max_pool(blocks.split(x))), run(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1][0][1], theirs[1][0][1])  # the image without NaN
