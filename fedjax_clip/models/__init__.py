"""Flax models of the project's own tasks; the library itself takes any pure function."""

from fedjax_clip.core.convolution import conv_general_dilated, warn_slow_convolutions
from fedjax_clip.models.cnn import CNN
from fedjax_clip.models.conv import Conv, max_pool_2x2
from fedjax_clip.models.factorisation import Factorisation
from fedjax_clip.models.lstm import CharLSTM
from fedjax_clip.models.mlp import MLP
from fedjax_clip.models.norms import BatchNorm
from fedjax_clip.models.resnet import ResNet
from fedjax_clip.models.transformer import Transformer
from fedjax_clip.models.words import BagOfWords

__all__ = [
    "CNN",
    "MLP",
    "BagOfWords",
    "BatchNorm",
    "CharLSTM",
    "Conv",
    "Factorisation",
    "ResNet",
    "Transformer",
    "conv_general_dilated",
    "max_pool_2x2",
    "warn_slow_convolutions",
]
