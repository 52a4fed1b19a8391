"""What the public callables say to an argument of the wrong kind: one sentence, wherever it stands."""

import inspect
import math
import types
import typing
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest

import fedjax_clip as fc
from fedjax_clip import attacks, clipping, compression, reduce, uplink
from fedjax_clip.core import checks
from fedjax_clip.data import clock, sampling, speeds
from fedjax_clip.uplink import mechanism

DATA = fc.FederatedData({"x": np.ones((6, 2), np.float32), "y": np.arange(6) % 2}, [0, 2, 4, 6])
TX, SPEEDS, SAMPLER = optax.sgd(0.1), speeds.lognormal(), sampling.uniform(2)
GRADIENT = fc.local.per_example_gradient(clipping.clip_by_global_norm(1.0))


def loss(params, batch, key):
    return batch["x"] @ params["w"]


# A call that is right of each, by keywords; each argument in turn is then given something of another kind.
CALLS = [
    (clipping.adaptive_gradient_clip, {"ratio": 0.1, "floor": 1e-3}),
    (clipping.auto_clip, {"percent": 10.0, "window": 5}),
    (clipping.clip, {"rule": 1.0, "norm": clipping.l2(), "scope": clipping.whole(), "shape": clipping.hard()}),
    (clipping.clip_by_global_norm, {"max_norm": 1.0}),
    (clipping.clip_by_value, {"max_value": 1.0}),
    (clipping.delta_clip, {"threshold": 1.0, "delta": 0.1}),
    (clipping.groups, {"patterns": {"all": "."}}),
    (clipping.normalised, {"length": 1.0}),
    (clipping.smoothed_clip, {"threshold": 1.0, "alpha": 0.1}),
    (clipping.two_sided_clip, {"lower": 0.1, "upper": 1.0}),
    (clipping.u_clip, {"tx": clipping.clip_by_global_norm(1.0)}),
    (clipping.watch, {"tx": TX}),
    (clipping.z_clip, {"z": 2.5, "decay": 0.9, "warmup": 3}),
    (compression.eden, {"bits": 4, "coding": "fixed"}),
    (compression.kmeans, {"levels": 4, "iterations": 2, "coding": "fixed"}),
    (compression.prune, {"sparsity": 0.5}),
    (compression.qsgd, {"bits": 4, "bucket": 8, "coding": "fixed"}),
    (compression.random_k, {"k": 2, "values": compression.qsgd(4)}),
    (compression.rotated, {"compressor": compression.qsgd(4)}),
    (compression.terngrad, {"bucket": 8}),
    (compression.threshold, {"at": 0.1}),
    (compression.top_k, {"k": 0.5, "values": compression.qsgd(4), "positions": "rice"}),
    (compression.uniform, {"bits": 4, "bucket": 8, "coding": "fixed"}),
    (uplink.at_client, {"tx": TX, "bound": 1.0}),
    (uplink.clip_by_global_norm, {"max_norm": 1.0}),
    (uplink.by_group, {"link": uplink.clip_by_global_norm(1.0), "groups": {"few": [0]}}),
    (uplink.compress, {"compressor": compression.qsgd(4)}),
    (uplink.count_sketch, {"rows": 3, "columns": 5, "k": 2, "momentum": 0.9, "seed": 0}),
    (uplink.gaussian, {"noise_multiplier": 1.0, "noise_cohort": 10.0, "mechanism": None}),
    (uplink.integer_grid, {"bits": 16}),
    (uplink.local_gaussian, {"noise_multiplier": 1.0}),
    (uplink.memory, {"tx": TX, "momentum": 0.5, "step": 0.5}),
    (uplink.with_bias, {"link": uplink.clip_by_global_norm(1.0)}),
    (uplink.power_sgd, {"rank": 2}),
    (uplink.quantile_clip, {"initial": 1.0, "target_unclipped_quantile": 0.5, "rate": 0.2, "bits_noise": 1.0}),
    (uplink.skellam, {"noise_multiplier": 1.0, "bits": 16}),
    (uplink.zeroing, {"initial": 1.0, "rate": 0.2, "multiplier": 2.0, "increment": 1.0, "norm": clipping.linf()}),
    (mechanism.banded, {"rounds": 4, "bands": 2}),
    (mechanism.tree, {"rounds": 4}),
    (reduce.arc, {"num_bad": 1, "reducer": reduce.median()}),
    (reduce.bucketing, {"reducer": reduce.median(), "size": 2}),
    (reduce.bulyan, {"num_bad": 1}),
    (reduce.caf, {"num_bad": 1}),
    (reduce.centered_mean, {"threshold": 1.0, "iterations": 2}),
    (reduce.dnc, {"num_bad": 1, "iterations": 2, "coordinates": 5, "fraction": 1.0}),
    (reduce.fixed_mean, {"denominator": 2.0}),
    (reduce.flame, {"noise": 0.1}),
    (reduce.fltrust, {"root": 0}),
    (reduce.geometric_median, {"iterations": 2, "smoothing": 1e-6}),
    (reduce.krum, {"num_bad": 1, "num_chosen": 1}),
    (reduce.mda, {"num_bad": 1}),
    (reduce.modular_sum, {"cohort_size": 3, "threshold": 2}),
    (reduce.nnm, {"num_bad": 1, "reducer": reduce.median()}),
    (reduce.norm_bounded, {"max_norm": 1.0, "reducer": reduce.median()}),
    (reduce.smea, {"num_bad": 1}),
    (reduce.trimmed_mean, {"num_bad": 1}),
    (attacks.alie, {"reducer": reduce.median(), "clients": [0], "z": 1.0}),
    (attacks.backdoor, {"data": DATA, "clients": [0], "features": [0], "value": 1.0, "target": 1, "fraction": 0.5}),
    (attacks.ipm, {"reducer": reduce.median(), "clients": [0], "epsilon": 0.1}),
    (attacks.label_flip, {"data": DATA, "clients": [0], "num_classes": 2, "label": "y"}),
    (attacks.mimic, {"reducer": reduce.median(), "clients": [0], "target": 1}),
    (attacks.noise, {"clients": [0], "std": 1.0}),
    (attacks.optimal_alie, {"reducer": reduce.median(), "clients": [0], "most": 1.0, "candidates": 2}),
    (attacks.optimal_ipm, {"reducer": reduce.median(), "clients": [0], "most": 1.0, "candidates": 2}),
    (attacks.scaling, {"clients": [0], "factor": 2.0}),
    (attacks.triggered, {"data": DATA, "features": [0], "value": 1.0, "target": 1, "field": "x", "label": "y"}),
    (sampling.available, {"cohort_size": 2, "period": 4, "duty": 0.5}),
    (sampling.by_size, {"cohort_size": 2}),
    (sampling.poisson, {"cohort_size": 2.0}),
    (sampling.round_robin, {"cohort_size": 2}),
    (sampling.uniform, {"cohort_size": 2}),
    (speeds.batch_budget, {"speeds": SPEEDS, "seconds": 1.0, "most": 4}),
    (speeds.budget, {"speeds": SPEEDS, "seconds": 1.0, "most": 4}),
    (speeds.lognormal, {"step": 1.0, "message": 0.0, "sigma": 1.0}),
    (speeds.two_tier, {"step": 1.0, "message": 0.0, "slowdown": 5.0, "slow": 0.3}),
    (clock.buffered, {"sampler": SAMPLER, "speeds": SPEEDS, "buffer_size": 1, "concurrency": 2, "dropout": 0.1}),
    (clock.synchronous, {"sampler": SAMPLER, "speeds": SPEEDS, "keep": 1, "deadline": 1.0, "dropout": 0.1}),
    (fc.compressed_broadcast, {"algorithm": fc.fedavg(loss, TX), "compressor": compression.qsgd(4)}),
    (fc.episode, {"per_example_loss": loss, "threshold": 1.0, "client_tx": TX, "fresh_batches": 1}),
    (fc.episode_plus, {"per_example_loss": loss, "client_tx": TX, "threshold": 1.0, "reducer": None}),
    (fc.fedavg, {"per_example_loss": loss, "client_tx": TX, "server_tx": TX, "uplink": None, "reducer": None}),
    (fc.fedbuff, {"per_example_loss": loss, "client_tx": TX, "max_staleness": 2, "exponent": 0.5}),
    (fc.feddyn, {"per_example_loss": loss, "client_tx": TX, "alpha": 0.1}),
    (fc.fednova, {"per_example_loss": loss, "client_tx": TX, "server_tx": TX, "uplink": None, "reducer": None}),
    (fc.mime, {"per_example_loss": loss, "client_tx": TX, "beta": 0.9}),
    (
        fc.scaffold,
        {"per_example_loss": loss, "client_tx": TX, "uplink": None, "variate_uplink": None, "gradient": GRADIENT},
    ),
    (fc.partially_frozen, {"algorithm": fc.fedavg(loss, TX), "frozen": "w"}),
    (fc.partially_private, {"algorithm": fc.fedavg(loss, TX), "private": "w"}),
    (fc.extend.algorithm, {"round": len, "per_example_loss": loss, "client_tx": TX, "beside": [None]}),
    (
        fc.uplink.stateless,
        {"encode": lambda update, ctx: (update, {}), "decode": None, "promises": fc.uplink.Promises()},
    ),
    (fc.local.proximal, {"mu": 0.1}),
    (fc.local.per_example_gradient, {"example_tx": TX}),
    (fc.local.private_gradient, {"max_norm": 1.0, "noise_multiplier": 1.0}),
    (fc.extend.LocalWork, {"batch_size": 2, "epochs": 1, "steps": None}),
    (
        fc.extend.plan,
        {
            "data": DATA,
            "ids": [0, 1],
            "work": fc.extend.LocalWork(),
            "seed": 0,
            "round": 0,
            "num_devices": 1,
            "width": 1,
        },
    ),
    (fc.evaluator, {"per_example_loss": loss, "sets": {"a": DATA}, "batch_size": 4, "population": DATA}),
    (fc.data.folds.clients, {"data": DATA, "num_folds": 2, "seed": 0}),
    (fc.data.folds.examples, {"data": DATA, "num_folds": 2, "seed": 0}),
    (fc.lora, {"per_example_loss": loss, "base": {"w": np.ones((2, 2))}, "rank": 1, "pattern": "w"}),
    (fc.data.partition.dirichlet, {"examples": DATA.examples, "num_clients": 2, "alpha": 1.0, "label": "y", "seed": 0}),
    (fc.data.partition.iid, {"examples": DATA.examples, "num_clients": 2, "seed": 0}),
    (fc.data.partition.quantity_skew, {"examples": DATA.examples, "num_clients": 2, "sigma": 1.0, "seed": 0}),
    (fc.data.partition.shards, {"examples": DATA.examples, "num_clients": 2, "classes_per_client": 1, "seed": 0}),
    (fc.data.quality.add_outliers, {"data": DATA, "rate": 0.1, "scale": 2.0, "field": "x", "clients": [0], "seed": 0}),
    (
        fc.data.quality.flip_labels,
        {"data": DATA, "rate": 0.1, "num_classes": 2, "label": "y", "clients": [0], "seed": 0},
    ),
    (fc.data.quality.oversample, {"data": DATA, "num_classes": 2, "label": "y", "seed": 0}),
    (fc.data.quality.weigh_classes, {"data": DATA, "num_classes": 2, "label": "y"}),
    (fc.data.quality.winsorise, {"tail": 0.1}),
    (fc.data.partition.plot, {"data": DATA, "label": "y", "num_classes": 2}),
    (fc.data.statistics.federated_sums, {"data": DATA, "message": len}),
    (fc.data.statistics.label_counts, {"data": DATA, "num_classes": 2, "label": "y"}),
    (fc.data.statistics.moments, {"data": DATA, "field": "x"}),
    (fc.sweeping.random, {"num_points": 2, "seed": 0}),
    (fc.sweeping.rungs, {"rounds": 4, "num_points": 4, "halving": 2}),
    (fc.privacy.epsilon, {"noise_multiplier": 1.0, "sampler": SAMPLER, "num_clients": 9, "rounds": 2, "delta": 0.1}),
]
WRONG = ["a", True, 1.5, -0.5, math.nan, None, [1.0], {}, lambda x: x]


