"""Text: next characters of Shakespeare's roles or of your own files, sentiment of tweets, LoRA."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_clip import models
from fedjax_clip.algorithms.lora import lora
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput, Params, PerExampleLoss
from fedjax_clip.data import partition, sources
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.sources import archives, text
from fedjax_clip.tasks.base import Task, check_positive, classifier, cross_entropy, hits, make, restored
from fedjax_clip.tasks.predictor import Predictor, described

_ASCII, _BYTES = 128, 256


def next_character(model: nn.Module) -> PerExampleLoss:
    """Cross-entropy (nats a character) and ``accuracy``, on batches ``{"text": [B, T + 1]}``.

    Args:
      model: a Flax module from characters ``[B, T]`` to logits of the next characters, ``[B, T, characters]``.

    Example:
      >>> per_example_loss = fc.tasks.next_character(fc.models.CharLSTM(128))
    """

    def per_example_loss(params, batch, key):
        characters = batch["text"].astype(jnp.int32)
        seen, wanted = characters[:, :-1], characters[:, 1:]
        logits = jnp.asarray(model.apply(params, seen)).astype(jnp.float32)
        return cross_entropy(logits, wanted).mean(-1), {"accuracy": hits(logits, wanted).mean(-1)}

    return per_example_loss


def shakespeare_lstm(
    plays: str | Sequence[str] = tuple(text.PLAYS),
    embedding: int = 8,
    hidden: int = 256,
    layers: int = 2,
    length: int = 80,
    held_out_roles: float = 0.05,
    held_out_examples: float = 0.05,
    seed: int = 0,
) -> Task:
    """Shakespeare's next character by an LSTM; each role is a client.

    Args:
      plays: as for ``fc.data.sources.shakespeare``.
      embedding, hidden, layers: sizes of ``fc.models.CharLSTM``.
      length: characters in an example.
      held_out_roles: fraction of the roles that is never trained on.
      held_out_examples: fraction of the other roles' examples that is never trained on.
      seed: of both splits.

    Example:
      >>> task = fc.tasks.shakespeare_lstm("comedies")  # doctest: +SKIP

    Source: Caldas et al. (2018), "LEAF".
    """
    check_positive(embedding=embedding, hidden=hidden, layers=layers)
    model = models.CharLSTM(_ASCII, embedding, hidden, layers)
    return _characters(_shakespeare(plays, length), model, held_out_roles, held_out_examples, seed)


def shakespeare_transformer(
    plays: str | Sequence[str] = tuple(text.PLAYS),
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    length: int = 80,
    held_out_roles: float = 0.05,
    held_out_examples: float = 0.05,
    seed: int = 0,
) -> Task:
    """Shakespeare's next character by a small decoder-only Transformer; each role is a client.

    Arguments as for ``shakespeare_lstm``; ``width``, ``layers``, ``heads`` are the sizes of ``fc.models.Transformer``.

    Example:
      >>> task = fc.tasks.shakespeare_transformer("tragedies", width=64)  # doctest: +SKIP
    """
    model = _transformer(_ASCII, length, width, layers, heads)
    return _characters(_shakespeare(plays, length), model, held_out_roles, held_out_examples, seed)


def shakespeare_lora(
    base: str,
    plays: str | Sequence[str] = "histories",
    rank: int = 4,
    pattern: str = "query|value",
    alpha: float | None = None,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    length: int = 80,
    held_out_roles: float = 0.05,
    held_out_examples: float = 0.05,
    seed: int = 0,
) -> Task:
    """Adapts a trained ``shakespeare_transformer`` to other plays; only low-rank adapters train and travel.

    Args:
      base: ``params.npz`` of a run of ``shakespeare_transformer`` with the same ``width``, ``layers`` and ``length``.
      plays: those to adapt to.
      rank, pattern, alpha: as for ``fc.lora``.
      width, layers, heads, length, held_out_roles, held_out_examples, seed: as for ``shakespeare_transformer``.

    Example:
      >>> task = fc.tasks.shakespeare_lora("runs/transformer/params.npz", plays="tragedies")  # doctest: +SKIP
    """
    whole = shakespeare_transformer(plays, width, layers, heads, length, held_out_roles, held_out_examples, seed)
    tuned = lora(whole.per_example_loss, _load(base, whole), rank, pattern, alpha)
    return Task(whole.data, whole.evaluation, tuned.init, tuned.per_example_loss, frozen=tuned.frozen)


def text_files(
    directory: str,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    length: int = 80,
    held_out_clients: float = 0.2,
    held_out_examples: float = 0.2,
    seed: int = 0,
) -> Task:
    """The next byte of your own text files by a small Transformer; each file is a client.

    Args:
      directory: of the files ``*.txt``, UTF-8.
      width, layers, heads, length, held_out_clients, held_out_examples, seed: as for ``shakespeare_transformer``.

    Example:
      >>> from pathlib import Path
      >>> Path("letters").mkdir()
      >>> for name in ("ann", "bob", "eve"):
      ...   _ = Path(f"letters/{name}.txt").write_text("Dear reader, " * 100)
      >>> task = fc.tasks.text_files("letters", width=16, layers=1, heads=2)
    """
    model = _transformer(_BYTES, length, width, layers, heads)
    data = sources.text_files(directory, length)
    return _characters(data, model, held_out_clients, held_out_examples, seed, _BYTES)


def tweets(
    num_clients: int = 200,
    alpha: float = 0.3,
    width: int = 32,
    num_words: int = 32,
    vocabulary: int = 2**14,
    seed: int = 0,
) -> Task:
    """The sentiment of tweets (negative, neutral, positive) by a bag of words; a tenth of each client's is held out.

    Args:
      num_clients: clients that the tweets are dealt to.
      alpha: Dirichlet label skew, smaller is more skewed.
      width: of the word embeddings.
      num_words, vocabulary: as for ``fc.data.sources.tweets``.
      seed: of the deal and the split.

    Example:
      >>> task = fc.tasks.tweets(num_clients=100)  # doctest: +SKIP
    """
    check_positive(width=width, num_words=num_words)
    if vocabulary < 2:
        raise InvalidInput(f"vocabulary must be at least 2, not {vocabulary}.")
    data = partition.dirichlet(sources.tweets(num_words, vocabulary), num_clients, alpha, seed=seed)
    train, examples = data.split_examples(0.1, seed)
    model = models.BagOfWords(len(text.SENTIMENTS), vocabulary, width)
    task = make(train, {"examples": examples}, model, classifier(model))
    given = {"num_words": num_words, "vocabulary": vocabulary}
    predictor = Predictor("words", described(model), given, {"classes": list(text.SENTIMENTS)})
    return dataclasses.replace(task, predictor=predictor)


def _shakespeare(plays: str | Sequence[str], length: int) -> FederatedData:
    check_positive(length=length)
    return sources.shakespeare((plays,) if isinstance(plays, str) else plays, length)


def _transformer(vocabulary: int, length: int, width: int, layers: int, heads: int) -> nn.Module:
    check_positive(length=length, width=width, layers=layers, heads=heads)
    if width % heads:
        raise InvalidInput(f"width must be a multiple of the {heads} heads, and is {width}.")
    return models.Transformer(vocabulary, length, width, layers, heads)


def _characters(
    data: FederatedData,
    model: nn.Module,
    held_out_clients: float,
    held_out_examples: float,
    seed: int,
    characters: int = _ASCII,
) -> Task:
    train, clients = data.split_clients(held_out_clients, seed)
    train, examples = train.split_examples(held_out_examples, seed)
    sample = jnp.zeros((1, data.fields()["text"].shape[1] - 1), jnp.int32)
    evaluation = {"examples": examples, "clients": clients}
    given = {"length": sample.shape[1], "encoding": "ascii" if characters == _ASCII else "utf-8"}
    names = [chr(code) if code < _ASCII else f"byte {code}" for code in range(characters)]
    predictor = Predictor("characters", described(model), given, {"classes": names})
    return Task(train, evaluation, lambda key: model.init(key, sample), next_character(model), predictor=predictor)


def _load(path: str, task: Task) -> Params:
    """A run's ``params.npz`` in the structure of the task's own parameters."""
    if not (file := files.expanded(path)).exists():
        preset = "experiments/presets/shakespeare_transformer.flags"
        raise InvalidInput(
            f"There is no base model {path}: train one, by python -m experiments.run --flagfile={preset}."
        )
    return restored(archives.read_npz(file), jax.eval_shape(task.init, jax.random.key(0)), path)
