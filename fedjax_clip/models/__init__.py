"""Flax models of the project's own tasks; the library itself takes any pure function."""

from fedjax_clip.models.mlp import MLP

__all__ = ["MLP"]
