"""Compressors: real bytes, what they promise, and the links and algorithms made of them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import Run, assert_close, assert_identical, clipped_sgd, parameters, population, softmax_loss

import fedjax_clip as fc
from experiments import commbench
from fedjax_clip import compression as c
from fedjax_clip import tree, uplink
from fedjax_clip.compression import coding as codings
from fedjax_clip.compression.quantise import gaussian_levels
from fedjax_clip.typing import InvalidInput

D, KEYS = 50, 600
RNG = np.random.default_rng(0)
VECTORS = np.stack([RNG.standard_t(2, D), RNG.choice([-1.0, 1.0], D), np.eye(D)[3], np.arange(D) - 20.0]).astype("f4")

COMPRESSORS = {
    "floats, 16": c.floats(16),
    "uniform": c.uniform(3),
    "uniform, buckets, huffman": c.uniform(4, bucket=16, coding="huffman"),
    "qsgd": c.qsgd(3),
    "qsgd, linf, buckets, gamma": c.qsgd(5, "linf", bucket=16, coding="elias_gamma"),
    "terngrad, huffman": c.terngrad(coding="huffman"),
    "sign": c.sign(),
    "kmeans, rice": c.kmeans(5, coding="rice"),
    "top_k": c.top_k(0.2),
    "top_k, rotated": c.top_k(12, c.rotated(c.uniform(4)), "elias_gamma"),
    "top_k, sign": c.top_k(0.1, c.sign(), "fixed"),
    "random_k": c.random_k(0.2, c.qsgd(8)),
    "random_k, biased": c.random_k(0.2, unbiased=False),
    "threshold": c.threshold(0.5),
    "threshold, sign": c.threshold(1.5, c.sign(), "rice"),
    "rotated": c.rotated(c.uniform(4)),
    "eden": c.eden(1),
    "eden, biased": c.eden(3, unbiased=False, coding="huffman"),
}


@functools.cache
def tried(name):
    """Of each vector under each key: the code, what is decoded, the bytes, the entropy bound."""
    compressor = COMPRESSORS[name]

    def one(x, key):
        code = compressor.encode(x, key)
        return code, compressor.decode(code, D, key), c.nbytes(code), c.entropy(code)

    keys = jax.random.split(jax.random.key(1), KEYS)
    each = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    return jax.tree.map(np.asarray, jax.jit(each)(VECTORS, keys))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_bytes_are_those_that_are_written_and_hold_the_message(name):
    all_codes, _, sizes, bounds = tried(name)
    like = jax.eval_shape(COMPRESSORS[name].encode, VECTORS[0], jax.random.key(0))
    for v in range(len(VECTORS)):
        for k in (0, 1):
            code = jax.tree.map(lambda x, v=v, k=k: x[v, k], all_codes)
            data = c.to_bytes(code)
            assert len(data) == sizes[v, k]
            back = c.from_bytes(data, like)
            jax.tree.map(np.testing.assert_array_equal, back, code)
            assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, code)
    if like.index is None or like.positions == "fixed":  # places that cluster may be cheaper
        assert np.all(bounds <= sizes + 1e-3)


def test_unbiased_means_unbiased():
    """A z-test of the mean over 600 keys in 6 directions for 4 vectors; |z| < 6.

    By the central limit theorem each fails once in 5e8, all of them together once in 3e6; qsgd's worst is heavy-tailed,
    which is why 6 and not 5.
    """
    names = [name for name, compressor in COMPRESSORS.items() if compressor.unbiased]
    assert len(names) >= 6
    directions = np.concatenate([RNG.normal(size=(5, D)), np.ones((1, D))])
    for name in names:
        off = (tried(name)[1].astype(np.float64) - VECTORS[:, None]) @ directions.T
        mean, std = off.mean(1), off.std(1) / math.sqrt(KEYS)
        assert np.all(np.abs(mean) <= 6 * std + 1e-4), name
    biased = (tried("sign")[1].astype(np.float64) - VECTORS[:, None]) @ directions.T  # the test can fail
    assert np.abs(biased.mean(1)).max() > 1


@pytest.mark.parametrize("name", COMPRESSORS)
def test_errors_and_norms_keep_their_promise(name):
    """The mean error over 600 keys is at most what is promised plus 6 standard errors: once in 1e9 by chance."""
    compressor, decoded = COMPRESSORS[name], tried(name)[1].astype(np.float64)
    squares = np.sum(VECTORS.astype(np.float64) ** 2, 1)
    error = np.sum((decoded - VECTORS[:, None]) ** 2, 2) / squares[:, None]
    promise = compressor.error(D)
    assert np.all(error.mean(1) <= promise * (1 + 1e-5) + 6 * error.std(1) / math.sqrt(KEYS))
    norm = np.sqrt(np.sum(decoded**2, 2) / squares[:, None])
    assert np.all(norm <= 1 + 1e-5) == compressor.contracts or name == "floats, 16"


def test_compressors_are_what_their_formulas_say():
    x, keys = VECTORS[0].astype(np.float64), jax.random.split(jax.random.key(1), KEYS)
    words = np.asarray(jax.random.bits(keys[0], (D // 2, 1), np.uint32))
    u = (np.concatenate([words & 0xFFFF, words >> 16], 1).ravel() + 0.5) / 2**16

    assert_identical(tried("floats, 16")[1][0, 0], VECTORS[0].astype(jnp.bfloat16).astype("f4"))
    level = np.floor((x - x.min()) / np.ptp(x) * 7 + u)
    assert_close(tried("uniform")[1][0, 0], (x.min() + level * np.ptp(x) / 7).astype("f4"), atol=1e-5)
    norm = np.linalg.norm(x)
    assert_close(tried("qsgd")[1][0, 0], (norm * np.sign(x) * np.floor(np.abs(x) / norm * 3 + u) / 3).astype("f4"))
    top = np.abs(x).max()
    assert_close(tried("terngrad, huffman")[1][0, 0], (top * np.sign(x) * (np.abs(x) / top + u >= 1)).astype("f4"))
    assert_close(tried("sign")[1][0, 0], (np.abs(x).mean() * np.sign(x)).astype("f4"))
    kept = np.argsort(-np.abs(x))[:10]
    assert_identical(tried("top_k")[1][0, 0], np.where(np.isin(np.arange(D), kept), x, 0).astype("f4"))
    few = np.argsort(-np.abs(x))[:5]
    ternary = np.where(np.isin(np.arange(D), few), np.sign(x) * np.abs(x[few]).mean(), 0)
    assert_close(tried("top_k, sign")[1][0, 0], ternary.astype("f4"))
    assert_identical(tried("threshold")[1][0, 0], np.where(np.abs(x) > 0.5, x, 0).astype("f4"))
    large = np.abs(x) > 1.5
    assert_close(tried("threshold, sign")[1][0, 0], (large * np.sign(x) * np.abs(x[large]).mean()).astype("f4"))

    book = np.sort(x)[((np.arange(5) + 0.5) / 5 * D).astype(int)]
    for _ in range(10):
        nearest = np.argmin(np.abs(x[:, None] - book), 1)
        book = np.array([x[nearest == i].mean() for i in range(5)])
    assert_close(tried("kmeans, rice")[1][0, 0], book[nearest].astype("f4"))

    along = np.sum(tried("eden")[1].astype(np.float64) * VECTORS[:, None], 2)
    np.testing.assert_allclose(along, np.broadcast_to(np.sum(VECTORS**2, 1)[:, None], along.shape), rtol=1e-4)
    some = tried("random_k, biased")[1][1]
    assert set(np.count_nonzero(some, axis=1)) == {10}
    assert_identical(some, np.where(some != 0, VECTORS[1], 0))
    assert np.unique(np.nonzero(some)[1]).size == D  # other places for another key


def test_rotation_is_hadamards_matrix_with_random_signs():
    x = RNG.normal(size=64).astype("f4")
    for n in (1, 2, 8, 64):
        assert_close(c.hadamard(x[:n]), (scipy.linalg.hadamard(n) @ x[:n] / math.sqrt(n)).astype("f4"), atol=1e-5)
    sent = np.array(
        [c.rotated(c.floats(32)).encode(x[:46], key).symbols for key in jax.random.split(jax.random.key(0))]
    )
    rotated = sent.view(np.float32) * 8 @ scipy.linalg.hadamard(64)  # padded, then transformed: its own inverse
    np.testing.assert_allclose(
        np.abs(rotated) / 64, np.broadcast_to(np.abs(np.pad(x[:46], (0, 18))), (2, 64)), atol=1e-6
    )
    assert np.any(np.sign(rotated[0]) != np.sign(rotated[1]))
    with pytest.raises(InvalidInput, match="power of two, not 12"):
        c.hadamard(np.ones(12))


def test_gaussian_levels_are_those_of_max():
    """Max (1960), table I: levels and distortions for 2, 4 and 8 levels."""
    np.testing.assert_allclose(gaussian_levels(1)[1:], [0.7980], atol=2e-4)
    np.testing.assert_allclose(gaussian_levels(2)[2:], [0.4528, 1.510], atol=1e-3)
    np.testing.assert_allclose(gaussian_levels(3)[4:], [0.2451, 0.7560, 1.344, 2.152], atol=1e-3)


def test_edens_error_is_its_papers():
    """1 / (1 - D) - 1 of Max's distortions D, for a long vector, within 10%: three blocks with a scale of their own."""
    x = RNG.standard_t(3, 3 * 4096).astype("f4")
    for bits, distortion in ((1, 0.3634), (2, 0.1175)):
        arrived, code = jax.jit(c.roundtrip, static_argnums=0)(c.eden(bits), x, jax.random.key(bits))
        assert len(code.scales) == 3
        error = np.sum((arrived - x) ** 2) / np.sum(x**2)
        np.testing.assert_allclose(error, 1 / (1 - distortion) - 1, rtol=0.1)
        np.testing.assert_allclose(arrived @ x, x @ x, rtol=1e-4)


