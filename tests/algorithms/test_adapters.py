"""Federated LoRA and its variants against their oracles, on a linear softmax model."""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import adapters as oracle
from oracles import dora
from problems import Run, assert_close, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.core import tree

IDS = ([1, 3, 0], [4, 1, 5], [3, 4, 1])
LR, ALPHA, RANK = 0.3, 3.0, 2
TX = optax.sgd(LR)


def tuned(**how):
    return fc.lora(softmax_loss, parameters(), RANK, "w", ALPHA, **how)


def start():
    """The base, and adapters that change it already."""
    params = tuned().init(jax.random.key(0))
    params["adapters"]["w"]["b"] = jax.random.normal(jax.random.key(1), (RANK, 3)) / 2
    return jax.tree.map(np.asarray, params)


def given():
    """What oracles begin with: W, c, A, B and the scale."""
    x = start()
    return x["base"]["w"], x["base"]["b"], x["adapters"]["w"]["a"], x["adapters"]["w"]["b"], ALPHA / RANK


def pair(params):
    return params["adapters"]["w"]["a"], params["adapters"]["w"]["b"]


def trained(algorithm, ids=IDS):
    """``(server, clients, history, the oracle's cohorts)``."""
    run = Run(algorithm, population())
    planned = run.for_oracle(start(), ids)  # the oracle goes through batches example by example
    cohorts = [{c: (w, [list(zip(*batch)) for batch in own]) for c, (w, own) in x.items()} for x in planned]
    return *run.rounds(start(), ids), cohorts


def frozen(algorithm, pattern=None):
    return fc.partially_frozen(algorithm, pattern or tuned().frozen)


def test_fedit_averages_the_factors_apart():
    server, _, history, cohorts = trained(frozen(fc.fedavg(tuned().per_example_loss, TX)))
    assert_close(pair(server.params), oracle.fedit(*given(), cohorts, LR), rtol=2e-4, atol=1e-5)
    assert history[0]["bytes_up"] == 3 * 4 * RANK * (4 + 3)


def test_ffa_lora_trains_b_alone():
    algorithm = frozen(fc.fedavg(tuned().per_example_loss, TX), "^base/|/a$")
    server, _, history, cohorts = trained(algorithm)
    assert_close(pair(server.params), oracle.ffa(*given(), cohorts, LR), rtol=2e-4, atol=1e-5)
    assert history[0]["bytes_up"] == 3 * 4 * RANK * 3


def test_fedsa_lora_keeps_b_at_the_clients():
    algorithm = frozen(fc.partially_private(fc.fedavg(tuned().per_example_loss, TX), "/b$"))
    server, clients, history, cohorts = trained(algorithm)
    a, bs = oracle.fedsa(*given(), cohorts, LR)
    assert_close(pair(server.params)[0], a, rtol=2e-4, atol=1e-5)
    for client, b in bs.items():
        own = jax.tree.map(operator.itemgetter(client), clients)
        assert_close(np.asarray(pair(algorithm.personal(server.params, own))[1]), b, rtol=2e-4, atol=1e-5)
    assert history[0]["bytes_up"] == 3 * 4 * RANK * 4


def test_dora_trains_length_and_direction_apart():
    made = tuned(dora=True)
    params = start()
    assert_close(made.fresh(jax.random.key(0))["w"]["m"], np.linalg.norm(params["base"]["w"], axis=0), 1e-6, 0)
    m = params["adapters"]["w"]["m"] = np.array([0.5, 1.5, 1.0], np.float32)
    run = Run(frozen(fc.fedavg(made.per_example_loss, TX)), population())
    planned = run.for_oracle(params, IDS)
    cohorts = [
        {c: (w, [[(x, y) for x, y, u in zip(*batch) if u] for batch in own]) for c, (w, own) in r.items()}
        for r in planned
    ]
    assert {u for r in planned for _, own in r.values() for batch in own for u in batch[2].tolist()} <= {0.0, 1.0}
    server, _, history = run.rounds(params, IDS)
    w, c, a, b, scale = given()
    expected = dora.dora(w, c, a, b, m, scale, cohorts, LR)
    assert_close([server.params["adapters"]["w"][k] for k in "abm"], list(expected), rtol=2e-4, atol=1e-5)
    merged = dora.merged(w, *expected, scale)
    assert_close(made.merge(server.params)["w"], merged, rtol=2e-4, atol=1e-5)
    assert history[0]["bytes_up"] == 3 * 4 * (RANK * (4 + 3) + 3)


