"""Federated low-rank adapters whose products are averaged, not their factors."""

from fedjax_clip.algorithms.adapters import decomposed, residual, stacked

__all__ = ["decomposed", "residual", "stacked"]
