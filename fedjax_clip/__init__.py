"""Federated learning with gradient clipping: whole rounds as one compiled JAX program."""

import importlib
from typing import Any

from fedjax_clip import (
    attacks,
    checkpoint,
    clipping,
    compression,
    evaluation,
    fedopt,
    mechanism,
    metrics,
    placement,
    reduce,
    sweeping,
    uplink,
)
from fedjax_clip.algorithms import (
    compressed_broadcast,
    episode,
    episode_plus,
    fedavg,
    fedbuff,
    feddyn,
    fednova,
    fedsgd,
    mime,
    partially_frozen,
    partially_private,
    scaffold,
)
from fedjax_clip.cohort import Client, Cohort
from fedjax_clip.data import clock, folds, partition, quality, sampling, sources, speeds, statistics, tables
from fedjax_clip.data.planning import LocalWork, plan, plan_rounds
from fedjax_clip.data.population import FederatedData
from fedjax_clip.evaluation import client_evaluator, per_client
from fedjax_clip.exchange import exchange
from fedjax_clip.local import local_gradient, local_update, mixed_precision, proximal
from fedjax_clip.lora import Lora, lora
from fedjax_clip.per_example import per_example_gradient, private_gradient
from fedjax_clip.reduce import Reducer, fixed_mean, together, uniform_mean, weighted_mean
from fedjax_clip.sweeping import sweep
from fedjax_clip.training import Result, State, evaluator, train
from fedjax_clip.typing import Algorithm, ClientState, InvalidInput, Server
from fedjax_clip.uplink import Uplink

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Client",
    "ClientState",
    "Cohort",
    "FederatedData",
    "InvalidInput",
    "LocalWork",
    "Lora",
    "Reducer",
    "Result",
    "Server",
    "State",
    "Uplink",
    "attacks",
    "checkpoint",
    "client_evaluator",
    "clipping",
    "clock",
    "compressed_broadcast",
    "compression",
    "episode",
    "episode_plus",
    "evaluation",
    "evaluator",
    "exchange",
    "fedavg",
    "fedbuff",
    "feddyn",
    "fednova",
    "fedopt",
    "fedsgd",
    "fixed_mean",
    "folds",
    "homomorphic",
    "local_gradient",
    "local_update",
    "lora",
    "mechanism",
    "metrics",
    "mime",
    "mixed_precision",
    "models",
    "partially_frozen",
    "partially_private",
    "partition",
    "per_client",
    "per_example_gradient",
    "placement",
    "plan",
    "plan_rounds",
    "plots",
    "privacy",
    "private_gradient",
    "proximal",
    "quality",
    "reduce",
    "sampling",
    "scaffold",
    "secure",
    "sources",
    "speeds",
    "statistics",
    "sweep",
    "sweeping",
    "tables",
    "tasks",
    "together",
    "train",
    "uniform_mean",
    "uplink",
    "weighted_mean",
]


def __getattr__(name: str) -> Any:
    if name in (
        "homomorphic",
        "models",
        "plots",
        "privacy",
        "secure",
        "tasks",
    ):  # these import what the library itself does not need
        return importlib.import_module(f"fedjax_clip.{name}")
    raise AttributeError(f"module 'fedjax_clip' has no attribute {name!r}")