@pytest.mark.parametrize("outside", [True, False])
def test_fedex_lora_leaves_the_residual_in_the_base(outside):
    algorithm = fc.adapters.residual(tuned(), TX)
    server, _, history, cohorts = trained(frozen(algorithm, tuned().untouched) if outside else algorithm)
    w, *factors = oracle.fedex(*given(), cohorts, LR)
    assert_close((server.params["base"]["w"], pair(server.params)), (w, tuple(factors)), rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(server.params["base"]["b"], start()["base"]["b"])
    size = 4 * RANK * (4 + 3)
    assert history[0]["bytes_up"] == 3 * size
    assert history[0]["bytes_down"] == 3 * (size + 4 * 4 * 3)  # the matrix is smaller than three pairs


def test_flora_stacks_the_factors_and_begins_anew():
    algorithm = frozen(fc.adapters.stacked(tuned(), TX), tuned().untouched)
    drawn = [pair(trained(algorithm, IDS[: t + 1])[0].params) for t in range(len(IDS))]
    assert not np.allclose(drawn[0][0], drawn[1][0])
    server, _, _, cohorts = trained(algorithm)
    w, a, b = oracle.flora(*given(), cohorts, LR, lambda t: drawn[t - 1][0])
    assert_close((server.params["base"]["w"], pair(server.params)), (w, (a, b)), rtol=2e-4, atol=1e-5)
    assert np.var(a) == pytest.approx(1 / 4, rel=0.9)


@pytest.mark.parametrize("ranks", [None, (1, 2, 1, 2, 1, 2)])
def test_flexlora_is_the_best_approximation_of_the_mean_product(ranks):
    algorithm = frozen(fc.adapters.decomposed(tuned(), TX, ranks), tuned().untouched)
    server, _, history, cohorts = trained(algorithm)
    own = None if ranks is None else dict(enumerate(ranks))
    product = oracle.flexlora_product(*given(), cohorts, LR, RANK, own, split="right")
    a, b = pair(server.params)
    assert_close(a @ b, product, rtol=5e-4, atol=2e-5)
    np.testing.assert_array_equal(server.params["base"]["w"], start()["base"]["w"])
    columns = 3 * RANK if ranks is None else sum(ranks[c] for c in IDS[0])
    assert history[0]["bytes_up"] == history[0]["bytes_down"] == 4 * columns * (4 + 3)


@pytest.mark.parametrize("make", [fc.adapters.residual, fc.adapters.stacked, fc.adapters.decomposed])
def test_with_one_client_all_are_fedit(make):
    plain = trained(frozen(fc.fedavg(tuned().per_example_loss, TX)), [[1]])[0]
    server = trained(frozen(make(tuned(), TX), tuned().untouched), [[1]])[0]
    assert_close(tuned().merge(server.params), tuned().merge(plain.params), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("make", [fc.adapters.residual, fc.adapters.stacked, fc.adapters.decomposed])
def test_a_round_of_nobody_changes_no_model(make):
    run = Run(frozen(make(tuned(), TX), tuned().untouched), population())
    nobody = lambda cohort: cohort.__class__(**{**vars(cohort), "ids": np.full_like(cohort.ids, -1)})  # noqa: E731
    server, _, _ = run.rounds(start(), [[1, 3]], edit=nobody)
    assert_close(tuned().merge(server.params), tuned().merge(start()), rtol=2e-4, atol=1e-5)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(3, use_bias=False)(x)


@pytest.mark.parametrize("dora", [False, True])
def test_beside_is_the_merged_model(dora):
    loss = fc.tasks.classifier(Net())
    params = Net().init(jax.random.key(0), np.zeros((1, 4)))
    params["params"]["Dense_0"]["bias"] += 0.3
    merged, beside = (fc.lora(loss, params, 2, alpha=3.0, beside=how, dora=dora) for how in (False, True))
    x = merged.init(jax.random.key(1))
    x["adapters"] = jax.tree.map(lambda x: x + 0.1, x["adapters"])
    batch = {k: v[:6] for k, v in population().examples.items()}

    def both(of, adapters):
        def mean_loss(adapters):
            return jnp.mean(of.per_example_loss({**x, "adapters": adapters}, batch, None)[0])

        return jax.value_and_grad(mean_loss)(adapters)

    found = [jax.tree.map(np.asarray, both(of, x["adapters"])) for of in (beside, merged)]
    assert_close(*found)
    matrices = [
        sum(
            v.aval.shape == (4, 5) and e.primitive.name != "stop_gradient"
            for e in jax.make_jaxpr(lambda a, of=of: both(of, a))(x["adapters"]).eqns
            for v in e.outvars
        )
        for of in (beside, merged)
    ]
    assert dora or matrices[0] == 0 < matrices[1]  # neither W + A B nor its gradient; DoRA squares W


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_beside_a_matrix_of_the_librarys_own_layers_an_adapter_counts_once(bits):
    model = fc.models.Llama(11, width=16, hidden=32, layers=1, heads=4, key_heads=2)
    params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))
    base = params if bits is None else fc.models.quantised(params, bits)
    loss = fc.tasks.next_token(model)
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens), "answers": tokens > 1}
    merged, beside = (fc.lora(loss, base, 2, "query|down", beside=how) for how in (False, True))
    x = merged.init(jax.random.key(1))
    x["adapters"] = jax.tree.map(lambda x: x + 0.1, x["adapters"])
    got, want = (of.per_example_loss(x, batch, None)[0] for of in (beside, merged))
    assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert_close(loss(merged.merge(x), batch, None)[0], want, rtol=1e-5, atol=1e-6)
    assert abs(np.asarray(want - loss(base, batch, None)[0])).max() > 1e-3


