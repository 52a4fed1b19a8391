"""The types of a round, and the error for bad input."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

Array = jax.Array
PyTree = Any
Params = PyTree
Batch = PyTree
Metrics = dict[str, Any]
Row = dict[str, float]  # of metrics, of one round

# (params, batch, key) -> losses[B], or (losses[B], {name: values[B]}); no key means evaluation
PerExampleLoss = Callable[[Params, Batch, Any], Any]

# an optimiser, or a function from the round's number to one
ClientTx: TypeAlias = optax.GradientTransformation | Callable[[Array], optax.GradientTransformation]


class InvalidInput(ValueError):
    """Bad input. The message is one sentence that names the bad value and says what to do.

    The binaries print the sentence alone and exit with code 2.

    Example:
      >>> fc.clipping.clip(-1.0)
      Traceback (most recent call last):
        ...
      fedjax_clip.core.types.InvalidInput: clip's threshold must be positive, not -1.0.
    """


class Algorithm(NamedTuple):
    """A federated algorithm: three pure functions.

    Attributes:
      init: ``params -> server``, the server's state before round 0.
      init_client: ``params -> client_state``, what one client keeps between
        rounds; a pytree without leaves if it keeps nothing.
      round: ``(server, cohort, key) -> (server, client_states[C, ...], metrics)``,
        one whole round. ``key`` is the key of the run; the round folds its own
        number into it.
      personal: ``(params, client_state) -> params``, the model that a client
        uses itself; ``None`` where everyone uses the server's.
      broadcasts: whether clients receive exactly ``server.params`` as their model, so that ``fc.compressed_broadcast``
        may replace it.
      population: the fewest clients that the population must have, since a link or reducer names one by number.
      start: ``(server, cohort, key) -> (server, client_states, metrics)``, a round before the first one in which ALL
        clients take part, in cohorts of any size, each client once; ``None`` without one. ``fc.train`` and ``fc.sweep``
        run it. If you call ``round`` yourself, call it first.
      parts: the algorithm's ``fc.extend.Parts``, which privacy accounting and wrappers read. ``fc.extend.algorithm``
        fills it in. ``None`` if it is unknown what the clients send.
      loss: the clients' loss of the whole model; ``fc.train`` checks whether it may pad its batches.
      name: identifies the algorithm in checkpoints; by default the name of the function that made ``round``.
      regroup: ``(server, average) -> server``, for a run that goes on with other clients (``fc.train(state=...)``);
        ``None`` if nothing in the server's state is a mean over all clients. ``average(part, of)`` is such a part of it
        over the clients that there are now. ``of(client_states) -> (values, known)`` says of which of the clients'
        values it is the mean, and which clients have one.
      frozen: regular expression: parameters that no round changes, so that checkpoints leave them out; empty if there
        are none.

    Example:
      >>> server, client_states, metrics = jax.jit(algorithm.round)(algorithm.init(params), cohort, key)
      >>> int(server.round), float(metrics["clients"])
      (1, 3.0)
    """

    init: Callable[[Params], PyTree]
    init_client: Callable[[Params], PyTree]
    round: Callable[[PyTree, Any, Array], tuple[PyTree, PyTree, Metrics]]
    personal: Callable[[Params, PyTree], Params] | None = None
    broadcasts: bool = True
    population: int = 0
    start: Callable[[PyTree, Any, Array], tuple[PyTree, PyTree, Metrics]] | None = None
    loss: PerExampleLoss | None = None
    name: str = ""
    parts: Any = None
    regroup: Callable[[PyTree, Callable[..., PyTree]], PyTree] | None = None
    frozen: str = ""


class Server(NamedTuple):
    """The server's state between rounds, for any algorithm.

    Attributes:
      params: the global model.
      opt_state: state of the server's optax optimiser.
      uplink: state of the uplink chain at the server.
      round: int32 scalar, the number of rounds done.
      own: the algorithm's own state: variates, momentum.

    Example:
      >>> server = algorithm.init(params)
      >>> server.params
    """

    params: Params
    opt_state: PyTree
    uplink: PyTree
    round: Array
    own: PyTree = ()


class ClientState(NamedTuple):
    """A client's state between rounds: the algorithm's part, the uplink's, and parameters that it never sends.

    Attributes:
      own: the algorithm's part.
      uplink: the uplink's part.
      private: the client's private parameters, see ``fc.partially_private``; ``()`` if all are shared.

    Example:
      >>> algorithm.init_client(params)  # of one client; training.loop.client_states makes those of all
    """

    own: PyTree
    uplink: PyTree
    private: PyTree = ()


def check_named(algorithm: Algorithm, num_clients: int) -> None:
    """Refuses an algorithm whose links or reducers name a client that the population lacks."""
    if algorithm.population > num_clients:
        raise InvalidInput(
            f"The algorithm, its uplink or its reducer names client {algorithm.population - 1}, and there is none: "
            f"there are {num_clients}, numbered from 0 in the order of the population."
        )
