"""Robust reducers, which tolerate a bounded number of malicious clients. They ignore weights, since clients may lie."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, PyTree
from fedjax_clip.reduce.base import Reducer, looks_at_messages, uniform_mean
from fedjax_clip.reduce.stack import Stack, stacking


def median() -> Reducer:
    """The median of each coordinate; for an even number, the mean of the middle two. Zero without clients.

    Guarantee: if fewer than half of the clients are malicious, each coordinate lies between the least and the greatest
    honest value. If clients' data differ, it ignores what only a minority has seen: see ``fc.reduce.bucketing``.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.median())

    Source: Yin et al. (2018), "Byzantine-Robust Distributed Learning", Definition 1.
    """

    def middle(rows, count):
        def row(index):
            return sum(jnp.where(index == i, x, 0) for i, x in enumerate(rows))

        low, high = row(jnp.maximum(count - 1, 0) // 2), row(count // 2)
        return low + 0.5 * (high - low)

    return stacking(lambda stack: _by_coordinate(stack, middle))


def trimmed_mean(num_bad: int) -> Reducer:
    """The mean of each coordinate without its ``num_bad`` least and greatest values; zero without clients.

    Guarantee: with at most ``num_bad`` malicious clients each coordinate lies between the least and the greatest honest
    value. With 2 f clients or fewer no value is left, and the mean is zero.

    Args:
      num_bad: f, at least 0; 0 gives ``uniform_mean``.

    Raises:
      InvalidInput: an f that is not a whole number of at least 0; (when a run begins) a cohort of 2 f or fewer.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.trimmed_mean(2))

    Source: Yin et al. (2018), Definition 2, with f for beta n.
    """
    num_bad = checks.count("trimmed_mean: num_bad", num_bad, 0)
    if num_bad == 0:
        return uniform_mean()

    def inner(rows, count):
        total = sum(jnp.where((i >= num_bad) & (i < count - num_bad), x, 0) for i, x in enumerate(rows))
        return total / jnp.maximum(count - 2 * num_bad, 1).astype(rows[0].dtype)

    return stacking(lambda stack: _by_coordinate(stack, inner), fewest=2 * num_bad + 1)


def krum(num_bad: int, num_chosen: int = 1) -> Reducer:
    """The message that lies nearest to its ``n - f - 2`` nearest neighbours, by squared distance.

    With ``num_chosen`` m > 1 it is Multi-Krum: the uniform mean of the m nearest. In a tie the client with the lower
    number is chosen. Guarantee, for n > 2 f + 2: the chosen message lies within ``sqrt(n - f - 2)`` times the diameter
    of the honest messages from an honest one. With fewer clients the result is zero. Computes all ``n (n - 1)``
    distances.

    Args:
      num_bad: f, at least 0.
      num_chosen: m, at least 1; all clients, if fewer arrived.

    Raises:
      InvalidInput: an f or m that is no such number; (when a run begins) a cohort of 2 f + 2 or fewer.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.krum(2))

    Source: Blanchard et al. (2017), "Machine Learning with Adversaries", section 4.
    """
    num_bad = checks.count("krum: num_bad", num_bad, 0)
    num_chosen = checks.count("krum: num_chosen", num_chosen)

    def aggregate(stack):
        both = stack.present[:, None] & stack.present[None] & ~jnp.eye(len(stack.ids), dtype=bool)
        squares = jnp.where(both, _square_distances(stack.messages), jnp.inf)
        nearest = jnp.arange(len(stack.ids), dtype=jnp.int32) < stack.num_present - num_bad - 2
        scores = jnp.sum(jnp.where(nearest[None], jnp.sort(squares, axis=1), 0), axis=1)
        best = jnp.lexsort((scores, ~stack.present))[:num_chosen]  # stable: in a tie the first
        chosen = jnp.zeros(len(stack.ids), jnp.float32).at[best].set(1) * stack.present.astype(jnp.float32)
        return _combine(chosen / jnp.maximum(jnp.sum(chosen), 1), stack.messages)

    return stacking(aggregate, fewest=2 * num_bad + 3)


def geometric_median(iterations: int = 8, smoothing: float | Array = 1e-6) -> Reducer:
    """The point with the least sum of distances to all messages (RFA), by smoothed Weiszfeld steps from zero.

    ``v <- sum_i b_i m_i / sum_i b_i`` with ``b_i = 1 / max(smoothing, ||m_i - v||)``. Guarantee: if fewer than half of
    the clients are malicious, the norm of the exact point is at most ``2 (n - f) / (n - 2 f)`` times the largest norm
    of an honest message, whatever the malicious ones send. Zero without clients.

    Args:
      iterations: at least 1.
      smoothing: nu, positive, in the units of the messages; may be traced. If it is larger than all distances, the
        result is the uniform mean.

    Raises:
      InvalidInput: iterations or smoothing out of range.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.geometric_median())

    Source: Pillutla, Kakade and Harchaoui (2022), "Robust Aggregation for Federated Learning", Algorithm 2, unweighted;
    Karimireddy, He and Jaggi (2022), for the start at zero.
    """
    iterations = checks.count("geometric_median: iterations", iterations)
    checks.positive("geometric_median: smoothing", smoothing)

    def step(messages, present, v):
        norms = _norms(_minus(messages, v))
        return _combine(_of_their_sum(present.astype(norms.dtype) / jnp.maximum(norms, smoothing)), messages)

    return stacking(lambda stack: _iterated(stack, iterations, step))


def centered_mean(threshold: float | Array, iterations: int = 3) -> Reducer:
    """Centered clipping: ``v <- v + mean_i clip(m_i - v)``, ``iterations`` times from ``v = 0``, unweighted.

    Behind ``fc.uplink.relative_to_last()`` it starts from the last aggregate, as the paper has it: messages are then
    differences to it. Guarantee: ``||v|| <= threshold * iterations``, whatever a client sends. With one iteration it is
    the uniform mean of clipped messages; with a threshold that never binds it is the uniform mean.

    Args:
      threshold: tau, of the Euclidean norm of ``m_i - v``; positive, may be traced.
      iterations: at least 1.

    Raises:
      InvalidInput: a threshold that is not positive, iterations that are not a whole number of at least 1.

    Example:
      >>> uplink, reducer = fc.uplink.relative_to_last(), fc.reduce.centered_mean(10.0, iterations=3)
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, uplink=uplink, reducer=reducer)

    Source: Karimireddy, He and Jaggi (2021), "Learning from History for Byzantine Robust Optimization", Algorithm 1.
    """
    checks.positive("centered_mean: threshold", threshold)
    iterations = checks.count("centered_mean: iterations", iterations)

    def step(messages, present, v):
        apart = _minus(messages, v)
        factors = _within(threshold, apart)
        shares = factors * present.astype(factors.dtype) / jnp.maximum(jnp.sum(present), 1).astype(factors.dtype)
        moved = _combine(shares, apart)
        return jax.tree.map(jnp.add, v, moved)

    return stacking(lambda stack: _iterated(stack, iterations, step))


def norm_bounded(max_norm: float | Array, reducer: Reducer | None = None) -> Reducer:
    """The server scales every message to Euclidean norm at most ``max_norm`` before it reduces them.

    A clip of the uplink runs at the client, and a malicious client skips it. Guarantee, with a mean of n: one client
    moves the aggregate by at most ``max_norm / n``. Stores no messages unless ``reducer`` does.

    Args:
      max_norm: positive, in the units of the messages; may be traced.
      reducer: for the bounded messages; ``uniform_mean()`` by default.

    Raises:
      InvalidInput: a bound that is not positive.

    Example:
      >>> reducer = fc.reduce.norm_bounded(1.0, fc.reduce.trimmed_mean(2))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, reducer=reducer)

    Source: Sun et al. (2019), "Can You Really Backdoor Federated Learning?", norm thresholding.
    """
    checks.positive("norm_bounded: max_norm", max_norm)
    reducer = uniform_mean() if reducer is None else reducer
    checks.kind("reducer", reducer, Reducer, "an fc.reduce.Reducer, such as fc.reduce.uniform_mean()")
    looks_at_messages("norm_bounded", reducer)

    def add(acc, messages, weights):
        factors = _within(max_norm, messages)
        bounded = jax.tree.map(lambda x: tree.scaled(_beside(factors, x), x), messages)
        return reducer.add(acc, bounded, weights)

    # A message's factor depends on the message, so masks do not commute with the sum.
    return reducer._replace(add=add, linear=False)


def fltrust(root: int) -> Reducer:
    """Weighs each message by its cosine with a trusted client's message, and scales it to the norm of that message.

    ``sum_i t_i (||m_0|| / ||m_i||) m_i / sum_i t_i`` with ``t_i = max(0, cos(m_i, m_0))`` over all i but the root 0.
    The root is a client of the population that the server runs itself, on a small clean data set. It trains as all
    clients do, but its message serves as the reference only. Guarantee: norm at most ``||m_0||``, and an angle to
    ``m_0`` below 90 degrees, whatever the others send. The result is zero in a round without the root, or if no cosine
    is positive: let the root take part in every round.

    Args:
      root: the number of the server's client.

    Raises:
      InvalidInput: a root that is not a client's number; (when a run begins) a cohort of one.

    Example:
      >>> reducer = fc.reduce.fltrust(root=data.num_clients - 1)
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, reducer=reducer)

    Source: Cao et al. (2021), "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", Algorithm 2.
    """
    root = checks.client_number("fltrust: root", root)

    def aggregate(stack):
        norms = _norms(stack.messages)
        is_root = (stack.present & (stack.ids == root)).astype(norms.dtype)
        # Between unit vectors a cosine is an inner product.
        units = jax.tree.map(lambda x: tree.divided(tree.wide(x), _beside(tree.or_one(norms), x)), stack.messages)
        direction, length = _combine(is_root, units), jnp.sum(is_root * norms)
        along = jax.tree.map(lambda x, v: _row_sums(x * v[None]), units, direction)
        cosines = tree.total(jax.tree.leaves(along))
        trust = jnp.maximum(cosines, 0) * (1 - is_root)
        return _combine(length * _of_their_sum(trust), units)

    return stacking(aggregate, fewest=2)._replace(population=root + 1)


def _by_coordinate(stack: Stack, rule: Callable[[list[Array], Array], Array]) -> PyTree:
    """Applies ``rule(rows, count)`` to each leaf's values in rising order: ``count`` of them, then infinities."""

    def one(x):
        rows = tree.sorted_rows(jnp.where(_beside(stack.present, x), tree.wide(x), jnp.inf))
        return jnp.where(stack.num_present > 0, rule(rows, stack.num_present), 0)

    return jax.tree.map(one, stack.messages)


