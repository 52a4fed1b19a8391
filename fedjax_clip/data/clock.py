"""A simulated clock: which clients answer in a round, how stale their answers are, and the time.

The host computes it from (seed, round, client), for the sampled clients only. A round costs the same in a population of
a million clients as in one of a thousand.
"""

import heapq
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.secret import SecretSeed
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import draws
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.data.speeds import Speeds

_LOST = 2**31 + 3  # separates this random stream from those of samplers and speeds
_TRIES = 1000  # consecutive draws with busy clients only, before the clock gives up


class World(NamedTuple):
    """What a clock knows of the run.

    Attributes:
      sizes: numbers of examples ``[M]``.
      num_steps: ``ids[K] -> local steps [K]``, in steps of a full batch.
      seed: of speeds and dropouts; also of cohorts, unless there is a secret.
      secret: the source of cohorts in place of the seed.
      sizes_in: ``round -> sizes [M]`` in a stream (``fc.data.stream``), where they change.

    Example:
      >>> world = fc.data.clock.World(np.array([10, 30]), lambda ids: np.array([1, 3])[ids], seed=0)
    """

    sizes: np.ndarray
    num_steps: Callable[[np.ndarray], np.ndarray]
    seed: int
    secret: SecretSeed | None = None
    sizes_in: Callable[[int], np.ndarray] | None = None

    def drawn(self, sampler: Sampler, round: int) -> np.ndarray:
        """The sampler's clients of a round."""
        sizes = self.sizes if self.sizes_in is None else self.sizes_in(round)
        return sampler.draw(sizes, self.seed if self.secret is None else self.secret, round)


class Turn(NamedTuple):
    """One round of a clock.

    Attributes:
      ids: ``[K]`` clients whose updates the server receives.
      staleness: ``[K]`` rounds since each was sent its parameters; ``None`` if no client is stale.
      metrics: the clock's columns of the round's row.

    Example:
      >>> fc.data.clock.Turn(np.array([3, 1]), None, {"simulated_seconds": 2.0}).ids.tolist()
      [3, 1]
    """

    ids: np.ndarray
    staleness: np.ndarray | None
    metrics: dict[str, float]


class Clock(NamedTuple):
    """Chooses the clients of each round and its time; it takes the place of a ``Sampler``.

    Attributes:
      init: the state before round 0.
      turn: ``(world, state, round) -> (turn, state)``, a pure function, called round by round.
      replacement: whether a client may occur twice in a cohort (then clients cannot keep a state).

    Example:
      >>> def turn(world, state, round):  # everybody, and a round takes a second
      ...   return fc.data.clock.Turn(np.arange(len(world.sizes)), None, {"simulated_seconds": 1.0 + round}), state
      >>> result = fc.train(algorithm, data, params, rounds=1, sampler=fc.data.clock.Clock(None, turn))
    """

    init: Any
    turn: Callable[[World, Any, int], tuple[Turn, Any]]
    replacement: bool = False


