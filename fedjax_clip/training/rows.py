"""Client states on disk: a file of rows, one for each client that took part, and an index for each checkpoint."""

import contextlib
import errno
import hashlib
import itertools
import math
import os
import pathlib
import tempfile
import weakref
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

import jax
import numpy as np

from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput, PyTree
from fedjax_clip.training.processes import ALONE, Processes

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs out of one directory
    fcntl = None  # type: ignore[assignment]

FILE = 2**40  # a place in the index is the number of a file times this, plus the number of a row, from 1
READ_BYTES = 2**24  # of rows that are read at a time for an array of many clients


class OnDisk:
    """The states as rows of a file. A client without a row has the state in which all clients begin.

    A row holds the leaves of one state, one after the other. The index says which row is a client's, and has a hash of
    it that is checked whenever the row is read. A row that a kept checkpoint refers to is never overwritten: the
    client's new state goes to a free row. So a checkpoint is a copy of the index, and nothing written later harms it.

    Of P processes, number p keeps the states of the clients c with ``c % P == p``: it writes a file and an index of its
    own, and reads all files. So other processes, of another number, can go on from its checkpoints.

    Args:
      alike: the states in which all clients begin, ``[M, ...]``; views of one state will do.
      directory: where the rows lie, beside the indices of checkpoints; by default a temporary file.
      processes: those that keep the states.

    Attributes:
      begin: the row of a client without one, uint8 ``[bytes]``.
      index: uint64 ``[M, 2]``: the place of each client's row (``FILE``), 0 if it has none, and its hash.
      processes: those that keep the states.
      complete: whether the index has all clients, and not only this process's.

    Raises:
      InvalidInput: here and later, files that cannot be written, and a row that is not what was written.
    """

    def __init__(self, alike: PyTree, directory: pathlib.Path | None = None, processes: Processes = ALONE):
        self.processes, self.complete = processes, processes.count == 1
        leaves, self._structure = jax.tree.flatten(alike)
        self._leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        self.begin = _packed([x[:1] for x in leaves])[0]
        self.index = np.zeros((len(leaves[0]), 2), np.uint64)
        self.directory = directory
        self._saved: dict[int, np.ndarray] = {}  # the rows that each kept checkpoint refers to
        self._spared, self._free, self._count = np.zeros(1, bool), np.zeros(0, np.int64), 0
        try:
            self._file = tempfile.TemporaryFile(buffering=0) if directory is None else _opened(self._rows())  # noqa: SIM115
        except OSError as error:
            self._unwritable(error)
        self._files = {processes.number: self._file}
        weakref.finalize(self, _close, self._files)
        self._changed = os.fstat(self._file.fileno()).st_mtime_ns

    def __str__(self) -> str:
        return f"The clients' states in {self._where()}"

    @property
    def tree(self) -> PyTree:
        """As ``ClientStates.tree``."""
        ends = itertools.accumulate((x.dtype.itemsize * math.prod(x.shape[1:]) for x in self._leaves), initial=0)
        leaves = [Leaf(self, x, slice(*ends)) for x, ends in zip(self._leaves, itertools.pairwise(ends))]
        return jax.tree.unflatten(self._structure, leaves)

    def gather(self, ids: np.ndarray) -> PyTree:
        """As ``ClientStates.gather``."""
        rows = self.read(ids.reshape(-1))
        return jax.tree.map(lambda leaf: leaf.of(rows).reshape(*ids.shape, *leaf.shape[1:]), self.tree)

    def scatter(self, ids: np.ndarray, new: PyTree) -> None:
        """As ``ClientStates.scatter``."""
        here = ids >= 0
        for client, row in zip(ids[here].tolist(), _packed([np.asarray(x)[here] for x in jax.tree.leaves(new)])):
            place = self._place(client)
            self.index[client] = self.processes.number * FILE + place, _hash(row)
            try:
                self._file.seek((place - 1) * len(row))
                if self._file.write(row.data) != len(row):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._unwritable(error)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """The rows of these clients, uint8 ``[len(ids), bytes of a state]``; the first state for number -1."""
        rows = np.empty((len(ids), len(self.begin)), np.uint8)
        for row, client in zip(rows, ids.tolist()):
            place, expected = self.index[client].tolist() if client >= 0 else (0, 0)
            if not place:
                if not self.complete and client >= 0 and client % self.processes.count != self.processes.number:
                    raise InvalidInput(
                        f"The state of client {client} is kept by process {client % self.processes.count}, and not "
                        f"readable in process {self.processes.number}: give checkpoints, in a directory that all share."
                    )
                row[:] = self.begin
                continue
            number, place = divmod(place, FILE)
            if number not in self._files:
                self._files[number] = self._rows(number).open("rb", buffering=0)
            self._files[number].seek((place - 1) * len(row))
            if self._files[number].readinto(row.data) != len(row) or _hash(row) != expected:
                raise InvalidInput(
                    f"{self._where()}: the state of client {client} is not what was written, so the file is damaged or "
                    "another run went on with it. Train anew in another directory."
                )
        return rows

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """As ``ClientStates.held``."""
        if self.directory is None or fcntl is None:
            yield
            return
        try:
            with self.processes.together():
                self._lock(self.directory.parent)
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _lock(self, place: pathlib.Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"{place} is in use by another run.") from None
        if os.fstat(self._file.fileno()).st_mtime_ns != self._changed:  # after the index was read
            raise InvalidInput(f"{place} was in use by another run until now: start again.")
        self._file.truncate((len(self._spared) - 1) * len(self.begin))  # no checkpoint refers to what is beyond

    def save(self, step: int) -> None:
        """Writes the index of a checkpoint to disk, after its rows."""
        assert self.directory is not None
        with self.processes.together():
            if self.processes.number == 0:
                for path in self.directory.glob("*.index"):
                    if int(path.name.split(".")[0]) not in self._saved:
                        path.unlink()  # of a checkpoint that is gone, or that was never finished
        with self.processes.together():
            self._write(step)
        # All processes' indices: a client may have moved to another process, and left its row in this one's file.
        places = self.processes.gather(self.index[:, 0]).sum(0, dtype=np.uint64)
        self._saved[step] = self._own(places)

    def _write(self, step: int) -> None:
        known = np.flatnonzero(self.index[:, 0])
        content = np.column_stack([known.astype(np.uint64), self.index[known]]).tobytes()
        try:
            os.fsync(self._file.fileno())
            with files.replacing(self._index(step)) as file:
                file.write(self._seal(step, content) + content)
            files.sync(self._index(step))
            files.sync(self._index(step).parent)
        except OSError as error:
            self._unwritable(error)

    def restore(self, step: int, kept: Collection[int]) -> None:
        """Makes these the states of a checkpoint, and spares the rows of all checkpoints that are ``kept``.

        Raises:
          ValueError: an index that is damaged, or rows that are missing.
        """
        self.index = self._read_index(step)
        for number in np.unique(self.index[:, 0] // FILE).tolist():
            rows = int(self._own(self.index[:, 0], number).max(initial=0))
            if rows and self._rows(number).stat().st_size < rows * len(self.begin):
                raise ValueError("rows are missing")
        for other in kept:
            with contextlib.suppress(ValueError, OSError):  # a damaged checkpoint cannot be restored either
                self._saved[other] = self._own(self._read_index(other)[:, 0])
        self.spare(kept)
        self.index[np.arange(len(self.index)) % self.processes.count != self.processes.number] = 0

    def share(self) -> None:
        """Completes the index, so that the states of all clients can be read from the directory."""
        if not self.complete and self.directory is not None:
            self.index, self.complete = self.processes.gather(self.index).sum(0, dtype=np.uint64), True

    def spare(self, kept: Collection[int]) -> None:
        """Spares the rows of all checkpoints that are ``kept``, and frees all others. The last one saved is kept."""
        self._saved = {step: rows for step, rows in self._saved.items() if step in kept}
        self._count = max((int(rows.max()) for rows in self._saved.values()), default=0)
        self._spared = np.zeros(self._count + 1, bool)
        for rows in self._saved.values():
            self._spared[rows] = True
        self._free = np.flatnonzero(~self._spared[1:]) + 1

    def _place(self, client: int) -> int:
        """The row for a client's new state: its own, if no checkpoint refers to that, or a free one."""
        number, place = divmod(int(self.index[client, 0]), FILE)
        if place and number == self.processes.number and not (place < len(self._spared) and self._spared[place]):
            return place
        if len(self._free):
            place, self._free = int(self._free[0]), self._free[1:]
            return place
        self._count += 1
        return self._count

    def _own(self, places: np.ndarray, number: int | None = None) -> np.ndarray:
        """The rows ``[M]`` in this process's file, or in that of another, and 0 for clients whose row is elsewhere."""
        files, rows = np.divmod(places, np.uint64(FILE))
        return np.where(files == (self.processes.number if number is None else number), rows, np.uint64(0))

    def _rows(self, number: int | None = None) -> pathlib.Path:
        assert self.directory is not None
        number = self.processes.number if number is None else number
        return self.directory / (f"rows.{number}" if number else "rows")

    def _index(self, step: int) -> pathlib.Path:
        assert self.directory is not None
        number, count = self.processes.number, self.processes.count
        return self.directory / (f"{step}.{number}-of-{count}.index" if count > 1 else f"{step}.index")

    def _read_index(self, step: int) -> np.ndarray:
        """The index of a checkpoint, which one process wrote, or several in parts."""
        assert self.directory is not None
        parts = sorted(self.directory.glob(f"{step}.*index"))
        names = [f"{step}.{number}-of-{len(parts)}.index" for number in range(len(parts))]
        if not parts or {part.name for part in parts} not in ({f"{step}.index"}, set(names)):
            raise ValueError("a part of the index is missing")
        index = np.zeros_like(self.index)
        for part in parts:
            sealed = part.read_bytes()
            seal, content = sealed[:16], sealed[16:]
            if seal != self._seal(step, content):
                raise ValueError("the index is not what was written")
            known = np.frombuffer(content, np.uint64).reshape(-1, 3)
            index[known[:, 0]] = known[:, 1:]
        return index

    def _seal(self, step: int, content: bytes) -> bytes:
        """A hash of an index, of what it is of, and of the size of its rows."""
        told = f"{step}, {len(self.index)}, {len(self.begin)}:".encode()
        return hashlib.blake2b(told + content, digest_size=16).digest()

    def _where(self) -> str:
        return tempfile.gettempdir() if self.directory is None else str(self._rows())

    def _unwritable(self, error: OSError) -> NoReturn:
        cure = "" if self.directory else " Set TMPDIR, or give checkpoints, in whose directory they then lie."
        raise InvalidInput(
            f"{self._where()}: the clients' states cannot be written there: {error.strerror}.{cure}"
        ) from error


class Leaf:
    """One leaf of all clients' states on disk, which reads like an array ``[M, ...]``; it cannot be written to."""

    def __init__(self, states: OnDisk, about: jax.ShapeDtypeStruct, place: slice):
        self.states, self.shape, self.dtype, self._bytes = states, about.shape, about.dtype, place
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def of(self, rows: np.ndarray) -> np.ndarray:
        """This leaf in rows of states, ``[len(rows), ...]``."""
        shape = len(rows), *self.shape[1:]
        if not math.prod(shape):
            return np.empty(shape, self.dtype)
        return np.ascontiguousarray(rows[:, self._bytes]).view(self.dtype).reshape(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if rest and (first is None or first is Ellipsis):
            raise IndexError("the first index of a leaf on disk must be of clients")
        ids = np.arange(len(self))[first]
        out = np.empty((ids.size, *self.shape[1:]), self.dtype)
        step = max(1, READ_BYTES // max(1, len(self.states.begin)))
        for start in range(0, ids.size, step):
            out[start : start + step] = self.of(self.states.read(np.ravel(ids)[start : start + step]))
        return out.reshape(*np.shape(ids), *self.shape[1:])[(*[slice(None)] * np.ndim(ids), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows on disk cannot become an array without a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"<{self.dtype}{list(self.shape)} in {self.states._where()}>"


def layout(tree: PyTree) -> PyTree:
    """Arrays of no clients, ``[0, ...]``, with the shapes and types of these states."""
    return jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), tree)


def _packed(leaves: list[np.ndarray]) -> np.ndarray:
    """States ``[n, ...]`` as rows of bytes, uint8 ``[n, bytes of a state]``."""
    count = len(leaves[0])
    flat = [np.ascontiguousarray(x).reshape(count, -1).view(np.uint8) for x in leaves if x.size]
    return np.concatenate(flat, axis=1) if flat else np.zeros((count, 0), np.uint8)


def _close(files: dict[int, Any]) -> None:
    for file in files.values():
        file.close()


def _hash(row: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(row.data, digest_size=8).digest(), "little")


def _opened(path: pathlib.Path) -> Any:
    """The file, made if it is missing; a link is not followed."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
