"""Clusters: row by row with the oracles, their limiting cases, and planted groups."""

import functools

import jax
import numpy as np
import optax
import pytest
from oracles import clusters as cluster_oracle
from problems import assert_close, assert_identical
from test_personal import (
    COHORTS,
    LR,
    SIZES,
    START,
    STEPS,
    UNIFORM,
    flat,
    gradient,
    loss,
    regressions,
    squared,
    trained,
    tree_of,
)

import fedjax_clip as fc
from fedjax_clip.algorithms.clusters.cfl import _second_part
from fedjax_clip.reduce import rows
from fedjax_clip.training.state import init_state


def two_models():
    return np.stack([START, -START])


def test_ifca_is_the_oracles():
    rows = cluster_oracle.ifca_models(two_models(), gradient, loss, COHORTS, STEPS, LR)
    models = fc.clusters.Models(
        tree_of(np.zeros(4)) | {"b": np.float32(two_models()[:, :1]), "w": np.float32(two_models()[:, 1:])}
    )
    make = functools.partial(fc.clusters.ifca, clusters=2, reducer=UNIFORM)
    server, clients, history = trained(make, models)
    np.testing.assert_allclose(flat(server.params.models), rows["models"][-1], rtol=2e-4, atol=2e-5)
    assert clients.own.tolist() == rows["chosen"][-1].tolist()
    assert [[row["cluster/0"], row["cluster/1"]] for row in history] == [
        [(chosen == j).sum() for j in (0, 1)] for chosen in rows["chosen"]
    ]


def test_ifca_with_one_cluster_is_fedavg_with_any_reducer():
    for reducer in (fc.reduce.weighted_mean(), fc.reduce.median()):
        server, _, _ = trained(functools.partial(fc.clusters.ifca, clusters=1, reducer=reducer))
        plain, _, _ = trained(fc.fedavg, reducer=reducer)
        assert_close(server.params.of(0), plain.params)


def test_a_clusters_reducer_sees_its_clients_only():
    """A median over all would be zero wherever most clients chose another cluster."""
    models = fc.clusters.stacked(tree_of(START), 2, jax.random.key(0), 3.0)
    median = functools.partial(fc.clusters.ifca, clusters=2, reducer=fc.reduce.median())
    mean = functools.partial(fc.clusters.ifca, clusters=2, reducer=UNIFORM)
    (one, _, history), (other, _, _) = (trained(make, models, [[0, 1]]) for make in (median, mean))
    assert [history[0]["cluster/0"], history[0]["cluster/1"]] in ([1, 1], [2, 0], [0, 2])
    assert_close(one.params, other.params)  # of one or two clients the median is the mean


def test_what_ifca_cannot_reduce_by_cluster_is_refused():
    clip = fc.uplink.clip_by_global_norm(1.0)
    for parts, words in (
        ({"uplink": fc.uplink.memory(fc.clipping.clip(1.0))}, "memory"),
        ({"uplink": fc.uplink.count_sketch(3, 4, k=2)}, "sketch"),
        ({"uplink": fc.uplink.chain(clip, fc.uplink.gaussian(1.0)), "reducer": fc.reduce.fixed_mean(4)}, "cover"),
    ):
        with pytest.raises(fc.InvalidInput, match=words):
            fc.clusters.ifca(squared, optax.sgd(LR), clusters=2, **parts)
    with pytest.raises(fc.InvalidInput, match="begin the run with fc.clusters.stacked"):
        trained(lambda *a: fc.partially_frozen(fc.clusters.ifca(*a, clusters=2), "^b$"), cohorts=[[0]])


