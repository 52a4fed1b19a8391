"""Fine-tuning of published models: chats by a decoder, classes of texts by an encoder."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip import models
from fedjax_clip.algorithms.lora import lora
from fedjax_clip.core import checks
from fedjax_clip.core.types import Array, InvalidInput, Params, PerExampleLoss
from fedjax_clip.data import partition, sources
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.sources import text
from fedjax_clip.data.sources.dialogue import rows_of, value
from fedjax_clip.tasks.base import Sample, Task, classifier, cross_entropy, hits
from fedjax_clip.training.scores import Values

SMOL, MINILM = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"


def next_token(model: nn.Module) -> PerExampleLoss:
    """Cross-entropy of the answers (nats a token) by a decoder, on batches as ``fc.data.sources.chats`` makes them.

    An example is a row. Its loss is the mean over its answers' tokens, each of which sees its own chat alone. Besides
    it has their ``accuracy``, their number ``answer_tokens``, and ``exact``, the share of the row's chats whose answers
    are the likeliest in every token: those that greedy generation would repeat.

    Args:
      model: of ``(tokens [B, T], segments [B, T])`` to logits ``[B, T, vocabulary]``, such as ``fc.models.Llama``.

    Example:
      >>> model = fc.models.Llama(128, width=16, hidden=32, layers=2, heads=4, key_heads=2)
      >>> per_example_loss = fc.tasks.next_token(model)
    """

    def per_example_loss(params, batch, key):
        tokens, segments = batch["tokens"].astype(jnp.int32), batch["segments"].astype(jnp.int32)
        wanted, counts = tokens[:, 1:], batch["answers"][:, 1:].astype(jnp.float32)
        logits = jnp.asarray(model.apply(params, tokens[:, :-1], segments[:, :-1])).astype(jnp.float32)
        number = counts.sum(-1)
        right = hits(logits, wanted)
        answers = jnp.maximum(number, 1)
        values = {
            "accuracy": (right * counts).sum(-1) / answers,
            "exact": _share_exact(segments[:, 1:], counts, right),
            "answer_tokens": number,
        }
        return (cross_entropy(logits, wanted) * counts).sum(-1) / answers, values

    return per_example_loss


def _share_exact(segments: Array, counts: Array, right: Array) -> Array:
    """The share of a row's chats without a wrong token among those that count."""
    own = jax.nn.one_hot(segments - 1, segments.shape[-1])
    answered = jnp.einsum("bts,bt->bs", own, counts) > 0
    wrong = jnp.einsum("bts,bt->bs", own, counts * (1 - right)) > 0
    return (answered & ~wrong).sum(-1) / jnp.maximum(answered.sum(-1), 1)


def perplexity(values: Values, data: FederatedData) -> Mapping[str, float]:
    """``perplexity``: exp of the mean loss over all tokens of the set's answers."""
    total = values["answer_tokens"].astype(np.float64)
    return {"perplexity": float(np.exp(values["loss"].astype(np.float64) @ total / max(total.sum(), 1)))}


def chats(
    file: str,
    model: str = SMOL,
    by: str = "client",
    tune: str = "lora",
    rank: int = 8,
    pattern: str = "query|value",
    alpha: float | None = None,
    bits: int = 32,
    length: int = 256,
    pack: bool = True,
    held_out_clients: float = 0.2,
    held_out_examples: float = 0.2,
    samples: int = 3,
    seed: int = 0,
) -> Task:
    """Fine-tunes a decoder on your own chats.

    Args:
      file: .jsonl, see ``fc.data.sources.chats``.
      model: as for ``fc.models.pretrained``: a directory, a GGUF file, the name of a model with a package of its own.
      by: the column that names the client.
      tune: ``"lora"`` trains adapters alone, ``"full"`` all parameters.
      rank, pattern, alpha: of the adapters, as for ``fc.lora``.
      bits: of the frozen kernels: 32, 8 or 4 (``fc.models.quantised``).
      length: tokens of a row, see ``fc.data.sources.chats``.
      pack: whether a row holds as many of a client's chats as fit, see ``fc.data.sources.packed``.
      held_out_clients: fraction of the clients that is never trained on.
      held_out_examples: fraction of the other clients' chats that is never trained on.
      samples: how many held-out chats the model answers in the report.
      seed: of both splits.

    Example:
      >>> import json, pathlib
      >>> decoder.save("decoder")
      >>> row = {"prompt": "To be?", "completion": "Or not to be."}
      >>> rows = [{"client": name, **row} for name in ("ann", "bob", "eve") for _ in range(5)]
      >>> _ = pathlib.Path("chats.jsonl").write_text("\\n".join(map(json.dumps, rows)))
      >>> task = fc.tasks.chats("chats.jsonl", "decoder", rank=2, length=16)
      >>> sorted(task.init(key))
      ['adapters', 'base']
    """
    _check(tune, ("lora", "full"), bits, samples)
    loaded = models.pretrained(model)
    data = sources.chats(file, loaded, by, length)
    held_out = held_out_clients, held_out_examples
    return _decoder(loaded, data, tune, rank, pattern, alpha, bits, pack, *held_out, samples, seed)


