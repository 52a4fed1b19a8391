"""Errors inside a user's function: they keep their message, end at the user's frame, and get a note on the stage."""

import contextlib
import os
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import jax

from fedjax_clip.core.cohort import Client
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.population import FederatedData
from fedjax_clip.training.planner import Block

LIBRARY = str(pathlib.Path(__file__).parents[1]) + os.sep
JAX = str(pathlib.Path(jax.__file__).parent) + os.sep

MARK = "fedjax_clip: raised in "
HINT = (
    " With fc.train(..., debug=True) one client runs after the other, uncompiled: print shows values, and an error "
    "names the round, the client and the local step."
)

# What each function of the library does. The note names the innermost one on the way to the error.
STAGES = {
    ("core/loss.py", "example_values"): "per_example_loss",
    ("local/gradients.py", ""): "the gradient of per_example_loss",
    ("core/loss.py", "batch_gradient"): "the gradient of per_example_loss",
    ("local/steps.py", "at_round"): "client_tx, called with the round's number",
    ("local/steps.py", "local_steps"): "the client's optimiser (client_tx)",
    ("local/steps.py", ""): "the client function",
    ("uplink/base.py", "encoded"): "the uplink's encode, at a client",
    ("uplink/base.py", "decoded"): "the uplink's decode, at the server",
    ("reduce/", ""): "the reducer",
    ("algorithms/base.py", "step_server"): "the server's step (server_tx)",
    ("algorithms/exchange.py", "exchange.<locals>.one_client"): "the client function",
    ("algorithms/exchange.py", "_worked"): "the client function",
    ("algorithms/exchange.py", "exchange.<locals>.body"): "the reducer",
    ("algorithms/", ""): "the algorithm's round",
    ("training/settings.py", "Settings.scores"): "the evaluation",
    ("training/saving.py", "Saver.restore"): "the algorithm's init or init_client",
}


class Explained:
    """A context that adds a note to a user's error: its stage, client and round.

    It removes the frames of the library and of JAX from the traceback, unless ``jax_traceback_filtering`` is ``off``.

    Args:
      data: of the run, for the clients' names.
      debug: whether each client runs by itself, so that it can be named.
    """

    def __init__(self, data: FederatedData, debug: bool):
        self.data, self.debug = data, debug

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, InvalidInput):  # whose message is complete
            return
        frames = list(_frames(error.__traceback__))
        seen = [frame for frame in frames if not _file(frame).startswith((JAX, contextlib.__file__))]
        stage = next(filter(None, map(_stage, reversed(seen))), None)
        if not seen or _file(seen[-1]).startswith(LIBRARY) or stage is None:
            return
        hint = _where(seen, self.data) if self.debug else f".{HINT}"
        error.add_note(f"{MARK}{stage}{hint}")
        if jax.config.jax_traceback_filtering != "off":  # type: ignore[attr-defined]
            error.__traceback__ = _joined([frame for frame in seen if not _file(frame).startswith(LIBRARY)])


def explained(error: BaseException) -> bool:
    """Whether an error is known to come from a user's function."""
    return any(note.startswith(MARK) for note in getattr(error, "__notes__", ()))


def _frames(traceback: types.TracebackType | None) -> Iterator[types.TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _file(frame: types.TracebackType) -> str:
    return frame.tb_frame.f_code.co_filename


def _stage(frame: types.TracebackType) -> str | None:
    if not _file(frame).startswith(LIBRARY):
        return None
    path, name = _file(frame)[len(LIBRARY) :], frame.tb_frame.f_code.co_qualname
    for (file, function), stage in STAGES.items():
        if path.startswith(file) and (name == function or name.startswith(function + ".<locals>") or not function):
            return stage
    return None


def _where(frames: list[types.TracebackType], data: FederatedData) -> str:
    """The round, the client and the local step, as far as they are known."""
    step = client = round = ""
    for frame in frames:
        held = frame.tb_frame.f_locals
        name = frame.tb_frame.f_code.co_qualname
        for value in held.values():
            if isinstance(value, Client) and (number := _known(value.id)) is not None and number >= 0:
                client = f" of client {data.name(number)!r}"
            if isinstance(value, Block):
                round = f", round {value.rounds.start + 1}"
        if name.startswith("local_steps.<locals>") and (number := _known(held.get("i"))) is not None:
            step = f", local step {number + 1}"
    return f"{step}{client}{round}."


def _known(value: Any) -> int | None:
    return None if value is None or isinstance(value, jax.core.Tracer) else int(value)


def _joined(frames: list[types.TracebackType]) -> types.TracebackType | None:
    """One traceback of these entries."""
    joined: types.TracebackType | None = None
    for frame in reversed(frames):
        joined = types.TracebackType(joined, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return joined
