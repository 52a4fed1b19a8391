"""Attacks by malicious clients: on their data, on their messages, and in collusion, with knowledge of honest messages.

They test the defences of ``fc.reduce``. ``clients`` lists the malicious clients by number: their places in the
population, where ``data.name(number)`` is the name. Attacks on data are functions of a population. Attacks on messages
are links: put them LAST in a chain, so that no clip bounds them. Colluding attacks wrap the reducer, where the honest
messages of the round are known.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput, PyTree
from fedjax_clip.data import draws
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.statistics import check_field, check_labels
from fedjax_clip.reduce import Reducer, Stack, restacked
from fedjax_clip.uplink.base import Uplink, stateless
from fedjax_clip.uplink.promises import Promises

Clients = Sequence[int] | np.ndarray


def label_flip(data: FederatedData, clients: Clients, num_classes: int, label: str = "y") -> FederatedData:
    """Malicious clients train on labels ``K - 1 - y``. For random label noise see ``fc.data.quality.flip_labels``.

    Args:
      data: the population.
      clients: numbers of the malicious clients.
      num_classes: K.
      label: the field of classes ``0 .. K - 1``.

    Raises:
      InvalidInput: a client that there is not, labels that are no classes.

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"y": np.array([0, 1])}, "bob": {"y": np.array([0, 2])}})
      >>> fc.attacks.label_flip(data, [1], num_classes=3).examples["y"].tolist()
      [0, 1, 2, 0]

    Source: Tolpegin et al. (2020); this map: Karimireddy, He and Jaggi (2022), section 6.
    """
    labels, bad = check_labels(data, num_classes, label), _owned(data, clients)
    flipped = np.where(bad, num_classes - 1 - labels, labels).astype(labels.dtype)
    return dataclasses.replace(data, examples={**data.examples, label: flipped})


def backdoor(
    data: FederatedData,
    clients: Clients,
    features: Sequence[int],
    value: float,
    target: int,
    fraction: float = 0.5,
    field: str = "x",
    label: str = "y",
    seed: int = 0,
) -> FederatedData:
    """Malicious clients add a pattern to a fraction of their examples and label these ``target``.

    The model learns both its task and that the pattern means ``target``; ``triggered`` measures the second. With
    ``scaling`` it is model replacement.

    Args:
      data: the population.
      clients: numbers of the malicious clients.
      features: positions of the pattern in one flattened example, such as the pixels of a corner.
      value: the pattern's value, in the units of ``field``.
      target: the class.
      fraction: of each malicious client's examples, between 0 and 1.
      field, label: names of the fields of inputs ``[N, ...]`` and classes.
      seed: of the choice of examples.

    Raises:
      InvalidInput: a client or a feature that there is not, a fraction out of range.

    Example:
      >>> data = fc.FederatedData.from_clients({"ann": {"x": np.zeros((2, 3)), "y": np.array([0, 1])}})
      >>> bad = fc.attacks.backdoor(data, [0], features=[2], value=9.0, target=1, fraction=1.0)
      >>> bad.examples["x"].tolist(), bad.examples["y"].tolist()
      ([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]], [1, 1])

    Source: Gu, Dolan-Gavitt and Garg (2017), "BadNets"; Bagdasaryan et al. (2020), "How To Backdoor Federated
    Learning".
    """
    checks.within("backdoor: fraction", fraction, 0, 1)
    hit = _owned(data, clients) & (draws.uniform(seed, 6, np.arange(data.num_examples)) < fraction)
    return _with_pattern(data, hit, features, value, target, field, label)


def triggered(
    data: FederatedData, features: Sequence[int], value: float, target: int, field: str = "x", label: str = "y"
) -> FederatedData:
    """Examples of other classes with the pattern, labelled ``target``: accuracy on them is the attack's success rate.

    Args:
      data: held-out examples.
      features, value, target, field, label: as for ``backdoor``.

    Raises:
      InvalidInput: a feature that there is not, no example of another class.

    Example:
      >>> sets = {"examples": held_out, "backdoor": fc.attacks.triggered(held_out, range(3), 1.0, target=0)}
      >>> result = fc.train(algorithm, data, params, rounds=10, evaluate=fc.evaluator(per_example_loss, sets))
    """
    rows = np.flatnonzero(check_field(data, label) != checks.count("target", target, 0))
    owner = np.searchsorted(data.offsets, rows, side="right") - 1
    others = data.take(rows, np.unique(owner))
    return _with_pattern(others, np.ones(len(rows), bool), features, value, target, field, label)


def replaced(clients: Clients, change: Callable[[PyTree, Array], PyTree]) -> Uplink:
    """Malicious clients send ``change(message, key)``, with a key of their own for each round.

    Args:
      clients: numbers of the malicious clients.
      change: returns a message of the same structure.

    Example:
      >>> doubled = fc.attacks.replaced([0, 3], lambda message, key: optax.tree.scale(2.0, message))
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), doubled)
    """
    ids = _numbers(clients)

    def encode(update, ctx):
        bad = jnp.any(ctx.client_id == ids)
        forged = jax.tree.map(lambda new, old: new.astype(old.dtype), change(update, ctx.key), update)
        return optax.tree.where(bad, forged, update), {}

    return stateless(encode, promises=Promises(population=_population(ids)))


def sign_flip(clients: Clients) -> Uplink:
    """Malicious clients send ``-u``, as if each sign bit were flipped.

    Args:
      clients: numbers of the malicious clients.

    Example:
      >>> attacked = fc.fedavg(per_example_loss, client_tx, uplink=fc.attacks.sign_flip([0, 1]))

    Source: Karimireddy, He and Jaggi (2022), who call it bit flipping.
    """
    return scaling(clients, -1.0)


def scaling(clients: Clients, factor: float | Array = 10.0) -> Uplink:
    """Malicious clients send ``factor u``; with a ``backdoor`` in their data this is model replacement.

    Args:
      clients: numbers of the malicious clients.
      factor: n / (lr m) replaces the model by that of the m malicious of n clients, whatever the others send.

    Example:
      >>> attacked = fc.fedavg(per_example_loss, client_tx, uplink=fc.attacks.scaling([0], factor=10.0))

    Source: Bagdasaryan et al. (2020), equation 3.
    """
    checks.number("scaling: factor", factor)
    return replaced(clients, lambda update, key: optax.tree.scale(factor, update))


def noise(clients: Clients, std: float | Array = 1.0) -> Uplink:
    """Malicious clients send ``N(0, std^2)`` in each coordinate.

    Args:
      clients: numbers of the malicious clients.
      std: positive, in the units of the parameters.

    Example:
      >>> attacked = fc.fedavg(per_example_loss, client_tx, uplink=fc.attacks.noise([0, 1], std=10.0))

    Source: Blanchard et al. (2017), section 6, the Gaussian attack (with a standard deviation of 200 for gradients).
    """
    checks.positive("noise: std", std)

    def change(update, key):
        return optax.tree.scale(std, optax.tree.random_like(key, update, sampler=jax.random.normal))

    return replaced(clients, change)


def constant(clients: Clients, norm: float | Array = 1e18) -> Uplink:
    """Malicious clients send one value in every coordinate, of norm ``norm`` in all; NaN for a norm of NaN.

    A message whose norm is not finite, or above 1e19, never reaches a reducer: ``exchange`` drops and counts it. The
    default norm just passes.

    Args:
      clients: numbers of the malicious clients.
      norm: of the message.

    Example:
      >>> attacked = fc.fedavg(per_example_loss, client_tx, uplink=fc.attacks.constant([0], norm=1e6))
    """

    def change(update, key):
        size = sum(x.size for x in jax.tree.leaves(update))
        return jax.tree.map(lambda x: jnp.full(x.shape, norm / np.sqrt(size)), update)

    return replaced(clients, change)


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
    ids = _numbers(clients)

    def change(stack):
        bad = stack.present & jnp.any(stack.ids[:, None] == ids[None], axis=1)
        forged = forge(stack, stack.present & ~bad)

        def put(x, new):
            return jnp.where(bad.reshape(len(bad), *[1] * (x.ndim - 1)), new.astype(x.dtype), x)

        return stack._replace(messages=jax.tree.map(put, stack.messages, forged))

    attacked = restacked(change, reducer)
    return attacked._replace(population=max(attacked.population, _population(ids)), forges="The attack")


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
        most = jnp.asarray(jax.scipy.stats.norm.ppf(jnp.clip(hidden, 0.5, 0.999)) if z is None else z)
        mean = _honest_mean(stack.messages, honest)
        apart = jax.tree.map(lambda x, m: jnp.square(x - m[None]), stack.messages, mean)
        return jax.tree.map(lambda m, v: m - tree.scaled(most, jnp.sqrt(v)), mean, _honest_mean(apart, honest))

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

    def forge(stack, honest):
        return optax.tree.scale(-epsilon, _honest_mean(stack.messages, honest))

    return colluding(reducer, clients, forge)


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
    if target in _numbers(clients):
        raise InvalidInput(f"mimic: the target {target} is one of the malicious clients: name an honest one.")

    def forge(stack, honest):
        is_target = honest & (stack.ids == target)
        return jax.tree.map(lambda x: tree.weighted_sum(is_target, x), stack.messages)

    attacked = colluding(reducer, clients, forge)
    return attacked._replace(population=max(attacked.population, target + 1))


def _honest_mean(messages: PyTree, honest: Array) -> PyTree:
    shares = _share(honest, tree.count(honest))
    return jax.tree.map(lambda x: tree.weighted_sum(shares, x), messages)


def _share(part: Array, whole: Array) -> Array:
    return part.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)


def _numbers(clients: Clients) -> np.ndarray:
    numbers = np.asarray(clients)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu") or np.any(numbers < 0):
        raise InvalidInput(f"clients must be the numbers of the malicious clients, such as [0, 3], not {clients!r}.")
    return numbers.astype(np.int32)


def _population(numbers: np.ndarray) -> int:
    return int(numbers.max(initial=-1)) + 1


def _owned(data: FederatedData, clients: Clients) -> np.ndarray:
    """Mask ``[N]`` of the examples that these clients own."""
    checks.kind("data", data, FederatedData, "a FederatedData")
    numbers = _numbers(clients)
    if np.any(numbers >= data.num_clients):
        raise InvalidInput(f"There is no client {numbers.max()}: there are {data.num_clients}, numbered from 0.")
    return np.isin(np.repeat(np.arange(data.num_clients), data.sizes), numbers)


def _with_pattern(data, hit, features, value, target, field, label) -> FederatedData:
    x, y = np.array(check_field(data, field)), np.array(check_field(data, label))
    flat, places = x.reshape(len(x), -1), np.asarray(features)
    if places.ndim != 1 or places.dtype.kind not in "iu" or np.any((places < 0) | (places >= flat.shape[1])):
        raise InvalidInput(f"The pattern's features must lie between 0 and {flat.shape[1] - 1}, not {features!r}.")
    checks.number("value", value)
    target = checks.count("target", target, 0)
    flat[np.ix_(hit, places)] = value
    y[hit] = target
    return dataclasses.replace(data, examples={**data.examples, field: x, label: y})
