"""What holds of every algorithm's maker: per-example clips, wrappers of wrappers, and algorithms from outside."""

import dataclasses
import functools
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_pairs as pairs
import test_promises as promises
from fedexp import fedexp
from problems import COHORTS, MAKERS, OUTSIDE, Run, assert_close, parameters, population, softmax_loss

import fedjax_clip as fc

SGD, UNIFORM = optax.sgd(0.1), fc.reduce.uniform_mean()
WRAPPERS = {
    "frozen": lambda algorithm: fc.partially_frozen(algorithm, "^frozen"),
    "private": lambda algorithm: fc.partially_private(algorithm, "^b$"),
    "compressed": lambda algorithm: fc.compressed_broadcast(algorithm, fc.compression.qsgd(8)),
}
ORDERS = [
    *itertools.permutations(WRAPPERS, 1),
    *itertools.permutations(WRAPPERS, 2),
    ("compressed", "private", "frozen"),
]


def loss(params, batch, key):
    return pairs.squared_loss(params, batch, key) + params["frozen"].sum()


def wrapped(make, order):
    """The algorithm in its wrappers, the first innermost; ``None`` if they are refused by a sentence."""
    algorithm, told = make(loss, SGD), "."
    try:
        for wrapper in order:
            algorithm = WRAPPERS[wrapper](algorithm)
    except fc.InvalidInput as error:
        algorithm, told = None, str(error)
    assert told.endswith((".", ")"))
    return algorithm


def linear_loss(params, batch, key):
    """The gradient of an example does not depend on the parameters: ``x`` for w and 1 for b."""
    return batch["x"] @ params["w"][:, 0] + params["b"][0], {}


def test_every_algorithm_of_the_library_is_under_these_laws():
    made = {name.rsplit(".", 1)[-1] for name in promises.algorithm_makers()} - {"algorithm"}
    assert OUTSIDE or {name.split(",")[0] for name in MAKERS} == made


@functools.cache
def start():
    return {**parameters(), "frozen": np.ones(2, np.float32)}


def trace(algorithm):
    """One round, of which nothing is computed: states keep their form, and metrics are numbers."""
    server, client = algorithm.init(start()), algorithm.init_client(start())
    state = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * len(pairs.cohort().ids)), client)
    cohort = dataclasses.replace(pairs.cohort(), state=state)
    for run in filter(None, (algorithm.start, algorithm.round)):
        after, states, metrics = jax.eval_shape(run, server, cohort, jax.random.key(0))
        assert pairs.form((after, states)) == pairs.form((server, state))
        assert {x.shape for x in metrics.values()} == {()}
    return metrics


@pytest.mark.parametrize("name", MAKERS)
def test_wrappers_compose_with_every_algorithm_and_each_other_or_are_refused(name):
    plain, traced = MAKERS[name](softmax_loss, SGD), set()
    if name in ("cfl", "ifca", "fedbabu"):
        pytest.skip("It has several models, or is a wrapped FedAvg already: tests/algorithms/test_personal.py")
    for order in ORDERS:
        algorithm = wrapped(MAKERS[name], order)
        if algorithm is None:
            assert "compressed" in order or ("private" in order and plain.personal)
            continue
        metrics = trace(algorithm)
        assert ("bytes_down_entropy" in metrics) == ("compressed" in order)
        assert (algorithm.personal is not None) == ("private" in order or plain.personal is not None)
        traced.add(order)
    expected = {
        order for order in ORDERS if "compressed" not in order or (order[0] == "compressed" and plain.broadcasts)
    }
    assert traced == {order for order in expected if not ("private" in order and plain.personal)}


