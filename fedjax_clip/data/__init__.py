"""Populations of clients: sources, sampling, and the arrays that devices read."""

from fedjax_clip.data import (
    clock,
    folds,
    partition,
    parts,
    quality,
    sampling,
    sources,
    speeds,
    statistics,
    stream,
    tables,
)

__all__ = [
    "clock",
    "folds",
    "partition",
    "parts",
    "quality",
    "sampling",
    "sources",
    "speeds",
    "statistics",
    "stream",
    "tables",
]
