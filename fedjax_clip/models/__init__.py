"""Flax models of the project's own tasks; the library itself takes any pure function."""

from fedjax_clip.core.convolution import conv_general_dilated, warn_slow_convolutions
from fedjax_clip.models.bert import Bert, TextClassifier, mean_pooled
from fedjax_clip.models.cnn import CNN
from fedjax_clip.models.conv import Conv, max_pool_2x2
from fedjax_clip.models.dense import Dense, Quantised, quantised
from fedjax_clip.models.factorisation import Factorisation
from fedjax_clip.models.llama import Llama, generate
from fedjax_clip.models.lstm import CharLSTM
from fedjax_clip.models.mlp import MLP
from fedjax_clip.models.norms import BatchNorm
from fedjax_clip.models.resnet import ResNet
from fedjax_clip.models.transformer import Transformer
from fedjax_clip.models.weights import Pretrained, pretrained
from fedjax_clip.models.words import BagOfWords

__all__ = [
    "CNN",
    "MLP",
    "BagOfWords",
    "BatchNorm",
    "Bert",
    "CharLSTM",
    "Conv",
    "Dense",
    "Factorisation",
    "Llama",
    "Pretrained",
    "Quantised",
    "ResNet",
    "TextClassifier",
    "Transformer",
    "conv_general_dilated",
    "generate",
    "max_pool_2x2",
    "mean_pooled",
    "pretrained",
    "quantised",
    "warn_slow_convolutions",
]