def test_long_vectors_are_rotated_in_blocks_and_learn_their_codebook_from_a_sample():
    """No value is above Hoeffding's bound for 4,096 random signs, where it fails once in 1e9."""
    x = np.random.default_rng(0).normal(size=20_000).astype("f4")
    x[:100] *= 300
    arrived, code = jax.jit(c.roundtrip, static_argnums=0)(c.rotated(c.floats()), x, jax.random.key(0))
    np.testing.assert_allclose(arrived, x, atol=1e-3)
    sent = np.asarray(code.symbols).view(np.float32)
    assert len(sent) == 5 * 4096
    np.testing.assert_allclose(np.linalg.norm(sent), np.linalg.norm(x), rtol=1e-5)
    bound = np.linalg.norm(x) / 64 * math.sqrt(2 * math.log(2 * len(sent) / 1e-9))
    assert np.abs(sent).max() < bound < 0.6 * np.abs(x).max()
    arrived, code = jax.jit(c.roundtrip, static_argnums=0)(c.kmeans(4), x, jax.random.key(0))
    for symbol, centroid in enumerate(code.scales):
        np.testing.assert_allclose(centroid, x[np.asarray(code.symbols) == symbol].mean(), rtol=1e-4, atol=1e-4)
    assert len(np.unique(arrived)) == 4


