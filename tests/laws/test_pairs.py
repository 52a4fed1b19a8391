"""Algorithms with links, reducers and downlinks that flags can name: a round is traced, or the pair refused.

By default each algorithm meets some of the parts, so that each part is met. ``FEDJAX_CLIP_STRICT=all`` (``make
strict``) takes every pair, in test_strict.py under JAX's switches.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMIZED
from problems import Run, assert_close, parameters, population

import fedjax_clip as fc
from experiments.config import optimisers, privacy, registry, spec
from fedjax_clip.reduce import Roster

COHORT = (4, 1, 3, 0)
CLIP = "clip_by_global_norm(1.0)"
GRID = f"{CLIP}|integer_grid(16)"

# How a name is written that says nothing alone; any other stands for ``name()``, so that a new one joins by itself.
WRITTEN = {
    "afl": "afl(6, 0.1)",
    "alie": "alie(median(), (0, 1))",
    "arc": "arc(1, trimmed_mean(1))",
    "bucketing": "bucketing(median(), 2)",
    "bulyan": "bulyan(0)",
    "by_leaf": "by_leaf(qsgd(4))",
    "caf": "caf(1)",
    "centered_mean": "centered_mean(1.0)",
    "cfl": "cfl(2, 0.1, 0.2)",
    "clip21": "clip21(1.0)",
    "clip_by_global_norm": CLIP,
    "clip_by_layer_norm": "clip_by_layer_norm(1.0)",
    "count_sketch": "count_sketch(3, 2, k=3)",
    "difference": "difference(qsgd(8))",
    "ditto": "ditto(0.1)",
    "discrete_gaussian": f"{CLIP}|discrete_gaussian(1.0)",
    "dnc": "dnc(1)",
    "eden": "eden(2)",
    "ef21": "ef21(top_k(0.1))",
    "episode": "episode(0.5)",
    "episode_plus": "episode_plus(0.5)",
    "error_feedback": f"error_feedback({CLIP}, top_k(0.1))",
    "fedbabu": "fedbabu('^b$')",
    "fedadamw": "fedadamw(rate=0.1)",
    "fedbn": "fedbn('^b$')",
    "fedcm": "fedcm(0.3, 0.1)",
    "fedlc": "fedlc(1.0, 3)",
    "fedmuon": "fedmuon(0.1)",
    "fedrep": "fedrep('^b$')",
    "fltrust": "fltrust(4)",
    "gaussian": f"{CLIP}|gaussian(1.0)",
    "ifca": "ifca(2)",
    "integer_grid": GRID,
    "ipm": "ipm(median(), (0, 1))",
    "kmeans": "kmeans(4)",
    "krum": "krum(0)",
    "local_gaussian": f"{CLIP}|local_gaussian(1.0)",
    "mda": "mda(1)",
    "min_norm": "min_norm(0.1)",
    "mimic": "mimic(median(), (0, 1), 4)",
    "model": "model(qsgd(8))",
    "mr_mtl": "mr_mtl(0.1)",
    "nnm": "nnm(1, median())",
    "norm_bounded": "norm_bounded(1.0, trimmed_mean(1))",
    "normec": "normec(0.5)",
    "oort": "oort(3, 5)",
    "optimal_alie": "optimal_alie(median(), (0, 1))",
    "optimal_ipm": "optimal_ipm(median(), (0, 1))",
    "partially_private": "partially_private('^b$')",
    "power_of_choice": "power_of_choice(3)",
    "power_sgd": "power_sgd(1)",
    "q_ffl": "q_ffl(1.0, 0.1)",
    "qsgd": "qsgd(4)",
    "random_k": "random_k(0.1)",
    "rotated": "rotated(uniform(4))",
    "scaffnew": "scaffnew(0.4, 0.1)",
    "scaling": "scaling((0, 1), 10.0)",
    "sign_flip": "sign_flip((0, 1))",
    "skellam": f"{CLIP}|skellam(1.0)",
    "term": "term(1.0)",
    "smea": "smea(1)",
    "threshold": "threshold(0.001)",
    "top_k": "top_k(0.1)",
    "trimmed_mean": "trimmed_mean(1)",
    "uniform": "uniform(4)",
}
APART = ("cfl", "ifca")  # most links add what these keep apart: of a share all may be refused
SENTENCE = re.compile(r"\b(uplink|algorithm|FedBuff)\b.*[.)]$")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def squared_loss(params, batch, key):
    """The shortest to trace; it looks at the margins that FedLC asks for."""
    return jnp.sum(jnp.square(fc.drift.calibrated(batch["x"] @ params["w"] + params["b"], batch) - 1), axis=-1)


def written(name):
    return WRITTEN.get(name, f"{name}()")


def build(algorithm, links="", reducer="", downlink=""):
    """As ``experiments.run`` does, with the reducer that the links need where none is asked for."""
    make = spec.one(written(algorithm), registry.ALGORITHMS, "--algorithm")
    uplink, reducers = privacy.chain(links, None), registry.reducers(len(COHORT))
    reducer = reducer or registry.needed_reducer(uplink)
    parts = {"uplink": uplink, "reducer": spec.one(reducer, reducers, "--reducer", reducers) if reducer else None}
    txs = optimisers.client_tx("sgd(0.01)"), optimisers.server_tx("sgd(1.0)")
    made = make(squared_loss, *txs, **parts)
    if not downlink:
        return made
    return spec.one(downlink, registry.DOWNLINKS, "--downlink", registry.COMPRESSORS)(made)


@functools.cache
def rounds():
    """Arguments of ``build`` with which every link, reducer and downlink is met.

    Links that only change a message are met in one chain, and links that pack it with one reducer each: no two of them
    exclude each other, since FedAvg takes them all.
    """
    links = {name: privacy.chain(written(name), None) for name in registry.UPLINKS}
    packing = [written(name) for name, link in links.items() if link.promises.wire is fc.uplink.Wire.PACKS]
    other = [
        written(name)
        for name, link in links.items()
        if link.promises.wire is fc.uplink.Wire.SUMS or link.promises.noise or link.promises.grid
    ]
    plain = [written(name) for name in links if written(name) not in packing + other]
    reducers = registry.reducers(len(COHORT))
    of_reals = [r for r in map(written, reducers) if not spec.one(r, reducers, "--reducer", reducers).threshold]
    return [
        {"links": "|".join(plain)},
        *({"links": link} for link in other),
        *({"links": link, "reducer": r} for link, r in itertools.zip_longest(packing, of_reals, fillvalue="")),
        *({"links": GRID, "reducer": r} for r in map(written, reducers) if r not in of_reals),
        *({"downlink": written(name)} for name in registry.DOWNLINKS),
    ]


@functools.cache
def cohort():
    run = Run(fc.fedavg(squared_loss, optimisers.client_tx("sgd(0.01)")), population())
    return jax.tree.map(lambda x: x[0], run.cohort(COHORT, 0, run.start(parameters())[1]))


def start(algorithm):
    """The server, and the cohort with the clients' state."""
    server, client = algorithm.init(parameters()), algorithm.init_client(parameters())
    state = jax.tree.map(lambda x: jnp.stack([x] * len(cohort().ids)), client)
    return server, dataclasses.replace(cohort(), state=state)