def _iterated(stack: Stack, iterations: int, step: Callable[[PyTree, Array, PyTree], PyTree]) -> PyTree:
    """``v <- step(messages, present, v)`` from zero."""
    start = jax.tree.map(lambda x: jnp.zeros_like(tree.wide(x[0])), stack.messages)
    present = stack.present.astype(jnp.float32)
    return jax.lax.fori_loop(0, iterations, lambda _, v: step(stack.messages, present, v), start)


def _square_distances(messages: PyTree) -> Array:
    """``[N, N]`` squared distances, from differences: products of messages would lose small distances."""

    def from_row(row):
        return jnp.square(_norms(_minus(messages, jax.tree.map(lambda x: x[row], messages))))

    return jax.lax.map(from_row, jnp.arange(len(jax.tree.leaves(messages)[0]), dtype=jnp.int32))


def _norms(messages: PyTree) -> Array:
    """``[N]`` Euclidean norms of the rows."""
    return tree.safe_sqrt(tree.total([_row_sums(jnp.square(tree.wide(x))) for x in jax.tree.leaves(messages)]))


def _within(max_norm: float | Array, messages: PyTree) -> Array:
    """``[N]`` factors that bring the rows' norms to at most ``max_norm``."""
    norms = _norms(messages)
    return jnp.where(norms <= max_norm, 1, max_norm / tree.or_one(norms))


def _of_their_sum(shares: Array) -> Array:
    """``[N]`` shares that add up to 1, or zeros."""
    return shares / tree.or_one(jnp.sum(shares))


def _combine(shares: Array, messages: PyTree) -> PyTree:
    """``sum_i shares_i messages_i``."""
    return jax.tree.map(lambda x: tree.weighted_sum(shares, tree.wide(x)), messages)


def _minus(messages: PyTree, v: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: tree.wide(x) - y[None], messages, v)


def _row_sums(x: Array) -> Array:
    """``[N]`` sums over all axes but the first, vectorised on a CPU: see ``tree.reduced``."""
    x = x.reshape(len(x), -1, x.shape[-1] if x.ndim > 1 else 1)
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(x, axis=1)), axis=1)


def _beside(values: Array, x: Array) -> Array:
    """``[N]`` values that broadcast against ``x [N, ...]``."""
    return values.reshape(len(values), *[1] * (x.ndim - 1))
