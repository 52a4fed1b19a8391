"""JAX's own switches: whatever the registry names trains under them, in the types that it was given.

By default each part is met by some algorithm. ``FEDJAX_CLIP_STRICT=all`` (``make strict``) traces every pair in
float32. In float64, and with every transform, those of ``fc``'s own algorithms are traced, and rounds without clients
run for all that FedAvg and Mime meet; the other algorithms share the parts there.
"""

import contextlib
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_pairs as pairs
from problems import COHORTS, ENTRIES, EVERYTHING, assert_close, assert_identical, entry, parameters, population
from test_pairs import share

import fedjax_clip as fc
from experiments.config import optimisers, registry
from fedjax_clip import models, tasks
from fedjax_clip.core import keys

# How a transform is written that says nothing alone; any other stands for ``name()``, before an optimiser if it is none.
TRANSFORMS = {
    "add_decayed_weights": "add_decayed_weights(0.1)",
    "average": "sgd(0.1)|average(0.9)",
    "clip_by_global_norm": "clip_by_global_norm(1.0)",
    "clip_by_layer_norm": "clip_by_layer_norm(1.0)",
    "clip_by_value": "clip_by_value(1.0)",
    "delta_clip": "delta_clip(1.0, 0.1)",
    "proximal": "proximal(0.1)",
    "prune": "prune(cubic(0.5, 10))",
    "smoothed_clip": "smoothed_clip(1.0)",
    "two_sided_clip": "two_sided_clip(0.1, 1.0)",
    "u_clip": "u_clip(1.0)",
}
SCHEDULES = {
    "cosine": "cosine(0.1, 10)",
    "cubic": "cubic(0.1, 10)",
    "exponential": "exponential(0.1, 0.9)",
    "linear": "linear(0.1, 0.2, 10)",
    "warmup_cosine": "warmup_cosine(0.1, 2, 10)",
}
OPTAX = {"adam", "adamw", "yogi"}  # their bias correction, which is optax's, mixes float and int itself


@contextlib.contextmanager
def switched(*switches):
    with contextlib.ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch)
        yield


def strict(promotion="strict"):
    return switched(jax.enable_x64(True), jax.numpy_dtype_promotion(promotion), jax.numpy_rank_promotion("raise"))


def squared_loss(params, batch, key):
    """One that mixes no types and no ranks itself."""
    x = batch["x"].astype(params["w"].dtype)
    return jnp.sum(jnp.square(fc.drift.calibrated(x @ params["w"] + params["b"][None], batch) - 1), axis=-1)


def softmax_loss(params, batch, key):
    logits = batch["x"].astype(params["w"].dtype) @ params["w"] + params["b"][None]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": tasks.base.hits(logits, batch["y"])}


@pytest.fixture
def given(monkeypatch):
    """Lets ``test_pairs`` build and trace with this loss, and with parameters of this type."""

    def give(dtype):
        monkeypatch.setattr(pairs, "squared_loss", squared_loss)
        monkeypatch.setattr(pairs, "parameters", lambda: {k: x.astype(dtype) for k, x in parameters().items()})

    return give


def check(build, parts):
    """Traces a round with each of the parts, and says which do not pass; what is refused is refused anyway."""
    wrong, passed = [], 0
    for part in parts:
        try:
            algorithm = build(part)
        except fc.InvalidInput as error:
            if "promotion" in str(error):
                wrong.append((part, str(error)))
            continue
        try:
            pairs.trace(algorithm)
            passed += 1
        except Exception as error:
            wrong.append((part, repr(error)[:500]))
    assert not wrong
    return passed


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("algorithm", registry.ALGORITHMS)
def test_every_link_reducer_and_downlink_keeps_types_and_ranks(algorithm, dtype, given):
    given(dtype)
    with strict():
        several = share(algorithm, pairs.rounds(), EVERYTHING and (dtype == "float32" or hasattr(fc, algorithm)))
        wrong, passed = pairs.meet(algorithm, several)
    assert not wrong
    assert passed > (len(several) / 2 if len(several) > 10 else 0) or algorithm in pairs.APART


def with_client(algorithm, text):
    make = pairs.spec.one(pairs.written(algorithm), registry.ALGORITHMS, "--algorithm")
    return make(squared_loss, optimisers.client_tx(text), optimisers.server_tx("sgd(1.0)"))


def transform(name):
    make = registry.OPTIMIZERS[name]
    if "learning_rate" in inspect.signature(make).parameters:
        return f"{name}(0.1)"
    text = TRANSFORMS.get(name, f"{name}()")
    return text if "sgd" in text else f"{text}|sgd(0.1)"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("algorithm", registry.ALGORITHMS)
