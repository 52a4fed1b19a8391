"""Attacks on all messages of a round together, with knowledge of the honest ones and of the defence."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.attacks.clients import Clients, numbers_of, population_of
from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput, PyTree
from fedjax_clip.reduce import Reducer, Roster, Stack, restacked


def colluding(reducer: Reducer, clients: Clients, forge: Callable[[Stack, Array], PyTree]) -> Reducer:
    """A reducer whose malicious clients see the honest messages and agree on what they send.

    Args:
      reducer: the defence.
      clients: numbers of the malicious clients; those of the cohort attack.
      forge: ``(stack, honest[N]) -> message``, from all messages of the round and a mask of the honest ones.

    Example:
      >>> silent = lambda stack, honest: jax.tree.map(lambda x: jnp.zeros_like(x[0]), stack.messages)
      >>> reducer = fc.attacks.colluding(fc.reduce.krum(2), [0, 3], silent)
    """
    ids = numbers_of(clients)

    def change(stack):
        bad = stack.present & jnp.any(stack.ids[:, None] == ids[None], axis=1)
        return _sent(stack, bad, forge(stack, stack.present & ~bad))

    attacked = restacked(change, reducer)
    return attacked._replace(population=max(attacked.population, population_of(ids)), forges="The attack")


def alie(reducer: Reducer, clients: Clients, z: float | Array | None = None) -> Reducer:
    """ALIE, "a little is enough": malicious clients send ``mean - z std`` of the honest messages, per coordinate.

    Args:
      reducer: the defence.
      clients: numbers of the malicious clients.
      z: by default the largest that hides among the honest: the normal distribution's ``(n - f - s) / (n - f)``
        quantile, ``s = floor(n / 2 + 1) - f``, for n clients in the round, f of them malicious.

    Example:
      >>> reducer = fc.attacks.alie(fc.reduce.trimmed_mean(2), clients=[0, 1])
      >>> attacked = fc.fedavg(per_example_loss, client_tx, reducer=reducer)

    Source: Baruch, Baruch and Goldberg (2019), "A Little Is Enough", Algorithm 3 (its defence: a coordinate's middle).
    """

    if z is not None:
        checks.number("alie: z", z)

    def forge(stack, honest):
        n, good = stack.num_present, tree.count(honest)
        hidden = _share(good - (n // 2 + 1 - (n - good)), good)
        most = jax.scipy.stats.norm.ppf(jnp.clip(hidden, 0.5, 0.999)) if z is None else z
        return _a_little(stack, honest, most)

    return colluding(reducer, clients, forge)


def ipm(reducer: Reducer, clients: Clients, epsilon: float | Array = 0.1) -> Reducer:
    """Inner product manipulation: malicious clients send ``-epsilon`` times the mean of the honest messages.

    Args:
      reducer: the defence.
      clients: numbers of the malicious clients.
      epsilon: a small one hides near zero; one above ``(n - f) / f`` reverses a mean of n.

    Example:
      >>> reducer = fc.attacks.ipm(fc.reduce.krum(2), clients=[0, 1], epsilon=0.5)
      >>> attacked = fc.fedavg(per_example_loss, client_tx, reducer=reducer)

    Source: Xie, Koyejo and Gupta (2020), "Fall of Empires"; Karimireddy, He and Jaggi (2022) for 0.1.
    """

    checks.number("ipm: epsilon", epsilon)
    return colluding(reducer, clients, lambda stack, honest: _against(stack, honest, epsilon))


def strongest(
    reducer: Reducer,
    clients: Clients,
    forge: Callable[[Stack, Array, Array], PyTree],
    factors: Sequence[float] | np.ndarray,
) -> Reducer:
    """Malicious clients try ``forge`` with several factors on the defence, and send what harms most.

    Harm is the distance from the mean of the honest messages to the aggregate. The attackers know the honest messages,
    the reducer, and its random choices of the round. The reducer runs once more for each factor. In a tie the first
    factor is sent.

    Args:
      reducer: the defence.
      clients: numbers of the malicious clients; those of the cohort attack.
      forge: ``(stack, honest[N], factor) -> message``, as for ``colluding``.
      factors: those to try, at least one.

    Raises:
      InvalidInput: no factors, or some that are not finite.

    Example:
      >>> def zeros_times(stack, honest, factor):
      ...   return jax.tree.map(lambda x: factor * jnp.ones_like(x[0]), stack.messages)
      >>> reducer = fc.attacks.strongest(fc.reduce.krum(2), [0, 3], zeros_times, [-1.0, 0.0, 1.0])

    Source: Shejwalkar and Houmansadr (2021), "Manipulating the Byzantine", section 4, by search over a grid.
    """
    tried = np.asarray(factors, np.float32)
    if tried.ndim != 1 or not tried.size or not np.all(np.isfinite(tried)):
        raise InvalidInput(f"strongest: factors must be a list of finite numbers, such as [0.5, 1.0], not {factors!r}.")

    def harm(stack, honest, factor):
        attacked = _sent(stack, stack.present & ~honest, forge(stack, honest, factor))
        # As ``restacked`` will call it, with the same key.
        roster = Roster(stack.ids, jax.random.fold_in(stack.key, 0))
        acc = reducer.zero(jax.tree.map(lambda x: x[0], stack.messages), roster)
        aggregate = reducer.finish(reducer.add(acc, attacked.messages, stack.weights), None)
        moved = tree.norm(jax.tree.map(lambda x, m: x - tree.wide(m), aggregate, _honest_mean(stack.messages, honest)))
        return jnp.where(jnp.isnan(moved), -1, moved)

    def most_harmful(stack, honest):
        harms = jax.lax.map(lambda factor: harm(stack, honest, factor), jnp.asarray(tried))
        return forge(stack, honest, jnp.asarray(tried)[jnp.argmax(harms)])

    return colluding(reducer, clients, most_harmful)


def optimal_alie(reducer: Reducer, clients: Clients, most: float = 10.0, candidates: int = 16) -> Reducer:
    """ALIE with the ``z`` that moves the reducer's aggregate furthest from the honest mean, found in each round.

    Args:
      reducer: the defence.
      clients: numbers of the malicious clients.
      most: the largest z; each further candidate is smaller by ``sqrt(2)``.
      candidates: number of factors, each of which costs one more call of the reducer.

    Raises:
      InvalidInput: a ``most`` that is not positive, candidates that are not a whole number of at least 1.

    Example:
      >>> reducer = fc.attacks.optimal_alie(fc.reduce.trimmed_mean(2), clients=[0, 1])
      >>> attacked = fc.fedavg(per_example_loss, client_tx, reducer=reducer)

    Source: Baruch, Baruch and Goldberg (2019), Algorithm 3; Allouah et al. (2023, 2025) for the line search.
    """
    return strongest(reducer, clients, _a_little, _candidates("optimal_alie", most, candidates))


def optimal_ipm(reducer: Reducer, clients: Clients, most: float = 10.0, candidates: int = 16) -> Reducer:
    """IPM with the ``epsilon`` that moves the reducer's aggregate furthest from the honest mean, found in each round.

    Args:
      reducer, clients: as for ``optimal_alie``.
      most: the largest epsilon; each further candidate is smaller by ``sqrt(2)``.
      candidates: number of factors.

    Raises:
      InvalidInput: as for ``optimal_alie``.

    Example:
      >>> reducer = fc.attacks.optimal_ipm(fc.reduce.arc(2, fc.reduce.median()), clients=[0, 1])
      >>> attacked = fc.fedavg(per_example_loss, client_tx, reducer=reducer)

    Source: Xie, Koyejo and Gupta (2020), "Fall of Empires"; Allouah et al. (2023, 2025) for the line search.
    """
    return strongest(reducer, clients, _against, _candidates("optimal_ipm", most, candidates))


def mimic(reducer: Reducer, clients: Clients, target: int) -> Reducer:
    """Malicious clients copy the message of one honest client, so that it counts many times.

    If clients' data differ, this starves the other clients, and no defence can see the copies as outliers. In a round
    without the target they send zeros.

    Args:
      reducer: the defence.
      clients: numbers of the malicious clients.
      target: number of the honest client; one with unusual data does the most harm.

    Raises:
      InvalidInput: a target that is not a client's number, or is malicious itself.

    Example:
      >>> reducer = fc.attacks.mimic(fc.reduce.median(), clients=[0, 1], target=5)
      >>> attacked = fc.fedavg(per_example_loss, client_tx, reducer=reducer)

    Source: Karimireddy, He and Jaggi (2022), section 4.2, with the target given (their search for one is a warm-up).
    """
    target = checks.client_number("mimic: target", target)
    if target in numbers_of(clients):
        raise InvalidInput(f"mimic: the target {target} is one of the malicious clients: name an honest one.")

    def forge(stack, honest):
        is_target = honest & (stack.ids == target)
        return jax.tree.map(lambda x: tree.weighted_sum(is_target, x), stack.messages)

    attacked = colluding(reducer, clients, forge)
    return attacked._replace(population=max(attacked.population, target + 1))


def _sent(stack: Stack, bad: Array, forged: PyTree) -> Stack:
    """The messages, with ``forged`` in place of those of bad clients."""

    def put(x, new):
        return jnp.where(bad.reshape(len(bad), *[1] * (x.ndim - 1)), new.astype(x.dtype)[None], x)

    return stack._replace(messages=jax.tree.map(put, stack.messages, forged))


def _a_little(stack: Stack, honest: Array, z: float | Array) -> PyTree:
    mean = _honest_mean(stack.messages, honest)
    apart = jax.tree.map(lambda x, m: jnp.square(x - m[None]), stack.messages, mean)
    return jax.tree.map(lambda m, v: m - tree.scaled(jnp.asarray(z), jnp.sqrt(v)), mean, _honest_mean(apart, honest))


def _against(stack: Stack, honest: Array, epsilon: float | Array) -> PyTree:
    mean = _honest_mean(stack.messages, honest)
    return jax.tree.map(lambda m: tree.scaled(-jnp.asarray(epsilon), m), mean)


def _candidates(name: str, most: float, number: int) -> np.ndarray:
    """``most``, and less by a factor of sqrt(2) each time, the smallest first."""
    checks.positive(f"{name}: most", most, finite=True)
    number = checks.count(f"{name}: candidates", number)
    return most * 2.0 ** (-0.5 * np.arange(number)[::-1])


def _honest_mean(messages: PyTree, honest: Array) -> PyTree:
    shares = _share(honest, tree.count(honest))
    return jax.tree.map(lambda x: tree.weighted_sum(shares, x), messages)


def _share(part: Array, whole: Array) -> Array:
    return part.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)
