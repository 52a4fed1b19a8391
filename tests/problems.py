"""Small federated problems, and the entries over which the law suite runs."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from compiling import OPTIMIZED

import fedjax_clip as fc
from fedjax_clip.core.metrics import Mean
from fedjax_clip.training import loop
from fedjax_clip.training.placement import first_replica, pmap_rounds, replicate
from fedjax_clip.training.states import InMemory
from fedjax_clip.uplink.base import Uplink

EVERYTHING = os.environ.get("FEDJAX_CLIP_STRICT") == "all"  # make strict: what by default is shared or sampled, whole
SIZES = (3, 9, 1, 5, 12, 4)
SEED = 3


def population(sizes=SIZES, features=4, classes=3, seed=0) -> fc.FederatedData:
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    x = rng.normal(size=(total, features)).astype(np.float32)
    y = rng.integers(classes, size=total).astype(np.int32)
    return fc.FederatedData({"x": x, "y": y}, np.concatenate([[0], np.cumsum(sizes)]))


def parameters(features=4, classes=3, seed=1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(features, classes)).astype(np.float32), "b": np.zeros(classes, np.float32)}


def softmax_loss(params, batch, key):
    logits = batch["x"] @ params["w"] + params["b"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}


def calibrated_loss(params, batch, key):
    logits = fc.drift.calibrated(batch["x"] @ params["w"] + params["b"], batch)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}


def penalised_loss(params, batch, key):
    """A loss whose gradient has every direction of w; a softmax's lacks one, and FedMuon would fill it with rounding."""
    losses, values = softmax_loss(params, batch, key)
    return losses + 0.5 * jnp.sum(jnp.square(params["w"])), values


def noisy_loss(params, batch, key):
    """A loss that draws random numbers: dropout on the inputs."""
    keep = jax.random.bernoulli(key, 0.8, batch["x"].shape)
    return softmax_loss(params, {**batch, "x": batch["x"] * keep / 0.8}, key)


def centred_loss(params, batch, weights, key):
    """Logits less their mean over the batch, whose running mean is the state b."""
    logits, b = batch["x"] @ params["w"], params["b"]
    if weights is not None:
        real = (weights > 0).astype(logits.dtype)
        mean = real @ logits / jnp.maximum(real.sum(), 1)
        b, logits = 0.9 * b + 0.1 * mean, logits - mean
    else:
        logits = logits - b
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}, {**params, "b": b}


stateful_loss = fc.local.with_state(centred_loss, state="^b$")


def leaky_error_feedback(bound: float) -> Uplink:
    """A made-up link with everything a link can have: client state, server state, randomness and a report."""

    def init_client(params):
        return jax.tree.map(jnp.zeros_like, params)

    def encode(update, state, residual, ctx):
        wanted = jax.tree.map(jnp.add, update, residual)
        noise = optax.tree.random_like(ctx.key, wanted, sampler=jax.random.normal)
        sent = jax.tree.map(lambda x, n: jnp.clip(x, -state, state) + 1e-3 * n, wanted, noise)
        report = {"sent_norm": Mean(optax.tree.norm(sent), jnp.ones(()))}
        return sent, jax.tree.map(lambda w, s: 0.5 * (w - s), wanted, sent), report

    def decode(aggregate, state, report, ctx):
        return aggregate, 0.9 * state + 0.1 * jnp.nan_to_num(report["sent_norm"]), report

    return Uplink(lambda params: jnp.float32(bound), init_client, encode, decode)


clipped_sgd = optax.chain(fc.clipping.clip_by_global_norm(0.7), optax.sgd(0.2))


TUNED = fc.lora(softmax_loss, parameters(), 2, "w", 3.0)


def over_adapters(make: Callable[..., fc.extend.Algorithm]) -> fc.extend.Algorithm:
    """An algorithm of ``fc.adapters`` that begins with the model ``parameters()`` and draws the adapters itself."""
    inside = fc.partially_frozen(make(TUNED, clipped_sgd), TUNED.untouched)

    def begin(params):
        return {"base": params, "adapters": TUNED.fresh(jax.random.key(0))}

    return inside._replace(
        init=lambda params: inside.init(begin(params)), init_client=lambda params: inside.init_client(begin(params))
    )


