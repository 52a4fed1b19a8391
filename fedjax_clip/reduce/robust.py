"""Robust reducers, which tolerate a bounded number of malicious clients. They ignore weights, since clients may lie."""

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array
from fedjax_clip.reduce import rows
from fedjax_clip.reduce.base import Reducer, looks_at_messages, uniform_mean
from fedjax_clip.reduce.stack import stacking


def median() -> Reducer:
    """The median of each coordinate; for an even number, the mean of the middle two. Zero without clients.

    Guarantee: if fewer than half of the clients are malicious, each coordinate lies between the least and the greatest
    honest value. If clients' data differ, it ignores what only a minority has seen: see ``fc.reduce.bucketing``.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.median())

    Source: Yin et al. (2018), "Byzantine-Robust Distributed Learning", Definition 1.
    """

    return stacking(lambda stack: rows.by_coordinate(stack, rows.middle))


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

    def inner(values, count):
        return rows.mean_of(values, num_bad, count - 2 * num_bad)

    return stacking(lambda stack: rows.by_coordinate(stack, inner), fewest=2 * num_bad + 1)


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
        scores = rows.krum_scores(rows.square_distances(stack.messages), stack.present, num_bad)
        best = jnp.lexsort((scores, ~stack.present))[:num_chosen]  # stable: in a tie the first
        chosen = jnp.zeros(len(stack.ids), jnp.float32).at[best].set(1) * stack.present.astype(jnp.float32)
        return rows.combine(chosen / jnp.maximum(jnp.sum(chosen), 1), stack.messages)

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
        norms = rows.norms(rows.minus(messages, v))
        return rows.combine(rows.of_their_sum(present.astype(norms.dtype) / jnp.maximum(norms, smoothing)), messages)

    return stacking(lambda stack: rows.iterated(stack, iterations, step))


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
        apart = rows.minus(messages, v)
        factors = rows.within(threshold, apart)
        shares = factors * present.astype(factors.dtype) / jnp.maximum(jnp.sum(present), 1).astype(factors.dtype)
        moved = rows.combine(shares, apart)
        return jax.tree.map(jnp.add, v, moved)

    return stacking(lambda stack: rows.iterated(stack, iterations, step))


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
        factors = rows.within(max_norm, messages)
        bounded = jax.tree.map(lambda x: tree.scaled(rows.beside(factors, x), x), messages)
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
        norms = rows.norms(stack.messages)
        is_root = (stack.present & (stack.ids == root)).astype(norms.dtype)
        # Between unit vectors a cosine is an inner product.
        units = jax.tree.map(lambda x: tree.divided(tree.wide(x), rows.beside(tree.or_one(norms), x)), stack.messages)
        direction, length = rows.combine(is_root, units), jnp.sum(is_root * norms)
        along = jax.tree.map(lambda x, v: rows.row_sums(x * v[None]), units, direction)
        cosines = tree.total(jax.tree.leaves(along))
        trust = jnp.maximum(cosines, 0) * (1 - is_root)
        return rows.combine(length * rows.of_their_sum(trust), units)

    return stacking(aggregate, fewest=2)._replace(population=root + 1)