def test_every_transform_of_a_client_keeps_types_and_ranks(algorithm, dtype, given):
    given(dtype)
    for promotion, names in ("strict", registry.OPTIMIZERS.keys() - OPTAX), ("standard", OPTAX):
        with strict(promotion):
            several = share(algorithm, [transform(n) for n in sorted(names)], EVERYTHING and hasattr(fc, algorithm))
            check(functools.partial(with_client, algorithm), several)


def test_every_transform_of_the_server_and_every_schedule_keeps_types_and_ranks(given):
    given("float32")

    def build(text):
        return fc.fedavg(squared_loss, optimisers.client_tx("sgd(0.1)"), optimisers.server_tx(text))

    names = registry.OPTIMIZERS.keys() - OPTAX - {"proximal"}
    rates = [f"sgd({SCHEDULES[name]})" for name in registry.SCHEDULES]
    with strict():
        assert check(build, [transform(name) for name in names] + rates) == len(names) + len(rates)
        assert check(functools.partial(with_client, "fedavg"), rates) == len(rates)


GRADIENTS = {
    "per example": lambda: {"gradient": fc.local.per_example_gradient(fc.clipping.clip(1.0))},
    "private": lambda: {"gradient": fc.local.private_gradient(1.0, 0.5)},
    "tree": lambda: mechanised(fc.uplink.mechanism.tree(4)),
    "banded": lambda: mechanised(fc.uplink.mechanism.banded(4, 2)),
    "buffers": lambda: mechanised(fc.uplink.mechanism.buffered_toeplitz([0.9, 0.5], [0.2, 0.3])),
    "banded inverse": lambda: mechanised(fc.uplink.mechanism.banded_inverse(3)),
}