def shakespeare_dialogues(
    model: str = SMOL,
    plays: str | Sequence[str] = ("hamlet", "macbeth", "othello"),
    tune: str = "lora",
    rank: int = 8,
    pattern: str = "query|value",
    alpha: float | None = None,
    bits: int = 32,
    length: int = 256,
    pack: bool = True,
    held_out_clients: float = 0.1,
    held_out_examples: float = 0.1,
    samples: int = 3,
    seed: int = 0,
) -> Task:
    """Fine-tunes a decoder on what Shakespeare's roles answer; each role is a client.

    Args:
      plays: as for ``fc.data.sources.dialogues``.
      model, tune, rank, pattern, alpha, bits, length, pack, held_out_clients, held_out_examples, samples, seed: as for
        ``chats``.

    Example:
      >>> task = fc.tasks.shakespeare_dialogues(plays="macbeth")  # doctest: +SKIP
    """
    _check(tune, ("lora", "full"), bits, samples)
    loaded = models.pretrained(model)
    data = sources.dialogues(loaded, (plays,) if isinstance(plays, str) else plays, length)
    held_out = held_out_clients, held_out_examples
    return _decoder(loaded, data, tune, rank, pattern, alpha, bits, pack, *held_out, samples, seed)


def tweets_bert(
    model: str = MINILM,
    tune: str = "lora",
    rank: int = 8,
    pattern: str = "query|value",
    alpha: float | None = None,
    num_clients: int = 200,
    dirichlet: float = 0.3,
    length: int = 48,
    seed: int = 0,
) -> Task:
    """The sentiment of tweets by a published encoder and a new head; clients and splits are those of ``tweets``.

    Args:
      model: as for ``fc.models.pretrained``.
      tune: ``"head"`` trains the new head alone, ``"lora"`` it and adapters of the encoder, ``"full"`` everything.
      rank, pattern, alpha: of the adapters, as for ``fc.lora``.
      num_clients: clients that the tweets are dealt to.
      dirichlet: label skew, smaller is more skewed.
      length: tokens kept of each tweet; fewer are padded with 0.
      seed: of the deal and the split.

    Example:
      >>> task = fc.tasks.tweets_bert(tune="head")  # doctest: +SKIP
    """
    loaded = _encoder(model, tune)
    written, labels = text.read_tweets()
    examples = {"x": tokens_of(loaded, written, length), "y": labels}
    train, held_out = partition.dirichlet(examples, num_clients, dirichlet, seed=seed).split_examples(0.1, seed)
    return _classified(loaded, train, {"examples": held_out}, len(text.SENTIMENTS), tune, rank, pattern, alpha)


