"""A run's settings: the arguments of ``fc.train``, checked once."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from fedjax_clip import reduce
from fedjax_clip.core import checks, tree
from fedjax_clip.core.secret import Secret
from fedjax_clip.core.types import Algorithm, InvalidInput, Params, PyTree, Row, check_named
from fedjax_clip.data import clock, sampling
from fedjax_clip.data.planning import LocalWork
from fedjax_clip.data.population import FederatedData, check_alike, check_fields, check_whole
from fedjax_clip.training import best as best_model
from fedjax_clip.training import going_on, placement, watch
from fedjax_clip.training.checkpoint import Checkpoints
from fedjax_clip.training.evaluation import Evaluator
from fedjax_clip.training.processes import Processes
from fedjax_clip.training.state import State

Evaluate = Callable[[Params], Mapping[str, float]] | Evaluator


class Store(Protocol):
    """A store of a run's states; see ``fc.extend.Checkpoints``."""

    def restore(self, template: State) -> tuple[int, State] | None: ...

    def save(self, round: int, state: State, frozen: str = "") -> None: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run's settings; their names and meanings are those of ``fc.train``."""

    algorithm: Algorithm
    data: FederatedData
    params: Params
    rounds: int
    sampler: sampling.Sampler | clock.Clock
    work: LocalWork
    seed: int
    evaluate: Evaluate | None
    eval_every: int
    checkpoints: Store | None
    checkpoint_every: int
    on_round: Callable[[Row], None]
    should_stop: Callable[[], bool]
    devices: placement.Devices
    clients_per_chunk: int | None
    rounds_per_dispatch: int | None
    non_finite: str
    secret: Secret | None
    debug: bool
    state: State | None
    best: best_model.Best | None

    @functools.cached_property
    def processes(self) -> Processes:
        """Those that train together."""
        return Processes(self.devices)

    @property
    def due(self) -> tuple[int, int]:
        """Rounds between evaluations, and between saves; 0 for never."""
        return self.eval_every if self.evaluate else 0, self.checkpoint_every if self.checkpoints else 0

    def evaluated_after(self, done: int) -> bool:
        """Whether there is an evaluation after ``done`` rounds."""
        return self.evaluate is not None and (done == self.rounds or done % self.eval_every == 0)

    def scores(self, params: Params, clients: PyTree) -> Row:
        """The evaluation's scores, ``{"eval/name": value}``.

        Args:
          params: of the model.
          clients: the clients' states.
        """
        assert self.evaluate is not None
        if isinstance(self.evaluate, Evaluator):
            return _numbered(self.evaluate.shared(params, clients, self.processes))
        with self.processes.together():
            scores = _numbered(self.evaluate(params))
        return self.processes.first(scores)


def _numbered(scores: Any) -> Row:
    """An evaluation's scores, ``{"eval/name": value}``."""
    checks.kind("What an evaluation returns", scores, Mapping, "numbers by name")
    try:
        return {f"eval/{name}": float(value) for name, value in scores.items()}
    except (TypeError, ValueError):
        raise InvalidInput(f"An evaluation must return one number for each name, not {checks.shown(scores)}.") from None


