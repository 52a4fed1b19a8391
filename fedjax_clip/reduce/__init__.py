"""Reducers, which combine the messages of a cohort into one: means, robust rules, modular sums."""

from fedjax_clip.reduce.base import Reducer, Roster, fixed_mean, together, uniform_mean, weighted_mean
from fedjax_clip.reduce.descent import min_norm
from fedjax_clip.reduce.exact import exact_mean
from fedjax_clip.reduce.filters import caf, dnc, flame
from fedjax_clip.reduce.mixing import arc, nnm
from fedjax_clip.reduce.modular import majority, modular_sum, on_host, secure_threshold
from fedjax_clip.reduce.robust import centered_mean, fltrust, geometric_median, krum, median, norm_bounded, trimmed_mean
from fedjax_clip.reduce.stack import Stack, bucketing, check_cohort, restacked, stacking
from fedjax_clip.reduce.subsets import bulyan, mda, smea

__all__ = [
    "Reducer",
    "Roster",
    "Stack",
    "arc",
    "bucketing",
    "bulyan",
    "caf",
    "centered_mean",
    "check_cohort",
    "dnc",
    "exact_mean",
    "fixed_mean",
    "flame",
    "fltrust",
    "geometric_median",
    "krum",
    "majority",
    "mda",
    "median",
    "min_norm",
    "modular_sum",
    "nnm",
    "norm_bounded",
    "on_host",
    "restacked",
    "secure_threshold",
    "smea",
    "stacking",
    "together",
    "trimmed_mean",
    "uniform_mean",
    "weighted_mean",
]
