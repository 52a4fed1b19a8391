"""Links and algorithms made of compressors: memories, sketches, the way down, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Run, assert_close, assert_identical, clipped_sgd, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import compression as c
from fedjax_clip import uplink
from fedjax_clip.core.types import InvalidInput

RNG = np.random.default_rng(0)
VECTOR = RNG.standard_t(2, 50).astype("f4")
UPDATE = {"b": np.arange(-20, -16, dtype="f4"), "w": VECTOR[:42].reshape(7, 6)}
CONTEXT = uplink.Context(jax.random.key(5), jax.random.key(6), jnp.int32(0), jnp.float32(1))


def test_error_feedback_loses_nothing():
    """Whole numbers, so that sums are exact: all that was sent, and what is kept, is all that there was."""
    link = uplink.error_feedback(c.top_k(3))
    updates = RNG.integers(-9, 10, (20, 50)).astype("f4")
    kept, sent = link.init_client(updates[0]), np.zeros(50)
    encode = jax.jit(lambda update, kept: link.encode(update, (), kept, CONTEXT)[:2])
    for i, update in enumerate(updates):
        (message, *_), kept = encode(update, kept)
        assert np.count_nonzero(message) <= 3
        sent += message
        np.testing.assert_array_equal(sent + kept[0], updates[: i + 1].sum(0))


def test_a_clip_inside_of_error_feedback_bounds_the_message():
    link = uplink.error_feedback(uplink.clip_by_global_norm(0.5), c.top_k(3))
    assert float(link.promises.bound(link.init(UPDATE), UPDATE)) == 0.5
    fc.fedavg(
        softmax_loss, clipped_sgd, uplink=uplink.chain(link, uplink.gaussian(1.0)), reducer=fc.reduce.fixed_mean(3)
    )
    kept = link.init_client(UPDATE)
    encode = jax.jit(lambda kept: link.encode(UPDATE, link.init(UPDATE), kept, CONTEXT)[:2])
    for _ in range(3):
        (message, *_), kept = encode(kept)
        assert np.sqrt(sum(np.sum(np.square(x)) for x in message.values())) <= 0.5 + 1e-6


def test_power_sgd_is_a_projection_that_finds_the_subspace():
    link = uplink.power_sgd(2)
    rank_two = {"b": UPDATE["b"], "w": (RNG.normal(size=(7, 2)) @ RNG.normal(size=(2, 6))).astype("f4")}
    encode = jax.jit(lambda update, kept: link.encode(update, (), kept, CONTEXT))
    message, kept, _ = encode(rank_two, link.init_client(rank_two))
    assert_close(message.value, rank_two, atol=1e-4)
    assert float(message.bytes) == 4 * (2 * (7 + 6) + 4)
    w, q = UPDATE["w"].astype(np.float64), np.asarray(link.init_client(UPDATE)[0], np.float64)
    kept = link.init_client(UPDATE)
    for i in range(60):
        p = np.linalg.qr(w @ q)[0]
        q = w.T @ p
        (message, *_), kept, _ = encode(UPDATE, kept)
        if i == 0:
            assert_close(np.asarray(message["w"]), (p @ q.T).astype("f4"), rtol=1e-3, atol=1e-4)
    u, s, v = np.linalg.svd(w)
    assert_close(np.asarray(message["w"]), ((u[:, :2] * s[:2]) @ v[:2]).astype("f4"), rtol=1e-2, atol=1e-2)
    zero = jax.tree.map(np.zeros_like, UPDATE)
    (message, *_), after, _ = encode(zero, kept)
    assert_identical((message, after), (zero, kept))


def test_a_sketch_hashes_each_coordinate_into_one_bucket_of_each_row():
    """Of 1000 pairs from different runs about 1/8 collide in a row: 5 standard deviations, once in 2e6 by chance."""
    link = uplink.count_sketch(3, 8, k=1)
    encode = jax.jit(jax.vmap(lambda x: link.encode({"x": x}, (), (), CONTEXT)[0]))
    sketches = np.asarray(encode(jnp.eye(100)))
    assert set(np.unique(sketches)) == {-1, 0, 1}
    assert np.all(np.abs(sketches).sum(2) == 1)
    place, sign = np.argmax(np.abs(sketches), 2), sketches.sum(2)
    assert abs(sign.mean()) < 5 / math.sqrt(sign.size)
    left, right = np.random.default_rng(0).integers(0, 100, (2, 1000))
    apart = left // 8 != right // 8
    collide = place[left] == place[right]
    assert np.all(np.abs(collide[apart].mean(0) - 1 / 8) < 5 * math.sqrt(7 / 64 / apart.sum()))
    assert not collide[~apart & (left != right)].any()


def test_a_sketch_adds_up_and_finds_what_is_heavy():
    link = uplink.count_sketch(5, 40, k=3)
    heavy = np.zeros(46, np.float32)
    heavy[[4, 20, 41]] = (10.0, -7.0, 5.0)
    restore = jax.flatten_util.ravel_pytree(UPDATE)[1]
    encode = jax.jit(lambda update: link.encode(update, (), (), CONTEXT)[0])
    decode = jax.jit(lambda sketch, state: link.decode(sketch, state, {}, CONTEXT))
    halves = [encode(restore(heavy * share)) for share in (0.25, 0.75)]
    update, state, _ = decode(halves[0] + halves[1], link.init(UPDATE))
    assert_close(update, restore(heavy))
    assert_close(state[2], np.zeros((5, 40)), atol=1e-5)  # what was found is no longer missing
    small = decode(encode(UPDATE), state)
    assert sum(np.count_nonzero(x) for x in jax.tree.leaves(small[0])) == 3
    sketch = encode(jax.tree.map(jnp.subtract, UPDATE, small[0]))
    assert_close(small[1][2], sketch, rtol=1e-3, atol=1e-4)  # the rest is


def spy(compressor):
    """The same compressor, and a list of the lengths of all that it really writes."""
    lengths = []

    def encode(x, key, count=None):
        code = compressor.encode(x, key, count)
        jax.debug.callback(lambda code: lengths.append(len(c.to_bytes(code))), code)
        return code

    return compressor._replace(encode=encode), lengths


def test_a_round_reports_the_bytes_that_travel_both_ways():
    (up, sent), (down, received) = spy(c.qsgd(4, coding="runs")), spy(c.threshold(0.3))
    algorithm = fc.fedavg(softmax_loss, clipped_sgd, uplink=uplink.compress(up))
    algorithm = fc.compressed_broadcast(algorithm, down, relative=False)
    _, _, history = Run(algorithm, population()).rounds(parameters(), [[4, 1, 3]])
    jax.effects_barrier()
    assert history[0]["bytes_up"] == sum(sent)
    assert history[0]["bytes_down"] == 3 * received[0]
    assert len(sent) == 3
    assert len(set(sent)) > 1
    assert history[0]["bytes_up_entropy"] <= history[0]["bytes_up"]


def test_nothing_lost_on_the_way_down_is_the_same_bits():
    algorithm, cohorts = fc.fedavg(softmax_loss, clipped_sgd, optax.sgd(1.0, momentum=0.9)), [[4, 1, 3], [2, 1, 4]]
    plain = Run(algorithm, population()).rounds(parameters(), cohorts)
    server, clients, history = Run(fc.compressed_broadcast(algorithm, c.floats()), population()).rounds(
        parameters(), cohorts
    )
    assert_identical((server.params, server.opt_state, clients), (plain[0].params, plain[0].opt_state, plain[1]))
    assert [row["bytes_down"] for row in history] == [row["bytes_down"] for row in plain[2]]
    assert history[-1]["downlink/error"] == 0


def test_what_the_broadcast_loses_is_sent_later():
    """Without clients the model stands still, and the clients' copy reaches it: k values a round."""
    algorithm = fc.compressed_broadcast(fc.fedavg(softmax_loss, clipped_sgd), c.top_k(5))
    run = Run(algorithm, population())
    server, _, _ = run.rounds(parameters(), [[4, 1, 3]])
    history = []
    for round in range(3):
        server, _, metrics = run.jitted(server, run.cohort([], round, run.start(parameters())[1]), jax.random.key(3))
        history.append(float(metrics["downlink/error"]))
    assert history[0] > history[1] > 0
    assert history[2] < 1e-12


