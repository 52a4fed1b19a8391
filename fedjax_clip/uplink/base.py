"""Links: what crosses the wire from a client to the server. The one type that optax lacks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.clipping import bare_state, bound_of, clip_report
from fedjax_clip.core import checks, optimiser, tree
from fedjax_clip.core.metrics import prefixed
from fedjax_clip.core.types import Array, InvalidInput, Metrics, Params, PyTree
from fedjax_clip.uplink.orders import check_chain
from fedjax_clip.uplink.promises import Promises, beside, joined, last_bound


class Message(NamedTuple):
    """What a link sends of an update, where the arrays do not say all: a link's ``encode`` may return it as message.

    Attributes:
      value: pytree, what the reducer is given.
      bytes: float32 scalar, the bytes that travel; ``None``: those of the arrays.
      entropy_bytes: float32 scalar, the least bytes that a code of the same numbers needs; ``None``: not known.
      late: bool scalar, whether it comes too late to count; ``None``: in time.

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

    @property
    def plain(self) -> PyTree:
        """The value alone, where there is nothing else to say."""
        return self.value if all(said is None for said in self[1:]) else self


class Context(NamedTuple):
    """What a link knows beside the update.

    Attributes:
      key: PRNG key of this link: one for each (round, client) in ``encode``, one for each round in ``decode``.
      round_key: PRNG key that all clients and the server share in this round.
      client_id: int32 number of the client; -1 at the server.
      weight: float32, what the client weighs in an average; the number of clients that arrived, at the server.
      denominator: what the reducer divides sums by whoever comes, ``None`` if by those who came.
      bound: L2 norm that no client's message exceeds where it enters this link, if a link before it guarantees one.
      staleness: int32, rounds since the client was sent its parameters; 0 at the server.
      threshold: fewest clients whose messages a modular sum adds up, ``None`` under other reducers.
      share: at the server, what takes an aggregate to the mean over ALL clients in which those who did not come count
        as zeros: ``|S| / N``, or the share of the population's weight; ``None`` where the cohort does not tell N.

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
      init_client: ``params -> client_state``, what one client keeps; without leaves if nothing.
      encode: ``(update, state, client_state, ctx) -> (message, client_state, report)`` at ONE client. The message is a
        pytree, or a ``Message`` that says besides how many bytes travel. A report is a dict of sums or
        ``metrics.Mean`` pairs, which add up over the cohort.
      decode: ``(aggregate, state, report, ctx) -> (update, state, metrics)`` at the server, once, with the
        cohort's report.
      promises: what holds of every message that leaves the link; nothing by default. Links, reducers and the accounting
        of privacy rely on it.

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

    def promising(self, **changes: Any) -> "Uplink":
        """The same link with some promises changed.

        Args:
          **changes: attributes of ``Promises``.

        Example:
          >>> link = fc.uplink.at_client(optax.scale(0.5)).promising(contracts=True)
        """
        return self._replace(promises=dataclasses.replace(self.promises, **changes))


def chain(*links: Uplink) -> Uplink:
    """Links one after the other: encoded from left to right, decoded from right to left.

    Each position has a PRNG key of its own. ``chain()`` sends the update as it is.

    Args:
      links: in the order in which an update passes them.

    Raises:
      InvalidInput: what is no link; links of which one breaks what another promises; ``uplink/orders.py`` has them all.

    Example:
      >>> link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.compress(fc.compression.qsgd(4)))
    """
    for link in links:
        checks.kind(
            "chain's links",
            link,
            Uplink,
            "an fc.uplink.Uplink (fc.uplink.compress makes one of a compressor, at_client of an optax transform)",
        )
    promises = [link.promises for link in links]
    check_chain(promises)
    if len(links) == 1:
        return links[0]
    bounding = [last_bound(promises[:position]) for position in range(len(links))]

    def context(position, state, ctx, like):
        last = bounding[position]
        bound = None if last is None else promises[last].bound
        here = _at(ctx, position)
        return here if bound is None else here._replace(bound=bound(state[last], like))

    def init(params):
        return tuple(link.init(params) for link in links)

    def init_client(params):
        return tuple(link.init_client(params) for link in links)

    def encode(update, state, client_state, ctx):
        states, reports = [], []
        sent = Message(update)
        for position, (link, s, c) in enumerate(zip(links, state, client_state, strict=True)):
            before = sent
            sent, c, report = encoded(link, before.value, s, c, context(position, state, ctx, before.value))
            if before.bytes is not None:  # the first that says: what follows, such as noise, is the server's work
                sent = sent._replace(bytes=before.bytes, entropy_bytes=before.entropy_bytes)
            states.append(c)
            reports.append(report)
        return sent.plain, tuple(states), _numbered(reports)

    def decode(aggregate, state, report, ctx):
        reports = _unnumbered(report, len(links))
        states: list[PyTree] = []
        metrics: list[Metrics] = []
        for position, link in reversed([*enumerate(links)]):
            here = context(position, state, ctx, aggregate)
            aggregate, s, m = decoded(link, aggregate, state[position], reports[position], here)
            states.insert(0, s)
            metrics.insert(0, m)
        return aggregate, tuple(states), _numbered(metrics)

    return Uplink(init, init_client, encode, decode, joined(promises))


def encoded(
    link: Uplink, update: PyTree, state: PyTree, client_state: PyTree, ctx: Context
) -> tuple[Message, PyTree, Metrics]:
    """``link.encode(...)``, once it is what it must be; what is sent as a ``Message``.

    Args:
      link, update, state, client_state, ctx: see ``Uplink``.
    """
    sent = link.encode(update, state, client_state, ctx)
    _check_returned("encode", "(message, client_state, report)", sent, client_state, "client_state")
    message, client_state, report = sent
    return message if isinstance(message, Message) else Message(message), client_state, report


def decoded(link: Uplink, aggregate: PyTree, state: PyTree, report: Metrics, ctx: Context) -> Any:
    """``link.decode(...)``, once it is what it must be."""
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


def identity() -> Uplink:
    """Sends the update as it is.

    Example:
      >>> fc.fedavg(per_example_loss, optax.sgd(0.1), uplink=fc.uplink.identity())  # the default
    """
    return chain()


def at_client(tx: optax.GradientTransformation, keep_state: bool = False, bound: float | Array | None = None) -> Uplink:
    """Lifts an optax transform to the client's end of the wire; the server does nothing.

    Metrics of a clip of ``fc.clipping``: ``clipped`` (the fraction of updates that it changed), ``norm``,
    ``threshold``, and ``clipped/group`` where it has several groups.

    Args:
      tx: a transform, such as a clip; it sees the client's whole update of the round.
      keep_state: whether every client keeps the transform's state from its one round to its next, as a clip with a
        history needs.
      bound: L2 norm that nothing which leaves the transform exceeds, for noise to be in proportion to; you promise it.
        Clips of ``fc.clipping`` with fixed thresholds know theirs (``fc.clipping.bound_of``).

    Raises:
      InvalidInput: (when a run begins) a transform with a state that nobody keeps.

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
        message, after = optimiser.update(tx, update, before)
        return message, after if keep_state else client_state, clip_report(after)

    limit = bound_of(tx) if bound is None else lambda like: jnp.asarray(bound, jnp.float32)
    if bound is not None and not isinstance(bound, jax.core.Tracer) and not np.isfinite(bound):
        limit = None
    promise = None if limit is None else lambda state, like: limit(like)
    return Uplink(init, init_client, encode, at_server, Promises(bound=promise))


