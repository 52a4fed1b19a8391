"""Anything that TFDS knows, without TensorFlow: converted once to arrays, then memory-mapped."""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_clip.core import files as paths
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition
from fedjax_clip.data.population import FederatedData

PathLike = str | os.PathLike[str]

_INSTALL = 'pip install "fedjax_clip[tfds]"'


def tfds(
    name: str,
    split: str = "train",
    data_dir: PathLike | None = None,
    by: str | None = None,
    image: str = "image",
    label: str = "label",
    cache_dir: PathLike | None = None,
    fields: Sequence[str] | None = None,
    download: bool = False,
) -> dict[str, np.ndarray] | FederatedData:
    """Reads a TFDS data set, without TensorFlow: converted once to arrays, then memory-mapped.

    Values keep their stored type: an image is uint8 0 .. 255. Scale it in the model or the task: that saves three
    quarters of the memory and of the transfer. Text is an array of bytes. A later call reads the cache alone and does
    not import TFDS; it reads TFDS again if the prepared data under ``data_dir`` has changed.

    Args:
      name: ``"mnist"``, ``"emnist/byclass"``, ``"mnist:3.0.1"`` ...
      split: ``"train"``, ``"test"``, ``"train[:10%]"``, ``"train+test"`` ...
      data_dir: where TFDS keeps prepared data; by default $TFDS_DATA_DIR, else
        ``~/tensorflow_datasets``.
      by: the field that names each example's client, see ``partition.natural``.
      image: the field that becomes ``x``.
      label: the field that becomes ``y``; all others keep their names, and the
        parts of a nested field are called ``"attributes/age"``.
      cache_dir: where the arrays are kept; by default $FEDJAX_CLIP_CACHE, else
        ``~/.cache/fedjax_clip``.
      fields: the fields to read, by their names in TFDS; all if ``None``.
      download: whether to fetch and prepare a data set that is not yet prepared in
        the array_record format. Without a network TFDS tries for minutes.

    Returns:
      The examples as a dict of memory-mapped arrays, or a ``FederatedData`` over
      them if ``by`` is given.

    Raises:
      InvalidInput: missing packages, an unknown name or split, data that is not
        prepared, fields whose shape varies from example to example ...

    Example:
      >>> examples = fc.data.sources.tfds("mnist", split="train")  # doctest: +SKIP
      >>> data = fc.data.partition.dirichlet(examples, num_clients=100, alpha=0.1)  # doctest: +SKIP
    """
    data_dir = paths.expanded(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").absolute()
    cache_dir = paths.expanded(cache_dir or os.environ.get("FEDJAX_CLIP_CACHE") or "~/.cache/fedjax_clip")
    fields = None if fields is None else sorted(fields)
    request = {"name": name, "split": split, "data_dir": str(data_dir), "by": by, "fields": fields, "layout": 1}
    digest = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]
    entry = cache_dir / "tfds" / f"{re.sub(r'[^a-zA-Z0-9_.]+', '_', f'{name}-{split}')[:80]}-{digest}"
    try:
        loaded = _open_entry(entry)
        if loaded is None:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with _locked(entry.with_name(".lock")):
                loaded = _open_entry(entry)
                if loaded is None:
                    _write_entry(entry, lambda to: _convert(to, name, split, data_dir, by, fields, download))
                    loaded = _open_entry(entry)
    except OSError as e:
        raise InvalidInput(f"The cache {cache_dir} cannot be used: {e.strerror or e}.") from e
    if loaded is None:
        raise InvalidInput(f"The data set {name!r} changes under {data_dir} while it is read.")
    examples, meta = loaded
    for old, new, usual in ((image, "x", "image"), (label, "y", "label")):
        if old in examples:
            if new != old and new in examples:
                raise InvalidInput(f"Field {old!r} of {name!r} cannot become {new!r}: there is such a field already.")
            examples = {new if field == old else field: x for field, x in examples.items()}
        elif old != usual:
            raise partition.no_field(old, examples)
    if by is None:
        return examples
    return FederatedData(examples, np.array(meta["offsets"]), meta["names"])