CLIP, NOISE, SGD = uplink.clip_by_global_norm(1.0), uplink.gaussian(1.0), optax.sgd(0.1)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: uplink.chain(uplink.compress(c.sign()), CLIP), "move the compressor last"),
        (lambda: uplink.chain(uplink.error_feedback(c.sign()), CLIP, NOISE), "inside of its error_feedback"),
        (lambda: uplink.chain(uplink.compress(c.sign()), uplink.compress(c.sign())), "move the compressor last"),
        (lambda: uplink.chain(uplink.count_sketch(), CLIP), "move the compressor last"),
        (lambda: uplink.chain(CLIP, uplink.compress(c.sign()), uplink.local_gaussian(1.0)), "move the compressor last"),
        (lambda: uplink.chain(CLIP, uplink.compress(c.qsgd(4)), NOISE), "nothing between them that may enlarge"),
        (lambda: uplink.chain(CLIP, uplink.error_feedback(c.sign()), NOISE), "put the clip inside of it"),
        (lambda: uplink.chain(CLIP, uplink.count_sketch(), NOISE), "nothing between them that may enlarge"),
        (lambda: uplink.chain(CLIP, NOISE, uplink.compress(c.qsgd(4))), "move the noise last"),
        (lambda: uplink.error_feedback(uplink.count_sketch()), "sketches belong behind it"),
        (lambda: uplink.error_feedback(CLIP, NOISE), "noise and sketches"),
        (
            lambda: uplink.error_feedback(c.random_k(0.1)).init_client(UPDATE),
            "46 values .* lose 8.2 times .* unbiased=False",
        ),
        (lambda: fc.compressed_broadcast(fc.fedavg(softmax_loss, SGD), c.terngrad()).init(UPDATE), "lose 6.78 times"),
        (lambda: uplink.error_feedback(), "needs a link that loses something"),
        (lambda: uplink.error_feedback(3), "must be compressors or links"),
        (lambda: uplink.memory(uplink.count_sketch()), "sketches belong behind it"),
        (lambda: uplink.memory(uplink.power_sgd(1)).init_client(UPDATE), "a link that keeps nothing"),
        (lambda: uplink.compress(CLIP), "must be of fc.compression"),
        (lambda: uplink.count_sketch(4), "rows must be odd"),
        (lambda: uplink.power_sgd(0), "power_sgd: rank"),
        (
            lambda: fc.fedavg(
                softmax_loss, clipped_sgd, uplink=uplink.count_sketch(), reducer=fc.reduce.centered_mean(1.0)
            ),
            "only a linear reducer adds: make weighted_mean",
        ),
        (lambda: c.top_k(0.1, c.top_k(3)), "cannot stand inside of another"),
        (lambda: c.top_k(0.1, CLIP), "must be a compressor"),
        (lambda: c.top_k(1.5), "a whole number of values or a fraction"),
        (lambda: c.random_k(0), "a whole number of values or a fraction"),
        (lambda: c.threshold(0.1, c.rotated(c.sign())), "rotate in front of it"),
        (lambda: c.threshold(-1.0), "threshold"),
        (lambda: c.qsgd(1), "between 2 and 16"),
        (lambda: c.qsgd(4, "l1"), "'l2' or 'linf'"),
        (lambda: c.uniform(4, bucket=0), "bucket must be"),
        (lambda: c.sign("morse"), "no coding 'morse'; there are fixed"),
        (lambda: c.kmeans(1), "between 2 and 256"),
        (lambda: c.eden(9), "between 1 and 8"),
        (lambda: c.floats(8), "16 or 32"),
        (lambda: c.rotated(3), "a compressor such as"),
        (lambda: c.prune(1.5), "prune: sparsity"),
        (lambda: c.nbytes(c.qsgd(12, coding="huffman").encode(VECTOR, jax.random.key(0))), "at most 256 letters"),
        (lambda: fc.compressed_broadcast(fc.fedbuff(softmax_loss, SGD, max_staleness=2), c.sign()), "past models"),
        (
            lambda: fc.compressed_broadcast(fc.partially_private(fc.fedavg(softmax_loss, SGD), "b"), c.sign()),
            "for a part of a model put compressed_broadcast inside",
        ),
        (lambda: fc.compressed_broadcast(fc.fedavg(softmax_loss, SGD), CLIP), "must be of fc.compression"),
    ],
)
def test_what_means_nothing_is_refused_with_a_sentence(build, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        build()


@pytest.mark.parametrize("text", ["", "sign", "top_k(values=sign())", "kmeans(4)", "random_k(0.1, unbiased=False)"])
def test_noise_may_follow_a_compressor_that_enlarges_nothing(text):
    texts = {"": c.floats(), "sign": c.sign(), "top_k(values=sign())": c.top_k(3, c.sign()), "kmeans(4)": c.kmeans(4)}
    chosen = texts.get(text, c.random_k(0.1, unbiased=False))
    assert uplink.chain(CLIP, uplink.compress(chosen), NOISE).promises.noise is uplink.Noise.SERVER


def test_an_update_that_is_not_finite_stays_so():
    link = uplink.compress(c.threshold(0.1))
    for bad in (np.nan, np.inf):
        message, _, _ = link.encode({"w": np.array([1, bad, 2], "f4")}, (), (), CONTEXT)
        assert np.all(np.isnan(message.value["w"]))
        assert np.isfinite(message.bytes)


def test_pruning_follows_its_schedule():
    schedule = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=10)
    tx = optax.chain(optax.sgd(1.0), c.prune(schedule))
    params = jax.tree.map(jnp.asarray, UPDATE)
    state = tx.init(params)
    for t in range(12):
        gradient = jax.tree.map(lambda x, t=t: jnp.sin(t + x), params)
        updates, state = tx.update(gradient, state, params)
        expected = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, params, gradient))[0]
        sparsity = 0.9 - 0.9 * (1 - min(t, 10) / 10) ** 3  # Zhu and Gupta (2017), equation 1
        expected = np.array(expected)
        expected[np.argsort(np.abs(expected))[: math.floor(np.float32(sparsity) * 46)]] = 0
        params = optax.apply_updates(params, updates)
        assert_close(jax.flatten_util.ravel_pytree(params)[0], expected, atol=1e-6)
    with pytest.raises(InvalidInput, match="end of the server's optimiser"):
        tx.update(params, state)
