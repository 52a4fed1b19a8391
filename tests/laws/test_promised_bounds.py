"""No message is longer than its link promises, and noise bounds what it hides whatever was promised."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_pairs as pairs

import fedjax_clip as fc
from experiments.config import privacy as flags
from experiments.config import registry
from fedjax_clip import uplink
from fedjax_clip.core import tree
from fedjax_clip.uplink.base import encoded

CLIP = uplink.clip_by_global_norm(1.0)


@functools.cache
def bounded_links():
    written = {name: pairs.written(name) for name in registry.UPLINKS}
    links = {name: flags.links(text) for name, text in written.items()}
    links = {name: link for name, (*_, link) in links.items() if not link.promises.noise and not link.promises.grid}
    links |= {
        "by layer": uplink.at_client(fc.clipping.clip(0.5, scope=fc.clipping.layer())),
        "by unit, largest": uplink.at_client(
            fc.clipping.clip(0.5, scope=fc.clipping.unit(), norm=fc.clipping.linf(), shape=fc.clipping.smooth())
        ),
        "by element": uplink.at_client(fc.clipping.two_sided_clip(0.1, 0.5)),
        "by value": uplink.at_client(fc.clipping.clip_by_value(0.5)),
        "normalised": uplink.at_client(fc.clipping.normalised(0.5)),
        "u-clip": uplink.at_client(fc.clipping.u_clip(fc.clipping.clip(0.5)), keep_state=True),
        "quantiles by layer": uplink.quantile_clip(0.3, scope=fc.clipping.layer()),
        "quantiles by layer, equal": uplink.quantile_clip(0.3, scope=fc.clipping.layer(), allocation="equal"),
        "memory by layer": uplink.memory(fc.clipping.clip(0.5, scope=fc.clipping.layer())),
    }
    return links


LIKE = {"layer0": {"kernel": np.ones((3, 4), "f4"), "bias": np.ones(4, "f4")}, "head": np.ones((4, 2), "f4")}


def length(tree):
    return math.sqrt(sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in jax.tree.leaves(tree)))


@pytest.mark.parametrize("name", bounded_links())
def test_no_message_breaks_a_links_bound_or_its_contraction(name):
    """Over sizes of updates from 1e-12 to 1e12, one coordinate or all, two in a row at the same client."""
    link = bounded_links()[name]
    if not link.promises.bound and not link.promises.contracts:
        return
    params = jax.tree.map(jnp.asarray, LIKE)
    state, kept_by_client = link.init(params), link.init_client(params)
    key = jax.random.key(0)
    ctx = uplink.Context(key, key, jnp.int32(0), jnp.float32(1), bound=jnp.float32(1e30))

    @jax.jit
    def encode(update, kept):
        sent, kept, _ = encoded(link, update, state, kept, ctx)
        return sent.value, kept

    rng = np.random.default_rng(1)
    for size, one in itertools.product([0.0, 1e-12, 0.1, 1.0, 1e3, 1e12], [False, True]):
        update = jax.tree.map(lambda x, size=size: (size * rng.normal(size=x.shape)).astype("f4"), LIKE)
        if one:
            update = jax.tree.map(np.zeros_like, LIKE) | {"head": np.eye(4, 2, dtype="f4") * np.float32(size)}
        message, kept_by_client = encode(update, kept_by_client)
        if link.promises.bound is not None:
            assert length(message) <= float(link.promises.bound(state, LIKE)) * (1 + 1e-5)
        if link.promises.contracts:
            assert length(message) <= length(update) * (1 + 1e-5)


def test_bounds_are_the_roots_of_sums_of_squares():
    clip, layer = fc.clipping.clip, fc.clipping.layer()
    bound_of = fc.clipping.bound_of
    assert float(bound_of(clip(0.5))(LIKE)) == pytest.approx(0.5)
    assert float(bound_of(clip(0.5, scope=layer))(LIKE)) == pytest.approx(0.5 * math.sqrt(2))  # layer0 and head
    by_name = fc.clipping.groups({"head": "head", "body": "layer"})
    each = clip(fc.clipping.fixed({"head": 3.0, "body": 4.0}), scope=by_name)
    assert float(bound_of(each)(LIKE)) == pytest.approx(5.0)
    assert float(bound_of(clip(0.5, scope=fc.clipping.element()))(LIKE)) == pytest.approx(0.5 * math.sqrt(24))
    assert float(bound_of(clip(0.5, norm=fc.clipping.linf()))(LIKE)) == pytest.approx(0.5 * math.sqrt(24))
    assert float(bound_of(clip(0.5, scope=fc.clipping.unit()))(LIKE)) == pytest.approx(0.5 * math.sqrt(4 + 1 + 2))
    for unbounded in (
        fc.clipping.delta_clip(1.0, 0.1),
        fc.clipping.auto_clip(),
        fc.clipping.z_clip(),
        fc.clipping.adaptive_gradient_clip(),
        optax.clip(1.0),
        optax.chain(clip(0.5), optax.scale(3.0)),
        clip(math.inf),
    ):
        assert bound_of(unbounded) is None


SMALL = np.full(1000, 1.05e-19, "f4")  # whose squares are zero in float32, but for the first one's
SMALL[0] = 1.1e-19

UNBOUNDED = {  # links whose promised bound does not hold, for one reason or another, and what shows it
    "normalised": (uplink.at_client(fc.clipping.normalised(1.0)), SMALL),
    "smoothed": (uplink.at_client(fc.clipping.smoothed_clip(1.0, 1e-25)), SMALL),
    "remembered": (uplink.memory(fc.clipping.smoothed_clip(1.0, 1e-25)), SMALL),
    "narrow": (CLIP, jnp.asarray(np.linspace(1, 2, 7), jnp.bfloat16)),
    "said": (uplink.at_client(optax.scale(5.0), bound=1.0), np.ones(1000, "f4")),
    "of a part": (uplink.on_parts(CLIP), (np.ones(3, "f4"), np.full(1000, 5, "f4"))),
}


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
@pytest.mark.parametrize("name", UNBOUNDED)
def test_noise_bounds_what_it_is_in_proportion_to_whatever_a_link_promises(name, noise):
    """Old code sent 32 times the bound of a thousand coordinates: sensitivity, and so epsilon, were on no scale."""
    first, update = UNBOUNDED[name]
    update, key = jax.tree.map(jnp.asarray, update), jax.random.key(0)
    link = uplink.chain(first, uplink.gaussian(1.0) if noise == "gaussian" else uplink.discrete_gaussian(0.0))
    ctx = uplink.Context(key, key, jnp.int32(0), jnp.float32(1), 4.0, threshold=3)
    message, _, _ = link.encode(update, link.init(update), link.init_client(update), ctx)
    if noise == "gaussian":
        most = float(uplink.lattice.lattice(1.0, 1.0, 4.0).levels)
    else:
        message = jax.tree.map(lambda x: x.view(jnp.int32), message)
        most = float(link.promises.grid(tree.size(update), 4.0, 3).l2)
    assert length(message) <= most
    if name != "remembered":
        assert length(message) >= 0.99 * most  # and no shorter than it must be
