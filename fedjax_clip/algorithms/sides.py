"""The two sides of a round that is cut at the wire, for ``fedjax_clip.deploy``.

``exchange`` is the only function that maps clients and reduces their messages. A cohort with a ``side`` makes it run
one side only. The round around it is traced as always, and ``Cut`` ends the trace where the side has nothing more to
do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.core.types import Array, PyTree
from fedjax_clip.reduce import Reducer, modular_sum


class Sent(NamedTuple):
    """What one client has sent; ``[C, ...]`` at the server.

    Attributes:
      message: pytree of arrays and codes; zeros if the client drops itself.
      weight: float32, in an average; 0 if the client drops itself.
      report: the sums of its metrics, and of what links compute from.
    """

    message: PyTree
    weight: Array
    report: PyTree


class Cut(Exception):
    """Ends the trace of a side, and carries what it has made."""

    def __init__(self, made: Any):
        super().__init__("A round is cut at the wire.")
        self.made = made


@dataclasses.dataclass(frozen=True, eq=False)
class AtClient:
    """A client's side, with a cohort of this client alone.

    Attributes:
      shared: what the server has sent, in place of what this process would compute.
      learns: called with ``Packed.opened`` of the message, or ``None``, while the side is traced.
    """

    shared: PyTree
    learns: Callable[[Any], None]

    def alone(self, reducer: Reducer) -> Reducer:
        """A reducer that keeps the message of the only client, and its weight."""

        def zero(message, roster):
            return jax.tree.map(jnp.zeros_like, message), jnp.zeros((), jnp.float32)

        def add(acc, messages, weights):
            new = jax.tree.map(lambda x: x[0], (messages, weights))
            return optax.tree.where(weights[0] > 0, new, acc)

        return reducer._replace(zero=zero, add=add, finish=lambda acc, axis_name: acc)


@dataclasses.dataclass(frozen=True, eq=False)
class Unheard:
    """All clients of a cohort keep what they make of the server's message, and nobody hears theirs.

    The round ends with a ``Cut`` of the clients' states ``[C, ...]``. States of links stay as they were.
    """

    def deaf(self, reducer: Reducer) -> Reducer:
        """A reducer of nothing."""
        return reducer._replace(
            zero=lambda message, roster: (), add=lambda acc, messages, weights: (), finish=lambda acc, axis_name: ()
        )


@dataclasses.dataclass(frozen=True, eq=False)
class AtServer:
    """The server's side.

    Attributes:
      sent: ``Sent`` of ``[C, ...]``, in the order of the cohort; ``None`` before the clients work, when only what they
        are to be sent is wanted.
      opened: see ``AtClient.learns``.
    """

    sent: Sent | None = None
    opened: Any = None

    def unmasked(self, reducer: Reducer) -> Reducer:
        """The plain modular sum in place of the protocol, which has run on the wire."""
        if reducer.threshold is None or reducer.denominator is None:
            return reducer
        return modular_sum(int(reducer.denominator), reducer.threshold)
