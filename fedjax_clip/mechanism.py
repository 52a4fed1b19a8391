"""How the server's noise of a round depends on that of the rounds before it: DP-FTRL."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip import checks
from fedjax_clip.typing import InvalidInput, Params, PyTree


class Mechanism(NamedTuple):
    """Noise ``C^-1 Z`` over the rounds, Z independent: what is private is ``C x + Z``, x the rounds' sums.

    Noise that is taken back in later rounds leaves the sum over rounds, which is where the model stands, more exact
    than independent noise of the same privacy. Any ``StreamingMatrix`` m of jax-privacy for ``C^-1`` makes one:
    ``Mechanism(m.init_multiply, m.multiply_next, strategy)``.

    Attributes:
      init: ``params -> state`` before round 0.
      next: ``(row of Z, state) -> (row of C^-1 Z, state)``, rows like params.
      strategy: ``rounds -> C [rounds, rounds]``, lower triangular; ``fc.privacy`` reads it.
      whole: whether ``next`` takes rows of int32, too, and then is exact: C has whole numbers, ones on its diagonal.

    Example:
      >>> noise = fc.uplink.gaussian(1.0, mechanism=fc.mechanism.tree(64))

    Source: Choquette-Choo et al. (2023), "Multi-Epoch Matrix Factorization Mechanisms for Private Machine Learning".
    """

    init: Callable[[Params], PyTree]
    next: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    strategy: Callable[[int], Any]
    whole: bool = False


def tree(rounds: int) -> Mechanism:
    """Tree aggregation: the noise of a sum over t rounds is one draw for each binary digit 1 of t.

    Node t of the tree covers the rounds ``(t - lowbit(t), t]``, which are row t of C; a single client of a single
    round is in at most ``floor(log2 rounds) + 1`` nodes. After ``rounds`` rounds a new tree begins (DP-FTRL with
    restarts), best at a power of two, when one node covers all. The state is as many models as a path has nodes.

    Args:
      rounds: of one tree, such as those of an epoch over the clients.

    Raises:
      InvalidInput: no whole number of at least 1.

    Example:
      >>> fc.mechanism.tree(4).strategy(4)  # [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]

    Source: Kairouz et al. (2021), "Practical and Private (Deep) Learning without Sampling or Shuffling", Algorithm 1
    and appendix D, without Honaker's estimator; Fenwick (1994) for the nodes.
    """
    checks.count("tree: rounds", rounds)
    depth = int(rounds).bit_length()

    def init(params):
        return jnp.zeros((), jnp.int32), jax.tree.map(lambda x: jnp.zeros((depth, *x.shape), x.dtype), params)

    def step(noise, state):
        done, nodes = state
        count = done + 1
        level = jax.lax.population_count((count & -count) - 1)  # trailing zeros: these smaller nodes become one

        def shaped(mask, x):
            return mask.reshape(-1, *(1,) * (x.ndim - 1))

        levels = jnp.arange(depth, dtype=jnp.int32)
        below = jax.tree.map(lambda x: jnp.sum(jnp.where(shaped(levels < level, x), x, 0), 0, x.dtype), nodes)
        kept = (levels > level) & (count < rounds)
        fresh = (levels == level) & (count < rounds)
        nodes = jax.tree.map(
            lambda x, z: jnp.where(shaped(kept, x), x, 0) + jnp.where(shaped(fresh, x), z[None], 0).astype(x.dtype),
            nodes,
            noise,
        )
        return jax.tree.map(jnp.subtract, noise, below), (count % rounds, nodes)

    def strategy(total):
        index = np.arange(total)
        count = index % rounds + 1
        return (index <= index[:, None]) & (index > (index - (count & -count))[:, None])

    return Mechanism(init, step, strategy, whole=True)


def toeplitz(coefficients: Sequence[float] | np.ndarray) -> Mechanism:
    """Banded matrix factorisation by given coefficients: ``C[s, t] = coefficients[s - t]``.

    Where no client takes part twice within ``len(coefficients)`` rounds, its columns of C do not overlap, and k rounds
    cost sqrt(k) norms of the coefficients, as k rounds of independent noise do. Keeps that many models less one.

    Args:
      coefficients: of C's first column, the first one positive, none negative.

    Raises:
      InvalidInput: other coefficients; jax-privacy is missing.

    Example:
      >>> fc.mechanism.toeplitz([1.0, 0.5, 0.375]).strategy(3)  # [[1, 0, 0], [0.5, 1, 0], [0.375, 0.5, 1]]

    Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization", Algorithm 9; jax-privacy.
    """
    try:
        c = np.asarray(coefficients, np.float32)
    except (TypeError, ValueError):
        c = np.zeros(0, np.float32)
    if c.ndim != 1 or not c.size or not np.all(np.isfinite(c)) or not (c[0] > 0 and np.all(c >= 0)):
        raise InvalidInput(
            f"toeplitz: coefficients must be numbers, the first positive and none negative, not {coefficients}."
        )
    matrix = _jax_privacy().toeplitz.inverse_as_streaming_matrix(jnp.asarray(c))

    def strategy(total):
        lag = np.arange(total)[:, None] - np.arange(total)
        return np.append(c, 0.0).astype(np.float64)[np.where((lag < 0) | (lag >= len(c)), len(c), lag)]

    usual = jax.numpy_dtype_promotion("standard")  # it multiplies float32 coefficients with noise of any type
    return Mechanism(usual(matrix.init_multiply), usual(matrix.multiply_next), strategy)


def banded(rounds: int, bands: int) -> Mechanism:
    """Banded matrix factorisation: the ``toeplitz`` of norm 1 whose sums over 1, 2 ... ``rounds`` rounds err least.

    Args:
      rounds: of the run.
      bands: at most the rounds from one of a client's to its next: ``clients // cohort`` under round robin.

    Raises:
      InvalidInput: bands outside 1 ... rounds; jax-privacy is missing.

    Example:
      >>> fc.uplink.gaussian(1.0, mechanism=fc.mechanism.banded(rounds=100, bands=8))

    Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization"; McKenna (2024), "Scaling up the
    Banded Matrix Factorization Mechanism", by jax-privacy.
    """
    checks.count("banded: rounds", rounds, most=10**5)
    checks.count("banded: bands", bands)
    if bands > rounds:
        raise InvalidInput(f"banded: {bands} bands are more than the {rounds} rounds.")
    return toeplitz(_best_coefficients(rounds, bands))


@functools.cache
def _best_coefficients(rounds: int, bands: int) -> np.ndarray:
    # Known now, though a traced function may build its uplink; and the same whatever types the caller has asked for.
    usual = jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with contextlib.ExitStack() as stack:
        for switch in (jax.ensure_compile_time_eval(), *usual, jax.debug_nans(False)):
            stack.enter_context(switch)
        best = np.asarray(_jax_privacy().toeplitz.optimize_banded_toeplitz(rounds, bands))
    return np.maximum(best, 0)


def _jax_privacy() -> Any:
    try:
        from jax_privacy import matrix_factorization
    except ImportError:
        raise InvalidInput("Matrix factorisation needs jax-privacy: pip install 'fedjax_clip[privacy]'.") from None
    return matrix_factorization
