"""Attacks on single messages: links, to be put last in a chain."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.attacks.clients import Clients, numbers_of, population_of
from fedjax_clip.core import checks
from fedjax_clip.core.types import Array, PyTree
from fedjax_clip.uplink.base import Uplink, stateless
from fedjax_clip.uplink.promises import Promises


def replaced(clients: Clients, change: Callable[[PyTree, Array], PyTree]) -> Uplink:
    """Malicious clients send ``change(message, key)``, with a key of their own for each round.

    Args:
      clients: numbers of the malicious clients.
      change: returns a message of the same structure.

    Example:
      >>> doubled = fc.attacks.replaced([0, 3], lambda message, key: optax.tree.scale(2.0, message))
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), doubled)
    """
    ids = numbers_of(clients)

    def encode(update, ctx):
        bad = jnp.any(ctx.client_id == ids)
        forged = jax.tree.map(lambda new, old: new.astype(old.dtype), change(update, ctx.key), update)
        return optax.tree.where(bad, forged, update), {}

    return stateless(encode, promises=Promises(population=population_of(ids)))


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
