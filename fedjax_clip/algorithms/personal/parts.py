"""Personalisation by a part of the model: FedRep, FedBABU and FedBN."""

import dataclasses
import functools
from typing import Any

import optax

from fedjax_clip.algorithms.base import own_key
from fedjax_clip.algorithms.fedavg import fedavg
from fedjax_clip.algorithms.frozen import partially_frozen
from fedjax_clip.algorithms.private import Owner, owned, partially_private
from fedjax_clip.core import checks, tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, ClientTx, InvalidInput, Params, PerExampleLoss
from fedjax_clip.local.worker import Worker
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def fedrep(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    head: str,
    head_passes: int = 1,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """Each client keeps its own head: it trains the head on the shared body first, then the body under that head.

    A client takes ``head_passes`` passes of steps over its batches of the round on the head alone, from the head that
    it kept, then one pass on the body alone, from the server's. It sends the body's change. (``fc.partially_private``,
    FedPer, trains both at once.) Clips in ``client_tx`` see the part that is trained.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer: as ``fc.fedavg``; only the body is sent.
      head: regular expression, found in the names of the head's leaves (``"params/Dense_1"``).
      head_passes: passes on the head over the batches that the body passes once.
      gradient: as ``fc.fedavg``. No ``private_gradient``: head and body use a record each.

    Returns:
      An ``Algorithm`` whose clients keep their heads, in ``ClientState.private``; ``algorithm.personal`` gives a
      client's model. New clients begin with the initial head: ``fc.personal.adapt`` trains theirs.

    Raises:
      InvalidInput: an argument of the wrong kind; (when a run begins) a head that is found in no leaf or in all.

    Example:
      >>> algorithm = fc.personal.fedrep(per_example_loss, client_tx, head="^b$")

    Source: Collins, Hassani, Mokhtari and Shakkottai (2021), "Exploiting Shared Representations for Personalized
    Federated Learning", Algorithm 1.
    """
    passes = checks.count("fedrep's head_passes", head_passes)
    if getattr(gradient, "counts_alike", False):
        raise InvalidInput(
            "This algorithm's clients use a record for the head and for the body, and private_gradient's accounting "
            "counts one use of a record for each pass of steps: take fedavg, fedsgd or scaffold."
        )
    average = fedavg(per_example_loss, client_tx, server_tx, uplink=uplink, reducer=reducer, gradient=gradient)
    return owned(average, "fedrep", "head", head, functools.partial(_HeadFirst, passes=passes))._replace(name="fedrep")


def fedbabu(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    head: str,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """FedAvg of the body under a head that stays as it was initialised; clients fine-tune the whole model afterwards.

    The head must not be zero, or no gradient reaches the body. ``fc.personal.fine_tune`` makes the clients' models.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``; only the body is sent.
      head: regular expression, found in the names of the head's leaves (``"params/Dense_1"``).

    Returns:
      An ``Algorithm``, ``fc.partially_frozen``'s.

    Raises:
      InvalidInput: an argument of the wrong kind; (when a run begins) a head that is found in no leaf or in all.

    Example:
      >>> algorithm = fc.personal.fedbabu(per_example_loss, client_tx, head="^b$")

    Source: Oh, Kim and Yun (2022), "FedBABU: Toward Enhanced Representation for Federated Image Classification",
    Algorithm 1.
    """
    average = fedavg(per_example_loss, client_tx, server_tx, uplink=uplink, reducer=reducer, gradient=gradient)
    return partially_frozen(average, head)._replace(name="fedbabu")


def fedbn(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    norms: str = "Norm",
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """FedAvg of all but the normalisation layers, whose scales and biases each client keeps for itself.

    It is ``fc.partially_private`` by the layers' names. A model without such layers is refused, since it would be
    FedAvg. The layers' parameters are trained; a norm's running statistics are no parameters.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``.
      norms: regular expression, found in the names of the normalisation layers' leaves; by default Flax's names.

    Returns:
      An ``Algorithm`` whose clients keep their norms; ``algorithm.personal`` gives a client's model.

    Raises:
      InvalidInput: an argument of the wrong kind; (when a run begins) no normalisation layers.

    Example:
      >>> algorithm = fc.personal.fedbn(per_example_loss, client_tx, norms="LayerNorm|BatchNorm")

    Source: Li, Jiang, Zhang, Kamp and Dou (2021), "FedBN: Federated Learning on Non-IID Features via Local Batch
    Normalization", Algorithm 1.
    """
    average = fedavg(per_example_loss, client_tx, server_tx, uplink=uplink, reducer=reducer, gradient=gradient)
    return partially_private(average, norms)._replace(name="fedbn")


@dataclasses.dataclass(frozen=True)
class _HeadFirst(Owner):
    """A client that trains its head v, and then the shared body, never both at once."""

    passes: int = 1

    def local_steps(
        self, params: Params, key: Any, *, adjust: Any = None, opt_state: Any = None, collect: bool = False
    ) -> Any:
        whole, body, head = self.per_example_loss, params, self.kept[0]
        of_head = dataclasses.replace(
            self.repeated(self.passes), per_example_loss=lambda v, batch, key: whole(tree.join(v, body), batch, key)
        )
        new, *_ = Worker.local_steps(of_head, head, own_key(key))
        self.kept[0] = new
        of_body = dataclasses.replace(self, per_example_loss=lambda u, batch, key: whole(tree.join(new, u), batch, key))
        return Worker.local_steps(of_body, body, key, adjust=adjust, opt_state=opt_state, collect=collect)
