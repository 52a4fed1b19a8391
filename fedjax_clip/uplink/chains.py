"""Links made of links: one after the other, or one for each part of a message."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.core.metrics import prefixed
from fedjax_clip.core.types import InvalidInput, Metrics, PyTree
from fedjax_clip.uplink.base import Context, Message, Packed, Uplink, decoded, encoded
from fedjax_clip.uplink.orders import check_chain
from fedjax_clip.uplink.promises import beside, joined, last_bound


def chain(*links: Uplink) -> Uplink:
    """Links one after the other: encoded from left to right, decoded from right to left.

    Each position has a PRNG key of its own. ``chain()`` sends the update as it is.

    Args:
      links: in the order in which an update passes them.

    Raises:
      InvalidInput: an argument that is not a link; a link that breaks another's promise (all cases:
        ``uplink/orders.py``).

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
            if before.bytes is not None:  # later links, such as noise, run at the server
                sent = sent._replace(bytes=before.bytes, entropy_bytes=before.entropy_bytes)
            if sent.packed is not None:
                sent = sent._replace(packed=_further(sent.packed, position))
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

    return Uplink(init, init_client, encode, decode, joined(promises), _regrouping(links))


def identity() -> Uplink:
    """Sends the update as it is.

    Example:
      >>> fc.fedavg(per_example_loss, optax.sgd(0.1), uplink=fc.uplink.identity())  # the default
    """
    return chain()


def on_parts(*links: Uplink) -> Uplink:
    """Links for a message of several parts, ``(update, change, ...)``: one for each of the first parts, in order.

    Parts after the last link travel as they are. The promises hold for the parts that have a link: a bound is
    ``sqrt(sum_k C_k^2)``, and the server's noise on two parts costs what ``fc.privacy.together`` says.

    Args:
      links: for the first part, the second, ...

    Raises:
      InvalidInput: noise, or a mechanism, on one part and not on another; several parts on an integer grid; (when a
        round is traced) parts without a link beside noise or a grid.

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
        whole = Message((*(x.value for x in sent), *rest), bytes, least, packed=_together(sent, rest, own))
        return whole.plain, tuple(states), report

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

    return Uplink(init, init_client, encode, decode, promises, _regrouping(links))


def _regrouping(links: Sequence[Uplink]) -> Callable[..., tuple[PyTree, ...]] | None:
    """The ``regroup`` of links whose states lie in a tuple, at the server and at each client."""
    if all(link.regroup is None for link in links):
        return None

    def one(position, link, state, average):
        if link.regroup is None:
            return state
        return link.regroup(state, lambda part, of: average(part, lambda clients: of(clients[position])))

    return lambda state, average: tuple(one(i, link, s, average) for i, (link, s) in enumerate(zip(links, state)))


def _further(packed: Packed, position: int) -> Packed:
    """What the link at a position of a chain packs, opened with the chain's context."""
    return dataclasses.replace(packed, opened=lambda sent, ctx: packed.opened(sent, _at(ctx, position)))


def _together(sent: list[Message], rest: PyTree, own: Callable[[Context, int], Context]) -> Packed | None:
    """The parts of a message packed, if one of them is and none hides what travels; the rest travels as it is."""
    if all(x.packed is None for x in sent) or any(x.bytes is not None and x.packed is None for x in sent):
        return None
    how = [None if x.packed is None else x.packed.opened for x in sent]

    def opened(parts: PyTree, ctx: Context) -> PyTree:
        first = (x if open is None else open(x, own(ctx, part)) for part, (open, x) in enumerate(zip(how, parts)))
        return (*first, *parts[len(how) :])

    return Packed((*(x.value if x.packed is None else x.packed.sent for x in sent), *rest), opened)


def _at(ctx: Context, position: int) -> Context:
    number = jnp.uint32(position % 2**32)
    fold = jax.random.fold_in
    return ctx._replace(key=fold(ctx.key, number), round_key=fold(ctx.round_key, number))


def _numbered(metrics: list[Metrics]) -> Metrics:
    return {k: v for i, m in enumerate(metrics) for k, v in prefixed(str(i), m).items()}


def _unnumbered(metrics: Metrics, count: int) -> list[Metrics]:
    starts = [f"{i}/" for i in range(count)]
    return [{k.removeprefix(s): v for k, v in metrics.items() if k.startswith(s)} for s in starts]
