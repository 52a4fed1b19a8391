"""Links in an order that breaks a promise are refused when they are built, and the sentence says what to move where."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import softmax_loss

import fedjax_clip as fc
from fedjax_clip import compression, uplink

clip, noise, grid = uplink.clip_by_global_norm(0.5), uplink.gaussian(1.0), uplink.integer_grid(16)
top, qsgd = uplink.compress(compression.top_k(0.1)), uplink.compress(compression.qsgd(4))
FIXED = fc.reduce.fixed_mean(8)

BROKEN = {
    "noise without a bound": ([noise], FIXED, "put a clip"),
    "noise in front of the clip": ([noise, clip], FIXED, "put a clip"),
    "error feedback between the clip and the noise": (
        [clip, uplink.error_feedback(compression.top_k(0.1)), noise],
        FIXED,
        "put the clip inside of it",
    ),
    "what may enlarge between the clip and the noise": ([clip, qsgd, noise], FIXED, "nothing between them"),
    "what may enlarge behind the noise": ([clip, noise, qsgd], FIXED, "move the noise last"),
    "a clip behind what is packed": ([top, clip], None, "move the compressor last"),
    "a compressor behind the grid": ([clip, grid, top], fc.reduce.modular_sum(8), "to the chain's end"),
    "the server's noise beside the clients'": ([clip, noise, uplink.skellam(1.0)], FIXED, "in place of the grid"),
    "the server's noise twice": ([clip, noise, noise], FIXED, "keep one, the last"),
    "correlated noise behind a bound that moves": (
        [uplink.quantile_clip(bits_noise=1.0), uplink.gaussian(1.0, mechanism=fc.uplink.mechanism.tree(4))],
        FIXED,
        "put clip_by_global_norm in its place",
    ),
    "bits that the server sees beside the clients' own noise": (
        [uplink.quantile_clip(bits_noise=1.0), uplink.local_gaussian(1.0)],
        FIXED,
        "put clip_by_global_norm in its place",
    ),
    "bits that the server sees beside masks": (
        [uplink.quantile_clip(bits_noise=1.0), uplink.skellam(1.0)],
        fc.reduce.modular_sum(8),
        "put clip_by_global_norm in its place",
    ),
    "a quantile that leaks beside masks": (
        [uplink.quantile_clip(), grid],
        fc.reduce.modular_sum(8),
        "give it bits_noise",
    ),
    "squares whose noise follows no mechanism": (
        [clip, uplink.fedexp(8.0), uplink.gaussian(1.0, mechanism=fc.uplink.mechanism.toeplitz([0.1]))],
        FIXED,
        "give the noise no mechanism",
    ),
    "examples counted beside the clients' own noise": (
        [clip, uplink.local_gaussian(1.0)],
        fc.reduce.weighted_mean(),
        "make uniform_mean the reducer",
    ),
    "the plain updates between the clip and the noise": ([uplink.with_bias(clip), noise], FIXED, "put a clip"),
    "parts of which none has a bound": ([uplink.on_parts(noise, noise)], FIXED, "put a clip"),
    "a bound of JAX's infinity under noise": (
        [uplink.clip_by_global_norm(jnp.float32(np.inf)), noise],
        FIXED,
        "finite",
    ),
    "a bound of infinity under noise": ([uplink.clip_by_global_norm(np.inf), noise], FIXED, "a finite bound"),
    "attackers behind the clip": ([clip, noise], fc.attacks.alie(FIXED, [0]), "in front of the clip"),
    "a robust rule under noise": ([clip, noise], fc.reduce.norm_bounded(1.0, FIXED), "make fixed_mean the reducer"),
    "a quantile that leaks beside noise": ([uplink.quantile_clip(), noise], FIXED, "give it bits_noise"),
    "weights under noise": ([clip, noise], fc.reduce.weighted_mean(), "make fixed_mean the reducer"),
    "masks under a median": ([clip, grid], fc.reduce.median(), "make modular_sum the reducer"),
    "masks under weights": ([clip, grid], fc.reduce.weighted_mean(), "make modular_sum the reducer"),
    "a modular sum of real numbers": ([clip], fc.reduce.modular_sum(8), "integer_grid() last"),
    "a sketch under a median": ([uplink.count_sketch(3, 8, k=2)], fc.reduce.median(), "make weighted_mean"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_order_is_refused_when_it_is_built(name):
    links, reducer, sentence = BROKEN[name]
    with pytest.raises(fc.InvalidInput, match=r"[.)]$") as caught:
        fc.fedavg(softmax_loss, optax.sgd(0.1), uplink=uplink.chain(*links), reducer=reducer)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: uplink.with_bias(uplink.chain(clip, uplink.local_gaussian(1.0))), "take with_bias out"),
        (lambda: uplink.memory(uplink.fedexp(8.0)), "belong behind it"),
        (lambda: fc.reduce.together(fc.secure.ckks_mean(4), fc.reduce.uniform_mean()), "give each part a secure sum"),
        (lambda: uplink.quantile_clip(np.inf, bits_noise=1.0), "finite"),
        (lambda: uplink.gaussian(np.inf), "finite"),
        (lambda: fc.local.private_gradient(np.inf, 1.0), "finite"),
    ],
)
def test_what_no_order_could_mend_is_refused_at_once(build, sentence):
    with pytest.raises(fc.InvalidInput, match=r"[.)]$") as caught:
        build()
    assert sentence in str(caught.value)


@pytest.mark.parametrize("links", [[clip, noise], [clip, grid]], ids=["noise", "grid"])
def test_what_does_not_cover_all_that_is_sent_is_refused(links):
    reducer = FIXED if noise in links else fc.reduce.modular_sum(8)
    with pytest.raises(fc.InvalidInput, match=r"does not cover: .* take fedavg"):
        fc.scaffold(softmax_loss, optax.sgd(0.1), uplink=uplink.chain(*links), reducer=reducer)


def test_orders_that_keep_their_promises_are_not_refused():
    for links, reducer in [
        ([clip, top, noise], FIXED),
        ([uplink.error_feedback(clip, compression.top_k(0.1)), noise], FIXED),
        ([clip, qsgd], fc.reduce.median()),
    ]:
        fc.fedavg(softmax_loss, optax.sgd(0.1), uplink=uplink.chain(*links), reducer=reducer)
