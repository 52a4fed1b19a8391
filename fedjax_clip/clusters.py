"""Clusters: algorithms that find groups of clients, and train a model for each."""

from fedjax_clip.algorithms.clusters.cfl import cfl
from fedjax_clip.algorithms.clusters.ifca import ifca
from fedjax_clip.algorithms.clusters.models import Models, stacked

__all__ = ["Models", "cfl", "ifca", "stacked"]
