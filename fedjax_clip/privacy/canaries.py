"""Replays of a small training with canaries in it, as lanes of one compiled program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.keys import seeded
from fedjax_clip.core.tree import weighted_sum
from fedjax_clip.core.types import Algorithm, Array, Metrics, Params, PyTree
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.reduce import Reducer
from fedjax_clip.training.rounds import one_round
from fedjax_clip.training.state import init_state

HUGE = 1e4  # norm of a canary's gradient, far above any clip
EXAMPLES = 8  # of a canary; other clients have one, so that weighting would show
CANARIES = 4  # canaries in a trial with several; other trials use the first only
CHUNK = 1000  # replays in one call of the compiled program

Build = Callable[..., Algorithm]


class Trial(NamedTuple):
    """One pair of neighbouring runs.

    Attributes:
      name: in words.
      present: the canary's gradient where it is present, as a multiple of a unit vector.
      absent: the same where it is absent; ``None`` if the client does not exist then.
      quiet: whether all other clients send nothing, or do not exist if clients are drawn independently.
      contrast: weight of the second client's message against the canary's, if the attacker sees single messages.
      several: whether all canaries toss coins, not only the first.
    """

    name: str
    present: float
    absent: float | None
    quiet: bool = False
    contrast: float = 0.0
    several: bool = False


class Seen(NamedTuple):
    """The attacker's view of L replays of R rounds, and the truth.

    Attributes:
      present: bool ``[L, canaries]``, whether each canary was present.
      chance: ``[canaries, R]``, probability that a canary is drawn; 0 or 1 if its rounds are known.
      moved: ``[L, canaries, R]``, the model's move in each canary's direction.
      updates: ``[L, R, d]``, the whole move of the model, and that of the server's other public state.
      published: ``{name: [L, R]}``, metrics that are made public.
    """

    present: np.ndarray
    chance: np.ndarray
    moved: np.ndarray
    updates: np.ndarray
    published: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The training that is replayed.

    Attributes:
      build: ``(loss, client_tx, server_tx) -> Algorithm``; with ``reducer=`` where ``messages``.
      sampler, num_clients, rounds: of the training.
      params: of the model.
      published: names of metrics, each with a slash at its end; a name covers all metrics that begin with it.
      records: whether a canary is one record of its client.
      messages: whether the attacker sees every message; the canary is then in every round.
      replays: L.
      seed: of all draws.
    """

    build: Build
    sampler: Sampler
    num_clients: int
    rounds: int
    params: Params
    published: tuple[str, ...]
    records: bool
    messages: bool
    replays: int
    seed: int

    @functools.cached_property
    def canaries(self) -> int:
        """The number of canaries, which leaves some clients and directions for the others."""
        return 1 if self.messages else max(1, min(CANARIES, self.num_clients // 2, len(self.directions) // 2))

    @functools.cached_property
    def directions(self) -> np.ndarray:
        """``[d, d]`` orthogonal unit vectors, those of the canaries first."""
        size = sum(np.size(x) for x in jax.tree.leaves(self.params))
        return np.linalg.qr(np.random.default_rng(7).normal(size=(size, size)))[0].T

    @functools.cached_property
    def data(self) -> FederatedData:
        """Data with constant gradients of norm 1; the field ``canary`` marks those that a lane replaces."""
        sizes = np.where(np.arange(self.num_clients) < self.canaries, EXAMPLES, 1)
        client = np.repeat(np.arange(self.num_clients), sizes)
        free = max(1, len(self.directions) - self.canaries)
        slopes = self.directions[-1 - client % free]
        first = np.concatenate([[0], np.cumsum(sizes)])
        is_canary = client < self.canaries
        if self.records:  # the canary is one of its client's examples
            is_canary &= np.arange(len(client)) == first[client]
        examples = {"slope": slopes, "canary": np.where(is_canary, client, -1)}
        examples = {"slope": examples["slope"].astype(np.float32), "canary": examples["canary"].astype(np.int32)}
        return FederatedData(examples, first)

    @functools.cached_property
    def drawn(self) -> np.ndarray:
        """``[L, R, C]`` cohorts of each replay, -1 after the last client. All trials share them."""
        if self.messages:
            pair = np.arange(min(2, self.num_clients))
            return np.broadcast_to(pair, (self.replays, self.rounds, len(pair)))
        sizes, alike = np.ones(self.num_clients), self.sampler.scheme == "round_robin"
        seeds = (self.seed * 2**20 + np.arange(1 if alike else self.replays)) % 2**32
        drawn = [self.sampler.draw(sizes, int(seed), r) for seed in seeds for r in range(self.rounds)]
        padded = np.full((len(drawn), max(1, max(map(len, drawn)))), -1)
        for row, ids in zip(padded, drawn):
            row[: len(ids)] = ids
        return np.broadcast_to(padded.reshape(len(seeds), self.rounds, -1), (self.replays, self.rounds, len(padded[0])))

    @functools.cached_property
    def program(self) -> Callable[..., tuple[Array, Array, Metrics]]:
        """Compiles ``(gradients [canaries, d], others, contrast, cohorts [R], key) -> (moved, updates, published)``."""
        population = self.data.examples

        def one(gradients: Array, others: Array, contrast: Array, cohorts: Cohort, key: Array) -> Any:
            def loss(params: Params, batch: PyTree, key: Any) -> Array:
                number = batch["canary"]
                slopes = jnp.where(number[:, None] >= 0, gradients[number], others * batch["slope"])
                return -slopes @ flat(params)

            options: dict[str, Any] = {"reducer": read_by_server(contrast)} if self.messages else {}
            algorithm = self.build(loss, optax.sgd(1.0), optax.sgd(1.0), **options)

            def round(state: PyTree, cohort: Cohort) -> Any:
                after, metrics = one_round(algorithm.round, state, cohort, population, key)
                moves = [public(s[0]) for s in (state, after)]
                shown = {name: x for name, x in metrics.items() if f"{name}/".startswith(self.published)}
                return after, (moves[1][0] - moves[0][0], moves[1][1] - moves[0][1], shown)

            state = init_state(algorithm, self.params, self.num_clients)
            return jax.lax.scan(round, state, cohorts)[1]

        return jax.jit(jax.vmap(one))

    def replay(self, trial: Trial) -> Seen:
        """The attacker's view of a trial's replays; fair coins decide which canaries are present."""
        rng = np.random.default_rng([self.seed, *trial.name.encode()])
        present = rng.random((self.replays, self.canaries)) < 0.5
        times = np.where(present, trial.present, trial.absent or 0.0)
        if not trial.several:
            present[:, 1:], times[:, 1:] = False, 0.0
        directions = self.directions[: self.canaries]
        gradients = (times[:, :, None] * directions).astype(np.float32)
        keys = jax.random.split(jax.random.fold_in(seeded(self.seed), int(rng.integers(2**31))), self.replays)
        parts = []
        for begin in range(0, self.replays, CHUNK):
            chosen = np.minimum(np.arange(begin, begin + CHUNK), self.replays - 1)  # the last one fills up a call
            others = np.full(CHUNK, 0.0 if trial.quiet else 1.0, np.float32)
            contrast = np.full(CHUNK, trial.contrast, np.float32)
            cohorts = self._cohorts(self.drawn[chosen], trial, present[chosen])
            shown = self.program(gradients[chosen], others, contrast, cohorts, keys[chosen])
            parts.append(jax.tree.map(np.asarray, shown))
        joined = jax.tree.map(lambda *xs: np.concatenate(xs)[: self.replays].astype(np.float64), *parts)
        updates, beside, published = joined
        chance = np.array([(self.drawn == canary).any(-1).mean(0) for canary in range(self.canaries)])
        moved = np.einsum("lrd,cd->lcr", np.nan_to_num(updates, nan=0, posinf=0, neginf=0), directions)
        return Seen(present, chance, moved, np.concatenate([updates, beside], axis=-1), published)

    def _cohorts(self, ids: np.ndarray, trial: Trial, present: np.ndarray) -> Cohort:
        """The cohorts of a chunk's replays ``[L, R]``: each client takes one step on all of its examples."""
        canary = (ids >= 0) & (ids < self.canaries)
        if trial.absent is None and trial.quiet and self.sampler.scheme == "poisson":
            ids = np.where(canary, ids, -1)
        if trial.absent is None:
            there = np.take_along_axis(present[:, None, :], np.where(canary, ids, 0), axis=2)
            ids = np.where(canary & ~there, -1, ids)
        ids = np.take_along_axis(ids, np.argsort(ids < 0, axis=-1, kind="stable"), axis=-1)
        sizes = np.where(ids < 0, 0, self.data.sizes[ids])
        place = np.arange(EXAMPLES)
        weight = (place < sizes[..., None]).astype(np.float32)
        here = np.ones(ids.shape[:2])
        return Cohort(
            ids=ids.astype(np.int32),
            weight=sizes.astype(np.float32),
            first=np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int32), ids.shape),
            num_steps=(ids >= 0).astype(np.int32),
            batches=(self.data.offsets[ids][..., None] + place * (weight > 0)).astype(np.int32),
            example_weight=weight,
            num_clients=(here * self.num_clients).astype(np.int32),
            total_weight=(here * self.data.sizes.sum()).astype(np.float32),
            width=ids.shape[-1],
        )


