"""How many clients a device trains at once: by a rule on a CPU, by a short trial on other devices."""

import math
import time
import weakref
from collections.abc import Callable

import jax
import numpy as np

from fedjax_clip.core.types import Params
from fedjax_clip.data.speeds import BatchSizes
from fedjax_clip.training import placement
from fedjax_clip.training.dispatch import Dispatcher
from fedjax_clip.training.planner import Planner

WIDE_BYTES = 2**16  # on a CPU, smaller models train several clients at once: per-operation overhead dominates
WIDE = 16  # clients trained at once; more if all take equally many steps, because then no lane idles
ALL_BYTES = 2**20  # then as many clients as have parameters of this size in all

# Weak keys: widths go with their round function.
_WIDTHS: weakref.WeakKeyDictionary[Callable, dict[tuple, int]] = weakref.WeakKeyDictionary()


def choose(dispatcher: Dispatcher, params: Params, round: int) -> int:
    """The width of a run that begins with this round.

    The trial begins with all of a device's clients and divides by 4 as long as that is faster. Its result is remembered
    for the life of the process.
    """
    planner = dispatcher.planner
    most = max(1, math.ceil(len(planner.turns[round].ids) / len(planner.devices)))
    if planner.on_cpu:
        return by_rule(planner, params, most)
    shapes = tuple((x.shape, str(x.dtype)) for x in planner.data.fields().values())
    tried = _WIDTHS.setdefault(dispatcher.algorithm.round, {})
    key = tuple(planner.devices), planner.work, shapes, most
    if key not in tried:
        tried[key] = fastest(most, lambda width: seconds(dispatcher, width, round))
    return tried[key]


def by_rule(planner: Planner, params: Params, most: int) -> int:
    """On a CPU: 1 for larger models, else up to ``most``."""
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    steps = planner.work.steps
    own = callable(steps) or isinstance(planner.work.batch_size, BatchSizes)
    even = not own and (steps is not None or np.ptp(planner.data.sizes) == 0)
    return 1 if size > WIDE_BYTES else min(most, max(WIDE, ALL_BYTES // max(1, size)) if even else WIDE)


def fastest(widest: int, seconds: Callable[[int], float]) -> int:
    """Tries ``widest``, a quarter of it, ..., 1; stops at the width after which the next gains less than 5%."""
    best, least = widest, seconds(widest)
    while best > 1:
        narrower = max(1, best // 4)
        took = seconds(narrower)
        if took > 0.95 * least:
            break
        best, least = narrower, took
    return best


def seconds(dispatcher: Dispatcher, width: int, round: int) -> float:
    """Seconds of a round at this width, which leaves the run's state as it is; infinite if it does not fit."""
    planner, took = dispatcher.planner, []
    planner.width, planner.least = width, (0, 0)
    block = planner.plan(range(round, round + 1))
    server = placement.first_replica(dispatcher.server)
    for _ in range(3):  # the first one compiles
        own = placement.send_server(server, planner.devices)
        began = time.perf_counter()
        try:
            dispatcher.run(own, block, keep=False)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return math.inf
            raise
        took.append(planner.processes.most(time.perf_counter() - began))
    return min(took[1:])