def texts(
    file: str,
    model: str = MINILM,
    column: str = "text",
    label: str = "label",
    by: str = "client",
    tune: str = "lora",
    rank: int = 8,
    pattern: str = "query|value",
    alpha: float | None = None,
    length: int = 64,
    held_out_clients: float = 0.2,
    held_out_examples: float = 0.2,
    seed: int = 0,
) -> Task:
    """Classifies your own texts by a published encoder and a new head.

    Args:
      file: a table (.csv, UTF-8, with a header) or .jsonl.
      model: as for ``fc.models.pretrained``.
      column: of the texts.
      label: the column of the classes, which are its words in their order.
      by: the column that names the client.
      tune, rank, pattern, alpha: as for ``tweets_bert``.
      length: tokens kept of each text; fewer are padded with 0.
      held_out_clients: fraction of the clients that is never trained on.
      held_out_examples: fraction of the other clients' texts that is never trained on.
      seed: of both splits.

    Raises:
      InvalidInput: a file that cannot be read, a row without text, class or client, one class only ...

    Example:
      >>> import pathlib
      >>> rows = [f"{name},{word} me,{word}" for name in ("ann", "bob", "eve") for word in ("call", "write") * 3]
      >>> _ = pathlib.Path("mail.csv").write_text("\\n".join(["client,text,label", *rows]))
      >>> bert = fc.models.Bert(11, width=8, hidden=12, layers=1, heads=2, positions=64)
      >>> weights = bert.init(key, np.zeros((1, 4), np.int32))
      >>> fc.models.Pretrained(bert, weights, decoder.tokenizer).save("encoder")
      >>> task = fc.tasks.texts("mail.csv", "encoder", rank=2)
      >>> task.data.labels
      {'y': ('call', 'write')}
    """
    loaded = _encoder(model, tune)
    clients: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(rows_of(file), 1):
        told = value(row, column, number, "text"), value(row, label, number, "class")
        clients.setdefault(value(row, by, number, "client"), []).append(told)
    classes = sorted({y for own in clients.values() for _, y in own})
    if len(classes) < 2:
        raise InvalidInput(f"{file}: {label} has {len(classes) or 'no'} class: there is nothing to tell apart.")
    examples = {
        name: {
            "x": tokens_of(loaded, [x for x, _ in own], length),
            "y": np.array([classes.index(y) for _, y in own], np.int32),
        }
        for name, own in clients.items()
    }
    data = dataclasses.replace(FederatedData.from_clients(examples), labels={"y": tuple(classes)})
    train, strangers = data.split_clients(held_out_clients, seed)
    train, held_out = train.split_examples(held_out_examples, seed)
    sets = {"examples": held_out, "clients": strangers}
    return _classified(loaded, train, sets, len(classes), tune, rank, pattern, alpha)


def _encoder(model: str, tune: str) -> models.Pretrained:
    """A published encoder."""
    _check(tune, ("lora", "head", "full"))
    loaded = models.pretrained(model)
    if not isinstance(loaded.model, models.Bert):
        raise InvalidInput(f"{model} is no encoder: texts are classified by a model of the BERT family.")
    return loaded


def _classified(
    loaded: models.Pretrained,
    train: FederatedData,
    held_out: Mapping[str, FederatedData],
    num_classes: int,
    tune: str,
    rank: int,
    pattern: str,
    alpha: float | None,
) -> Task:
    """Texts as tokens ``x``, with classes ``y``, by an encoder and a new head."""
    encoder: Any = loaded.model
    classes = models.TextClassifier(encoder, num_classes)
    sample = jnp.zeros((1, train.fields()["x"].shape[1]), jnp.int32)

    def init(key: Array) -> Params:
        fresh = classes.init(key, sample)
        return {"params": {**fresh["params"], "encoder": loaded.params["params"]}}

    task = Task(train, held_out, init, classifier(classes), evaluated_at_once=256)
    return _tuned(task, tune, rank, pattern, alpha, head="^params/head/")


def tokens_of(model: models.Pretrained, texts: Sequence[str], length: int) -> np.ndarray:
    """The tokens of texts as an encoder takes them, ``int32 [N, length]``, padded with 0 or cut.

    Args:
      model: with a tokenizer, which adds the tokens that begin and end a text.
      texts: ``[N]``.
      length: tokens kept.
    """
    checks.count("length", length, most=model.model.positions)
    if model.tokenizer is None:
        raise InvalidInput("The model has no tokenizer: give one of fc.models.pretrained that was read with its own.")
    model.tokenizer.no_padding()
    model.tokenizer.enable_truncation(length)
    rows = np.zeros((len(texts), length), np.int32)
    for row, encoding in zip(rows, model.tokenizer.encode_batch(list(texts)), strict=True):
        row[: len(encoding.ids)] = encoding.ids
    return rows


