"""Links: what crosses the wire from a client to the server, the one type that optax lacks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.clipping import bare_state, bound_of, clip_report
from fedjax_clip.core import checks, optimiser, tree
from fedjax_clip.core.types import Array, InvalidInput, Metrics, Params, PyTree
from fedjax_clip.uplink.promises import Promises


class Message(NamedTuple):
    """A message with its size in bytes; a link's ``encode`` may return it in place of plain arrays.

    Attributes:
      value: pytree, which the reducer receives.
      bytes: float32 scalar, the bytes that travel; ``None`` counts those of the arrays.
      entropy_bytes: float32 scalar, the fewest bytes that any code of the same numbers needs; ``None`` if unknown.
      late: bool scalar, whether it comes too late to count; ``None`` means in time.
      packed: what travels in place of the value; ``None`` if the value itself does. A link that changes the value of
        another link's message leaves it out.

    Example:
      >>> def encode(update, ctx):  # half of the bits travel
      ...     halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), update)
      ...     sent = sum(x.nbytes for x in jax.tree.leaves(update)) / 2
      ...     return fc.uplink.Message(halved, bytes=jnp.float32(sent)), {}
      >>> link = fc.uplink.stateless(encode)
    """

    value: PyTree
    bytes: Array | None = None
    entropy_bytes: Array | None = None
    late: Array | None = None
    packed: "Packed | None" = None

    @property
    def plain(self) -> PyTree:
        """The value alone, if the message has no other field."""
        return self.value if all(said is None for said in self[1:]) else self


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sent"], meta_fields=["opened"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """What travels in place of a message's value, and how the server opens it.

    Attributes:
      sent: pytree of arrays and of ``fc.compression.Code``; their bytes are the message's.
      opened: ``(sent, ctx) -> value``, with the context of the client's ``encode``. It holds no array of the client's.

    Example:
      >>> def encode(update, ctx):
      ...     short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), update)
      ...     def opened(sent, ctx):
      ...         return jax.tree.map(lambda x: x.astype(jnp.float32), sent)
      ...     packed = fc.uplink.Packed(short, opened)
      ...     return fc.uplink.Message(opened(short, ctx), jnp.float32(1300.0), packed=packed), {}
    """

    sent: PyTree
    opened: Callable[[PyTree, "Context"], PyTree]


class Context(NamedTuple):
    """What a link knows besides the update.

    Attributes:
      key: PRNG key of this link: one for each (round, client) in ``encode``, one for each round in ``decode``.
      round_key: PRNG key that all clients and the server share in this round.
      client_id: int32 number of the client; -1 at the server.
      weight: float32, the client's weight in an average; at the server, the number of clients that arrived.
      denominator: the reducer's fixed denominator; ``None`` if it divides by the clients that arrived.
      bound: L2 norm that no message exceeds as it enters this link, if an earlier link guarantees one.
      staleness: int32, rounds since the client was sent its parameters; 0 at the server.
      threshold: the fewest clients whose messages a modular sum adds up; ``None`` under other reducers.
      share: at the server, the factor from the aggregate to the mean over ALL clients, absent ones counting as zeros:
        ``|S| / N``, or the cohort's share of the population's weight. ``None`` if the cohort does not tell N.

    Example:
      >>> def encode(update, state, client_state, ctx):  # a key of this client, link and round
      ...   return update + jax.random.normal(ctx.key, update.shape), client_state, {}
    """

    key: Array
    round_key: Array
    client_id: Array
    weight: Array
    denominator: float | Array | None = None
    bound: Array | None = None
    staleness: Array | int = 0
    threshold: int | None = None
    share: Array | None = None


class Uplink(NamedTuple):
    """A link between one client and the server; a chain of links is a link.

    Attributes:
      init: ``params -> state``, which lives at the server and is checkpointed.
      init_client: ``params -> client_state``, what one client keeps; without leaves if it keeps nothing.
      encode: ``(update, state, client_state, ctx) -> (message, client_state, report)`` at ONE client. The message is a
        pytree, or a ``Message`` that also says how many bytes travel. A report is a dict of sums and
        ``metrics.Mean`` pairs, which add up over the cohort.
      decode: ``(aggregate, state, report, ctx) -> (update, state, metrics)`` at the server, once, with the
        cohort's report.
      promises: what holds of every message that leaves the link; nothing by default. Links, reducers and the accounting
        of privacy rely on it.
      regroup: ``(state, average) -> state`` of a link whose state at the server is a mean over all clients, as
        ``Algorithm.regroup``.

    Example:
      >>> def encode(update, state, client_state, ctx):  # sends what is larger than a threshold of the server
      ...     message = jax.tree.map(lambda x: jnp.where(jnp.abs(x) > state, x, 0), update)
      ...     return message, client_state + 1, {"times": fc.extend.metrics.Mean.of(client_state, jnp.ones(()))}
      >>> def decode(aggregate, state, report, ctx):  # the server, once; what it returns last is in the metrics
      ...     return aggregate, 0.9 * state, report
      >>> link = fc.uplink.Uplink(
      ...     init=lambda params: jnp.float32(0.1),
      ...     init_client=lambda params: jnp.zeros(()),
      ...     encode=encode,
      ...     decode=decode,
      ...     promises=fc.uplink.Promises(contracts=True),  # nothing gets larger: a clip's bound in front still holds
      ... )
      >>> link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), link)
      >>> halved = fc.uplink.at_client(optax.scale(0.5))  # the shortest way to make one that keeps nothing
    """

    init: Callable[[Params], PyTree]
    init_client: Callable[[Params], PyTree]
    encode: Callable[[PyTree, PyTree, PyTree, Context], tuple[PyTree, PyTree, Metrics]]
    decode: Callable[[PyTree, PyTree, Metrics, Context], tuple[PyTree, PyTree, Metrics]]
    promises: Promises = Promises()
    regroup: Callable[[PyTree, Callable[..., PyTree]], PyTree] | None = None

    def promising(self, **changes: Any) -> "Uplink":
        """The same link with some promises changed.

        Args:
          **changes: attributes of ``Promises``.

        Example:
          >>> link = fc.uplink.at_client(optax.scale(0.5)).promising(contracts=True)
        """
        return self._replace(promises=dataclasses.replace(self.promises, **changes))


def encoded(
    link: Uplink, update: PyTree, state: PyTree, client_state: PyTree, ctx: Context
) -> tuple[Message, PyTree, Metrics]:
    """``link.encode(...)``, checked, with the message as a ``Message``.

    Args:
      link, update, state, client_state, ctx: see ``Uplink``.
    """
    sent = link.encode(update, state, client_state, ctx)
    _check_returned("encode", "(message, client_state, report)", sent, client_state, "client_state")
    message, client_state, report = sent
    return message if isinstance(message, Message) else Message(message), client_state, report


def decoded(link: Uplink, aggregate: PyTree, state: PyTree, report: Metrics, ctx: Context) -> Any:
    """``link.decode(...)``, checked."""
    got = link.decode(aggregate, state, report, ctx)
    _check_returned("decode", "(update, state, metrics)", got, state, "state")
    return got


def _check_returned(name: str, wanted: str, got: Any, before: PyTree, kept: str) -> None:
    if not isinstance(got, tuple) or len(got) != 3 or not isinstance(got[2], Mapping):
        raise InvalidInput(f"A link's {name} must return {wanted}, the last a dict, and this one's does not.")
    was, now = ({path: _form(x) for path, x in tree.named_leaves(x)} for x in (before, got[1]))
    if was != now:
        raise InvalidInput(f"A link's {name} must return the {kept} in the form it got it, {was}, not {now}.")


def _form(x: Any) -> str:
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"


def at_client(tx: optax.GradientTransformation, keep_state: bool = False, bound: float | Array | None = None) -> Uplink:
    """Lifts an optax transform to the client's end of the wire; the server does nothing.

    Metrics of a clip of ``fc.clipping``: ``clipped`` (the fraction of updates that it changed), ``norm``,
    ``threshold``, and ``clipped/group`` where it has several groups.

    Args:
      tx: a transform, such as a clip; it sees the client's whole update of the round.
      keep_state: whether every client keeps the transform's state from its one round to its next, as a clip with a
        history needs.
      bound: L2 norm that no result of the transform exceeds, which scales the noise; you promise it. Clips of
        ``fc.clipping`` with fixed thresholds know theirs (``fc.clipping.bound_of``).

    Raises:
      InvalidInput: (when a run begins) a transform with a state, without ``keep_state``; one that needs the parameters,
        which no link sees.

    Example:
      >>> link = fc.uplink.at_client(optax.clip(0.01))
    """
    checks.kind("at_client's tx", tx, optax.GradientTransformation, "an optax transform, such as a clip")
    if bound is not None:
        checks.positive("at_client: bound", bound)

    def init(params):
        if not keep_state and jax.tree.leaves(bare_state(tx.init(params))):
            raise InvalidInput("This transform has a state: say at_client(tx, keep_state=True), and clients keep it.")
        return ()

    def init_client(params):
        return optimiser.init(tx, params) if keep_state else ()

    def encode(update, state, client_state, ctx):
        before = optimiser.reseeded(client_state if keep_state else optimiser.init(tx, update), ctx.key)
        try:
            message, after = optimiser.update(tx, update, before)
        except ValueError as error:
            if "params" not in str(error):
                raise
            raise InvalidInput(
                "at_client: this transform needs the parameters, and a link sees the update alone: put it into the "
                "clients' optimiser."
            ) from error
        return message, after if keep_state else client_state, clip_report(after)

    limit = bound_of(tx) if bound is None else lambda like: jnp.asarray(bound, jnp.float32)
    if bound is not None and not isinstance(bound, jax.core.Tracer) and not np.isfinite(bound):
        limit = None
    promise = None if limit is None else lambda state, like: limit(like)
    return Uplink(init, init_client, encode, at_server, Promises(bound=promise))


def at_server(aggregate: PyTree, state: PyTree, report: Metrics, ctx: Context) -> tuple[PyTree, PyTree, Metrics]:
    """The ``decode`` of a link that only shows its report at the server.

    Args:
      aggregate, state, report, ctx: see ``Uplink``.
    """
    return aggregate, state, report


def nothing(params: Params) -> tuple[()]:
    """The ``init`` or ``init_client`` of a link that keeps nothing there.

    Args:
      params: see ``Uplink``.
    """
    return ()


def stateless(
    encode: Callable[[PyTree, Context], tuple[PyTree, Metrics]],
    decode: Callable[[PyTree, Metrics, Context], tuple[PyTree, Metrics]] | None = None,
    promises: Promises = Promises(),  # noqa: B008 (it is immutable)
) -> Uplink:
    """A link that keeps nothing from round to round, neither at clients nor at the server.

    Args:
      encode: ``(update, ctx) -> (message, report)`` at ONE client; see ``Uplink`` for both.
      decode: ``(aggregate, report, ctx) -> (update, metrics)`` at the server, once; by default the update is the
        aggregate, and the metrics are the report.
      promises: what holds of every message that leaves the link; nothing by default.

    Example:
      >>> def encode(update, ctx):  # signSGD: one bit of each coordinate
      ...     return jax.tree.map(jnp.sign, update), {}
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), uplink=fc.uplink.stateless(encode))
    """

    checks.kind("stateless: encode", encode, Callable, "a function (update, ctx) -> (message, report)")
    checks.kind(
        "stateless: decode", decode, Callable | None, "a function (aggregate, report, ctx) -> (update, metrics)"
    )
    checks.takes("stateless: encode", encode, 2, "(update, ctx)")
    if decode is not None:
        checks.takes("stateless: decode", decode, 3, "(aggregate, report, ctx)")
    checks.kind("stateless: promises", promises, Promises, "an fc.uplink.Promises")

    def encode_at(update, state, client_state, ctx):
        message, report = _pair("encode(update, ctx)", "(message, metrics)", encode(update, ctx))
        return message, client_state, report

    def decode_at(aggregate, state, report, ctx):
        assert decode is not None
        got = decode(aggregate, report, ctx)
        update, metrics = _pair("decode(aggregate, report, ctx)", "(update, metrics)", got)
        return update, state, metrics

    return Uplink(nothing, nothing, encode_at, at_server if decode is None else decode_at, promises)


def _pair(call: str, wanted: str, got: Any) -> Any:
    if not isinstance(got, tuple) or len(got) != 2 or not isinstance(got[1], Mapping):
        raise InvalidInput(f"{call} of a link must return {wanted}, the last a dict.")
    return got
