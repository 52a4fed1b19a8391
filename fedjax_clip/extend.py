"""For authors of algorithms, links, reducers and drivers: the parts of the built-in ones."""

from fedjax_clip.algorithms.base import Round, algorithm, init_server, step_server
from fedjax_clip.algorithms.exchange import Answer, exchange
from fedjax_clip.algorithms.lora import Lora
from fedjax_clip.algorithms.parts import Parts
from fedjax_clip.core import metrics
from fedjax_clip.core.cohort import Client, Cohort
from fedjax_clip.core.types import Algorithm, ClientState, Row, Server
from fedjax_clip.data.planning import LocalWork, plan, plan_rounds
from fedjax_clip.local.steps import local_steps
from fedjax_clip.local.worker import Worker
from fedjax_clip.training import placement
from fedjax_clip.training.best import Best, Kept
from fedjax_clip.training.checkpoint import Checkpoints
from fedjax_clip.training.going_on import grown
from fedjax_clip.training.state import State

__all__ = [
    "Algorithm",
    "Answer",
    "Best",
    "Checkpoints",
    "Client",
    "ClientState",
    "Cohort",
    "Kept",
    "LocalWork",
    "Lora",
    "Parts",
    "Round",
    "Row",
    "Server",
    "State",
    "Worker",
    "algorithm",
    "exchange",
    "grown",
    "init_server",
    "local_steps",
    "metrics",
    "placement",
    "plan",
    "plan_rounds",
    "step_server",
]
