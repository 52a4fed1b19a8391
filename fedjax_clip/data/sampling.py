"""Samplers: the clients of each round as pure functions of (seed, round), with a public or secret seed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.secret import SecretSeed
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import draws

Seed = int | SecretSeed
# These numbers separate the samplers' random streams.
_UNIFORM, _POISSON, _SIZE, _WINDOW, _AVAILABLE, _TRUNCATED, _BIN, _START, _GAP = range(9)


class Sampler(NamedTuple):
    """Chooses a cohort.

    Attributes:
      sample: ``(sizes[M], seed, round) -> ids``, client numbers; deterministic in its arguments. The seed is a whole
        number below 2^32. In a run with ``fc.train(secret=...)`` it is 32 bytes, about which cohorts must reveal
        nothing.
      replacement: whether a client may occur twice in a cohort (then clients cannot keep a state).
      scheme: its name, if ``fc.privacy`` can account for it.
      cohort_size: clients in a round, or their expected number.
      period: the fewest rounds between two of a client's, if the sampler keeps them apart.
      most: the most clients in a round, if the sampler leaves some out.

    Example:
      >>> everyone = fc.data.sampling.Sampler(lambda sizes, seed, round: np.arange(len(sizes)))
      >>> everyone.sample(np.ones(3), 0, 0).tolist()
      [0, 1, 2]
    """

    sample: Callable[[np.ndarray, Any, int], np.ndarray]
    replacement: bool = False
    scheme: str = ""
    cohort_size: float = 0
    period: int = 1
    most: int | None = None

    def draw(self, sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        """The result of ``sample``, checked: clients' numbers, all different unless ``replacement``.

        In a stream (``fc.data.stream``) a client may have no example in a round. ``sample`` then sees the other clients
        only, numbered from 0 in their order.
        """
        present = np.flatnonzero(sizes)
        if len(present) < len(sizes):
            try:
                return present[self.draw(np.asarray(sizes)[present], seed, round)] if len(present) else present
            except InvalidInput as error:
                raise InvalidInput(
                    f"In round {round} of the stream {len(present)} clients have examples. {error}"
                ) from None
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
    """``cohort_size`` clients without replacement; all sets are equally likely.

    Args:
      cohort_size: clients a round.

    Raises:
      InvalidInput: (on the first sample) a cohort larger than the population.

    Example:
      >>> fc.data.sampling.uniform(3).sample(np.ones(100), seed=0, round=7).shape
      (3,)
    """
    cohort_size = checks.count("cohort_size", cohort_size)

    def sample(sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        _check_fits(cohort_size, len(sizes))
        return draws.choose(cohort_size, len(sizes), seed, round, _UNIFORM)

    return Sampler(sample, scheme="uniform", cohort_size=cohort_size)


def poisson(cohort_size: float) -> Sampler:
    """Each client independently with probability ``cohort_size / M``, as privacy accounting assumes.

    The cohort's size varies about ``cohort_size``. A round may even be empty; then only the server optimiser's momentum
    changes the model.

    Args:
      cohort_size: expected clients in a round; need not be whole.

    Raises:
      InvalidInput: a size that is not positive; (on the first sample) one larger than the population.

    Example:
      >>> fc.data.sampling.poisson(3.5).sample(np.ones(100), seed=0, round=7).ndim
      1
    """
    checks.positive("cohort_size, of which as many are expected,", cohort_size, finite=True)

    def sample(sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        _check_fits(cohort_size, len(sizes))
        return np.flatnonzero(draws.uniform(seed, round, _POISSON, np.arange(len(sizes))) < cohort_size / len(sizes))

    return Sampler(sample, scheme="poisson", cohort_size=cohort_size)


def by_size(cohort_size: int, replacement: bool = False) -> Sampler:
    """Samples clients in proportion to their number of examples.

    With replacement and a uniform average this is the unbiased "scheme I" of Li et al. (2020, "On the
    Convergence of FedAvg on Non-IID Data"); without, it makes successive draws in proportion to size (Efraimidis and
    Spirakis 2006). Average uniformly in both cases: weighting by examples would count size twice.

    Args:
      cohort_size: clients a round.
      replacement: whether a client may occur twice in a cohort.

    Raises:
      InvalidInput: no whole number; (on the first sample) a cohort larger than the population.

    Example:
      >>> fc.data.sampling.by_size(2).sample(np.array([1, 1000, 1000]), seed=0, round=0).shape
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
      >>> fc.data.sampling.round_robin(2).sample(np.ones(3), seed=0, round=1).tolist()
      [2, 0]
    """
    cohort_size = checks.count("cohort_size", cohort_size)

    def sample(sizes: np.ndarray, seed: Seed, round: int) -> np.ndarray:
        _check_fits(cohort_size, len(sizes))
        return (round * cohort_size + np.arange(cohort_size)) % len(sizes)

    return Sampler(sample, scheme="round_robin", cohort_size=cohort_size)


def available(cohort_size: int, period: int = 24, duty: float = 0.5, windows: np.ndarray | None = None) -> Sampler:
    """Uniform among the clients whose availability window is open, like phones that charge at night.

    Args:
      cohort_size: clients in a round; all available ones, if they are fewer.
      period: rounds after which availability repeats.
      duty: fraction of the period for which a client is available; the seed decides where its window starts.
      windows: bool ``[period, M]``: which clients are available when, in place of ``period`` and ``duty``.

    Raises:
      InvalidInput: no whole number, a period or duty out of range; (on the first sample) windows of the wrong shape.

    Example:
      >>> windows = np.array([[True, False, True], [False, True, False]])  # client 1 in odd rounds, the others in even
      >>> fc.data.sampling.available(3, windows=windows).sample(np.ones(3), seed=0, round=1).tolist()
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


