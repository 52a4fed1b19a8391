"""The driver: samples and plans cohorts, runs the compiled round, evaluates, saves and resumes."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedjax_clip.algorithms import averaging
from fedjax_clip.core import tree
from fedjax_clip.core.secret import Secret
from fedjax_clip.core.types import Algorithm, Params, Row
from fedjax_clip.data import clock, sampling, speeds
from fedjax_clip.data.population import FederatedData
from fedjax_clip.training import agreement, failures, owned, placement, processes, settings, states, width
from fedjax_clip.training.best import Best, Kept, enough, seen
from fedjax_clip.training.dispatch import Columns, Dispatcher
from fedjax_clip.training.planner import Planner
from fedjax_clip.training.saving import Saver
from fedjax_clip.training.settings import Evaluate, Settings, Store
from fedjax_clip.training.state import State
from fedjax_clip.training.state import client_states as client_states
from fedjax_clip.training.watch import Watch


class Result(NamedTuple):
    """The result of ``train``: final parameters, the last state, and one row of metrics for each round.

    The history of a resumed run, or of one that went on from a state, begins at its first round here; it is empty if no
    round was left. The run directories of ``experiments.run`` have all rows.

    Attributes:
      params: of the model.
      state: to go on from.
      history: a row a round, see ``fc.train``.
      best: the best model, with ``fc.train(best=...)``: its ``params``, the metric's ``value`` and the ``round``.

    Example:
      >>> result = fc.train(algorithm, data, params, rounds=20)
      >>> result.history[-1]["round"], bool(result.history[-1]["loss"] < result.history[0]["loss"])
      (20.0, True)
    """

    params: Params
    state: State
    history: list[Row]
    best: Kept | None = None


def train(
    algorithm: Algorithm,
    data: FederatedData,
    params: Params,
    *,
    rounds: int,
    cohort_size: int | None = None,
    sampler: sampling.Sampler | clock.Clock | None = None,
    batch_size: int | speeds.BatchSizes | None = 20,
    local_epochs: int = 1,
    local_steps: int | Callable[[np.ndarray, int], np.ndarray] | None = None,
    shuffle: bool = True,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    eval_every: int = 10,
    checkpoints: Store | str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    on_round: Callable[[Row], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    devices: Sequence[jax.Device] | None = None,
    clients_per_chunk: int | None = None,
    rounds_per_dispatch: int | None = None,
    non_finite: str = "drop",
    secret: Secret | None = None,
    debug: bool = False,
    state: State | None = None,
    best: Best | None = None,
) -> Result:
    """Trains for a number of rounds, each one compiled program over all devices.

    Training the same ``algorithm`` object again, with another seed for example, reuses its compiled programs. They are
    freed with the object.

    After ``jax.distributed.initialize`` all processes train one model together, on the devices of all. Every process
    calls ``fc.train`` with the same arguments, and gets the same result. A difference between them, or an error in one,
    ends all with a sentence. ``on_round`` is called in every process with the same rows; a stop that one process asks
    for stops all. Give ``devices=jax.local_devices()`` to train in one process alone.

    The result is a function of (algorithm, data, params, seed, secret). Resuming changes no bit of it. Client order,
    chunks and the number of devices change it by rounding only; ``fc.reduce.exact_mean`` says with what they do not.

    Args:
      algorithm: ``fc.fedavg(...)`` or any other.
      data: the training population.
      params: initial parameters; they are copied.
      rounds: total number of rounds, including those before a resume.
      cohort_size: clients a round, drawn uniformly without replacement; all clients by default.
      sampler: how cohorts are drawn, in place of ``cohort_size``; see ``fc.data.sampling``. Or a clock, which also says
        how long rounds take; see ``fc.data.clock``.
      batch_size: examples in a local step. ``None`` takes all of a client's examples at once.
        ``fc.data.speeds.batch_budget(...)`` gives each client its own number.
      local_epochs: passes of a client over its examples in a round.
      local_steps: local steps in a round, in place of ``local_epochs``. ``fc.data.speeds.budget(...)`` gives each
        client its own number.
      shuffle: whether a client shuffles its examples in each pass.
      seed: of everything random that a ``secret`` does not cover.
      evaluate: ``fc.evaluator(...)``, or a function ``params -> {name: value}``, called every ``eval_every`` rounds and
        after the last. Its values appear in that round's row as ``eval/name``. An evaluator is given the clients'
        states as well, for models of their own.
      eval_every: rounds from one evaluation to the next.
      checkpoints: where to resume from and save to: a directory, or ``fc.extend.Checkpoints(directory)`` with options.
        A run resumes if the checkpoint agrees with it on the kind of algorithm, the shapes of its state, all of
        ``data``, the sampler, the local work and the seed. ``rounds`` may grow; all other arguments may change. The
        check cannot see numbers inside the loss, the optimisers and the links, such as a learning rate: do not change
        them. With checkpoints, a first Ctrl-C waits until the running rounds end, saves the state, and is then raised.
        A second one ends the run at once.
      checkpoint_every: rounds from one save to the next.
      on_round: called with each round's row.
      should_stop: asked after each dispatch; if true, the state is saved and training ends early.
      devices: devices to use, or ``fc.placement.mesh(...)``; by default all, of all processes.
      clients_per_chunk: clients that a device trains at once. By default, on a CPU: 1, or up to all of them if the
        model is smaller than 64 KiB. On a GPU or TPU up to 16, as many as fit in the memory on the chip; 1 for a
        model with convolutions on a GPU. A resumed run keeps the number that it began with.
      rounds_per_dispatch: how many rounds are sent to the devices at once. By default, from the second dispatch on, as
        many as take 0.1 seconds. A dispatch ends where an evaluation or a checkpoint is due. ``on_round`` and
        ``should_stop`` are called after each dispatch: give 1 to have them called after every round. The number changes
        no bit of the result. Rounds go one at a time if clients keep a state or the population does not fit on the
        devices; the next round is planned meanwhile.
      non_finite: what happens to a client whose update has a NaN, an infinity or a norm beyond 1e19. ``"drop"`` leaves
        it out, counts it in ``dropped`` and keeps its old state. This hides divergence: look at ``dropped``. ``"keep"``
        adds it, and the model shows it. ``"stop"`` ends training with an error that names the round and the clients.
        Under noise or a secure sum only ``"drop"`` is allowed, and such a client sends zeros like any other message.
      secret: ``fc.privacy.Secret.fresh()``, the source of randomness for cohorts, for noise, and for all else that
        clients and links draw. It replaces the seed there, which anybody can guess: an epsilon holds only for a run
        with a secret. Batches stay on the seed, and so do the rotations and sketches that clients and server share. A
        resumed run needs the same secret: ``fc.privacy.Secret.kept(path)``. On other data it draws other numbers.
      debug: runs one client after the other on one device, without compilation, so that ``print`` shows values and an
        error names the round, the client and the local step. The parameters are the same up to rounding. It is slow:
        try a few rounds of few clients.
      state: ``result.state`` of another run, to go on from: the server with its optimiser and the links' states, the
        number of the round, and the states of the clients that stayed. ``data`` may have changed. Clients are matched
        by name; new ones begin afresh. With the same data the result is that of one longer run, to the last bit. Of
        ``params`` only the shapes count. ``state`` is not changed. With checkpoints, name a new directory; the same
        call then resumes this run.
      best: ``fc.extend.Best("examples/accuracy", patience=5)`` keeps the best model as ``result.best``, and ends
        training if none better comes.

    Returns:
      A ``Result``. A row has ``round`` (from 1), the algorithm's metrics, ``wasted_steps`` (the fraction of the
      devices' steps that trained no client), ``seconds``, ``eval/...``, and the clock's columns. If the algorithm has a
      ``start``, the first row's bytes and steps include it. The first row of a run that goes on from a state has
      ``went_on_from`` (the state's round), ``clients_kept``, ``clients_new`` and ``clients_gone``.

    Raises:
      InvalidInput: rounds < 1, a cohort larger than the population, a loss of the wrong shape, a client whose update
        is not finite under ``non_finite="stop"`` ...
      Exception: what the loss, an optimiser, a link or an evaluation raises, with a note that names the stage.

    Example:
      >>> result = fc.train(algorithm, data, params, rounds=100, cohort_size=10)
    """
    eagerly = jax.disable_jit() if debug else contextlib.nullcontext()
    # A user may forbid implicit transfers; the driver's own transfers are intended.
    with jax.transfer_guard("allow"), failures.Explained(data, debug), eagerly:
        with processes.joined(devices).together():
            run = settings.checked(
                *(algorithm, data, params),
                rounds=rounds,
                cohort_size=cohort_size,
                sampler=sampler,
                work=(batch_size, local_epochs, local_steps, shuffle),
                seed=seed,
                evaluate=evaluate,
                eval_every=eval_every,
                checkpoints=checkpoints,
                checkpoint_every=checkpoint_every,
                on_round=on_round,
                should_stop=should_stop,
                devices=devices,
                clients_per_chunk=clients_per_chunk,
                rounds_per_dispatch=rounds_per_dispatch,
                non_finite=non_finite,
                secret=secret,
                debug=debug,
                state=state,
                best=best,
            )
            saver, watch, history = Saver(run), Watch(run.algorithm, run.params, run.data), list[Row]()
        agreement.check(run, saver.identity)
        done, begin = saver.restore()
        kept, last = begin.best, done if enough(run.best, begin.best) else run.rounds
        with (
            saver.held(begin.clients),
            _dispatcher(run, done, begin, saver.secret(done), watch) as dispatcher,
            saver.interrupts() as interrupted,
        ):
            del begin  # the dispatcher has a copy of the model
            dispatcher.begin(range(done, last), run.due, run.params)
            while (block := dispatcher.next()) is not None:  # rounds whose cohorts are sampled and planned
                dispatcher.send(block)  # and plan the next block while the devices work
                columns = dispatcher.wait()
                with run.processes.together():  # of labels, each process sees those that it has
                    watch.check(columns, block.rounds)
                rows, done = _rows(block.rounds, columns), block.rounds.stop
                if run.evaluated_after(done):
                    models = _evaluated(run, dispatcher, rows[-1])
                    if run.best is not None:
                        kept = seen(run.best, kept, rows[-1], models)
                rows[0] |= {} if history else saver.joined
                history += rows
                with run.processes.together():
                    for row in rows:
                        run.on_round(row)
                    stop = run.should_stop() or interrupted()
                stop = run.processes.any(stop) or enough(run.best, kept)
                saver.save(done, dispatcher, kept, stop)
                if stop:
                    break
        owned.finish(dispatcher.clients)
        after = saver.state(done, dispatcher, kept)
        return Result(after.server.params, after, history, kept if run.best is not None and kept.found else None)


def _evaluated(run: Settings, dispatcher: Dispatcher, row: Row) -> dict[str, Params]:
    """Evaluates the model, and the average model if the server keeps one; the parameters by the scores' names."""
    params, models = placement.first_replica(dispatcher.server.params), dict[str, Params]()
    average = placement.first_replica(averaging.average_of(dispatcher.server))
    for rename, evaluated in averaging.models(params, average).items():
        scores = {rename(name): x for name, x in run.scores(evaluated, dispatcher.clients.tree).items()}
        row |= scores
        models |= dict.fromkeys(scores, evaluated)
    return models


def _dispatcher(run: Settings, start: int, state: State, secret: Secret | None, watch: Watch) -> Dispatcher:
    """The dispatcher of this run's rounds, from this state on. A resumed run keeps the width that it began with."""
    alone = run.debug or bool(jax.tree.leaves(state.clients))
    length = 1 if alone else run.rounds_per_dispatch
    beside = 4 * tree.nbytes(state.server)  # it before and after, a client's and its update
    planner = Planner(run.data, run.sampler, run.work, run.devices, run.seed, length, run.non_finite, secret, beside)
    clients = owned.shared(states.of(state.clients), run.processes)
    dispatcher = Dispatcher(run.algorithm, planner, state.server, clients, run.debug)
    wanted = 1 if run.debug else run.clients_per_chunk or int(state.run.get("width", 0))
    planner.width = min(wanted, run.data.num_clients) if wanted else width.choose(planner, run.params, start)
    if start == 0 and run.algorithm.start is not None:
        for columns in dispatcher.start():
            watch.check(columns, range(1))
    return dispatcher


def _rows(rounds: range, columns: Columns) -> list[Row]:
    values = zip(*(x.tolist() for x in columns.values()))
    return [{"round": float(r + 1), **dict(zip(columns, row))} for r, row in zip(rounds, values)]
