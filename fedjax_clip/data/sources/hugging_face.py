"""Data sets of Hugging Face's ``datasets``, and the clients that partitioners of Flower's ``flwr-datasets`` make."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fedjax_clip.core import files
from fedjax_clip.core.files import PathLike
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import frames, partition
from fedjax_clip.data.population import FederatedData, text

_INSTALL = "pip install 'fedjax_clip[huggingface]'"
_IMAGES: Mapping[str, str] = {"x": "image", "y": "label"}
_READERS = {"csv": "from_pandas", "json": "from_json", "jsonl": "from_json", "parquet": "from_parquet"}


def huggingface(
    dataset: Any, columns: Mapping[str, str] = _IMAGES, by: str | None = None
) -> dict[str, np.ndarray] | FederatedData:
    """A data set of Hugging Face's ``datasets`` as arrays, by default without clients: partition them.

    Numbers and bools keep their type, arrays of one shape are stacked, and images are decoded to uint8, grey ones to
    ``[height, width, 1]``. A ``ClassLabel`` becomes its numbers; their names are ``labels`` of the population.

    Args:
      dataset: a ``datasets.Dataset``; or the path of a local .parquet, .csv, .json or .jsonl file, or of a directory
        that ``save_to_disk`` has written. Nothing is downloaded.
      columns: the column of each field.
      by: the column that names each example's client, see ``partition.natural``; a ``ClassLabel`` gives its names.

    Returns:
      ``{field: [N, ...]}``, or a ``FederatedData`` if ``by`` is given.

    Raises:
      InvalidInput: ``datasets`` is not installed, a file that it cannot read, a column that does not exist, dates,
        missing values that are not of a number with fractions, arrays of different shapes ...

    Example:
      >>> import datasets
      >>> dataset = datasets.Dataset.from_dict({"age": [63.0, 50.0, 41.0], "died": [1, 0, 1], "ward": ["b", "a", "b"]})
      >>> data = fc.data.sources.huggingface(dataset, {"x": "age", "y": "died"}, by="ward")
      >>> data.names, data.sizes.tolist()
      (['a', 'b'], [1, 2])
    """
    dataset = _opened(dataset)
    examples = {field: _column(dataset, column) for field, column in columns.items()}
    if by is None:
        return examples
    owners, words = _column(dataset, by), _words(dataset, by)
    owners = np.array(words, object)[owners] if words else owners
    clients = FederatedData.from_assignment(examples, *partition.owners_of(owners, by))
    return dataclasses.replace(clients, labels=_labels(dataset, columns))


def flwr(source: Any, columns: Mapping[str, str] = _IMAGES, split: str = "train") -> FederatedData:
    """The clients that a partitioner of ``flwr-datasets`` makes of a data set.

    Args:
      source: a partitioner with a data set, ``partitioner.dataset = dataset``, or a ``FederatedDataset``. The latter
        downloads its data set from the Hugging Face Hub.
      columns: the column of each field, as for ``huggingface``.
      split: of a ``FederatedDataset``.

    Returns:
      The clients by the partitions' numbers, or by the natural id if the partitioner goes by one; each has its
      partition's examples in their order.

    Raises:
      InvalidInput: a partitioner without a data set, a split without a partitioner, an empty partition, and what
        ``huggingface`` refuses.

    Example:
      >>> import datasets
      >>> from flwr_datasets.partitioner import IidPartitioner
      >>> partitioner = IidPartitioner(num_partitions=2)
      >>> partitioner.dataset = datasets.Dataset.from_dict({"age": [63.0, 50.0, 41.0], "died": [1, 0, 1]})
      >>> fc.data.sources.flwr(partitioner, {"x": "age", "y": "died"}).sizes.tolist()
      [2, 1]
    """
    try:
        import datasets
        from flwr_datasets import FederatedDataset
        from flwr_datasets.partitioner import Partitioner
    except ImportError as error:
        raise InvalidInput(f"Partitioners need flwr-datasets, which is not installed: {_INSTALL}") from error
    if isinstance(source, FederatedDataset):
        if split not in (partitioners := source.partitioners):
            raise InvalidInput(f"split={split!r} has no partitioner; there is one of {', '.join(partitioners)}.")
        source = partitioners[split]
    if not isinstance(source, Partitioner):
        raise InvalidInput(
            f"source must be a partitioner or a FederatedDataset of flwr-datasets, not {type(source).__name__}."
        )
    if not source.is_dataset_assigned():
        raise InvalidInput("The partitioner has no data set: set partitioner.dataset = dataset first.")
    parts = [source.load_partition(number) for number in range(source.num_partitions)]
    if empty := [number for number, part in enumerate(parts) if not len(part)]:
        raise InvalidInput(f"Partition {empty[0]} is empty, and no client may be: choose another partitioner.")
    natural = getattr(source, "partition_id_to_natural_id", {})
    names = [text(natural.get(number, number)) for number in range(len(parts))]
    whole = datasets.concatenate_datasets(parts)
    examples = {field: _column(whole, name) for field, name in columns.items()}
    return FederatedData(examples, np.cumsum([0, *map(len, parts)]), names, labels=_labels(whole, columns))


def _opened(dataset: Any) -> Any:
    """The data set itself, or the one of a local file or directory."""
    try:
        import datasets
    except ImportError as error:
        raise InvalidInput(f"The data set needs the package datasets, which is not installed: {_INSTALL}") from error
    if isinstance(dataset, str | os.PathLike):
        dataset = _read(datasets, dataset)
    if isinstance(dataset, datasets.DatasetDict):
        raise InvalidInput(f"The data set has the splits {', '.join(dataset)}: give one of them, dataset['train'].")
    if isinstance(dataset, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise InvalidInput("The data set is a stream, which has no length: load it without streaming=True.")
    if not isinstance(dataset, datasets.Dataset):
        raise InvalidInput(f"dataset must be a datasets.Dataset or the path of a file, not {type(dataset).__name__}.")
    if not len(dataset):
        raise InvalidInput("The data set is empty: it has no examples.")
    return dataset


def _read(datasets: Any, path: PathLike) -> Any:
    """A local data set. What ``datasets`` writes on the way is removed."""
    path = files.expanded(path)
    reader = _READERS.get(path.suffix.removeprefix("."))
    if not path.exists():
        raise InvalidInput(
            f"There is no file {path}. To read one from the Hub, give datasets.load_dataset(...) itself."
        )
    if reader is None and not path.is_dir():
        raise InvalidInput(f"{path} must be a file {', '.join(f'.{name}' for name in _READERS)}, or a directory.")
    try:
        with _quiet(datasets), tempfile.TemporaryDirectory() as cache:
            if reader is None:
                return datasets.load_from_disk(str(path), keep_in_memory=True)
            if reader == "from_pandas":
                import pandas

                return datasets.Dataset.from_pandas(pandas.read_csv(path), preserve_index=False)
            read = getattr(datasets.Dataset, reader)
            return read(str(files.regular(path)), cache_dir=cache, keep_in_memory=True)
    except InvalidInput:
        raise
    except Exception as error:  # datasets and pyarrow raise almost anything
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        why = (str(root).splitlines() or [type(root).__name__])[0].rstrip(".")
        raise InvalidInput(f"{path} cannot be read by datasets: {why}.") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No bars, and no log of an error that the exception repeats."""
    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _column(dataset: Any, name: str) -> np.ndarray:
    """A column as an array."""
    import datasets

    if name not in dataset.features:
        raise partition.no_field(name, dataset.features)
    feature, only = dataset.features[name], dataset.select_columns([name])
    where = f"Column {name!r}"
    if isinstance(feature, datasets.Value | datasets.ClassLabel):
        return frames.array(where, only.with_format("pandas")[:][name])
    x = np.asarray(only.with_format("numpy")[:][name])
    if x.dtype == object:
        shapes = sorted({np.shape(entry) for entry in x})
        found = f"arrays of different shapes, {shapes[0]} and {shapes[1]}" if len(shapes) > 1 else f"{feature}"
        raise InvalidInput(f"{where} holds {found}: make it arrays of one shape by dataset.map, or leave it out.")
    if isinstance(feature, datasets.Image):
        return x[..., None] if x.ndim == 3 else x
    while hasattr(feature, "feature"):
        feature = feature.feature
    return x.astype(feature.dtype) if x.dtype.kind in "iu" else x  # datasets makes all whole numbers int64


def _words(dataset: Any, column: str) -> list[str]:
    """The names of a column's classes, if it has any."""
    return list(getattr(dataset.features[column], "names", None) or ())


def _labels(dataset: Any, columns: Mapping[str, str]) -> dict[str, list[str]] | None:
    named = {field: _words(dataset, column) for field, column in columns.items()}
    return {field: words for field, words in named.items() if words} or None