def cyclic_poisson(cohort_size: float, groups: int) -> Sampler:
    """Poisson samples of the groups in turn: round r draws among the clients whose number is r modulo ``groups``.

    Each of them takes part independently with probability ``cohort_size groups / M``, so all rounds have the same
    expected size. This sampling amplifies the privacy of a mechanism with no more bands than groups.

    Args:
      cohort_size: expected clients a round; need not be whole.
      groups: number of groups; for example the bands of ``fc.uplink.mechanism.banded``.

    Raises:
      InvalidInput: numbers out of range; (on the first sample) groups smaller than the cohort.

    Example:
      >>> fc.data.sampling.cyclic_poisson(5, groups=2).sample(np.ones(10), seed=0, round=1).tolist()  # all of one group
      [1, 3, 5, 7, 9]

    Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization", Algorithm 2.
    """
    checks.positive("cohort_size, of which as many are expected,", cohort_size, finite=True)
    groups = checks.count("groups", groups)

    def sample(sizes: np.ndarray, seed: int, round: int) -> np.ndarray:
        _check_apart(cohort_size, groups, len(sizes))
        ids = np.arange(round % groups, len(sizes), groups)
        return ids[draws.uniform(seed, round, _POISSON, ids) < cohort_size * groups / len(sizes)]

    return Sampler(sample, scheme="cyclic_poisson", cohort_size=cohort_size, period=groups)


def truncated_poisson(cohort_size: float, most: int) -> Sampler:
    """``poisson`` with at most ``most`` clients: a larger cohort is cut at random.

    Args:
      cohort_size: expected clients in a round, before the cut.
      most: the most clients in a round.

    Raises:
      InvalidInput: numbers out of range; (on the first sample) a cohort larger than the population.

    Example:
      >>> len(fc.data.sampling.truncated_poisson(50, most=40).sample(np.ones(100), seed=0, round=7))
      40

    Source: Chua et al. (2024), "Scalable DP-SGD: Shuffling vs. Poisson Subsampling".
    """
    most = checks.count("most", most)
    whole = poisson(cohort_size)

    def sample(sizes: np.ndarray, seed: int, round: int) -> np.ndarray:
        ids = whole.sample(sizes, seed, round)
        if len(ids) <= most:
            return ids
        return np.sort(ids[draws.choose(most, len(ids), seed, round, _TRUNCATED)])

    return Sampler(sample, scheme="truncated_poisson", cohort_size=cohort_size, most=most)