@pytest.mark.parametrize("case", ["random", "ties", "the sample misleads", "nothing"])
def test_the_largest_of_many_values_are_those_that_a_sort_finds(case):
    d, k = 2**17, 1000
    x = np.random.default_rng(3).standard_t(2, d).astype("f4")
    if case == "ties":
        x = np.round(x)
    if case == "the sample misleads":
        x[:: d // 2**14 | 1] *= 1e6
        k = 10_000
    if case == "nothing":
        x[:] = 0
    code = c.top_k(k).encode(jnp.asarray(x), jax.random.key(0))
    largest = np.argsort(-np.abs(x), stable=True)[:k]
    assert_identical(code.index, np.sort(largest).astype(np.int32))
    assert_identical(code.symbols, x[np.sort(largest)].view(np.uint32))


def test_a_tree_is_one_vector_and_a_tree_again():
    whole = {
        "b": jnp.array([2**31, 2**31 + 1], jnp.uint32),
        "a": jnp.ones((2, 0), bool),
        "c": [jnp.zeros((2, 1), bool)],
    }
    vector, restore = tree.ravel(whole)
    assert_identical(vector, np.array([2**31, 2**31 + 1, 0, 0], np.uint32))
    assert_identical(restore(vector), whole)
    assert tree.ravel({})[1](tree.ravel({})[0]) == {}
    halves = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.float32(1 / 3)}
    arrived, _ = c.roundtrip(c.floats(), halves, jax.random.key(0))
    assert arrived["w"].dtype == jnp.bfloat16
    assert_identical(arrived, halves)


