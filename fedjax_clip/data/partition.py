"""Divides one data set among clients: evenly, skewed, in shards, or by a field.

Every function here gives each example to exactly one client, leaves no client empty,
and is a deterministic function of ``seed``. The examples are a dict of arrays or a pandas DataFrame.
"""

import difflib
import heapq
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_clip.core import checks, files
from fedjax_clip.core.types import InvalidInput, PyTree
from fedjax_clip.data import frames
from fedjax_clip.data.labels import drawable
from fedjax_clip.data.population import FederatedData, as_array, count_examples, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["dirichlet", "iid", "natural", "plot", "quantity_skew", "shards"]

Examples = Mapping[str, PyTree]

# Beyond these values a Dirichlet draw gives all to one client, or even shares, up to the last example.
_ALPHA_RANGE = 1e-6, 1e15

_TEN_COLOURS = [
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac",
]  # fmt: skip


def iid(examples: Examples, num_clients: int, seed: int = 0) -> FederatedData:
    """Divides shuffled examples evenly: client sizes differ by one at most.

    Args:
      examples: dict of arrays ``[N, ...]``.
      num_clients: number of clients, ``1 .. N``.
      seed: seed of the shuffle.

    Raises:
      InvalidInput: more clients than examples, fields of unequal length ...

    Example:
      >>> fc.data.partition.iid({"x": np.arange(10)}, num_clients=3).sizes.tolist()
      [4, 3, 3]
    """
    examples, num_examples, num_clients, rng = _check(examples, num_clients, seed)
    return _assign(examples, rng.permutation(np.arange(num_examples) % num_clients))


def dirichlet(examples: Examples, num_clients: int, alpha: float, label: str = "y", seed: int = 0) -> FederatedData:
    """Label skew: each class is spread over the clients in proportions drawn from a Dirichlet(alpha).

    Small ``alpha`` gives each class to few clients, large ``alpha`` to all alike
    (Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022; Hsu et al. 2019,
    https://arxiv.org/abs/1909.06335). A client that the draw leaves empty takes one
    example from the largest client.

    Args:
      examples: dict of arrays ``[N, ...]``.
      num_clients: how many clients, ``1 .. N``.
      alpha: concentration, positive.
      label: the field of integer classes.
      seed: seed of the draw.

    Raises:
      InvalidInput: alpha that is not positive and finite, labels that are not integers ...

    Example:
      >>> data = fc.data.partition.dirichlet({"y": np.arange(100) % 10}, num_clients=5, alpha=0.1)
      >>> data.num_clients, data.num_examples
      (5, 100)
    """
    examples, num_examples, num_clients, rng = _check(examples, num_clients, seed)
    labels = _labels(examples, label)
    checks.positive("alpha", alpha, finite=True)
    alpha = np.clip(float(alpha), *_ALPHA_RANGE)
    client_of = np.empty(num_examples, np.int64)
    for value in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == value))
        shares = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))
        places = (np.arange(len(members)) + 0.5) / len(members)
        client_of[members] = np.minimum(np.searchsorted(shares, places, side="right"), num_clients - 1)
    return _assign(examples, _fill_empty(client_of, num_clients, rng))


def quantity_skew(examples: Examples, num_clients: int, sigma: float = 1.0, seed: int = 0) -> FederatedData:
    """Skews client sizes only: log-normal with ``sigma``; each client gets random examples.

    Args:
      examples: dict of arrays ``[N, ...]``.
      num_clients: how many clients, ``1 .. N``.
      sigma: standard deviation of the logarithm of a client's size; 0 gives equal sizes.
      seed: seed of the draw.

    Raises:
      InvalidInput: sigma that is negative or not finite ...

    Example:
      >>> fc.data.partition.quantity_skew({"x": np.arange(100)}, num_clients=4, sigma=0.0).sizes.tolist()
      [25, 25, 25, 25]
    """
    examples, num_examples, num_clients, rng = _check(examples, num_clients, seed)
    # Beyond 1e300 the largest client gets everything in any case.
    checks.within("sigma", sigma, 0, finite=True)
    logs = min(float(sigma), 1e300) * rng.standard_normal(num_clients)
    shares = np.cumsum(np.exp(logs - logs.max()))
    places = (np.arange(num_examples) + 0.5) / num_examples * shares[-1]
    client_of = np.minimum(np.searchsorted(shares, places, side="right"), num_clients - 1)
    return _assign(examples, _fill_empty(rng.permutation(client_of), num_clients, rng))