def model(params: Any) -> Any:
    """The model of an entry's parameters."""
    return TUNED.merge(params) if "adapters" in params else params


# Every algorithm, with the options that change its state or its path: each law runs over all of them.
ENTRIES: dict[str, Callable[[], fc.extend.Algorithm]] = {
    "fedavg": lambda: fc.fedavg(softmax_loss, clipped_sgd),
    "fedavg, dropout": lambda: fc.fedavg(noisy_loss, clipped_sgd),
    "fedavg, schedule and uniform mean": lambda: fc.fedavg(
        softmax_loss, lambda r: optax.sgd(0.3 / (1.0 + r)), reducer=fc.reduce.uniform_mean()
    ),
    "fedavg, stateful link": lambda: fc.fedavg(
        softmax_loss,
        clipped_sgd,
        uplink=fc.uplink.chain(leaky_error_feedback(0.05), fc.uplink.clip_by_global_norm(0.2)),
    ),
    "fedavgm, adam locally": lambda: fc.fedavg(softmax_loss, optax.adam(0.05), optax.sgd(1.0, momentum=0.9)),
    "fedadam, clipped update": lambda: fc.fedavg(
        softmax_loss, clipped_sgd, fc.fedopt.fedadam(0.03), uplink=fc.uplink.clip_by_global_norm(0.2)
    ),
    "fedsgd": lambda: fc.fedsgd(softmax_loss, clipped_sgd),
    "adapters, residual": lambda: over_adapters(fc.adapters.residual),
    "adapters, stacked": lambda: over_adapters(fc.adapters.stacked),
    "adapters, decomposed": lambda: over_adapters(fc.adapters.decomposed),
    "fedavg, kept history": lambda: fc.fedavg(
        softmax_loss, optax.chain(fc.clipping.auto_clip(50, window=8), optax.sgd(0.2)), keep_opt_state=True
    ),
    "fedavg, every clip": lambda: fc.fedavg(
        softmax_loss,
        optax.chain(
            fc.local.proximal(0.1),
            fc.clipping.auto_clip(90, window=4),
            fc.clipping.clip(2.0, scope=fc.clipping.layer(), norm=fc.clipping.l1()),
            fc.clipping.adaptive_gradient_clip(0.5),
            fc.clipping.u_clip(fc.clipping.smoothed_clip(0.5)),
            optax.sgd(0.2),
        ),
        optax.chain(fc.clipping.two_sided_clip(0.01, 0.1), optax.sgd(1.0)),
        uplink=fc.uplink.chain(
            fc.uplink.zeroing(),
            fc.uplink.at_client(fc.clipping.auto_clip(90, window=4), keep_state=True),
            fc.uplink.quantile_clip(0.3),
        ),
    ),
    "fedavg, private": lambda: fc.fedavg(
        softmax_loss,
        clipped_sgd,
        uplink=fc.uplink.chain(fc.uplink.quantile_clip(0.2, bits_noise=0.5), fc.uplink.gaussian(0.1)),
        reducer=fc.reduce.fixed_mean(3),
    ),
    "fedavg, private for records and clients": lambda: fc.fedavg(
        softmax_loss,
        optax.sgd(0.2),
        gradient=fc.local.private_gradient(0.7, 0.1),
        uplink=fc.uplink.chain(
            fc.uplink.clip_by_global_norm(0.2), fc.uplink.gaussian(0.1, mechanism=fc.uplink.mechanism.tree(2))
        ),
        reducer=fc.reduce.fixed_mean(3),
    ),
    "fedavg, on a grid": lambda: fc.fedavg(
        softmax_loss,
        clipped_sgd,
        uplink=fc.uplink.chain(fc.uplink.clip_by_global_norm(0.2), fc.uplink.skellam(0.1, rotate=True)),
        reducer=fc.reduce.modular_sum(3),
    ),
    "fedavg, centered": lambda: fc.fedavg(
        softmax_loss,
        clipped_sgd,
        uplink=fc.uplink.chain(
            fc.uplink.relative_to_last(), fc.uplink.clip_by_global_norm(0.2), fc.uplink.local_gaussian(0.1)
        ),
        reducer=fc.reduce.uniform_mean(),
    ),
    "fedavg, centered thrice": lambda: fc.fedavg(
        softmax_loss, clipped_sgd, uplink=fc.uplink.relative_to_last(), reducer=fc.reduce.centered_mean(0.2, 3)
    ),
    "fedavg, bucketed": lambda: fc.fedavg(
        softmax_loss,
        clipped_sgd,
        uplink=fc.uplink.chain(fc.uplink.clip_by_global_norm(0.2), fc.attacks.noise([4], 0.1)),
        reducer=fc.reduce.bucketing(fc.reduce.norm_bounded(0.1, fc.reduce.geometric_median(3, 1e-3)), 2),
    ),
    "fedavg, clipped and mixed": lambda: fc.fedavg(
        softmax_loss,
        clipped_sgd,
        reducer=fc.attacks.optimal_ipm(fc.reduce.arc(1, fc.reduce.nnm(1, fc.reduce.caf(1))), [4], candidates=2),
    ),
    "scaffold, filtered": lambda: fc.scaffold(
        softmax_loss, clipped_sgd, reducer=fc.reduce.arc(1, fc.reduce.dnc(1, iterations=2, coordinates=5))
    ),
    "scaffold, robust": lambda: fc.scaffold(softmax_loss, clipped_sgd, reducer=fc.attacks.ipm(fc.reduce.krum(0), [4])),
    "fedsgd, memory": lambda: fc.fedsgd(
        softmax_loss, clipped_sgd, uplink=fc.uplink.memory(fc.clipping.clip_by_global_norm(0.2), 0.7, 0.9)
    ),
    "fedavg, compressed": lambda: fc.compressed_broadcast(
        fc.fedavg(
            softmax_loss,
            clipped_sgd,
            uplink=fc.uplink.error_feedback(fc.uplink.clip_by_global_norm(0.5), fc.uplink.power_sgd(1)),
        ),
        fc.compression.rotated(fc.compression.top_k(0.4, fc.compression.qsgd(4), "fixed")),
    ),
    "scaffold, sketched": lambda: fc.scaffold(
        softmax_loss,
        clipped_sgd,
        uplink=fc.uplink.chain(fc.uplink.clip_by_global_norm(0.5), fc.uplink.count_sketch(3, 4, k=9, momentum=0.9)),
    ),
    "partially_private": lambda: fc.partially_private(
        fc.fedavg(softmax_loss, clipped_sgd, optax.adam(0.03, eps=1e-3), uplink=fc.uplink.quantile_clip(0.3)), "^b$"
    ),
    "fedavg, model with state": lambda: fc.fedavg(
        stateful_loss, clipped_sgd, optax.adam(0.03, eps=1e-3), uplink=fc.uplink.clip_by_global_norm(0.2)
    ),
    "scaffold, own state": lambda: fc.partially_private(fc.scaffold(stateful_loss, clipped_sgd), "^b$"),
    "scaffold": lambda: fc.scaffold(softmax_loss, clipped_sgd),
    "episode": lambda: fc.episode(softmax_loss, optax.sgd(0.2), threshold=0.5),
    "episode_plus": lambda: fc.episode_plus(softmax_loss, optax.sgd(0.2), threshold=0.3),
    "fednova, few by leaf": lambda: fc.fednova(
        softmax_loss, clipped_sgd, uplink=fc.uplink.compress(fc.compression.random_k(0.4), by_leaf=True)
    ),
    "feddyn": lambda: fc.feddyn(softmax_loss, clipped_sgd, alpha=0.3),
    "fedbuff": lambda: fc.fedbuff(softmax_loss, clipped_sgd, max_staleness=2),
    "fedbuff, stateful link": lambda: fc.fedbuff(
        softmax_loss,
        lambda r: optax.sgd(0.3 / (1.0 + r)),
        optax.adam(0.03, eps=1e-3),
        max_staleness=2,
        uplink=fc.uplink.chain(leaky_error_feedback(0.05), fc.uplink.clip_by_global_norm(0.2)),
        reducer=fc.reduce.weighted_mean(),
    ),
    "mime": lambda: fc.mime(softmax_loss, clipped_sgd),
    "mime, lite": lambda: fc.mime(softmax_loss, clipped_sgd, lite=True),
    "ditto": lambda: fc.personal.ditto(softmax_loss, clipped_sgd, strength=0.3),
    "mr_mtl": lambda: fc.personal.mr_mtl(softmax_loss, clipped_sgd, strength=0.3),
    "pfedme": lambda: fc.personal.pfedme(softmax_loss, clipped_sgd, strength=5.0, rate=0.1, inner_steps=2),
    "apfl": lambda: fc.personal.apfl(softmax_loss, clipped_sgd, alpha=0.4, alpha_rate=0.1),
    "fedala": lambda: fc.personal.fedala(softmax_loss, clipped_sgd, mix_steps=2),
    "per_fedavg": lambda: fc.personal.per_fedavg(softmax_loss, clipped_sgd, rate=0.1, hessian="exact"),
    "reptile": lambda: fc.personal.reptile(softmax_loss, clipped_sgd, optax.sgd(0.7)),
    "fedrep": lambda: fc.personal.fedrep(softmax_loss, clipped_sgd, head="^b$", head_passes=2),
    "fedbabu": lambda: fc.personal.fedbabu(softmax_loss, clipped_sgd, head="^b$"),
    "fedbn": lambda: fc.personal.fedbn(softmax_loss, clipped_sgd, norms="^b$"),
    "ifca": lambda: fc.clusters.ifca(softmax_loss, clipped_sgd, clusters=2),
    "cfl": lambda: fc.clusters.cfl(softmax_loss, clipped_sgd, clusters=2, stationary=0.6, disagree=0.01),
    "q_ffl": lambda: fc.fair.q_ffl(softmax_loss, clipped_sgd, q=1.0, rate=0.2),
    "afl": lambda: fc.fair.afl(softmax_loss, clipped_sgd, clients=6, rate=0.1),
    "term": lambda: fc.fair.term(softmax_loss, clipped_sgd, t=1.0),
    "fedcm": lambda: fc.drift.fedcm(softmax_loss, clipped_sgd, alpha=0.3, rate=0.2),
    "scaffnew": lambda: fc.drift.scaffnew(softmax_loss, clipped_sgd, p=0.4, rate=0.2),
    "fedadamw": lambda: fc.drift.fedadamw(softmax_loss, clipped_sgd, rate=0.2, eps=1e-3),
    "fedmuon": lambda: fc.drift.fedmuon(penalised_loss, clipped_sgd, rate=0.2),
    "fedavg, sharpness aware": lambda: fc.fedavg(softmax_loss, clipped_sgd, gradient=fc.local.sharpness_aware(0.1)),
    "fedlc": lambda: fc.drift.fedlc(fc.fedavg(calibrated_loss, clipped_sgd), 0.5, classes=3),
    "oort": lambda: fc.drift.oort(fc.fedavg(softmax_loss, clipped_sgd), 3, 6),
    "power_of_choice": lambda: fc.drift.power_of_choice(fc.scaffold(softmax_loss, clipped_sgd), 2),
}


