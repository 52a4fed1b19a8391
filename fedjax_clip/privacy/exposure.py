"""The Gaussian mechanisms that one client meets in a run, and their epsilon."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.privacy import gaussians, renyi, replays
from fedjax_clip.privacy.participation import Separated, coefficients, sensitivities, separated, strategy_of
from fedjax_clip.uplink.mechanism import Mechanism

ACCOUNTANTS = ("auto", "rdp", "pld")
INTERVAL = 1e-3  # grid of a loss distribution, up to 100 rounds; rounding errs on the safe side
AFFORDABLE = 300.0  # a larger Renyi epsilon makes a loss distribution take too much memory
NARROWEST = 0.05  # smallest noise multiplier of a loss distribution
CHECKPOINTS = 48  # round counts with a loss distribution of their own; the others take that of the next count
REPLAYED = 12  # the same for replays, which take longer


class Exposure(NamedTuple):
    """The Gaussian mechanisms that one client meets.

    Attributes:
      counts: ``[T]`` their number after some rounds; not whole if the noise is correlated.
      scale: divisor of the noise multiplier.
      sample: the sampling of each: ``"poisson"``, ``"fixed"``, ``"truncated"``, or none.
      rate: of a Poisson sample, or the cohort's share of the clients.
      worst: ``[T]`` the counts without sampling, at the noise multiplier itself: an upper bound of the cost.
      clients: number of clients from which a sample is drawn.
      most: the most clients of a truncated sample.
      replay: ``(z, i, delta) -> epsilon`` after the i-th of the rounds, by Monte Carlo, where that gives a tighter
        bound.
    """

    counts: np.ndarray
    scale: float = 1.0
    sample: str = ""
    rate: float = 1.0
    worst: np.ndarray | None = None
    clients: int = 1
    most: int = 0
    replay: Callable[[float, int, float], float] | None = None


def exposure(
    sampler: Sampler | Separated, num_clients: int, rounds: int, mechanism: Mechanism | None, every: bool
) -> Exposure:
    """The exposure of a client in all rounds, or after each of them (``every``).

    Raises:
      InvalidInput: a sampler that cannot be accounted for.
    """
    totals = np.arange(1, rounds + 1) if every else np.array([rounds])
    checks.kind("sampler", sampler, Sampler | Separated, "one of fc.data.sampling (nobody can account for a clock)")
    if isinstance(sampler, Sampler) and sampler.cohort_size > num_clients:
        raise InvalidInput(f"A cohort of {sampler.cohort_size} clients is larger than the population of {num_clients}.")
    if mechanism is not None:
        worst = sensitivities(mechanism, sampler, num_clients, rounds)[totals - 1] ** 2
    elif (apart := separated(sampler, num_clients)) is not None:
        worst = np.array([apart.count(t) for t in totals], float)
    else:
        worst = totals.astype(float)
    if isinstance(sampler, Separated):
        return Exposure(worst)
    share = sampler.cohort_size / num_clients
    if sampler.scheme == "round_robin":
        return Exposure(np.ceil(totals * sampler.cohort_size / num_clients) if mechanism is None else worst)
    if sampler.scheme == "uniform":  # replacing a client moves the sum by 2 C
        sampled = Exposure(totals.astype(float), 2.0, "fixed", share, 4 * worst, num_clients)
        return sampled if share < 1 else Exposure(worst)
    if sampler.scheme == "poisson":
        return Exposure(totals.astype(float), 1.0, "poisson", share, worst) if share < 1 else Exposure(worst)
    if sampler.scheme == "truncated_poisson" and sampler.most is not None and mechanism is None:
        return Exposure(totals.astype(float), 1.0, "truncated", share, worst, num_clients, sampler.most)
    if sampler.scheme == "cyclic_poisson":
        return _cyclic(sampler.period, share * sampler.period, totals, mechanism, worst)
    if sampler.scheme == "balls_in_bins":
        strategy = None if mechanism is None else strategy_of(mechanism, rounds)
        replay = functools.partial(replays.balls_in_bins, strategy, num_clients // int(sampler.cohort_size))
        return Exposure(worst, replay=lambda z, i, delta: replay(z, int(totals[i]), delta))
    if sampler.scheme == "b_min_sep":
        return _rested(sampler, num_clients, totals, mechanism, worst)
    raise InvalidInput(
        "The amplification by this sampler is not known: use fc.data.sampling.poisson, uniform or round_robin."
    )


def _cyclic(groups: int, rate: float, totals: np.ndarray, mechanism: Mechanism | None, worst: np.ndarray) -> Exposure:
    """One Poisson-sampled Gaussian for each turn of all groups, if C has no more bands than there are groups."""
    if rate > 1:
        raise InvalidInput(f"{groups} groups are too many for the cohort: not so many clients are in a group.")
    strategy = np.eye(1) if mechanism is None else strategy_of(mechanism, int(totals[-1]))
    if rate == 1 or np.any(np.tril(strategy, -groups)):
        return Exposure(worst)
    scale = float(np.sqrt(np.max(np.sum(strategy**2, axis=0))))
    return Exposure(np.ceil(totals / groups), scale, "poisson", rate, worst)


def _rested(
    sampler: Sampler, num_clients: int, totals: np.ndarray, mechanism: Mechanism | None, worst: np.ndarray
) -> Exposure:
    column = np.ones(1) if mechanism is None else coefficients(strategy_of(mechanism, int(totals[-1])))
    if sampler.cohort_size * sampler.period > num_clients:
        raise InvalidInput(
            f"{sampler.period} rounds apart are too many for cohorts of {sampler.cohort_size:g} clients."
        )
    if column is None or len(column) > sampler.period:
        return Exposure(worst)
    p = 1 / (num_clients / sampler.cohort_size - sampler.period + 1)
    replay = functools.partial(replays.b_min_sep, p, sampler.period, column)
    return Exposure(worst, replay=lambda z, i, delta: replay(z, int(totals[i]), delta))


def spent(noise: float | renyi.Curve, met: Exposure, delta: float, accountant: str) -> np.ndarray:
    """``[T]`` epsilon of a client's exposure, nondecreasing.

    Args:
      noise: the noise multiplier, or a curve of noise on a grid.
      met: the client's exposure.
      delta: of the guarantee.
      accountant: ``"rdp"``, ``"pld"``, or ``"auto"``: the least valid bound.
    """
    checks.fraction("delta", delta)
    if accountant not in ACCOUNTANTS:
        raise InvalidInput(f"accountant must be 'auto', 'rdp' or 'pld', not {accountant!r}.")
    if callable(noise):
        if accountant == "pld":
            raise InvalidInput("Noise on a grid is accounted for by Renyi curves: accountant='rdp' or 'auto'.")
        return _of_curve(met.counts, renyi.ORDERS, _on_sample(noise, met), delta)
    if accountant == "pld" and met.sample == "fixed":
        raise InvalidInput("The 'pld' accountant does not know cohorts without replacement: use 'auto', or poisson.")
    if accountant == "rdp" and met.sample == "truncated":
        raise InvalidInput("The 'rdp' accountant does not know truncated samples: use 'auto' or 'pld'.")
    z = noise / met.scale
    bounds = []
    if accountant == "rdp" or (accountant == "auto" and met.sample in ("poisson", "fixed")):
        bounds.append(_of_curve(met.counts, *_renyi(met.sample, z, met.rate, met.clients), delta))
    by_renyi = bounds[0] if bounds else np.zeros(len(met.counts))
    if accountant == "rdp":
        return by_renyi
    unsampled = met.counts if met.worst is None else met.worst
    alone = {c: gaussians.exact(noise / math.sqrt(c), delta) if c else 0.0 for c in np.unique(unsampled)}
    without = np.array([alone[c] for c in unsampled])
    bounds = [*bounds, without] if accountant == "auto" or not met.sample else []
    if met.sample in ("poisson", "truncated") and z >= NARROWEST and (accountant == "pld" or by_renyi[-1] < AFFORDABLE):
        # A round's error is of the order of the interval's square, and errors add up.
        interval = INTERVAL / max(1.0, math.sqrt(met.counts[-1] / 100))
        once = _loss(met.sample, z, met.rate, met.clients, met.most, interval)
        bounds.append(
            _at_checkpoints(lambda c: once.self_compose(int(c)).get_epsilon_for_delta(delta), met.counts, CHECKPOINTS)
        )
    if met.replay is not None and accountant == "auto":
        replay, places = met.replay, np.arange(len(met.counts))
        bounds.append(_at_checkpoints(lambda i: replay(noise, int(i), delta), places, REPLAYED))
    if not bounds:
        raise InvalidInput(f"The 'pld' accountant needs a noise multiplier of at least {NARROWEST:g}: use 'auto'.")
    return np.minimum.reduce(bounds)


def _of_curve(counts: np.ndarray, orders: np.ndarray, once: np.ndarray, delta: float) -> np.ndarray:
    """Canonne, Kamath and Steinke (2020), Proposition 12: what dp-accounting computes, for all rounds at once."""
    total = counts[:, None] * once  # k rounds cost k times one round
    every = total + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    every = np.where(delta**2 + np.expm1(-total) > 0, 0, every)  # delta <= sqrt(1 - exp(-KL))
    return np.maximum(every.min(axis=1), 0)


def _on_sample(curve: renyi.Curve, met: Exposure) -> np.ndarray:
    """The cost of rounds if the server of a secure sum sees who takes part: rounds without a client are free."""
    return renyi.in_sight(curve, met.rate) if met.sample in ("poisson", "fixed") else curve(renyi.ORDERS, 1)


@functools.lru_cache(64)
def _renyi(sample: str, z: float, rate: float, clients: int) -> tuple[np.ndarray, np.ndarray]:
    """Orders and one round's Renyi divergences, capped by those without sampling, since they are quasi-convex."""
    gaussian = dp_accounting.GaussianDpEvent(z)
    event, neighbours = gaussian, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if sample == "poisson":
        event = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    elif sample == "fixed":
        event = dp_accounting.SampledWithoutReplacementDpEvent(clients, round(rate * clients), gaussian)
        neighbours = dp_accounting.NeighboringRelation.REPLACE_ONE
    with _silent():
        accountant = rdp.RdpAccountant(neighboring_relation=neighbours).compose(event)
    orders = np.asarray(accountant.orders, float)
    return orders, np.minimum(np.asarray(accountant.rdp, float), orders / (2 * z**2))


@functools.lru_cache(8)
def _loss(sample: str, z: float, rate: float, clients: int, most: int, interval: float) -> Any:
    """One round's distribution of privacy losses."""
    make = pld.privacy_loss_distribution
    if sample == "truncated":
        return make.from_truncated_subsampled_gaussian_mechanism(
            clients, rate, most, z, value_discretization_interval=interval
        )
    return make.from_gaussian_mechanism(z, sampling_prob=rate, value_discretization_interval=interval)


def _at_checkpoints(compute: Callable[[float], float], counts: np.ndarray, most: int) -> np.ndarray:
    """The function at each count, or at the next checkpoint, which is an upper bound because it never falls."""
    distinct = np.unique(counts)
    places = np.unique(np.geomspace(1, len(distinct), most).round().astype(int)) - 1 if len(distinct) > 1 else [0]
    chosen = distinct[places]
    values = np.maximum.accumulate([compute(c) for c in chosen])
    return values[np.searchsorted(chosen, counts)]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silences the warnings for orders whose series does not converge: the bounds of other orders hold."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
