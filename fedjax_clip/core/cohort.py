"""The clients of one round on one device, as arrays."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.core.loops import Loops, packing
from fedjax_clip.core.resident import Resident
from fedjax_clip.core.types import Array, Batch, ClientState, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "ids",
        "weight",
        "first",
        "num_steps",
        "batches",
        "example_weight",
        "state",
        "population",
        "staleness",
        "num_clients",
        "total_weight",
        "secret",
    ],
    meta_fields=["axis_name", "width", "most_steps", "non_finite", "around", "side", "in_step", "loops"],
)
@dataclasses.dataclass(frozen=True)
class Cohort:
    """C clients whose T batches lie back to back, without padding to the longest client.

    Client ``c``'s step ``i`` reads row ``first[c] + i``. Empty slots have id -1 and come last. Empty slots, rows that
    no client reads and examples of weight 0 may hold any values.

    Attributes:
      ids: int32 ``[C]`` client numbers.
      weight: float32 ``[C]`` weight of each client in an average: the sum of its example weights.
      first: int32 ``[C]`` first row of each client.
      num_steps: int32 ``[C]`` rows of each client.
      batches: pytree of ``[T, B, ...]``, or int32 ``[T, B]`` example numbers if there is a ``population``.
      example_weight: float32 ``[T, B]``, 0 where a batch is padded.
      state: pytree of ``[C, ...]``: the clients' states between rounds.
      population: the examples that live on the device, a ``Resident`` or a pytree of ``[N, ...]``, or ``None``.
      staleness: int32 ``[C]`` rounds since each client was sent its parameters; ``None`` if no client is stale.
      num_clients: int32 scalar, N, the number of clients in the whole population.
      total_weight: float32 scalar, the sum of all N clients' weights.
      secret: the words uint32 ``[8]`` of a ChaCha20 key, or such a key: the source of randomness for clients and links.
        It replaces the round's key, which anybody can compute; ``None`` takes the round's key.
      axis_name: the mapped axis over which cohorts of several devices are reduced, or ``None``.
      width: number of clients that a device trains at once; divides C.
      most_steps: if given, loops have this fixed length instead of ending with the last step; see ``differentiable``.
      non_finite: what happens to updates with a NaN or an infinity: ``"drop"``, ``"keep"`` or ``"stop"``; see
        ``fc.train``.
      around: ``client_fn -> client_fn``, a wrapper around each client's work, which ``fc.partially_frozen`` and
        ``fc.partially_private`` set inside a round; ``None`` without wrappers.
      side: the side of the wire on which the round runs, if it is cut there (``algorithms/sides.py``); ``None`` if
        server and clients are one program.
      in_step: whether all devices of the mapped axis take equally many turns of each loop. A model that is split over
        devices needs it, because they exchange parts of it in each turn.
      loops: how the loops of a round are compiled, which does not change its results.

    Example:
      >>> ids = np.array([3, 1, 4])
      >>> cohort = fc.extend.plan(data, ids, fc.extend.LocalWork(20), seed=0, round=0)  # a leading axis of devices
      >>> one = jax.tree.map(lambda x: x[0], cohort)
    """

    ids: Array | np.ndarray
    weight: Array | np.ndarray
    first: Array | np.ndarray
    num_steps: Array | np.ndarray
    batches: PyTree
    example_weight: Array | np.ndarray
    state: PyTree = ClientState((), ())  # noqa: RUF009 (it is immutable)
    population: PyTree | None = None
    staleness: Array | np.ndarray | None = None
    num_clients: Array | np.ndarray | None = None
    total_weight: Array | np.ndarray | None = None
    secret: Array | np.ndarray | None = None
    axis_name: str | None = None
    width: int = 1
    most_steps: int | None = None
    non_finite: str = "drop"
    around: Callable[[Callable], Callable] | None = None
    side: Any = None
    in_step: bool = False
    loops: Loops = Loops()  # noqa: RUF009 (it is immutable)

    def differentiable(self) -> "Cohort":
        """The same clients in loops of a fixed length, so that ``jax.grad`` can differentiate a round.

        Every client then takes as long as the longest one. It is for hyper-gradients, not for training. Call it before
        ``jax.jit``, while the cohort is NumPy arrays.

        Example:
          >>> fixed = cohort.differentiable()
          >>> def loss_after_a_round(lr):
          ...   algorithm = fc.fedavg(per_example_loss, optax.sgd(lr))
          ...   server, _, _ = algorithm.round(algorithm.init(params), fixed, key)
          ...   return per_example_loss(server.params, held_out.examples, None)[0].mean()
          >>> bool(jax.grad(loss_after_a_round)(0.1) < 0)  # a larger rate would be better
          True
        """
        return dataclasses.replace(self, most_steps=int(np.max(self.num_steps, initial=0)))

    @property
    def buckets(self) -> tuple[tuple[int, int | None], ...]:
        """``((chunks, steps), ...)`` of the loops over clients, ``None`` for steps that are not known."""
        return self.loops.buckets or ((len(self.ids) // self.width, self.most_steps),)

    def loop(
        self,
        body: Callable[[Array, PyTree], PyTree],
        carry: PyTree,
        count: Array | np.int32 | int,
        most: int,
        live: Array | None = None,
    ) -> PyTree:
        """``carry = body(i, carry)`` for ``i < count``, which is at most ``most``; differentiable if the cohort is.

        Turns from ``live`` on, for other devices' sake or because the length is known, change nothing.
        """
        pack, unpack = packing(carry) if self.loops.packed else (lambda x: x, lambda x: x)

        def turn(i: Array, old: PyTree) -> PyTree:
            new = pack(body(i, unpack(old)))
            return new if live is None else optax.tree.where(i < live, new, old)

        def or_not(old: PyTree, i: Array) -> tuple[PyTree, None]:
            return jax.lax.cond(i < count, lambda c: turn(i, c), lambda c: c, old), None

        if self.most_steps is None:
            return unpack(jax.lax.fori_loop(0, np.int32(count) if type(count) is int else count, turn, pack(carry)))
        return unpack(jax.lax.scan(or_not, pack(carry), jnp.arange(most, dtype=jnp.int32))[0])

    def everywhere(self, count: Array) -> Array:
        """The turns of a loop with ``count`` turns here: the most of all devices, if they go in step."""
        return jax.lax.pmax(count, self.axis_name) if self.in_step else count

    def gathered(self, x: Array) -> Array:
        """``[C, ...]`` of this device's clients as ``[D C, ...]`` of all devices'."""
        return x if self.axis_name is None else jax.lax.all_gather(x, self.axis_name, tiled=True)

    def clients(self, start: Array) -> tuple[Array, ...]:
        """``(id, weight, first, num_steps, state, staleness)`` of the ``width`` clients from slot ``start``."""
        fields = (self.ids, self.weight, self.first, self.num_steps, self.state, self.staleness)
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, self.width), fields)

    def read(self, row: Array) -> tuple[Batch, Array]:
        """One batch ``[B, ...]`` and its example weights ``[B]``.

        Padding is replaced by copies of the batch's first example, so that neither a loss nor its gradient sees the
        padding's values.
        """
        weight, batch = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, row, keepdims=False), (self.example_weight, self.batches)
        )
        live = weight > 0
        if self.population is not None:
            index = jnp.where(live, batch, batch[0])
            # Rows even of plain examples: otherwise XLA on a CPU may lay them out for a convolution, float by float.
            return Resident.of(self.population)[index], jnp.where(live, weight, 0)

        def fill(x: Array) -> Array:
            return jnp.where(live.reshape(live.shape + (1,) * (x.ndim - 1)), x, x[:1])

        return jax.tree.map(fill, batch), jnp.where(live, weight, 0)


@dataclasses.dataclass(frozen=True)
class Client:
    """One client as an algorithm sees it: ``batch(i)`` for ``i < num_steps``, ``loop``, and no storage.

    Attributes:
      id: int32 scalar, its number.
      weight: float32 scalar, its weight in an average.
      first: int32 scalar, its first row in the cohort.
      num_steps: int32 scalar, the number of its batches.
      state: its ``ClientState`` between rounds.
      cohort: the cohort that holds its batches.
      most: the number of turns of its loop, at least ``num_steps``, if that is known when the round is compiled.
      cycle: int32 scalar, after how many steps its batches begin again; ``None`` if they do not.

    Example:
      >>> def client_fn(params, client, key):  # sends the sum of its examples' weights
      ...   total = client.loop(lambda i, total: total + jnp.sum(client.batch(i)[1]), 0.0)
      ...   return total, client.state.own, {}
    """

    id: Array
    weight: Array
    first: Array
    num_steps: Array
    state: PyTree
    staleness: Array
    cohort: Cohort
    most: int | None = dataclasses.field(default=None, kw_only=True)
    cycle: Array | None = dataclasses.field(default=None, kw_only=True)

    def batch(self, step: Array) -> tuple[Batch, Array]:
        """The batch ``[B, ...]`` of a local step and its example weights ``[B]`` (0 where padded)."""
        return self.cohort.read(self.first + (step if self.cycle is None else step % jnp.maximum(self.cycle, 1)))

    def only(self, steps: int) -> "Client":
        """This client with its first ``steps`` batches."""
        most = None if self.most is None else min(self.most, steps)
        return dataclasses.replace(self, num_steps=jnp.minimum(self.num_steps, steps), most=most)

    def after(self, steps: int) -> "Client":
        """This client without its first ``steps`` batches."""
        skipped = jnp.minimum(self.num_steps, steps)
        most = None if self.most is None else max(self.most - steps, 0)
        return dataclasses.replace(self, first=self.first + skipped, num_steps=self.num_steps - skipped, most=most)

    def repeated(self, passes: int) -> Self:
        """This client with its batches ``passes`` times over, in the same order."""
        most = None if self.most is None else self.most * passes
        return dataclasses.replace(self, num_steps=self.num_steps * passes, most=most, cycle=self.num_steps)

    def loop(self, body: Callable[[Array, PyTree], PyTree], carry: PyTree) -> PyTree:
        """``carry = body(i, carry)`` for each local step i."""
        turns: Array | np.int32 = self.num_steps
        live = None
        if self.most is not None and self.cohort.most_steps is None:
            turns, live = np.int32(self.most), self.num_steps
        elif self.cohort.in_step:
            turns, live = self.cohort.everywhere(self.num_steps), self.num_steps
        return self.cohort.loop(body, carry, turns, self.most or 0, live)
