"""Paths with ``~``, and files that appear whole or not at all."""

import contextlib
import os
import pathlib
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

from fedjax_clip.core.types import InvalidInput

PathLike = str | os.PathLike[str]


def expanded(path: PathLike) -> pathlib.Path:
    """The path, with ``~`` replaced by the home directory.

    Raises:
      InvalidInput: the home of an unknown user.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise InvalidInput(f"{path}: there is no such home directory.") from None


def regular(path: pathlib.Path) -> pathlib.Path:
    """The path, if it is a regular file that fits in memory, and not an endless one such as a device or a pipe.

    Raises:
      InvalidInput: something exists there that is not a file, or a file that is too large.
    """
    if path.exists() and not path.is_file():
        raise InvalidInput(f"{path} is no file.")
    check_fits(path, path.stat().st_size if path.exists() else 0)
    return path


def check_fits(path: pathlib.Path, size: int) -> None:
    """Refuses a file whose size in memory, in bytes, exceeds the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise InvalidInput(
            f"{path} holds {size / 2**30:,.0f} GiB, and the machine has {memory / 2**30:,.0f} of memory."
        )


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends, and vanishes if the block fails.

    It is written under a random name beside ``path``. So no link is followed: a link at ``path`` is replaced itself.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:  # fails if anything exists there, even a dangling link
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: PathLike) -> None:
    """Waits until a file, or the names in a directory, are on disk: a power cut then loses none of it."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: pathlib.Path, text: str) -> None:
    """Writes a UTF-8 file whole, or not at all; file names that are not UTF-8 keep their bytes."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to an .npz file whole, or not at all; equal arrays give equal bytes, whatever their names are."""
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, x in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(x), allow_pickle=False)
