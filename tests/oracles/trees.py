"""Arithmetic on dicts of float64 arrays."""

import numpy as np


def as64(tree):
    return {k: np.array(v, dtype=np.float64) for k, v in tree.items()}


def zeros_like(tree):
    return {k: np.zeros_like(v, dtype=np.float64) for k, v in tree.items()}


def full_like(tree, value):
    return {k: np.full_like(v, value, dtype=np.float64) for k, v in tree.items()}


def add(a, b):
    return {k: a[k] + b[k] for k in a}


def sub(a, b):
    return {k: a[k] - b[k] for k in a}


def scale(c, a):
    return {k: c * a[k] for k in a}


def global_norm(tree):
    return float(np.sqrt(sum(np.sum(v * v) for v in tree.values())))


def all_finite(tree):
    return all(np.all(np.isfinite(v)) for v in tree.values())


def clip_to_norm(tree, c):
    """(tree * min(1, c / ||tree||), whether it was shrunk)."""
    norm = global_norm(tree)
    if norm > c:
        return scale(c / norm, tree), True
    return tree, False
