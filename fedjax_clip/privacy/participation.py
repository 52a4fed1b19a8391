"""In which rounds a client can take part, and how far that moves what correlated noise covers."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjax_clip import checks
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.mechanism import Mechanism
from fedjax_clip.typing import InvalidInput


class Separated(NamedTuple):
    """In place of a sampler: a promise that a deployment keeps, as by timers on its devices, whoever is drawn.

    Attributes:
      rounds: from one of a client's rounds to its next, at least; 1 is every round.
      most: how often a client takes part at most; as often as the separation lets it by default.

    Example:
      >>> fc.privacy.epsilon(7.0, Separated(rounds=300, most=6), 10**6, 2000, 1e-10, mechanism=fc.mechanism.tree(2000))

    Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization", b-min-sep participation.
    """

    rounds: int
    most: int | None = None

    def count(self, total: int) -> int:
        """How often a client can take part in so many rounds."""
        checks.count("Separated: rounds", self.rounds)
        if self.most is not None:
            checks.count("Separated: most", self.most)
        possible = math.ceil(total / self.rounds)
        return possible if self.most is None else min(possible, self.most)


def sensitivities(mechanism: Mechanism, sampler: Sampler | Separated, num_clients: int, rounds: int) -> np.ndarray:
    """``[rounds]``: how far one client moves ``C x`` in 1, 2, ... rounds, over the clip's bound.

    ``max_i ||(C u_i)[:t]||`` with u_i one in client i's rounds: as far as that, since C has no negative entry. k
    rounds of independent noise: sqrt(k).

    Args:
      mechanism: of ``fc.mechanism``.
      sampler: ``fc.sampling.round_robin``, or one that takes everyone.
      num_clients: clients in the population.
      rounds: rounds of the run.

    Raises:
      InvalidInput: a sampler that may draw a client in any round; a strategy with negative entries.

    Example:
      >>> sensitivities(fc.mechanism.tree(4), fc.sampling.round_robin(10), num_clients=40, rounds=4) ** 2
      array([1., 2., 2., 3.])

    Source: Denisov et al. (2022), "Improved Differential Privacy for SGD via Optimal Private Linear Operators on
    Adaptive Streams"; Choquette-Choo et al. (2023), "Multi-Epoch Matrix Factorization Mechanisms", equation 4.
    """
    if not isinstance(sampler, Sampler):
        raise InvalidInput(
            f"sampler must be one of fc.sampling for a sensitivity by round, not {type(sampler).__name__}."
        )
    cohort = sampler.cohort_size
    if cohort > num_clients:
        raise InvalidInput(f"A cohort of {cohort} clients is larger than the population of {num_clients}.")
    if sampler.scheme != "round_robin" and not (sampler.scheme and cohort == num_clients):
        raise InvalidInput(
            "Noise of a mechanism is in proportion to what a client does in all its rounds, and this sampler may draw "
            "it in any: use fc.sampling.round_robin, or give the noise no mechanism."
        )
    strategy = _strategy(mechanism, rounds)
    same = math.gcd(int(cohort), num_clients)  # clients in a row that always come together
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
    """How far one client moves ``C x`` in all rounds, over the clip's bound: ``sensitivities``' last.

    Of ``Separated`` rounds jax-privacy's bound, which is exact where C has no more bands than they are apart.

    Args:
      mechanism, num_clients, rounds: as for ``sensitivities``.
      sampler: as for ``sensitivities``, or ``Separated``.

    Example:
      >>> fc.privacy.sensitivity(fc.mechanism.banded(100, 8), fc.privacy.Separated(10, 4), 1000, 100)  # sqrt(4)

    Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization", Algorithms 3 and 4.
    """
    if not isinstance(sampler, Separated):
        return float(sensitivities(mechanism, sampler, num_clients, rounds)[-1])
    from jax_privacy.matrix_factorization.sensitivity import get_min_sep_sensitivity_upper_bound

    strategy = jnp.asarray(_strategy(mechanism, rounds), jnp.float32)
    return get_min_sep_sensitivity_upper_bound(strategy, sampler.rounds, sampler.count(rounds))


def _strategy(mechanism: Mechanism, rounds: int) -> np.ndarray:
    strategy = np.asarray(mechanism.strategy(rounds), np.float64)
    if np.any(strategy < 0):
        raise InvalidInput("The sensitivity of a strategy with negative entries is not known: use fc.mechanism's.")
    return strategy
