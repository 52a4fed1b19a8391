"""Saving and resuming a run: its identity, its checkpoints, and Ctrl-C between two dispatches."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fedjax_clip.core.secret import Secret
from fedjax_clip.core.types import InvalidInput, Row
from fedjax_clip.training import best, going_on, identity, placement, states
from fedjax_clip.training.dispatch import Dispatcher
from fedjax_clip.training.settings import Settings
from fedjax_clip.training.state import Members, State


class Saver:
    """Restores a run and saves it.

    Args:
      run: the settings, with or without checkpoints.

    Attributes:
      run: the settings.
      identity: what a checkpoint must agree with; empty without checkpoints.
      members: the clients that train.
      joined: columns of the first row that say what the run took over from another one's state, if it did.
    """

    def __init__(self, run: Settings):
        self.run = run
        self.identity: dict[str, Any] = {}
        self.members = Members.of(run.data)
        self.joined: Row = {}
        self._take_over: Callable[[], None] = lambda: None
        if run.checkpoints is not None:
            self.identity = identity.identify(run.algorithm, run.data, run.sampler, run.work, run.seed)
            self.identity |= {} if run.secret is None else {"secret": run.secret.commitment}
            self.identity |= {} if run.best is None else {"best": run.best.metric}
            if run.state is not None:
                self.identity |= {identity.BEGINNING: identity.hashed(going_on.digest(run.state))}

    def restore(self) -> tuple[int, State]:
        """``(rounds done, state)`` of the newest checkpoint, or of the beginning if there is none.

        Raises:
          InvalidInput: a checkpoint that is damaged, of another run, or of more rounds than this run's.
        """
        run = self.run
        with placement.beginning(run.devices):
            alike = states.alike(run.algorithm, run.params, run.data.num_clients)
            server = run.algorithm.init(run.params)
        if run.sampler.replacement and jax.tree.leaves(alike):
            raise InvalidInput("This algorithm's clients keep a state, so a sampler with replacement cannot serve it.")
        # What stays of a model is not in checkpoints: it is that of the state that the run went on from, if it did.
        given = run.state.server.params if run.state is not None and run.algorithm.frozen else None
        nothing = (
            () if run.best is None else best.begin(jax.tree.map(np.asarray, run.params if given is None else given))
        )
        state = State(server, alike, self.identity, self.members, 0, nothing)
        saved = state if given is None else state._replace(server=server._replace(params=given))
        found = None if run.checkpoints is None else run.checkpoints.restore(saved)
        place = getattr(run.checkpoints, "place", None)
        if found is None and run.state is not None:
            going_on.check_alike(run.algorithm, state, run.state)
            with run.processes.together():
                told = run.algorithm, run.state, self.members, place, run.processes
                state, self.joined, self._take_over = going_on.carried(*told)
            return state.rounds, state._replace(run=self.identity | state.run, best=nothing)
        if found is None:
            clients = states.begun(alike, place, run.processes)
            found = 0, state._replace(clients=clients.tree)
        start, state = found
        identity.check("The checkpoint", state.run, self.identity)
        if start > run.rounds:
            raise InvalidInput(
                f"The checkpoint is of a run that has done {start} rounds, more than rounds={run.rounds}: ask for "
                f"{start} or more, or name another directory."
            )
        return start, state

    @contextlib.contextmanager
    def held(self, clients: Any) -> Iterator[None]:
        """A context in which no other run writes the clients' states; a run that goes on takes over theirs in it.

        Args:
          clients: of the state from ``restore``.
        """
        with states.of(clients).held():
            with self.run.processes.together():
                self._take_over()
            yield

    def secret(self, start: int) -> Secret | None:
        """The secret that this run draws from, if it has one; runs on other data draw other numbers."""
        if (secret := self.run.secret) is None:
            return None
        if start == 0:
            secret.begin()
        return secret.of(identity.fingerprint(self.run.data))

    def state(self, done: int, dispatcher: Dispatcher, kept: Any) -> State:
        """The state to resume from, with the width that the run began with.

        Args:
          done: rounds.
          dispatcher: of the run.
          kept: the best model so far, if the run keeps it.
        """
        run = {"algorithm": identity.kind(self.run.algorithm)} | self.identity | {"width": dispatcher.planner.width}
        server, clients = placement.first_replica(dispatcher.server), dispatcher.clients.tree
        return State(server, clients, run, self.members, done, kept)

    def save(self, done: int, dispatcher: Dispatcher, kept: Any, stop: bool) -> None:
        """Saves the state after ``done`` rounds if a checkpoint is due, at the end, or if the run stops."""
        run = self.run
        if run.checkpoints is not None and (stop or done == run.rounds or done % run.checkpoint_every == 0):
            run.checkpoints.save(done, self.state(done, dispatcher, kept), run.algorithm.frozen)

    def interrupts(self) -> contextlib.AbstractContextManager[Callable[[], bool]]:
        """Delays a first Ctrl-C until the dispatch ends, if there are checkpoints: until then no state is valid."""
        return held_back(self.run.checkpoints is not None)


@contextlib.contextmanager
def held_back(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Delays the first Ctrl-C: the block asks whether one came. A second Ctrl-C ends the block at once.

    Nothing changes in a program that handles SIGINT itself, or outside the main thread, where Python delivers no
    signals. A delayed Ctrl-C is raised when the block ends.

    Args:
      wanted: if false, nothing is delayed.

    Example:
      >>> with held_back(True) as interrupted:
      ...   for round in range(3):
      ...     if interrupted():
      ...       break
    """
    came = False

    def handle(number: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    main = threading.current_thread() is threading.main_thread()
    if not (wanted and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