def test_ifca_finds_planted_groups():
    """Of eight starts, the one that ends with the least training loss; adjusted Rand 1.0 on each of five seeds."""
    score = pytest.importorskip("sklearn.metrics").adjusted_rand_score
    groups, clients, examples = 3, 12, 20
    algorithm = fc.clusters.ifca(squared, optax.sgd(0.1), clusters=groups)
    cohorts, run = [np.arange(clients)] * 15, None
    for seed in range(5):
        rng = np.random.default_rng(seed)
        slopes, x = rng.normal(size=(groups, 5)), rng.normal(size=(clients, examples, 5))
        y = np.einsum("cef,cf->ce", x, slopes[np.arange(clients) % groups]) + 0.1 * rng.normal(size=(clients, examples))
        fields = {"x": x.reshape(-1, 5).astype(np.float32), "y": y.ravel().astype(np.float32)}
        data = fc.FederatedData(fields, np.arange(clients + 1) * examples)
        planned = fc.extend.plan_rounds(data, cohorts, fc.extend.LocalWork(None, 5), seed=0, first_round=0)
        planned = jax.tree.map(lambda x: x[0], planned)
        run = run or jax.jit(
            lambda start, cohorts: fc.extend.placement.run_rounds(
                algorithm.round,
                init_state(algorithm, start, clients),
                cohorts,
                None,
                jax.random.key(0),
                len(cohorts.ids),
            )
        )
        ends = []
        for start in range(8):
            models = np.random.default_rng(start).normal(size=(groups, 6)).astype(np.float32)
            (_, kept), metrics = run(fc.clusters.Models({"b": models[:, :1], "w": models[:, 1:]}), planned)
            ends.append((float(metrics["loss"][-1]), kept.own.tolist()))
        assert score(min(ends)[1], np.arange(clients) % groups) == 1.0


def test_a_new_client_of_ifca_chooses_its_cluster():
    algorithm = fc.clusters.ifca(squared, optax.sgd(LR), clusters=2)
    models = fc.clusters.Models({"b": np.float32([[1], [-1]]), "w": np.float32([[1, -2, 0.5], [-1, 2, -0.5]])})
    states = fc.personal.adapt(algorithm, algorithm.init(models), regressions(), batch_size=None)
    assert states.own.tolist() == [0, 1, 0, 1]


TOGETHER = [[0, 1, 2, 3]] * 6
CFL = functools.partial(fc.clusters.cfl, clusters=4, stationary=0.28, disagree=0.2)


def by_least(clusters):
    """Clusters by their least client, as the oracle names them."""
    return [list(clusters).index(c) for c in clusters]


