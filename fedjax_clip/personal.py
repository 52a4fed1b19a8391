"""Personalisation: algorithms whose clients have models of their own, and what makes such models for new clients."""

from fedjax_clip.algorithms.personal.apfl import apfl
from fedjax_clip.algorithms.personal.ditto import ditto
from fedjax_clip.algorithms.personal.fedala import fedala
from fedjax_clip.algorithms.personal.knn_per import knn_per
from fedjax_clip.algorithms.personal.mr_mtl import mr_mtl
from fedjax_clip.algorithms.personal.parts import fedbabu, fedbn, fedrep
from fedjax_clip.algorithms.personal.per_fedavg import per_fedavg, reptile
from fedjax_clip.algorithms.personal.pfedme import pfedme
from fedjax_clip.training.adapting import FineTuned, adapt, fine_tune

__all__ = [
    "FineTuned",
    "adapt",
    "apfl",
    "ditto",
    "fedala",
    "fedbabu",
    "fedbn",
    "fedrep",
    "fine_tune",
    "knn_per",
    "mr_mtl",
    "per_fedavg",
    "pfedme",
    "reptile",
]
