"""Reducers, which combine the messages of a cohort into one: means, robust rules, modular sums."""

from fedjax_clip.reduce.base import Reducer, Roster, fixed_mean, together, uniform_mean, weighted_mean
from fedjax_clip.reduce.exact import exact_mean
from fedjax_clip.reduce.modular import majority, modular_sum, on_host, secure_threshold
from fedjax_clip.reduce.robust import centered_mean, fltrust, geometric_median, krum, median, norm_bounded, trimmed_mean
from fedjax_clip.reduce.stack import Stack, bucketing, check_cohort, restacked, stacking

__all__ = [
    "Reducer",
    "Roster",
    "Stack",
    "bucketing",
    "centered_mean",
    "check_cohort",
    "exact_mean",
    "fixed_mean",
    "fltrust",
    "geometric_median",
    "krum",
    "majority",
    "median",
    "modular_sum",
    "norm_bounded",
    "on_host",
    "restacked",
    "secure_threshold",
    "stacking",
    "together",
    "trimmed_mean",
    "uniform_mean",
    "weighted_mean",
]
