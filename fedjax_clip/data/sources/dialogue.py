"""Chats for the fine-tuning of decoders: by a chat template to tokens, of which those of the answers count."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_clip.core import checks, files
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.sources import text

Chat = Sequence[Mapping[str, str]]  # messages {"role": "system", "user" or "assistant", "content": ...}


def chats(
    source: files.PathLike | Iterable[Mapping[str, Any]],
    model: Any,
    by: str = "client",
    length: int = 256,
) -> FederatedData:
    """Chats as tokens for a decoder; each belongs to the client that a column names.

    A row is ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}], <by>: name}``, or has
    ``"prompt"`` and ``"completion"`` in place of ``"messages"``. All of the assistant's messages are answers, with the
    token that ends them. A chat is cut at ``length + 1`` tokens, and left out if no answer begins before.

    Args:
      source: a .jsonl file, or rows, such as a ``datasets.Dataset``.
      model: of ``fc.models.pretrained``; its tokenizer and its chat template are used.
      by: the column that names the client.
      length: tokens that the model sees in a row.

    Returns:
      ``{"tokens": int32, "segments": int32, "answers": bool}``, all ``[N, length + 1]``, a chat a row. Segments say
      which chat of the row a token belongs to, here 1, or 0 for padding; answers, whether a loss counts the token.
      ``fc.data.sources.packed`` puts several chats in a row.

    Raises:
      InvalidInput: a file that cannot be read, a row without chat or client, by its number; a model without template;
        no answers.

    Example:
      >>> rows = [{"client": "ann", "prompt": "To be?", "completion": "Or not to be."}]
      >>> data = fc.data.sources.chats(rows, decoder, length=16)
      >>> data.names, data.examples["tokens"].shape, int(data.examples["answers"].sum())
      (['ann'], (1, 17), 5)
    """
    checks.count("length", length, most=2**20)
    render = _template(model)
    found: dict[str, list[Chat]] = {}
    for number, row in enumerate(rows_of(source), 1):
        found.setdefault(value(row, by, number, "client"), []).append(_messages(row, number))
    return _encoded(found, model.tokenizer, render, length)


def dialogues(
    model: Any,
    plays: Sequence[str] = ("hamlet", "macbeth", "othello"),
    length: int = 256,
    min_speeches: int = 5,
) -> FederatedData:
    """Shakespeare's dialogues: the speech before is the prompt, and the role's own the answer; roles are clients.

    A system message names role and play. The first speech of a scene answers nothing, and is left out.

    Args:
      model, length: as for ``chats``.
      plays: as for ``fc.data.sources.shakespeare``.
      min_speeches: roles with fewer answers are left out.

    Returns:
      As ``chats``; clients such as ``"hamlet/HAM"``.

    Raises:
      InvalidInput: the package with the texts is not installed, an unknown play, no role of so many answers.

    Example:
      >>> smol = fc.models.pretrained("SmolLM2-135M-Instruct")  # doctest: +SKIP
      >>> data = fc.data.sources.dialogues(smol, ["macbeth"])  # doctest: +SKIP

    Source: as for ``fc.data.sources.shakespeare``.
    """
    checks.count("length", length, most=2**20)
    checks.count("min_speeches", min_speeches)
    render = _template(model)
    found: dict[str, list[Chat]] = {}
    for play, script in text.texts_of((plays,) if isinstance(plays, str) else plays).items():
        for role, cue, speech in text.answered(script):
            told = f"You are {role.title()} in Shakespeare's {play.replace('_', ' ').title()}."
            parts = ("system", told), ("user", cue), ("assistant", speech)
            chat = [{"role": who, "content": what} for who, what in parts]
            found.setdefault(f"{play}/{role}", []).append(chat)
    found = {name: own for name, own in sorted(found.items()) if len(own) >= min_speeches}
    if not found:
        raise InvalidInput(f"No role of {', '.join(plays)} has {min_speeches} answers.")
    return _encoded(found, model.tokenizer, render, length)


def rows_of(source: Any) -> Iterable[Mapping[str, Any]]:
    """The rows of a .csv or .jsonl file, or rows as they are."""
    if not isinstance(source, str) and not hasattr(source, "__fspath__"):
        return source
    path = files.expanded(source)
    rows = []
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text.read(path, "utf-8-sig"), newline="")))
    for number, line in enumerate(text.read(path, "utf-8-sig").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InvalidInput(f"{path}: line {number} is not a JSON object.")
        rows += [row] if row else []
    return rows


def value(row: Mapping[str, Any], column: str, number: int, what: str) -> str:
    """A row's entry in a column, as text; one that is not there is refused."""
    if row.get(column) is None:
        raise InvalidInput(f"Row {number} names no {what} in {column!r}; it has {', '.join(map(str, row))}.")
    return str(row[column])


