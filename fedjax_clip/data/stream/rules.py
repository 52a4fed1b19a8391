"""Rules of a stream: when classes, clients and single examples come and go, and how their inputs drift."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput, PyTree
from fedjax_clip.data import draws
from fedjax_clip.data.lives import ENDLESS
from fedjax_clip.data.population import FederatedData, as_arrays, count_examples

_TURN, _DRIFT = 2**31 + 11, 2**31 + 12  # separate these random streams from those of samplers, clocks and speeds


def between(data: FederatedData, start: int | np.ndarray = 0, end: int | np.ndarray | None = None) -> FederatedData:
    """Examples live in the rounds ``start <= r < end`` only, and where earlier rules let them.

    All other rules are made of this one. Rules intersect, so their order does not matter, except for replay buffers.

    Args:
      data: the population.
      start: the first round, for all examples or for each, int ``[N]``. Rounds count from 0.
      end: the round after the last one, for all examples or for each; ``None`` for no end.

    Returns:
      The same population with ``lives``. An example may live in no round at all.

    Raises:
      InvalidInput: rounds that are no whole numbers of at least 0, or of another shape.

    Example:
      >>> fc.data.stream.between(data, start=np.arange(data.num_examples) % 7).lives[:3].tolist()
      [[0, 2147483647], [1, 2147483647], [2, 2147483647]]
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    bounds = []
    for name, rounds in (("start", start), ("end", ENDLESS if end is None else end)):
        given = np.asarray(rounds)
        if given.dtype.kind not in "iu" or given.shape not in ((), (data.num_examples,)) or np.any(given < 0):
            raise InvalidInput(
                f"{name} must be a round, or one for each of the {data.num_examples} examples: whole numbers of at "
                f"least 0, not {checks.shown(rounds)}."
            )
        bounds.append(np.broadcast_to(np.minimum(given.astype(np.int64), ENDLESS), data.num_examples))
    first, last = (0, ENDLESS) if data.lives is None else data.lives.T
    lives = np.stack([np.maximum(first, bounds[0]), np.minimum(last, bounds[1])], axis=1)
    return dataclasses.replace(data, lives=lives)


def classes(
    data: FederatedData,
    groups: int = 2,
    every: int = 50,
    stay: bool = False,
    over: int = 0,
    label: str = "y",
    seed: int = 0,
) -> FederatedData:
    """Classes come in groups, one group after the other: class-incremental learning.

    The classes in rising order are divided into ``groups`` of (almost) equal size. Group g comes in round ``g every``.
    When the next group comes, it leaves.

    Args:
      data: the population.
      groups: number of groups, at least 2.
      every: rounds from one group to the next.
      stay: whether groups stay when the next ones come.
      over: rounds that a change takes: each example changes at its own round, drawn evenly from this many. The mix of
        labels then changes gradually.
      label: the field that holds the classes.
      seed: of these draws.

    Raises:
      InvalidInput: no such field, or one that holds no whole numbers; more groups than classes; numbers out of range.

    Example:
      >>> stream = fc.data.stream.classes(data, groups=5, every=20)  # digits 0 and 1, then 2 and 3 ...
      >>> stream.lives[data.examples["y"] == 2][0].tolist()
      [20, 40]

    Source: Rebuffi et al. (2017), "iCaRL: Incremental Classifier and Representation Learning", section 1, for the
    setting; Zenke et al. (2017), "Continual Learning Through Synaptic Intelligence", section 5.1, for such groups.
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    labels = labels_of(data, label)
    every, over = checks.count("every", every), checks.count("over", over, 0)
    values, which = np.unique(labels, return_inverse=True)
    groups = checks.count("groups, of classes,", groups, 2, len(values))
    if over > every:
        raise InvalidInput(f"over={over} rounds of change do not fit between groups that come every={every} rounds.")
    of_class = np.repeat(np.arange(groups), [len(part) for part in np.array_split(values, groups)])
    group = of_class[which]
    late = np.zeros((2, data.num_examples), np.int64)
    if over:
        number = np.arange(data.num_examples)
        seed = checks.seed("seed", seed)
        late = np.stack([np.floor(over * draws.uniform(seed, _TURN, k, number)).astype(np.int64) for k in range(2)])
    start = np.where(group > 0, group * every + late[0], 0)
    end = np.where((group < groups - 1) & (not stay), (group + 1) * every + late[1], ENDLESS)
    return between(data, start, end)


def clients(
    data: FederatedData, which: int | Sequence[int] | Sequence[str], start: int = 0, end: int | None = None
) -> FederatedData:
    """Clients that come in round ``start`` and leave in round ``end``; all others stay as they are.

    Args:
      data: the population.
      which: how many: the last ones of the population. Or their names, or their numbers.
      start: the first round in which they take part.
      end: the round in which they are gone; ``None`` if they stay.

    Raises:
      InvalidInput: a client that the population lacks; rounds out of range.

    Example:
      >>> stream = fc.data.stream.clients(data, 10, start=100)  # the last ten come late
      >>> stream = fc.data.stream.clients(stream, [0, 1], end=120)  # and the first two leave
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    start = checks.count("start", start, 0, ENDLESS)
    end = ENDLESS if end is None else checks.count("end", end, start + 1, ENDLESS)
    if isinstance(which, int | np.integer):
        numbers = np.arange(
            data.num_clients - checks.count("which, a number of clients,", which, 1, data.num_clients), data.num_clients
        )
    else:
        numbers = np.array([_number(data, name) for name in which], np.int64)
    chosen = np.repeat(np.isin(np.arange(data.num_clients), numbers), data.sizes)
    return between(data, np.where(chosen, start, 0), np.where(chosen, end, ENDLESS))


