"""The driver: samples and plans cohorts, runs the compiled round, evaluates, saves and resumes."""

import concurrent.futures
import math
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip import reduce
from fedjax_clip.core import checks, metrics, tree
from fedjax_clip.core.loss import batch_loss, examples_meet
from fedjax_clip.core.secret import Secret
from fedjax_clip.core.types import Algorithm, InvalidInput, Params, PerExampleLoss, PyTree, Row, check_named
from fedjax_clip.data import clock, sampling, speeds
from fedjax_clip.data.planning import LocalWork
from fedjax_clip.data.population import FederatedData, check_alike, check_fields, check_sets
from fedjax_clip.training import classes, identity, interrupts, placement
from fedjax_clip.training.dispatch import Block, Dispatcher


class State(NamedTuple):
    """All that a run needs to go on: the server, what the clients keep ([M, ...], on the host), and which run it is.

    Attributes:
      server: what the algorithm's ``init`` makes and its rounds change.
      clients: ``[M, ...]``, what ``init_client`` makes.
      run: what a checkpoint must agree with (``fc.train`` says what that is), if there are checkpoints; and the width.

    Example:
      >>> result.state.server.params
    """

    server: PyTree
    clients: PyTree
    run: dict[str, Any]


class Result(NamedTuple):
    """What ``train`` returns: final parameters, the whole last state, and one row of metrics for each round it ran.

    A resumed run's history begins where it went on; it is empty if there was nothing left to do.

    Attributes:
      params: of the model.
      state: to go on from.
      history: a row a round, see ``fc.train``.

    Example:
      >>> result = fc.train(algorithm, data, params, rounds=20)
      >>> result.history[-1]["round"], bool(result.history[-1]["loss"] < result.history[0]["loss"])
      (20.0, True)
    """

    params: Params
    state: State
    history: list[Row]


class Checkpoints(Protocol):
    """Where a run saves itself; see ``fedjax_clip.checkpoint``."""

    def restore(self, template: State) -> tuple[int, State] | None: ...

    def save(self, round: int, state: State) -> None: ...


