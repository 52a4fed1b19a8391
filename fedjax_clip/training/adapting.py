"""Models of their own for new clients: half a round against a server that stays, and fine-tuning."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.algorithms.base import Round, kind
from fedjax_clip.algorithms.base import algorithm as made
from fedjax_clip.algorithms.sides import Cut, Unheard
from fedjax_clip.algorithms.wrapping import split_by
from fedjax_clip.core import checks, keys, tree
from fedjax_clip.core.types import Algorithm, ClientTx, InvalidInput, Params, PerExampleLoss, PyTree, Server
from fedjax_clip.data.planning import LocalWork, plan
from fedjax_clip.data.population import FederatedData
from fedjax_clip.training.evaluation import evaluator
from fedjax_clip.training.scores import Values
from fedjax_clip.training.state import client_states
from fedjax_clip.training.states import InMemory

TOGETHER = 64  # clients whose batches are laid out at once


def adapt(
    algorithm: Algorithm,
    server: Server,
    data: FederatedData,
    *,
    rounds: int = 1,
    batch_size: int | None = 20,
    local_epochs: int = 1,
    local_steps: int | None = None,
    seed: int = 0,
) -> PyTree:
    """The states of new clients, after their own half of some rounds against a server that stays as it is.

    Each client takes the server's message, works as in a round of ``algorithm``, and keeps what it would keep; nobody
    hears its message. So a new client of Ditto trains its own model, one of FedRep its head, one of IFCA chooses a
    cluster. A client whose work is not finite keeps the state in which it began.

    Args:
      algorithm: whose clients have models of their own.
      server: the trained one, ``result.state.server``.
      data: the new clients' examples.
      rounds: how often each client takes part.
      batch_size, local_epochs, local_steps: of a round, as ``fc.train``.
      seed: of the clients' batches, and of what is random in their work.

    Returns:
      ``ClientState`` of host arrays ``[M, ...]``, M the new clients: ``algorithm.personal(params, state)`` is the model
      of one, and ``fc.evaluator(..., algorithm=algorithm, population=data)`` evaluates all.

    Raises:
      InvalidInput: an algorithm whose clients all use the server's model; a number that is no count.

    Example:
      >>> ditto = fc.personal.ditto(per_example_loss, client_tx, strength=0.1)
      >>> server = fc.train(ditto, data, params, rounds=2, cohort_size=10).state.server
      >>> seen, unseen = held_out_clients.split_examples(0.5)
      >>> states = fc.personal.adapt(ditto, server, seen, rounds=3)
      >>> evaluate = fc.evaluator(per_example_loss, {"unseen": unseen}, algorithm=ditto, population=seen)
      >>> sorted(evaluate(server.params, states))
      ['unseen/accuracy', 'unseen/loss']
    """
    checks.kind("algorithm", algorithm, Algorithm, "one such as fc.personal.ditto(...)")
    checks.kind("server", server, Server, "a trained one, such as result.state.server")
    checks.kind("data", data, FederatedData, "the FederatedData of the new clients")
    if algorithm.personal is None:
        raise InvalidInput(
            f"The clients of {kind(algorithm)} use the server's model, which needs no adapting: take "
            "fc.personal.fine_tune to train it on each client's data."
        )
    rounds = checks.count("rounds", rounds)
    work = LocalWork(batch_size, 1 if local_steps is not None else local_epochs, local_steps)
    params = jax.tree.map(jnp.asarray, server.params)
    states = InMemory(client_states(algorithm, params, data.num_clients))

    @jax.jit
    def half(server, cohort, key):
        try:
            algorithm.round(server, dataclasses.replace(cohort, side=Unheard()), key)
        except Cut as cut:
            return cut.made
        raise InvalidInput("The algorithm's round makes no exchange with its clients.")

    for round in range(rounds):
        key = jax.random.fold_in(keys.seeded(seed), round)
        for first in range(0, data.num_clients, TOGETHER):
            ids = np.arange(first, min(first + TOGETHER, data.num_clients))
            cohort = plan(data, ids, work, seed=seed, round=round, state=states.tree)
            alone = jax.tree.map(lambda x: x[0], cohort)  # of one device
            states.scatter(alone.ids, jax.tree.map(np.asarray, half(server, alone, key)))
    return states.tree


class FineTuned(NamedTuple):
    """The models of clients that fine-tuned one, and what that brought them.

    Attributes:
      clients: int ``[C]``, numbers of those clients that have an example to be judged by.
      before: ``{"loss": float64[C], name: float64[C]}``, means over each client's judged examples by the model given.
      after: the same by the client's own model.
      models: pytree of ``[M, ...]``, the model of every client.

    Example:
      >>> tuned = fc.personal.fine_tune(per_example_loss, optax.sgd(0.1), params, held_out_clients, steps=20)
      >>> bool((tuned.after["loss"] < tuned.before["loss"]).mean() > 0.5)
      True
    """

    clients: np.ndarray
    before: Values
    after: Values
    models: PyTree


def fine_tune(
    per_example_loss: PerExampleLoss,
    client_tx: ClientTx,
    params: Params,
    data: FederatedData,
    *,
    steps: int,
    held_out: float = 0.5,
    part: str | None = None,
    batch_size: int | None = 20,
    seed: int = 0,
) -> FineTuned:
    """Fine-tunes a model at each client on some of its examples, and judges it on the others, before and after.

    Each client's examples are split in two, as a function of (seed, client) alone; ``steps`` local steps train on one
    part, and no step sees the other. Nothing is sent. This is how Per-FedAvg, Reptile and FedBABU serve a client, and
    the baseline for all others.

    Args:
      per_example_loss, client_tx: as ``fc.fedavg``; the optimiser is fresh at each client.
      params: the model, such as ``result.params``.
      data: clients, held out of training or not.
      steps: local steps of each client.
      held_out: the share of a client's examples that judge; a client of one example has none.
      part: regular expression, found in the names of the leaves to train (``"params/Dense_1"``); all by default.
      batch_size: examples in a step; ``None`` takes all of a client's.
      seed: of the split, of the batches, and of what is random in the steps.

    Returns:
      A ``FineTuned``: ``before`` and ``after`` by client, and the models.

    Raises:
      InvalidInput: a number that is no count, a share outside (0, 1), a part that is found in no leaf or in all.

    Example:
      >>> tuned = fc.personal.fine_tune(per_example_loss, client_tx, params, held_out_clients, steps=5)
      >>> gained = tuned.after["accuracy"] - tuned.before["accuracy"]  # of each client

    Source: Yu, Bagdasaryan and Shmatikov (2020), "Salvaging Federated Learning by Local Adaptation".
    """
    if part is not None:
        checks.pattern("part", part)

    def split(params: Params) -> tuple[Any, Any]:
        return (params, None) if part is None else split_by("part", part, params)

    def joined(own: Any, rest: Any) -> Params:
        return own if rest is None else tree.join(own, rest)

    def round(now: Round):
        own, rest = split(now.server.params)

        def client_fn(x, client, key):
            whole = client.per_example_loss
            training = dataclasses.replace(
                client, per_example_loss=lambda v, batch, key: whole(joined(v, rest), batch, key)
            )
            v, _, _, report = training.local_steps(own, key)
            return optax.tree.zeros_like(x), joined(v, rest), report

        return now.step(now.exchange(client_fn, now.server.params))

    tuning = made(
        *(round, per_example_loss, client_tx),
        client_own=tree.as_arrays,
        personal=lambda params, own: own,
        name="fine_tune",
    )
    train, judged = data.split_examples(held_out, seed)
    server = tuning.init(params)
    states = adapt(tuning, server, train, batch_size=batch_size, local_steps=steps, seed=seed)
    sets = {"judged": judged}
    before = evaluator(per_example_loss, sets).per_client(params)
    after = evaluator(per_example_loss, sets, algorithm=tuning, population=train).per_client(params, states)
    number = {train.name(c): c for c in range(train.num_clients)}
    clients = np.array([number[judged.name(c)] for c in range(judged.num_clients)])
    before, after = ({name.partition("/")[2]: x for name, x in scores.items()} for scores in (before, after))
    return FineTuned(clients, before, after, states.own)
