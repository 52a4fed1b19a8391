"""Which clients take part in a round: pure functions of (seed, round), the seed being public or a secret one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedjax_clip import checks
from fedjax_clip.data import draws
from fedjax_clip.secret import SecretSeed
from fedjax_clip.typing import InvalidInput

Seed = int | SecretSeed
_UNIFORM, _POISSON, _SIZE, _WINDOW, _AVAILABLE = range(5)  # separates the samplers' streams


class Sampler(NamedTuple):
    """Chooses a cohort.

    Attributes:
      sample: ``(sizes[M], seed, round) -> ids``, client numbers; deterministic in its arguments. The seed is a whole
        number below 2^32; or 32 bytes, of which cohorts must tell nothing, in a run with ``fc.train(secret=...)``.
      replacement: whether one client may stand twice in a cohort (then clients cannot keep a state).
      scheme: its name, if ``fc.privacy`` knows what its choice of clients is worth.
      cohort_size: clients a round, or their expected number.

    Example:
      >>> everyone = Sampler(lambda sizes, seed, round: np.arange(len(sizes)))
      >>> everyone.sample(np.ones(3), 0, 0).tolist()
      [0, 1, 2]
    """

    sample: Callable[[np.ndarray, Any, int], np.ndarray]
    replacement: bool = False
    scheme: str = ""
    cohort_size: float = 0

    def draw(self, sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        """What ``sample`` gives, if it is a cohort: clients' numbers, none of them twice but with ``replacement``."""
        try:
            ids = self.sample(sizes, seed, round)
        except TypeError:
            if not isinstance(seed, SecretSeed):
                raise
            raise InvalidInput(
                "The sampler's sample(sizes, seed, round) must take 32 bytes for its seed in a run with a secret."
            ) from None
        return checks.client_numbers("The sampler's ids", ids, len(sizes), self.replacement)


def uniform(cohort_size: int) -> Sampler:
    """``cohort_size`` clients, all sets equally likely, without replacement.

    Args:
      cohort_size: clients a round.

    Raises:
      InvalidInput: (on the first sample) a cohort larger than the population.

    Example:
      >>> uniform(3).sample(np.ones(100), seed=0, round=7).shape
      (3,)
    """
    cohort_size = checks.count("cohort_size", cohort_size)

    def sample(sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        _check_fits(cohort_size, len(sizes))
        return draws.choose(cohort_size, len(sizes), seed, round, _UNIFORM)

    return Sampler(sample, scheme="uniform", cohort_size=cohort_size)


def poisson(cohort_size: float) -> Sampler:
    """Every client by itself with probability ``cohort_size / M``: what privacy accounting assumes.

    The cohort's size varies about ``cohort_size``; a round may even be empty and then changes nothing
    but the server optimiser's own momentum.

    Args:
      cohort_size: expected clients a round; need not be whole.

    Raises:
      InvalidInput: a size that is not positive; (on the first sample) one larger than the population.

    Example:
      >>> poisson(3.5).sample(np.ones(100), seed=0, round=7).ndim
      1
    """
    checks.positive("cohort_size, of which as many are expected,", cohort_size, finite=True)

    def sample(sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        _check_fits(cohort_size, len(sizes))
        return np.flatnonzero(draws.uniform(seed, round, _POISSON, np.arange(len(sizes))) < cohort_size / len(sizes))

    return Sampler(sample, scheme="poisson", cohort_size=cohort_size)


def by_size(cohort_size: int, replacement: bool = False) -> Sampler:
    """Clients in proportion to their number of examples.

    With replacement and a uniform average this is the unbiased "scheme I" of Li et al. (2020, "On the
    Convergence of FedAvg on Non-IID Data"); without, successive draws in proportion to size (Efraimidis and
    Spirakis 2006). Average uniformly in both: weighting by examples once more would count size twice.

    Args:
      cohort_size: clients a round.
      replacement: whether a client may stand twice in a cohort.

    Raises:
      InvalidInput: no whole number; (on the first sample) a cohort larger than the population.

    Example:
      >>> by_size(2).sample(np.array([1, 1000, 1000]), seed=0, round=0).shape
      (2,)
    """
    cohort_size = checks.count("cohort_size", cohort_size)

    def sample(sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        if replacement:
            u = draws.uniform(seed, round, _SIZE, np.arange(cohort_size))
            return np.searchsorted(np.cumsum(sizes), u * np.sum(sizes), side="right")
        _check_fits(cohort_size, len(sizes))
        u = draws.uniform(seed, round, _SIZE, np.arange(len(sizes)))
        keys = -np.log1p(-u) / sizes  # exponential clocks of rate `sizes`: the first to ring take part
        return np.argsort(keys, kind="stable")[:cohort_size]

    return Sampler(sample, replacement, cohort_size=cohort_size)


def round_robin(cohort_size: int) -> Sampler:
    """Clients in turn: round r takes the next ``cohort_size`` after round r - 1's.

    Args:
      cohort_size: clients a round.

    Raises:
      InvalidInput: no whole number; (on the first sample) a cohort larger than the population.

    Example:
      >>> round_robin(2).sample(np.ones(3), seed=0, round=1).tolist()
      [2, 0]
    """
    cohort_size = checks.count("cohort_size", cohort_size)

    def sample(sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        _check_fits(cohort_size, len(sizes))
        return (round * cohort_size + np.arange(cohort_size)) % len(sizes)

    return Sampler(sample, scheme="round_robin", cohort_size=cohort_size)


def available(cohort_size: int, period: int = 24, duty: float = 0.5, windows: np.ndarray | None = None) -> Sampler:
    """Uniform among the clients whose availability window is open, as with phones that charge at night.

    Args:
      cohort_size: clients a round; all that are available, if they are fewer.
      period: rounds after which availability repeats.
      duty: fraction of the period for which a client is available; where its window starts is drawn from the seed.
      windows: bool ``[period, M]``, to say who is available when in place of ``period`` and ``duty``.

    Raises:
      InvalidInput: no whole number, a period or duty out of range; (on the first sample) windows of the wrong shape.

    Example:
      >>> windows = np.array([[True, False, True], [False, True, False]])  # client 1 in odd rounds, the others in even
      >>> available(3, windows=windows).sample(np.ones(3), seed=0, round=1).tolist()
      [1]
    """
    cohort_size = checks.count("cohort_size", cohort_size)
    period = checks.count("period", period)
    checks.positive("duty", duty)
    checks.within("duty", duty, 0, 1)

    def sample(sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        num_clients = len(sizes)
        _check_fits(cohort_size, num_clients)
        if windows is None:
            start = np.floor(period * draws.uniform(seed, _WINDOW, np.arange(num_clients)))
            is_open = (round - start) % period < duty * period
        else:
            table = np.asarray(windows, dtype=bool)
            if table.ndim != 2 or table.shape[1] != num_clients:
                raise InvalidInput(f"windows must be [period, {num_clients} clients], not shape {table.shape}.")
            is_open = table[round % len(table)]
        ids = np.flatnonzero(is_open)
        return ids[draws.choose(min(cohort_size, len(ids)), len(ids), seed, round, _AVAILABLE)]

    return Sampler(sample, cohort_size=cohort_size)


def _check_fits(cohort_size: float, num_clients: int) -> None:
    if cohort_size > num_clients:
        raise InvalidInput(f"A cohort of {cohort_size} clients is larger than the population of {num_clients}.")
