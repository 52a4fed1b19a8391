"""Plans the cohorts of rounds: which clients take part, and the shapes in which they go to the devices."""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.loops import Buckets, Loops
from fedjax_clip.core.resident import Resident
from fedjax_clip.core.secret import Secret
from fedjax_clip.data import lives
from fedjax_clip.data.clock import Clock, Timeline, Turn, World
from fedjax_clip.data.planning import LocalWork, most_rows, plan_rounds, wasted_steps
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.training import placement
from fedjax_clip.training.processes import Processes

RESIDENT_BYTES = 2**29  # populations up to this size live on every CPU device; on others, see ``room``
LONGEST = 64  # rounds in a block at most, by default
PLAN_BYTES = 2**20  # a block's example numbers take no more bytes than this
LAUNCHES = {"gpu"}  # platforms that start a kernel for each operation, so that loops of known length pay
MOST_LAYOUTS = 2  # of loops of known length in a run; each is compiled
BLOCK_SECONDS = 0.1  # a block takes no longer: so metrics and a stop come in time


class Block(NamedTuple):
    """Planned rounds: everybody's client numbers ``[D, R, C]`` and columns ``[R]`` on the host, cohorts on the devices.

    Each process plans all rounds, and lays out what its own devices read.
    """

    rounds: range
    ids: np.ndarray
    columns: dict[str, np.ndarray]
    cohorts: Cohort