@functools.cache
def counted(name):
    return jax.jit(lambda symbols, live: codings.CODINGS[name].bits(symbols, live, 200))


@pytest.mark.parametrize("name", codings.CODINGS)
@given(symbols=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 199)), max_size=30))
@example(symbols=[])
@example(symbols=[7] * 30)
@example(symbols=[199])
@settings(max_examples=40, deadline=None, derandomize=True)
def test_codings_are_as_long_as_counted_and_can_be_read(name, symbols):
    coding, n = codings.CODINGS[name], len(symbols)
    padded, live = np.zeros(30, np.uint32), np.arange(30) < n
    padded[:n] = symbols
    bits = coding.write(np.array(symbols, np.uint64), 200)
    assert len(bits) == counted(name)(padded, live)
    reader = codings.Reader(np.concatenate([bits, np.ones(1, np.uint8)]))
    assert coding.read(reader, n, 200).tolist() == symbols
    assert reader.at == len(bits)
    if name == "huffman" and len(set(symbols)) > 1:
        shares = np.unique(symbols, return_counts=True)[1] / n
        entropy = -n * np.sum(shares * np.log2(shares))
        assert entropy - 1e-6 <= len(bits) - 6 * 200 < entropy + n


def test_eliass_codewords():
    def word(name, number):
        return "".join(map(str, codings.CODINGS[name].write(np.array([number - 1], np.uint64), 200)))

    assert [word("elias_gamma", n) for n in (1, 2, 3, 4, 9)] == ["1", "010", "011", "00100", "0001001"]
    assert [word("elias_delta", n) for n in (1, 2, 3, 4, 9)] == ["1", "0100", "0101", "01100", "00100001"]


UPDATE = {"b": VECTORS[3, :4], "w": VECTORS[0, :42].reshape(7, 6)}
CONTEXT = uplink.Context(jax.random.key(5), jax.random.key(6), jnp.int32(0), jnp.float32(1))


def test_error_feedback_loses_nothing():
    """Whole numbers, so that sums are exact: all that was sent, and what is kept, is all that there was."""
    link = uplink.error_feedback(c.top_k(3))
    updates = RNG.integers(-9, 10, (20, D)).astype("f4")
    kept, sent = link.init_client(updates[0]), np.zeros(D)
    encode = jax.jit(lambda update, kept: link.encode(update, (), kept, CONTEXT)[:2])
    for i, update in enumerate(updates):
        message, kept = encode(update, kept)
        assert np.count_nonzero(message) <= 3
        sent += message
        np.testing.assert_array_equal(sent + kept[0], updates[: i + 1].sum(0))


def test_a_clip_inside_of_error_feedback_bounds_the_message():
    link = uplink.error_feedback(uplink.clip_by_global_norm(0.5), c.top_k(3))
    assert float(link.bound(link.init(UPDATE))) == 0.5
    fc.fedavg(softmax_loss, clipped_sgd, uplink=uplink.chain(link, uplink.gaussian(1.0)), reducer=fc.fixed_mean(3))
    kept = link.init_client(UPDATE)
    encode = jax.jit(lambda kept: link.encode(UPDATE, link.init(UPDATE), kept, CONTEXT)[:2])
    for _ in range(3):
        message, kept = encode(kept)
        assert np.sqrt(sum(np.sum(np.square(x)) for x in message.values())) <= 0.5 + 1e-6


