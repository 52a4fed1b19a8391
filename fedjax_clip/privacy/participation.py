"""Participation of clients in rounds, and the resulting sensitivity of correlated noise."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.uplink.mechanism import Mechanism


class Separated(NamedTuple):
    """A deployment's promise on participation, in place of a sampler; timers on the devices may keep it, for example.

    Attributes:
      rounds: the fewest rounds between two of a client's; 1 allows every round.
      most: how often a client takes part at most; by default as often as the separation allows.

    Example:
      >>> tree = fc.uplink.mechanism.tree(200)
      >>> fc.privacy.epsilon(7.0, fc.privacy.Separated(rounds=30, most=6), 10**6, 200, 1e-10, mechanism=tree)

    Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization", b-min-sep participation.
    """

    rounds: int
    most: int | None = None

    def count(self, total: int) -> int:
        """How often a client can take part in ``rounds`` rounds."""
        checks.count("Separated: rounds", self.rounds)
        if self.most is not None:
            checks.count("Separated: most", self.most)
        possible = math.ceil(total / self.rounds)
        return possible if self.most is None else min(possible, self.most)


def separated(sampler: Sampler | Separated, num_clients: int) -> Separated | None:
    """The sampler's promise on one client's rounds, if it keeps them apart."""
    if isinstance(sampler, Separated):
        return sampler
    if sampler.scheme == "balls_in_bins":
        return Separated(num_clients // int(sampler.cohort_size))
    return Separated(sampler.period) if sampler.period > 1 else None


def sensitivities(mechanism: Mechanism, sampler: Sampler | Separated, num_clients: int, rounds: int) -> np.ndarray:
    """``[rounds]`` sensitivity of ``C x`` to one client in 1, 2, ... rounds, in units of the clip's bound.

    ``max_i ||(C u_i)[:t]||`` with u_i 1 in client i's rounds and 0 elsewhere, because C has no negative entry. For k
    rounds of independent noise it is sqrt(k). For ``Separated`` and samplers that keep a client's rounds apart, it is
    exact in two cases: C is a Toeplitz matrix with decreasing coefficients (the worst client starts at once and never
    waits longer than it must), or C has no more bands than the separation. Otherwise every round gets jax-privacy's
    bound for all rounds.

    Args:
      mechanism: of ``fc.uplink.mechanism``.
      sampler: ``fc.data.sampling.round_robin``, ``Separated``, or a sampler that takes all clients or keeps a client's
        rounds apart.
      num_clients: clients in the population.
      rounds: rounds of the run.

    Raises:
      InvalidInput: a sampler that may draw a client in any round; a strategy with negative entries.

    Example:
      >>> tree, sampler = fc.uplink.mechanism.tree(4), fc.data.sampling.round_robin(10)
      >>> fc.privacy.sensitivities(tree, sampler, num_clients=40, rounds=4) ** 2
      array([1., 2., 2., 3.])

    Source: Denisov et al. (2022), "Improved Differential Privacy for SGD via Optimal Private Linear Operators on
    Adaptive Streams"; Choquette-Choo et al. (2023), "Multi-Epoch Matrix Factorization Mechanisms", equation 4, and
    "(Amplified) Banded Matrix Factorization", Algorithms 3 and 4; Kalinin and Lampert (2024), "Banded Square Root
    Matrix Factorization", Theorem 2, for decreasing coefficients.
    """
    checks.kind("sampler", sampler, Sampler | Separated, "one of fc.data.sampling (nobody can account for a clock)")
    if isinstance(sampler, Sampler) and sampler.cohort_size > num_clients:
        raise InvalidInput(f"A cohort of {sampler.cohort_size} clients is larger than the population of {num_clients}.")
    if (apart := separated(sampler, num_clients)) is not None:
        return _separated(strategy_of(mechanism, rounds), apart, rounds)
    cohort = sampler.cohort_size  # type: ignore[union-attr]
    if sampler.scheme != "round_robin" and not (sampler.scheme and cohort == num_clients):  # type: ignore[union-attr]
        raise InvalidInput(
            "Correlated noise needs to know in which rounds a client may take part, and this sampler may draw it in "
            "any: use fc.data.sampling.round_robin, or cyclic_poisson for bands, or give the noise no mechanism."
        )
    strategy = strategy_of(mechanism, rounds)
    same = math.gcd(int(cohort), num_clients)  # consecutive clients that always take part together
    first = np.arange(0, num_clients, same)[:, None]
    turns = (first + num_clients * np.arange(math.ceil(rounds * cohort / num_clients))) // int(cohort)
    turns = np.unique(np.minimum(turns, rounds), axis=0)
    moved = np.zeros(rounds)
    for few in np.array_split(turns, math.ceil(len(turns) / 1024)):
        took_part = np.zeros((rounds + 1, len(few)))
        took_part[few.T, np.arange(len(few))] = 1
        moved = np.maximum(moved, np.cumsum((strategy @ took_part[:-1]) ** 2, axis=0).max(axis=1))
    return np.sqrt(moved)


def sensitivity(mechanism: Mechanism, sampler: Sampler | Separated, num_clients: int, rounds: int) -> float:
    """The last of ``sensitivities``: that of ``C x`` to one client in all rounds, in units of the clip's bound.

    Args:
      mechanism, sampler, num_clients, rounds: as for ``sensitivities``.

    Example:
      >>> fc.privacy.sensitivity(fc.uplink.mechanism.banded(100, 8), fc.privacy.Separated(10, 4), 1000, 100)  # sqrt(4)
    """
    return float(sensitivities(mechanism, sampler, num_clients, rounds)[-1])


def strategy_of(mechanism: Mechanism, rounds: int) -> np.ndarray:
    """C, float64 ``[rounds, rounds]``.

    Raises:
      InvalidInput: negative entries.
    """
    strategy = np.asarray(mechanism.strategy(rounds), np.float64)
    if np.any(strategy < 0):
        raise InvalidInput(
            "The sensitivity of a strategy with negative entries is not known: use fc.uplink.mechanism's."
        )
    return strategy


def coefficients(strategy: np.ndarray) -> np.ndarray | None:
    """The first column of a Toeplitz matrix, without trailing zeros; ``None`` for another matrix."""
    if not np.array_equal(strategy[1:, 1:], strategy[:-1, :-1]):
        return None
    return np.trim_zeros(strategy[:, 0], "b")


def _separated(strategy: np.ndarray, apart: Separated, rounds: int) -> np.ndarray:
    column = coefficients(strategy)
    if column is not None and np.all(np.diff(column) <= 0):
        came = np.zeros(rounds)
        came[np.arange(apart.count(rounds)) * apart.rounds] = 1
        return np.sqrt(np.cumsum((strategy @ came) ** 2))
    from jax_privacy.matrix_factorization.sensitivity import get_min_sep_sensitivity_upper_bound

    bound = get_min_sep_sensitivity_upper_bound(jnp.asarray(strategy, jnp.float32), apart.rounds, apart.count(rounds))
    return np.full(rounds, bound)