def test_what_trains_whole_travels_with_the_adapters():
    loss = fc.tasks.classifier(Net())
    params = Net().init(jax.random.key(0), np.zeros((1, 4)))
    tuned = fc.lora(loss, params, 2, "Dense_0/kernel", whole="Dense_1")
    start = jax.tree.map(np.asarray, tuned.init(jax.random.key(1)))
    algorithm = fc.partially_frozen(fc.fedavg(tuned.per_example_loss, TX), tuned.frozen)
    server, _, history = Run(algorithm, population()).rounds(start, IDS)
    after = tree.flatten_with_names(server.params)
    moved = {k for k, x in tree.flatten_with_names(start).items() if np.any(x != after[k])}
    adapter = "adapters/params/Dense_0/kernel/"
    assert moved == {f"{adapter}a", f"{adapter}b", "base/params/Dense_1/kernel"}
    assert history[0]["bytes_up"] == 3 * 4 * (2 * (4 + 5) + 5 * 3)
    assert tuned.whole == ("params/Dense_1/kernel",)


def test_what_is_refused():
    params = Net().init(jax.random.key(0), np.zeros((1, 4)))
    loss = fc.tasks.classifier(Net())
    with pytest.raises(fc.InvalidInput, match="finds none of the parameters"):
        fc.lora(loss, params, 2, whole="head")
    with pytest.raises(fc.InvalidInput, match="train whole and have an adapter"):
        fc.lora(loss, params, 2, whole="Dense_1")
    few = fc.lora(loss, fc.models.quantised(params), 2, "Dense_0/kernel")
    lengths = fc.lora(loss, params, 2, "Dense_0/kernel", dora=True)
    for refused in (few, lengths, fc.lora(loss, params, 2, "Dense_0/kernel", whole="Dense_1")):
        with pytest.raises(fc.InvalidInput, match="by A B alone"):
            Run(fc.adapters.residual(refused, TX), population()).rounds(refused.init(jax.random.key(0)), IDS)
    with pytest.raises(fc.InvalidInput, match="Flax Dense layers"):
        trained(frozen(fc.fedavg(tuned(beside=True).per_example_loss, TX)))
    with pytest.raises(fc.InvalidInput, match="made by fc.lora"):
        fc.adapters.residual(softmax_loss, TX)
    with pytest.raises(fc.InvalidInput, match="whole numbers from 1"):
        fc.adapters.decomposed(tuned(), TX, [0, 1])
    with pytest.raises(fc.InvalidInput, match="at most the adapters', 2"):
        trained(fc.adapters.decomposed(tuned(), TX, [3] * 6))


def test_fresh_adapters_and_names():
    assert tree.nbytes(tuned().fresh(jax.random.key(0))) == 4 * RANK * (4 + 3)
    assert tuned().untouched == "^base/(?!(w)$)"