def synchronous(
    sampler: Sampler,
    speeds: Speeds,
    *,
    keep: int | None = None,
    deadline: float = math.inf,
    dropout: float = 0.0,
) -> Clock:
    """Synchronous rounds: the server waits until ``keep`` clients have answered, or for ``deadline`` seconds.

    Later answers are discarded. Without ``keep`` and ``deadline`` the slowest client sets the time of a round. Metrics:
    ``simulated_seconds`` (since the run began), ``late`` (clients whose answers came too late) and ``lost`` (clients
    that dropped out).

    Args:
      sampler: the clients that the server asks. Ask more than it keeps (over-selection):
        ``fc.data.sampling.uniform(13)`` for ``keep=10``.
      speeds: how fast they are.
      keep: number of answers that end the round.
      deadline: seconds after which a round ends in any case, even without an answer.
      dropout: probability that a sampled client never answers, independent in each round. The server notices when the
        answer would have been due.

    Raises:
      InvalidInput: numbers out of range.

    Example:
      >>> speeds = fc.data.speeds.measured(np.array([5.0, 1.0, 9.0, 2.0]))
      >>> clock = fc.data.clock.synchronous(fc.data.sampling.round_robin(4), speeds, keep=2)
      >>> fc.data.clock.Timeline(clock, fc.data.clock.World(np.ones(4), np.ones_like, seed=0))[0]
      Turn(ids=array([1, 3]), staleness=None, metrics={'simulated_seconds': 2.0, 'late': 2.0, 'lost': 0.0})

    Source: Bonawitz et al. (2019), "Towards Federated Learning at Scale", section 2.2.
    """
    if keep is not None:
        keep = checks.count("keep", keep)
    _check(sampler, speeds, dropout)
    checks.positive("deadline, in seconds,", deadline)

    def turn(world: World, now: float, round: int) -> tuple[Turn, float]:
        ids = world.drawn(sampler, round)
        due, lost = _answers(world, speeds, ids, dropout, round)
        order = np.argsort(due, kind="stable")
        arrived = order[(due <= deadline)[order] & ~lost[order]]
        if keep is not None and len(arrived) >= keep:
            arrived = arrived[:keep]
            seconds = due[arrived[-1]]
        else:
            seconds = min(np.max(due, initial=0.0), deadline)
        now += float(seconds)
        out = float(np.sum(lost))
        metrics = {"simulated_seconds": now, "late": len(ids) - len(arrived) - out, "lost": out}
        return Turn(ids[arrived], None, metrics), now

    return Clock(0.0, turn, sampler.replacement)


class _Flight(NamedTuple):
    """Clients at work, as a heap of (due, number, client, round of its parameters, lost); and the next to ask."""

    now: float = 0.0
    started: int = 0
    draws: int = 0
    at_work: tuple[tuple[float, int, int, int, bool], ...] = ()
    next: tuple[tuple[int, float, bool], ...] = ()


def buffered(sampler: Sampler, speeds: Speeds, *, buffer_size: int, concurrency: int, dropout: float = 0.0) -> Clock:
    """Asynchronous rounds: ``concurrency`` clients always work, and the server takes a step at every K-th answer.

    When a client answers, another one is sent the current parameters. A client's staleness is the number of server
    steps between its start and its answer. Simultaneous answers are received before new parameters are sent, so with
    equal speeds and ``concurrency == buffer_size`` it is ``synchronous``. Metrics: ``simulated_seconds`` and ``lost``.

    Args:
      sampler: the clients to ask next. The clock goes through its cohorts in order and skips clients that are at work
        or have an answer in the buffer. Its "rounds" are these draws.
      speeds: how fast they are.
      buffer_size: K, answers for one server step: the cohort.
      concurrency: clients at work at a time, at least ``buffer_size``. The population needs ``concurrency + buffer_size
        - 1`` clients, so that one is always free.
      dropout: probability that a client never answers; the server asks another one when the answer would have been due.

    Raises:
      InvalidInput: numbers out of range, a buffer that cannot fill; (in a run) a population that is too small, or a
        sampler that never draws a free client.

    Example:
      >>> speeds = fc.data.speeds.measured(np.array([1.0, 3.0, 1.0]))
      >>> clock = fc.data.clock.buffered(fc.data.sampling.round_robin(1), speeds, buffer_size=1, concurrency=2)
      >>> timeline = fc.data.clock.Timeline(clock, fc.data.clock.World(np.ones(3), np.ones_like, seed=0))
      >>> for round in range(4):
      ...     print(timeline[round].ids, timeline[round].staleness, timeline[round].metrics["simulated_seconds"])
      [0] [0] 1.0
      [2] [0] 2.0
      [1] [2] 3.0
      [0] [1] 3.0

    Source: Nguyen et al. (2022), "Federated Learning with Buffered Asynchronous Aggregation", Algorithm 1.
    """
    buffer_size = checks.count("buffer_size", buffer_size)
    concurrency = checks.count("concurrency", concurrency)
    _check(sampler, speeds, dropout)
    if concurrency < buffer_size:
        raise InvalidInput(f"{concurrency} clients at work cannot fill a buffer of {buffer_size}.")

    def turn(world: World, flight: _Flight, round: int) -> tuple[Turn, _Flight]:
        now, started, drawn, at_work, queue = (
            flight.now,
            flight.started,
            flight.draws,
            [*flight.at_work],
            [*flight.next],
        )
        if concurrency + buffer_size - 1 > len(world.sizes):
            raise InvalidInput(
                f"{concurrency} clients at work and a buffer of {buffer_size} need a population of "
                f"{concurrency + buffer_size - 1} clients at least, not {len(world.sizes)}."
            )
        busy = {client for _, _, client, _, _ in at_work}
        answers: list[tuple[int, int]] = []
        lost = tries = 0
        while len(answers) < buffer_size:
            while len(at_work) < concurrency:
                if not queue:
                    if tries == _TRIES:
                        raise InvalidInput(f"The sampler named no client that is free in {_TRIES} draws.")
                    ids = world.drawn(sampler, drawn)
                    columns = (ids, *_answers(world, speeds, ids, dropout, drawn))
                    queue = list(zip(*(x.tolist() for x in columns), strict=True))[::-1]
                    drawn, tries = drawn + 1, tries + 1
                    continue
                client, seconds, fails = queue.pop()
                if client not in busy:
                    heapq.heappush(at_work, (now + seconds, started, client, round, fails))
                    busy.add(client)
                    started, tries = started + 1, 0
            now = at_work[0][0]
            while at_work and at_work[0][0] == now and len(answers) < buffer_size:
                _, _, client, sent, fails = heapq.heappop(at_work)
                if fails:
                    busy.discard(client)
                    lost += 1
                else:
                    answers.append((client, round - sent))
        ids, staleness = np.array(answers).T
        after = _Flight(now, started, drawn, tuple(at_work), tuple(queue))
        return Turn(ids, staleness, {"simulated_seconds": now, "lost": float(lost)}), after

    return Clock(_Flight(), turn)


