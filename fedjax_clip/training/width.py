"""How many clients a device trains at once, by a rule: nothing is compiled or timed to find it.

A step of a small model is bound by the latency of its operations, and clients trained at once share it. They must not
outgrow the memory on the chip. ``benchmarks/README.md`` has the cycles behind the numbers for a TPU. No GPU was
measured: there the rule is cautious.
"""

import math

import jax
import numpy as np

from fedjax_clip.core.types import Params
from fedjax_clip.data.speeds import BatchSizes
from fedjax_clip.training.planner import Planner

WIDE_BYTES = 2**16  # on a CPU, smaller models train several clients at once: per-operation overhead dominates
WIDE = 16  # clients trained at once; more on a CPU if all take equally many steps, because then no lane idles
ALL_BYTES = 2**20  # then as many clients as have parameters of this size in all

ON_CHIP = {"TPU v5 lite": 2**27, "TPU v5e": 2**27, "TPU v6 lite": 2**27, "TPU v6e": 2**27}  # bytes of a TPU's VMEM
LEAST_ON_CHIP = 2**24  # of other TPUs, and of a GPU's cache
COPIES = 6  # a step holds a client's parameters, gradient, update and maps at the same time


def choose(planner: Planner, params: Params, round: int) -> int:
    """The width of a run that begins with this round: at most a device's share of the round's cohort."""
    most = max(1, math.ceil(len(planner.turns[round].ids) / len(planner.devices)))
    return min(most, on_cpu(planner, params) if planner.on_cpu else on_accelerator(planner.devices[0], params))


def on_cpu(planner: Planner, params: Params) -> int:
    """1 for larger models, else 16, or more if no client waits for another."""
    size = _nbytes(params)
    steps = planner.work.steps
    own = callable(steps) or isinstance(planner.work.batch_size, BatchSizes)
    even = not own and (steps is not None or np.ptp(planner.data.sizes) == 0)
    return 1 if size > WIDE_BYTES else max(WIDE, ALL_BYTES // max(1, size)) if even else WIDE


def on_accelerator(device: jax.Device, params: Params) -> int:
    """Up to 16 clients whose steps fit in the memory on the chip.

    On a GPU 1 for a model with convolutions (a parameter of three or more axes), which under ``vmap`` would be grouped.
    """
    if device.platform != "tpu" and any(np.ndim(x) > 2 for x in jax.tree.leaves(params)):
        return 1
    room = ON_CHIP.get(device.device_kind, LEAST_ON_CHIP)
    return min(WIDE, max(1, room // (COPIES * max(1, _nbytes(params)))))


def _nbytes(params: Params) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(params))
