"""The promises of a link on the messages that leave it, and of a chain of links."""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from fedjax_clip.core.types import Array, InvalidInput, PyTree
from fedjax_clip.uplink.mechanism import Mechanism


class Noise(enum.Enum):
    """Who adds the noise, which decides who sees messages without it.

    Example:
      >>> fc.uplink.local_gaussian(1.0).promises.noise
      <Noise.CLIENT: 'each client'>
    """

    SERVER = "the server"
    CLIENT = "each client"
    SHARES = "the clients together"  # each client adds a share: only the sum of a cohort has all of the noise


class Wire(enum.Enum):
    """What a link does to a message on the wire.

    Attributes:
      KEEPS: it leaves the message as it is and acts at the server only.
      CHANGES: it may change the message.
      PACKS: it turns the message into bytes, which no later link may touch.
      SUMS: only sums of messages have a meaning, so the reducer must be linear.

    Example:
      >>> fc.uplink.compress(fc.compression.qsgd(4)).promises.wire
      <Wire.PACKS: 'packs'>
    """

    KEEPS = "keeps"
    CHANGES = "changes"
    PACKS = "packs"
    SUMS = "sums"


@dataclasses.dataclass(frozen=True)
class Promises:
    """What holds for every message that leaves a link. Accounting, reducers and other links rely on it.

    A link that wraps another one inherits its promises (``link._replace(encode=...)``), or weakens them by
    ``dataclasses.replace``. ``joined`` makes the promises of a chain. The defaults promise nothing.

    Attributes:
      bound: ``(state, like) -> L2 norm`` that no message exceeds, for any input; ``like`` has the message's shapes.
      contracts: whether the link enlarges no norm, so that earlier bounds still hold.
      noise: who adds noise to the messages or to their sum; ``None`` without noise.
      noise_multipliers: one for each quantity of a round to which the SERVER adds Gaussian noise.
      needs_bound: whether the messages that enter must have a bound.
      leaks: a sentence on what the server learns about single clients without noise, and what to do about it.
      trusts: the link's name, if clients send other values besides their messages and the server adds the noise to
        them.
      moves: the link's name, if its bound changes between rounds.
      mirrors: the link's name, if a client's state mirrors what the server has added up of its messages. The server
        must then add them up as they were sent.
      mechanism: how the noise depends on that of earlier rounds; ``None`` if independent.
      deployment: cohort size of a simulated deployment's noise; epsilon is then not the run's own.
      wire: what the link does to the message on the wire. A link that ``PACKS`` reports the ``bytes`` that travel and
        their ``entropy_bytes``.
      grid: ``(dim, cohort_size, threshold) -> Grid`` if messages are integers, which only a modular sum adds.
      population: the fewest clients that the population must have, since the link names one by number.

    Example:
      >>> fc.uplink.gaussian(1.0).promises.noise_multipliers
      (1.0,)
    """

    bound: Callable[[PyTree, PyTree], Array] | None = None
    contracts: bool = False
    noise: Noise | None = None
    noise_multipliers: tuple[float | Array, ...] = ()
    needs_bound: bool = False
    leaks: str = ""
    trusts: str = ""
    moves: str = ""
    mirrors: str = ""
    mechanism: Mechanism | None = None
    deployment: float | Array | None = None
    wire: Wire = Wire.CHANGES
    grid: Callable[[int, Any, int], Any] | None = None
    population: int = 0


def joined(promises: Sequence[Promises]) -> Promises:
    """The promises of a chain, in the order in which a message passes its links."""

    def first(name: str, otherwise: Any) -> Any:
        return next((value for p in promises if (value := getattr(p, name))), otherwise)

    last = last_bound(promises)

    def bound(state: PyTree, like: PyTree) -> Array:
        assert last is not None
        of_link = promises[last].bound
        assert of_link is not None
        return of_link(state[last], like)

    noises = [p.noise for p in promises if p.noise is not None]
    return Promises(
        bound=None if last is None else bound,
        contracts=all(p.contracts for p in promises),
        noise=Noise.SERVER if Noise.SERVER in noises else next(iter(noises), None),
        noise_multipliers=sum((p.noise_multipliers for p in promises), ()),
        leaks=first("leaks", ""),
        trusts=first("trusts", ""),
        moves=first("moves", ""),
        mirrors=first("mirrors", ""),
        mechanism=first("mechanism", None),
        deployment=next((p.deployment for p in promises if p.deployment is not None), None),
        wire=next((p.wire for p in reversed(promises) if p.wire is not Wire.KEEPS), Wire.KEEPS),
        grid=promises[-1].grid if promises else None,
        population=max((p.population for p in promises), default=0),
    )


def beside(parts: Sequence[Promises]) -> Promises:
    """The promises of a message of several parts, each of which passes a link of its own.

    Raises:
      InvalidInput: parts that do not have the same noise, or several on an integer grid.
    """
    if len(parts) == 1:
        of_one = parts[0].bound
        bound = None if of_one is None else lambda state, like: of_one(state[0], like[0])
        return dataclasses.replace(parts[0], bound=bound)
    if len({p.noise for p in parts}) > 1 or len({id(p.mechanism) for p in parts}) > 1:
        raise InvalidInput(
            "The parts of a message must all have noise of one kind and one mechanism, and these do not: end each "
            "part's link on the same kind of noise, such as gaussian(1.0)."
        )
    if any(p.grid for p in parts):
        raise InvalidInput("Only one part of a message can be on an integer grid: take fedavg or fedsgd.")
    bounds = [p.bound for p in parts]

    def bound_of_all(state: PyTree, like: PyTree) -> Array:
        each = [b(s, x) for b, s, x in zip(bounds, state, like, strict=False) if b is not None]
        return jnp.sqrt(sum(jnp.square(b) for b in each))

    return dataclasses.replace(
        joined(parts),
        bound=None if None in bounds else bound_of_all,
        needs_bound=any(p.needs_bound for p in parts),
        wire=Wire.CHANGES if len({p.wire for p in parts}) > 1 else parts[0].wire,
    )


def last_bound(promises: Sequence[Promises]) -> int | None:
    """Position of the link whose bound holds at the end of the chain."""
    for position in reversed(range(len(promises))):
        if promises[position].bound is not None:
            return position
        if not promises[position].contracts:
            return None
    return None
