"""Partial personalisation: a part of the model that never leaves its client."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fedjax_clip.algorithms.base import kind
from fedjax_clip.algorithms.wrapping import around, check_made, split_by
from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Algorithm, InvalidInput, Params, PyTree
from fedjax_clip.local.worker import Worker


def partially_private(algorithm: Algorithm, private: str) -> Algorithm:
    """Any algorithm for shared parameters u; each client keeps its own v_i, which it never sends.

    Client i takes its local steps on ``(u, v_i)`` together to ``(u_i, v_i')`` and keeps ``v_i'``; the algorithm sees
    ``u_i`` alone. This trains user factors of a recommender, or a personal head (FedPer). Clips in ``client_tx`` see
    both parts, as one gradient. The algorithm's corrections, the uplink, the reducer and the server's optimiser see u.
    Gradients that clients take for the server are those in u, at ``(u, v_i)``.

    Args:
      algorithm: any made by ``fc.fedavg`` and its like or by ``fc.extend.algorithm``, of the whole model's loss.
      private: regular expression, found in the names of the private leaves (``"params/Dense_1/kernel"``).

    Returns:
      An ``Algorithm`` whose clients keep v_i, in ``ClientState.private``. The server's private leaves keep their
      initial values, with which a new client begins. ``algorithm.personal(params, state)`` is a client's model; see
      ``fc.evaluator``.

    Raises:
      InvalidInput: no such algorithm, one that is partially private already, no regular expression, or (when a run
        begins) one that is found in no leaf or in all of them; an optimiser's state that clients keep.

    Example:
      >>> algorithm = fc.partially_private(fc.fedavg(per_example_loss, optax.sgd(0.1)), "^user")

    Source: Pillutla et al. (2022), "Federated Learning with Partial Model Personalization", FedSim; Arivazhagan et al.
    (2019), "Federated Learning with Personalization Layers".
    """
    return owned(algorithm, "partially_private", "private", private, Owner)


def owned(algorithm: Algorithm, wrapper: str, argument: str, pattern: str, owner: Callable[..., "Owner"]) -> Algorithm:
    """The algorithm for u, whose clients are ``owner(**client, pattern=, kept=)`` and keep what the pattern names.

    Args:
      algorithm: of the whole model's loss.
      wrapper, argument: names of the function and of its pattern, for errors.
      pattern: regular expression of the private leaves.
      owner: how a client trains both parts.
    """
    check_made(wrapper, algorithm)
    checks.pattern(argument, pattern)
    if algorithm.personal is not None:
        raise InvalidInput(
            f"{wrapper}: the algorithm's clients have models of their own already. Of a partially private one, join "
            "the two patterns by '|' and wrap it once; of any other, leave the wrapper out."
        )

    def split(params):
        return split_by(argument, pattern, params)

    def init(params):
        return algorithm.init(split(params)[1])._replace(params=tree.as_arrays(params))

    def init_client(params):
        own, shared = split(params)
        return algorithm.init_client(shared)._replace(private=own)

    def with_private(client_fn):
        def work(shared, client, key):
            plain = {field.name: getattr(client, field.name) for field in dataclasses.fields(client)}
            own = owner(**plain, pattern=pattern, kept=[client.state.private])
            return *client_fn(shared, own, key), own.kept[0]

        return work

    def inside(run):
        def round(server, cohort, key):
            first, u = split(server.params)
            after, clients, metrics = run(server._replace(params=u), around(cohort, with_private), key)
            return after._replace(params=tree.join(first, after.params)), clients, metrics

        return round

    def personal(params, state):
        return tree.join(state.private, split(params)[1])

    return algorithm._replace(
        init=init,
        init_client=init_client,
        round=inside(algorithm.round),
        start=inside(algorithm.start) if algorithm.start else None,
        personal=personal,
        broadcasts=False,
        name=f"{wrapper}({kind(algorithm)})",
    )


@dataclasses.dataclass(frozen=True)
class Owner(Worker):
    """A client that trains its own v together with the shared parameters, under any algorithm.

    A client function sees only u and does not return v. So a method leaves its new v in ``kept``, a list of one, while
    the function is traced, and ``with_private`` takes it from there.
    """

    pattern: str
    kept: list[PyTree]

    def local_steps(
        self, params: Params, key: Any, *, adjust: Any = None, opt_state: Any = None, collect: bool = False
    ) -> Any:
        if opt_state is not None:
            raise InvalidInput(
                "The algorithm's clients keep the state of their optimiser, which is of the shared parameters, and "
                "local steps are on the private ones, too: leave keep_opt_state out."
            )

        def of_shared(g, y, step):
            own, shared = self._split(g)
            return tree.join(own, adjust(shared, self._split(y)[1], step))

        x = tree.join(self.kept[0], params)
        y, opt_state, mean, report = super().local_steps(
            x, key, adjust=None if adjust is None else of_shared, collect=collect
        )
        self.kept[0], shared = self._split(y)
        return shared, opt_state, self._split(mean)[1] if collect else mean, report

    def gradient(self, params: Params, step: Any, key: Any) -> PyTree:
        return self._split(super().gradient(tree.join(self.kept[0], params), step, key))[1]

    def full_gradient(self, params: Params, key: Any) -> Any:
        g, report = super().full_gradient(tree.join(self.kept[0], params), key)
        return self._split(g)[1], report

    def mean_loss(self, params: Params, key: Any) -> Any:
        return super().mean_loss(tree.join(self.kept[0], params), key)

    def full_step(self, params: Params, key: Any) -> Any:
        update, report = super().full_step(tree.join(self.kept[0], params), key)
        own, shared = self._split(update)
        self.kept[0] = tree.apply_updates(self.kept[0], own)
        return shared, report

    def _split(self, params: Params) -> tuple[PyTree, PyTree]:
        return tree.split(params, self.pattern)
