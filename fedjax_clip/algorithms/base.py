"""The maker of algorithms: a round as its author writes it, and the code around it."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.carried import carrying, check_travels, exchanged
from fedjax_clip.algorithms.exchange import Answer, ClientFn, exchange, population_share, traffic
from fedjax_clip.algorithms.parts import Parts, check_client_tx, checked_link
from fedjax_clip.core import checks, optimiser, stateful, tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.metrics import check_numbers, check_own_names
from fedjax_clip.core.types import (
    Algorithm,
    Array,
    ClientState,
    ClientTx,
    InvalidInput,
    Metrics,
    Params,
    PerExampleLoss,
    PyTree,
    Server,
)
from fedjax_clip.local.steps import at_round
from fedjax_clip.local.worker import Worker
from fedjax_clip.reduce import Reducer, together, weighted_mean
from fedjax_clip.uplink.base import Uplink
from fedjax_clip.uplink.chains import identity, on_parts
from fedjax_clip.uplink.orders import check_ends

BEFORE_ROUND_1 = 2**31 - 2  # no round has this number


@dataclasses.dataclass(frozen=True)
class Round:
    """One round as an algorithm writes it: the server's state, and three operations.

    ``ask`` and ``exchange`` are round trips between server and cohort, and ``step`` ends the round.

    Attributes:
      server: the server's state, with its parameters ``server.params`` and ``server.own``.
      cohort: this device's clients.
      parts: the algorithm's parts.
      key: PRNG key of ``exchange``.
      ask_key: PRNG key of ``ask``; ``None`` in an algorithm that has not declared ``asks=True``.
      sent: holds an answer once there has been an ``exchange``.
      state: of the model (``fc.local.with_state``), which clients are sent besides; no leaves without one.
      moved: holds the state's mean change once there has been an ``exchange``.

    Example:
      >>> def round(now):  # FedAvg
      ...     def client_fn(x, client, key):
      ...         y, _, _, report = client.local_steps(x, key)
      ...         return optax.tree.sub(y, x), client.state.own, report
      ...     return now.step(now.exchange(client_fn, now.server.params))
    """

    server: Server
    cohort: Cohort
    parts: Parts
    key: Array
    ask_key: Array | None
    sent: list[Answer] = dataclasses.field(default_factory=list)
    state: PyTree = ()
    moved: list[PyTree] = dataclasses.field(default_factory=list)

    def exchange(
        self, client_fn: ClientFn, shared: PyTree, *, after: Answer | None = None, reducer: Reducer | None = None
    ) -> Answer:
        """Sends ``shared`` to all clients; their messages pass the uplink and become one.

        Args:
          client_fn: ``(shared, client, key) -> (message, what the client keeps, report)`` for ONE client, which is an
            ``fc.extend.Worker``. The message is the update, or ``(update, part, ...)`` of an algorithm with ``beside``.
          shared: pytree, what the server sends.
          after: answer of an ``ask`` of this round. Clients then find what they remembered of it in
            ``client.state.own``, and its bytes count with this exchange's.
          reducer: of the whole message, made from ``now.parts.reducer``. By default each part of a message is reduced
            by the algorithm's.

        Returns:
          An ``Answer``, whose ``update`` has the form of the message.

        Raises:
          InvalidInput: a message of another form than the algorithm declared; a second exchange, which noise and its
            accounting would not cover.
        """
        if self.sent:
            raise InvalidInput(
                "A round of an algorithm has one exchange, which the uplink's noise covers once: send several parts in "
                "one message (beside=), or take now.ask for what comes before."
            )
        parts, cohort = self.parts, self.cohort
        if after is not None:
            cohort = dataclasses.replace(cohort, state=after.clients)
        if reducer is None:
            reducer = together(*[parts.reducer] * (1 + parts.beside)) if parts.beside else parts.reducer
        work = _sending(client_fn, self.server.params, parts.beside)
        if jax.tree.leaves(self.state):
            work = self._working(carrying(work, parts.per_example_loss))
            shared, link = (shared, self.state), self.server.uplink
            answer, change = exchanged(work, parts, reducer, shared, link, cohort, self.key)
            self.moved.append(change)
        else:
            answer = exchange(self._working(work), parts.uplink, reducer, shared, self.server.uplink, cohort, self.key)
        self.sent.append(answer)
        if after is None:
            return answer
        return answer._replace(metrics=answer.metrics | traffic(after.metrics, answer.metrics))

    def ask(self, client_fn: ClientFn, shared: PyTree, *, remember: PyTree = None) -> Answer:
        """An exchange before the round's own, whose messages pass no uplink; the algorithm declares ``asks=True``.

        Args:
          client_fn, shared: as for ``exchange``; a message may be any pytree.
          remember: pytree like what each client remembers of it until the end of the round; by default its state stays.
            A dropped client remembers NaN, so it is dropped from the round's exchange, too.

        Returns:
          An ``Answer``, for ``exchange(..., after=answer)``.

        Raises:
          InvalidInput: an algorithm that has not declared ``asks=True``.
        """
        if self.ask_key is None:
            raise InvalidInput(
                "This algorithm asks its clients before the exchange, and no uplink's noise covers that: declare it by "
                "asks=True of fc.extend.algorithm, which then refuses noise."
            )
        if self.cohort.side is not None:
            raise InvalidInput(
                "This algorithm asks its clients before the exchange, and a deployed round is one trip to the clients "
                "and back: take fedavg, fedsgd or scaffold."
            )
        state = self.cohort.state._replace(uplink=())  # the link's state is for the other message
        if remember is not None:
            clients = len(self.cohort.ids)
            state = state._replace(
                own=jax.tree.map(lambda x: jnp.full((clients, *x.shape), jnp.nan, x.dtype), remember)
            )
        asked = dataclasses.replace(self.cohort, state=state)
        if jax.tree.leaves(self.state):
            client_fn = carrying(client_fn, self.parts.per_example_loss, sends=False)
            shared = (shared, self.state)
        answer = exchange(self._working(client_fn), identity(), self.parts.reducer, shared, (), asked, self.ask_key)
        return answer._replace(clients=answer.clients._replace(uplink=self.cohort.state.uplink))

    def share(self, answer: Answer) -> Array:
        """The factor, float32, from an answer to the mean over ALL N clients, with zeros for absent ones: ``|S| / N``.

        It is the share of the population's weight under a weighted mean, and ``n / N`` of a fixed denominator n.

        Args:
          answer: of this round's ``exchange`` or ``ask``.

        Raises:
          InvalidInput: (when traced) a cohort that was not made by ``fc.extend.plan`` and does not tell N.
        """
        return population_share(self.parts.reducer, self.cohort, answer.metrics)

    def step(
        self, answer: Answer, update: PyTree = None, *, own: PyTree = None, metrics: Metrics | None = None
    ) -> tuple[Server, PyTree, Metrics]:
        """The server's step along the update, which ends the round.

        Args:
          answer: of this round's ``exchange``.
          update: pytree like the parameters; ``answer.update`` by default.
          own: the server's new own state; unchanged by default.
          metrics: of the algorithm, beside those of the answer.

        Returns:
          ``(server, client_states, metrics)``, what ``Algorithm.round`` returns.

        Raises:
          InvalidInput: an answer, an update or an own state of another form; a metric that is not one number, or whose
            name is taken.
        """
        if not isinstance(answer, Answer):
            raise InvalidInput("now.step takes the answer of now.exchange first, then the update.")
        checks.kind("now.step: metrics", metrics, dict | None, "a dict of numbers by name")
        given = update is not None
        update = update if given else answer.update
        if not _alike(update, self.server.params):
            raise InvalidInput(
                "The update of now.step must have the parameters' structure; with beside= the mean is answer.update[0]."
            )
        _check_shapes("The update of now.step", update, self.server.params)
        seen = answer.metrics | ({"update_norm": tree.norm(update)} if given else {})
        own = self.server.own if own is None else own
        if not _alike(own, self.server.own):
            was, new = (jax.tree.structure(x) for x in (self.server.own, own))
            raise InvalidInput(
                f"now.step must get own= in the form of now.server.own, {was}, not {new}: say what the server keeps by "
                "server_own= of fc.extend.algorithm."
            )
        check_own_names(metrics or {}, seen)
        check_numbers(seen | (metrics or {}))
        after = step_server(self.server, self.parts, update, answer.uplink, own)
        return after, answer.clients, seen | (metrics or {})

    def _working(self, client_fn: ClientFn) -> ClientFn:
        parts, around = self.parts, self.cohort.around
        tx = at_round(parts.client_tx, self.server.round)
        client_fn = client_fn if around is None else around(client_fn)

        def work(shared, client, key):
            plain = {field.name: getattr(client, field.name) for field in dataclasses.fields(client)}
            return client_fn(
                shared, Worker(**plain, per_example_loss=parts.per_example_loss, tx=tx, gradient_of=parts.gradient), key
            )

        return work


def algorithm(
    round: Callable[[Round], tuple[Server, PyTree, Metrics]],
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
    server_own: Callable[[Params], PyTree] | None = None,
    client_own: Callable[[Params], PyTree] | None = None,
    mean_of: Callable[[PyTree], tuple[PyTree, Any]] | None = None,
    beside: Sequence[Uplink | None] = (),
    asks: bool = False,
    personal: Callable[[Params, PyTree], Params] | None = None,
    reuses: bool = False,
    start: Callable[[Round], tuple[Server, PyTree, Metrics]] | None = None,
    broadcasts: bool = True,
    name: str = "",
) -> Algorithm:
    """Makes an algorithm from its mathematics, a ``round`` of a few lines. All built-in algorithms are made so.

    It fills in defaults, checks arguments, refuses noise that would not cover all that clients send, keeps the states,
    and folds the round's number into the key. It also gives the wrappers (``fc.partially_frozen``,
    ``fc.partially_private``, ``fc.compressed_broadcast``), the accounting and the evaluators what they need.

    Args:
      round: ``now -> (server, client_states, metrics)`` of a ``Round``. It trains by its clients' own methods, such as
        ``client.local_steps(x, key)``, never by ``per_example_loss`` itself.
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``.
      server_own: ``params -> pytree``, the server's own state before round 1; nothing by default.
      client_own: ``params -> pytree``, each client's own state before round 1; nothing by default.
      mean_of: ``own -> (values, known)``, of which values in a client's own state the server's own state is the mean
        over all N clients, and whether the client has some: ``lambda own: (own, True)`` of SCAFFOLD. A run that goes on
        with other clients needs it.
      beside: one link, or ``None``, for each part that clients send besides the update. Their message is then
        ``(update, part, ...)``, and each part takes the reducer's mean.
      asks: whether a round begins with ``now.ask``.
      personal: ``(params, own) -> params``, a client's own model of the server's parameters and the client's own state;
        ``None`` where all use the server's model.
      reuses: whether what clients send depends on more gradients than one at each local step. ``private_gradient``,
        whose accounting counts one, is then refused, as it is with ``asks`` and ``start``.
      start: as ``round``, run before round 1 with all clients; see ``Algorithm.start``.
      broadcasts: whether clients receive exactly ``server.params`` as their model.
      name: of the algorithm in checkpoints; by default that of the function in which ``round`` was defined.

    Returns:
      An ``Algorithm``.

    Raises:
      InvalidInput: an argument of the wrong kind; an uplink, a reducer and an algorithm that do not go together.

    Example:
      >>> def fedavg(per_example_loss, client_tx, server_tx=None, **parts):
      ...     def round(now):
      ...         def client_fn(x, client, key):
      ...             y, _, _, report = client.local_steps(x, key)
      ...             return optax.tree.sub(y, x), client.state.own, report
      ...         return now.step(now.exchange(client_fn, now.server.params))
      ...     return fc.extend.algorithm(round, per_example_loss, client_tx, server_tx, **parts)
    """
    checks.kind("round", round, Callable, "a function of an fc.extend.Round")
    checks.kind("beside", beside, list | tuple, "links, or None, one for each part beside the update")
    checks.kind("per_example_loss", per_example_loss, Callable, "a function of (params, batch, key)")
    check_client_tx(client_tx)
    checks.kind("gradient", gradient, Callable, "such as fc.local.per_example_gradient(clip)")
    stateful.check_gradient(gradient, per_example_loss)
    link = checked_link(uplink)
    if beside:
        link = on_parts(link, *(part for part in beside if part is not None))
    built = Parts(
        per_example_loss,
        client_tx,
        optax.sgd(1.0) if server_tx is None else server_tx,
        link,
        weighted_mean() if reducer is None else reducer,
        gradient,
        len(beside),
    )
    checks.kind("server_tx", built.server_tx, optax.GradientTransformation, "an optax optimiser")
    checks.kind("reducer", built.reducer, Reducer, "an fc.reduce.Reducer, such as fc.reduce.uniform_mean()")
    covered = None not in beside and not asks and start is None
    name = name or maker(round)
    check_ends(link.promises, built.reducer, covered, name)
    if getattr(gradient, "counts_alike", False) and (asks or reuses or start is not None):
        raise InvalidInput(
            "This algorithm's clients take gradients besides those of their local steps, and private_gradient's "
            "accounting counts one use of a record for each pass of steps: take fedavg, fedsgd or scaffold."
        )

    def init(params):
        state, trained = stateful.split(per_example_loss, params)
        check_travels(state, built)
        server = init_server(trained, built, server_own)
        return server._replace(params=stateful.join(tree.as_arrays(state), server.params))

    def init_client(params):
        _, params = stateful.split(per_example_loss, params)
        own = () if client_own is None else client_own(params)
        return ClientState(own, link.init_client(params))

    def run(script, server, cohort, key, fold=None):
        key = jax.random.fold_in(key, server.round)
        ask_key = None if fold is None else jax.random.fold_in(key, fold)
        if asks and fold is None:
            ask_key, key = jax.random.split(key)
        state, params = stateful.split(per_example_loss, server.params)
        now = Round(server._replace(params=params), cohort, built, key, ask_key, state=state)
        done = script(now)
        if not isinstance(done, tuple) or len(done) != 3 or not isinstance(done[0], Server):
            raise InvalidInput("An algorithm's round must return (server, client_states, metrics), as now.step does.")
        after, clients, metrics = done
        state = tree.apply_updates(state, *now.moved) if now.moved else state
        after = after._replace(params=stateful.join(state, after.params))
        return after, clients if client_own is not None else clients._replace(own=()), metrics

    def regroup(server, average):
        if mean_of is not None:
            server = server._replace(own=average(server.own, lambda clients: mean_of(clients.own)))
        if link.regroup is None:
            return server
        return server._replace(
            uplink=link.regroup(server.uplink, lambda part, of: average(part, lambda clients: of(clients.uplink)))
        )

    return Algorithm(
        init,
        init_client,
        lambda server, cohort, key: run(round, server, cohort, key),
        personal=None if personal is None else lambda params, state: personal(params, state.own),
        broadcasts=broadcasts,
        population=max(link.promises.population, built.reducer.population),
        start=None if start is None else lambda server, cohort, key: run(start, server, cohort, key, BEFORE_ROUND_1),
        loss=per_example_loss,
        name=name,
        parts=built,
        regroup=None if mean_of is None and link.regroup is None else regroup,
    )


def init_server(params: Params, parts: Parts, own: Callable[[Params], PyTree] | None = None) -> Server:
    """The server before round 0, with copies of the parameters (a round donates its server's buffers).

    Args:
      params: initial parameters.
      parts: of the algorithm.
      own: ``params -> what the algorithm itself keeps``; nothing by default.

    Example:
      >>> server = fc.extend.init_server(params, algorithm.parts)
    """
    params = tree.as_arrays(params)
    opt_state = optimiser.init(parts.server_tx, params)
    kept = () if own is None else own(params)
    opt_state, link, kept = tree.as_arrays((opt_state, parts.uplink.init(params), kept))
    return Server(params, opt_state, link, jnp.zeros((), jnp.int32), kept)


def step_server(server: Server, parts: Parts, update: PyTree, uplink_state: PyTree, own: PyTree = ()) -> Server:
    """One step of the server's optimiser along ``-update``, the pseudo-gradient.

    Args:
      server: before the round.
      parts: of the algorithm.
      update: the reduced and decoded update.
      uplink_state: the uplink's state at the server, after the round.
      own: the algorithm's own state at the server, after the round.

    Example:
      >>> update = jax.tree.map(jnp.ones_like, server.params)  # what the reducer made of the clients' messages
      >>> server = fc.extend.step_server(server, algorithm.parts, update, server.uplink)
      >>> float(server.params["b"][0]), int(server.round)
      (1.0, 1)
    """
    gradient = jax.tree.map(lambda u, x: -u.astype(tree.common_type(u, x)), update, server.params)
    updates, opt_state = optimiser.update(parts.server_tx, gradient, server.opt_state, server.params)
    return Server(tree.apply_updates(server.params, updates), opt_state, uplink_state, server.round + 1, own)


def zeros_like(params: Params) -> PyTree:
    """A variate before round 0."""
    return jax.tree.map(jnp.zeros_like, params)


def own_key(key: Array) -> Array:
    """The key of a client's second training in a round; no step has this number."""
    return jax.random.fold_in(key, 2**31 - 2)


def kind(algorithm: Algorithm) -> str:
    """The algorithm's name, by default that of the function that made it, such as ``scaffold``."""
    return algorithm.name or maker(algorithm.round)


def maker(function: Any) -> str:
    """The function in which a function was defined, or its own name."""
    function = inspect.unwrap(getattr(function, "func", function))
    return getattr(function, "__qualname__", type(function).__qualname__).split(".<locals>")[0]


def _sending(client_fn: ClientFn, params: Params, beside: int) -> ClientFn:
    """The client function, with a check that its messages have the declared form."""

    def checked(shared, client, key):
        message, *rest = client_fn(shared, client, key)
        parts = message if beside else (message,)
        if not isinstance(parts, tuple) or len(parts) != 1 + beside or not _alike(parts[0], params):
            wanted = f"a tuple of the update and {beside} part{'s' * (beside > 1)}" if beside else "the update"
            raise InvalidInput(
                f"The algorithm's clients must send {wanted}, an update of the parameters' structure: say what they "
                "send beside it by beside=, such as beside=[None] for one part without a link."
            )
        _check_shapes("The clients' update", parts[0], params)
        return message, *rest

    return checked


def _alike(x: PyTree, y: PyTree) -> bool:
    return str(jax.tree.structure(x)) == str(jax.tree.structure(y))


def _check_shapes(what: str, update: PyTree, params: Params) -> None:
    for (name, u), x in zip(tree.named_leaves(update), jax.tree.leaves(params), strict=True):
        if jnp.shape(u) != jnp.shape(x):
            at = f" at {name}" if name else ""
            raise InvalidInput(f"{what}{at} has shape {jnp.shape(u)}, not {jnp.shape(x)}.")
