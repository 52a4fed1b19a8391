"""Correlated noise: how the server's noise of a round depends on that of earlier rounds (DP-FTRL)."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.tree import weighted_sum
from fedjax_clip.core.types import InvalidInput, Params, PyTree


class Mechanism(NamedTuple):
    """Noise ``C^-1 Z`` over the rounds, with Z independent: ``C x + Z`` is private, with x the sums of the rounds.

    Later rounds take back noise of earlier ones. The sum over rounds, which is the model, is then more exact than with
    independent noise of the same privacy. Any ``StreamingMatrix`` m of jax-privacy for ``C^-1`` makes one:
    ``Mechanism(m.init_multiply, m.multiply_next, strategy)``.

    Attributes:
      init: ``params -> state`` before round 0.
      next: ``(row of Z, state) -> (row of C^-1 Z, state)``; rows have the shapes of params.
      strategy: ``rounds -> C [rounds, rounds]``, lower triangular; ``fc.privacy`` reads it.
      whole: whether ``next`` also takes rows of int32, and is then exact: C has whole numbers, and ones on its
        diagonal.

    Example:
      >>> noise = fc.uplink.gaussian(1.0, mechanism=fc.uplink.mechanism.tree(64))

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
    restarts). Powers of two are best, because one node then covers all rounds. The state holds one model for each node
    of a path.

    Args:
      rounds: of one tree, such as those of an epoch over the clients.

    Raises:
      InvalidInput: no whole number of at least 1.

    Example:
      >>> fc.uplink.mechanism.tree(4).strategy(4).astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]

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
        level = jax.lax.population_count((count & -count) - 1)  # trailing zeros: so many smaller nodes merge into one

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

    If no client takes part twice within ``len(coefficients)`` rounds, its columns of C do not overlap. k rounds then
    have sensitivity sqrt(k) times the norm of the coefficients, as with independent noise. The state holds
    ``len(coefficients) - 1`` models.

    Args:
      coefficients: of C's first column, the first one positive, none negative.

    Raises:
      InvalidInput: other coefficients; jax-privacy is missing.

    Example:
      >>> fc.uplink.mechanism.toeplitz([1.0, 0.5, 0.375]).strategy(3).tolist()
      [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.375, 0.5, 1.0]]

    Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization", Algorithm 9; jax-privacy.
    """
    c = _numbers(coefficients)
    if not c.size or not (c[0] > 0 and np.all(c >= 0)):
        raise InvalidInput(
            f"toeplitz: coefficients must be numbers, the first positive and none negative, not {coefficients}."
        )
    matrix = _jax_privacy().toeplitz.inverse_as_streaming_matrix(jnp.asarray(c))
    usual = jax.numpy_dtype_promotion("standard")  # it multiplies float32 coefficients with noise of any type
    return Mechanism(
        usual(matrix.init_multiply),
        usual(matrix.multiply_next),
        lambda total: _lower(np.pad(c.astype(np.float64)[:total], (0, max(0, total - len(c))))),
    )


def banded(rounds: int, bands: int) -> Mechanism:
    """Banded matrix factorisation: the ``toeplitz`` of norm 1 whose sums over 1, 2 ... ``rounds`` rounds err least.

    Args:
      rounds: of the run.
      bands: at most the rounds between two of a client's: ``clients // cohort`` under round robin.

    Raises:
      InvalidInput: bands outside 1 ... rounds; jax-privacy is missing.

    Example:
      >>> fc.uplink.gaussian(1.0, mechanism=fc.uplink.mechanism.banded(rounds=100, bands=8))

    Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization"; McKenna (2024), "Scaling up the
    Banded Matrix Factorization Mechanism", by jax-privacy.
    """
    checks.count("banded: rounds", rounds, most=10**5)
    checks.count("banded: bands", bands)
    if bands > rounds:
        raise InvalidInput(f"banded: {bands} bands are more than the {rounds} rounds.")
    return toeplitz(_best_coefficients(rounds, bands))


def inverse_toeplitz(coefficients: Sequence[float] | np.ndarray) -> Mechanism:
    """Banded inverse by given coefficients: ``C^-1[s, t] = coefficients[s - t]``; C itself is not banded.

    A round takes back these fractions of the noise of the ``len(coefficients) - 1`` rounds before it, which are the
    state. Guarantee: C has no negative entry, as ``fc.privacy.sensitivity`` needs.

    Args:
      coefficients: of the first column of C^-1: the first one positive, all others at most 0.

    Raises:
      InvalidInput: other coefficients.

    Example:
      >>> fc.uplink.mechanism.inverse_toeplitz([1.0, -0.5]).strategy(3).tolist()
      [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]

    Source: Kalinin, McKenna, Upadhyay and Lampert (2025), "Back to Square Roots: An Optimal Bound on the Matrix
    Factorization Error for Multi-Epoch Differentially Private SGD".
    """
    c = _numbers(coefficients)
    if not c.size or not (c[0] > 0 and np.all(c[1:] <= 0)):
        raise InvalidInput(
            "inverse_toeplitz: coefficients must be numbers, the first positive and the others 0 or negative, not "
            f"{coefficients}."
        )

    def init(params):
        return jax.tree.map(lambda x: jnp.zeros((len(c) - 1, *x.shape), x.dtype), params)

    def step(noise, state):
        before = jax.tree.map(lambda z, zs: jnp.concatenate([z[None], zs]), noise, state)
        row = jax.tree.map(lambda zs: weighted_sum(c, zs), before)
        return row, jax.tree.map(lambda zs: zs[:-1], before)

    def strategy(total):
        column = np.zeros(total)
        for lag in range(total):
            past = column[max(0, lag - len(c) + 1) : lag][::-1]
            column[lag] = (float(lag == 0) - c[1 : len(past) + 1].astype(np.float64) @ past) / float(c[0])
        return _lower(column)

    return Mechanism(init, step, strategy)


def banded_inverse(bands: int) -> Mechanism:
    """Banded inverse square root: the ``inverse_toeplitz`` of ``sqrt(1 - x)``'s first coefficients, 1, -1/2, -1/8 ...

    With all of them it is the best Toeplitz matrix for the largest error of a sum. It does not depend on the number of
    rounds.

    Args:
      bands: number of coefficients; the state holds one model less.

    Raises:
      InvalidInput: no whole number of at least 1.

    Example:
      >>> fc.uplink.gaussian(1.0, mechanism=fc.uplink.mechanism.banded_inverse(bands=4))

    Source: Kalinin, McKenna, Upadhyay and Lampert (2025), "Back to Square Roots", BISR.
    """
    k = np.arange(1, checks.count("banded_inverse: bands", bands, most=10**4))
    return inverse_toeplitz(np.cumprod([1.0, *(2 * k - 3) / (2 * k)]))


def buffered_toeplitz(decays: Sequence[float] | np.ndarray, scales: Sequence[float] | np.ndarray) -> Mechanism:
    """A buffered linear Toeplitz matrix (BLT), ``C[s, t] = sum_i scales[i] decays[i]^(s - t - 1)`` under ones.

    Guarantee: it correlates the noise of all rounds, and its state holds one model for each buffer, for any number of
    rounds. Scales with a sum of at most 1 keep the columns decreasing, so the sensitivity is exact.

    Args:
      decays: of the buffers, between 0 and 1.
      scales: of the buffers, none negative, with a sum of at most 1.

    Raises:
      InvalidInput: other numbers.

    Example:
      >>> fc.uplink.mechanism.buffered_toeplitz([0.5], [0.25]).strategy(3).tolist()
      [[1.0, 0.0, 0.0], [0.25, 1.0, 0.0], [0.125, 0.25, 1.0]]

    Source: Dvijotham et al. (2024), "Efficient and Near-Optimal Noise Generation for Streaming Differential Privacy";
    McMahan, Xu and Zhang (2024), "A Hassle-free Algorithm for Private Learning in Practice", Algorithm 3.
    """
    theta, omega = _numbers(decays), _numbers(scales)
    sound = theta.shape == omega.shape and np.all((theta >= 0) & (theta <= 1) & (omega >= 0))
    if not sound or omega.astype(np.float64).sum() > 1 + 1e-6:
        raise InvalidInput(
            "buffered_toeplitz: decays must lie between 0 and 1, and as many scales be 0 or more with a sum of at most "
            f"1, not {decays} and {scales}."
        )

    def init(params):
        return jax.tree.map(lambda x: jnp.zeros((len(theta), *x.shape), x.dtype), params)

    def step(noise, buffers):  # jax-privacy's buffers keep their own type, whatever that of the noise
        def weighted(weights, x):
            return jnp.asarray(weights, x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) * x

        row = jax.tree.map(lambda z, b: z - jnp.sum(weighted(omega, b), axis=0), noise, buffers)
        return row, jax.tree.map(lambda r, b: weighted(theta, b) + r[None], row, buffers)

    def strategy(total):
        powers = theta.astype(np.float64) ** np.arange(total - 1)[:, None]
        return _lower(np.append(1.0, powers @ omega.astype(np.float64)))

    return Mechanism(init, step, strategy)


def blt(rounds: int, separation: int | None = None, most: int | None = None, buffers: int = 3) -> Mechanism:
    """The ``buffered_toeplitz`` with the least maximal error of a sum, for given buffers and separation of clients.

    It is near the best matrix of any form, with a state of a few models. The numbers need not be exact: accounting is
    right for a run of other rounds or separations, too.

    Args:
      rounds: of the run.
      separation: the fewest rounds between two of a client's: ``clients // cohort`` under round robin; by default each
        client takes part once.
      most: how often a client takes part at most; by default as often as the separation allows.
      buffers: models in the state, 1 to 10; 2 or 3 are enough for hundreds of rounds, 5 for millions.

    Raises:
      InvalidInput: numbers out of range, or more buffers than can be told apart; jax-privacy is missing.

    Example:
      >>> fc.uplink.gaussian(1.0, mechanism=fc.uplink.mechanism.blt(rounds=20, separation=5, buffers=1))

    Source: McMahan, Xu and Zhang (2024), "A Hassle-free Algorithm for Private Learning in Practice: Don't Use Tree
    Aggregation, Use BLTs", by jax-privacy.
    """
    checks.count("blt: rounds", rounds, 2, most=10**5)
    separation = checks.count("blt: separation", rounds if separation is None else separation)
    checks.count("blt: buffers", buffers, most=10)
    if most is not None:
        checks.count("blt: most", most)
    return buffered_toeplitz(*_best_buffers(rounds, min(separation, rounds), most, buffers))


@functools.cache
def _best_coefficients(rounds: int, bands: int) -> np.ndarray:
    with _as_usual(x64=False):
        best = np.asarray(_jax_privacy().toeplitz.optimize_banded_toeplitz(rounds, bands))
    return np.maximum(best, 0)


@functools.cache
def _best_buffers(rounds: int, separation: int, most: int | None, buffers: int) -> tuple[np.ndarray, np.ndarray]:
    factorization = _jax_privacy()
    with _as_usual(x64=True):
        try:
            best = factorization.buffered_toeplitz.optimize(
                n=rounds, min_sep=separation, max_participations=most, min_buffers=buffers, max_buffers=buffers
            )
        except RuntimeError:
            raise InvalidInput(f"blt: no {buffers} buffers are best for {rounds} rounds: take fewer.") from None
        return np.asarray(best.buf_decay), np.asarray(best.output_scale)


@contextlib.contextmanager
def _as_usual(x64: bool) -> Iterator[None]:
    """Computes concrete values even inside a traced function, and ignores the caller's JAX settings."""
    usual = jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with contextlib.ExitStack() as stack:
        for switch in (jax.ensure_compile_time_eval(), *usual, jax.debug_nans(False)):
            stack.enter_context(switch)
        yield


def _lower(column: np.ndarray) -> np.ndarray:
    """The lower triangular Toeplitz matrix with this first column."""
    lag = np.arange(len(column))[:, None] - np.arange(len(column))
    return np.where(lag < 0, 0.0, column[lag])


def _numbers(values: Any) -> np.ndarray:
    """float32 ``[n]``; empty if these are not such numbers."""
    try:
        c = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        c = np.zeros(0, np.float32)
    return c if c.ndim == 1 and np.all(np.isfinite(c)) else np.zeros(0, np.float32)


def _jax_privacy() -> Any:
    try:
        from jax_privacy import matrix_factorization
    except ImportError:
        raise InvalidInput("Matrix factorisation needs jax-privacy: pip install 'fedjax_clip[privacy]'.") from None
    return matrix_factorization
