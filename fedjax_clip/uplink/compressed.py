"""Compressed links: compressors, error feedback, low rank, count sketches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip import compression
from fedjax_clip.compression import Code, Compressor
from fedjax_clip.compression.base import check_memory
from fedjax_clip.compression.rotate import unpacked_signs
from fedjax_clip.core import checks, keys, tree
from fedjax_clip.core.metrics import Mean
from fedjax_clip.core.types import Array, InvalidInput, Metrics, PyTree
from fedjax_clip.uplink.base import Message, Packed, Uplink, at_server, encoded, nothing, stateless
from fedjax_clip.uplink.chains import chain
from fedjax_clip.uplink.promises import Promises, Wire


def compress(compressor: Compressor, by_leaf: bool = False) -> Uplink:
    """Sends the compressor's code of the update; the server averages the decoded codes.

    ``bytes_up`` counts ``len(fc.compression.to_bytes(code))``; ``bytes_up_entropy`` is its lower bound. Metrics:
    ``uplink/error``, ``||decoded - update||^2`` over ``||update||^2``. Values that are not finite stay so. No later
    link may touch the message: it must be the last link, or directly before ``gaussian``. A biased compressor without
    ``error_feedback`` is allowed, but training need not converge (Karimireddy et al. 2019, section 3).

    Args:
      compressor: of ``fc.compression``.
      by_leaf: whether each leaf of the update is compressed separately, with its own scale or k.

    Raises:
      InvalidInput: not a compressor; (when a chain is built) a later link that changes the message.

    Example:
      >>> uplink = fc.uplink.compress(fc.compression.qsgd(4, bucket=512))
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), uplink=uplink)
    """
    checks.kind("compressor", compressor, Compressor, "of fc.compression, such as fc.compression.qsgd(4)")

    def encode(update, ctx):
        finite, whole = _finite(update)
        message, codes = compression.roundtrip(compressor, whole, ctx.key, by_leaf)
        like = jax.eval_shape(lambda x: x, update)

        def opened(sent, ctx):
            return compression.opened(compressor, sent, like, ctx.key, by_leaf)

        sent = _sent(_or_nan(finite, message), codes)._replace(packed=Packed(codes, opened))
        return sent, _error(whole, message)

    return stateless(encode, promises=Promises(contracts=compressor.contracts, wire=Wire.PACKS))


def error_feedback(*links: Uplink | Compressor) -> Uplink:
    """The client stores the error of a chain and sends it later: ``m = C(u + e); e <- u + e - m``.

    Guarantee: the sum of all messages of a client and its ``e`` is the sum of its updates, whatever the chain loses.
    For a contraction the bias vanishes in the limit, and ``e`` stays bounded; ``uplink/residual`` is its norm. A client
    that is not sampled keeps its ``e`` until its next round. To bound the message, put the clip inside:
    ``error_feedback(clip_by_global_norm(1.0), top_k(0.01))`` promises the clip's bound. A clip before
    ``error_feedback`` does not bound the message.

    Args:
      links: a compressor, or links whose message decodes to something of the update's shape.

    Raises:
      InvalidInput: no link, a link whose message is not an update, noise; (when a run begins) a compressor whose
        relative error may exceed 1 for the model's size.

    Example:
      >>> uplink = fc.uplink.error_feedback(fc.compression.top_k(0.01))

    Source: Seide et al. (2014), "1-Bit Stochastic Gradient Descent"; Stich et al. (2018); Karimireddy et al. (2019),
    "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", Algorithm 2.
    """
    if not links:
        raise InvalidInput("error_feedback needs a link that loses something, such as error_feedback(top_k(0.01)).")
    for link in links:
        checks.kind("error_feedback's links", link, Uplink | Compressor, "compressors or links, such as top_k(0.01)")
    inner = chain(*(compress(link) if isinstance(link, Compressor) else link for link in links))
    if inner.promises.wire is Wire.SUMS or inner.promises.noise:
        raise InvalidInput("error_feedback remembers what a message lacks: noise and sketches belong behind it.")

    def init_client(params):
        for compressor in links:
            if isinstance(compressor, Compressor):
                check_memory("error_feedback", compressor, params)
        return jax.tree.map(jnp.zeros_like, params), inner.init_client(params)

    def encode(update, state, client_state, ctx):
        residual, own = client_state
        wanted = jax.tree.map(jnp.add, update, residual)
        message, own, report = encoded(inner, wanted, state, own, ctx)
        # What the chain lost of the update and of the old residual goes with the next message.
        residual = jax.tree.map(jnp.subtract, wanted, message.value)
        return (
            message.plain,
            (residual, own),
            report | {"residual": Mean(tree.norm(residual), jnp.ones((), jnp.float32))},
        )

    def decode(aggregate, state, report, ctx):
        update, state, metrics = inner.decode(aggregate, state, report, ctx)
        return update, state, metrics | {"residual": report["residual"]}

    # With the residual a message may be longer than the update that entered.
    own = inner.regroup
    regroup = None if own is None else lambda state, average: own(state, lambda p, of: average(p, lambda c: of(c[1])))
    made = inner._replace(init_client=init_client, encode=encode, decode=decode, regroup=regroup)
    return made.promising(contracts=False)


def power_sgd(rank: int = 4) -> Uplink:
    """Sends each matrix as ``P Q^T`` of low rank, by one step of the power method from the client's last Q. Biased.

    ``P = orthonormal(M Q); Q <- M^T P``, with a leaf ``[..., n]`` as a matrix of n columns. P and Q travel; leaves on
    which that saves nothing (vectors, small matrices) travel as they are. ``P P^T M`` is a projection, so it enlarges
    no norm. Clients keep Q, which improves from round to round. Put it into ``error_feedback``, as the paper does. The
    paper's workers agree on one P and then send Q, two exchanges a step; here every client has its own P, and one
    exchange is enough.

    Args:
      rank: r, at least 1.

    Raises:
      InvalidInput: a rank that is not a whole number of at least 1.

    Example:
      >>> uplink = fc.uplink.error_feedback(fc.uplink.power_sgd(2))

    Source: Vogels, Karimireddy and Jaggi (2019), "PowerSGD", Algorithm 1.
    """
    checks.count("power_sgd: rank", rank)

    def saves(x):
        columns = x.shape[-1] if x.ndim else 1
        return x.ndim > 1 and rank * (x.size // columns + columns) < x.size

    def matrices(tree):
        return [(i, x) for i, x in enumerate(jax.tree.leaves(tree)) if saves(x)]

    def init_client(params):
        key = keys.seeded(0)
        return [
            jax.random.normal(jax.random.fold_in(key, i), (x.shape[-1], rank), tree.wide_type(x))
            for i, x in matrices(params)
        ]

    def encode(update, state, client_state, ctx):
        finite, whole = _finite(update)
        leaves, structure = jax.tree.flatten(whole)
        sent, kept = dict(enumerate(leaves)), []
        for (i, x), last in zip(matrices(whole), client_state, strict=True):
            matrix = tree.wide(x).reshape(-1, x.shape[-1])
            p = _orthonormal(matrix @ last)
            q = matrix.T @ p
            leaves[i], sent[i] = (p @ q.T).reshape(x.shape).astype(x.dtype), (p, q)
            kept.append(jnp.where(jnp.any(q != 0), q, last))
        values = tree.ravel(sent)[0].astype(jnp.float32)
        code = Code(jnp.zeros(0, jnp.uint32), values, alphabet=1, size=len(values))
        message = jax.tree.unflatten(structure, leaves)
        return _sent(_or_nan(finite, message), code), kept, _error(whole, message)

    return Uplink(nothing, init_client, encode, at_server, Promises(contracts=True, wire=Wire.PACKS))


def count_sketch(
    rows: int = 5, columns: int = 1000, k: int = 50, momentum: float | Array = 0.0, seed: int = 0
) -> Uplink:
    """FetchSGD: clients send count sketches; the server finds the k heaviest coordinates of their sum.

    In each row, each of d coordinates falls with a random sign into one of ``columns`` buckets; its estimate is the
    median over the rows. Each run of ``columns`` neighbours is rotated by a random number. Neighbours never collide,
    and two coordinates of different runs collide with probability ``1 / columns``, which is all that the guarantee asks
    of a hash. The server keeps momentum and error as sketches: ``S_u <- rho S_u + S; S_e <- S_e + S_u; update =
    heaviest k of S_e``, which it takes out of ``S_e``, and zeroes in ``S_u``. Clients keep nothing.

    Args:
      rows: number of rows, odd.
      columns: buckets in a row; ``4 rows columns`` bytes travel.
      k: coordinates that move in a round. Take far fewer than ``columns``: otherwise noise moves, and the error grows
        without end.
      momentum: rho, in [0, 1].
      seed: of the hash functions, which are the same in all rounds.

    Raises:
      InvalidInput: numbers out of range; (when the algorithm is built) a reducer that is not linear.

    Example:
      >>> uplink = fc.uplink.count_sketch(rows=5, columns=500, k=200)

    Source: Charikar, Chen and Farach-Colton (2002), "Finding Frequent Items in Data Streams"; Rothchild et al. (2020),
    "FetchSGD", Algorithm 1.
    """
    rows, columns, k = (
        checks.count(f"count_sketch: {name}", value) for name, value in (("rows", rows), ("columns", columns), ("k", k))
    )
    seed = checks.seed("count_sketch: seed", seed)
    checks.within("count_sketch: momentum", momentum, 0, 1)
    if rows * columns > 2**28:
        raise InvalidInput(f"count_sketch: {rows} rows of {columns} columns are a sketch of more than 1 GiB.")
    if rows % 2 == 0:
        raise InvalidInput(f"count_sketch: rows must be odd, for a median, and is {rows}.")

    def hashes(d):
        """The rotation of each run, ``[m, rows]``, and bits for its buckets' signs, ``[m, rows, columns / 32]``."""
        blocks = -(-d // columns)
        turn, sign = jax.random.split(keys.seeded(seed))
        turns = jax.random.randint(turn, (blocks, rows), 0, columns, jnp.int32)
        return turns, jax.random.bits(sign, (blocks, rows, -(-columns // 32)), jnp.uint32)

    def signs(words):
        return unpacked_signs(words).reshape(*words.shape[:-1], -1)[..., :columns]

    def sketch(x):
        turns, words = hashes(len(x))
        x = jnp.pad(x, (0, -len(x) % columns)).reshape(-1, columns)
        twice = jnp.concatenate([x, x], 1)

        def add(b, total):
            turned = [
                jax.lax.dynamic_slice(twice, (jnp.int32(b), columns - turns[b, r]), (1, columns))[0]
                for r in range(rows)
            ]
            return total + signs(words[b]) * jnp.stack(turned)

        return jax.lax.fori_loop(0, len(x), add, jnp.zeros((rows, columns), jnp.float32))

    def init(params):
        leaves, structure = jax.tree.flatten(params)
        shape = _Shape(structure, tuple((np.shape(x), jnp.result_type(x)) for x in leaves))
        return shape, *(jnp.zeros((rows, columns), jnp.float32) for _ in range(2))

    def encode(update, state, client_state, ctx):
        return sketch(tree.ravel(update)[0].astype(jnp.float32)), client_state, {}

    def decode(aggregate, state, report, ctx):
        shape, speed, missed = state
        x, restore = tree.ravel(zeros := shape.zeros())
        turns, words = hashes(len(x))
        speed = momentum * speed + aggregate
        total = missed + speed

        def turn_back(b, estimate):
            twice = jnp.tile(signs(words[b]) * total, 2)
            seen = [jax.lax.dynamic_slice(twice[r], (turns[b, r],), (columns,)) for r in range(rows)]
            return estimate.at[b].set(tree.sorted_rows(jnp.stack(seen))[rows // 2])

        nothing = jnp.zeros((len(turns), columns), jnp.float32)
        estimate = jax.lax.fori_loop(0, len(turns), turn_back, nothing).ravel()[: len(x)]
        heavy = jax.lax.top_k(jnp.abs(estimate), min(k, len(x)))[1]
        found, run, row = estimate[heavy], heavy // columns, jnp.arange(rows, dtype=jnp.int32)[:, None]
        bucket = (heavy[None] + turns[run].T) % columns
        sign = jnp.take_along_axis(unpacked_signs(words[run, row, bucket // 32]), bucket[..., None] % 32, 2)[..., 0]
        step = jnp.zeros(len(x), jnp.float32).at[heavy].set(found)
        touched = jnp.zeros((rows, columns), bool).at[row, bucket].max(found != 0)
        state = shape, jnp.where(touched, 0, speed), total.at[row, bucket].add(-sign * found[None])
        return optax.tree.cast_like(restore(step), zeros), state, {"missed_norm": tree.norm(state[2])}

    return Uplink(init, nothing, encode, decode, Promises(wire=Wire.SUMS))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Shape:
    """The shapes of the parameters, as static data of a state."""

    structure: Any
    leaves: tuple[Any, ...]

    def zeros(self) -> PyTree:
        return jax.tree.unflatten(self.structure, [jnp.zeros(*leaf) for leaf in self.leaves])


def _sent(message: PyTree, codes: PyTree) -> Message:
    return Message(message, compression.nbytes(codes).astype(jnp.float32), compression.entropy(codes))


def _error(update: PyTree, message: PyTree) -> Metrics:
    return {"error": Mean(tree.norm(optax.tree.sub(message, update)) ** 2, tree.norm(update) ** 2)}


def _finite(update: PyTree) -> tuple[Array, PyTree]:
    """Whether the update is finite, and the update itself, or zeros in its place for the compressor."""
    finite = jnp.isfinite(tree.norm(update))
    return finite, optax.tree.where(finite, update, optax.tree.zeros_like(update))


def _or_nan(finite: Array, message: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), message)


def _orthonormal(p: Array) -> Array:
    """Gram and Schmidt's basis of the columns' span; zeros for dependent columns."""
    columns: list[Array] = []
    for i in range(p.shape[1]):
        size = column = p[:, i]
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            for other in columns:
                column = column - other * (other @ column)
        length, before = jnp.linalg.norm(column), jnp.linalg.norm(size)
        columns.append(jnp.where(length > 1e-5 * before, column / jnp.where(length > 0, length, 1), 0))
    return jnp.stack(columns, 1)