def shards(
    examples: Examples, num_clients: int, classes_per_client: int = 2, label: str = "y", seed: int = 0
) -> FederatedData:
    """The pathological split: sorts examples by label, cuts them into equal shards, gives each client a few shards.

    After McMahan et al. 2017 (https://arxiv.org/abs/1602.05629). A shard that
    straddles two classes holds both, so a client can see a few classes more than
    ``classes_per_client`` (or fewer, when two of its shards are of one class).

    Args:
      examples: dict of arrays ``[N, ...]``.
      num_clients: how many clients.
      classes_per_client: shards that each client gets.
      label: the field of integer classes.
      seed: seed of the shuffles.

    Raises:
      InvalidInput: more classes per client than there are, more shards than examples ...

    Example:
      >>> fc.data.partition.shards({"y": np.arange(100) % 10}, num_clients=5).sizes.tolist()
      [20, 20, 20, 20, 20]
    """
    examples, num_examples, num_clients, rng = _check(examples, num_clients, seed)
    labels = _labels(examples, label)
    per_client = checks.count("classes_per_client", classes_per_client)
    if per_client > (num_classes := len(np.unique(labels))):
        raise InvalidInput(f"A client cannot have {per_client} classes: field {label!r} has {num_classes}.")
    num_shards = num_clients * per_client
    if num_shards > num_examples:
        raise InvalidInput(
            f"{num_clients} clients of {per_client} classes each need {num_shards} examples: there are {num_examples}."
        )
    shuffled = rng.permutation(num_examples)
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owners = rng.permutation(np.arange(num_shards) % num_clients)
    client_of = np.empty(num_examples, np.int64)
    client_of[by_label] = owners[np.arange(num_examples) * num_shards // num_examples]
    return _assign(examples, client_of)


def natural(examples: Examples, by: str, keep: bool = False) -> FederatedData:
    """Groups examples by a field that names their owner: a writer, a hospital, a user.

    Args:
      examples: dict of arrays ``[N, ...]``.
      by: the field of owners, strings, bytes or integers ``[N]``; they become the
        clients' names, in natural order (``"form2"`` before ``"form10"``).
      keep: whether the field stays among the examples.

    Raises:
      InvalidInput: no such field, or one that cannot name clients.

    Example:
      >>> data = fc.data.partition.natural({"x": np.ones(3), "who": np.array(["b", "a", "b"])}, by="who")
      >>> data.names, data.sizes.tolist()
      (['a', 'b'], [1, 2])
    """
    examples, *_ = _check(examples, 1, 0)
    client_of, names = owners_of(_field(examples, by), by)
    rest = {name: x for name, x in examples.items() if keep or name != by}
    if not rest:
        raise InvalidInput(f"The examples have no field but {by!r}: there is nothing to learn from.")
    return _assign(rest, client_of, names)


def owners_of(keys: np.ndarray, by: str) -> tuple[np.ndarray, list[str]]:
    """Numbers the owners in a field: ``(client_of[N], names[M])``, the names in natural order."""
    keys = np.asarray(keys)
    texts = keys.dtype == object and all(isinstance(key, str | bytes) for key in keys.flat)
    if texts:
        distinct = {text(key): key for key in keys.flat}
        if twin := next((key for key in keys.flat if distinct[text(key)] != key), None):
            raise InvalidInput(
                f"Field {by!r} names clients {distinct[text(twin)]!r} and {twin!r}: as text they are one."
            )
        keys = np.array([text(key) for key in keys.flat], object).reshape(keys.shape)
    if keys.ndim != 1 or not (texts or keys.dtype.kind in "SUTiu"):
        raise InvalidInput(
            f"Field {by!r} cannot name clients: it must hold one string or integer for each example, "
            f"not {keys.dtype} of shape {keys.shape[1:]}."
        )
    values, client_of = np.unique(keys, return_inverse=True)
    names = [text(value) for value in values.tolist()]
    if keys.dtype.kind in "iu":
        return client_of, names
    order = sorted(range(len(names)), key=lambda i: _natural(names[i]))
    return np.argsort(order)[client_of], [names[i] for i in order]


def no_field(name: str, fields: Iterable[str]) -> InvalidInput:
    """The error for a field that does not exist; it names the nearest that do."""
    fields = [str(field) for field in fields]
    near = difflib.get_close_matches(str(name), fields, 3, 0.5) or fields[:8]
    return InvalidInput(f"There is no field {name!r} in the examples; there is {' or '.join(map(repr, near))}.")


def plot(
    data: FederatedData, label: str = "y", path: str | os.PathLike[str] | None = None, num_classes: int | None = None
) -> "Figure":
    """Draws how many examples of each class each client holds.

    Up to 40 clients are bars, stacked by class; a larger population is a heat map
    of each client's mix of classes, with similar clients side by side, under a strip of their sizes.

    Args:
      data: the population.
      label: the field of integer classes.
      path: where to save the picture (PNG, PDF, SVG: by its suffix), if anywhere.
      num_classes: classes are ``0 .. num_classes - 1``; the labels that occur if ``None``.

    Returns:
      The matplotlib figure, independent of pyplot's global state.

    Raises:
      InvalidInput: matplotlib is not installed, labels that are not integers ...

    Example:
      >>> fc.data.partition.plot(data).savefig("partition.png")
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InvalidInput("A plot needs matplotlib: pip install matplotlib.") from e
    if not isinstance(data.examples, Mapping):
        raise InvalidInput("The examples must be a dict of arrays, so that a label field can be named.")
    labels = _labels(data.examples, label)
    if num_classes is None:
        classes, labels = np.unique(labels, return_inverse=True)
    else:
        classes = np.arange(checks.count("num_classes", num_classes))
        if labels.min() < 0 or labels.max() >= num_classes:
            raise InvalidInput(f"Labels run from {labels.min()} to {labels.max()}, outside 0 to {num_classes - 1}.")
    owner = np.repeat(np.arange(data.num_clients), data.sizes)
    flat = np.bincount(owner * len(classes) + labels, minlength=data.num_clients * len(classes))
    counts = flat.reshape(data.num_clients, len(classes))

    words = (data.labels or {}).get(label, ())
    named = [drawable(words[c]) if 0 <= c < len(words) else str(c) for c in classes.tolist()]
    as_bars = data.num_clients <= 40 and len(classes) <= 20
    height = 1.3 + 0.22 * max(data.num_clients, 8) if as_bars else 2.2 + 0.16 * min(max(len(classes), 14), 40)
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    figure.suptitle(
        f"{data.num_clients:,} clients, {data.num_examples:,} examples, {len(classes):,} classes",
        x=0.01, ha="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    if as_bars:
        _bars(figure, counts, named, [data.name(c) for c in range(data.num_clients)])
    else:
        _heat_map(figure, counts, named)
    if path is not None:
        try:
            figure.savefig(files.expanded(path))
        except (OSError, ValueError) as e:
            raise InvalidInput(f"The plot cannot be saved as {os.fspath(path)}: {e}.") from e
    return figure


def _bars(figure: Any, counts: np.ndarray, classes: list[str], names: list[str]) -> None:
    import matplotlib

    axes = figure.subplots()
    colours = _TEN_COLOURS if len(classes) <= 10 else matplotlib.colormaps["tab20"](np.arange(20))
    clients, left = np.arange(len(names)), np.zeros(len(names))
    for k, name in enumerate(classes):
        axes.barh(clients, counts[:, k], 0.8, left, color=colours[k], label=name, edgecolor="white", linewidth=0.4)
        left += counts[:, k]
    short = [name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}" for name in names]
    axes.set_yticks(clients, [drawable(name) for name in short], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, left.max() * 1.02)
    axes.set_xlabel("examples", fontsize=9)
    axes.set_ylabel("client", fontsize=9)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.xaxis.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(
        *axes.get_legend_handles_labels(), title="class", loc="outside right upper",
        frameon=False, fontsize=8, title_fontsize=9, handlelength=1, handleheight=1,
    )  # fmt: skip


def _heat_map(figure: Any, counts: np.ndarray, classes: list[str]) -> None:
    sizes = counts.sum(1)
    mix = counts / sizes[:, None]
    order = np.lexsort((-mix.max(1), mix.argmax(1)))
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 5])
    edges = np.arange(len(sizes) + 1) - 0.5
    above.stairs(sizes[order], edges, fill=True, color="0.6")
    above.set_ylim(0, sizes.max() * 1.05)
    above.set_ylabel("examples", fontsize=9)
    above.spines[["top", "right"]].set_visible(False)
    above.tick_params(length=0, labelsize=8, labelbottom=False)
    image = axes.imshow(mix[order].T, aspect="auto", cmap="BuPu", vmin=0, interpolation="nearest")
    step = -(-len(classes) // 25)
    axes.set_yticks(range(0, len(classes), step), classes[::step])
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("clients, those with the same main class together", fontsize=9)
    axes.set_ylabel("class", fontsize=9)
    axes.tick_params(length=0, labelsize=8, labelbottom=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    bar.set_label("share of the client's examples", fontsize=9)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.outline.set_visible(False)


def _check(examples: Examples, num_clients: int, seed: int) -> tuple[Examples, int, int, np.random.Generator]:
    """The examples as a dict, the checked numbers of examples and clients, and a random generator."""
    if frames.is_frame(examples):
        examples = frames.columns(examples)
    if not isinstance(examples, Mapping) or not examples:
        raise InvalidInput('The examples must be a dict of arrays, such as {"x": ..., "y": ...}.')
    num_examples = count_examples(examples)
    num_clients = checks.count("num_clients", num_clients)
    if num_clients > num_examples:
        raise InvalidInput(f"{num_examples} examples cannot serve {num_clients} clients: nobody may be empty.")
    return examples, num_examples, num_clients, np.random.default_rng(checks.seed("seed", seed))


def _assign(examples: Examples, client_of: np.ndarray, names: list[str] | None = None) -> FederatedData:
    return FederatedData.from_assignment(dict(examples), client_of, names)


def _fill_empty(client_of: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
    """Moves a random example of the largest client to each client that has none."""
    counts = np.bincount(client_of, minlength=num_clients)
    shuffled = rng.permutation(len(client_of))
    members = shuffled[np.argsort(client_of[shuffled], kind="stable")]
    ends = np.cumsum(counts)
    heap = [(-int(count), client) for client, count in enumerate(counts)]
    heapq.heapify(heap)
    for empty in np.flatnonzero(counts == 0):
        size, largest = heap[0]
        ends[largest] -= 1
        client_of[members[ends[largest]]] = empty
        heapq.heapreplace(heap, (size + 1, largest))
    return client_of


def _field(examples: Examples, name: str) -> np.ndarray:
    checks.kind("A field", name, str, "the name of one")
    if name not in examples:
        raise no_field(name, examples)
    return as_array(f"Field {name!r}", examples[name])


def _labels(examples: Examples, label: str) -> np.ndarray:
    labels = _field(examples, label)
    if labels.ndim != 1 or labels.dtype.kind not in "biu":
        raise InvalidInput(
            f"Field {label!r} is no label: it must hold one integer for each example, "
            f"not {labels.dtype} of shape {labels.shape[1:]}."
        )
    return labels.astype(np.int64)


def _natural(name: str) -> tuple[list[Any], str]:
    """A sort key in which runs of digits compare as numbers; they alternate with the text between."""
    parts = re.split("0*([0-9]+)", name)
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)], name
