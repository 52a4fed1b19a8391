"""Corrections of client drift, moments that travel, and selection of clients by their losses."""

from fedjax_clip.algorithms.drift.fedadamw import Travelling, fedadamw
from fedjax_clip.algorithms.drift.fedcm import fedcm
from fedjax_clip.algorithms.drift.fedlc import fedlc
from fedjax_clip.algorithms.drift.fedmuon import Matrices, fedmuon
from fedjax_clip.algorithms.drift.oort import Tried, oort
from fedjax_clip.algorithms.drift.scaffnew import scaffnew
from fedjax_clip.algorithms.drift.selection import power_of_choice
from fedjax_clip.core.loss import calibrated

__all__ = [
    "Matrices",
    "Travelling",
    "Tried",
    "calibrated",
    "fedadamw",
    "fedcm",
    "fedlc",
    "fedmuon",
    "oort",
    "power_of_choice",
    "scaffnew",
]