# Every algorithm of the library with what it needs, as ``make(per_example_loss, client_tx, server_tx=None, **parts)``.
MAKERS: dict[str, Callable[..., fc.extend.Algorithm]] = {
    "episode": functools.partial(fc.episode, threshold=0.5),
    "episode_plus": functools.partial(fc.episode_plus, threshold=0.3),
    "fedavg": fc.fedavg,
    "fedbuff": functools.partial(fc.fedbuff, max_staleness=2),
    "feddyn": functools.partial(fc.feddyn, alpha=0.3),
    "fednova": fc.fednova,
    "fedsgd": fc.fedsgd,
    "mime": fc.mime,
    "mime, lite": functools.partial(fc.mime, lite=True),
    "scaffold": fc.scaffold,
    "ditto": functools.partial(fc.personal.ditto, strength=0.3),
    "mr_mtl": functools.partial(fc.personal.mr_mtl, strength=0.3),
    "pfedme": functools.partial(fc.personal.pfedme, strength=5.0, rate=0.1, inner_steps=2),
    "apfl": fc.personal.apfl,
    "fedala": functools.partial(fc.personal.fedala, mix_steps=2),
    "per_fedavg": fc.personal.per_fedavg,
    "reptile": fc.personal.reptile,
    "fedrep": functools.partial(fc.personal.fedrep, head="^b$"),
    "fedbabu": functools.partial(fc.personal.fedbabu, head="^b$"),
    "fedbn": functools.partial(fc.personal.fedbn, norms="^b$"),
    "ifca": functools.partial(fc.clusters.ifca, clusters=2),
    "cfl": functools.partial(fc.clusters.cfl, clusters=2, stationary=0.6, disagree=0.01),
    "q_ffl": functools.partial(fc.fair.q_ffl, q=1.0, rate=0.1),
    "afl": functools.partial(fc.fair.afl, clients=6, rate=0.1),
    "term": functools.partial(fc.fair.term, t=1.0),
    "fedcm": functools.partial(fc.drift.fedcm, alpha=0.3, rate=0.1),
    "scaffnew": functools.partial(fc.drift.scaffnew, p=0.4, rate=0.1),
    "fedadamw": functools.partial(fc.drift.fedadamw, rate=0.1, decay=0.0),
    "fedmuon": functools.partial(fc.drift.fedmuon, rate=0.1),
}
OUTSIDE: set[str] = set()  # entries from outside of the repository, see ``outside.py``


