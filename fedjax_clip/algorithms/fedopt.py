"""The server optimisers of Reddi et al. (2021): FedAdagrad, FedAdam and FedYogi, as their Algorithm 2 has them.

``m <- beta1 m + (1 - beta1) D``, and ``x <- x + eta m / (sqrt(v) + tau)``, with D the cohort's mean update. Before
round 1, ``m = 0`` and ``v = tau^2``. They differ in v.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.averaging import AverageState, average_of, merged
from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput, PyTree


class FedOptState(NamedTuple):
    """Moments of the server's optimiser.

    Attributes:
      m: pytree like the parameters, the mean of the updates.
      v: pytree like the parameters, of their squares.

    Example:
      >>> fc.fedopt.fedadam(0.1).init(params)[0].v  # tau^2 in each element
    """

    m: PyTree
    v: PyTree


def fedadagrad(
    learning_rate: optax.ScalarOrSchedule, beta1: float | Array = 0.0, tau: float | Array = 1e-3
) -> optax.GradientTransformation:
    """FedAdagrad: ``v <- v + D^2``, and ``x <- x + eta m / (sqrt(v) + tau)``; m as in ``fedadam``.

    Every element moves by at most ``eta`` a round. ``optax.adagrad(eta)`` is another method: its ``v`` begins at 0.1,
    so the first steps of updates below 0.3 are shorter, and it has no tau (eps is inside of the root).

    Args:
      learning_rate, beta1: as ``fedadam``.
      tau: as ``fedadam``. Small: each element moves alike. Large: as SGD of rate ``eta / (2 tau)``.

    Returns:
      An optax transform, for ``server_tx``.

    Raises:
      InvalidInput: a beta1 outside [0, 1], a tau that is not positive.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), fc.fedopt.fedadagrad(0.1))

    Source: Reddi et al. (2021), "Adaptive Federated Optimization", Algorithm 2 (FedAdagrad); beta1 = 0 and tau = 1e-3
    as in its section 5.
    """
    return _fedopt(learning_rate, beta1, tau, lambda v, square: v + square)


def fedadam(
    learning_rate: optax.ScalarOrSchedule,
    beta1: float | Array = 0.9,
    beta2: float | Array = 0.99,
    tau: float | Array = 1e-3,
) -> optax.GradientTransformation:
    """FedAdam: ``v <- beta2 v + (1 - beta2) D^2``, and ``x <- x + eta m / (sqrt(v) + tau)``.

    D is the cohort's mean update, ``m <- beta1 m + (1 - beta1) D``, ``m = 0`` and ``v = tau^2`` before round 1.

    ``optax.adam(eta, beta1, beta2, eps=tau)`` is another method: it divides m by ``1 - beta1^t`` and v by
    ``1 - beta2^t``, and v begins at 0. Where all rounds bring the same D, far above tau, its steps are eta long and
    this one's ``eta (1 - beta1^t) / sqrt(1 - beta2^t)``: the same in round 1, 2.1 times as long in round 13, and 1.26
    times in round 100. Where D is below tau, this one's steps are shorter.

    Args:
      learning_rate: eta, of the server; a schedule of it counts rounds.
      beta1, beta2: decay of m and v, in [0, 1].
      tau: adaptivity, positive.

    Returns:
      An optax transform, for ``server_tx``.

    Raises:
      InvalidInput: a beta outside [0, 1], a tau that is not positive.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), fc.fedopt.fedadam(0.01))

    Source: Reddi et al. (2021), Algorithm 2 (FedAdam), with the defaults of its section 5.
    """
    checks.within("beta2", beta2, 0, 1)
    return _fedopt(learning_rate, beta1, tau, lambda v, square: beta2 * v + (1 - beta2) * square)


def fedyogi(
    learning_rate: optax.ScalarOrSchedule,
    beta1: float | Array = 0.9,
    beta2: float | Array = 0.99,
    tau: float | Array = 1e-3,
) -> optax.GradientTransformation:
    """FedYogi: ``v <- v - (1 - beta2) D^2 sign(v - D^2)``, and ``x <- x + eta m / (sqrt(v) + tau)``.

    m is ``fedadam``'s. v falls more slowly than FedAdam's when updates become small. ``optax.yogi(eta)`` is another
    method: it corrects the bias of m and v, and its v begins at 1e-6.

    Args:
      learning_rate, beta1, beta2, tau: as ``fedadam``.

    Returns:
      An optax transform, for ``server_tx``.

    Raises:
      InvalidInput: a beta outside [0, 1], a tau that is not positive.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, optax.sgd(0.1), fc.fedopt.fedyogi(0.01))

    Source: Reddi et al. (2021), Algorithm 2 (FedYogi), with the defaults of its section 5.
    """
    checks.within("beta2", beta2, 0, 1)
    return _fedopt(learning_rate, beta1, tau, lambda v, square: v - (1 - beta2) * square * jnp.sign(v - square))


def _fedopt(
    learning_rate: optax.ScalarOrSchedule,
    beta1: float | Array,
    tau: float | Array,
    second: Callable[[Array, Array], Array],
) -> optax.GradientTransformation:
    checks.within("beta1", beta1, 0, 1)
    checks.positive("tau", tau)

    def init(params):
        return FedOptState(
            jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda x: jnp.full_like(x, tau**2), params)
        )

    def update(updates, state, params=None):
        # updates is the pseudo-gradient -D: its square is D's, and m is -m of the paper.
        m = jax.tree.map(lambda m, d: beta1 * m + (1 - beta1) * d, state.m, updates)
        v = jax.tree.map(lambda v, d: second(v, d * d), state.v, updates)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), m, v), FedOptState(m, v)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def average(decay: float | Array) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the server's parameters; the last link of the server's optimiser.

    After round t it is ``sum_k decay^(t-k) x_k / sum_k decay^(t-k)`` over the parameters x_1 ... x_t, so it has no bias
    towards the initial ones. It changes no update. It is a part of the server's state, so checkpoints hold it, and a
    resumed run keeps its bits. ``fc.train`` evaluates it beside the model: ``eval/examples_average/accuracy``.
    ``fc.fedopt.averaged(server)`` gives the parameters.

    Args:
      decay: in [0, 1); an average over about ``1 / (1 - decay)`` rounds.

    Returns:
      An optax transform, for the end of ``server_tx``.

    Raises:
      InvalidInput: a decay outside [0, 1).

    Example:
      >>> server_tx = optax.chain(fc.fedopt.fedadam(0.01), fc.fedopt.average(0.99))
      >>> result = fc.train(fc.fedavg(per_example_loss, optax.sgd(0.1), server_tx), data, params, rounds=3)
      >>> smooth = fc.fedopt.averaged(result.state.server)

    Source: Polyak and Juditsky (1992), "Acceleration of Stochastic Approximation by Averaging"; Kingma and Ba (2015),
    "Adam", section 7.2, for the weights.
    """
    checks.fraction("average's decay", decay, zero=True)

    def init(params):
        return AverageState(params, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        rounds = state.rounds + 1
        share = (1 - decay) / (1 - jnp.float32(decay) ** rounds.astype(jnp.float32))
        after = tree.apply_updates(params, updates)
        kept = jax.tree.map(lambda a, x: tree.scaled(1 - share, a) + tree.scaled(share, x), state.params, after)
        return updates, AverageState(kept, rounds)

    return optax.GradientTransformation(init, update)


def averaged(server: Any) -> PyTree:
    """The average of the server's parameters that ``average`` keeps.

    Args:
      server: the server's state, ``result.state.server``.

    Returns:
      A pytree like ``server.params``. Parameters that do not train at the server are as they are.

    Raises:
      InvalidInput: a server whose optimiser keeps no average.

    Example:
      >>> server_tx = optax.chain(optax.sgd(1.0), fc.fedopt.average(0.9))
      >>> result = fc.train(fc.fedavg(per_example_loss, optax.sgd(0.1), server_tx), data, params, rounds=1)
      >>> bool(jnp.allclose(fc.fedopt.averaged(result.state.server)["w"], result.params["w"]))
      True
    """
    if (found := average_of(server)) is None:
        raise InvalidInput("The server keeps no average: end server_tx with fc.fedopt.average(0.99).")
    return merged(server.params, found)
