"""Robust rules that choose the messages to average: searches over subsets, and Bulyan's selection by Krum."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput, PyTree
from fedjax_clip.reduce import rows
from fedjax_clip.reduce.base import Reducer
from fedjax_clip.reduce.stack import Stack, stacking

MOST_SUBSETS = 20_000  # about a second of one core for smea, by eigenvalues of [N, N] matrices


def mda(num_bad: int) -> Reducer:
    """Minimum diameter averaging: the uniform mean of the ``n - f`` messages with the least largest distance.

    Exact, by search over all ``C(n, f)`` subsets, so for small cohorts. In a tie the lower client numbers
    stay. Guarantee, for n > 2 f: the aggregate lies within the diameter of the honest messages from an honest one.

    Args:
      num_bad: f, at least 0; 0 gives the uniform mean.

    Raises:
      InvalidInput: an f that is not a whole number of at least 0; (when a run begins) a cohort of 2 f or fewer, or one
        with more than 20,000 subsets.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.mda(2))

    Source: El Mhamdi et al. (2018), "The Hidden Vulnerability of Distributed Learning in Byzantium", Brute; the name:
    El Mhamdi et al. (2021), "Collaborative Learning in the Jungle", section 4. Rousseeuw (1985) for one dimension.
    """

    def diameter(squares, kept):
        return jnp.max(jnp.where(kept[:, None] & kept[None], squares, 0))

    return _least("mda", num_bad, diameter)


def smea(num_bad: int) -> Reducer:
    """Smallest maximum eigenvalue averaging: the uniform mean of the ``n - f`` messages with the least widest variance.

    The variance is the largest eigenvalue of the subset's covariance, which is that of its ``[n, n]`` centred inner
    products: no matrix of the model's size is needed. Exact, by search over all ``C(n, f)`` subsets, so for small
    cohorts. Guarantee, for n > 2 f: the error is of the best order, ``O(f / n)`` times that variance of the honest.

    Args:
      num_bad: f, at least 0; 0 gives the uniform mean.

    Raises:
      InvalidInput: an f that is not a whole number of at least 0; (when a run begins) a cohort of 2 f or fewer, or one
        with more than 20,000 subsets.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.smea(2))

    Source: Allouah et al. (2023), "On the Privacy-Robustness-Utility Trilemma in Distributed Learning", SMEA.
    """

    def variance(squares, kept):
        return rows.along_widest(squares, rows.of_their_sum(kept.astype(squares.dtype)))[0]

    return _least("smea", num_bad, variance)


def bulyan(num_bad: int) -> Reducer:
    """Chooses ``n - 2 f`` messages by repeated Krum; per coordinate, the mean of the ``n - 4 f`` nearest their median.

    Krum is repeated without the messages that it chose before. Of m messages left, it sums the distances to the
    ``m - f - 2`` nearest, at least to one, and in a tie chooses the lowest client number. Krum alone lets an attacker
    hide a large change of one coordinate in a long vector; the second step bounds each coordinate.
    Guarantee, for n >= 4 f + 3: each coordinate leaves the range of the honest values by at most the range's width.

    Args:
      num_bad: f, at least 0; 0 gives the uniform mean.

    Raises:
      InvalidInput: an f that is not a whole number of at least 0; (when a run begins) a cohort of 4 f + 2 or fewer.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=fc.reduce.bulyan(2))

    Source: El Mhamdi, Guerraoui and Rouault (2018), "The Hidden Vulnerability of Distributed Learning in Byzantium",
    section 4.
    """
    num_bad = checks.count("bulyan: num_bad", num_bad, 0)

    def aggregate(stack):
        squares, wanted = rows.square_distances(stack.messages), stack.num_present - 2 * num_bad

        def choose(chosen):
            left = stack.present & ~chosen
            scores = rows.krum_scores(squares, left, num_bad)
            # Infinite for the last one left, or by an attacker: it still comes before those that were chosen.
            best = jnp.argmin(jnp.where(left, jnp.minimum(scores, jnp.finfo(scores.dtype).max), jnp.inf))
            return chosen.at[best].set(True)

        nobody = jnp.zeros_like(stack.present)
        chosen = jax.lax.while_loop(lambda chosen: tree.count(chosen) < wanted, choose, nobody)

        def near_middle(values, count):
            median, length = rows.middle(values, count), count - 2 * num_bad

            def reach(start):  # the nearest lie side by side, from some start on
                last = rows.at(values, start + length - 1)
                return jnp.maximum(median - values[start], last - median)

            reaches = jnp.stack([reach(start) for start in range(min(2 * num_bad + 1, len(values)))])
            return rows.mean_of(values, jnp.argmin(reaches, axis=0).astype(jnp.int32), length)

        return rows.by_coordinate(stack._replace(weights=chosen.astype(stack.weights.dtype)), near_middle)

    return stacking(aggregate, fewest=4 * num_bad + 3)


def _least(name: str, num_bad: int, spread: Callable[[Array, Array], Array]) -> Reducer:
    """The mean of the ``n - f`` messages whose ``spread(square_distances, kept)`` is least."""
    num_bad = checks.count(f"{name}: num_bad", num_bad, 0)

    def aggregate(stack: Stack) -> PyTree:
        places = len(stack.ids)
        if (subsets := math.comb(places, num_bad)) > MOST_SUBSETS:
            raise InvalidInput(
                f"{name} would search {subsets} subsets, {num_bad} of a cohort with {places} places left out, and does "
                f"at most {MOST_SUBSETS}: take a smaller cohort, or fc.reduce.nnm in front of another reducer."
            )
        left_out = np.array(list(itertools.combinations(range(places), num_bad)), np.int32).reshape(subsets, num_bad)
        left_out = left_out[::-1]  # in a tie the lower numbers stay
        squares = rows.square_distances(stack.messages)

        def keep(out):
            return stack.present & ~jnp.any(jnp.arange(places, dtype=jnp.int32)[None] == out[:, None], axis=0)

        def of(out):
            among = jnp.all(out < stack.num_present)  # present clients come first
            return jnp.where(among, spread(squares, keep(out)), jnp.inf)

        spreads = jax.lax.map(of, left_out, batch_size=min(64, subsets))
        kept = keep(jnp.asarray(left_out)[jnp.argmin(spreads)])
        return rows.combine(rows.of_their_sum(kept.astype(jnp.float32)), stack.messages)

    return stacking(aggregate, fewest=2 * num_bad + 1)