def test_power_sgd_is_a_projection_that_finds_the_subspace():
    link = uplink.power_sgd(2)
    rank_two = {"b": UPDATE["b"], "w": (RNG.normal(size=(7, 2)) @ RNG.normal(size=(2, 6))).astype("f4")}
    encode = jax.jit(lambda update, kept: link.encode(update, (), kept, CONTEXT))
    message, kept, report = encode(rank_two, link.init_client(rank_two))
    assert_close(message, rank_two, atol=1e-4)
    assert float(report["bytes"]) == 4 * (2 * (7 + 6) + 4)
    w, q = UPDATE["w"].astype(np.float64), np.asarray(link.init_client(UPDATE)[0], np.float64)
    kept = link.init_client(UPDATE)
    for i in range(60):
        p = np.linalg.qr(w @ q)[0]
        q = w.T @ p
        message, kept, _ = encode(UPDATE, kept)
        if i == 0:
            assert_close(np.asarray(message["w"]), (p @ q.T).astype("f4"), rtol=1e-3, atol=1e-4)
    u, s, v = np.linalg.svd(w)
    assert_close(np.asarray(message["w"]), ((u[:, :2] * s[:2]) @ v[:2]).astype("f4"), rtol=1e-2, atol=1e-2)
    zero = jax.tree.map(np.zeros_like, UPDATE)
    message, after, _ = encode(zero, kept)
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
        (lambda: uplink.chain(CLIP, uplink.compress(c.qsgd(4)), NOISE), "nothing between them that may make"),
        (lambda: uplink.chain(CLIP, uplink.error_feedback(c.sign()), NOISE), "put the clip inside of it"),
        (lambda: uplink.chain(CLIP, uplink.count_sketch(), NOISE), "nothing between them that may make"),
        (lambda: uplink.chain(CLIP, NOISE, uplink.compress(c.qsgd(4))), "move the noise last"),
        (lambda: uplink.error_feedback(uplink.count_sketch()), "sketches belong behind it"),
        (lambda: uplink.error_feedback(CLIP, NOISE), "noise and sketches"),
        (
            lambda: uplink.error_feedback(c.random_k(0.1)).init_client(UPDATE),
            "46 values .* lose 8.2 times .* unbiased=False",
        ),
        (lambda: fc.compressed_broadcast(fc.fedavg(softmax_loss, SGD), c.terngrad()).init(UPDATE), "lose 6.78 times"),
        (lambda: uplink.error_feedback(), "needs what loses something"),
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
            "in a sum only: make weighted_mean",
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
        (lambda: c.nbytes(c.qsgd(12, coding="huffman").encode(VECTORS[0], jax.random.key(0))), "at most 256 letters"),
        (lambda: fc.compressed_broadcast(fc.fedbuff(softmax_loss, SGD, max_staleness=2), c.sign()), "past models"),
        (
            lambda: fc.compressed_broadcast(fc.partially_private(softmax_loss, SGD, private="b"), c.sign()),
            "or a part of one",
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
    assert uplink.chain(CLIP, uplink.compress(chosen), NOISE).noise == "central"


def test_an_update_that_is_not_finite_stays_so():
    link = uplink.compress(c.threshold(0.1))
    for bad in (np.nan, np.inf):
        message, _, report = link.encode({"w": np.array([1, bad, 2], "f4")}, (), (), CONTEXT)
        assert np.all(np.isnan(message["w"]))
        assert np.isfinite(report["bytes"])


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


def test_the_benchmark_goes_on_where_it_was_and_its_report_has_all_entries(tmp_path, capsys):
    texts = [text for texts in commbench.FAMILIES.values() for text in texts]
    assert len(set(texts)) == len(texts)
    track = commbench.TRACKS["three_numbers"]()[0]
    for text in texts:
        assert isinstance(commbench.build(track, text), fc.Algorithm), text
    run = functools.partial(commbench.bench, ["three_numbers"], ["floats"], 1, tmp_path, quick=True)
    assert run(should_stop=lambda: True) == 0
    assert run() == 1
    assert run() == 0
    report = (tmp_path / "report.md").read_text()
    assert "| `floats(16)` |" in report
    assert "| 2 | 0 | 4 |" in report  # one number is always the same symbol of its own
    assert (tmp_path / "three_numbers.png").exists()
    with pytest.raises(InvalidInput, match="did you mean 'top_k'"):
        commbench.bench(["three_numbers"], ["topk"], 1, tmp_path)


def test_codes_are_pytrees_without_surprises():
    code = c.top_k(0.1).encode(VECTORS[0], jax.random.key(0))
    assert {f.name for f in dataclasses.fields(code)} >= {"symbols", "scales", "index", "count"}
    both = [code, c.sign().encode(VECTORS[0], jax.random.key(0))]
    back = c.from_bytes(c.to_bytes(both), both)
    jax.tree.map(np.testing.assert_array_equal, back, both)
    assert len(c.to_bytes(both)) == c.nbytes(both)
