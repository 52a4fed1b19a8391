"""The state of a model (``fc.local.with_state``) in a round: beside what the algorithm itself sends and sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.exchange import Answer, Carried, ClientFn, exchange
from fedjax_clip.algorithms.parts import Parts
from fedjax_clip.core import stateful, tree
from fedjax_clip.core.types import Array, InvalidInput, Params, PerExampleLoss, PyTree
from fedjax_clip.local.worker import Worker
from fedjax_clip.reduce import Reducer, together
from fedjax_clip.uplink.chains import on_parts


def check_travels(state: PyTree, parts: Parts) -> None:
    """Refuses state that has no mean, and parts of an algorithm that would not cover it."""
    for name, x in tree.named_leaves(state):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise InvalidInput(f"State {name!r} holds {jnp.result_type(x)} and has no mean: keep it out of params.")
    promises, reducer = parts.uplink.promises, parts.reducer
    if jax.tree.leaves(state) and (promises.noise or promises.grid or reducer.hides or reducer.threshold is not None):
        raise InvalidInput(
            "The model's state (fc.local.with_state) would travel beside the update without its noise or secure sum: "
            "keep it at the clients (fc.partially_private) or take group normalisation."
        )


def carrying(client_fn: ClientFn, loss: PerExampleLoss, sends: bool = True) -> ClientFn:
    """``client_fn`` of the trained parameters, as a client function of ``(shared, state)``.

    Args:
      client_fn: sees, shares and returns nothing of the state.
      loss: knows which leaves are state.
      sends: whether its message becomes a ``Carried``.
    """

    def work(shared, client, key):
        shared, state = shared
        plain = {field.name: getattr(client, field.name) for field in dataclasses.fields(Worker)}
        carrier = _Carrier(**plain, inner=client, loss=loss, kept=[state])
        message, *rest = client_fn(shared, carrier, key)
        return (Carried(message, optax.tree.sub(carrier.kept[0], state)) if sends else message), *rest

    return work


def exchanged(
    work: ClientFn, parts: Parts, reducer: Reducer, shared: PyTree, link: PyTree, cohort: Any, key: Array
) -> tuple[Answer, PyTree]:
    """``exchange`` of ``Carried`` messages: the answer without state, and the mean change of the state.

    Args:
      work: a client function that ``carrying`` made.
      parts: of the algorithm: the state takes no link, and the algorithm's reducer.
      reducer: of the message.
      shared: with the state.
      link: the uplink's state at the server.
      cohort, key: as for ``exchange``.
    """
    state = cohort.state._replace(uplink=(cohort.state.uplink,))
    answer = exchange(
        work,
        on_parts(parts.uplink),
        together(reducer, parts.reducer),
        shared,
        (link,),
        dataclasses.replace(cohort, state=state),
        key,
    )
    update, change = answer.update
    alone = answer._replace(
        update=update,
        uplink=answer.uplink[0],
        clients=answer.clients._replace(uplink=answer.clients.uplink[0]),
        metrics=answer.metrics | {"update_norm": tree.norm(update)},
    )
    return alone, change


@dataclasses.dataclass(frozen=True)
class _Carrier(Worker):
    """A client whose model has state, under an algorithm that sees none of it.

    Its new state is left in ``kept``, a list of one, while the algorithm's client function is traced.
    """

    inner: Worker
    loss: PerExampleLoss
    kept: list[PyTree]

    def local_steps(self, params: Params, key: Any, **how: Any) -> Any:
        y, *rest = self._client().local_steps(self._whole(params), key, **how)
        self.kept[0], y = stateful.split(self.loss, y)
        return y, *rest

    def gradient(self, params: Params, step: Any, key: Any) -> PyTree:
        return self._client().gradient(self._whole(params), step, key)

    def full_gradient(self, params: Params, key: Any) -> Any:
        return self._client().full_gradient(self._whole(params), key)

    def full_step(self, params: Params, key: Any) -> Any:
        update, report = self._client().full_step(self._whole(params), key)
        change, update = stateful.split(self.loss, update)
        self.kept[0] = tree.apply_updates(self.kept[0], change)
        return update, report

    def _client(self) -> Worker:
        """The client within, with this one's batches and optimiser, which an algorithm may have replaced."""
        return dataclasses.replace(
            self.inner, **{field.name: getattr(self, field.name) for field in dataclasses.fields(Worker)}
        )

    def _whole(self, params: Params) -> Params:
        return stateful.join(self.kept[0], params)