@dataclasses.dataclass
class Run:
    """A driver of a few lines, so that laws can look between its steps."""

    algorithm: fc.extend.Algorithm
    data: fc.FederatedData
    work: fc.extend.LocalWork = dataclasses.field(default_factory=lambda: fc.extend.LocalWork(batch_size=4, epochs=2))
    resident: bool = True
    width: int = 1
    compiler_options: dict | None = None
    traces: int = 0

    def cohort(self, ids, round, clients, devices=1) -> fc.extend.Cohort:
        """``[D, ...]``, with room for four clients and 24 rows: one shape, so that a round compiles once.

        Clients are up to two rounds stale.
        """
        population = self.data.examples if self.resident else None
        if population is not None:
            population = jax.tree.map(lambda x: np.repeat(x[None], devices, axis=0), population)
        cohorts = fc.extend.plan_rounds(
            self.data,
            [np.asarray(ids)],
            self.work,
            seed=SEED,
            first_round=round,
            least=(4, 24),
            num_devices=devices,
            width=self.width,
            state=clients,
            population=population,
            staleness=[(np.asarray(ids, np.int64) + round) % 3],
        )
        alone = jax.tree.map(lambda x: x[:, 0], dataclasses.replace(cohorts, population=None))
        return dataclasses.replace(alone, population=population)

    def start(self, params):
        return self.algorithm.init(params), loop.client_states(self.algorithm, params, self.data.num_clients)

    @functools.cached_property
    def jitted(self):
        """The round under ``jax.jit`` on one device; counts how often it is traced."""

        @functools.partial(jax.jit, compiler_options=self.compiler_options)
        def one(server, cohort, key):
            self.traces += 1
            return self.algorithm.round(server, cohort, key)

        def run(server, cohort, key):
            server, states, metrics = one(server, jax.tree.map(lambda x: x[0], cohort), key)
            return server, jax.tree.map(lambda x: x[None], states), metrics

        return run

    def rounds(self, params, cohorts_ids, step=None, devices=1, edit=lambda cohort: cohort):
        """Trains on the given cohorts; returns ``(server, client states, metrics of each round)``."""
        step = step or self.jitted
        server, clients = self.start(params)
        history = []
        for round, ids in enumerate(cohorts_ids):
            cohort = edit(self.cohort(ids, round, clients, devices))
            server, states, metrics = step(server, cohort, jax.random.key(SEED))
            InMemory(clients).scatter(np.asarray(cohort.ids), states)
            history.append({k: float(v) for k, v in metrics.items()})
        return jax.tree.map(np.asarray, server), clients, history

    def for_oracle(self, params, cohorts_ids):
        """The planned cohorts as an oracle takes them: ``{client: (weight, [(x, y, weights) of each step])}``."""
        _, clients = self.start(params)
        found = []
        for round, ids in enumerate(cohorts_ids):
            cohort = jax.tree.map(lambda x: np.asarray(x[0]), self.cohort(ids, round, clients))
            found.append({})
            e = cohort.population
            for c, first, steps, weight in zip(cohort.ids, cohort.first, cohort.num_steps, cohort.weight):
                rows = [(cohort.batches[r], cohort.example_weight[r]) for r in range(first, first + steps)]
                if c >= 0:
                    found[-1][c] = (weight, [(e["x"][i], e["y"][i], w) for i, w in rows])
        return found

    def pmapped(self, devices):
        step = pmap_rounds(self.algorithm, devices)

        def run(server, cohort, key):
            server, *out = step(replicate(server, devices), one_round(cohort), key, 1)
            states, metrics = jax.tree.map(lambda x: x[:, 0], out)
            return first_replica(server), states, first_replica(metrics)

        return run


