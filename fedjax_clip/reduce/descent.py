"""FedMGDA+: the shortest combination of the clients' directions, along which no client's loss grows."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array
from fedjax_clip.reduce import rows
from fedjax_clip.reduce.base import Reducer
from fedjax_clip.reduce.stack import stacking

PASSES = 200  # of exact steps over as many pairs as there are clients
TOLERANCE = 1e-6  # of the largest squared norm, at which no pair of weights is worth a step


def min_norm(epsilon: float | Array, normalise: bool = True) -> Reducer:
    """``sum_i l_i g_i`` of least norm, with ``l`` in the simplex and ``|l_i - p_i| <= epsilon``.

    ``g_i = m_i / |m_i|``, or ``m_i`` itself; p are the clients' weights, which add up to 1. With epsilon = 1 the
    aggregate d has ``<d, g_i> >= |d|^2`` for every client: to first order, a step along d makes nobody's loss grow.
    With epsilon = 0 it is the weighted mean of the ``g_i``. A message of zeros stays so, and its client wins: d is zero
    if epsilon allows it all the weight. Guarantee: ``|d| <= max_i |g_i|``, which is 1 for normalised messages; the
    server's learning rate is then the length of a step, and a schedule should let it fall. No defence: a client that
    sends the opposite of another's message holds everybody.

    The weights are found by exact steps on the pair whose slopes differ most (sequential minimal optimisation), until
    no two slopes differ by more than ``1e-6`` of the largest ``|g_i|^2``.

    Args:
      epsilon: how far a weight may be from its client's share, in [0, 1]; may be traced.
      normalise: whether all messages count with norm 1 (FedMGDA+), or as they are (FedMGDA).

    Raises:
      InvalidInput: an epsilon out of range.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), optax.sgd(0.5), reducer=fc.reduce.min_norm(0.1))

    Source: Hu, Shaloudegi, Zhang and Yu (2022), "Federated Learning Meets Multi-objective Optimization", Algorithm 1.
    Keerthi, Shevade, Bhattacharyya and Murthy (2001), "Improvements to Platt's SMO Algorithm", for the choice of pairs.
    """
    checks.within("min_norm: epsilon", epsilon, 0, 1)

    def aggregate(stack):
        messages = jax.tree.map(tree.wide, stack.messages)
        if normalise:
            lengths = tree.or_one(rows.norms(messages))
            messages = jax.tree.map(lambda x: tree.divided(x, rows.beside(lengths, x)), messages)
        products = rows.products(messages)
        shares = rows.of_their_sum(stack.weights).astype(products.dtype)
        low = jnp.maximum(shares - epsilon, 0)
        high = jnp.where(stack.present, jnp.minimum(shares + epsilon, 1), 0)
        return rows.combine(_shortest(products, shares, low, high), messages)

    return stacking(aggregate)._replace(weighted=True)


def _shortest(products: Array, start: Array, low: Array, high: Array) -> Array:
    """``[N]`` weights between ``low`` and ``high`` with the sum of ``start`` that minimise ``l^T products l``."""
    enough = TOLERANCE * jnp.max(jnp.diagonal(products))

    def slopes(weights):
        return jnp.matmul(products, weights, precision="highest")

    def pair(weights, slope):
        """The weight to raise, that to lower, and what their slopes differ by."""
        up = jnp.argmin(jnp.where(weights < high, slope, jnp.inf))
        down = jnp.argmax(jnp.where(weights > low, slope, -jnp.inf))
        gap = jnp.where(jnp.any(weights < high) & jnp.any(weights > low), slope[down] - slope[up], 0)
        return up, down, gap

    def step(state):
        weights, number, _ = state
        up, down, gap = pair(weights, slopes(weights))
        curvature = products[up, up] + products[down, down] - 2 * products[up, down]
        room = jnp.minimum(high[up] - weights[up], weights[down] - low[down])
        by = jnp.where(curvature > 0, jnp.minimum(gap / tree.or_one(curvature), room), room)
        weights = weights.at[up].add(by).at[down].add(-by)
        return weights, number + np.int32(1), pair(weights, slopes(weights))[2]

    most = np.int32(PASSES * len(start))
    first = start, jnp.zeros((), jnp.int32), pair(start, slopes(start))[2]
    weights, _, _ = jax.lax.while_loop(lambda state: (state[2] > enough) & (state[1] < most), step, first)
    return weights