@jax.transfer_guard("allow")  # a driver sends data to the devices, and means it
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
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
    evaluate_clients: Callable[[Params, PyTree], Mapping[str, float]] | None = None,
    eval_every: int = 10,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 50,
    on_round: Callable[[Row], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    devices: Sequence[jax.Device] | None = None,
    clients_per_chunk: int | None = None,
    rounds_per_dispatch: int | None = None,
    non_finite: str = "drop",
    secret: Secret | None = None,
) -> Result:
    """Trains for a number of rounds, each one compiled program over all local devices.

    Training the same ``algorithm`` object again, on another seed say, compiles nothing again. Its programs go when it
    goes.

    The result is a function of (algorithm, data, params, seed, secret): resuming changes no bit of it, and client
    order, chunks and the number of devices change it by rounding only.

    Args:
      algorithm: ``fc.fedavg(...)`` or any other.
      data: the training population.
      params: initial parameters; they are copied.
      rounds: rounds in all, those before a resume included.
      cohort_size: clients a round, drawn uniformly without replacement; all clients by default.
      sampler: how cohorts are drawn, in place of ``cohort_size``; see ``fc.data.sampling``. Or a clock, which also says
        how long rounds take; see ``fc.data.clock``.
      batch_size: examples a local step; ``None`` takes all of a client's at once; each client's own number by
        ``fc.data.speeds.batch_budget(...)``.
      local_epochs: passes of a client over its examples in a round.
      local_steps: local steps a round, in place of ``local_epochs``; each client's own by
        ``fc.data.speeds.budget(...)``.
      shuffle: whether a client shuffles its examples in each pass.
      seed: of everything random, but for what a ``secret`` is for.
      evaluate: ``params -> {name: value}``, called every ``eval_every`` rounds and after the last; its values
        appear in that round's row as ``eval/name``. See ``fc.evaluator``.
      evaluate_clients: ``(params, what the clients keep [M, ...]) -> {name: value}``, called when ``evaluate`` is: for
        models of the clients' own. See ``fc.extend.client_evaluator``.
      eval_every: rounds from one evaluation to the next.
      checkpoints: where to resume from and save to, ``fc.extend.Checkpoints(directory)``. A run resumes if these
        agree with it: the kind of algorithm and the shapes of all that it keeps, all of ``data``, the sampler,
        the local work and the seed. ``rounds`` may grow; all other arguments may change. What is inside the loss, the
        optimisers and the links, such as a learning rate, cannot be seen: do not change it. With checkpoints, a first
        Ctrl-C saves the state when the rounds that are under way end, and is then raised; a second one ends at once.
      checkpoint_every: rounds from one save to the next.
      on_round: called with each round's row.
      should_stop: asked after each dispatch; if true, the state is saved and training ends early.
      devices: devices to use; all local ones by default.
      clients_per_chunk: clients that a device trains at once. By default 1 on a CPU, or up to all of them where the
        model is smaller than 64 KiB; on a GPU or TPU what a short trial before the first round finds fastest. A
        resumed run keeps the number that it began with.
      rounds_per_dispatch: how many rounds are sent to the devices at once; by default, from the second dispatch on,
        as many as take a tenth of a second. Dispatches end where an evaluation or a checkpoint is due, and
        ``on_round`` and ``should_stop`` are called after each: give 1 to be asked after every round. It changes no
        bit. Clients that keep a state and populations that do not fit on the devices go one round at a time, the
        next one being planned and sent meanwhile.
      non_finite: what happens to a client whose update has a NaN, an infinity or a norm beyond 1e19. ``"drop"`` leaves
        it out, counts it in ``dropped`` and keeps its old state. This hides divergence: look at ``dropped``. ``"keep"``
        adds it, and the model shows it. ``"stop"`` ends training with an error that names the round and the clients.
        Under noise or a secure sum only ``"drop"`` is allowed, and such a client sends zeros like any other message.
      secret: what cohorts, the noise of links and gradients, and all else that is random at clients and links are drawn
        from, in place of the seed, which anybody can guess: ``fc.privacy.Secret.fresh()``. Whatever epsilon says of a
        run, it says of a run with one. Batches, and what clients and server share (rotations, sketches), stay on the
        seed. A resumed run needs the same one: ``fc.privacy.Secret.kept(path)``. On other data it draws other numbers.

    Returns:
      A ``Result``. A row has ``round`` (1 after the first; of an algorithm with a ``start``, the first row's bytes and
      steps include it), the algorithm's metrics, ``wasted_steps`` (the fraction
      of the devices' steps that trained nobody), ``seconds``, ``eval/...``, and what a clock says of the round.

    Raises:
      InvalidInput: rounds < 1, a cohort larger than the population, a loss of the wrong shape, a client whose update
        is not finite under ``non_finite="stop"`` ...

    Example:
      >>> result = fc.train(algorithm, data, params, rounds=100, cohort_size=10)
    """
    rounds, seed = checks.count("rounds", rounds), checks.seed("seed", seed)
    for name, value in (
        ("eval_every", eval_every),
        ("checkpoint_every", checkpoint_every),
        ("rounds_per_dispatch", rounds_per_dispatch),
        ("clients_per_chunk", clients_per_chunk),
    ):
        if value is not None:
            checks.count(name, value)
    if non_finite not in ("drop", "keep", "stop"):
        raise InvalidInput(f"non_finite must be 'drop', 'keep' or 'stop', not {non_finite!r}.")
    checks.kind("algorithm", algorithm, Algorithm, "one such as fc.fedavg(...)")
    checks.kind("data", data, FederatedData, "a FederatedData")
    checks.kind(
        "sampler", sampler, sampling.Sampler | clock.Clock | None, "a sampler such as fc.data.sampling.uniform(10)"
    )
    if sampler is not None and cohort_size is not None:
        raise InvalidInput("cohort_size and sampler both say how many clients take part: give one of them.")
    checks.kind("secret", secret, Secret | None, "an fc.privacy.Secret, such as fc.privacy.Secret.fresh()")
    check_fields(data)
    check_named(algorithm, data.num_clients)
    if getattr(getattr(algorithm.parts, "gradient", None), "counts_alike", False):
        check_alike(data)
    kept = "the parameters and what all clients keep: fc.extend.client_evaluator(...) makes one"
    for name, function, count, wanted in (
        ("evaluate", evaluate, 1, "the parameters: fc.evaluator(per_example_loss, sets) makes one"),
        ("evaluate_clients", evaluate_clients, 2, kept),
        ("on_round", on_round, 1, "a row"),
        ("should_stop", should_stop, 0, "nothing, which says whether to stop"),
    ):
        if function is not None:
            checks.takes(name, function, count, wanted)
    if checkpoints is not None and not hasattr(checkpoints, "restore"):
        raise InvalidInput(f"checkpoints must be fc.extend.Checkpoints(directory), not {checks.shown(checkpoints)}.")
    params = tree.parameters(params)
    sampler = sampler or sampling.uniform(data.num_clients if cohort_size is None else cohort_size)
    if algorithm.parts is not None and isinstance(sampler, sampling.Sampler):
        reduce.check_cohort(algorithm.parts.reducer, sampler.cohort_size)
    work = LocalWork(batch_size, local_epochs, local_steps, shuffle)
    devices = placement.local(devices)
    if algorithm.loss is not None and work.pads(data.sizes) and _examples_meet(algorithm.loss, data, params, work):
        warnings.warn(MEET, stacklevel=2)
    suspected = algorithm.loss  # of labels that are no class
    if suspected is not None and classes.negative(data):
        classes.refuse_unknown(suspected, params, data)
    if (made_of := algorithm.parts) and (made_of.uplink.promises.noise or made_of.reducer.hides):
        suspected = None  # to stop in some round would show whom it drew

    run: dict[str, Any] = {} if checkpoints is None else identity.identify(algorithm, data, sampler, work, seed)
    if secret is not None:
        run |= {"secret": secret.commitment} if run else {}
    state = State(algorithm.init(params), client_states(algorithm, params, data.num_clients), run)
    stateful = bool(jax.tree.leaves(state.clients))
    if sampler.replacement and stateful:
        raise InvalidInput("This algorithm's clients keep a state, so a sampler with replacement cannot serve it.")
    start, state = (checkpoints and checkpoints.restore(state)) or (0, state)
    identity.check("The checkpoint", state.run, run)
    if secret is not None:
        if start == 0:
            secret.begin()
        secret = secret.of(identity.fingerprint(data))  # no noise of a run that begins again on other data
    if start > rounds:
        raise InvalidInput(
            f"The checkpoint is of a run that has done {start} rounds, more than rounds={rounds}: ask for {start} or "
            "more, or name another directory."
        )

    length = 1 if stateful else rounds_per_dispatch
    dispatcher = Dispatcher(algorithm, data, sampler, work, devices, seed, length, non_finite, secret)
    if width := clients_per_chunk or int(state.run.get("width", 0)):  # a run keeps the width that it began with
        dispatcher.width = min(width, data.num_clients)
    else:
        dispatcher.choose_width(state.server, state.clients, params, start)
    run = run | {"width": dispatcher.width}
    server = placement.replicate(state.server, devices)
    before: list[dict[str, np.ndarray]] = []
    if algorithm.start is not None and start == 0:
        server, before = dispatcher.before(server, state.clients)
        for columns in before:
            _stop_at(columns, range(1), data)

    history: list[Row] = []
    judges: list[Callable[[Params], Mapping[str, float]]] = [evaluate] if evaluate else []
    if evaluate_clients is not None:
        judges.append(lambda params: evaluate_clients(params, state.clients))
    due = (eval_every if judges else 0, checkpoint_every if checkpoints else 0)
    to_do = range(start, rounds)
    # What is interrupted in the middle of a round would be lost, for the devices write into the state.
    held_back = interrupts.held_back(checkpoints is not None)
    with held_back as interrupted, concurrent.futures.ThreadPoolExecutor(1) as packer:

        def upcoming() -> Callable[[], Block] | None:
            """The next block, if there is one: planned here, as it is quick, or packed by a thread."""
            nonlocal to_do
            if not to_do:
                return None
            block = dispatcher.next_block(to_do, *due)
            to_do = range(block.stop, rounds)
            planned = dispatcher.plan(block) if dispatcher.resident else packer.submit(dispatcher.plan, block)
            return (lambda: planned) if isinstance(planned, Block) else planned.result

        next_block = upcoming()
        if next_block is not None:
            dispatcher.warn_slow_convolutions(server, state.clients, next_block(), params)
        while next_block is not None:
            began = time.perf_counter()
            block = next_block()
            server, finish = dispatcher.start(server, state.clients, block)
            next_block = upcoming()  # while the devices work
            columns = finish()
            if suspected is not None and not _sound(columns):
                classes.refuse_unknown(suspected, params, data)
                suspected = None  # once is enough
            _stop_at(columns, block.rounds, data)
            if block.rounds.start == 0:
                for name in ("bytes_down", "bytes_up", "steps"):
                    columns[name] = columns[name].copy()
                    columns[name][0] += sum(x[name][0] for x in before)
            seconds = (time.perf_counter() - began) / len(block.rounds)

            done = block.rounds.stop
            columns |= {"seconds": np.full(len(block.rounds), seconds)}
            values = zip(*(x.tolist() for x in columns.values()))
            rows = [{"round": float(r + 1), **dict(zip(columns, row))} for r, row in zip(block.rounds, values)]
            if judges and (done == rounds or done % eval_every == 0):
                trained = placement.first_replica(server.params)
                scores = {k: v for judge in judges for k, v in _numbers(judge(trained)).items()}
                rows[-1] |= metrics.prefixed("eval", scores)
            history += rows
            if on_round is not None:
                for row in rows:
                    on_round(row)
            stop = (should_stop is not None and should_stop()) or interrupted()
            if checkpoints is not None and (done == rounds or stop or done % checkpoint_every == 0):
                checkpoints.save(done, State(placement.first_replica(server), state.clients, run))
            if stop:
                break

    state = State(placement.first_replica(server), state.clients, run)
    return Result(state.server.params, state, history)


