"""Fairness: algorithms that serve the clients with the largest losses better."""

from fedjax_clip.algorithms.fair.afl import afl
from fedjax_clip.algorithms.fair.q_ffl import q_ffl
from fedjax_clip.algorithms.fair.term import term

__all__ = ["afl", "q_ffl", "term"]
