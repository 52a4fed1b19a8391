"""Flax models of the project's own tasks; the library itself takes any pure function."""

from fedjax_clip.models.cnn import CNN
from fedjax_clip.models.conv import Conv, conv_general_dilated, max_pool_2x2, warn_slow_convolutions
from fedjax_clip.models.mlp import MLP

__all__ = ["CNN", "MLP", "Conv", "conv_general_dilated", "max_pool_2x2", "warn_slow_convolutions"]