def flat(params: PyTree) -> Array:
    """All numbers as one float32 vector."""
    leaves = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(params)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros(0, jnp.float32)


def public(server: Any) -> tuple[Array, Array]:
    """The model and the server's own state, which clients receive; the uplink's state stays secret."""
    model = flat(server.params)
    own = [x for x in jax.tree.leaves(getattr(server, "own", ())) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    beside = flat(own)
    return model, beside if beside.size <= 2 * model.size else beside[:0]


def read_by_server(contrast: Array) -> Reducer:
    """A reducer that reads messages: the canary's, and ``contrast`` times the next client's."""

    def zero(message, roster):
        ids = jnp.asarray(roster.ids)
        counts = jnp.where(ids == 0, 1.0, jnp.where(ids == 1, contrast, 0.0))
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), message)
        return total, counts, jnp.zeros((), jnp.int32)

    def add(acc, messages, weights):
        total, counts, place = acc
        here = jax.lax.dynamic_slice_in_dim(counts, place, len(weights))
        total = jax.tree.map(lambda t, m: t + weighted_sum(here, m.astype(jnp.float32)), total, messages)
        return total, counts, place + len(weights)

    def finish(acc, axis_name):
        return acc[0] if axis_name is None else jax.lax.psum(acc[0], axis_name)

    return Reducer(zero, add, finish, True, 1.0)