@pytest.mark.parametrize("weighted", [True, False])
def test_cfl_is_the_oracles(weighted):
    weights = np.array(SIZES) if weighted else None
    rows = cluster_oracle.cfl(START, gradient, 6, STEPS, LR, 0.28, 0.2, weights)
    reducer = fc.reduce.weighted_mean() if weighted else UNIFORM
    server, clients, history = trained(CFL, cohorts=TOGETHER, reducer=reducer)
    assert len(set(rows["label"][1])) == 1 < len(set(rows["label"][-1]))  # it splits, and not at once
    assert by_least(clients.own) == rows["label"][-1].tolist()
    assert [row["clusters"] for row in history] == [len(set(label)) for label in rows["label"][1:]]
    mine = [flat(server.params.of(int(j))) for j in clients.own]
    np.testing.assert_allclose(mine, rows["v"][-1], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("reducer", [fc.reduce.weighted_mean(), fc.reduce.median()])
def test_cfl_that_never_rests_is_fedavg_with_any_reducer(reducer):
    server, clients, history = trained(
        functools.partial(fc.clusters.cfl, clusters=3, stationary=0.0, disagree=0.0, reducer=reducer)
    )
    assert_close(server.params.of(0), trained(fc.fedavg, reducer=reducer)[0].params)
    assert not clients.own.any()
    assert history[-1]["clusters"] == 1


def test_cfl_parts_clients_as_every_bipartition_tried_in_turn():
    cut = jax.jit(_second_part)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        messages = {"a": rng.normal(size=(8, 3)).astype(np.float32)}
        cluster, present = rng.integers(2, size=8), np.arange(8) < 7
        leaves = np.asarray(cut(rows.cosines(messages), cluster, present))
        assert not leaves[~present].any()
        for j in range(2):
            members = np.flatnonzero((cluster == j) & present)
            if len(members) > 1:
                _, two, _ = cluster_oracle.bipartition(cluster_oracle.cosine_similarities(messages["a"][members]))
                assert members[leaves[members]].tolist() == members[two].tolist()


def test_a_cluster_of_fewer_clients_than_its_reducer_needs_never_splits():
    eager = functools.partial(fc.clusters.cfl, stationary=1e3, disagree=0.0, clusters=4)
    _, _, history = trained(functools.partial(eager, reducer=fc.reduce.krum(0)), cohorts=TOGETHER)
    assert [row["clusters"] for row in history][:2] == [2, 2]  # Krum needs three, and no part has so many
    assert max(row["clusters"] for row in history) < 4


def test_cfl_has_no_more_clusters_than_it_was_given_and_the_absent_stay():
    eager = functools.partial(fc.clusters.cfl, stationary=1e3, disagree=0.0)
    _, clients, history = trained(functools.partial(eager, clusters=3), cohorts=TOGETHER)
    assert [row["clusters"] for row in history] == [2, 3, 3, 3, 3, 3]
    assert sorted(set(clients.own.tolist())) == [0, 1, 2]
    server, clients, history = trained(functools.partial(eager, clusters=2), cohorts=[[0, 1], [2, 3]])
    assert clients.own[[0, 2, 3]].tolist() == [0, 0, 0]
    assert clients.own[1] == 1
    assert history[1]["cluster/0"] == 2
    alone = trained(functools.partial(eager, clusters=2), cohorts=[[0, 1]])[0]
    assert_identical(server.params.of(1), alone.params.of(1))  # nobody of it came


@pytest.mark.parametrize("clip", [None, 0.3])
def test_cfl_finds_planted_groups(clip):
    """Signs of slopes, all clients in each round: both groups, clipped or not."""
    rng = np.random.default_rng(2)
    x, group = rng.normal(size=(8, 30, 3)), np.arange(8) % 2
    y = np.where(group, 1, -1)[:, None] * (x @ [1.0, -2.0, 0.5]) + 0.1 * rng.normal(size=(8, 30))
    fields = {"x": x.reshape(-1, 3).astype(np.float32), "y": y.ravel().astype(np.float32)}
    data = fc.FederatedData(fields, np.arange(9) * 30)
    link = None if clip is None else fc.uplink.clip_by_global_norm(clip)
    algorithm = fc.clusters.cfl(squared, optax.sgd(0.1), clusters=4, stationary=0.08, disagree=0.15, uplink=link)
    result = fc.train(algorithm, data, tree_of(np.zeros(4)), rounds=30, cohort_size=8, batch_size=10)
    assert by_least(result.state.clients.own) == [0, 1, 0, 1, 0, 1, 0, 1]
    assert result.history[-1]["clusters"] == 2


def test_a_new_client_takes_the_model_that_cfl_found_for_its_like():
    models = fc.clusters.Models({"b": np.float32([[1], [-1]]), "w": np.float32([[1, -2, 0.5], [-1, 2, -0.5]])})
    choosing = fc.clusters.ifca(squared, optax.sgd(LR), clusters=2)
    states = fc.personal.adapt(choosing, choosing.init(models), regressions(), batch_size=None)
    assert states.own.tolist() == [0, 1, 0, 1]


def test_what_cfl_cannot_reduce_by_cluster_is_refused():
    need = {"clusters": 2, "stationary": 0.1, "disagree": 0.1}
    clip = fc.uplink.clip_by_global_norm(1.0)
    for parts, words in (
        ({"uplink": fc.uplink.memory(fc.clipping.clip(1.0))}, "memory"),
        ({"uplink": fc.uplink.chain(clip, fc.uplink.gaussian(1.0)), "reducer": fc.reduce.fixed_mean(4)}, "cover"),
        ({"stationary": -0.1}, "cfl's stationary must be"),
        ({"clusters": 0}, "cfl's clusters must be"),
    ):
        with pytest.raises(fc.InvalidInput, match=words):
            fc.clusters.cfl(squared, optax.sgd(LR), **need | parts)
