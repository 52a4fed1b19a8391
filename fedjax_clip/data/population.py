"""A population of clients: flat arrays of examples, and the offset of each client."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput, PyTree
from fedjax_clip.data import draws, frames

LEAST_WEIGHT, MOST_WEIGHT = 1e-12, 1e12  # float32 then holds the sum of ten million weights times a norm of 1e19


@dataclasses.dataclass(frozen=True, eq=False)
class FederatedData:
    """Clients of unequal sizes over one flat pytree of examples, without padding.

    Client ``c`` owns the examples ``offsets[c]:offsets[c + 1]``. The arrays may be
    memory-mapped: nothing here copies or reads them whole.

    Args:
      examples: pytree of arrays ``[N, ...]``, usually ``{"x": ..., "y": ...}``; array-likes are converted. A pandas
        DataFrame is a dict of its columns, and ``{"x": frame[features], "y": frame["label"]}`` has a matrix ``x``.
      offsets: int64 ``[M + 1]``, rising from 0 to N; no client is empty.
      names: ``[M]`` client names, unique as text; ``None`` names them ``"0", "1", ...``.
      weights: optional ``[N]`` example weights, such as class weights, between 1e-12 and 1e12, so that float32 holds
        their sums and products; ``None`` gives every example weight 1.
      lives: optional int ``[N, 2]``: clients have example i in the rounds ``lives[i, 0] <= r < lives[i, 1]`` only; see
        ``fc.data.stream``. ``None`` if they have all examples in all rounds.
      labels: what the integers of a field stand for, ``{"y": ("cat", "dog")}``, where a source says so.

    Raises:
      InvalidInput: leading dimensions that differ, empty clients, duplicate names, tables, masked values ...

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"x": np.ones((3, 2))}, "bob": {"x": np.ones((1, 2))}})
      >>> data.num_clients, data.sizes.tolist()
      (2, [3, 1])
    """

    examples: PyTree
    offsets: np.ndarray
    names: Sequence[str] | None = None
    weights: np.ndarray | None = None
    lives: np.ndarray | None = None
    labels: Mapping[str, Sequence[str]] | None = None
    own: np.ndarray | None = dataclasses.field(default=None, init=False)  # bool [M]; see data/parts.py

    def __post_init__(self) -> None:
        offsets = _integers("offsets", self.offsets)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "examples", as_arrays(self.examples))
        num_examples = count_examples(self.examples)
        if offsets.ndim != 1 or len(offsets) < 2:
            raise InvalidInput(f"offsets must be [clients + 1] with at least one client, not shape {offsets.shape}.")
        if offsets[0] != 0 or offsets[-1] != num_examples:
            raise InvalidInput(
                f"offsets must run from 0 to the {num_examples} examples, not from {offsets[0]} to {offsets[-1]}."
            )
        if self.names is not None:
            given = np.asarray(self.names, object)
            if given.ndim != 1:
                raise InvalidInput(f"names must be [clients], one name each, not shape {given.shape}.")
            names = [text(name) for name in given.tolist()]
            object.__setattr__(self, "names", names)
            if len(names) != self.num_clients:
                raise InvalidInput(f"There are {len(names)} client names for {self.num_clients} clients.")
            if len(set(names)) != len(names):
                twice = collections.Counter(names).most_common(1)[0][0]
                raise InvalidInput(f"Client name {twice!r} occurs more than once.")
        if (empty := np.flatnonzero(np.diff(offsets) <= 0)).size:
            raise InvalidInput(f"Client {self.name(int(empty[0]))!r} has no examples.")
        if self.weights is not None:
            weights = as_array("weights", self.weights)
            wide = weights.astype(np.float64) if weights.dtype.kind in "iuf" else np.zeros(0)
            if wide.shape != (num_examples,) or not np.all((wide >= LEAST_WEIGHT) & (wide <= MOST_WEIGHT)):
                raise InvalidInput(
                    f"Example weights must be {num_examples} numbers between {LEAST_WEIGHT:g} and {MOST_WEIGHT:g}. "
                    "Only their ratios matter to a mean: scale them, and leave out examples that shall not count."
                )
            object.__setattr__(self, "weights", weights if weights.dtype in (np.float32, np.float64) else wide)
        if self.lives is not None:
            lives = _integers("lives", self.lives)
            if lives.shape != (num_examples, 2) or (lives.size and not 0 <= lives.min() <= lives.max() < 2**31):
                raise InvalidInput(
                    f"lives must be two rounds between 0 and 2**31 - 1 for each of the {num_examples} examples, its "
                    f"first one and the one after its last; shape {(num_examples, 2)}, not {lives.shape}."
                )
            object.__setattr__(self, "lives", lives)

    @classmethod
    def from_clients(cls, clients: Mapping[str, PyTree]) -> "FederatedData":
        """Joins ``{client name: examples}``; every client has the same fields, shapes and types."""
        checks.kind("clients", clients, Mapping, "{client name: examples}")
        if not clients:
            raise InvalidInput("The data set is empty: it has no clients.")
        trees: dict[str, PyTree] = {}
        given = next(iter(clients.values()))
        for key, examples in clients.items():
            if (name := text(key)) in trees:
                raise InvalidInput(f"Two clients have the name {name!r}, as text: rename one of them.")
            of = f" of client {name!r}"
            trees[name] = as_arrays(frames.ordered(examples, given, of), of)
        first_name, first = next(iter(trees.items()))
        structure: Any = jax.tree.structure(first)
        sizes = []
        for name, tree in trees.items():
            if structure != jax.tree.structure(tree):
                raise InvalidInput(f"Client {name!r} has other fields than client {first_name!r}.")
            leaves, first_leaves = jax.tree.leaves(tree), jax.tree.leaves(first)
            if not leaves or any(x.ndim == 0 for x in leaves):
                raise InvalidInput(f"The examples of client {name!r} must be arrays [examples, ...].")
            for (path, x), y in zip(jax.tree.leaves_with_path(tree), first_leaves, strict=True):
                if x.shape[1:] != y.shape[1:]:
                    field = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise InvalidInput(
                        f"Client {name!r} has examples of shape {x.shape[1:]}, client {first_name!r} of {y.shape[1:]}"
                        f"{f', in field {field!r}' if field else ''}."
                    )
                if x.dtype != y.dtype and (x.dtype.kind != y.dtype.kind or x.dtype.kind not in "ifSU"):
                    field = jax.tree_util.keystr(path, simple=True, separator="/") or "examples"
                    raise InvalidInput(
                        f"Field {field!r} of client {name!r} holds {x.dtype}, that of client {first_name!r} {y.dtype}: "
                        "convert one of them, and scale it where the scale differs."
                    )
            if len({len(x) for x in leaves}) > 1:
                lengths = ", ".join(f"{field} has {len(x)}" for field, x in _fields(tree).items())
                raise InvalidInput(f"The fields of client {name!r} differ in length: {lengths}.")
            sizes.append(len(leaves[0]))
        examples = jax.tree.map(lambda *xs: np.concatenate(xs), *trees.values())
        return cls(examples, np.concatenate([[0], np.cumsum(sizes)]), list(trees))

    @classmethod
    def from_assignment(
        cls, examples: PyTree, client_of: np.ndarray, names: Sequence[str] | None = None
    ) -> "FederatedData":
        """Groups examples by owner, keeping their order within each client.

        Args:
          examples: pytree of arrays ``[N, ...]``.
          client_of: ``[N]`` integers ``0 .. M-1``: example i belongs to client ``client_of[i]``.
          names: ``[M]`` client names.
        """
        client_of, examples = _integers("client_of", client_of), as_arrays(examples)
        num_examples = count_examples(examples)
        if client_of.shape != (num_examples,) or client_of.min() < 0:
            raise InvalidInput(f"client_of must name a client 0, 1, ... for each of the {num_examples} examples.")
        counts = np.bincount(client_of, minlength=0 if names is None else len(names))
        order = np.argsort(client_of, kind="stable")
        examples = jax.tree.map(lambda x: x[order], examples)
        return cls(examples, np.concatenate([[0], np.cumsum(counts)]), names)

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_examples(self) -> int:
        return int(self.offsets[-1])

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """``[M]`` examples of each client."""
        return np.diff(self.offsets)

    @functools.cached_property
    def client_weights(self) -> np.ndarray:
        """``[M]`` weight of each client: the sum of its example weights, which are 1 by default."""
        if self.weights is None:
            return self.sizes
        return np.add.reduceat(self.weights, self.offsets[:-1], dtype=np.float64)

    @functools.cached_property
    def turns(self) -> tuple[np.ndarray, np.ndarray]:
        """The rounds ``[T]`` in which lives begin or end, and the weight ``[T + 1]`` of what lives between them."""
        if self.lives is None:
            return np.zeros(0, np.int64), np.array([self.client_weights.sum(dtype=np.float64)])
        weights = np.ones(self.num_examples) if self.weights is None else self.weights
        turns = np.unique(self.lives)
        came, went = (
            np.bincount(np.searchsorted(turns, bound), weights, len(turns))
            for bound in (self.lives[:, 0], self.lives.max(axis=1))
        )
        return turns, np.concatenate([[0.0], np.cumsum(came - went)])

    def name(self, client: int) -> str:
        return str(client) if self.names is None else self.names[client]

    def client(self, client: int) -> PyTree:
        """The examples of one client, as views."""
        if self.own is not None and not self.own[client]:
            raise InvalidInput(f"Client {self.name(client)!r} is opened by another process.")
        start, stop = self.offsets[client], self.offsets[client + 1]
        return jax.tree.map(lambda x: x[start:stop], self.examples)

    def fields(self) -> dict[str, np.ndarray]:
        """The arrays of ``examples`` under readable names."""
        return _fields(self.examples)

    def select(self, clients: Sequence[int] | np.ndarray) -> "FederatedData":
        """The population of these clients only, in this order."""
        clients = _integers("clients", clients)
        if not clients.size:
            raise InvalidInput("No client is selected.")
        if clients.min() < 0 or clients.max() >= self.num_clients:
            raise InvalidInput(f"Clients are numbered 0 to {self.num_clients - 1}: the selection leaves that range.")
        if (twice := np.flatnonzero(np.bincount(clients) > 1)).size:
            raise InvalidInput(f"Client {self.name(int(twice[0]))!r} is selected more than once.")
        sizes = self.sizes[clients]
        place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.take(np.repeat(self.offsets[clients], sizes) + place, clients)

    def take(self, index: np.ndarray, clients: np.ndarray | None = None) -> "FederatedData":
        """The population of these examples only; ``index`` lists them client by client.

        Args:
          index: ``[n]`` example numbers.
          clients: the clients that own them, in order; all clients if ``None``.
        """
        check_whole("What is selected or split", self)
        index = _integers("index", index)
        clients = np.arange(self.num_clients) if clients is None else _integers("clients", clients)
        if index.size and (index.min() < 0 or index.max() >= self.num_examples):
            raise InvalidInput(f"Examples are numbered 0 to {self.num_examples - 1}: the index leaves that range.")
        owner = np.searchsorted(self.offsets, index, side="right") - 1
        counts = np.bincount(owner, minlength=self.num_clients)[clients]
        if not np.array_equal(owner, np.repeat(clients, counts)):
            raise InvalidInput("The index must list the examples client by client, in the order of the clients.")
        return FederatedData(
            jax.tree.map(lambda x: x[index], self.examples),
            np.concatenate([[0], np.cumsum(counts)]),
            [self.name(int(c)) for c in clients],
            None if self.weights is None else self.weights[index],
            None if self.lives is None else self.lives[index],
            self.labels,
        )

    def split_examples(
        self, fraction: float, seed: int = 0, label: str | None = None
    ) -> tuple["FederatedData", "FederatedData"]:
        """Holds out ``fraction`` of every client's examples: ``(train, held_out)``.

        With ``label``, the name of a field of classes, it is the fraction of each class of a client: at least one of
        two, and one of one with this probability. If that leaves nothing to hold out, classes do not count. Every
        client keeps at least one example to train on; a client with a single example is missing from the held-out
        population.
        """
        checks.fraction("The fraction to hold out", fraction)
        owner = np.repeat(np.arange(self.num_clients), self.sizes)
        values, kind = ([0], 0) if label is None else np.unique(self.fields()[label], return_inverse=True)
        groups, group, sizes = np.unique(owner * len(values) + kind, return_inverse=True, return_counts=True)
        cuts = np.round(fraction * sizes)
        if label is not None:  # always rounded down, a class of one example at each client would never be held out
            cuts = np.where(sizes > 1, cuts, draws.uniform(seed, groups) < fraction)
        cuts = np.clip(cuts, sizes > 1, np.maximum(sizes - 1, label is not None)).astype(np.int64)
        client = groups // len(values)
        cuts[(np.bincount(client, cuts) == self.sizes)[client]] = 0
        if not cuts.any() and label is not None:  # no client has two examples of a class
            return self.split_examples(fraction, seed)
        if not cuts.any():
            raise InvalidInput(
                "No client has two examples, so there is nothing to hold out: make fewer, larger clients, or hold out "
                "whole ones."
            )
        held_out = np.empty(self.num_examples, bool)
        held_out[np.argsort(group, kind="stable")] = draws.shuffles(sizes, seed, groups) < np.repeat(cuts, sizes)
        return self.take(np.flatnonzero(~held_out)), self.take(np.flatnonzero(held_out), np.unique(owner[held_out]))

    def split_clients(self, fraction: float, seed: int = 0) -> tuple["FederatedData", "FederatedData"]:
        """Holds out ``fraction`` of the clients, whole: ``(train, held_out)``, at least one in each."""
        checks.fraction("The fraction to hold out", fraction)
        if self.num_clients < 2:
            raise InvalidInput("A population of one client cannot be split by clients.")
        order = np.random.default_rng(checks.seed("seed", seed)).permutation(self.num_clients)
        cut = min(max(1, round(fraction * self.num_clients)), self.num_clients - 1)
        return self.select(np.sort(order[cut:])), self.select(np.sort(order[:cut]))

    def __repr__(self) -> str:
        shapes = {name: (str(x.dtype), x.shape[1:]) for name, x in self.fields().items()}
        return f"FederatedData({self.num_clients} clients, {self.num_examples} examples, {_pairs(shapes)})"


def as_arrays(examples: PyTree, of: str = "") -> PyTree:
    """The examples with NumPy arrays as leaves, in the machine's byte order; memory-mapped ones stay where they are.

    Args:
      examples: pytree of arrays or array-likes: a Series, a JAX array. A DataFrame is a dict of its columns; within a
        dict it is a matrix of numbers.
      of: their owner, for the error message.

    Raises:
      InvalidInput: a table, a sparse matrix, masked values.
    """

    def convert(path: Any, x: Any) -> np.ndarray:
        return as_array(f"Field {jax.tree_util.keystr(path, simple=True, separator='/') or 'examples'!r}{of}", x)

    if frames.is_frame(examples):
        return frames.columns(examples, of)
    return jax.tree_util.tree_map_with_path(convert, examples)


def as_array(name: str, x: Any) -> np.ndarray:
    """Converts one leaf to an array; ``name`` is for the error message."""
    if frames.is_frame(x):
        return frames.matrix(name, x)
    if frames.is_column(x):
        return frames.array(name, x)
    if hasattr(x, "columns"):
        raise InvalidInput(
            f"{name} is a table ({type(x).__name__}), not an array: give a dict of its columns, such as "
            '{"x": table[features].to_numpy(), "y": table[label].to_numpy()}.'
        )
    if np.ma.is_masked(x):
        raise InvalidInput(f"{name} has masked values, which an array cannot have: fill them, as by x.filled(0).")
    try:
        array = x if isinstance(x, np.memmap) else np.asarray(x)
    except Exception as error:
        raise InvalidInput(f"{name} is a {type(x).__name__}, of which NumPy makes no array.") from error
    if array.ndim == 0 and array.dtype == object:
        raise InvalidInput(f"{name} is a {type(x).__name__}, not an array: convert it, a sparse matrix by x.toarray().")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def check_alike(data: FederatedData) -> None:
    """Refuses examples of different weights where all examples count equally.

    Args:
      data: the population for ``fc.local.private_gradient``.

    Raises:
      InvalidInput: some examples weigh more than others.
    """
    if data.weights is not None and np.any((weights := data.weights[data.weights > 0]) != weights[:1]):
        raise InvalidInput(
            "The examples have unequal weights, and private_gradient counts all equally, so it would train on another "
            "objective: give it data without weights, class weights included."
        )


def check_whole(name: str, data: FederatedData) -> None:
    """Refuses a population of which this process has opened a part."""
    if data.own is not None and not data.own.all():
        raise InvalidInput(f"{name} must be a whole population, and of this one a part is open (fc.data.parts.opened).")


def check_fields(data: FederatedData) -> None:
    """Refuses examples that a device cannot hold, or would store as other numbers.

    Without ``jax_enable_x64`` JAX stores 64-bit numbers in 32 bits: whole numbers wrap around, large ones become
    infinite. Fields of 64 bits are read once.
    """
    for name, x in data.fields().items():
        real = jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)
        if x.dtype != bool and (not real or x.dtype.itemsize > 8):
            raise InvalidInput(f"Field {name!r} holds {x.dtype}, not numbers that JAX holds: convert or drop it.")
        if x.dtype.itemsize < 8 or jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            continue
        rows = max(1, 2**20 // max(1, math.prod(x.shape[1:])))
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            with np.errstate(over="ignore"):
                kept = part.astype(f"{x.dtype.kind}4")
            lost = np.isinf(kept) & ~np.isinf(part) if x.dtype.kind == "f" else kept != part
            if lost.any():
                example = start + int(np.argwhere(lost)[0, 0])
                raise InvalidInput(
                    f"Field {name!r} holds {part[lost][0]} (example {example}), which JAX would "
                    f"keep as {kept[lost][0]} ({kept.dtype}): rescale or renumber it, or switch jax_enable_x64 on."
                )


def check_sets(name: str, sets: Any) -> None:
    """Refuses sets that are not populations by name, and values that a device cannot hold."""
    checks.kind(name, sets, Mapping, "FederatedData in a dict by name")
    for key, data in sets.items():
        checks.kind(f"{name}[{key!r}]", data, FederatedData, "a FederatedData")
        check_whole(f"{name}[{key!r}]", data)
        check_fields(data)


def text(name: Any) -> str:
    """A client's name as text."""
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)


def count_examples(examples: PyTree) -> int:
    """The leading dimension that all arrays of ``examples`` share.

    Raises:
      InvalidInput: no examples, leading dimensions that differ, a leaf that is not an array.
    """
    fields = _fields(examples)
    if single := next((name for name, x in fields.items() if np.ndim(x) == 0), None):
        raise InvalidInput(
            f"Field {single!r} is a single value: every field must be an array [examples, ...], no list."
        )
    lengths = {name: len(x) for name, x in fields.items()}
    if not lengths or 0 in lengths.values():
        raise InvalidInput("The data set is empty: it has no examples.")
    if len(set(lengths.values())) > 1:
        raise InvalidInput(f"The fields of the examples differ in length: {_pairs(lengths)}.")
    return next(iter(lengths.values()))


def _fields(examples: PyTree) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(examples)
    return {jax.tree_util.keystr(path, simple=True, separator="/") or "examples": x for path, x in leaves}


def _integers(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    array = frames.array(name, values) if frames.is_column(values) else np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise InvalidInput(f"{name} must be integers, not {array.dtype}.")
    return array.astype(np.int64)


def _pairs(mapping: Mapping[str, object]) -> str:
    return ", ".join(f"{k}: {v}" for k, v in mapping.items())
