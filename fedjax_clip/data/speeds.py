"""Speeds of clients: constant seconds per local step and per message for each client."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import draws

_STEP, _MESSAGE, _TIER = range(2**31, 2**31 + 3)  # separates the random streams; no round has these numbers


class BatchSizes(NamedTuple):
    """Each client's own batch size.

    Attributes:
      of: ``(ids[K], seed) -> batch sizes [K]``, from 1 to ``most``.
      most: the largest size; all batches have its shape.

    Example:
      >>> sizes = fc.data.speeds.BatchSizes(lambda ids, seed: 1 + ids % 20, most=20)
      >>> result = fc.train(algorithm, data, params, rounds=1, cohort_size=5, batch_size=sizes)
    """

    of: Callable[[np.ndarray, int], np.ndarray]
    most: int


class Speeds(NamedTuple):
    """The speeds of clients.

    Attributes:
      seconds: ``(ids[K], seed) -> (seconds a local step [K], seconds a message [K])``. A message is all that a client
        does in a round besides its steps: it receives the parameters and sends its update.

    Example:
      >>> alike = fc.data.speeds.Speeds(lambda ids, seed: (np.ones(len(ids)), np.zeros(len(ids))))
    """

    seconds: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def lognormal(step: float = 1.0, message: float = 0.0, sigma: float = 1.0) -> Speeds:
    """``median * exp(sigma * z)`` seconds with z standard normal, for steps and messages independently.

    Args:
      step: median of the seconds a local step.
      message: median of the seconds a message.
      sigma: 0 makes all clients equal; with 1, one client in a hundred is over ten times slower than the median.

    Raises:
      InvalidInput: seconds that are not positive, or a negative sigma.

    Example:
      >>> fc.data.speeds.lognormal(2.0, sigma=0.0).seconds(np.array([4, 7]), 0)[0].tolist()
      [2.0, 2.0]
    """
    _check_seconds(step=step, message=message)
    checks.within("sigma", sigma, 0, finite=True)

    def one(median: float, seed: int, stream: int, ids: np.ndarray) -> np.ndarray:
        u, v = (draws.uniform(seed, stream, i, ids) for i in range(2))
        return median * np.exp(sigma * np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v))  # Box and Muller

    return Speeds(lambda ids, seed: (one(step, seed, _STEP, ids), one(message, seed, _MESSAGE, ids)))


def two_tier(step: float = 1.0, message: float = 0.0, slowdown: float = 5.0, slow: float = 0.3) -> Speeds:
    """Each client is slow with probability ``slow``, and then takes ``slowdown`` times as long for everything.

    Args:
      step: seconds for a local step of a fast client.
      message: seconds for a message of a fast client.
      slowdown: at least 1.
      slow: between 0 and 1.

    Raises:
      InvalidInput: numbers out of these ranges.

    Example:
      >>> fc.data.speeds.two_tier(slow=1.0).seconds(np.array([3]), 0)[0].tolist()
      [5.0]
    """
    _check_seconds(step=step, message=message)
    checks.within("slowdown", slowdown, 1, finite=True)
    checks.within("slow", slow, 0, 1)

    def seconds(ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        factor = np.where(draws.uniform(seed, _TIER, ids) < slow, slowdown, 1.0)
        return step * factor, message * factor

    return Speeds(seconds)


def measured(step: np.ndarray, message: np.ndarray | float = 0.0) -> Speeds:
    """Measured seconds: ``step[M]`` and ``message[M]``, or one ``message`` for all clients.

    Raises:
      InvalidInput: arrays of other shapes, seconds out of range, or (in a run) a client beyond M.

    Example:
      >>> fc.data.speeds.measured(np.array([1.0, 2.5])).seconds(np.array([1]), 0)
      (array([2.5]), array([0.]))
    """
    step = np.asarray(step, np.float64)
    if step.ndim != 1 or np.shape(message) not in ((), step.shape):
        raise InvalidInput(
            f"step must be [M clients] and message too, or a number: not {step.shape}, {np.shape(message)}."
        )
    message = np.broadcast_to(np.asarray(message, np.float64), step.shape)
    if not (np.all(np.isfinite(step) & (step > 0)) and np.all(np.isfinite(message) & (message >= 0))):
        raise InvalidInput("Seconds a step must be positive and finite, seconds a message not negative.")

    def seconds(ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        if np.max(ids, initial=-1) >= len(step):
            raise InvalidInput(f"Seconds are measured for {len(step)} clients; there is none for client {np.max(ids)}.")
        return step[ids], message[ids]

    return Speeds(seconds)


def budget(speeds: Speeds, seconds: float, most: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Local steps that fit into ``seconds``: ``clip(floor((seconds - message_c) / step_c), 1, most)``.

    For ``local_steps`` of ``fc.train`` and ``fc.extend.LocalWork``. Under FedAvg fast clients then weigh more;
    ``fc.fednova`` corrects this.

    Args:
      speeds: how fast clients are.
      seconds: time of a client for its round, message included.
      most: the most local steps.

    Returns:
      ``(ids[K], seed) -> steps[K]``.

    Raises:
      InvalidInput: ``seconds`` or ``most`` out of range.

    Example:
      >>> speeds = fc.data.speeds.measured(np.array([0.5, 3.0, 20.0]))
      >>> fc.data.speeds.budget(speeds, seconds=10, most=15)(np.arange(3), 0).tolist()
      [15, 3, 1]

    Source: the variable numbers of local steps of Wang et al. (2020), "Tackling the Objective Inconsistency Problem".
    """
    checks.kind("speeds", speeds, Speeds, "speeds such as fc.data.speeds.lognormal()")
    _check_seconds(step=seconds)
    most = checks.count("most", most)

    def steps(ids: np.ndarray, seed: int) -> np.ndarray:
        step, message = speeds.seconds(ids, seed)
        return np.clip(np.floor((seconds - message) / step), 1, most).astype(np.int64)

    return steps


def batch_budget(speeds: Speeds, seconds: float, most: int) -> BatchSizes:
    """Examples a local step that fit into ``seconds``: ``clip(floor(most * seconds / step_c), 1, most)``.

    For ``batch_size`` of ``fc.train`` and ``fc.extend.LocalWork``; ``step_c`` is what client c takes for a step of
    ``most``
    examples. Slow clients then take more and cheaper steps in an epoch, or with ``local_steps`` as many cheaper ones.

    Args:
      speeds: how fast clients are; messages do not count.
      seconds: time for a local step.
      most: the largest batch.

    Raises:
      InvalidInput: ``seconds`` or ``most`` out of range.

    Example:
      >>> speeds = fc.data.speeds.measured(np.array([0.5, 3.0, 80.0]))
      >>> fc.data.speeds.batch_budget(speeds, seconds=1, most=20).of(np.arange(3), 0).tolist()
      [20, 6, 1]
    """
    checks.kind("speeds", speeds, Speeds, "speeds such as fc.data.speeds.lognormal()")
    _check_seconds(step=seconds)
    most = checks.count("most", most)

    def sizes(ids: np.ndarray, seed: int) -> np.ndarray:
        return np.clip(np.floor(most * seconds / speeds.seconds(ids, seed)[0]), 1, most).astype(np.int64)

    return BatchSizes(sizes, most)


def _check_seconds(*, step: float, message: float = 0.0) -> None:
    checks.positive("Seconds a step", step, finite=True)
    checks.within("Seconds a message", message, 0, finite=True)