def checked(
    algorithm: Algorithm,
    data: FederatedData,
    params: Params,
    *,
    rounds: int,
    cohort_size: int | None,
    sampler: sampling.Sampler | clock.Clock | None,
    work: tuple[Any, ...],
    seed: int,
    evaluate: Evaluate | None,
    checkpoints: "Store | str | os.PathLike[str] | None",
    devices: Sequence[jax.Device] | None,
    on_round: Callable[[Row], None] | None,
    should_stop: Callable[[], bool] | None,
    debug: bool,
    state: State | None,
    best: best_model.Best | None,
    **others: Any,
) -> Settings:
    """Checks the arguments of ``fc.train`` and returns the settings.

    Args:
      work: batch size, local epochs, local steps, shuffle.
      others: as ``fc.train``.

    Raises:
      InvalidInput: an argument of the wrong kind, numbers out of range, arguments that contradict each other.
    """
    rounds, seed = checks.count("rounds", rounds), checks.seed("seed", seed)
    for name in ("eval_every", "checkpoint_every", "rounds_per_dispatch", "clients_per_chunk"):
        if others[name] is not None:
            checks.count(name, others[name])
    if (non_finite := others["non_finite"]) not in ("drop", "keep", "stop"):
        raise InvalidInput(f"non_finite must be 'drop', 'keep' or 'stop', not {non_finite!r}.")
    checks.kind("algorithm", algorithm, Algorithm, "one such as fc.fedavg(...)")
    checks.kind("data", data, FederatedData, "a FederatedData")
    checks.kind(
        "sampler", sampler, sampling.Sampler | clock.Clock | None, "a sampler such as fc.data.sampling.uniform(10)"
    )
    if sampler is not None and cohort_size is not None:
        raise InvalidInput("cohort_size and sampler both say how many clients take part: give one of them.")
    checks.kind("secret", others["secret"], Secret | None, "an fc.privacy.Secret, such as fc.privacy.Secret.fresh()")
    if data.lives is not None and isinstance(sampler, clock.Clock):
        raise InvalidInput(
            "A clock times clients whose examples stay the same: give a stream a sampler such as "
            "fc.data.sampling.uniform(10)."
        )
    check_fields(data)
    check_named(algorithm, data.num_clients)
    if getattr(getattr(algorithm.parts, "gradient", None), "counts_alike", False):
        check_alike(data)
    for name, function, count, wanted in (
        ("evaluate", evaluate, 1, "the parameters: fc.evaluator(per_example_loss, sets) makes one"),
        ("on_round", on_round, 1, "a row"),
        ("should_stop", should_stop, 0, "nothing, which says whether to stop"),
    ):
        if function is not None:
            checks.takes(name, function, count, wanted)
    if best is not None:
        best_model.check(best, evaluate is not None)
    if state is not None:
        going_on.check(state, rounds)
        if others["secret"] is not None:
            raise InvalidInput(going_on.WITHOUT)
    if isinstance(checkpoints, str | os.PathLike):
        checkpoints = Checkpoints(checkpoints)
    if checkpoints is not None and not hasattr(checkpoints, "restore"):
        raise InvalidInput(
            f"checkpoints must be a directory, or fc.extend.Checkpoints(directory), not {checks.shown(checkpoints)}."
        )
    params = tree.parameters(params)
    sampler = sampler or sampling.uniform(data.num_clients if cohort_size is None else cohort_size)
    if algorithm.parts is not None and isinstance(sampler, sampling.Sampler):
        reduce.check_cohort(algorithm.parts.reducer, sampler.cohort_size)
    local_work, devices = LocalWork(*work), placement.chosen(devices)
    processes = Processes(devices)
    if debug and processes.count > 1:
        raise InvalidInput("debug=True runs in one process: give devices=jax.local_devices().")
    if isinstance(checkpoints, Checkpoints) and processes.count > 1:
        checkpoints = checkpoints.shared_by(processes)
    if processes.count == 1:
        check_whole("data, in one process,", data)
    if data.own is not None and others["secret"] is not None:
        raise InvalidInput("A secret draws other noise for other data, and data opened in parts cannot be compared.")
    with placement.beginning(devices):
        meet = algorithm.loss is not None and watch.examples_meet(algorithm.loss, data, params, local_work)
    if meet:
        warnings.warn(watch.MEET, stacklevel=3)  # so that the warning points at the call of train
    return Settings(
        *(algorithm, data, params, rounds, sampler, local_work, seed, evaluate),
        checkpoints=checkpoints,
        devices=devices[:1] if debug else devices,
        on_round=on_round or (lambda row: None),
        should_stop=should_stop or (lambda: False),
        debug=debug,
        state=state,
        best=best,
        **others,
    )
