"""Blocks of rounds on their way to the devices and back."""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedjax_clip.core import keys
from fedjax_clip.core.convolution import warn_slow_convolutions
from fedjax_clip.core.types import Algorithm, Params, PyTree
from fedjax_clip.training import placement
from fedjax_clip.training.planner import Block, Planner
from fedjax_clip.training.states import ClientStates

Columns = dict[str, np.ndarray]  # a run's metrics by name, [R] each


class Dispatcher:
    """Sends a run's rounds to the devices, block by block, and takes the results back.

    ``next`` gives the next block, ``send`` sends it and plans the one behind it while the devices work, ``wait`` waits
    for the metrics.

    Args:
      algorithm: the algorithm to train.
      planner: plans the blocks.
      server: the server's state, on the host.
      clients: the clients' states, on the host; updated in place.
      debug: whether every operation runs uncompiled, see ``fc.train``.

    Attributes:
      server: the server's state on the devices, ``[D, ...]``.
      clients: the clients' states.
    """

    def __init__(
        self, algorithm: Algorithm, planner: Planner, server: PyTree, clients: ClientStates, debug: bool = False
    ):
        self.algorithm, self.planner, self.clients = algorithm, planner, clients
        self.server = placement.send_server(server, planner.devices)
        self.key = keys.seeded(planner.seed)
        make = placement.eager_rounds if debug else placement.rounds
        self._make: Callable[[Algorithm], Callable[..., Any]] = lambda a: make(a, planner.devices)
        self._run_rounds = self._make(algorithm)
        self._packer = concurrent.futures.ThreadPoolExecutor(1)
        self._left = range(0)
        self._every: tuple[int, ...] = ()
        self._planned: Callable[[], Block] | None = None
        self._started: list[Columns] = []

    def __enter__(self) -> "Dispatcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._packer.shutdown()

    def start(self) -> list[Columns]:
        """Runs the algorithm's ``start``, in which all clients take part; the metrics of each cohort, ``[1]`` each."""
        assert self.algorithm.start is not None
        run_rounds = self._make(self.algorithm._replace(round=self.algorithm.start))
        for block in self.planner.everyone():
            self.server, finish = self._dispatch(self.server, block, run_rounds)
            _, columns = finish()
            self._started.append(columns)
        self.planner.seconds = math.inf  # the start is not a round, so its time says nothing about one
        return self._started

    def begin(self, rounds: range, every: tuple[int, ...], params: Params) -> None:
        """Plans the first block of these rounds. No block goes beyond a multiple of ``every``, if that is not 0."""
        self._left, self._every = rounds, every
        self._planned = self._plan_next()
        if self._planned is not None:
            self._warn_slow_convolutions(self._planned(), params)

    def next(self) -> Block | None:
        """The next block, sampled and planned; ``None`` after the last."""
        self._began = time.perf_counter()
        return None if self._planned is None else self._planned()

    def send(self, block: Block) -> None:
        """Has the devices run a block's rounds, and plans the next block while they work."""
        self.server, self._finish = self._dispatch(self.server, block, self._run_rounds)
        self._planned = self._plan_next()

    def wait(self) -> Columns:
        """The metrics of the block that was sent, once it is done; the clients' states are written then, too."""
        block, columns = self._finish()
        if block.rounds.start == 0 and self._started:
            for name in ("bytes_down", "bytes_up", "steps"):
                columns[name] = columns[name].copy()
                columns[name][0] += sum(x[name][0] for x in self._started)
        seconds = self.planner.processes.most((time.perf_counter() - self._began) / len(block.rounds))
        return columns | {"seconds": np.full(len(block.rounds), seconds)}

    def _plan_next(self) -> Callable[[], Block] | None:
        """The next block, if there is one: planned here if that is quick, else packed by a thread."""
        if not self._left:
            return None
        rounds = self.planner.first_of(self._left, *self._every)
        self._left = range(rounds.stop, self._left.stop)
        if not self.planner.resident:
            return self._packer.submit(self.planner.plan, rounds).result
        block = self.planner.plan(rounds)
        return lambda: block

    def _dispatch(
        self, server: PyTree, block: Block, run_rounds: Callable[..., Any]
    ) -> tuple[PyTree, Callable[[], tuple[Block, Columns]]]:
        """The server's state after the block (not yet computed), and a function that waits for it."""
        cohorts = dataclasses.replace(block.cohorts, state=self.clients.gather(block.ids))
        began = time.perf_counter()
        server, states, report = run_rounds(server, cohorts, self.key, len(block.rounds))

        def finish() -> tuple[Block, Columns]:
            # Two dispatches must not be in flight at once: their collectives deadlock on CPU devices.
            columns = placement.first_replica(report)
            self.clients.scatter(block.ids, states)
            self.planner.took((time.perf_counter() - began) / len(block.rounds))
            return block, columns | block.columns

        return server, finish

    def _warn_slow_convolutions(self, block: Block, params: Params) -> None:
        """Warns of convolutions that are slow on a CPU, and says what to write in their place."""
        if not self.planner.on_cpu or all(np.ndim(x) < 3 for x in jax.tree.leaves(params)):
            return

        def shape(skip: int) -> Callable:
            return lambda x: jax.ShapeDtypeStruct(x.shape[skip:], x.dtype)

        cohort = jax.tree.map(shape(2), dataclasses.replace(block.cohorts, population=None))
        # Traced for one client: under vmap every convolution would look grouped, and grouped ones have no remedy.
        kept = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*cohort.ids.shape, *x.shape[1:]), x.dtype), self.clients.tree
        )
        population = jax.tree.map(shape(1), self.planner.population)
        cohort = dataclasses.replace(cohort, state=kept, population=population, width=1)
        server = jax.tree.map(shape(1), self.server)
        warn_slow_convolutions(self.algorithm.round, server, cohort, self.key, platform="cpu")