def _stop_at(columns: dict[str, np.ndarray], rounds: range, data: FederatedData) -> None:
    """Raises if a client's update was not finite, where a run is to stop then (``dropped_ids`` are there then)."""
    for round, ids in zip(rounds, columns.pop("dropped_ids", ())):
        if named := [data.name(i) for i in sorted(ids) if i >= 0]:
            more = " and perhaps more" if len(named) == len(ids) else ""
            raise InvalidInput(
                f"Round {round + 1}: the updates of clients {', '.join(named)}{more} are not finite. Lower the "
                "client's learning rate, put a clip in front of it, or leave such updates out (non_finite='drop')."
            )


MEET = (
    "per_example_loss gives an example another loss in another batch (as batch normalisation in training mode does, or "
    "pairs within a batch), and some batches are padded with copies of their first example: the results are not those "
    "of the examples alone. Choose a batch_size that divides every client's number of examples, or compute examples "
    "apart. If you accept it, ignore this warning."
)
_MEET: weakref.WeakKeyDictionary[PerExampleLoss, bool] = weakref.WeakKeyDictionary()  # of losses that live


def _examples_meet(per_example_loss: PerExampleLoss, data: FederatedData, params: Params, work: LocalWork) -> bool:
    """As ``local.examples_meet`` of the first examples; looked at once for each loss."""
    size = min(work.largest_batch(data.sizes), data.num_examples)
    if size < 2:
        return False
    try:
        if per_example_loss not in _MEET:
            _MEET[per_example_loss] = examples_meet(
                per_example_loss, params, jax.tree.map(lambda x: x[:size], data.examples)
            )
    except TypeError:  # a callable object that has no place for weak references
        return False
    return _MEET[per_example_loss]


