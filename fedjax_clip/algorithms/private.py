"""Partial personalisation: a part of the model that never leaves its client."""

import re

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.algorithms.base import init_server, parts, step_server
from fedjax_clip.algorithms.exchange import exchange
from fedjax_clip.core import tree
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.core.types import Algorithm, ClientState, ClientTx, InvalidInput, PerExampleLoss
from fedjax_clip.local.steps import at_round, local_steps
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink.base import Uplink


def partially_private(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    server_tx: optax.GradientTransformation | None = None,
    *,
    private: str,
    uplink: Uplink | None = None,
    reducer: Reducer | None = None,
    gradient: Gradient = batch_gradient,
) -> Algorithm:
    """FedAvg of the shared parameters u; each client keeps its own v_i, which it never sends.

    Round: client i takes its local steps on ``(u, v_i)`` together to ``(u_i, v_i')``, keeps ``v_i'`` and sends
    ``u_i - u``. So are user factors of a recommender trained, or a head of one's own (FedPer).
    Clips in ``client_tx`` see both parts, as one gradient; the uplink, the reducer and the server's optimiser see u.

    Args:
      per_example_loss, client_tx, server_tx, uplink, reducer, gradient: as ``fc.fedavg``; the loss takes all
        parameters.
      private: regular expression, found in the names of the private leaves (``"params/Dense_1/kernel"``).

    Returns:
      An ``Algorithm`` whose clients keep v_i. The server's private leaves stay what they were at first: what a client
      that never trained begins with. ``algorithm.personal(params, state)`` is a client's model; see
      ``fc.extend.client_evaluator``.

    Raises:
      InvalidInput: no regular expression, or (when a run begins) one that is found in no leaf or in all of them.

    Example:
      >>> algorithm = fc.partially_private(per_example_loss, optax.sgd(0.1), private="^user")

    Source: Pillutla et al. (2022), "Federated Learning with Partial Model Personalization", FedSim; Arivazhagan et al.
    (2019), "Federated Learning with Personalization Layers".
    """
    try:
        re.compile(private)
    except (re.error, TypeError) as error:
        raise InvalidInput(f"private: {private!r} is not a regular expression: {error}.") from error
    built = parts(client_tx, server_tx, uplink, reducer, only_update=True, gradient=gradient)

    def split(params):
        own, shared = tree.split(params, private)
        if not jax.tree.leaves(own) or not jax.tree.leaves(shared):
            names = ", ".join(name for name, _ in tree.named_leaves(params))
            raise InvalidInput(
                f"private={private!r} must be found in some of the parameters, not none or all: {names}."
            )
        return own, shared

    def init(params):
        return init_server(split(params)[1], built)._replace(params=tree.as_arrays(params))

    def init_client(params):
        own, shared = split(params)
        return ClientState(own, built.uplink.init_client(shared))

    def round(server, cohort, key):
        tx, key = at_round(client_tx, server.round), jax.random.fold_in(key, server.round)
        untouched, u = split(server.params)

        def client_fn(u, client, key):
            x = tree.join(client.state.own, u)
            y, _, _, report = local_steps(per_example_loss, tx, x, client, key, gradient=gradient)
            own, shared = split(y)
            return jax.tree.map(jnp.subtract, shared, u), own, report

        update, link, client_states, metrics = exchange(
            client_fn, built.uplink, built.reducer, u, server.uplink, cohort, key
        )
        server = step_server(server._replace(params=u), built, update, link)
        return server._replace(params=tree.join(untouched, server.params)), client_states, metrics

    def personal(params, state):
        return tree.join(state.own, split(params)[1])

    return Algorithm(
        init,
        init_client,
        round,
        personal,
        broadcasts=False,
        population=built.population,
        parts=built,
        loss=per_example_loss,
    )