def at_server(aggregate: PyTree, state: PyTree, report: Metrics, ctx: Context) -> tuple[PyTree, PyTree, Metrics]:
    """The ``decode`` of a link that does nothing at the server but to show its report.

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
    checks.kind("stateless: promises", promises, Promises, "an fc.uplink.Promises")

    def encode_at(update, state, client_state, ctx):
        message, report = encode(update, ctx)
        return message, client_state, report

    def decode_at(aggregate, state, report, ctx):
        assert decode is not None
        update, metrics = decode(aggregate, report, ctx)
        return update, state, metrics

    return Uplink(nothing, nothing, encode_at, at_server if decode is None else decode_at, promises)


def on_parts(*links: Uplink) -> Uplink:
    """Links for a message of several parts, ``(update, change, ...)``: one for each of the first parts, in order.

    Parts behind the last link travel as they are. The promises hold of the parts that have a link: a bound is
    ``sqrt(sum_k C_k^2)``, and the server's noise on two parts costs what ``fc.privacy.together`` says.

    Args:
      links: for the first part, the second, ...

    Raises:
      InvalidInput: noise, or a mechanism, on one of the parts and not on another; several parts on an integer grid;
        (when a round is traced) parts without a link beside noise or a grid.

    Example:
      >>> link = fc.uplink.on_parts(fc.uplink.clip_by_global_norm(1.0))  # for messages (update, change)
    """
    for link in links:
        checks.kind(
            "uplink", link, Uplink, "an fc.uplink.Uplink (fc.uplink.at_client(tx) makes one of an optax transform)"
        )
    promises = beside([link.promises for link in links])
    count = len(links)

    def init(params):
        return tuple(link.init(params) for link in links)

    def init_client(params):
        return tuple(link.init_client(params) for link in links)

    def own(ctx, part):
        return ctx if part == 0 else _at(ctx, -part)

    def encode(message, state, client_state, ctx):
        if (promises.noise or promises.grid) and len(message) != count:
            raise InvalidInput(
                f"The message has {len(message)} parts, of which {count} have a link with noise or a grid, so that the "
                "others would travel without: give on_parts a link for each part, or one link for all of them without "
                "on_parts."
            )
        sent, states = [], []
        report: Metrics = {}
        for part, (link, s, c) in enumerate(zip(links, state, client_state, strict=True)):
            out, c, said = encoded(link, message[part], s, c, own(ctx, part))
            sent.append(out)
            states.append(c)
            report |= said if part == 0 else prefixed(f"part{part}", said)
        rest = message[count:]

        def total(sizes):
            if all(size is None for size in sizes):
                return None
            known = [tree.nbytes(x.value) if size is None else size for x, size in zip(sent, sizes, strict=True)]
            return sum(known) + tree.nbytes(rest)

        bytes, least = total([x.bytes for x in sent]), total([x.entropy_bytes for x in sent])
        return Message((*(x.value for x in sent), *rest), bytes, least).plain, tuple(states), report

    def decode(aggregate, state, report, ctx):
        made, states = [], []
        metrics: Metrics = {}
        for part, (link, s) in enumerate(zip(links, state, strict=True)):
            start = f"part{part}/"
            mine = {k.removeprefix(start): v for k, v in report.items() if k.startswith(start)} if part else report
            out, s, m = decoded(link, aggregate[part], s, mine, own(ctx, part))
            made.append(out)
            states.append(s)
            metrics |= m if part == 0 else prefixed(f"part{part}", m)
        return (*made, *aggregate[count:]), tuple(states), metrics

    return Uplink(init, init_client, encode, decode, promises)


def _at(ctx: Context, position: int) -> Context:
    number = jnp.uint32(position % 2**32)
    fold = jax.random.fold_in
    return ctx._replace(key=fold(ctx.key, number), round_key=fold(ctx.round_key, number))


def _numbered(metrics: list[Metrics]) -> Metrics:
    return {k: v for i, m in enumerate(metrics) for k, v in prefixed(str(i), m).items()}


def _unnumbered(metrics: Metrics, count: int) -> list[Metrics]:
    starts = [f"{i}/" for i in range(count)]
    return [{k.removeprefix(s): v for k, v in metrics.items() if k.startswith(s)} for s in starts]