class Planner:
    """Samples the cohorts of a run's rounds, and plans blocks of them.

    Args:
      data, sampler, work, devices, seed: of the run.
      length: the most rounds in a block; by default as many as take 0.1 seconds at the pace of earlier rounds.
      non_finite: see ``Cohort``.
      secret: the source of noise and cohorts in place of the seed.
      beside: bytes of a device's memory that the run takes for other arrays, such as the model; see ``room``.

    Attributes:
      processes: those that drive the devices.
      homes: the processes that have the clients' examples ``[M]``, and those of the devices ``[D]``; ``None`` if all
        have all.
      turns: the clients of each round.
      resident: whether the population lives on the devices; blocks are then example numbers only.
      length: the most rounds in a block.
      seconds: of the fastest round so far.
      width: clients that a device trains at once, for all blocks planned from now on.
      least: slots and rows of the last plan; later plans have no fewer, so that few shapes are compiled.
    """

    def __init__(
        self,
        data: FederatedData,
        sampler: Sampler | Clock,
        work: LocalWork,
        devices: Sequence[jax.Device],
        seed: int,
        length: int | None = None,
        non_finite: str = "drop",
        secret: Secret | None = None,
        beside: int = 0,
    ):
        self.data, self.work, self.devices, self.seed, self.non_finite = data, work, devices, seed, non_finite
        self.processes = Processes(devices)
        self.homes = None if data.own is None else self.processes.homes(data.own)
        hidden = None if secret is None else secret.seed()
        self.turns = Timeline(
            sampler,
            World(data.sizes, lambda ids: work.duration(ids, data.sizes, seed), seed, hidden, lives.sizes_of(data)),
        )
        self.words = None if secret is None else secret.words()
        self.on_cpu, self.launches = devices[0].platform == "cpu", devices[0].platform in LAUNCHES
        self._layouts: dict[int, list[Buckets | None]] = {}  # of loops of known length, by width, as they were found
        own = devices[self.processes.own[0]]
        takes, free = Resident.nbytes(data.examples, own.platform), room(own, beside)
        self.resident = not self.processes.any(takes > free or data.own is not None)
        if not (self.resident or self.on_cpu or data.own is not None):
            warnings.warn(
                f"The examples would take {takes / 2**30:.1f} GiB of a device's memory, and {free / 2**30:.1f} GiB are "
                "free for them: the host packs each round's examples and sends them, which may be slower.",
                stacklevel=2,
            )
        rows = Resident.of(data.examples, devices[0].platform) if self.resident else None
        self.population = placement.replicate(rows, devices)
        self.width, self.least, self.seconds = 1, (0, 0), math.inf
        if data.lives is not None:
            self.least = (0, most_rows(data, work, len(self.turns[0].ids), seed, len(devices)))
        self.fixed, self.length = length is not None, 1
        if self.resident:
            self.length = self._longest() if length is None else length

    def first_of(self, rounds: range, *every: int) -> range:
        """The next block of these rounds, which ends at the first multiple of ``every`` (if not 0)."""
        length = self.length if self.fixed else min(self.length, max(1, int(BLOCK_SECONDS / self.seconds)))
        due = [rounds.start + e - rounds.start % e for e in every if e]
        return range(rounds.start, min(rounds.start + length, rounds.stop, *due))

    def took(self, seconds: float) -> None:
        """Learns the pace, from the time that a round took; the slowest process counts."""
        if not self.fixed and self.length > 1:
            self.seconds = min(self.seconds, self.processes.most(seconds))

    def plan(self, rounds: range) -> Block:
        """These rounds, on the devices or on their way."""
        found = self._layouts.setdefault(self.width, [()])
        known = found[-1] if None not in found and len(found) <= MOST_LAYOUTS else None
        block = self._block(rounds, [self.turns[r] for r in rounds], known)
        if block.cohorts.loops.buckets not in found:
            found.append(block.cohorts.loops.buckets)
        return block

    def everyone(self) -> Iterator[Block]:
        """All clients in cohorts as large as the first round's, for an algorithm's ``start``."""
        size = max(1, len(self.turns[0].ids))
        for first in range(0, self.data.num_clients, size):
            ids = np.arange(first, min(first + size, self.data.num_clients))
            yield self._block(range(1), [Turn(ids, None, {})])

    def _block(self, rounds: range, turns: Sequence[Turn], known: Buckets | None = None) -> Block:
        cohorts = self._cohorts(turns, rounds.start, known)
        self.least = cohorts.ids.shape[-1], cohorts.example_weight.shape[2]
        ids = np.asarray(cohorts.ids)
        columns = {name: np.array([turn.metrics[name] for turn in turns]) for name in turns[0].metrics}
        columns["wasted_steps"] = wasted_steps(cohorts)
        if self.processes.count > 1:
            cohorts = self._own(cohorts)
        # A single CPU device takes the numbers with the call itself.
        if not (self.on_cpu and self.resident and len(self.devices) == 1):
            cohorts = placement.split(cohorts, self.devices)
        return Block(rounds, ids, columns, cohorts)

    def _cohorts(self, turns: Sequence[Turn], first_round: int, known: Buckets | None = None) -> Cohort:
        # The length of the loop over rounds is known if all blocks are meant to be as long as this one.
        whole = len(turns) == self.length and (self.fixed or self.length == 1)
        planned = plan_rounds(
            self.data,
            [turn.ids for turn in turns],
            self.work,
            seed=self.seed,
            first_round=first_round,
            length=self.length,
            least=self.least,
            num_devices=len(self.devices),
            width=self.width,
            population=self.population,
            staleness=[turn.staleness for turn in turns if turn.staleness is not None] or None,
            loops=Loops(packed=True, buckets=known, whole=whole) if self.launches else Loops(),
            only=self.processes.own,
            homes=self.homes,
        )
        secret = None if self.words is None else np.tile(self.words, (len(self.devices), self.length, 1))
        return dataclasses.replace(planned, non_finite=self.non_finite, secret=secret)

    def _own(self, cohorts: Cohort) -> Cohort:
        """What this process's devices read. Their batches are planned alone already."""
        planned: dict[str, Any] = {name: getattr(cohorts, name) for name in ("batches", "example_weight", "population")}
        nothing: dict[str, Any] = dict.fromkeys(planned)
        slots = jax.tree.map(lambda x: x[self.processes.own], dataclasses.replace(cohorts, **nothing))
        return dataclasses.replace(slots, **planned)

    def _longest(self) -> int:
        cohort = self._cohorts([self.turns[0]], 0)
        return min(LONGEST, max(1, PLAN_BYTES // (cohort.batches.nbytes + cohort.example_weight.nbytes)))


def room(device: jax.Device, beside: int = 0) -> int:
    """Bytes of a device's memory that a population may take: half of what is free once the run has ``beside`` more.

    A resident population takes its rows and no more: programs gather from them and copy none (``core/resident.py``).
    The other half is for batches, activations, messages and the clients' states.
    """
    if device.platform == "cpu":
        return RESIDENT_BYTES
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 2 * RESIDENT_BYTES + beside) - stats.get("bytes_in_use", 0)
    return max(0, free - beside) // 2
