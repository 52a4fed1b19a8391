"""A round cut at the wire: what the server sends, what a client does with it, what the server makes of the answers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.algorithms.base import kind
from fedjax_clip.algorithms.sides import AtClient, AtServer, Cut, Sent
from fedjax_clip.core import keys
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.types import Algorithm, Array, ClientState, InvalidInput, Metrics, Params, PyTree, Server
from fedjax_clip.uplink import Noise


@dataclasses.dataclass(frozen=True)
class Population:
    """What server and clients know of all clients together.

    Attributes:
      num_clients: N.
      total_weight: the sum of all clients' weights: of the numbers of their examples, or of example weights.

    Example:
      >>> fc.deploy.Population(data.num_clients, float(data.client_weights.sum()))
    """

    num_clients: int
    total_weight: float


class Halves:
    """``algorithm.round`` in three functions that server and clients run in programs of their own.

    ``shared = begin(server)`` at the server; ``sent, state = work(...)`` at each client; ``server, metrics =
    finish(server, ids, sent)`` at the server. All random numbers are those of ``fc.train``: functions of (seed, round,
    client number). So the parameters are ``fc.train``'s on the same cohorts, up to rounding: to the bit where
    sums have no order (``exact_mean``, integer grids) and XLA rounds both programs alike.

    Args:
      algorithm: one with a single exchange a round; its links send arrays, or codes of ``fc.uplink.compress``.
      population: of all clients.
      seed: of ``fc.train``.

    Raises:
      InvalidInput: an algorithm that asks its clients twice, begins with all of them, or compresses its broadcast.

    Example:
      >>> halves = fc.deploy.Halves(algorithm, fc.deploy.Population(54, 1617.0), seed=0)
      >>> sorted(halves.begin(algorithm.init(params)))  # FedAvg's clients are sent the parameters
      ['b', 'w']
    """

    def __init__(self, algorithm: Algorithm, population: Population, seed: int = 0):
        if algorithm.start is not None or algorithm.parts is None:
            raise InvalidInput(
                f"{algorithm.name or 'This algorithm'} queries all clients before round 1, and a deployed round is "
                "one trip to the clients and back: take fedavg, fedsgd or scaffold."
            )
        if kind(algorithm).startswith("compressed_broadcast"):
            raise InvalidInput(
                "A deployed server sends the parameters as they are, not the code of its broadcast: leave "
                "compressed_broadcast out."
            )
        self.algorithm, self.population, self.seed = algorithm, population, seed
        self.opened: Any = None  # of the clients' messages, known once ``work`` is traced
        self.begin = jax.jit(self._begin)
        self.finish = jax.jit(self._finish)

    def work(
        self,
        server: Server,
        shared: PyTree,
        batches: PyTree,
        example_weight: Array,
        state: ClientState,
        client: tuple[Array, Array, Array],
        key: Array,
        secret: Array | None = None,
    ) -> tuple[Sent, ClientState]:
        """A client's half; traced, and exported.

        Args:
          server: of which a client reads what its links need, such as a clip's bound, and the round's number.
          shared: what the server sends.
          batches: pytree ``[T, B, ...]``.
          example_weight: float32 ``[T, B]``.
          state: what the client keeps.
          client: its number int32, weight float32, and number of steps int32.
          key: of the run, uint32 ``[2]``.
          secret: the client's own, uint32 ``[8]``, from which it draws its noise and all else; the run's key by
            default.

        Returns:
          ``(sent, state)``. The new state holds if the server counts the message.
        """
        number, weight, num_steps = (jnp.asarray(x)[None] for x in client)
        cohort = Cohort(
            ids=number,
            weight=weight,
            first=jnp.zeros(1, jnp.int32),
            num_steps=num_steps,
            batches=batches,
            example_weight=example_weight,
            state=jax.tree.map(lambda x: x[None], state),
            side=AtClient(shared, functools.partial(setattr, self, "opened")),
            secret=secret,
            **self._everyone(),
        )
        return self._cut(server, cohort, key)

    def _begin(self, server: Server) -> PyTree:
        return self._cut(server, self._cohort(jnp.full(2, -1, jnp.int32), AtServer()), self.key)

    def _finish(self, server: Server, ids: Array, sent: Sent) -> tuple[Server, Metrics]:
        cohort = self._cohort(ids, AtServer(sent, self.opened))
        server, _, metrics = self.algorithm.round(server, cohort, self.key)
        return server, metrics

    def shapes(self, params: Params, examples: PyTree, batch_size: int) -> Sent:
        """The shapes and types of what a client sends; it also learns how the server opens a message.

        Args:
          params: initial parameters.
          examples: pytree of arrays ``[n, ...]`` like a client's.
          batch_size: B.
        """
        server = jax.eval_shape(self.algorithm.init, params)
        batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, batch_size, *x.shape[1:]), device_type(x)), examples)
        client = tuple(jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32))
        sent, _ = jax.eval_shape(
            self.work,
            *(server, jax.eval_shape(self.begin, server), batches),
            jax.ShapeDtypeStruct((2, batch_size), jnp.float32),
            jax.eval_shape(self.algorithm.init_client, params),
            client,
            jax.ShapeDtypeStruct((2,), jnp.uint32),
        )
        return sent

    @property
    def quiet(self) -> bool:
        """Whether the clients' noise or a secure sum hides each client, which then tells no metrics of its own."""
        parts = self.algorithm.parts
        return bool(parts.reducer.hides) or parts.uplink.promises.noise in (Noise.CLIENT, Noise.SHARES)

    def told(self, sent: Sent) -> list[int]:
        """Places of the leaves of ``[weight, report]`` that travel: whether the message counts, if clients are quiet.

        What clients report besides moves nothing that a server keeps under noise or a secure sum.

        Args:
          sent: of one client; only its form matters.
        """
        report = [("weight",), *(path for path, _ in jax.tree.leaves_with_path(sent.report))]
        counts = {("weight",), (jax.tree_util.DictKey("clients"),)}
        return [place for place, path in enumerate(report) if not self.quiet or path in counts]

    def check_bytes(self, sent: Sent) -> None:
        """Refuses links whose reported bytes nothing here can write.

        Raises:
          InvalidInput: such a link.
        """
        if sent.report["sent"][0] is not None and self.opened is None:
            raise InvalidInput(
                "The uplink counts other bytes than those of its message, and does not say what travels: end it on "
                "compress or error_feedback of a compressor, or on a grid, or give a link of your own Message.packed."
            )

    @property
    def key(self) -> Array:
        """The run's key."""
        return keys.seeded(self.seed)

    def _cut(self, server: Server, cohort: Cohort, key: Array) -> Any:
        try:
            self.algorithm.round(server, cohort, key)
        except Cut as cut:
            return cut.made
        raise InvalidInput("The algorithm's round makes no exchange with its clients.")

    def _cohort(self, ids: Array, side: AtServer) -> Cohort:
        """The clients of a round as the server knows them: by number."""
        none = np.zeros(len(ids), np.int32)
        return Cohort(
            *(ids, none.astype(np.float32), none, none, (), np.zeros((2, 1), np.float32)), side=side, **self._everyone()
        )

    def _everyone(self) -> dict[str, Any]:
        return {
            "num_clients": jnp.int32(self.population.num_clients),
            "total_weight": jnp.float32(self.population.total_weight),
        }


def device_type(x: Any) -> Any:
    """The type that an array has on a device."""
    return jax.dtypes.canonicalize_dtype(x.dtype)
