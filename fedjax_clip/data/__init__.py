"""Populations of clients: where they come from, who takes part in a round, and what the devices read."""

from fedjax_clip.data import clock, folds, partition, quality, sampling, sources, speeds, statistics, tables

__all__ = ["clock", "folds", "partition", "quality", "sampling", "sources", "speeds", "statistics", "tables"]
