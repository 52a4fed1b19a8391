"""The parts of an algorithm, and their checks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from fedjax_clip.core import checks
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import ClientTx, InvalidInput, PerExampleLoss
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink
from fedjax_clip.uplink.chains import identity


class Parts(NamedTuple):
    """The parts of an algorithm, checked, with defaults filled in.

    Attributes:
      per_example_loss, client_tx, server_tx, reducer, gradient: as ``fc.fedavg``.
      uplink: the link of a client's whole message; ``fc.uplink.on_parts`` if it has several parts.
      beside: number of parts that clients send besides the update.

    Example:
      >>> fc.fedavg(per_example_loss, optax.sgd(0.1)).parts.beside
      0
    """

    per_example_loss: PerExampleLoss
    client_tx: ClientTx
    server_tx: optax.GradientTransformation
    uplink: Uplink
    reducer: Reducer
    gradient: Gradient = batch_gradient
    beside: int = 0


def check_client_tx(client_tx: Any) -> None:
    """Refuses a ``client_tx`` that is not a client optimiser.

    Raises:
      InvalidInput: says what to give instead.
    """
    if isinstance(client_tx, Uplink):
        raise InvalidInput("client_tx is an uplink; clips of a local step are in fc.clipping.")
    checks.kind(
        "client_tx", client_tx, optax.GradientTransformation | Callable, "an optax optimiser, or what builds one"
    )
    maker = getattr(client_tx, "func", client_tx)  # of a functools.partial
    if str(getattr(maker, "__module__", "")).split(".")[0] in ("optax", "fedjax_clip") and callable(client_tx):
        raise InvalidInput(
            f"client_tx is the function {maker.__name__} itself, which would be given the round's number: call it, as "
            f"in {maker.__name__}(0.1)."
        )


def checked_link(uplink: Uplink | None) -> Uplink:
    """The checked uplink, by default one that changes nothing.

    Raises:
      InvalidInput: an argument that is not an uplink.
    """
    uplink = identity() if uplink is None else uplink
    checks.kind(
        "uplink", uplink, Uplink, "an fc.uplink.Uplink (fc.uplink.at_client(tx) makes one of an optax transform)"
    )
    return uplink
