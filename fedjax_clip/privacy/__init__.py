"""Privacy accounting: epsilon of a run, and the noise or rounds for an epsilon. Needs ``[privacy]``."""

from fedjax_clip.core.secret import Secret
from fedjax_clip.privacy.accounting import epsilon, epsilons, noise_multiplier, rounds
from fedjax_clip.privacy.auditing import Audit, audit
from fedjax_clip.privacy.gaussians import split, together
from fedjax_clip.privacy.noise_shares import distributed
from fedjax_clip.privacy.participation import Separated, sensitivities, sensitivity
from fedjax_clip.privacy.records import record_epsilons, record_noise_multiplier

__all__ = [
    "Audit",
    "Secret",
    "Separated",
    "audit",
    "distributed",
    "epsilon",
    "epsilons",
    "noise_multiplier",
    "record_epsilons",
    "record_noise_multiplier",
    "rounds",
    "sensitivities",
    "sensitivity",
    "split",
    "together",
]