def fits(value, annotation):
    """Whether a value is of an argument's kind; a float may be whole, and what it may be further is for the function."""
    several = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    kinds = typing.get_args(annotation) if several else (annotation,)
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin is Callable and callable(value):
            return True
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return True
        if origin in (typing.Any, inspect.Parameter.empty) or (
            isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool))
        ):
            return True
    return False


@pytest.mark.parametrize(("call", "arguments"), CALLS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_an_argument_of_the_wrong_kind_is_one_sentence(call, arguments):
    signature = inspect.signature(call)
    if call is clipping.watch:
        arguments = {**arguments, "fired": lambda updates: True}
    call(**arguments)
    for name in arguments:
        for wrong in WRONG:
            if name not in ("per_example_loss", "fired") and not fits(wrong, signature.parameters[name].annotation):
                with pytest.raises(fc.InvalidInput) as error:
                    call(**{**arguments, name: wrong})
                assert "\n" not in str(error.value), (name, wrong)


@pytest.mark.parametrize(("call", "arguments"), CALLS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_numbers_of_numpy_are_numbers(call, arguments):
    def of_numpy(value):
        return np.int64(value) if type(value) is int else np.float32(value) if type(value) is float else value

    fired = {"fired": lambda updates: True} if call is clipping.watch else {}
    call(**{name: of_numpy(value) for name, value in arguments.items()}, **fired)


def test_a_sentence_is_short_whatever_came():
    for value in ("x" * 10_000, 10**5000, list(range(10_000)), np.arange(10_000)):
        with pytest.raises(fc.InvalidInput) as error:
            checks.count("n", value, most=3)
        assert len(str(error.value)) < 200


def test_traced_values_pass():
    def traced(x):
        checks.count("n", x)
        checks.positive("x", x)
        checks.fraction("x", x)
        checks.within("x", x, 5, 6)
        return x

    jax.jit(traced)(-1.0)
