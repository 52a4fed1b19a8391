"""Record-level accounting of a client's own noise."""

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.secret import Secret
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.planning import LocalWork
from fedjax_clip.data.population import FederatedData, check_alike
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.privacy.accounting import epsilon, noise_multiplier
from fedjax_clip.privacy.participation import Separated


def record_epsilons(
    noise_multiplier: float,
    data: FederatedData,
    work: LocalWork,
    sampler: Sampler,
    rounds: int,
    delta: float,
    seed: int = 0,
    accountant: str = "auto",
    secret: Secret | None = None,
) -> np.ndarray:
    """``[M]`` record-level epsilon of each client, under ``fc.local.private_gradient(C, noise_multiplier)``.

    The neighbouring relation is zero-out: one record counts, or its gradient is zero, in all that its client sends. It
    holds against every reader, the server included. Each pass over a client's records uses each record in one step at
    most. So a record meets one Gaussian mechanism of noise multiplier z for each pass that its client makes in the run.
    Passes shuffle the records. They are not Poisson samples, so the accounting claims no amplification: a sampling rate
    of batch / records would claim too much privacy.

    Args:
      noise_multiplier: z, of ``fc.local.private_gradient``.
      data: the training population.
      work: batch size and local epochs or steps, as ``fc.train`` has them.
      sampler: from ``fc.data.sampling``; the accounting counts its actual cohorts.
      rounds: rounds of the run.
      delta: probability outside the guarantee.
      seed: the run's.
      accountant: as for ``epsilon``.
      secret: the run's, if it has one, because cohorts are drawn from it.

    Raises:
      InvalidInput: a clock, whose cohorts depend on the run; data with unequal example weights, which
        ``private_gradient`` would ignore; delta outside (0, 1).

    Example:
      >>> work, sampler = fc.extend.LocalWork(20, epochs=2), fc.data.sampling.uniform(8)
      >>> fc.privacy.record_epsilons(4.0, data, work, sampler, 50, delta=1e-5)

    Source: Abadi et al. (2016), Algorithm 1, at each client; Mironov (2017) for the composition.
    """
    uses = _uses(data, work, sampler, rounds, seed, secret)
    spent = {
        int(n): epsilon(noise_multiplier, Separated(1), 1, int(n), delta, accountant) if n else 0.0
        for n in np.unique(uses)
    }
    return np.array([spent[int(n)] for n in uses])


def record_noise_multiplier(
    target_epsilon: float,
    data: FederatedData,
    work: LocalWork,
    sampler: Sampler,
    rounds: int,
    delta: float,
    seed: int = 0,
    accountant: str = "auto",
    secret: Secret | None = None,
) -> float:
    """The least noise multiplier (to 1e-4) for which no client's ``record_epsilons`` exceed ``target_epsilon``.

    Args:
      target_epsilon: for a record of the client with the most passes.
      data, work, sampler, rounds, delta, seed, accountant, secret: as for ``record_epsilons``.

    Raises:
      InvalidInput: as ``record_epsilons``; a target that no noise up to 10,000 reaches.

    Example:
      >>> work, sampler = fc.extend.LocalWork(20), fc.data.sampling.uniform(8)
      >>> z = fc.privacy.record_noise_multiplier(2.0, data, work, sampler, 50, delta=1e-5)
      >>> gradient = fc.local.private_gradient(1.0, z)
    """
    most = int(_uses(data, work, sampler, rounds, seed, secret).max())
    return noise_multiplier(target_epsilon, Separated(1), 1, most, delta, accountant)


def _uses(
    data: FederatedData, work: LocalWork, sampler: Sampler, rounds: int, seed: int, secret: Secret | None
) -> np.ndarray:
    """``[M]`` passes of each client over its records in all its rounds."""
    checks.kind("sampler", sampler, Sampler, "one of fc.data.sampling (nobody can account for a clock)")
    checks.kind("data", data, FederatedData, "a FederatedData")
    checks.kind("work", work, LocalWork, "an fc.extend.LocalWork")
    check_alike(data)
    if data.lives is not None:
        raise InvalidInput("A record's epsilon counts passes over the same examples: it is not computed for a stream.")
    rounds = checks.count("rounds", rounds, 0)
    clients = np.arange(data.num_clients)
    checks.kind("secret", secret, Secret | None, "an fc.privacy.Secret, or None")
    drawn_from = seed if secret is None else secret.seed()
    drawn = [sampler.draw(data.sizes, drawn_from, round) for round in range(rounds)]
    took_part = np.bincount(np.concatenate([*drawn, clients[:0]]), minlength=data.num_clients)
    a_pass = -(-data.sizes // work.batch_sizes(clients, data.sizes, seed))
    return took_part * -(-work.num_steps(clients, data.sizes, seed) // a_pass)
