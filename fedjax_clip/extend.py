"""For authors of algorithms, links, reducers and drivers: what the built-in ones are made of."""

from fedjax_clip.algorithms.base import Parts, init_server, step_server
from fedjax_clip.algorithms.exchange import exchange
from fedjax_clip.algorithms.lora import Lora
from fedjax_clip.core import metrics
from fedjax_clip.core.cohort import Client, Cohort
from fedjax_clip.core.types import Algorithm, ClientState, Row, Server
from fedjax_clip.data.planning import LocalWork, plan, plan_rounds
from fedjax_clip.local.steps import local_gradient, local_steps, local_update
from fedjax_clip.training import evaluation, placement
from fedjax_clip.training.checkpoint import Checkpoints
from fedjax_clip.training.evaluation import client_evaluator, per_client
from fedjax_clip.training.loop import State

__all__ = [
    "Algorithm",
    "Checkpoints",
    "Client",
    "ClientState",
    "Cohort",
    "LocalWork",
    "Lora",
    "Parts",
    "Row",
    "Server",
    "State",
    "client_evaluator",
    "evaluation",
    "exchange",
    "init_server",
    "local_gradient",
    "local_steps",
    "local_update",
    "metrics",
    "per_client",
    "placement",
    "plan",
    "plan_rounds",
    "step_server",
]