def trace(algorithm):
    """One round, of which nothing is computed: states keep their form, and every metric is a number."""
    server, asked = jax.eval_shape(lambda: start(algorithm))
    after, states, metrics = jax.eval_shape(algorithm.round, server, asked, jax.random.key(0))
    assert form((after, states)) == form((server, asked.state))
    assert {x.shape for x in metrics.values()} == {()}
    return metrics


def form(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", registry.REDUCERS)
def test_a_round_of_nobody_moves_nothing_in_the_smallest_cohort(name):
    """With the optimiser that users have, which may rewrite a division by a very small number."""
    reducers = registry.reducers(2 if name in registry.SECURE else 1)  # a sum of one hides nothing
    reducer = spec.one(written(name), reducers, "--reducer", reducers)
    ids, dtype = jnp.arange(reducer.fewest), jnp.uint32 if reducer.threshold else jnp.float32

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def reduced(messages, weights):
        zero = reducer.zero({"w": messages[0]}, Roster(ids, jax.random.key(0)))
        return reducer.finish(reducer.add(zero, {"w": messages}, weights), None)["w"]

    messages = jnp.zeros((reducer.fewest, 3), dtype)
    assert not np.asarray(reduced(messages, jnp.zeros(reducer.fewest))).any()
    for value in (0.0, 1.0, 1e18) if dtype == jnp.float32 and name not in registry.SECURE else ():
        one = reduced(messages.at[0].set(value), jnp.zeros(reducer.fewest).at[0].set(1))
        assert np.isfinite(one).all(), value


def share(algorithm, parts, everything=False):
    """The parts that an algorithm is traced with: all, or the first two and a few, so that each part is somebody's."""
    place = list(registry.ALGORITHMS).index(algorithm)
    return parts if everything else parts[:2] + parts[2:][place :: len(registry.ALGORITHMS)]


def meet(name, several):
    """Traces a round with each of the parts: what is wrong with which, and how many passed."""
    wrong, traced = [], 0
    for parts in several:
        try:
            metrics = trace(build(name, **parts))
            packs = privacy.chain(parts.get("links", ""), None).promises.wire is fc.uplink.Wire.PACKS
            assert ("bytes_up_entropy" in metrics) == packs
            traced += 1
        except fc.InvalidInput as error:
            if "promotion" in str(error) or not SENTENCE.search(str(error)):
                wrong.append((parts, str(error)))
        except Exception as error:
            wrong.append((parts, repr(error)[:500]))
    return wrong, traced


@pytest.mark.parametrize("name", [name for name in registry.ALGORITHMS if name != "fedavg"])
def test_a_round_can_be_traced_or_is_refused_with_a_sentence(name):
    wrong, traced = meet(name, share(name, rounds()))
    assert not wrong
    assert traced or name in APART


@pytest.mark.parametrize("parts", rounds(), ids=lambda parts: "&".join(parts.values()))
def test_every_link_reducer_and_downlink_runs_with_fedavg(parts):
    run(build("fedavg", **parts))


@pytest.mark.parametrize("name", [name for name in registry.ALGORITHMS if name != "fedavg"])
def test_every_algorithm_runs_with_a_link_of_each_kind_and_a_robust_reducer(name):
    run(build(name, "quantile_clip()|top_k(0.5)", "krum(0)"))


def run(algorithm):
    server, asked = start(algorithm)
    after, _, metrics = jax.jit(algorithm.round, compiler_options=QUICK)(server, asked, jax.random.key(0))
    assert_close((after, metrics), (after, metrics))
    assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (after.params, server.params)), strict=True))
