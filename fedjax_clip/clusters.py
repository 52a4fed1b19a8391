"""Clusters: algorithms that find groups of clients, and train a model for each."""

from fedjax_clip.algorithms.clusters.ifca import Models, ifca, stacked

__all__ = ["Models", "ifca", "stacked"]
