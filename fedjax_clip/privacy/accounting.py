"""Privacy accounting: epsilon of a run, and the noise or rounds for an epsilon, by dp-accounting.

The guarantee is user-level: it covers one client with all of its examples, in any rounds. Needs the extra ``privacy``.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import Algorithm, InvalidInput, Params
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.uplink.mechanism import Mechanism
from fedjax_clip.uplink.promises import Noise

try:
    from fedjax_clip.privacy import renyi
    from fedjax_clip.privacy.exposure import exposure, spent
    from fedjax_clip.privacy.gaussians import together
    from fedjax_clip.privacy.noise_shares import distributed
    from fedjax_clip.privacy.participation import Separated
except ImportError:
    raise InvalidInput("Privacy accounting needs dp-accounting: pip install 'fedjax_clip[privacy]'.") from None

MAX_NOISE = 1e4
CLOSE = 1e-4  # tolerance of a noise multiplier that is solved for


def epsilon(
    noise_multiplier: float | renyi.Curve | Algorithm,
    sampler: Sampler | Separated,
    num_clients: int,
    rounds: int,
    delta: float,
    accountant: str = "auto",
    mechanism: Mechanism | None = None,
    params: Params | None = None,
) -> float:
    """The epsilon of ``rounds`` rounds of an algorithm, or under ``fc.uplink.gaussian(noise_multiplier)``.

    The mechanism of one round depends on the sampler:

    - ``poisson``: a Gaussian mechanism on a Poisson sample of rate cohort / clients (add or remove a client)
    - ``uniform``: a sample of fixed size without replacement (replace a client: the sum moves by 2 C, so its noise
      multiplier is z / 2); if all clients take part, one Gaussian mechanism (remove a client)
    - ``round_robin``: no sampling, no amplification: each client takes part in at most
      ``ceil(rounds cohort / clients)`` rounds (remove a client)
    - ``Separated``: as ``round_robin``, with the rounds that it allows
    - ``truncated_poisson``: a Poisson sample of which some are left out (a client's messages are there, or zero)
    - ``cyclic_poisson``: a Poisson sample of a group: a client meets one in ``groups`` rounds
    - ``balls_in_bins``, ``b_min_sep``: the whole run at once, by draws of its privacy loss from a fixed seed: with
      probability 1 - 1e-7 epsilon is no larger. Where too many draws would be needed (delta under about 1e-6), no more
      is claimed than without sampling

    Sampling never increases epsilon: each bound is at most that of the same rounds without sampling.

    Noise of a ``mechanism`` can be accounted for if a client's rounds are known or kept apart: all rounds are then one
    Gaussian mechanism of noise multiplier z / ``sensitivity``. Under ``cyclic_poisson``, if C has no more bands than
    there are groups, a turn of all groups is one sampled Gaussian with noise multiplier z over the largest norm of a
    column. ``balls_in_bins`` amplifies any C, and ``b_min_sep`` a banded Toeplitz matrix.

    Args:
      noise_multiplier: z, the noise of the sum over the clip's bound; or the result of ``distributed`` for noise on a
        grid; or the algorithm, which knows its noise and its mechanism.
      sampler: from ``fc.data.sampling``, or ``Separated``.
      num_clients: clients in the population.
      rounds: rounds of the run.
      delta: probability outside the guarantee, such as 1 / num_clients^1.1.
      accountant: ``"rdp"`` (Renyi), ``"pld"`` (privacy loss distributions; exact without sampling), or ``"auto"``: the
        least valid bound that takes seconds.
      mechanism: of the noise, as for ``fc.uplink.gaussian``.
      params: of the model; needed if an algorithm's noise is on a grid.

    Returns:
      epsilon; infinite without noise.

    Raises:
      InvalidInput: a sampler with unknown amplification, ``"pld"`` for sampling without replacement, delta outside (0,
        1), an algorithm with unknown noise.

    Example:
      >>> sampler = fc.data.sampling.poisson(50)
      >>> round(fc.privacy.epsilon(1.0, sampler, num_clients=10_000, rounds=1000, delta=1e-5), 2)
      0.86

    Source: Abadi et al. (2016); Mironov, Talwar and Zhang (2019); Wang, Balle and Kasiviswanathan (2019) for
    sampling without replacement; Meiser and Mohammadi (2018), Koskela et al. (2020) for privacy loss distributions;
    Balle and Wang (2018) for Gaussian mechanisms alone; Denisov et al. (2022) for correlated noise, and that rounds may
    depend on the noise before them; Choquette-Choo et al. (2023), Theorem 4, for bands under cyclic sampling; Ganesh
    (2025), "Tighter Privacy Analysis for Truncated Poisson Sampling".
    """
    rounds = checks.count("rounds", rounds, 0)
    found = _epsilons(noise_multiplier, sampler, num_clients, rounds, delta, accountant, mechanism, params, every=False)
    return float(found[-1]) if rounds else 0.0


def epsilons(
    noise_multiplier: float | renyi.Curve | Algorithm,
    sampler: Sampler | Separated,
    num_clients: int,
    rounds: int,
    delta: float,
    mechanism: Mechanism | None = None,
    accountant: str = "auto",
    params: Params | None = None,
) -> np.ndarray:
    """``[rounds]`` epsilon after 1, 2, ... rounds. Arguments as for ``epsilon``.

    The last value is that of ``epsilon``. For many rounds, loss distributions are computed at some rounds, and the
    others take the bound of the next one.

    Example:
      >>> sampler = fc.data.sampling.round_robin(50)
      >>> spent = fc.privacy.epsilons(1.0, sampler, num_clients=1000, rounds=40, delta=1e-5)
      >>> bool(spent[19] < spent[20])  # in round 21 clients take part for the second time
      True
    """
    rounds = checks.count("rounds", rounds, 0)
    return _epsilons(noise_multiplier, sampler, num_clients, rounds, delta, accountant, mechanism, params, every=True)


def _epsilons(
    noise: Any,
    sampler: Sampler | Separated,
    num_clients: int,
    rounds: int,
    delta: float,
    accountant: str,
    mechanism: Mechanism | None,
    params: Params | None,
    every: bool,
) -> np.ndarray:
    num_clients = checks.count("num_clients", num_clients)
    if isinstance(noise, Algorithm):
        noise, mechanism = _said(noise, mechanism, params)
    if not callable(noise):
        checks.within("noise_multiplier", noise, 0)
    if not rounds:
        return np.zeros(0)
    met = exposure(sampler, num_clients, rounds, mechanism, every)
    if not callable(noise) and noise == 0:
        return np.full(len(met.counts), math.inf)
    return spent(noise, met, delta, accountant)


def _said(
    algorithm: Algorithm, mechanism: Mechanism | None, params: Params | None
) -> tuple[float | renyi.Curve, Mechanism | None]:
    """The noise that an algorithm adds, and its mechanism."""
    parts = algorithm.parts
    if parts is None:
        raise InvalidInput(
            "The noise of this algorithm is not known: give epsilon one of fedjax_clip's own algorithms, or a noise "
            "multiplier that you vouch for."
        )
    if mechanism is not None:
        raise InvalidInput("The algorithm knows its noise's mechanism: leave mechanism out.")
    promises = parts.uplink.promises
    if promises.deployment is not None:
        raise InvalidInput(
            "The algorithm's noise is that of a larger deployment's cohort (noise_cohort), not of this run: for the "
            "deployment's epsilon, give epsilon the noise multiplier with the deployment's sampler and number of "
            "clients."
        )
    if promises.noise is Noise.CLIENT:
        raise InvalidInput(
            "local_gaussian(z) protects each message by itself, whichever clients take part: use epsilon(z / 2, "
            "fc.privacy.Separated(1), ...) with the number of rounds in which one client takes part."
        )
    if promises.grid is not None and promises.noise is Noise.SHARES:
        if params is None:
            raise InvalidInput("The epsilon of noise on a grid depends on the size of the model: give epsilon params=.")
        return distributed(parts.uplink, params, parts.reducer), None
    return together([float(z) for z in promises.noise_multipliers]), promises.mechanism


def noise_multiplier(
    target_epsilon: float,
    sampler: Sampler | Separated,
    num_clients: int,
    rounds: int,
    delta: float,
    accountant: str = "auto",
    mechanism: Mechanism | None = None,
    curve: Callable[[float], renyi.Curve] | None = None,
) -> float:
    """The least noise multiplier with ``epsilon(...) <= target_epsilon``, to 1e-4 on the safe side.

    The tolerance is 1e-2 for samplers whose privacy loss is simulated (``balls_in_bins``, ``b_min_sep``).

    Args:
      target_epsilon, sampler, num_clients, rounds, delta, accountant, mechanism: as for ``epsilon``.
      curve: for noise on a grid, ``noise multiplier -> distributed(...)``.

    Raises:
      InvalidInput: a target that no noise multiplier up to 10,000 reaches, or none that fits on the grid; as
        ``epsilon``.

    Example:
      >>> sampler = fc.data.sampling.round_robin(50)
      >>> round(fc.privacy.noise_multiplier(2.0, sampler, num_clients=1000, rounds=20, delta=1e-5), 2)
      1.99
    """
    checks.positive("target_epsilon", target_epsilon)
    num_clients, rounds = checks.count("num_clients", num_clients), checks.count("rounds", rounds, 0)
    if not rounds:
        return 0.0
    met = exposure(sampler, num_clients, rounds, None if curve else mechanism, every=False)

    def worth(z: float, accountant: str = accountant) -> float:
        try:
            noise = z if curve is None else curve(z)
        except renyi.TooNarrow:
            return math.inf
        except InvalidInput:  # too much noise for the grid: look lower, and raise this error if the search ends here
            return 0.0
        return float(spent(noise, met, delta, accountant)[-1])

    if curve is None and worth(MAX_NOISE) > target_epsilon:
        raise InvalidInput(f"No noise multiplier up to {MAX_NOISE:g} reaches epsilon {target_epsilon:g}: raise delta.")
    low, high, quick = 0.0, 1.0, accountant
    if accountant == "auto":  # first by the fast accountant, then refined by the others
        quick = "rdp" if met.sample == "poisson" else "pld" if met.replay else accountant
    while worth(high, quick) > target_epsilon:
        low, high = high, 2 * high
    high = _least(functools.partial(worth, accountant=quick), target_epsilon, low, high, CLOSE)
    if quick != accountant:
        high = _least(worth, target_epsilon, 0.0, high, CLOSE if met.replay is None else 100 * CLOSE)
    if curve is not None:
        curve(high)
    return high


def _least(worth: Callable[[float], float], target: float, low: float, high: float, apart: float) -> float:
    """The least z, to ``apart``, with epsilon at most the target; starts from a sufficient z, ``high``."""
    ends = {low: math.inf, high: worth(high)}
    while high - low > apart:
        width, guess = high - low, (low + high) / 2
        if ends[high] > 0 and math.isfinite(ends[low]):
            part = math.log(ends[low] / target) / math.log(ends[low] / ends[high])
            guess = low * (high / low) ** part
        elif low == 0 and ends[high] > 0:
            guess = high * max(0.1, 0.95 * ends[high] / target)
        for z in (guess + apart / 3, guess - apart / 3, (low + high) / 2):
            if low < z < high and (z != (low + high) / 2 or high - low > width / 2):
                ends[z] = worth(z)
                low, high = (low, z) if ends[z] <= target else (z, high)
    return high


def rounds(
    target_epsilon: float,
    noise_multiplier: float,
    sampler: Sampler | Separated,
    num_clients: int,
    delta: float,
    accountant: str = "auto",
    most: int = 10**6,
    mechanism: Mechanism | None = None,
) -> int:
    """The number of rounds that ``target_epsilon`` allows, at most ``most``; 0 if it allows none.

    The other arguments are as for ``epsilon``.

    Example:
      >>> sampler = fc.data.sampling.round_robin(50)
      >>> fc.privacy.rounds(2.0, 3.0, sampler, num_clients=1000, delta=1e-5)
      40
    """

    def fits(count: int) -> bool:
        return epsilon(noise_multiplier, sampler, num_clients, count, delta, accountant, mechanism) <= target_epsilon

    low, high = 0, 1  # ``low`` rounds are within the target
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