def in_order(data: FederatedData, rounds: int, window: int | None = None) -> FederatedData:
    """Each client's examples come in their order, evenly over ``rounds``; with a ``window`` only recent ones are there.

    Example j of a client's n examples comes in round ``floor(j rounds / n)``.

    Args:
      data: the population; the order of a client's examples is that of their time.
      rounds: over which all examples come.
      window: rounds that an example stays; ``None`` if it stays for ever. With a window shorter than the pause between
        a client's examples the client is absent at times. After ``rounds + window`` rounds no example is left.

    Raises:
      InvalidInput: numbers out of range.

    Example:
      >>> fc.data.stream.in_order(fc.FederatedData({"x": np.zeros(4)}, [0, 4]), rounds=8, window=3).lives.tolist()
      [[0, 3], [2, 5], [4, 7], [6, 9]]
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    rounds = checks.count("rounds", rounds)
    place = np.arange(data.num_examples) - np.repeat(data.offsets[:-1], data.sizes)
    start = place * rounds // np.repeat(data.sizes, data.sizes)
    return between(data, start, None if window is None else start + checks.count("window", window))


def drift(
    data: FederatedData, change: Callable[[PyTree], PyTree], at: int, over: int = 1, seed: int = 0
) -> FederatedData:
    """The examples change in round ``at``: each one is replaced by its changed copy.

    The population holds both, so it has twice as many examples; each client's own come first, then their copies.

    Args:
      data: the population.
      change: ``examples -> examples``, of the same fields, shapes and types: a rotation of images, another scale of a
        column, other labels. It is called once, with all examples.
      at: the round of the change.
      over: rounds that it takes: each example changes at its own round, drawn evenly from this many.
      seed: of these draws.

    Raises:
      InvalidInput: a change of another structure, shape or type; numbers out of range.

    Example:
      >>> turned = lambda examples: {**examples, "x": np.rot90(examples["x"], axes=(1, 2))}
      >>> stream = fc.data.stream.drift(data, turned, at=30, over=20)
      >>> stream.num_examples == 2 * data.num_examples
      True

    Source: Gama et al. (2014), "A Survey on Concept Drift Adaptation", section 2.2: sudden and gradual drift.
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    at, over = checks.count("at", at, 0, ENDLESS), checks.count("over", over)
    checks.takes("change", change, 1, "the examples")
    changed = as_arrays(change(data.examples))
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), examples) for examples in (data.examples, changed)]
    if shapes[0] != shapes[1]:
        raise InvalidInput(
            "change must return examples of the same fields, shapes and types as those that it is given."
        )
    number = np.arange(data.num_examples)
    turn = at + np.floor(over * draws.uniform(checks.seed("seed", seed), _DRIFT, number)).astype(np.int64)
    owner = np.repeat(np.arange(data.num_clients), data.sizes)
    order = np.argsort(np.concatenate([owner, owner]), kind="stable")
    life = (np.zeros_like(turn), np.full_like(turn, ENDLESS)) if data.lives is None else data.lives.T
    lives = np.concatenate(
        [
            np.stack([life[0], np.minimum(life[1], turn)], axis=1),
            np.stack([np.maximum(life[0], turn), life[1]], axis=1),
        ]
    )
    return FederatedData(
        jax.tree.map(lambda x, y: np.concatenate([x, y])[order], data.examples, changed),
        2 * data.offsets,
        data.names,
        None if data.weights is None else np.tile(data.weights, 2)[order],
        lives[order],
    )


