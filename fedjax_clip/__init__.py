"""Federated learning with gradient clipping: whole rounds as one compiled JAX program."""

import importlib
from typing import Any

from fedjax_clip import attacks, clipping, compression, data, extend, local, placement, reduce, uplink
from fedjax_clip.algorithms import fedopt
from fedjax_clip.algorithms.broadcast import compressed_broadcast
from fedjax_clip.algorithms.episode import episode, episode_plus
from fedjax_clip.algorithms.fedavg import fedavg, fedsgd
from fedjax_clip.algorithms.fedbuff import fedbuff
from fedjax_clip.algorithms.feddyn import feddyn
from fedjax_clip.algorithms.fednova import fednova
from fedjax_clip.algorithms.frozen import partially_frozen
from fedjax_clip.algorithms.lora import lora
from fedjax_clip.algorithms.mime import mime
from fedjax_clip.algorithms.private import partially_private
from fedjax_clip.algorithms.scaffold import scaffold
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.population import FederatedData
from fedjax_clip.training import sweeping
from fedjax_clip.training.evaluation import evaluator
from fedjax_clip.training.loop import Result, train
from fedjax_clip.training.sweeping import sweep

__version__ = "0.1.0"

# Not imported with the library: most programs need none of them.
_ROOMS = (
    "adapters",
    "clusters",
    "deploy",
    "drift",
    "export",
    "fair",
    "models",
    "personal",
    "plots",
    "privacy",
    "secure",
    "sinks",
    "tasks",
)

__all__ = [
    "FederatedData",
    "InvalidInput",
    "Result",
    "attacks",
    "clipping",
    "compressed_broadcast",
    "compression",
    "data",
    "episode",
    "episode_plus",
    "evaluator",
    "extend",
    "fedavg",
    "fedbuff",
    "feddyn",
    "fednova",
    "fedopt",
    "fedsgd",
    "local",
    "lora",
    "mime",
    "models",
    "partially_frozen",
    "partially_private",
    "placement",
    "plots",
    "privacy",
    "reduce",
    "scaffold",
    "secure",
    "sweep",
    "sweeping",
    "tasks",
    "train",
    "uplink",
]


def __getattr__(name: str) -> Any:
    # These import what the library itself does not need.
    if name in _ROOMS:
        return importlib.import_module(f"fedjax_clip.{name}")
    raise AttributeError(f"module 'fedjax_clip' has no attribute {name!r}")
