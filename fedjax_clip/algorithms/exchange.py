"""One round trip between the server and a cohort: the only place where clients are mapped and reduced."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip import clipping
from fedjax_clip.algorithms.sides import AtClient, AtServer, Cut, Sent, Unheard
from fedjax_clip.core import keys, metrics, tree
from fedjax_clip.core.cohort import Client, Cohort
from fedjax_clip.core.types import Array, ClientState, InvalidInput, Metrics, PyTree
from fedjax_clip.reduce import Reducer, Roster
from fedjax_clip.uplink.base import Context, Uplink, decoded, encoded

# (shared, client, key) -> (update, what the client keeps, report), and its private parameters if it has trained some
ClientFn = Callable[[PyTree, Client, Array], tuple[Any, ...]]

NO_POPULATION = "The cohort does not say how many clients there are in all: make it by fc.extend.plan."
NAMED = 8  # how many clients with updates that are not finite are named


class Carried(NamedTuple):
    """A client's message, with the change of its model's state beside it (``algorithms/carried.py``)."""

    message: PyTree
    change: PyTree


class Answer(NamedTuple):
    """A cohort's answer in one exchange; the same on every device except ``clients``.

    Attributes:
      update: the reduced message; a tuple of parts if clients send several.
      uplink: the uplink's state at the server.
      clients: ``ClientState`` of ``[C, ...]``, what each client keeps.
      metrics: of the exchange.

    Example:
      >>> def client_fn(x, client, key):  # sends its number of steps
      ...     return jnp.float32(client.num_steps), client.state.own, {}
      >>> answer = fc.extend.exchange(client_fn, uplink, reducer, server.params, (), cohort, key)
      >>> float(answer.metrics["clients"])
      3.0
    """

    update: PyTree
    uplink: PyTree
    clients: PyTree
    metrics: Metrics


def exchange(
    client_fn: ClientFn,
    uplink: Uplink,
    reducer: Reducer,
    shared: PyTree,
    uplink_state: PyTree,
    cohort: Cohort,
    key: Array,
) -> Answer:
    """Sends ``shared`` to every client, lets each work, and folds their messages into one update.

    Clients stream through the device ``cohort.width`` at a time, and each message is folded in as it comes, so
    memory does not grow with the cohort. The loop ends with the last client, and each client's own loop with its
    last step: padding costs nothing. A client whose update or message has no finite norm (a NaN or an infinity
    somewhere, or beyond 1e19, which float32 cannot square) is dropped: it adds nothing, keeps its old state and is
    counted. A client whose new state has a NaN or an infinity is dropped, too. Under noise or a secure sum nobody may
    see a drop: such a client sends a zero update through the uplink like any other, and still counts as ``dropped``.
    With ``cohort.non_finite == "keep"`` such clients are kept like any other. A round of fewer clients than the reducer
    needs (``fewest``, or the ``threshold`` of a modular sum) has the update zero, leaves all clients' states as they
    were, and is counted as ``too_few``.

    Args:
      client_fn: ``(shared, client, key) -> (update, client_state, report)``, written for ONE client.
      uplink: what each update passes on its way.
      reducer: how messages become one.
      shared: what the server broadcasts, usually the parameters.
      uplink_state: the uplink's state at the server.
      cohort: this device's clients.
      key: PRNG key of the round; each client folds its own number in, so its place does not matter. A key of another
        generator (``rbg``) is converted to a Threefry key, because its numbers would change with ``cohort.width``. With
        a ``cohort.secret``, the keys of clients and links are ChaCha20 keys of the secret and of this key. Only the
        links' ``round_key`` and the reducer's roster then depend on this key alone.

    Returns:
      An ``Answer``, ``(update, uplink_state, client_states [C, ...], metrics)``.
      Among the metrics: ``asked``, the clients that received something; ``clients``, those whose messages counted;
      ``bytes_down``, the bytes sent to all clients (``shared``, not a link's state); and ``bytes_up``, the bytes of
      their messages as arrays or as codes, with ``bytes_up_entropy`` (see ``fc.uplink.compress``). Reports do not
      count. With ``cohort.non_finite == "stop"`` also ``dropped_ids``, ``int32 [8]``: up to eight of the clients whose
      updates were not finite, padded with -1.

    Example:
      >>> def client_fn(x, client, key):
      ...     y, _, _, report = fc.extend.local_steps(per_example_loss, optax.sgd(0.1), x, client, key)
      ...     return optax.tree.sub(y, x), client.state.own, report
      >>> update, link, client_states, metrics = fc.extend.exchange(
      ...     client_fn, uplink, reducer, server.params, server.uplink, cohort, key
      ... )
    """
    hidden = uplink.promises.noise is not None or bool(reducer.hides)
    if hidden and cohort.non_finite != "drop":
        raise InvalidInput(
            f"non_finite={cohort.non_finite!r} shows that a client's update is not finite, which the uplink's noise or "
            "the secure sum hides: leave it at 'drop', and such clients send zeros."
        )
    side = cohort.side
    if isinstance(side, AtServer) and side.sent is None:
        raise Cut(shared)
    if isinstance(side, AtClient):
        shared, reducer = side.shared, side.alone(reducer)
    if isinstance(side, Unheard):
        reducer = side.deaf(reducer)
    if isinstance(side, AtServer):
        reducer = side.unmasked(reducer)
    places = len(cohort.ids)
    cohort = _roomy(cohort) if reducer.exact or isinstance(side, AtClient) else cohort
    key = keys.threefry(key)
    work_key, link_key, decode_key = jax.random.split(key, 3)
    own_links = link_key
    if cohort.secret is not None:  # secret noise; randomness that all share stays on the public key
        work_key, own_links, decode_key = jax.random.split(keys.folded(keys.chacha(cohort.secret), key), 3)

    def context(id, weight, staleness):
        own_key = jax.random.fold_in(own_links, jnp.maximum(id, 0))
        known = {"staleness": staleness, "threshold": reducer.threshold}
        return Context(own_key, link_key, id, weight, reducer.denominator, **known)

    def one_client(most, id, weight, first, num_steps, state, staleness):
        present = id >= 0
        number = jnp.maximum(id, 0)
        staleness = jnp.zeros((), jnp.int32) if staleness is None else staleness
        client = Client(id, weight, first, num_steps, state, staleness, cohort, most=most)
        update, own, report, *private = _worked(client_fn, shared, client, jax.random.fold_in(work_key, number))
        # Of what the algorithm sends: the model's state has other units.
        own_norm = tree.norm(update.message) if isinstance(update, Carried) else None
        norm = tree.norm(update)  # detects every NaN and infinity, in the pass that the histogram needs anyway
        if hidden:  # nobody may see that the update is not finite
            update = optax.tree.where(jnp.isfinite(norm), update, optax.tree.zeros_like(update))
        ctx = context(id, weight, staleness)
        (message, nbytes, entropy_bytes, late, packed), link, link_report = encoded(
            uplink, update, uplink_state, state.uplink, ctx
        )
        in_time = present if late is None else present & ~late
        new = ClientState(own, link, *(private or [state.private]))
        kept = clipping.bare_state(new)  # the metrics' part of a clip's state may be infinite
        lasting = tree.stays_finite(kept, clipping.bare_state(state))
        finite = jnp.isfinite(norm) & jnp.isfinite(tree.norm(message)) & lasting
        sound = in_time if cohort.non_finite == "keep" else in_time & finite
        if isinstance(side, AtClient):  # what travels, in place of what the server makes of it
            side.learns(None if packed is None else packed.opened)
            message = message if packed is None else packed.sent
        arrived = in_time if hidden else sound
        seen = {"client": report, "norms": metrics.Histogram.of(norm if own_norm is None else own_norm)}
        came = {"uplink": link_report, "clients": jnp.ones((), jnp.float32), "weight": weight}
        return (
            optax.tree.where(arrived, message, optax.tree.zeros_like(message)),
            jnp.where(arrived, weight, 0),
            # The link has sent zeros by now; the client's other state would hold the NaN.
            optax.tree.where(sound, new, state)._replace(uplink=optax.tree.where(arrived, link, state.uplink)),
            jnp.where(in_time & ~finite, number, -1),
            optax.tree.where(sound, seen, optax.tree.zeros_like(seen))
            | optax.tree.where(arrived, came, optax.tree.zeros_like(came))
            | {"asked": present.astype(jnp.float32), "dropped": (present & ~sound).astype(jnp.float32)}
            | {"sent": jax.tree.map(lambda x: jnp.where(present, x, 0), (nbytes, entropy_bytes))},  # dropped or not
        )

    def received(index, states):
        """What a client on the other side of the wire has sent, in place of its work."""
        sent = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), side.sent)
        message = sent.message
        if side.opened is not None:
            message = side.opened(message, context(cohort.ids[index], sent.weight, jnp.zeros((), jnp.int32)))
        arrived = sent.weight > 0
        sound = arrived & jnp.isfinite(tree.norm(message)) & jnp.isfinite(sent.weight)  # a client may send anything
        message = optax.tree.where(sound, message, optax.tree.zeros_like(message))
        nothing = optax.tree.zeros_like(sent.report) | {
            "asked": sent.report["asked"],
            "sent": sent.report["sent"],
            "dropped": jnp.ones((), jnp.float32),
        }
        report = optax.tree.where(arrived & ~sound, nothing, sent.report)
        weight = jnp.where(sound, sent.weight, 0)
        message, weight, report = jax.tree.map(lambda x: x[None], (message, weight, report))
        return message, weight, states, jnp.full(1, -1, jnp.int32), adder.chunk(report)

    def chunk(most, index, states):
        if isinstance(side, AtServer):
            return received(index, states)
        clients = dataclasses.replace(cohort, state=states).clients(index * cohort.width)
        if cohort.width == 1:  # not a vmap of one: convolutions would become grouped ones
            out = one_client(most, *jax.tree.map(lambda x: x[0], clients))
            message, weight, state, bad, report = jax.tree.map(lambda x: x[None], out)
        else:
            message, weight, state, bad, report = jax.vmap(functools.partial(one_client, most))(*clients)
        return message, weight, state, bad, adder.chunk(report)

    adder = metrics.adder(reducer.exact, len(cohort.ids))
    traced = [tree.traced(functools.partial(chunk, most), 0, cohort.state) for _, most in cohort.buckets]
    _, (messages, _, _, _, report) = traced[0]

    def body(chunk, done, index, carry):
        index = done + index
        acc, states, bad, report = carry
        message, weight, state, new_bad, new_report = chunk(index, states)  # read and written in place: one copy
        states = jax.tree.map(
            lambda xs, x: jax.lax.dynamic_update_slice_in_dim(xs, x, index * cohort.width, 0), states, state
        )
        bad = _most(bad, new_bad) if cohort.non_finite == "stop" else bad
        return reducer.add(acc, message, weight), states, bad, adder.add(report, new_report)

    message = jax.tree.map(lambda m: m[0], messages)
    roster = Roster(jnp.asarray(cohort.ids), jax.random.fold_in(key, 3))  # the key beside the three it was split into
    acc = reducer.zero(message, roster)
    num_chunks = cohort.everywhere(-(-tree.count(cohort.ids >= 0) // cohort.width))
    carry, done = (acc, cohort.state, jnp.full(NAMED, -1, jnp.int32), adder.zero(report)), 0
    for (turns, _), (chunk, _) in zip(cohort.buckets, traced, strict=True):
        count = turns if cohort.loops.buckets else num_chunks
        carry = cohort.loop(functools.partial(body, chunk, done), carry, count, turns)
        done += turns
    acc, client_states, bad, report = carry
    if isinstance(side, Unheard):
        kept = client_states._replace(uplink=cohort.state.uplink)
        raise Cut(jax.tree.map(lambda x: x[:places], kept))

    aggregate = reducer.finish(acc, cohort.axis_name)
    report = adder.finish(report, cohort.axis_name)
    if isinstance(side, AtClient):
        message, weight = aggregate
        raise Cut((Sent(message, weight, report), jax.tree.map(lambda x: x[0], client_states)))
    fewest = reducer.fewest if reducer.threshold is None else reducer.threshold
    too_few = report["clients"] < fewest  # the aggregate is zero, so no state changes
    if fewest > 1:
        client_states = optax.tree.where(too_few, cohort.state, client_states)
    if len(cohort.ids) > places:
        client_states = jax.tree.map(lambda x: x[:places], client_states)
    ctx = Context(
        *(decode_key, link_key, jnp.full((), -1, jnp.int32), report["clients"], reducer.denominator),
        threshold=reducer.threshold,
        share=None if cohort.num_clients is None else population_share(reducer, cohort, report),
    )
    update, uplink_state, link_metrics = decoded(uplink, aggregate, uplink_state, metrics.finish(report["uplink"]), ctx)
    asked, (nbytes, entropy_bytes) = report["asked"], report["sent"]
    own = {
        **metrics.prefixed("uplink", link_metrics),
        **{f"client_norm/p{q}": report["norms"].quantile(q / 100) for q in (10, 50, 90)},
        "asked": asked,
        "clients": report["clients"],
        "weight": report["weight"],
        "dropped": report["dropped"],
        **({"too_few": too_few.astype(jnp.float32)} if fewest > 1 else {}),
        **({"dropped_ids": _everywhere(bad, cohort.axis_name)} if cohort.non_finite == "stop" else {}),
        "bytes_down": asked * float(tree.nbytes(shared)),
        "bytes_up": asked * float(tree.nbytes(message)) if nbytes is None else nbytes,
        **({} if entropy_bytes is None else {"bytes_up_entropy": entropy_bytes}),
        "update_norm": tree.norm(update),
    }
    of_clients = metrics.finish(report["client"])
    metrics.check_reported(of_clients, own)
    return Answer(update, uplink_state, client_states, metrics.without_nan(of_clients | own))


def _roomy(cohort: Cohort) -> Cohort:
    """The cohort with places for two chunks and two rows at least.

    Of a single one XLA knows where it begins, compiles other loops, and a client's result may round differently.
    """

    def padded(x, count, empty=0):
        return jnp.concatenate([jnp.asarray(x), jnp.full((count, *x.shape[1:]), empty, x.dtype)])

    def more(count, *names):
        return jax.tree.map(lambda x: padded(x, count), {name: getattr(cohort, name) for name in names})

    if len(cohort.ids) == cohort.width:
        fields = more(cohort.width, "weight", "first", "num_steps", "state", "staleness")
        cohort = dataclasses.replace(cohort, ids=padded(cohort.ids, cohort.width, -1), **fields)
    if cohort.example_weight.shape[0] == 1:  # no len, which a dimension that an export leaves open has not
        cohort = dataclasses.replace(cohort, **more(1, "batches", "example_weight"))
    return cohort


def population_share(reducer: Reducer, cohort: Cohort, metrics: Metrics) -> Array:
    """The factor from ``reducer``'s aggregate to the mean over ALL N clients, absent ones counting as zeros.

    ``|S| / N`` for a mean over the clients S that arrived, ``sum_S w_i / sum_N w_i`` for a weighted one, ``n / N`` for
    a mean with the fixed denominator n.

    Args:
      reducer: what made the aggregate.
      cohort: of the round.
      metrics: of the exchange.

    Returns:
      float32 scalar.

    Raises:
      InvalidInput: (when traced) a cohort that was not made by ``fc.extend.plan`` and does not tell N.

    Example:
      >>> share = population_share(fc.reduce.uniform_mean(), cohort, {"clients": 3.0})  # 3 / data.num_clients
    """
    if cohort.num_clients is None or cohort.total_weight is None:
        raise InvalidInput(NO_POPULATION)
    num_clients = jnp.asarray(cohort.num_clients, jnp.float32)
    if reducer.denominator is not None:
        return jnp.asarray(reducer.denominator, jnp.float32) / num_clients
    if reducer.weighted:
        return metrics["weight"] / cohort.total_weight
    return metrics["clients"] / num_clients


def _worked(client_fn: ClientFn, shared: PyTree, client: Client, key: Array) -> Any:
    """The result of a client function, checked."""
    done = client_fn(shared, client, key)
    if not isinstance(done, tuple) or len(done) not in (3, 4) or not isinstance(done[2], dict):
        raise InvalidInput("A client function must return (update, what the client keeps, report), the last a dict.")
    was, now = (str(jax.tree.structure(x)) for x in (client.state.own, done[1]))
    if was != now:
        raise InvalidInput(
            f"A client function must return what the client keeps in the form it got it, {was}, not {now}: say what "
            "each client keeps before round 1 by client_own= of the algorithm."
        )
    return done


def _most(*ids: Array) -> Array:
    """The largest ``NAMED`` of these client numbers, padded with -1."""
    return jnp.sort(jnp.concatenate(ids), descending=True)[:NAMED]


def _everywhere(ids: Array, axis_name: str | None) -> Array:
    return ids if axis_name is None else _most(*jax.lax.all_gather(ids, axis_name))


def traffic(*exchanges: Metrics) -> Metrics:
    """The bytes of a round of several exchanges, from the metrics of each; data sent twice counts twice."""
    total = {name: sum(metrics[name] for metrics in exchanges) for name in ("bytes_down", "bytes_up")}
    if any("bytes_up_entropy" in metrics for metrics in exchanges):
        total["bytes_up_entropy"] = sum(m.get("bytes_up_entropy", m["bytes_up"]) for m in exchanges)
    return total
