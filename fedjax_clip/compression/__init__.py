"""Compressors, with the bytes of a real encoder; ``fc.uplink.compress`` turns them into links."""

from fedjax_clip.compression.base import Code, Compressor, entropy, from_bytes, nbytes, opened, roundtrip, to_bytes
from fedjax_clip.compression.coding import Coding
from fedjax_clip.compression.pruning import prune
from fedjax_clip.compression.quantise import floats, kmeans, qsgd, sign, terngrad, uniform
from fedjax_clip.compression.rotate import eden, hadamard, random_signs, rotated
from fedjax_clip.compression.sparse import random_k, threshold, top_k

__all__ = [
    "Code",
    "Coding",
    "Compressor",
    "eden",
    "entropy",
    "floats",
    "from_bytes",
    "hadamard",
    "kmeans",
    "nbytes",
    "opened",
    "prune",
    "qsgd",
    "random_k",
    "random_signs",
    "rotated",
    "roundtrip",
    "sign",
    "terngrad",
    "threshold",
    "to_bytes",
    "top_k",
    "uniform",
]