def import_tfds() -> Any:
    """The package ``tensorflow_datasets``, or an error that says how to install it."""
    missing = next((p for p in ("tensorflow_datasets", "array_record") if importlib.util.find_spec(p) is None), None)
    if missing is not None:
        raise InvalidInput(f"TFDS data sets need {missing}, which is not installed: {_INSTALL}")
    import tensorflow_datasets

    return tensorflow_datasets


def _prepared_builder(name: str, data_dir: Path, download: bool) -> Any:
    tfds = import_tfds()
    with _saying(f"TFDS cannot open the data set {name!r} under {data_dir}"):
        try:
            builder = tfds.builder(name, data_dir=os.fspath(data_dir), file_format="array_record")
        except tfds.core.DatasetNotFoundError as e:
            known = tfds.list_builders(with_community_datasets=False)
            near = difflib.get_close_matches(re.split("[/:]", name)[0], known, 3, 0.6)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
            raise InvalidInput(f"TFDS knows no data set {name!r}, nor is it prepared under {data_dir}{hint}") from e
    if not builder.is_prepared():
        if not download:
            raise InvalidInput(f"The data set {name!r} is not prepared under {data_dir}: download=True fetches it.")
        with (
            _saying(f"TFDS cannot prepare the data set {name!r} under {data_dir}"),
            contextlib.redirect_stdout(sys.stderr),
        ):
            builder.download_and_prepare()
    return builder


def _convert(
    to: Path, name: str, split: str, data_dir: Path, by: str | None, fields: list[str] | None, download: bool
) -> dict[str, Any]:
    """Writes the fields of a TFDS data set as .npy files into ``to``; returns its metadata."""
    builder = _prepared_builder(name, data_dir, download)
    with _saying(f"TFDS cannot read split {split!r} of {name!r} as array_record"):
        source = builder.as_data_source(split=split)
        first = _leaves(source[0]) if len(source) else {}
    if not first:
        raise InvalidInput(f"Split {split!r} of {name!r} has no examples.")
    wanted = list(first) if fields is None else fields + ([] if by is None else [by])
    for field in wanted:
        if not any(_within(leaf, field) for leaf in first):
            raise partition.no_field(field, first)
    if by is not None:
        if by not in first:
            raise partition.no_field(by, first)
        partition.owners_of(np.array([first[by]]), by)
    kept = [leaf for leaf in first if any(_within(leaf, field) for field in wanted)]
    if set(kept) <= {by}:
        raise InvalidInput(f"No field of {name!r} is left to read but {by!r}: there is nothing to learn from.")

    files = {leaf: to / f"{i}.npy" for i, leaf in enumerate(kept)}
    arrays: dict[str, np.memmap] = {}
    texts: dict[str, list[bytes]] = {}
    for leaf, file in files.items():
        value = np.asarray(first[leaf])
        if value.dtype.kind in "SU" and value.ndim == 0:
            texts[leaf] = []
        elif value.dtype.kind in "biufc" and value.size:
            shape = (len(source), *value.shape)
            arrays[leaf] = np.lib.format.open_memmap(file, "w+", value.dtype, shape)
        else:
            raise _not_an_array(leaf, name, kept)
    for start in range(0, len(source), 512):
        stop = min(start + 512, len(source))
        with _saying(f"TFDS cannot read split {split!r} of {name!r} as array_record"):
            rows = [_leaves(source[i]) for i in range(start, stop)]
        for leaf, text in texts.items():
            text += [row[leaf].encode() if isinstance(row[leaf], str) else bytes(row[leaf]) for row in rows]
        for leaf, array in arrays.items():
            if any(leaf not in row or np.shape(row[leaf]) != array.shape[1:] for row in rows):
                raise _not_an_array(leaf, name, kept)
            array[start:stop] = [row[leaf] for row in rows]
    for leaf, text in texts.items():
        np.save(files[leaf], np.array(text))
    for array in arrays.values():
        array.flush()

    versions = Path(builder.data_dir).parent
    meta: dict[str, Any] = {"version": str(builder.version), "versions": str(versions), "stamp": _stamp(versions)}
    if by is not None:
        client_of, names = partition.owners_of(np.load(files[by], allow_pickle=False), by)
        files.pop(by).unlink()
        order = np.argsort(client_of, kind="stable")
        for file in files.values():
            _reorder(file, order)
        meta |= {"offsets": [0, *np.cumsum(np.bincount(client_of)).tolist()], "names": names}
    return meta | {"files": {leaf: file.name for leaf, file in files.items()}}


