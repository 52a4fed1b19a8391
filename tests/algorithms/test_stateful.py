"""Models with state: batch normalisation against its oracle, padding to the last bit, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import OPTIMIZED
from flax import nnx
from oracles import batch_norm
from problems import Run, assert_close, assert_identical, clipped_sgd, population

import fedjax_clip as fc
from fedjax_clip.core import tree


class BatchNormed(nn.Module):
    """A hidden layer with batch normalisation."""

    @nn.compact
    def __call__(self, x, weights=None):
        x = fc.models.BatchNorm()(nn.Dense(5, use_bias=False)(x), weights)
        return nn.Dense(3)(nn.relu(x))


def batch_normed(params, batch, weights, key):
    logits, changed = BatchNormed().apply(params, batch["x"], weights, mutable=["batch_stats"])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}, {**params, **changed}


stateful_loss = fc.local.with_state(batch_normed)
NET = BatchNormed()


def start(seed=0):
    """Parameters and statistics that are not those of the beginning."""
    variables = NET.init(jax.random.key(seed), np.zeros((1, 4)))
    noise = optax.tree.random_like(jax.random.key(seed + 1), variables, sampler=jax.random.uniform)
    return jax.tree.map(lambda x, n: np.asarray(x + 0.5 * n), variables, noise)


def named(variables):
    """The oracle's parameters and statistics."""
    p, s = variables["params"], variables["batch_stats"]["BatchNorm_0"]
    norm = {"gamma": p["BatchNorm_0"]["scale"], "beta": p["BatchNorm_0"]["bias"]}
    rest = {"w1": p["Dense_0"]["kernel"], "w2": p["Dense_1"]["kernel"], "b2": p["Dense_1"]["bias"]}
    return {**rest, **norm}, dict(s)


IDS = ([1, 3, 0], [4, 1, 5], [3, 4, 1])


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("own", [(), ("gamma", "beta", "mean", "var")])
def test_rounds_are_those_of_the_oracle(clip, own):
    tx = optax.sgd(0.2) if clip is None else optax.chain(fc.clipping.clip_by_global_norm(clip), optax.sgd(0.2))
    algorithm = fc.fedavg(stateful_loss, tx, optax.sgd(0.7))
    run = Run(fc.partially_private(algorithm, "BatchNorm") if own else algorithm, population())
    server, clients, _ = run.rounds(start(), IDS)
    params, stats, kept = batch_norm.rounds(*named(start()), run.for_oracle(start(), IDS), 0.2, 0.9, clip, 0.7, own)
    assert_close(named(server.params), (params, stats), rtol=2e-4, atol=1e-5)
    for client, its in kept.items() if own else ():
        model = algorithm_model(run.algorithm, server.params, clients, client)
        assert_close({k: v for part in named(model) for k, v in part.items() if k in own}, its, rtol=2e-4, atol=1e-5)


def algorithm_model(algorithm, params, clients, client):
    return jax.tree.map(np.asarray, algorithm.personal(params, jax.tree.map(lambda x: x[client], clients)))


def test_fedbuff_sends_one_past_model_and_the_state():
    run = Run(fc.fedbuff(stateful_loss, clipped_sgd, max_staleness=3), population())
    assert run.rounds(start(), IDS[:1])[2][0]["bytes_down"] == len(IDS[0]) * tree.nbytes(start())


def test_evaluation_takes_the_running_statistics():
    x, y = population().examples["x"][:5], population().examples["y"][:5]
    losses, _ = stateful_loss(start(), {"x": x, "y": y}, None)
    np.testing.assert_allclose(losses, batch_norm.evaluated(*named(start()), x, y), rtol=1e-5)


class Pictures(nn.Module):
    """A convolution, and a residual network of a block."""

    @nn.compact
    def __call__(self, x, weights=None):
        x = fc.models.BatchNorm()(fc.models.Conv(6, (3, 3))(x.reshape(-1, 4, 4, 1)), weights)
        return fc.models.ResNet(3, (1,), 4, norm="batch")(nn.relu(x), weights)


def of(model):
    def loss_and_state(variables, batch, weights, key):
        logits, changed = model.apply(variables, batch["x"], weights, mutable=["batch_stats"])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"accuracy": logits.argmax(-1) == batch["y"]}, {**variables, **changed}

    return fc.local.with_state(loss_and_state)


class InNnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.9, use_fast_variance=False, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, weights=None):
        mask = None if weights is None else (weights > 0)[:, None]
        return self.last(nnx.relu(self.norm(self.first(x), use_running_average=weights is None, mask=mask)))


def nnx_problem():
    graph, params, stats = nnx.split(InNnx(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def loss_and_state(state, batch, weights, key):
        model = nnx.merge(graph, state["params"], state["batch_stats"])
        logits = model(batch["x"], weights)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        after = {"params": state["params"], "batch_stats": nnx.state(model, nnx.BatchStat)}
        return losses, {"accuracy": logits.argmax(-1) == batch["y"]}, after

    return fc.local.with_state(loss_and_state), {"params": params, "batch_stats": stats}


def test_nnx_is_linen():
    loss, state = nnx_problem()
    p, s = named(start())

    def fill(path, x):
        name = jax.tree_util.keystr(path)
        for part, key in (
            ("first", "w1"),
            ("scale", "gamma"),
            ("norm.*bias", "beta"),
            ("mean", "mean"),
            ("var", "var"),
        ):
            if all(word in name for word in part.split(".*")):
                return jnp.asarray({**p, **s}[key])
        return jnp.asarray(p["w2" if x.ndim == 2 else "b2"])

    state = jax.tree_util.tree_map_with_path(fill, state)
    other, _, _ = Run(fc.fedavg(stateful_loss, clipped_sgd), population()).rounds(start(), IDS)
    server, _, _ = Run(fc.fedavg(loss, clipped_sgd), population()).rounds(state, IDS)
    assert_close(
        sorted(map(np.ravel, jax.tree.leaves(server.params)), key=np.sum),
        sorted(map(np.ravel, jax.tree.leaves(other.params)), key=np.sum),
    )


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("which", ["dense", "pictures"])
def test_a_padded_batch_changes_no_bit(which, optimised):
    """Six examples in one step, of batches of 6 and 12: the same loss, parameters and statistics; of 40, nearly."""
    model = {"dense": NET, "pictures": Pictures()}[which]
    data = population((45, 6), 16 if which == "pictures" else 4)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0), data.examples["x"][:1]))
    algorithm, found = fc.fedavg(of(model), clipped_sgd), []
    for size in (6, 12, 40) if optimised else (6, 12):
        work = fc.extend.LocalWork(batch_size=size, epochs=2)
        run = Run(algorithm, data, work, compiler_options=OPTIMIZED if optimised else None)
        server, _, history = run.rounds(params, ([1], [1]))
        found.append((server.params, [row["loss"] for row in history]))
    assert_identical(found[1], found[0])
    assert_close(found[-1], found[0], rtol=1e-4, atol=1e-5)
    assert np.any(found[0][0]["batch_stats"]["BatchNorm_0"]["var"] != 1)


@pytest.mark.parametrize("optimised", [False, True])
def test_evaluation_has_the_same_bits_in_any_batch_size(optimised):
    x = np.random.default_rng(0).normal(size=(45, 4)).astype(np.float32)
    batch = {"x": x, "y": np.arange(45, dtype=np.int32) % 3}
    evaluate = jax.jit(
        lambda params, batch: stateful_loss(params, batch, None)[0], compiler_options=OPTIMIZED if optimised else None
    )
    whole = np.asarray(evaluate(start(), batch))
    for size in (1, 2, 5, 8, 13, 40):
        few = np.asarray(evaluate(start(), jax.tree.map(lambda x, size=size: x[:size], batch)))
        np.testing.assert_array_equal(few, whole[:size])


def test_clips_and_optimisers_see_no_statistic():
    """A statistic of a thousand moves whole, and neither a clip nor Adam, at client or server, sees it."""
    data = population()
    shifted = fc.FederatedData({**data.examples, "x": 1e3 + data.examples["x"]}, data.offsets)
    run = Run(
        fc.fedavg(stateful_loss, clipped_sgd, optax.adam(1e-3), uplink=fc.uplink.clip_by_global_norm(0.05)),
        shifted,
    )
    server, _, history = run.rounds(start(), IDS)
    assert np.abs(server.params["batch_stats"]["BatchNorm_0"]["mean"]).max() > 100
    assert all(row["update_norm"] <= 0.05 * (1 + 1e-5) and row["client_norm/p90"] < 10 for row in history)
    moments = [x for x in jax.tree.leaves(server.opt_state) if np.ndim(x)]
    assert len(moments) == 2 * len(jax.tree.leaves(start()["params"]))