def _check(tune: str, ways: Sequence[str], bits: int = 32, samples: int = 0) -> None:
    """Refuses arguments before anything is read."""
    if tune not in ways:
        raise InvalidInput(f"tune must be {', '.join(ways[:-1])} or {ways[-1]}, not {tune!r}.")
    if bits not in (4, 8, 32):
        raise InvalidInput(f"bits must be 4, 8 or 32, not {bits!r}.")
    if tune == "full" and bits != 32:
        raise InvalidInput(f"bits={bits} is for kernels that stay frozen, and tune='full' trains them.")
    checks.count("samples", samples, 0, most=64)


def _tuned(
    task: Task, tune: str, rank: int, pattern: str, alpha: float | None, head: str | None = None, bits: int = 32
) -> Task:
    """The task with the parameters that train: adapters and the head, the head alone, or all."""
    if tune == "full":
        return task
    if tune == "head":
        return dataclasses.replace(task, frozen=rf"^(?!{str(head).removeprefix('^')})")

    def adapted(base: Params) -> Any:
        base = base if bits == 32 else models.quantised(base, bits)
        return lora(task.per_example_loss, base, rank, pattern, alpha, beside=True, whole=head)

    tuned = adapted(jax.eval_shape(task.init, jax.random.key(0)) if bits == 32 else task.init(jax.random.key(0)))

    def init(key: Array) -> Params:
        base, fresh = jax.random.split(key)
        return adapted(task.init(base)).init(fresh)

    return dataclasses.replace(task, init=init, per_example_loss=tuned.per_example_loss, frozen=tuned.frozen)


def _decoder(
    loaded: models.Pretrained,
    data: FederatedData,
    tune: str,
    rank: int,
    pattern: str,
    alpha: float | None,
    bits: int,
    pack: bool,
    held_out_clients: float,
    held_out_examples: float,
    samples: int,
    seed: int,
) -> Task:
    if not isinstance(loaded.model, models.Llama):
        raise InvalidInput("Chats need a decoder: name a model of the Llama family.")
    model = loaded.model.clone(rematerialise=True)
    train, clients = data.split_clients(held_out_clients, seed)
    train, examples = train.split_examples(held_out_examples, seed)
    chosen = _first_chats(clients, samples)
    if pack:
        train, examples, clients = map(sources.packed, (train, examples, clients))
    held_out = {"examples": examples, "clients": clients}
    task = Task(
        *(train, held_out, lambda key: loaded.params, next_token(model)), summarise=perplexity, evaluated_at_once=4
    )
    tuned = _tuned(task, tune, rank, pattern, alpha, bits=bits)
    merge: Callable[[Params], Params] = lambda params: params  # noqa: E731
    if tune == "lora":
        merge = lora(next_token(model), loaded.params, rank, pattern, alpha).merge
    return dataclasses.replace(
        tuned,
        samples=lambda params: _answered(loaded, merge(params), chosen),
        save=lambda params, directory: dataclasses.replace(loaded, params=merge(params)).save(directory),
    )


def _first_chats(data: FederatedData, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The prompt and the answer, as tokens, of the first chat of each of the first clients."""
    chosen = []
    for row in data.offsets[:-1][:count]:
        there = data.fields()["segments"][row] > 0
        tokens, answers = (data.fields()[name][row][there] for name in ("tokens", "answers"))
        begin = int(np.argmax(answers))
        end = begin + int(np.argmin(np.append(answers[begin:], False)))
        chosen.append((tokens[:begin], tokens[begin:end]))
    return chosen


def _answered(
    loaded: models.Pretrained, params: Params, chats: Sequence[tuple[np.ndarray, np.ndarray]], steps: int = 48
) -> list[Sample]:
    """What a model answers to prompts, by its likeliest tokens."""
    if not chats:
        return []
    prompts = np.zeros((len(chats), max(len(prompt) for prompt, _ in chats)), np.int32)
    for row, (prompt, _) in zip(prompts, chats, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt, _ in chats], np.int32)
    follows = np.asarray(models.generate(loaded.model, params, prompts, steps, lengths=lengths))
    found = []
    for (prompt, answer), tokens in zip(chats, follows, strict=True):
        ended = np.flatnonzero(tokens == loaded.end)
        said = tokens[: ended[0]] if len(ended) else tokens
        found.append(Sample(*(loaded.tokenizer.decode(np.asarray(t).tolist()).strip() for t in (prompt, answer, said))))
    return found
