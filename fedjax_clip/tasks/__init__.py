"""Tasks: data, a model, a loss and its metrics, ready to train."""

from fedjax_clip.tasks.base import (
    Sample,
    Task,
    binary_classifier,
    classifier,
    classifier_with_state,
    penalised,
    refuse_fitted,
    regressor,
)
from fedjax_clip.tasks.generic import classification, digits, huggingface, npz, tfds
from fedjax_clip.tasks.language import (
    next_character,
    shakespeare_lora,
    shakespeare_lstm,
    shakespeare_transformer,
    text_files,
    tweets,
)
from fedjax_clip.tasks.large import chats, next_token, shakespeare_dialogues, texts, tweets_bert
from fedjax_clip.tasks.loading import Model, Predictions, load, save
from fedjax_clip.tasks.packaged import ames, chem97, heart, schools
from fedjax_clip.tasks.predictor import Predictor
from fedjax_clip.tasks.recommendation import insteval, movielens, ratings
from fedjax_clip.tasks.streams import stream
from fedjax_clip.tasks.synthetic import linear_regression, mlp_regression, relu_classifier, two_nodes
from fedjax_clip.tasks.tabular import csv
from fedjax_clip.tasks.vision import cifar, emnist, fashion_mnist, mnist
from fedjax_clip.training.scores import OverClients

__all__ = [
    "Model",
    "OverClients",
    "Predictions",
    "Predictor",
    "Sample",
    "Task",
    "ames",
    "binary_classifier",
    "chats",
    "chem97",
    "cifar",
    "classification",
    "classifier",
    "classifier_with_state",
    "csv",
    "digits",
    "emnist",
    "fashion_mnist",
    "heart",
    "huggingface",
    "insteval",
    "linear_regression",
    "load",
    "mlp_regression",
    "mnist",
    "movielens",
    "next_character",
    "next_token",
    "npz",
    "penalised",
    "ratings",
    "refuse_fitted",
    "regressor",
    "relu_classifier",
    "save",
    "schools",
    "shakespeare_dialogues",
    "shakespeare_lora",
    "shakespeare_lstm",
    "shakespeare_transformer",
    "stream",
    "text_files",
    "texts",
    "tfds",
    "tweets",
    "tweets_bert",
    "two_nodes",
]