class Timeline:
    """The turns of a run, in order. For an earlier turn it starts again and gives the same turns.

    Args:
      sampler: a ``Sampler``, or a ``Clock``.
      world: what the sampler or clock knows of the run.

    Example:
      >>> world = fc.data.clock.World(np.ones(3), np.ones_like, seed=0)
      >>> timeline = fc.data.clock.Timeline(fc.data.sampling.round_robin(2), world)
      >>> timeline[1].ids.tolist()
      [2, 0]
    """

    def __init__(self, sampler: Sampler | Clock, world: World):
        self.sampler, self.world = sampler, world
        self._done, self._state = 0, sampler.init if isinstance(sampler, Clock) else None
        self._last = Turn(np.zeros(0, np.int64), None, {})

    def __getitem__(self, round: int) -> Turn:
        if isinstance(self.sampler, Sampler):
            return Turn(self.world.drawn(self.sampler, round), None, {})
        if round < self._done - 1:
            self._done, self._state = 0, self.sampler.init
        while self._done <= round:
            turn, self._state = self.sampler.turn(self.world, self._state, self._done)
            ids = checks.client_numbers("The clock's ids", turn.ids, len(self.world.sizes), self.sampler.replacement)
            stale = turn.staleness
            if stale is not None:
                stale = checks.counts("The clock's staleness", stale, len(ids), 0)
            self._last = Turn(ids, stale, turn.metrics)
            self._done += 1
        return self._last


def _answers(world: World, speeds: Speeds, ids: np.ndarray, dropout: float, *words: int) -> tuple[np.ndarray, ...]:
    """Seconds from asking these clients to their answers, and which of them never answer."""
    step, message = speeds.seconds(ids, world.seed)
    seconds = world.num_steps(ids) * step + message
    return seconds, draws.uniform(world.seed, *words, _LOST, ids) < dropout


def _check(sampler: Sampler, speeds: Speeds, dropout: float) -> None:
    checks.kind("sampler", sampler, Sampler, "one of fc.data.sampling, such as fc.data.sampling.uniform(10)")
    checks.kind("speeds", speeds, Speeds, "speeds such as fc.data.speeds.lognormal()")
    checks.fraction("dropout, a probability,", dropout, zero=True)