def _sound(columns: Mapping[str, np.ndarray]) -> bool:
    """Whether all losses are finite, and nobody was dropped."""
    return bool(np.all(np.isfinite(columns.get("loss", 0))) and not np.any(columns.get("dropped", 0)))


def _numbers(scores: Any) -> Row:
    """What an evaluation gave, if that is numbers by name."""
    checks.kind("What an evaluation returns", scores, Mapping, "numbers by name")
    try:
        return {name: float(value) for name, value in scores.items()}
    except (TypeError, ValueError):
        raise InvalidInput(f"An evaluation must return one number for each name, not {checks.shown(scores)}.") from None


def client_states(algorithm: Algorithm, params: Params, num_clients: int) -> PyTree:
    """What all clients keep before round 0, ``[M, ...]`` on the host."""
    state = algorithm.init_client(tree.as_arrays(params))
    return jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], num_clients, axis=0), state)


def evaluator(
    per_example_loss: PerExampleLoss, sets: Mapping[str, FederatedData], batch_size: int = 1024
) -> Callable[[Params], Row]:
    """An ``evaluate`` for ``train``: means over the examples of each set, of the loss and of what it says besides.

    Args:
      per_example_loss: the training loss; called with ``key=None``, so nothing in it is random.
      sets: populations by name, such as ``{"examples": held_out_examples, "clients": held_out_clients}``.
      batch_size: examples at a time.

    Returns:
      ``params -> {"examples/loss": ..., "examples/accuracy": ..., ...}``.

    Raises:
      InvalidInput: sets that are not populations by name; a loss of the wrong shape.

    Example:
      >>> evaluate = fc.evaluator(per_example_loss, {"examples": held_out, "clients": held_out_clients})
      >>> result = fc.train(algorithm, data, params, rounds=100, cohort_size=10, evaluate=evaluate)
      >>> result.history[-1]["eval/clients/accuracy"] > 0.8
      True
    """

    check_sets("sets", sets)
    batch_size = checks.count("batch_size", batch_size)

    @jax.jit
    def batch_report(params, batch, weights):
        report = batch_loss(per_example_loss, params, batch, weights, None)[1]
        return {name: value for name, value in report.items() if isinstance(value, metrics.Mean)}

    def batches(data: FederatedData):
        size = min(batch_size, data.num_examples)
        for i in range(math.ceil(data.num_examples / size)):
            index = np.arange(i * size, (i + 1) * size)
            live = index < data.num_examples
            index = np.minimum(index, data.num_examples - 1)
            weights = np.where(live, 1.0 if data.weights is None else data.weights[index], 0).astype(np.float32)
            yield jax.tree.map(lambda x, index=index: x[index], data.examples), weights

    @jax.transfer_guard("allow")
    def evaluate(params: Params) -> Row:
        params, scores = jax.device_put(params), Row()  # once, not with each batch
        for name, data in sets.items():
            reports = [batch_report(params, batch, weights) for batch, weights in batches(data)]
            total: Any = jax.tree.map(lambda *xs: jnp.sum(jnp.stack(xs)), *reports)
            scores |= {k: float(v) for k, v in metrics.prefixed(name, metrics.finish(total)).items()}
        return scores

    return evaluate
