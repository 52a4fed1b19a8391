"""How rounds reach the devices: the width, what is remembered of it, and loops that can be differentiated."""

import dataclasses
import gc
import math
import types
import warnings
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    ENTRIES,
    EVERYTHING,
    READERS,
    assert_close,
    assert_identical,
    entry,
    parameters,
    population,
    softmax_loss,
)

import fedjax_clip as fc
from fedjax_clip.training import width
from fedjax_clip.training.dispatch import Dispatcher
from fedjax_clip.training.planner import Planner
from fedjax_clip.training.states import InMemory

LOOPS = ENTRIES if EVERYTHING else sorted(READERS)  # of loops, one of each


def planner(run, cohort_size=4, length=1, work=None):
    sampler = fc.data.sampling.uniform(cohort_size)
    return Planner(run.data, sampler, work or run.work, jax.local_devices()[:1], 0, length)


def started(run):
    server, clients = run.start(parameters())
    return server, InMemory(clients)


@pytest.mark.parametrize(
    ("platform", "kind", "shapes", "chosen"),
    [
        ("tpu", "TPU v5 lite", [(784, 200), (200, 200), (200, 10)], 16),  # task M's
        ("tpu", "TPU v5 lite", [(3, 3, 32, 64), (9216, 128)], 4),  # the EMNIST CNN
        ("tpu", "TPU v6 lite", [(3, 3, 32, 64), (9216, 128)], 4),
        ("tpu", "TPU v4", [(3, 3, 32, 64), (9216, 128)], 1),
        ("tpu", "TPU v5 lite", [(3, 3, 512, 512)] * 5, 1),
        ("gpu", "NVIDIA H100", [(784, 200), (200, 200), (200, 10)], 3),
        ("gpu", "NVIDIA H100", [(3, 3, 1, 8)], 1),
        ("gpu", "NVIDIA H100", [], 16),
    ],
)
def test_the_width_of_an_accelerator_goes_by_the_model_s_size(platform, kind, shapes, chosen):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    params = [np.broadcast_to(np.float32(0), shape) for shape in shapes]
    assert width.on_accelerator(device, params) == chosen


def test_no_device_trains_more_clients_at_once_than_it_has():
    ours = planner(entry("fedavg"), cohort_size=3)
    assert width.choose(ours, parameters(), 0) == 3
    ours.on_cpu = False
    assert width.choose(ours, parameters(), 0) == 3


def test_small_models_train_all_clients_at_once_where_none_waits():
    def chosen(sizes, model=parameters(), **work):  # noqa: B008
        run = dataclasses.replace(entry("fedavg"), data=population(sizes))
        return width.choose(planner(run, 20, work=fc.extend.LocalWork(4, **work)), model, 0)

    uneven = [3, 5] * 10
    assert chosen([4] * 20) == chosen(uneven, steps=3) == 20
    assert chosen(uneven) == 16
    assert chosen([4] * 20, {"w": np.zeros(2**14, np.float32)}) == 16  # of 64 KiB each
    assert chosen([4] * 20, {"w": np.zeros(2**14 + 1, np.float32)}) == 1


def test_a_resumed_run_keeps_its_width(tmp_path):
    run = entry("fedavg")

    def train(rounds, **options):
        return fc.train(run.algorithm, run.data, parameters(), rounds=rounds, cohort_size=4, batch_size=4, **options)

    straight = train(5, clients_per_chunk=2)
    train(3, clients_per_chunk=2, checkpoints=fc.extend.Checkpoints(tmp_path))
    resumed = train(5, checkpoints=fc.extend.Checkpoints(tmp_path))
    assert int(resumed.state.run["width"]) == 2
    assert_identical(resumed.state[:2], straight.state[:2])


def test_training_the_same_algorithm_again_compiles_nothing(compilations):
    algorithm, data = ENTRIES["fedavg, stateful link"](), population()
    evaluate = fc.evaluator(softmax_loss, {"all": data})

    def train(seed):
        fc.train(algorithm, data, parameters(), rounds=3, cohort_size=4, batch_size=4, seed=seed, evaluate=evaluate)
        return len(compilations)

    assert train(0) > 0
    assert [train(seed) for seed in (1, 2)] == [train(0)] * 2


def test_an_algorithm_that_is_gone_leaves_nothing_behind(compilations):
    def build(hyper):
        return fc.fedavg(lambda *args: softmax_loss(*args), optax.sgd(hyper["lr"]))  # all of it new

    algorithm = build({"lr": 0.1})
    gone = weakref.ref(algorithm.round), weakref.ref(build)
    run = entry("fedavg")
    dispatcher = Dispatcher(algorithm, planner(run), *started(run))
    for devices in (None, fc.placement.mesh(clients=1)):
        fc.train(algorithm, run.data, parameters(), rounds=2, cohort_size=4, devices=devices)
    fc.sweep(build, {"lr": np.float32([0.1])}, run.data, parameters(), softmax_loss, rounds=1)
    assert compilations
    del algorithm, build, dispatcher
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_blocks_end_where_something_is_due():
    cut, start, five = [], 3, planner(entry("fedavg"), length=5)
    while start < 20:
        block = five.first_of(range(start, 20), 4, 0, 10)
        cut.append((block.start, start := block.stop))
    assert cut == [(3, 4), (4, 8), (8, 10), (10, 12), (12, 16), (16, 20)]


