"""Federated algorithms, one file each, readable beside their papers."""

from fedjax_clip.algorithms.fedavg import fedavg, fedsgd

__all__ = ["fedavg", "fedsgd"]