def _messages(row: Mapping[str, Any], number: int) -> Chat:
    if "messages" in row:
        chat = row["messages"]
    else:
        chat = [{"role": r, "content": row.get(k)} for r, k in (("user", "prompt"), ("assistant", "completion"))]
    try:
        good = bool(chat) and all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in chat)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise InvalidInput(
            f'Row {number} is no chat: give "messages", a list of {{"role": ..., "content": ...}}, or "prompt" and '
            '"completion".'
        )
    return chat


def _template(model: Any) -> Callable[..., str]:
    """``(chat, add_generation_prompt) -> text``, as transformers renders a chat template."""
    if getattr(model, "tokenizer", None) is None:
        raise InvalidInput("The model has no tokenizer: give one of fc.models.pretrained that was read with its own.")
    if not model.template:
        raise InvalidInput("The model has no chat template: dataclasses.replace(model, template=...) gives it one.")
    try:
        import jinja2.sandbox
    except ImportError:
        raise InvalidInput("Chat templates need jinja2: pip install 'fedjax_clip[models]'.") from None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise InvalidInput(f"The chat template refuses this chat: {message}")

    environment.globals["raise_exception"] = refuse
    end = "" if model.end is None else model.tokenizer.id_to_token(model.end)
    try:
        template = environment.from_string(model.template)
    except jinja2.TemplateError as error:
        raise InvalidInput(f"The model's chat template is damaged: {error}.") from None

    def render(chat: Chat, add_generation_prompt: bool = False) -> str:
        try:
            return template.render(messages=chat, add_generation_prompt=add_generation_prompt, eos_token=end)
        except InvalidInput:
            raise
        except Exception as error:  # a template is a program
            raise InvalidInput(f"The chat template fails: {error}.") from None

    return render


def _encoded(
    clients: Mapping[str, Sequence[Chat]], tokenizer: Any, render: Callable[..., str], length: int
) -> FederatedData:
    rows = {}
    for name, own in clients.items():
        texts, spans = zip(*(_answers(chat, render) for chat in own), strict=True)
        tokens, segments = np.zeros((2, len(own), length + 1), np.int32)
        answers = np.zeros((len(own), length + 1), bool)
        for i, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
            ids = encoding.ids[: length + 1]
            here = i, slice(len(ids))
            tokens[here], segments[here] = ids, 1
            starts = np.array([start for start, _ in encoding.offsets[: length + 1]], np.int64)
            for a, b in spans[i]:
                answers[here] |= (a <= starts) & (starts < b)
        answers[:, 0] = False  # nothing comes before it
        if (kept := answers.any(1)).any():
            rows[name] = {"tokens": tokens[kept], "segments": segments[kept], "answers": answers[kept]}
    if not rows:
        raise InvalidInput(f"No answer begins within {length} tokens: give a larger length.")
    return FederatedData.from_clients(rows)


def _answers(chat: Chat, render: Callable[..., str]) -> tuple[str, list[tuple[int, int]]]:
    """The chat's text, and where in it the assistant's messages are."""
    whole, spans = render(chat), []
    for k, message in enumerate(chat):
        if message["role"] == "assistant":
            before, after = render(chat[:k], True), render(chat[: k + 1])
            if not whole.startswith(after) or not after.startswith(before):
                raise InvalidInput(
                    "The chat template changes earlier messages when later ones follow, so that answers cannot be told "
                    "from prompts: give each answer a chat of its own."
                )
            spans.append((len(before), len(after.rstrip())))
    return whole, spans


def packed(data: FederatedData) -> FederatedData:
    """The same chats in fewer rows: each takes the first row of its client with room for it.

    Args:
      data: from ``chats`` or ``dialogues``, a chat a row; hold examples out before.

    Returns:
      Rows in which chats have numbers from 1 in ``segments``. A model sees each by itself (``fc.models.Llama``).

    Example:
      >>> rows = [{"client": "ann", "prompt": "To be?", "completion": "Aye."} for _ in range(3)]
      >>> data = fc.data.sources.chats(rows, decoder, length=20)
      >>> fc.data.sources.packed(data).sizes.tolist(), data.sizes.tolist()
      ([1], [3])
    """
    fields, clients = data.fields(), {}
    sizes = (fields["segments"] > 0).sum(1)
    length = fields["tokens"].shape[1]
    for c, (start, stop) in enumerate(itertools.pairwise(data.offsets)):
        places, free = [], list[int]()  # of each chat: its row and where in it; of each row: what is left
        for size in sizes[start:stop]:
            row = next((i for i, left in enumerate(free) if left >= size), len(free))
            free += [length] * (row == len(free))
            places.append((row, length - free[row]))
            free[row] -= int(size)
        rows = {name: np.zeros((len(free), length), x.dtype) for name, x in fields.items()}
        for i, (row, at) in enumerate(places, start):
            here = row, slice(at, at + sizes[i])
            for name, x in fields.items():
                rows[name][here] = x[i, : sizes[i]]
            rows["segments"][here] = rows["segments"][row].max() + 1 if at else 1
        clients[data.name(c)] = rows
    return FederatedData.from_clients(clients)
