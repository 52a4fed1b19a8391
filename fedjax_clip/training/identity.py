"""The identity of a run: what a checkpoint must agree with before the run resumes."""

import hashlib
import inspect
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_clip.algorithms.base import kind, maker
from fedjax_clip.core.types import Algorithm, InvalidInput
from fedjax_clip.data.clock import Clock
from fedjax_clip.data.planning import LocalWork
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.sampling import Sampler

CHUNK_BYTES = 2**24  # of an array that are copied and hashed at a time
_HASH = "blake2b:"
BEGINNING = "the state that it went on from"

Identity = dict[str, str]


def identify(
    algorithm: Algorithm, data: FederatedData, sampler: Sampler | Clock, work: LocalWork, seed: int
) -> Identity:
    """Everything visible that a run's result depends on, by names that appear in error messages.

    It hashes all examples, at about 1 GB a second. A memory-mapped file is read once in a process, unless its size or
    time changes. Losses, optimisers and links are functions: a checkpoint knows the shapes of their states, but not the
    numbers inside them, such as a learning rate.
    """
    settings = {
        "algorithm": kind(algorithm),
        "sampler": described(sampler.turn if isinstance(sampler, Clock) else sampler.sample),
        "batch_size": described(work.batch_size),
        "local_epochs": described(work.epochs),
        "local_steps": described(work.steps),
        "shuffle": described(work.shuffle),
        "seed": described(seed),
        "num_clients": described(data.num_clients),
        "num_examples": described(data.num_examples),
    }
    shapes = {f"field {name!r}": f"{x.dtype}{list(x.shape[1:])}" for name, x in data.fields().items()}
    return settings | shapes | {name: hashed(value) for name, value in hashes(data).items()}


def hashed(value: str) -> str:
    """A hash as a part of an identity; an error names what it is of, and does not show it."""
    return _HASH + value


def is_hash(value: object) -> bool:
    """Whether a part of an identity is ``hashed``."""
    return str(value).startswith(_HASH)


def hashes(data: FederatedData) -> dict[str, str]:
    """A hash of each part of a population, by names that appear in error messages."""
    names = "\0".join(data.name(c) for c in range(data.num_clients)).encode("utf-8", "surrogatepass")
    # Of a population that is opened in parts the values are compared nowhere: no process has them all.
    held = data.fields().items() if data.own is None else ()
    fields = {f"the values of field {name!r}": digest(np.asanyarray(x)) for name, x in held}
    if data.lives is not None:
        fields["the rounds in which the examples are there"] = digest(data.lives)
    return fields | {
        "the numbers of the clients' examples": digest(data.offsets),
        "the clients' names": digest(np.frombuffer(names, np.uint8)),
        "the example weights": digest(np.ones(0) if data.weights is None else np.asanyarray(data.weights)),
    }


def fingerprint(data: FederatedData) -> str:
    """One hash of all of a population."""
    return hashlib.blake2b(repr(hashes(data)).encode(), digest_size=16).hexdigest()


def check(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses to resume a run of another identity, and says what differs and what to do.

    Args:
      where: what holds the run, as in "The checkpoint".
      found, expected: from ``identify``; ``width`` is ignored.

    Raises:
      InvalidInput: they differ.
    """
    for name in (name for name in dict.fromkeys([*expected, *found]) if name != "width"):
        held, asked = found.get(name), expected.get(name)
        if held == asked:
            continue
        if name == BEGINNING:
            began = "began anew" if held is None else "went on from another state"
            raise InvalidInput(
                f"{where} is of a run that {began}: it resumes with the arguments that it began with. Name another "
                "directory, or remove this one."
            )
        of_data = name.startswith(("num_", "field "))
        if is_hash(held or asked) or of_data:
            what = f"{name}={held}, not {asked}" if of_data else f"{name} have changed"
            raise InvalidInput(
                f"{where} is of a run on other data: {what}. To train on with these data, go on from its "
                "state (fc.train(..., state=...); --init of experiments.run). Else go on with the old data, name "
                "another directory, or remove this one."
            )
        has = f"without {name}" if held is None else f"with {name}={held}"
        wants = "without" if asked is None else asked if held is not None else f"with {name}={asked}"
        raise InvalidInput(
            f"{where} is of a run {has}, not {wants}. Go on with the former, name another directory, or remove this "
            "one."
        )


def described(value: Any) -> str:
    """A setting in words: plain values as they are, and a function of this package by its maker's arguments.

    Other functions are described by their name only.

    Example:
      >>> described(fc.data.sampling.uniform(10).sample)
      'uniform(cohort_size=10)'
    """
    if isinstance(value, bool | int | float | str | None | np.number | np.bool_):
        return repr(value.item() if isinstance(value, np.generic) else value)
    if isinstance(value, np.ndarray):
        return f"array({digest(value)[:12]})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a Sampler, Speeds, BatchSizes: what its functions say
        return ", ".join(described(x) for x in value if callable(x))
    if isinstance(value, tuple | list):
        return f"({', '.join(map(described, value))})"
    if not callable(value):
        return type(value).__name__
    if not str(getattr(value, "__module__", "")).startswith("fedjax_clip."):
        return maker(value)
    held = ", ".join(f"{name}={described(x)}" for name, x in sorted(_held(value).items()) if x is not value)
    return f"{maker(value)}({held})"


def digest(x: np.ndarray) -> str:
    """BLAKE2b of an array's elements in order, in 32 hexadecimal digits."""
    stamp = _stamp(x)
    if stamp is None:
        return _digest(x)
    if stamp not in _DIGESTS:
        _DIGESTS[stamp] = _digest(x)
    return _DIGESTS[stamp]


_DIGESTS: dict[tuple, str] = {}


def _digest(x: np.ndarray) -> str:
    found = hashlib.blake2b(digest_size=16)
    rows = x.reshape(1) if x.ndim == 0 else x
    step = max(1, CHUNK_BYTES // max(1, x.itemsize * math.prod(rows.shape[1:])))
    for start in range(0, len(rows) if x.size else 0, step):
        found.update(np.ascontiguousarray(rows[start : start + step]).view(np.uint8).data)
    return found.hexdigest()


def _stamp(x: np.ndarray) -> tuple | None:
    """The file and byte range of a read-only memory map, with the file's size and time; else ``None``."""
    whole: Any = x
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    if not isinstance(whole, np.memmap) or whole.mode != "r" or whole.filename is None:
        return None
    try:
        about = os.stat(whole.filename)
    except OSError:
        return None
    place = whole.offset + x.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    return str(whole.filename), about.st_size, about.st_mtime_ns, about.st_ino, place, x.shape, x.strides, str(x.dtype)


def _held(function: Any) -> dict[str, Any]:
    """The variables that a function has closed over, by name."""
    function = inspect.unwrap(getattr(function, "func", function))
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    held = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or ()):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return held