def mechanised(mechanism):
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.2), fc.uplink.gaussian(1.0, mechanism=mechanism))
    return {"uplink": link, "reducer": fc.reduce.fixed_mean(3)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_and_mechanisms_keep_types_and_ranks(dtype, given):
    given(dtype)
    with strict():
        check(lambda name: fc.fedavg(squared_loss, optax.sgd(0.1), **GRADIENTS[name]()), list(GRADIENTS))


def test_bfloat16_parameters_stay_so(given):
    given(jnp.bfloat16)
    for algorithm in registry.ALGORITHMS if EVERYTHING else ["scaffold"]:
        check(lambda parts, algorithm=algorithm: pairs.build(algorithm, **parts), share(algorithm, pairs.rounds()))


MODELS = {
    "MLP": (models.MLP((4,), 10), (8, 8, 1), tasks.classifier),
    "CNN": (models.CNN(10, (2, 2), 4), (8, 8, 1), tasks.classifier),
    "ResNet": (models.ResNet(10, (1, 1), 4), (8, 8, 3), tasks.classifier),
    "linear": (models.MLP((), 1), (5,), tasks.regressor),
    "logistic": (models.MLP((), 1), (5,), tasks.base.binary_classifier),
    "words": (models.BagOfWords(3, 16), (5,), tasks.classifier),
    "LSTM": (models.CharLSTM(16, 4, 8, 1), (8,), tasks.language.next_character),
    "Transformer": (models.Transformer(16, 8, 8, 1, 2), (8,), tasks.language.next_character),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_and_losses_keep_types_and_ranks(name):
    model, shape, make_loss = MODELS[name]
    loss, text = make_loss(model), name in ("words", "LSTM", "Transformer")

    def gradient(key):
        x = jnp.zeros((3, *shape), jnp.int32 if text else jnp.float32)
        params = model.init(key, x)
        batch = {"x": x, "y": jnp.zeros(3, jnp.uint8), "text": jnp.zeros((3, 9), jnp.uint8)}

        def total(params):
            out = loss(params, batch, None)
            return jnp.sum(out[0] if isinstance(out, tuple) else out)

        return jax.grad(total)(params)

    with strict():
        found = jax.eval_shape(gradient, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}


def test_a_run_is_the_same_to_the_last_bit_under_every_switch(tmp_path):
    """The whole driver: clips with a history, rounds without clients, checkpoints, evaluation, another generator."""
    data = population()
    link = fc.uplink.chain(fc.uplink.quantile_clip(0.3), fc.uplink.compress(fc.compression.qsgd(4)))
    client_tx = optax.chain(fc.clipping.z_clip(), optax.sgd(0.1))
    algorithm = fc.fedavg(softmax_loss, client_tx, uplink=link, keep_opt_state=True)
    evaluate = fc.evaluator(softmax_loss, {"all": data})

    def train(rounds, where=None):
        sampler, saved = fc.data.sampling.poisson(1), where and fc.extend.Checkpoints(where)
        options = {"sampler": sampler, "batch_size": 4, "seed": 1, "evaluate": evaluate, "eval_every": 2}
        return fc.train(algorithm, data, parameters(), rounds=rounds, checkpoints=saved, **options)

    usual = train(6)
    assert min(row["clients"] for row in usual.history) == 0
    with strict(), jax.debug_nans(True), jax.transfer_guard("disallow"), jax.default_prng_impl("rbg"):
        train(3, tmp_path)
        resumed = train(6, tmp_path)
    assert_identical(resumed.params, usual.params)
    for found, expected in zip(resumed.history, usual.history[-len(resumed.history) :], strict=True):
        for name, value in expected.items():
            if name != "seconds" and not np.isnan(value):
                assert found[name] == value, name
            elif name != "seconds":
                assert found[name] == np.inf, name


OTHER_NUMBERS = "fedavg, dropout"  # the loss draws in the default type, which x64 changes


@pytest.mark.parametrize(
    "name", [name for name in ENTRIES if name != OTHER_NUMBERS] if EVERYTHING else ["fedavg, on a grid"]
)
def test_rounds_are_the_same_under_x64(name):
    run = dataclasses.replace(entry(name), compiler_options=None)
    expected = run.rounds(parameters(), COHORTS)
    with jax.enable_x64(True):
        found = run.rounds(parameters(), COHORTS)
    # Optax's Adam divides in float64, and a gradient near zero may turn with its last bit: 2e-4 of a step of 0.05.
    assert_close(found, expected, atol=1e-5 if "adam locally" in name else 2e-6)


def test_float64_parameters_train_in_float64():
    params = {k: x.astype(np.float64) for k, x in parameters().items()}
    with jax.enable_x64(True):
        result = fc.train(fc.fedavg(softmax_loss, optax.sgd(1e-9)), population(), params, rounds=1)
    moved = result.params["w"] - params["w"]
    assert moved.dtype == np.float64
    assert 0 < np.abs(moved).max() < 1e-8  # float32 would not see it


def empty_rounds():
    """Algorithms by name: what was seen to give NaN where nobody came, or every pair."""
    if EVERYTHING:
        for algorithm in registry.ALGORITHMS:
            for parts in share(algorithm, pairs.rounds(), everything=algorithm in ("fedavg", "mime")):
                yield f"{algorithm}&{'&'.join(parts.values())}", functools.partial(pairs.build, algorithm, **parts)
    few = [("fedavg", pairs.rounds()[0]), ("mime", {"reducer": "median()"}), ("fedbuff", {"links": "qsgd(4)"})]
    for algorithm, parts in few:
        yield f"{algorithm}&{'&'.join(parts.values())}", functools.partial(pairs.build, algorithm, **parts)
    yield "z_clip", lambda: with_client("fedavg", "z_clip()|sgd(0.1)")


@pytest.mark.parametrize(("name", "build"), list(empty_rounds()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_round_without_clients_gives_no_nan_where_jax_looks_for_one(name, build):
    try:
        algorithm = build()
        pairs.trace(algorithm)
    except fc.InvalidInput:
        pytest.skip("refused")
    server, cohort = pairs.start(algorithm)
    nobody = fc.extend.Cohort(**{**vars(cohort), "ids": np.full_like(cohort.ids, -1), "state": cohort.state})
    with jax.debug_nans(True):
        round = jax.jit(lambda *args: algorithm.round(*args), compiler_options=pairs.QUICK)  # traced under the switch
        _, _, metrics = round(server, nobody, jax.random.key(0))
    assert metrics["clients"] == 0
    assert metrics["loss"] == np.inf


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"] if EVERYTHING else ["rbg"])
def test_keys_whose_numbers_change_under_vmap_do_not_make_results_depend_on_the_width(impl):
    algorithm = entry("fedavg, dropout").algorithm

    def rounds(width):
        cohort = fc.extend.plan(population(), np.array([4, 1]), fc.extend.LocalWork(4), seed=0, round=0, width=width)
        cohort = jax.tree.map(lambda x: x[0], cohort)
        round = jax.jit(lambda *args: algorithm.round(*args))  # its traces know nothing of the default generator
        return lambda key: round(algorithm.init(parameters()), cohort, key)[0].params

    alone, together, key = rounds(1), rounds(2), jax.random.key(5, impl=impl)
    assert_close(together(key), alone(key))
    assert np.any(alone(key)["w"] != alone(jax.random.key(6, impl=impl))["w"])
    with jax.default_prng_impl(impl):
        assert_close(together(jax.random.PRNGKey(5)), alone(key))  # raw words of the same key


def test_threefry_keys_stay_what_they_are():
    key = jax.random.key(3)
    assert keys.threefry(key) is key
    assert_identical(jax.random.key_data(keys.threefry(jax.random.PRNGKey(3))), jax.random.key_data(key))
    with jax.default_prng_impl("rbg"):
        assert_identical(jax.random.key_data(keys.seeded(3)), jax.random.key_data(key))