def phases(stream: FederatedData, held_out: FederatedData, label: str = "y") -> dict[int, FederatedData]:
    """Divides a held-out population by the round in which a client first has such examples.

    Such examples are those of the same client and class. For a client that never trains they are those of the class.
    What no client ever has is left out. Examples without a field of classes are divided by client alone.

    Args:
      stream: the population that trains.
      held_out: the population to divide.
      label: the field that holds the classes.

    Returns:
      ``{round: population}`` in rising order.

    Raises:
      InvalidInput: nothing that is held out ever comes.

    Example:
      >>> stream = fc.data.stream.classes(data, groups=2, every=50)
      >>> sets = {f"from_{start}": part for start, part in fc.data.stream.phases(stream, held_out).items()}
      >>> sorted(sets)
      ['from_0', 'from_50']
    """
    checks.kind("stream", stream, FederatedData, "a FederatedData")
    checks.kind("held_out", held_out, FederatedData, "a FederatedData")

    def keys(data: FederatedData) -> list[tuple[str, int]]:
        field, owner = data.fields().get(label), np.repeat(np.arange(data.num_clients), data.sizes)
        has_classes = field is not None and field.ndim == 1 and field.dtype.kind in "iu"
        of_class = field.tolist() if field is not None and has_classes else [0] * data.num_examples
        return list(zip([data.name(c) for c in owner.tolist()], of_class))

    first: dict[tuple[str, int] | int, int] = {}
    lives = (np.zeros(1, int), np.full(1, ENDLESS)) if stream.lives is None else stream.lives.T
    starts, ends = (np.broadcast_to(bound, stream.num_examples).tolist() for bound in lives)
    for (name, of_class), start, end in zip(keys(stream), starts, ends):
        for key in ((name, of_class), of_class) if start < end else ():
            first[key] = min(start, first.get(key, start))
    known = {stream.name(c) for c in range(stream.num_clients)}
    comes = np.array([first.get((n, k) if n in known else k, ENDLESS) for n, k in keys(held_out)])
    owner = np.repeat(np.arange(held_out.num_clients), held_out.sizes)
    found = {}
    for start in sorted(set(comes.tolist()) - {ENDLESS}):
        index = np.flatnonzero(comes == start)
        found[start] = held_out.take(index, np.unique(owner[index]))
    if not found:
        raise InvalidInput("No example that is held out is of a client and a class that the stream ever has.")
    return found


def labels_of(data: FederatedData, label: str) -> np.ndarray:
    """The field of classes ``[N]``, checked."""
    field = data.fields().get(label)
    if field is None:
        raise InvalidInput(f"label={label!r} is no field of the examples; they have {', '.join(data.fields())}.")
    if field.shape != (count_examples(data.examples),) or field.dtype.kind not in "iu":
        raise InvalidInput(f"Field {label!r} must hold one class for each example, a whole number.")
    return field


def _number(data: FederatedData, client: int | str) -> int:
    """The number of a client, by its name or its number."""
    if isinstance(client, str):
        if data.names is None or client not in data.names:
            raise InvalidInput(f"which: there is no client {client!r}.")
        return list(data.names).index(client)
    return checks.count("which, a client's number,", client, 0, data.num_clients - 1)
