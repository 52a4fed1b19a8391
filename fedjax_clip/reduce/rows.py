"""What robust rules compute of the messages of a round, the rows of a stack: norms, distances, combinations."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fedjax_clip.core import tree
from fedjax_clip.core.types import Array, PyTree
from fedjax_clip.reduce.stack import Stack


def by_coordinate(stack: Stack, rule: Callable[[list[Array], Array], Array]) -> PyTree:
    """Applies ``rule(values, count)`` to each leaf's values in rising order: ``count`` of them, then infinities."""

    def one(x):
        values = tree.sorted_rows(jnp.where(beside(stack.present, x), tree.wide(x), jnp.inf))
        return jnp.where(stack.num_present > 0, rule(values, stack.num_present), 0)

    return jax.tree.map(one, stack.messages)


def at(values: Sequence[Array], index: Array) -> Array:
    """``values[index]``, whose index may differ by element."""
    return sum((jnp.where(index == i, x, 0) for i, x in enumerate(values)), jnp.zeros_like(values[0]))


def middle(values: Sequence[Array], count: Array) -> Array:
    """The median of the first ``count`` of sorted values."""
    low, high = at(values, jnp.maximum(count - 1, 0) // 2), at(values, count // 2)
    return low + 0.5 * (high - low)


def mean_of(values: Sequence[Array], start: Array | int, length: Array) -> Array:
    """The mean of ``values[start : start + length]``, whose start may differ by element."""
    total = sum(jnp.where((i >= start) & (i < start + length), x, 0) for i, x in enumerate(values))
    return total / jnp.maximum(length, 1).astype(values[0].dtype)


def iterated(stack: Stack, iterations: int, step: Callable[[PyTree, Array, PyTree], PyTree]) -> PyTree:
    """``v <- step(messages, present, v)`` from zero."""
    start = jax.tree.map(lambda x: jnp.zeros_like(tree.wide(x[0])), stack.messages)
    present = stack.present.astype(jnp.float32)
    return jax.lax.fori_loop(0, iterations, lambda _, v: step(stack.messages, present, v), start)


def square_distances(messages: PyTree) -> Array:
    """``[N, N]`` squared distances, from differences: products of messages would lose small distances."""

    def from_row(row):
        return jnp.square(norms(minus(messages, jax.tree.map(lambda x: x[row], messages))))

    return jax.lax.map(from_row, jnp.arange(len(jax.tree.leaves(messages)[0]), dtype=jnp.int32))


def krum_scores(squares: Array, present: Array, num_bad: int) -> Array:
    """``[N]`` sums of each row's ``n - f - 2`` least squared distances to other present rows, at least of one."""
    both = present[:, None] & present[None] & ~jnp.eye(len(present), dtype=bool)
    nearest = jnp.arange(len(present), dtype=jnp.int32) < jnp.maximum(tree.count(present) - num_bad - 2, 1)
    return jnp.sum(jnp.where(nearest[None], jnp.sort(jnp.where(both, squares, jnp.inf), axis=1), 0), axis=1)


def centred_products(squares: Array, shares: Array) -> Array:
    """``[N, N]`` inner products of ``x_i - mu``, ``mu = sum_i shares_i x_i``, from squared distances.

    Source: Torgerson (1952), "Multidimensional Scaling", double centring, with weights.
    """
    to_mean = tree.weighted_sum(shares, squares)
    return 0.5 * (to_mean[:, None] + to_mean[None] - squares - tree.weighted_sum(shares, to_mean))


def along_widest(squares: Array, shares: Array) -> tuple[Array, Array]:
    """The largest eigenvalue of the covariance of rows with these shares, and ``[N]`` squares along its eigenvector.

    The covariance ``A^T A`` of all coordinates, with rows ``A_i = sqrt(shares_i) (x_i - mu)``, has the eigenvalues of
    ``A A^T``, which needs the rows' distances only.

    Args:
      squares: ``[N, N]`` squared distances of the rows ``x_i``.
      shares: ``[N]``, which add up to 1, or zeros.
    """
    # Far above any honest one, and its sums stay finite: an attacker's may be infinite.
    products, roots = centred_products(jnp.minimum(squares, 1e36), shares), jnp.sqrt(shares)
    values, vectors = jnp.linalg.eigh(roots[:, None] * products * roots[None])
    most = jnp.maximum(values[-1], 0)
    along = tree.weighted_sum(roots * vectors[:, -1], products)  # products are symmetric
    return most, jnp.square(along / jnp.sqrt(tree.or_one(most)))


def products(messages: PyTree) -> Array:
    """``[N, N]`` inner products of the rows."""

    def of_leaf(x):
        x = tree.wide(x).reshape(len(x), -1)
        return jnp.matmul(x, x.T, precision="highest")

    return tree.total([of_leaf(x) for x in jax.tree.leaves(messages)])


def cosines(messages: PyTree) -> Array:
    """``[N, N]`` cosines of the rows' angles; 0 from and to a row of zeros."""
    lengths = tree.or_one(norms(messages))
    return products(jax.tree.map(lambda x: tree.divided(tree.wide(x), beside(lengths, x)), messages))


def norms(messages: PyTree) -> Array:
    """``[N]`` Euclidean norms of the rows."""
    return tree.safe_sqrt(tree.total([row_sums(jnp.square(tree.wide(x))) for x in jax.tree.leaves(messages)]))


def within(max_norm: float | Array, messages: PyTree) -> Array:
    """``[N]`` factors that bring the rows' norms to at most ``max_norm``."""
    lengths = norms(messages)
    return jnp.where(lengths <= max_norm, 1, max_norm / tree.or_one(lengths))


def of_their_sum(shares: Array) -> Array:
    """``[N]`` shares that add up to 1, or zeros."""
    return shares / tree.or_one(jnp.sum(shares))


def combine(shares: Array, messages: PyTree) -> PyTree:
    """``sum_i shares_i messages_i``."""
    return jax.tree.map(lambda x: tree.weighted_sum(shares, tree.wide(x)), messages)


def minus(messages: PyTree, v: PyTree) -> PyTree:
    """``m_i - v`` of every row."""
    return jax.tree.map(lambda x, y: tree.wide(x) - y[None], messages, v)


def row_sums(x: Array) -> Array:
    """``[N]`` sums over all axes but the first, vectorised on a CPU: see ``tree.reduced``."""
    x = x.reshape(len(x), -1, x.shape[-1] if x.ndim > 1 else 1)
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(x, axis=1)), axis=1)


def beside(values: Array, x: Array) -> Array:
    """``[N]`` values that broadcast against ``x [N, ...]``."""
    return values.reshape(len(values), *[1] * (x.ndim - 1))