def one_round(cohort: fc.extend.Cohort) -> fc.extend.Cohort:
    """A round's cohort ``[D, ...]`` as a block of one round, ``[D, 1, ...]``."""
    alone = jax.tree.map(lambda x: x[:, None], dataclasses.replace(cohort, population=None))
    return dataclasses.replace(alone, population=cohort.population)


# One entry of each way in which clients read their examples and step on them. The others repeat one of these and differ
# in what is behind it: their programs are compiled as all tests' are, in a quarter of the time.
READERS = {
    *("fedavg", "fedavg, dropout", "fedavgm, adam locally", "fedavg, every clip"),
    *("fedavg, private for records and clients", "fedsgd", "partially_private", "scaffold", "episode", "episode_plus"),
    *("fednova, few by leaf", "feddyn", "fedbuff", "mime", "mime, lite"),
    *("apfl", "fedala", "per_fedavg", "ifca", "scaffnew", "fedavg, sharpness aware", "power_of_choice"),
}


def entry(name: str, resident: bool = True, width: int = 1) -> Run:
    """The run of an entry; laws share it, and so its compiled rounds.

    The optimiser could tell packed examples from resident ones: their law runs on what it makes of every reader.
    """
    return _entry(name, resident, width)  # however it was asked for


@functools.cache
def _entry(name, resident, width):
    algorithm = ENTRIES[name]() if resident and width == 1 else entry(name).algorithm
    optimized = name in READERS and width == 1 and jax.device_count() == 1
    return Run(
        algorithm, population(), resident=resident, width=width, compiler_options=OPTIMIZED if optimized else None
    )


COHORTS = ([4, 1, 3], [2, 1, 4], [5, 4, 1])


def assert_close(actual, expected, rtol=2e-5, atol=2e-6):
    """Equal to rounding, and finite: NaN is not equal to NaN here."""
    chex.assert_tree_all_finite(actual)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def assert_identical(actual, expected):
    """Equal to the last bit, and finite."""
    chex.assert_tree_all_finite(actual)
    chex.assert_trees_all_equal(actual, expected)
