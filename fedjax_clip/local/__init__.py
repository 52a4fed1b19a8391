"""What one client does in a round: its loss, its gradient, its steps."""

from fedjax_clip.core.loss import Gradient, batch_gradient, mixed_precision
from fedjax_clip.local.gradients import per_example_gradient, private_gradient
from fedjax_clip.local.steps import (
    ClientFn,
    at_round,
    full_gradient,
    local_gradient,
    local_steps,
    local_update,
    proximal,
)

__all__ = [
    "ClientFn",
    "Gradient",
    "at_round",
    "batch_gradient",
    "full_gradient",
    "local_gradient",
    "local_steps",
    "local_update",
    "mixed_precision",
    "per_example_gradient",
    "private_gradient",
    "proximal",
]
