"""What a client's own noise is worth to each of its records."""

import numpy as np

from fedjax_clip import checks
from fedjax_clip.data.planning import LocalWork
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.privacy.accounting import epsilon
from fedjax_clip.privacy.participation import Separated


def record_epsilons(
    noise_multiplier: float,
    data: FederatedData,
    work: LocalWork,
    sampler: Sampler,
    rounds: int,
    delta: float,
    seed: int = 0,
    accountant: str = "rdp",
) -> np.ndarray:
    """``[M]``: each client's epsilon for one of its records, under ``fc.private_gradient(C, noise_multiplier)``.

    Of a record that counts, or counts nothing, towards all that its client sends, whoever reads it (the server, too).
    Each pass over a client's records uses each in one step at most, so a record meets as many Gaussian mechanisms of
    noise multiplier z as its client makes passes in all the rounds it is in, and 0 where it is in none. The passes
    are of shuffled records. They are no Poisson samples, and nothing is taken off for chance: a rate of batch / records
    would claim more than what runs.

    Args:
      noise_multiplier: z, of ``fc.private_gradient``.
      data: the training population.
      work: batch size and local epochs or steps, as ``fc.train`` has them.
      sampler: from ``fc.sampling``; its very cohorts are counted.
      rounds: rounds of the run.
      delta: probability outside the guarantee.
      seed: the run's.
      accountant: ``"rdp"`` or ``"pld"``.

    Raises:
      InvalidInput: a clock, which draws cohorts as it runs; delta outside (0, 1).

    Example:
      >>> fc.privacy.record_epsilons(4.0, data, fc.LocalWork(20, epochs=2), fc.sampling.uniform(8), 50, delta=1e-5)

    Source: Abadi et al. (2016), Algorithm 1, at each client; Mironov (2017) for the composition.
    """
    checks.kind("sampler", sampler, Sampler, "one of fc.sampling (nobody can account for a clock)")
    checks.kind("data", data, FederatedData, "a FederatedData")
    checks.kind("work", work, LocalWork, "an fc.LocalWork")
    rounds, seed = checks.count("rounds", rounds, 0), checks.seed("seed", seed)
    clients = np.arange(data.num_clients)
    drawn = [sampler.draw(data.sizes, seed, round) for round in range(rounds)]
    took_part = np.bincount(np.concatenate([*drawn, clients[:0]]), minlength=data.num_clients)
    a_pass = -(-data.sizes // (data.sizes if work.batch_size is None else work.batch_size))
    uses = took_part * -(-work.num_steps(clients, data.sizes, seed) // a_pass)
    spent = {
        int(n): epsilon(noise_multiplier, Separated(1), 1, int(n), delta, accountant) if n else 0.0
        for n in np.unique(uses)
    }
    return np.array([spent[int(n)] for n in uses])
