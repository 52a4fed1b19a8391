"""What noise is worth: epsilon of a run, and the noise or the rounds that an epsilon allows, by dp-accounting.

User-level: the presence of one client, all of its examples, in any rounds. Needs the extra ``privacy``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjax_clip import checks
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.mechanism import Mechanism
from fedjax_clip.privacy import renyi
from fedjax_clip.privacy.participation import Separated, sensitivities, sensitivity
from fedjax_clip.typing import InvalidInput

try:
    import dp_accounting
    from dp_accounting import pld, rdp
except ImportError:
    raise InvalidInput("Privacy accounting needs dp-accounting: pip install 'fedjax_clip[privacy]'.") from None

MAX_NOISE = 1e4
EVERY_ROUND = Separated(1)


def epsilon(
    noise_multiplier: float | renyi.Curve,
    sampler: Sampler | Separated,
    num_clients: int,
    rounds: int,
    delta: float,
    accountant: str = "rdp",
    mechanism: Mechanism | None = None,
) -> float:
    """The epsilon of ``rounds`` rounds under ``fc.uplink.gaussian(noise_multiplier)`` at this delta.

    What one round is depends on who takes part:

      ``poisson``      a Gaussian mechanism on a Poisson sample of rate cohort / clients (add or remove a client)
      ``uniform``      a sample of fixed size without replacement (replace a client: the sum moves by 2 C, so its noise
                       multiplier is z / 2); if all clients take part, one Gaussian mechanism (remove a client)
      ``round_robin``  no sampling, no amplification: each client takes part in at most
                       ``ceil(rounds cohort / clients)`` rounds (remove a client)
      ``Separated``    as ``round_robin``, with the rounds that it allows

    Noise of a ``mechanism`` is accounted for where it is known in which rounds a client can be: ``round_robin``,
    everyone, ``Separated``. All rounds are then one Gaussian mechanism of noise multiplier z / ``sensitivity``.

    Args:
      noise_multiplier: z, of the sum over the clip's bound; or what ``distributed`` makes of noise on a grid.
      sampler: from ``fc.sampling``, or ``Separated``.
      num_clients: clients in the population.
      rounds: rounds of the run.
      delta: probability outside the guarantee, such as 1 / num_clients^1.1.
      accountant: ``"rdp"`` (Renyi), or ``"pld"`` (privacy loss distributions: tighter, slower).
      mechanism: the noise's, as ``fc.uplink.gaussian`` has it.

    Returns:
      epsilon; infinite without noise.

    Raises:
      InvalidInput: a sampler whose amplification is not known, ``"pld"`` without replacement, delta outside (0, 1).

    Example:
      >>> epsilon(1.0, fc.sampling.poisson(50), num_clients=10_000, rounds=1000, delta=1e-5)  # doctest: +SKIP
      1.2055

    Source: Abadi et al. (2016); Mironov, Talwar and Zhang (2019); Wang, Balle and Kasiviswanathan (2019) for
    sampling without replacement; Meiser and Mohammadi (2018), Koskela et al. (2020) for privacy loss distributions;
    Denisov et al. (2022) for correlated noise, and that rounds may depend on the noise before them.
    """
    num_clients, rounds = checks.count("num_clients", num_clients), checks.count("rounds", rounds, 0)
    if callable(noise_multiplier):
        _check_accountant(accountant)
        return float(epsilons(noise_multiplier, sampler, num_clients, rounds, delta)[-1]) if rounds else 0.0
    if noise_multiplier == 0 and rounds:
        return math.inf
    checks.positive("noise_multiplier", noise_multiplier)
    scale, sampler = _alone(sampler, num_clients, rounds, mechanism)
    return _epsilon(
        noise_multiplier / scale, sampler, num_clients, rounds if mechanism is None else 1, delta, accountant
    )


def epsilons(
    noise_multiplier: float | renyi.Curve,
    sampler: Sampler | Separated,
    num_clients: int,
    rounds: int,
    delta: float,
    mechanism: Mechanism | None = None,
) -> np.ndarray:
    """``[rounds]``: epsilon after 1, 2, ... rounds, by Renyi accounting. Arguments as for ``epsilon``."""
    if noise_multiplier == 0:
        return np.full(rounds, math.inf)
    if mechanism is None:
        counts = np.array([_round(1.0, sampler, num_clients, r + 1)[1] for r in range(rounds)])
    else:
        counts = np.square(sensitivities(mechanism, sampler, num_clients, rounds))
        sampler = EVERY_ROUND
    if callable(noise_multiplier):
        order, once = renyi.ORDERS, _sampled(noise_multiplier, _round(1.0, sampler, num_clients, 1)[0])
    else:
        event, _, neighbours = _round(noise_multiplier, sampler, num_clients, 1)
        accountant = rdp.RdpAccountant(neighboring_relation=neighbours).compose(event)
        order, once = accountant.orders, accountant.rdp
    spent = counts[:, None] * once  # of a Gaussian alone, k rounds cost k times one
    # Canonne, Kamath and Steinke (2020), Proposition 12: what dp-accounting computes, for all rounds at once.
    every = spent + np.log1p(-1 / order) - np.log(_checked(delta) * order) / (order - 1)
    every = np.where(delta**2 + np.expm1(-spent) > 0, 0, every)  # delta <= sqrt(1 - exp(-KL))
    return np.maximum(every.min(axis=1), 0)


def noise_multiplier(
    target_epsilon: float,
    sampler: Sampler | Separated,
    num_clients: int,
    rounds: int,
    delta: float,
    accountant: str = "rdp",
    mechanism: Mechanism | None = None,
    curve: Callable[[float], renyi.Curve] | None = None,
) -> float:
    """The least noise multiplier (to 1e-4, on the safe side) with which ``epsilon(...) <= target_epsilon``.

    Args:
      target_epsilon, sampler, num_clients, rounds, delta, accountant, mechanism: as for ``epsilon``.
      curve: of noise on a grid, ``noise multiplier -> distributed(...)``.

    Raises:
      InvalidInput: a target that no noise up to 10,000 reaches, or none that a grid has room for; as ``epsilon``.
    """
    checks.positive("target_epsilon", target_epsilon)
    num_clients, rounds = checks.count("num_clients", num_clients), checks.count("rounds", rounds, 0)
    scale, sampler = _alone(sampler, num_clients, rounds, mechanism)
    count = rounds if mechanism is None else 1

    def fits(z: float) -> bool:
        if curve is None:
            return _epsilon(z / scale, sampler, num_clients, count, delta, accountant) <= target_epsilon
        try:
            return epsilon(curve(z), sampler, num_clients, rounds, delta, accountant) <= target_epsilon
        except renyi.TooNarrow:
            return False
        except InvalidInput:  # more noise than there is room for: look lower, and say so if it ends here
            return True

    if curve is not None:
        _check_accountant(accountant)
    elif not fits(MAX_NOISE):
        raise InvalidInput(f"No noise multiplier up to {MAX_NOISE:g} reaches epsilon {target_epsilon:g}: raise delta.")
    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    if curve is not None:
        curve(high)
    return high


def rounds(
    target_epsilon: float,
    noise_multiplier: float,
    sampler: Sampler | Separated,
    num_clients: int,
    delta: float,
    accountant: str = "rdp",
    most: int = 10**6,
    mechanism: Mechanism | None = None,
) -> int:
    """How many rounds ``target_epsilon`` allows, ``most`` at most; 0 if not even one.

    The other arguments are as for ``epsilon``.
    """

    def fits(count: int) -> bool:
        return epsilon(noise_multiplier, sampler, num_clients, count, delta, accountant, mechanism) <= target_epsilon

    low, high = 0, 1  # low fits
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def together(noise_multipliers: Sequence[float]) -> float:
    """The noise multiplier of several Gaussian mechanisms at once: ``(sum_i z_i^-2)^(-1/2)``.

    Args:
      noise_multipliers: ``uplink.promises.noise_multipliers``, for example.

    Returns:
      It; 0 if one of them has no noise, infinite if there are none.
    """
    if not noise_multipliers:
        return math.inf
    return 0.0 if min(noise_multipliers) == 0 else sum(z**-2 for z in noise_multipliers) ** -0.5


def split(noise_multiplier: float, bits_noise: float) -> float:
    """What is left for the updates: ``(z^-2 - (2 sigma_b)^-2)^(-1/2)``, if z is to cover the quantile's bits as well.

    ``chain(quantile_clip(bits_noise=sigma_b), gaussian(split(z, sigma_b)))`` costs what ``gaussian(z)`` alone does:
    a bit minus one half has sensitivity 1/2, so its noise multiplier is 2 sigma_b.

    Args:
      noise_multiplier: z, of bits and updates together.
      bits_noise: sigma_b, in bits.

    Raises:
      InvalidInput: bits that alone cost more than z allows.

    Source: Andrew et al. (2021), Theorem 1.
    """
    checks.positive("noise_multiplier", noise_multiplier)
    checks.positive("bits_noise", bits_noise)
    if 2 * bits_noise <= noise_multiplier:
        raise InvalidInput(
            f"bits_noise={bits_noise:g} leaves nothing for the updates of a noise multiplier of {noise_multiplier:g}: "
            f"it must be over {noise_multiplier / 2:g}."
        )
    return (noise_multiplier**-2 - (2 * bits_noise) ** -2) ** -0.5


def _epsilon(z: float, sampler: Any, num_clients: int, rounds: int, delta: float, accountant: str) -> float:
    event, count, neighbours = _round(z, sampler, num_clients, rounds)
    return _accountant(accountant, neighbours).compose(event, count).get_epsilon(_checked(delta))


def _alone(sampler: Any, num_clients: int, rounds: int, mechanism: Mechanism | None) -> tuple[float, Any]:
    """What divides z, and whose rounds there are, once all rounds of a mechanism are one."""
    if mechanism is None or not rounds:
        return 1.0, sampler
    return sensitivity(mechanism, sampler, num_clients, rounds), EVERY_ROUND


def _sampled(curve: renyi.Curve, event: Any) -> np.ndarray:
    if isinstance(event, dp_accounting.PoissonSampledDpEvent) and event.sampling_probability < 1:
        return renyi.poisson_sampled(curve, event.sampling_probability)
    if isinstance(event, dp_accounting.SampledWithoutReplacementDpEvent):
        return renyi.fixed_size_sampled(curve, event.sample_size / event.source_dataset_size)
    return curve(renyi.ORDERS, 1)


def _check_accountant(name: str) -> None:
    if name != "rdp":
        raise InvalidInput("Noise on a grid is accounted for by Renyi curves: accountant='rdp'.")


def _round(z: float, sampler: Sampler | Separated, num_clients: int, rounds: int) -> tuple[Any, int, Any]:
    """One round's event, how often it happens to one client, and what neighbours are."""
    gaussian, add_or_remove = dp_accounting.GaussianDpEvent, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if isinstance(sampler, Separated):
        return gaussian(z), sampler.count(rounds), add_or_remove
    checks.kind("sampler", sampler, Sampler, "one of fc.sampling (nobody can account for a clock)")
    cohort = sampler.cohort_size
    if cohort > num_clients:
        raise InvalidInput(f"A cohort of {cohort} clients is larger than the population of {num_clients}.")
    if sampler.scheme == "poisson":
        event = dp_accounting.PoissonSampledDpEvent(cohort / num_clients, gaussian(z))
        return event, rounds, add_or_remove
    if sampler.scheme == "uniform" and cohort < num_clients:
        event = dp_accounting.SampledWithoutReplacementDpEvent(num_clients, int(cohort), gaussian(z / 2))
        return event, rounds, dp_accounting.NeighboringRelation.REPLACE_ONE
    if sampler.scheme == "uniform":
        return gaussian(z), rounds, add_or_remove
    if sampler.scheme == "round_robin":
        return (
            gaussian(z),
            math.ceil(rounds * cohort / num_clients),
            dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
    raise InvalidInput(
        "How much privacy this sampler's choice of clients adds is not known: use fc.sampling.poisson, uniform or "
        "round_robin."
    )


def _accountant(name: str, neighbours: Any) -> Any:
    makers: dict[str, Callable] = {
        "rdp": lambda: rdp.RdpAccountant(neighboring_relation=neighbours),
        "pld": lambda: pld.PLDAccountant(neighboring_relation=neighbours),
    }
    if name not in makers:
        raise InvalidInput(f"accountant must be 'rdp' or 'pld', not {name!r}.")
    if name == "pld" and neighbours is dp_accounting.NeighboringRelation.REPLACE_ONE:
        raise InvalidInput("The 'pld' accountant does not know cohorts without replacement: use 'rdp', or poisson.")
    return makers[name]()


def _checked(delta: float) -> float:
    checks.fraction("delta", delta)
    return delta
