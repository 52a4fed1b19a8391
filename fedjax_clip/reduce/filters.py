"""Robust rules that leave out, or weigh less, what stands apart: along the widest direction, or by its angle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, PyTree
from fedjax_clip.reduce import rows
from fedjax_clip.reduce.base import Reducer
from fedjax_clip.reduce.stack import stacking


def caf(num_bad: int) -> Reducer:
    """The covariance-bound-agnostic filter: weighs messages down by how far they lie along the widest direction.

    While ``sum_i c_i > n - 2 f``, from ``c_i = 1``: mu and v, the mean and the top eigenvector of the covariance, both
    weighted by c; then ``c_i <- c_i (1 - t_i / max_j t_j)`` with ``t_i = (v . (m_i - mu))^2``, and the maximum over
    ``c_j > 0``. The aggregate is the mu of the least top eigenvalue. Eigenvectors come from ``[n, n]`` inner products,
    exactly, in place of a power iteration. Guarantee, for n > 2 f: an error of the order ``f / n`` times the honest
    messages' largest variance, which need not be known.

    Args:
      num_bad: f, at least 0; 0 gives the uniform mean.

    Raises:
      InvalidInput: an f that is not a whole number of at least 0; (when a run begins) a cohort of 2 f or fewer.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.caf(2))

    Source: Allouah et al. (2025), "Towards Trustworthy Federated Learning with Untrusted Participants", Algorithm 2.
    """
    num_bad = checks.count("caf: num_bad", num_bad, 0)

    def aggregate(stack):
        squares = rows.square_distances(stack.messages)
        everyone = stack.present.astype(squares.dtype)
        enough = (stack.num_present - 2 * num_bad).astype(squares.dtype)

        def lighter(state):
            weights, least, best = state
            variance, along = rows.along_widest(squares, shares := rows.of_their_sum(weights))
            most = jnp.max(jnp.where(weights > 0, along, 0))
            left = jnp.where(along < most, weights * (1 - along / tree.or_one(most)), 0)
            least, best = jax.tree.map(
                lambda new, old: jnp.where(variance < least, new, old), (variance, shares), (least, best)
            )
            return jnp.where(most > 0, left, 0), least, best  # if all are equal, nothing is left to filter

        start = everyone, jnp.full((), jnp.inf, squares.dtype), rows.of_their_sum(everyone)
        _, _, best = jax.lax.while_loop(lambda state: jnp.sum(state[0]) > jnp.maximum(enough, 0), lighter, start)
        return rows.combine(best, stack.messages)

    return stacking(aggregate, fewest=2 * num_bad + 1)


def dnc(num_bad: int, iterations: int = 1, coordinates: int = 10_000, fraction: float = 1.0) -> Reducer:
    """Divide and conquer: leaves out the ``fraction f`` messages that lie furthest along the widest direction.

    It looks at random coordinates of the messages, ``iterations`` times, and takes the uniform mean of those messages
    that it left out in no iteration: zero if there are none. The number left out is rounded down. The round's key
    chooses the coordinates, the same on all devices. No guarantee without a model of the honest messages: a spectral
    filter misses what hides in directions of large honest variance.

    Args:
      num_bad: f, at least 0; 0 gives the uniform mean.
      iterations: at least 1.
      coordinates: b, of the whole message, without repetition; all, if there are fewer.
      fraction: c, positive.

    Raises:
      InvalidInput: an argument out of range; (when a run begins) a cohort of ``c f`` or fewer, or of 2 f.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.dnc(2, iterations=3))

    Source: Shejwalkar and Houmansadr (2021), "Manipulating the Byzantine", Algorithm 2.
    """
    num_bad = checks.count("dnc: num_bad", num_bad, 0)
    iterations, coordinates = checks.count("dnc: iterations", iterations), checks.count("dnc: coordinates", coordinates)
    checks.positive("dnc: fraction", fraction)
    left_out = int(fraction * num_bad + 1e-9)  # 0.7 * 10 is 7

    def aggregate(stack):
        flat = _flattened(stack.messages)
        everyone = rows.of_their_sum(stack.present.astype(flat.dtype))

        def look(number, good):
            part = flat
            if coordinates < flat.shape[1]:
                key = jax.random.fold_in(stack.key, number)
                part = flat[:, jax.random.choice(key, flat.shape[1], (coordinates,), replace=False)]
            along = rows.along_widest(rows.square_distances(part), everyone)[1]
            order = jnp.argsort(jnp.where(stack.present, along, jnp.inf))  # stable: in a tie the first stays
            ranks = jnp.argsort(order).astype(jnp.int32)
            return good & (ranks < stack.num_present - left_out)

        good = jax.lax.fori_loop(np.int32(0), np.int32(iterations), look, stack.present)
        return _mean(stack.messages, good)

    return stacking(aggregate, fewest=max(2 * num_bad, left_out) + 1)


def flame(noise: float | Array = 0.0) -> Reducer:
    """Leaves out all but the densest majority by angle, clips the rest to the median norm, averages, adds noise.

    The majority is the first cluster of more than n / 2 messages that grows as cosine distances are joined from the
    smallest on. HDBSCAN as in the paper, with a least cluster of n / 2 + 1, one sample and one cluster allowed, selects
    the same, but for ties. The norm is the median of all norms, of those left out, too. The aggregate gets noise
    ``N(0, (noise S)^2)`` in each coordinate, S being that norm; the round's key draws it, so it is NOT private.

    Differs from the paper: cosines are of the messages, its are of the clients' models; the threshold for differential
    privacy is not computed. Guarantee: norm at most S, which is at most an honest norm, for f < n / 2.

    Args:
      noise: lambda, at least 0; may be traced. The paper takes 0.001 for images.

    Raises:
      InvalidInput: a negative noise; (when a run begins) a cohort of one.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.flame())

    Source: Nguyen et al. (2022), "FLAME: Taming Backdoors in Federated Learning", Algorithm 1.
    """
    checks.within("flame: noise", noise, 0, finite=True)

    def aggregate(stack):
        norms = rows.norms(stack.messages)
        units = jax.tree.map(lambda x: tree.divided(tree.wide(x), rows.beside(tree.or_one(norms), x)), stack.messages)
        # Half the squared distance of unit vectors is 1 - cosine, which is 1 beside a message of zeros.
        angles = jnp.where((norms[:, None] > 0) & (norms[None] > 0), rows.square_distances(units) / 2, 1)
        kept = _densest_majority(jnp.where(jnp.eye(len(norms), dtype=bool), 0, angles), stack.present)
        present = stack._replace(messages=norms)
        bound = rows.by_coordinate(present, rows.middle)
        factors = rows.within(bound, stack.messages)
        mean = rows.combine(rows.of_their_sum(kept.astype(norms.dtype)) * factors, stack.messages)
        if isinstance(noise, (int, float)) and noise == 0:
            return mean
        draws = optax.tree.random_like(stack.key, mean, sampler=jax.random.normal)
        return tree.add_scaled(mean, noise * bound, draws)

    return stacking(aggregate, fewest=2)


def _densest_majority(distances: Array, present: Array) -> Array:
    """bool ``[N]``: the first component of more than half of the present rows, as ever longer edges are added.

    ``reach[i, j]`` is the least longest edge of a path from i to j (Floyd and Warshall's recursion, for the maximum).
    """
    both = present[:, None] & present[None]
    start = jnp.where(both, distances, jnp.inf)

    def by_way_of(k, reach):
        return jnp.minimum(reach, jnp.maximum(reach[:, k][:, None], reach[k][None]))

    reach = jax.lax.fori_loop(np.int32(0), np.int32(len(present)), by_way_of, start)
    needed = jnp.sort(reach, axis=1)[:, tree.count(present) // 2]  # to meet half of the others: itself is at 0
    densest = jnp.argmin(needed)
    return present & (reach[densest] <= needed[densest])


def _mean(messages: PyTree, kept: Array) -> PyTree:
    return rows.combine(rows.of_their_sum(kept.astype(jnp.float32)), messages)


def _flattened(messages: PyTree) -> Array:
    """``[N, d]`` in the leaves' common type."""
    leaves = [tree.wide(x) for x in jax.tree.leaves(messages)]
    dtype = tree.common_type(*leaves)
    return jnp.concatenate([x.reshape(len(x), -1).astype(dtype) for x in leaves], axis=1)
