"""The work of one client in a round: its loss, its gradient, its steps."""

from fedjax_clip.core.loss import Gradient, batch_gradient, mixed_precision
from fedjax_clip.local.gradients import per_example_gradient, private_gradient
from fedjax_clip.local.steps import at_round, full_gradient, full_step, local_steps, proximal
from fedjax_clip.local.worker import Worker

__all__ = [
    "Gradient",
    "Worker",
    "at_round",
    "batch_gradient",
    "full_gradient",
    "full_step",
    "local_steps",
    "mixed_precision",
    "per_example_gradient",
    "private_gradient",
    "proximal",
]