def test_fedbn_without_norms_is_fedavg():
    """With nothing private, and with the state of a model that has none."""

    def plain(params, batch, key):
        logits = batch["x"] @ params["w"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def with_a_counter(params, batch, weights, key):
        return plain(params, batch, key), {}, {**params, "batch_stats": {"seen": params["batch_stats"]["seen"] + 1.0}}

    w, seen = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), {"seen": np.float32(0)}
    one, _, _ = Run(fc.fedavg(plain, clipped_sgd), population()).rounds({"w": w}, IDS)
    algorithm = fc.fedavg(fc.local.with_state(with_a_counter), clipped_sgd)
    two, _, _ = Run(algorithm, population()).rounds({"w": w, "batch_stats": seen}, IDS)
    assert_close(two.params["w"], one.params["w"])
    assert two.params["batch_stats"]["seen"] > 3
    bn = Run(fc.partially_private(algorithm, "batch_stats"), population())
    three, clients, _ = bn.rounds({"w": w, "batch_stats": seen}, IDS)
    assert_identical(three.params["w"], two.params["w"])
    assert clients.private["batch_stats"]["seen"].tolist() == [2, 18, 0, 8, 12, 2]


def test_refusals():
    data, params = population(), start()
    with pytest.raises(fc.InvalidInput, match="no gradient of one example"):
        fc.fedavg(stateful_loss, optax.sgd(0.1), gradient=fc.local.per_example_gradient(fc.clipping.clip(1.0)))
    with pytest.raises(fc.InvalidInput, match="no gradient of one example"):
        fc.fedavg(stateful_loss, optax.sgd(0.1), gradient=fc.local.private_gradient(1.0, 1.0))
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.2), fc.uplink.gaussian(0.1))
    private = fc.fedavg(stateful_loss, optax.sgd(0.1), uplink=link, reducer=fc.reduce.fixed_mean(3))
    with pytest.raises(fc.InvalidInput, match="without its noise or secure sum"):
        fc.train(private, data, params, rounds=1)
    fc.train(fc.partially_private(private, "BatchNorm"), data, params, rounds=1, cohort_size=3)  # statistics stay
    with pytest.raises(fc.InvalidInput, match="found in none of the parameters"):
        wrong = fc.local.with_state(stateful_loss.function, "^no_such/")
        fc.train(fc.fedavg(wrong, optax.sgd(0.1)), data, params, rounds=1)
    with pytest.raises(fc.InvalidInput, match="trains within an algorithm only"):
        fc.local.mixed_precision(stateful_loss)(params, data.examples, jax.random.key(0))
    with pytest.raises(fc.InvalidInput, match=r"must return \(losses"):
        short = fc.local.with_state(lambda p, b, w, k: stateful_loss.function(p, b, w, k)[:2])
        fc.train(fc.fedavg(short, optax.sgd(0.1)), data, params, rounds=1)
    with pytest.raises(fc.InvalidInput, match="loss_and_state must return the parameters as it got them"):
        bare = fc.local.with_state(
            lambda p, b, w, k: (*stateful_loss.function(p, b, w, k)[:2], {"params": p["params"]})
        )
        fc.train(fc.fedavg(bare, optax.sgd(0.1)), data, params, rounds=1)


def test_a_loss_that_ignores_the_weights_is_refused():
    def ignores(params, batch, weights, key):
        return stateful_loss.function(params, batch, None if weights is None else jnp.ones_like(weights), key)

    algorithm = fc.fedavg(fc.local.with_state(ignores), optax.sgd(0.1))
    with pytest.raises(fc.InvalidInput, match="examples of weight 0 change"):
        fc.train(algorithm, population(), start(), rounds=1, batch_size=4)


def test_statistics_need_with_state():
    def forgets(params, batch, key):
        logits, _ = NET.apply(params, batch["x"], jnp.ones(len(batch["x"])), mutable=["batch_stats"])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    with pytest.raises(fc.InvalidInput, match="batch_stats/BatchNorm_0/mean.*with_state"):
        fc.train(fc.fedavg(forgets, optax.sgd(0.1)), population(), start(), rounds=1, batch_size=1)
    frozen = fc.partially_frozen(fc.fedavg(lambda p, b, k: stateful_loss(p, b, None), optax.sgd(0.1)), "^batch_stats")
    kept = fc.train(frozen, population(), start(), rounds=1, batch_size=4).params["batch_stats"]
    assert_identical(jax.tree.map(np.asarray, kept), start()["batch_stats"])