def _leaves(row: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(row, Mapping):
        return {prefix or "value": row}
    return {k: v for name, x in row.items() for k, v in _leaves(x, f"{prefix}/{name}" if prefix else name).items()}


def _within(leaf: str, field: str) -> bool:
    return leaf == field or leaf.startswith(f"{field}/")


def _not_an_array(leaf: str, name: str, kept: list[str]) -> InvalidInput:
    others = [other for other in kept if other != leaf]
    listed = ", ".join(map(repr, others[:8])) + ", ..." * (len(others) > 8)
    return InvalidInput(
        f"Field {leaf!r} of {name!r} is not one text, or numbers of the same shape, in every example: "
        f"choose among the others with fields=[{listed}]."
    )


def _reorder(file: Path, order: np.ndarray) -> None:
    """Puts the rows of an .npy file into this order, a block at a time."""
    old = np.load(file, mmap_mode="r", allow_pickle=False)
    target = file.with_suffix(".sorted")
    new = np.lib.format.open_memmap(target, "w+", old.dtype, old.shape)
    for start in range(0, len(order), 4096):
        new[start : start + 4096] = old[order[start : start + 4096]]
    new.flush()
    os.replace(target, file)


def _stamp(versions: Path) -> list[list[Any]]:
    """The prepared versions of a data set and their times."""
    infos = sorted(versions.glob("*/dataset_info.json"))
    return [[info.parent.name, info.stat().st_mtime_ns, info.stat().st_size] for info in infos]


def _open_entry(entry: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The memory-mapped arrays of a cache entry; ``None`` if it is missing, damaged or out of date."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        # If the prepared data has been deleted, the cache stays valid.
        if _stamp(Path(meta["versions"])) not in ([], meta["stamp"]):
            return None
        files = meta["files"].items()
        return {leaf: np.load(entry / file, mmap_mode="r", allow_pickle=False) for leaf, file in files}, meta
    except Exception:  # a damaged file makes NumPy raise almost anything
        return None


def _write_entry(entry: Path, convert: Callable[[Path], dict[str, Any]]) -> None:
    """Writes a cache entry to a temporary place and moves it into the cache; the caller holds the cache's lock."""
    for leftover in entry.parent.glob("*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = entry.with_name(entry.name + ".tmp")
    temporary.mkdir()
    try:
        meta = convert(temporary)
        (temporary / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(entry, ignore_errors=True)
        os.rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes, if the system has one; it ends with its holder. Symbolic links are refused."""
    with open(path, "a", opener=lambda name, how: os.open(name, how | getattr(os, "O_NOFOLLOW", 0), 0o666)) as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
    """Turns any error of TFDS into one sentence."""
    try:
        yield
    except InvalidInput:
        raise
    except Exception as e:
        raise InvalidInput(f"{what}: {_line(e)}") from e


def _line(e: BaseException) -> str:
    """The first line of an error's message, without the text that TFDS adds."""
    line = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
    line = re.sub(r'^Failed to construct dataset .*?}": |\. Here are \d+ .*', "", line)
    return line[:300].rstrip(".:") + "."