def test_blocks_hold_as_many_rounds_as_take_a_tenth_of_a_second():
    run = entry("fedavg")
    quick = planner(run, length=None)
    lengths = []
    for quick.seconds in (math.inf, 1.0, 0.02, 1e-4):
        lengths.append(len(quick.first_of(range(3, 1000))))
    assert lengths == [1, 1, 5, 64]
    assert len(quick.first_of(range(3, 1000), 10)) == 7
    wide = fc.extend.LocalWork(batch_size=4, steps=2**14)  # whose example numbers take 2 MiB a round
    assert planner(run, length=None, work=wide).length == 1


def test_blocks_of_any_length_share_one_shape():
    run = entry("fedavg")
    blocks = Planner(run.data, fc.data.sampling.poisson(3), run.work, jax.local_devices()[:1], 0)
    blocks.plan(range(64))  # the largest
    shapes = {blocks.plan(range(r, r + 1 + r % 3)).cohorts.example_weight.shape for r in range(30)}
    assert len(shapes) == 1


def train_images(layer):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(layer(2, (3, 3))(x).reshape(x.shape[0], -1))

    def loss(params, batch, key):
        return optax.losses.softmax_cross_entropy_with_integer_labels(Model().apply(params, batch["x"]), batch["y"])

    x = np.random.default_rng(0).normal(size=(6, 5, 5, 1)).astype(np.float32)
    data = fc.FederatedData({"x": x, "y": np.arange(6) % 2}, np.array([0, 3, 6]))
    params = Model().init(jax.random.key(0), x[:1])
    remembering = fc.uplink.memory(fc.clipping.clip_by_global_norm(1.0))  # the warning's trace needs clients' states
    return fc.train(fc.fedavg(loss, optax.sgd(0.1), uplink=remembering), data, params, rounds=1)


def test_a_model_of_slow_convolutions_is_warned_of():
    with pytest.warns(UserWarning, match=r"use fedjax_clip\.models\.Conv in place of nn\.Conv"):
        train_images(nn.Conv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_images(fc.models.Conv)


@pytest.mark.parametrize(
    ("name", "width"),  # where the laws run, too, which have compiled the round
    [
        pytest.param(name, width, id=f"{width}-@{name}")
        for name, width in [*((name, 1) for name in LOOPS), ("fedavg", 2), ("scaffold", 2)]
    ],
)
def test_a_differentiable_round_is_the_round(name, width):
    run = entry(name, width=width)
    quick = dataclasses.replace(run, compiler_options=None)
    edited = quick.rounds(parameters(), [[4, 1, 3]], edit=fc.extend.Cohort.differentiable)
    assert_close(edited, run.rounds(parameters(), [[4, 1, 3]]))


@pytest.mark.parametrize("width", [1, 2])
def test_the_gradient_of_a_loss_after_two_rounds(width):
    """With respect to threshold and rates: reverse mode through scans is forward mode through loops, and differences."""
    run = dataclasses.replace(entry("fedavg"), width=width)
    server, clients = run.start(parameters())
    cohorts = [
        jax.tree.map(lambda x: x[0], run.cohort(ids, r, clients)) for r, ids in enumerate([[4, 1, 3], [5, 2, 0]])
    ]

    def validation_loss(hyper, cohorts):
        clip = fc.clipping.clip_by_global_norm(hyper["threshold"])
        tx = optax.chain(clip, optax.sgd(hyper["client_lr"]))
        algorithm = fc.fedavg(softmax_loss, tx, optax.sgd(hyper["server_lr"]))
        state = server
        for cohort in cohorts:
            state, *_ = algorithm.round(state, cohort, jax.random.key(0))
        return jnp.mean(softmax_loss(state.params, run.data.examples, None)[0])

    hyper = {"threshold": 0.7, "client_lr": 0.2, "server_lr": 1.1}
    hyper = {name: jnp.float32(value) for name, value in hyper.items()}
    reverse = jax.jit(jax.grad(validation_loss))(hyper, [c.differentiable() for c in cohorts])
    plain = jax.jit(lambda h: validation_loss(h, cohorts))
    for name in hyper:
        one = {k: jnp.float32(k == name) for k in hyper}
        forward = jax.jvp(plain, (hyper,), (one,))[1]
        near = [plain({**hyper, name: hyper[name] + step}) for step in (-1e-2, 1e-2)]
        assert_close(reverse[name], forward, rtol=1e-4, atol=1e-6)
        assert_close(reverse[name], (near[1] - near[0]) / 2e-2, rtol=2e-2, atol=1e-4)
        assert abs(float(reverse[name])) > 1e-3


def test_the_gradient_is_finite_where_a_norm_is_zero():
    def length(x):
        tx, grads = fc.clipping.clip_by_global_norm(1.0), {"x": x * jnp.zeros(3)}
        return tx.update(grads, tx.init(grads))[0]["x"].sum()

    assert_identical(jax.grad(length)(jnp.float32(2)), jnp.float32(0))
