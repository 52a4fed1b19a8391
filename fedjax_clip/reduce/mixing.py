"""Rules that change the messages of a round before any reducer meets them: adaptive clipping and mixing."""

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.reduce import rows
from fedjax_clip.reduce.base import Reducer
from fedjax_clip.reduce.stack import Stack, restacked


def arc(num_bad: int, reducer: Reducer) -> Reducer:
    """Adaptive robust clipping: clips the ``k = floor(2 f (n - f) / n)`` longest messages to the next norm.

    The threshold is the (k + 1)-th largest norm of the round, so no scale has to be tuned, and none can be tuned wrong.
    Guarantee, for n > 2 f: with at most f malicious clients, the threshold is at most the largest honest norm. It keeps
    the resilience of ``reducer``, up to a constant. Alone, in front of a mean, it only bounds what one client does.

    Args:
      num_bad: f, at least 0; 0 gives ``reducer`` itself.
      reducer: for the clipped messages.

    Raises:
      InvalidInput: an f that is not a whole number of at least 0; (when a run begins) a cohort of 2 f or fewer.

    Example:
      >>> reducer = fc.reduce.arc(2, fc.reduce.nnm(2, fc.reduce.trimmed_mean(2)))
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=reducer)

    Source: Allouah et al. (2025), "Adaptive Gradient Clipping for Robust Federated Learning", Algorithm 2.
    """
    num_bad = checks.count("arc: num_bad", num_bad, 0)
    checks.kind("arc: reducer", reducer, Reducer, "an fc.reduce.Reducer, such as fc.reduce.median()")
    if num_bad == 0:
        return reducer

    def clip(stack: Stack) -> Stack:
        n = jnp.maximum(stack.num_present, 1)
        clipped = 2 * num_bad * jnp.maximum(n - num_bad, 0) // n
        norms = jnp.sort(rows.norms(stack.messages), descending=True)  # absent clients are zeros, and so come last
        factors = rows.within(norms[jnp.minimum(clipped, len(norms) - 1)], stack.messages)
        messages = jax.tree.map(lambda x: tree.scaled(rows.beside(factors, x), x), stack.messages)
        return stack._replace(messages=messages)

    return restacked(clip, reducer, max(reducer.fewest, 2 * num_bad + 1))


def nnm(num_bad: int, reducer: Reducer) -> Reducer:
    """Nearest-neighbour mixing: each message becomes the mean of its ``n - f`` nearest, itself among them.

    Where clients' data differ, honest messages lie far apart, and a robust rule pays for that. Mixing brings them
    together by a factor that only f / n decides. All ``n`` mixed messages count equally. In a tie the client with the
    lower number is nearer. Computes all ``n (n - 1)`` distances. Guarantee, for n > 2 f: with trimmed mean, median,
    geometric median or Krum the error is of the best order, ``O(f / n)`` times the honest messages' variance.

    Args:
      num_bad: f, at least 0; with 0 every message becomes the uniform mean.
      reducer: for the mixed messages.

    Raises:
      InvalidInput: an f that is not a whole number of at least 0; (when a run begins) a cohort of 2 f or fewer.

    Example:
      >>> reducer = fc.reduce.nnm(2, fc.reduce.median())
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), reducer=reducer)

    Source: Allouah et al. (2023), "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity",
    Algorithm 2.
    """
    num_bad = checks.count("nnm: num_bad", num_bad, 0)
    checks.kind("nnm: reducer", reducer, Reducer, "an fc.reduce.Reducer, such as fc.reduce.median()")

    def mix(stack: Stack) -> Stack:
        both = stack.present[:, None] & stack.present[None]
        squares = jnp.where(both, rows.square_distances(stack.messages), jnp.inf)
        ranks = jnp.argsort(jnp.argsort(squares, axis=1), axis=1).astype(jnp.int32)  # stable: in a tie the first
        near = (both & (ranks < stack.num_present - num_bad)).astype(jnp.float32)
        shares = near / tree.or_one(jnp.sum(near, axis=1, keepdims=True))
        return stack._replace(
            messages=rows.combine(shares, stack.messages), weights=stack.present.astype(stack.weights.dtype)
        )

    return restacked(mix, reducer, max(reducer.fewest, 2 * num_bad + 1))._replace(weighted=False)
