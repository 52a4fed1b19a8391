"""Arrays and codes as bytes, and back: the sizes are those that a round reports, with no header."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401 (it teaches NumPy the name bfloat16)
import numpy as np

from fedjax_clip import compression
from fedjax_clip.compression import Code
from fedjax_clip.core.types import InvalidInput, PyTree

Form = tuple[str, tuple[int, ...]]  # an array's type and shape


class Group(NamedTuple):
    """One piece of a message on the wire: an array, or codes that are written together.

    Attributes:
      arrays: the forms of its arrays, in order.
      codes: for each code, the static fields of ``fc.compression.Code`` by name, and which optional ones it has; no
        codes for a piece that is one array.
    """

    arrays: list[Form]
    codes: list[dict[str, Any]]


def form(x: Any) -> Form:
    """An array's type and shape."""
    return np.dtype(x.dtype).name, tuple(int(n) for n in x.shape)


def pack(arrays: Sequence[Any]) -> bytes:
    """Arrays one after the other, little-endian, without a header."""
    return b"".join(_little(np.asarray(x)).tobytes() for x in arrays)


def unpack(data: bytes, forms: Sequence[Form], what: str) -> list[np.ndarray]:
    """The arrays of ``pack``.

    Args:
      data: the bytes.
      forms: of the arrays.
      what: they are, for the error.

    Raises:
      InvalidInput: more or fewer bytes than these arrays have.
    """
    sizes = [np.dtype(name).itemsize * int(np.prod(shape, dtype=np.int64)) for name, shape in forms]
    if not isinstance(data, bytes) or len(data) != sum(sizes):
        size = f"{len(data)} bytes" if isinstance(data, bytes) else f"a {type(data).__name__}"
        raise InvalidInput(f"{what} must be {sum(sizes)} bytes, and {size} came: both sides need the same artefact.")
    ends = np.cumsum([0, *sizes]).tolist()
    return [
        np.frombuffer(data[start:stop], np.dtype(name).newbyteorder("<")).astype(name).reshape(shape)
        for start, stop, (name, shape) in zip(ends, ends[1:], forms)
    ]


def groups(message: PyTree) -> list[Group]:
    """The pieces of a message: each array alone, and the codes of one link together."""

    def piece(x: Any) -> bool:
        return isinstance(x, Code) or (isinstance(x, list) and bool(x) and all(isinstance(code, Code) for code in x))

    def group(x: Any) -> Group:
        codes = x if isinstance(x, list) else [x] if isinstance(x, Code) else []
        return Group([form(array) for array in jax.tree.leaves(x)], [_static(code) for code in codes])

    return [group(x) for x in jax.tree.leaves(message, is_leaf=piece)]


def written(leaves: Sequence[Any], pieces: Sequence[Group]) -> list[bytes]:
    """The leaves of a message as bytes, a string for each piece."""
    rest, out = list(leaves), []
    for arrays, codes in pieces:
        own, rest = rest[: len(arrays)], rest[len(arrays) :]
        out.append(compression.to_bytes(_codes(own, codes)) if codes else pack(own))
    return out


def read(data: Sequence[bytes], pieces: Sequence[Group]) -> list[np.ndarray]:
    """The leaves of a message from ``written``.

    Raises:
      InvalidInput: bytes that are no such message.
    """
    if len(data) != len(pieces):
        raise InvalidInput(f"A message of {len(pieces)} pieces came in {len(data)}: both sides need the same artefact.")
    leaves: list[np.ndarray] = []
    for piece, (arrays, codes) in zip(data, pieces):
        if not codes:
            leaves += unpack(piece, arrays, "An array of a message")
            continue
        like = _codes([np.zeros(shape, name) for name, shape in arrays], codes)
        try:
            leaves += jax.tree.leaves(compression.from_bytes(piece, like))
        except (IndexError, OverflowError, ValueError):
            raise InvalidInput("A client's message ends within a code: it was cut or changed on its way.") from None
    return leaves


def squeezed(arrays: Sequence[Any]) -> bytes:
    """``pack`` by zlib: a report is mostly zeros."""
    return zlib.compress(pack(arrays), 9)


def unsqueezed(data: bytes, forms: Sequence[Form], what: str) -> list[np.ndarray]:
    """The arrays of ``squeezed``.

    Raises:
      InvalidInput: bytes that are no such arrays.
    """
    try:
        plain = zlib.decompressobj().decompress(data, sum(np.dtype(n).itemsize * int(np.prod(s)) for n, s in forms) + 1)
    except (TypeError, zlib.error):
        raise InvalidInput(f"{what} cannot be read: it was changed on its way.") from None
    return unpack(plain, forms, what)


OPTIONAL = ("index", "count")
STATIC = ("alphabet", "coding", "size", "positions")


def _static(code: Code) -> dict[str, Any]:
    return {name: getattr(code, name) for name in STATIC} | {name: getattr(code, name) is not None for name in OPTIONAL}


def _codes(leaves: Sequence[Any], codes: Sequence[dict[str, Any]]) -> list[Code]:
    rest, out = iter(leaves), []
    for said in codes:
        names = ["symbols", "scales", *(name for name in OPTIONAL if said[name])]
        fields = {name: next(rest) for name in names} | {name: said[name] for name in STATIC}
        out.append(Code(**{"symbols": None, "scales": None, **fields}))
    return out


def _little(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).astype(x.dtype.newbyteorder("<"), copy=False)
