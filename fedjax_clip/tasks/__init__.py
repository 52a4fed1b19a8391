"""Tasks: data, a model, a loss and its metrics, ready to train."""

from fedjax_clip.tasks.base import Task, binary_classifier, classifier, penalised, refuse_fitted, regressor
from fedjax_clip.tasks.generic import classification, digits, npz, tfds
from fedjax_clip.tasks.language import (
    next_character,
    shakespeare_lora,
    shakespeare_lstm,
    shakespeare_transformer,
    text_files,
    tweets,
)
from fedjax_clip.tasks.packaged import ames, chem97, heart, schools
from fedjax_clip.tasks.recommendation import insteval, movielens, ratings
from fedjax_clip.tasks.synthetic import linear_regression, mlp_regression, relu_classifier, two_nodes
from fedjax_clip.tasks.tabular import csv
from fedjax_clip.tasks.vision import cifar, emnist, fashion_mnist, mnist

__all__ = [
    "Task",
    "ames",
    "binary_classifier",
    "chem97",
    "cifar",
    "classification",
    "classifier",
    "csv",
    "digits",
    "emnist",
    "fashion_mnist",
    "heart",
    "insteval",
    "linear_regression",
    "mlp_regression",
    "mnist",
    "movielens",
    "next_character",
    "npz",
    "penalised",
    "ratings",
    "refuse_fitted",
    "regressor",
    "relu_classifier",
    "schools",
    "shakespeare_lora",
    "shakespeare_lstm",
    "shakespeare_transformer",
    "text_files",
    "tfds",
    "tweets",
    "two_nodes",
]