@pytest.mark.parametrize("name", MAKERS)
def test_every_algorithm_clips_each_examples_gradient(name):
    """A clip to nothing leaves nothing to step along; one that never fires leaves the algorithm."""
    run = Run(MAKERS[name](softmax_loss, SGD), population())

    @jax.jit
    def clipped(threshold, server, cohort, key):
        gradient = fc.local.per_example_gradient(fc.clipping.clip_by_global_norm(threshold))
        return MAKERS[name](softmax_loss, SGD, gradient=gradient).round(server, cohort, key)

    def train(threshold):
        def step(server, cohort, key):
            server, states, metrics = clipped(threshold, server, jax.tree.map(lambda x: x[0], cohort), key)
            return server, jax.tree.map(lambda x: x[None], states), metrics

        return run.rounds(parameters(), COHORTS[:1], step)

    # So little that an adaptive step, which divides by the gradient's size and eps, is nothing, too.
    never, always, plain = train(1e6), train(1e-20), run.rounds(parameters(), COHORTS[:1])
    assert_close(never[0].params, plain[0].params, rtol=1e-4, atol=1e-5)
    start = run.algorithm.init(parameters()).params
    assert_close(always[0].params, start, atol=1e-6)
    assert any(np.abs(x - y).max() > 1e-3 for x, y in zip(*map(jax.tree.leaves, (plain[0].params, start)), strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_noise_on_records_is_taken_only_where_its_accounting_counts_every_use(name):
    """A client that takes gradients beside those of its steps uses a record more often than passes are counted."""
    private = fc.local.private_gradient(1.0, 1.0)
    more = name.split(",")[0] in ("episode", "episode_plus", "mime", "pfedme", "per_fedavg", "fedrep", "fedala")
    more |= name in ("afl", "ifca", "q_ffl", "term")  # what they send depends on their loss
    if more:
        with pytest.raises(fc.InvalidInput, match="take fedavg, fedsgd or scaffold"):
            MAKERS[name](softmax_loss, SGD, gradient=private)
    else:
        pairs.trace(MAKERS[name](pairs.squared_loss, SGD, gradient=private))


def test_fedsgd_clips_each_of_a_clients_examples_once_whatever_the_batches():
    data, clip = population(), fc.clipping.clip_by_global_norm(0.5)
    algorithm = fc.fedsgd(linear_loss, optax.sgd(1.0), gradient=fc.local.per_example_gradient(clip), reducer=UNIFORM)
    server, _, _ = Run(algorithm, data, fc.extend.LocalWork(batch_size=4)).rounds(parameters(), [[1]])
    x = np.concatenate([data.client(1)["x"], np.ones((9, 1), np.float32)], axis=1)
    clipped = x * np.minimum(1, 0.5 / np.linalg.norm(x, axis=1, keepdims=True))
    moved = np.append(server.params["w"][:, 0] - parameters()["w"][:, 0], server.params["b"][0])
    np.testing.assert_allclose(moved, -clipped.mean(0), rtol=1e-5, atol=1e-6)


def test_a_message_that_was_not_declared_is_refused_and_told_how_to_be():
    def wrong(parts, declared, kept=()):
        def round(now):
            def client_fn(x, client, key):
                return (x, *[jnp.ones(())] * parts) if parts else x, kept, {}

            return now.step(now.exchange(client_fn, now.server.params))

        return fc.extend.algorithm(round, pairs.squared_loss, SGD, beside=[None] * declared)

    few, many, kept = wrong(0, 1), wrong(1, 0), wrong(0, 0, jnp.ones(2))
    for algorithm, words in ((few, "beside="), (many, "beside="), (kept, "client_own=")):
        with pytest.raises(fc.InvalidInput, match=words):
            pairs.trace(algorithm)
    for wrap in (WRAPPERS["frozen"], WRAPPERS["private"]):
        with pytest.raises(fc.InvalidInput, match="fc.extend.algorithm"):
            wrap(fc.fedavg(softmax_loss, SGD)._replace(parts=None))
    with pytest.raises(fc.InvalidInput, match="wrap it once"):
        WRAPPERS["private"](WRAPPERS["private"](fc.fedavg(softmax_loss, SGD)))


def test_a_step_of_another_form_or_a_metric_that_is_none_is_refused():
    def ending(step, sent=lambda x: x):
        def round(now):
            answer = now.exchange(lambda x, client, key: (sent(x), client.state.own, {}), now.server.params)
            return step(now, answer)

        return fc.extend.algorithm(round, pairs.squared_loss, SGD)

    for step, words in (
        (lambda now, answer: now.step(answer.update), "the answer of now.exchange first"),
        (lambda now, answer: now.step(answer, (answer.update, 1.0)), "answer.update\\[0\\]"),
        (
            lambda now, answer: now.step(answer, jax.tree.map(jnp.ravel, answer.update)),
            "update of now.step at .* shape",
        ),
        (lambda now, answer: now.step(answer, own=jnp.ones(3)), "server_own="),
        (lambda now, answer: now.step(answer, metrics={"norms": jnp.ones(3)}), r"norms.* has shape \(3,\)"),
        (lambda now, answer: now.step(answer, metrics={"loss": jnp.ones(())}), "'loss'.*choose another"),
    ):
        with pytest.raises(fc.InvalidInput, match=words):
            pairs.trace(ending(step))
    with pytest.raises(fc.InvalidInput, match="clients' update at .* has shape"):
        pairs.trace(ending(lambda now, answer: now.step(answer), lambda x: jax.tree.map(jnp.ravel, x)))


def test_a_link_that_returns_something_else_is_refused():
    for encode in (lambda update, ctx: update, lambda update, ctx: fc.uplink.Message(update)):
        with pytest.raises(fc.InvalidInput, match="must return"):
            pairs.trace(fc.fedavg(pairs.squared_loss, SGD, uplink=fc.uplink.stateless(encode)))
    with pytest.raises(fc.InvalidInput, match="encode must be a function of"):
        fc.uplink.stateless(lambda update: (update, {}))


def test_nothing_is_sent_that_the_accounting_of_noise_does_not_see():
    """Otherwise an algorithm could send twice, or ask, under noise that covers one message."""

    def client_fn(x, client, key):
        return x, client.state.own, {}

    def twice(now):
        now.exchange(client_fn, now.server.params)
        return now.step(now.exchange(client_fn, now.server.params))

    def asking(now):
        return now.step(now.exchange(client_fn, now.server.params, after=now.ask(client_fn, now.server.params)))

    def ending(now):
        return now.exchange(client_fn, now.server.params)

    for round, words in ((twice, "one exchange"), (asking, "asks=True"), (ending, "as now.step does")):
        with pytest.raises(fc.InvalidInput, match=words):
            pairs.trace(fc.extend.algorithm(round, pairs.squared_loss, SGD))
    pairs.trace(fc.extend.algorithm(asking, pairs.squared_loss, SGD, asks=True))
    noise = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(1.0))
    with pytest.raises(fc.InvalidInput, match="does not cover"):
        mean = fc.reduce.fixed_mean(4)
        fc.extend.algorithm(asking, pairs.squared_loss, SGD, asks=True, uplink=noise, reducer=mean)


def test_a_strangers_algorithm_passes_the_laws_by_one_command():
    """FedExP, in one file of under 30 lines, a clip rule and a link; the maker refuses by itself what it must."""
    here = pathlib.Path(__file__).parent
    assert len((here / "fedexp.py").read_text().splitlines()) < 30
    noise = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(1.0))
    with pytest.raises(fc.InvalidInput, match="does not cover"):
        fedexp(softmax_loss, SGD, uplink=noise, reducer=fc.reduce.fixed_mean(4))
    others = ",".join(f"strangers:{name}" for name in ("fedexp", "clip_to_mean", "signs"))
    laws = "finite or order or diverge or wrappers or clips"
    command = ["pytest", "tests/laws", "-q", "-n0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", *command, f"--laws-over={others}", f"-k={laws}"],
        cwd=here.parents[1],
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 3 * 5


def test_a_strangers_fedexp_is_the_librarys_link():
    mine = fedexp(softmax_loss, SGD, reducer=UNIFORM)
    link = fc.fedavg(softmax_loss, SGD, uplink=fc.uplink.fedexp(), reducer=UNIFORM)
    assert mine.name == "fedexp"
    with pytest.raises(fc.InvalidInput, match="reports 'extrapolation', which this algorithm reports itself"):
        pairs.trace(fedexp(lambda *args: (pairs.squared_loss(*args), {"extrapolation": jnp.ones(4)}), SGD))
    (server, _, rows), (right, _, expected) = (Run(a, population()).rounds(parameters(), COHORTS) for a in (mine, link))
    assert_close(server.params, right.params)
    assert [row["extrapolation"] for row in rows] == pytest.approx([row["uplink/extrapolation"] for row in expected])
