"""What noise is worth: epsilon of a run, and the noise or the rounds that an epsilon allows. Needs ``[privacy]``."""

from fedjax_clip.privacy.accounting import epsilon, epsilons, noise_multiplier, rounds, split, together
from fedjax_clip.privacy.distributed import distributed
from fedjax_clip.privacy.participation import Separated, sensitivities, sensitivity
from fedjax_clip.privacy.records import record_epsilons
from fedjax_clip.secret import Secret

__all__ = [
    "Secret",
    "Separated",
    "distributed",
    "epsilon",
    "epsilons",
    "noise_multiplier",
    "record_epsilons",
    "rounds",
    "sensitivities",
    "sensitivity",
    "split",
    "together",
]
