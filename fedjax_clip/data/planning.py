"""From the numbers of a round's clients to the arrays that the devices read."""

import dataclasses
import heapq
from collections.abc import Sequence

import jax
import numpy as np

from fedjax_clip.cohort import Cohort
from fedjax_clip.data import draws
from fedjax_clip.data.population import FederatedData
from fedjax_clip.typing import ClientState, InvalidInput, PyTree


@dataclasses.dataclass(frozen=True)
class LocalWork:
    """How much a client trains in a round.

    Args:
      batch_size: examples a step; ``None`` takes all of a client's examples at once.
      epochs: passes over the client's examples; a last batch that is not full stays so.
      steps: number of local steps in place of ``epochs``: further passes, or part of one.
      shuffle: whether each pass has an order of its own, drawn from (seed, round, client, pass).
    """

    batch_size: int | None = 20
    epochs: int = 1
    steps: int | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name, value in (
            ("batch_size", self.batch_size),
            ("local_epochs", self.epochs),
            ("local_steps", self.steps),
        ):
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1
            if not whole and not (value is None and name != "local_epochs"):
                raise InvalidInput(f"{name} must be a whole number of at least 1, not {value!r}.")


def plan(
    data: FederatedData,
    ids: np.ndarray,
    work: LocalWork,
    *,
    seed: int,
    round: int,
    num_devices: int = 1,
    width: int = 1,
    population: PyTree | None = None,
    state: PyTree = ClientState((), ()),  # noqa: B008
) -> Cohort:
    """Deals clients to devices and lays their batches back to back.

    Clients go to the device with the least work, longest first (LPT), so devices finish together. What a
    client trains on is a function of (seed, round, client) alone, never of where it landed.

    Args:
      data: the population.
      ids: ``[K]`` client numbers; may be empty.
      work: batch size and local epochs or steps.
      seed: the run's seed.
      round: number of the round.
      num_devices: D, the leading axis of every array of the result.
      width: clients a device trains at once.
      population: the examples as they lie on the devices; batches are then example numbers only.
      state: pytree of ``[M, ...]`` host arrays, what all clients keep between rounds
        (``fc.training.client_states``); nothing by default.

    Returns:
      A ``Cohort`` of NumPy arrays ``[D, C, ...]`` and ``[D, T, B, ...]``.
    """
    ids = np.asarray(ids, dtype=np.int64)
    sizes = data.sizes
    batch_size = int(sizes.max()) if work.batch_size is None else work.batch_size
    per_epoch = -(-sizes[ids] // batch_size)
    num_steps = np.full(len(ids), work.steps) if work.steps is not None else work.epochs * per_epoch

    capacity = width * _round_up(-(-len(ids) // (num_devices * width)))
    device, slot = _deal(num_steps, num_devices, capacity)
    order = np.lexsort((slot, device))  # clients in the order in which their rows lie
    ids, per_epoch, num_steps, device, slot = (x[order] for x in (ids, per_epoch, num_steps, device, slot))

    ends = np.cumsum(num_steps)
    device_rows = np.bincount(device, weights=num_steps, minlength=num_devices).astype(np.int64)
    first = ends - num_steps - (np.cumsum(device_rows) - device_rows)[device]
    rows = _round_up(int(device_rows.max()))

    owner = np.repeat(np.arange(len(ids)), num_steps)
    step = np.arange(len(owner)) - np.repeat(ends - num_steps, num_steps)
    epoch, in_epoch = step // per_epoch[owner], step % per_epoch[owner]
    position = in_epoch[:, None] * batch_size + np.arange(batch_size)
    size = sizes[ids][owner][:, None]
    live = position < size
    position = np.minimum(position, size - 1)
    if work.shuffle:
        passes = -(-num_steps // per_epoch)  # of each client over its examples, the last perhaps in part
        client = np.repeat(np.arange(len(ids)), passes)
        number = np.arange(len(client)) - np.repeat(np.cumsum(passes) - passes, passes)
        order = draws.shuffles(sizes[ids][client], seed, round, ids[client], number)
        begin = np.cumsum(sizes[ids][client]) - sizes[ids][client]
        position = order[begin[(np.cumsum(passes) - passes)[owner] + epoch][:, None] + position]
    example = data.offsets[ids][owner][:, None] + position

    index = np.zeros((num_devices, rows, batch_size), np.int64)
    weight = np.zeros((num_devices, rows, batch_size), np.float32)
    target = device[owner], first[owner] + step
    index[target] = example
    weight[target] = live if data.weights is None else np.where(live, data.weights[example], 0)

    def slots(values: np.ndarray, empty: int, dtype: type) -> np.ndarray:
        out: np.ndarray = np.full((num_devices, capacity), empty, dtype)
        out[device, slot] = values
        return out

    slot_ids = slots(ids, -1, np.int32)
    return Cohort(
        ids=slot_ids,
        weight=slots(data.client_weights[ids], 0, np.float32),
        first=slots(first, 0, np.int32),
        num_steps=slots(num_steps, 0, np.int32),
        batches=index.astype(np.int32) if population is not None else jax.tree.map(lambda x: x[index], data.examples),
        example_weight=weight,
        state=jax.tree.map(lambda x: x[np.maximum(slot_ids, 0)], state),
        population=population,
        width=width,
    )


def wasted_steps(cohort: Cohort) -> float:
    """Fraction of the devices' steps in a round that train nobody.

    A device waits for the device with the most work, and a client of a chunk for the longest client of its chunk.
    """
    num_steps = np.asarray(cohort.num_steps)
    chunks = num_steps.reshape(len(num_steps), -1, cohort.width)
    busy = cohort.width * chunks.max(-1).sum(-1).max() * len(num_steps)
    return 1 - float(num_steps.sum() / busy) if busy else 0.0


def stack(cohorts: Sequence[Cohort], length: int) -> Cohort:
    """Cohorts of several rounds as one, ``[D, length, ...]``, padded to the largest and to ``length`` rounds."""

    def join(*arrays: np.ndarray) -> np.ndarray:
        num_devices, *shape = np.max([x.shape for x in arrays], axis=0)
        out = np.zeros((num_devices, length, *shape), arrays[0].dtype)
        for i, x in enumerate(arrays):
            out[:, i][tuple(slice(n) for n in x.shape)] = x
        return out

    number_from_one = [dataclasses.replace(c, ids=c.ids + 1, population=None) for c in cohorts]
    joined = jax.tree.map(join, *number_from_one)
    return dataclasses.replace(joined, ids=joined.ids - 1, population=cohorts[0].population)


def _deal(num_steps: np.ndarray, num_devices: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Longest processing time first: ``(device[K], slot[K])``, at most ``capacity`` clients a device."""
    order = np.argsort(-num_steps, kind="stable")
    device, slot = np.empty((2, len(num_steps)), np.int64)
    if num_devices == 1 or len(set(num_steps.tolist())) < 2:
        slot[order], device[order] = np.divmod(np.arange(len(num_steps)), num_devices)
        return device, slot
    heap = [(0, d, 0) for d in range(num_devices)]
    for client in order:
        load, d, used = heapq.heappop(heap)
        device[client], slot[client] = d, used
        if used + 1 < capacity:
            heapq.heappush(heap, (load + int(num_steps[client]), d, used + 1))
    return device, slot


def _round_up(rows: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few shapes, so few compilations; spare rows cost no step."""
    quantum = 1 << max(0, (max(rows, 1) - 1).bit_length() - 2)
    return quantum * -(-max(rows, 1) // quantum)
