"""The work of one client in a round: its loss, its gradient, its steps."""

from fedjax_clip.core.loss import Gradient, batch_gradient, mixed_precision
from fedjax_clip.core.stateful import with_state
from fedjax_clip.local.anchors import anchored, consolidated, ewc, fisher, lwf, taught
from fedjax_clip.local.gradients import per_example_gradient, private_gradient, sharpness_aware
from fedjax_clip.local.steps import at_round, full_gradient, full_step, local_steps, mean_loss, proximal
from fedjax_clip.local.worker import Worker

__all__ = [
    "Gradient",
    "Worker",
    "anchored",
    "at_round",
    "batch_gradient",
    "consolidated",
    "ewc",
    "fisher",
    "full_gradient",
    "full_step",
    "local_steps",
    "lwf",
    "mean_loss",
    "mixed_precision",
    "per_example_gradient",
    "private_gradient",
    "proximal",
    "sharpness_aware",
    "taught",
    "with_state",
]