def balls_in_bins(cohort_size: int) -> Sampler:
    """Each client draws one of ``M // cohort_size`` bins once, and takes part in its bin's rounds.

    Every client takes part equally often and at equal distances, as under ``round_robin``, but nobody knows when.

    Args:
      cohort_size: expected clients in a round; a few more, if it does not divide the population.

    Raises:
      InvalidInput: no whole number; (on the first sample) a cohort larger than the population.

    Example:
      >>> rounds = [fc.data.sampling.balls_in_bins(5).sample(np.ones(10), seed=0, round=r).tolist() for r in range(3)]
      >>> sorted(rounds[0] + rounds[1]) == list(range(10)) and rounds[2] == rounds[0]
      True

    Source: Chua et al. (2024), "Balls-and-Bins Sampling for DP-SGD"; Choquette-Choo et al. (2024), "Near Exact Privacy
    Amplification for Matrix Mechanisms".
    """
    cohort_size = checks.count("cohort_size", cohort_size)

    def sample(sizes: np.ndarray, seed: int, round: int) -> np.ndarray:
        _check_fits(cohort_size, len(sizes))
        bins = len(sizes) // cohort_size
        mine = np.floor(draws.uniform(seed, _BIN, np.arange(len(sizes))) * bins)
        return np.flatnonzero(mine == round % bins)

    return Sampler(sample, scheme="balls_in_bins", cohort_size=cohort_size)


def b_min_sep(cohort_size: float, separation: int) -> Sampler:
    """A client rests ``separation - 1`` rounds after each of its rounds, then takes part independently at one rate.

    ``p = 1 / (M / cohort_size - separation + 1)``, so ``cohort_size`` clients are expected from round 0 on: the clients
    that rest in round 0 are drawn, too. A round costs ``round / separation`` draws for each client, to replay its
    schedule.

    Args:
      cohort_size: expected clients a round; need not be whole.
      separation: the fewest rounds between two of a client's.

    Raises:
      InvalidInput: numbers out of range; (on the first sample) a cohort larger than the number of awake clients.

    Example:
      >>> came = [fc.data.sampling.b_min_sep(2, separation=3).sample(np.ones(9), seed=0, round=r) for r in range(3)]
      >>> ids = np.concatenate(came)
      >>> len(np.unique(ids)) == len(ids)  # nobody twice within three rounds
      True

    Source: arXiv 2602.09338, whose sampler and accountant are jax-privacy's ``BMinSepSampling``.
    """
    checks.positive("cohort_size, of which as many are expected,", cohort_size, finite=True)
    separation = checks.count("separation", separation)

    def sample(sizes: np.ndarray, seed: int, round: int) -> np.ndarray:
        _check_apart(cohort_size, separation, len(sizes))
        clients = np.arange(len(sizes))
        p = 1 / (len(sizes) / cohort_size - separation + 1)
        resting = draws.uniform(seed, _START, clients) * (1 / p + separation - 1)  # of which each rest takes 1
        came = -separation + np.maximum(0, np.ceil(resting - 1 / p)).astype(np.int64)  # before round 0
        for turn in range(round // separation + 2):
            u = draws.uniform(seed, _GAP, turn, clients)
            wait = np.floor(np.log1p(-u) / np.log1p(-p)) if p < 1 else np.zeros(len(u))
            later = came + separation + np.minimum(wait, 2**31).astype(np.int64)
            came = np.where(came < round, later, came)
        return np.flatnonzero(came == round)

    return Sampler(sample, scheme="b_min_sep", cohort_size=cohort_size, period=separation)


def _check_apart(cohort_size: float, period: int, num_clients: int) -> None:
    if cohort_size * period > num_clients:
        raise InvalidInput(
            f"{period} rounds with {cohort_size:g} clients each, all different, need more than the {num_clients} "
            "clients there are: take a smaller cohort, or fewer rounds apart."
        )


def _check_fits(cohort_size: float, num_clients: int) -> None:
    if cohort_size > num_clients:
        raise InvalidInput(f"A cohort of {cohort_size} clients is larger than the population of {num_clients}.")
