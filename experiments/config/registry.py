"""The names that flags may use, and what they build."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import fedjax_clip as fc
from experiments.config import spec
from fedjax_clip import attacks, clipping, compression, reduce, tasks, uplink
from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import clock, sampling, speeds
from fedjax_clip.uplink import mechanism

TASKS: Mapping[str, Callable[..., tasks.Task]] = {
    "ames": tasks.ames,
    "chem97": tasks.chem97,
    "cifar": tasks.cifar,
    "csv": tasks.csv,
    "digits": tasks.digits,
    "emnist": tasks.emnist,
    "fashion_mnist": tasks.fashion_mnist,
    "heart": tasks.heart,
    "insteval": tasks.insteval,
    "linear_regression": tasks.linear_regression,
    "mlp_regression": tasks.mlp_regression,
    "mnist": tasks.mnist,
    "movielens": tasks.movielens,
    "npz": tasks.npz,
    "relu_classifier": tasks.relu_classifier,
    "schools": tasks.schools,
    "shakespeare_lora": tasks.shakespeare_lora,
    "shakespeare_lstm": tasks.shakespeare_lstm,
    "shakespeare_transformer": tasks.shakespeare_transformer,
    "text_files": tasks.text_files,
    "tfds": tasks.tfds,
    "tweets": tasks.tweets,
    "two_nodes": tasks.two_nodes,
}

SPEEDS: Mapping[str, Callable[..., speeds.Speeds]] = {
    "lognormal": speeds.lognormal,
    "measured": speeds.measured,
    "two_tier": speeds.two_tier,
}


def _buffered(speeds: Any, concurrency: int, dropout: float = 0.0, *, cohort_size: int) -> clock.Clock:
    asked = sampling.uniform(cohort_size)
    return clock.buffered(asked, speeds, buffer_size=cohort_size, concurrency=concurrency, dropout=dropout)


def _synchronous(
    speeds: Any, select: int | None = None, deadline: float = math.inf, dropout: float = 0.0, *, cohort_size: int
) -> clock.Clock:
    if select is not None and select < cohort_size:
        raise InvalidInput(f"select must be at least the cohort's size, {cohort_size}, not {select}.")
    asked = sampling.uniform(cohort_size if select is None else select)
    return clock.synchronous(asked, speeds, keep=cohort_size, deadline=deadline, dropout=dropout)


SAMPLERS: Mapping[str, Callable[..., sampling.Sampler | clock.Clock]] = {
    "available": sampling.available,
    "b_min_sep": sampling.b_min_sep,
    "balls_in_bins": sampling.balls_in_bins,
    "buffered": _buffered,
    "by_size": sampling.by_size,
    "cyclic_poisson": sampling.cyclic_poisson,
    "poisson": sampling.poisson,
    "round_robin": sampling.round_robin,
    "synchronous": _synchronous,
    "truncated_poisson": sampling.truncated_poisson,
    "uniform": sampling.uniform,
}


def samplers(cohort_size: int) -> dict[str, Callable[..., sampling.Sampler | clock.Clock]]:
    """The samplers with the cohort's size filled in."""
    return {name: functools.partial(make, cohort_size=cohort_size) for name, make in SAMPLERS.items()}


COMPRESSORS: Mapping[str, Callable[..., compression.Compressor]] = {
    "eden": compression.eden,
    "floats": compression.floats,
    "kmeans": compression.kmeans,
    "qsgd": compression.qsgd,
    "random_k": compression.random_k,
    "rotated": compression.rotated,
    "sign": compression.sign,
    "terngrad": compression.terngrad,
    "threshold": compression.threshold,
    "top_k": compression.top_k,
    "uniform": compression.uniform,
}


def _as_link(make: Callable[..., compression.Compressor]) -> Callable[..., fc.uplink.Uplink]:
    return functools.wraps(make)(lambda *args, **kwargs: uplink.compress(make(*args, **kwargs)))


def _quantile_clip(
    initial: float = 0.1,
    target_unclipped_quantile: float = 0.5,
    rate: float = 0.2,
    bits_noise: float | None = None,
    by_layer: bool = False,
    allocation: Literal["global", "equal"] = "global",
) -> fc.uplink.Uplink:
    scope = clipping.layer() if by_layer else None
    return uplink.quantile_clip(initial, target_unclipped_quantile, rate, bits_noise, scope, allocation)


UPLINKS: Mapping[str, Callable[..., fc.uplink.Uplink]] = {
    **{name: _as_link(make) for name, make in COMPRESSORS.items()},
    "auto_clip": lambda percent=10.0, window=1000: uplink.at_client(
        clipping.auto_clip(percent, window), keep_state=True
    ),
    "by_leaf": lambda compressor: uplink.compress(compressor, by_leaf=True),
    "clip21": lambda max_norm, momentum=1.0, step=1.0: uplink.memory(
        clipping.clip_by_global_norm(max_norm), momentum, step
    ),
    "clip_by_global_norm": uplink.clip_by_global_norm,
    "clip_by_layer_norm": lambda max_norm: uplink.at_client(clipping.clip(max_norm, scope=clipping.layer())),
    "count_sketch": uplink.count_sketch,
    "ef21": lambda compressor, momentum=1.0, step=1.0: uplink.memory(uplink.compress(compressor), momentum, step),
    "discrete_gaussian": uplink.discrete_gaussian,
    "error_feedback": uplink.error_feedback,
    "fedexp": uplink.fedexp,
    "gaussian": uplink.gaussian,
    "integer_grid": uplink.integer_grid,
    "local_gaussian": uplink.local_gaussian,
    "normec": lambda beta, alpha=1.0: uplink.memory(clipping.smoothed_clip(beta, alpha)),
    "power_sgd": uplink.power_sgd,
    "preconditioned": uplink.preconditioned,
    "quantile_clip": _quantile_clip,
    "relative_to_last": uplink.relative_to_last,
    "scaling": attacks.scaling,
    "sign_flip": attacks.sign_flip,
    "skellam": uplink.skellam,
    "zeroing": uplink.zeroing,
}

MECHANISMS: Mapping[str, Callable[..., mechanism.Mechanism]] = {
    "banded": mechanism.banded,
    "banded_inverse": mechanism.banded_inverse,
    "blt": mechanism.blt,
    "buffered_toeplitz": mechanism.buffered_toeplitz,
    "inverse_toeplitz": mechanism.inverse_toeplitz,
    "toeplitz": mechanism.toeplitz,
    "tree": mechanism.tree,
}

IN_UPLINKS: Mapping[str, Callable[..., Any]] = {**UPLINKS, **COMPRESSORS, **MECHANISMS}  # what a link may be given

DOWNLINKS: Mapping[str, Callable[..., Callable[[fc.extend.Algorithm], fc.extend.Algorithm]]] = {
    "difference": lambda compressor: lambda algorithm: fc.compressed_broadcast(algorithm, compressor),
    "model": lambda compressor: lambda algorithm: fc.compressed_broadcast(algorithm, compressor, relative=False),
}


def _ckks_mean(*, cohort_size: int) -> fc.reduce.Reducer:
    return fc.secure.ckks_mean(cohort_size)


def _modular_sum(threshold: int | None = None, *, cohort_size: int) -> fc.reduce.Reducer:
    return fc.reduce.modular_sum(cohort_size, threshold)


def _pairwise_masks(threshold: int | None = None, *, cohort_size: int) -> fc.reduce.Reducer:
    return fc.secure.pairwise_masks(cohort_size, threshold)


SECURE: Mapping[str, Callable[..., fc.reduce.Reducer]] = {
    "ckks_mean": _ckks_mean,
    "modular_sum": _modular_sum,
    "pairwise_masks": _pairwise_masks,
}

REDUCERS: Mapping[str, Callable[..., fc.reduce.Reducer]] = {
    **SECURE,
    "alie": attacks.alie,
    "bucketing": reduce.bucketing,
    "centered_mean": reduce.centered_mean,
    "fixed_mean": fc.reduce.fixed_mean,
    "fltrust": reduce.fltrust,
    "geometric_median": reduce.geometric_median,
    "ipm": attacks.ipm,
    "krum": reduce.krum,
    "median": reduce.median,
    "mimic": attacks.mimic,
    "norm_bounded": reduce.norm_bounded,
    "trimmed_mean": reduce.trimmed_mean,
    "uniform_mean": fc.reduce.uniform_mean,
    "weighted_mean": fc.reduce.weighted_mean,
}


NOISES = ("discrete_gaussian", "gaussian", "skellam")  # on the sum, so that ``--target_epsilon`` can solve for it


def uplinks(noise_multiplier: float | None) -> Mapping[str, Callable[..., fc.uplink.Uplink]]:
    """The links, with this noise for a link of ``NOISES`` that is given none."""
    if noise_multiplier is None:
        return UPLINKS
    return {**UPLINKS, **{name: functools.partial(UPLINKS[name], noise_multiplier) for name in NOISES}}


def reducers(cohort_size: int) -> Mapping[str, Callable[..., fc.reduce.Reducer]]:
    """The reducers with the cohort's size filled in, for a ``fixed_mean`` if it is given no denominator."""
    secure = {name: functools.partial(make, cohort_size=cohort_size) for name, make in SECURE.items()}
    return {**REDUCERS, **secure, "fixed_mean": lambda denominator=cohort_size: fc.reduce.fixed_mean(denominator)}


def needed_reducer(link: fc.uplink.Uplink) -> str:
    """The name of the reducer without which a link says nothing; empty where any will do."""
    if link.promises.noise is uplink.Noise.SERVER:
        return "fixed_mean"
    if link.promises.noise is uplink.Noise.CLIENT:
        return "uniform_mean"
    return "modular_sum" if link.promises.grid else ""


Made = tuple[
    Callable[..., fc.extend.Algorithm], dict[str, Any]
]  # what builds an algorithm, and how much its clients train


def _work(local_epochs: int | None, local_steps: int | None) -> dict[str, Any]:
    if local_epochs is not None and local_steps is not None:
        raise InvalidInput("local_epochs and local_steps exclude each other: give one of them.")
    local_epochs = 1 if local_epochs is None else local_epochs
    fc.extend.LocalWork(epochs=local_epochs, steps=local_steps)  # says at once what is wrong with them
    return {"local_epochs": local_epochs, "local_steps": local_steps}


def _without_population(make: Callable[..., fc.extend.Algorithm]) -> Callable[..., fc.extend.Algorithm]:
    return lambda *args, num_clients, **kwargs: make(*args, **kwargs)


def _fedavg(local_epochs: int | None = None, local_steps: int | None = None, keep_opt_state: bool = False) -> Made:
    make = functools.partial(fc.fedavg, keep_opt_state=keep_opt_state)
    return _without_population(make), _work(local_epochs, local_steps)


def _fedbuff(
    max_staleness: int = 10, exponent: float = 0.5, local_epochs: int | None = None, local_steps: int | None = None
) -> Made:
    make = functools.partial(fc.fedbuff, max_staleness=max_staleness, exponent=exponent)
    return _without_population(make), _work(local_epochs, local_steps)


def _fedsgd() -> Made:
    return _without_population(fc.fedsgd), {}


def _episode(
    threshold: float,
    fresh_batches: int | None = None,
    local_epochs: int | None = None,
    local_steps: int | None = None,
) -> Made:
    def make(loss, client, server, *, num_clients, **kwargs):
        return fc.episode(loss, threshold, client, server, fresh_batches=fresh_batches, **kwargs)

    return make, _work(local_epochs, local_steps)


def _episode_plus(threshold: float, local_epochs: int | None = None, local_steps: int | None = None) -> Made:
    def make(loss, client, server, **kwargs):
        return fc.episode_plus(loss, threshold, client, server, **kwargs)

    return make, _work(local_epochs, local_steps)


def _partially_private(private: str, local_epochs: int | None = None, local_steps: int | None = None) -> Made:
    make = functools.partial(fc.partially_private, private=private)
    return _without_population(make), _work(local_epochs, local_steps)


def _scaffold(local_epochs: int | None = None, local_steps: int | None = None) -> Made:
    return fc.scaffold, _work(local_epochs, local_steps)


def _fednova(local_epochs: int | None = None, local_steps: int | None = None) -> Made:
    return _without_population(fc.fednova), _work(local_epochs, local_steps)


def _feddyn(alpha: float = 0.1, local_epochs: int | None = None, local_steps: int | None = None) -> Made:
    return functools.partial(fc.feddyn, alpha=alpha), _work(local_epochs, local_steps)


def _mime(
    beta: float = 0.9, lite: bool = False, local_epochs: int | None = None, local_steps: int | None = None
) -> Made:
    return _without_population(functools.partial(fc.mime, beta=beta, lite=lite)), _work(local_epochs, local_steps)


ALGORITHMS: Mapping[str, Callable[..., Made]] = {
    "episode": _episode,
    "episode_plus": _episode_plus,
    "fedavg": _fedavg,
    "fedbuff": _fedbuff,
    "feddyn": _feddyn,
    "fednova": _fednova,
    "fedsgd": _fedsgd,
    "mime": _mime,
    "partially_private": _partially_private,
    "scaffold": _scaffold,
}

BUDGETS: Mapping[str, Callable[..., Any]] = {"budget": speeds.budget, **SPEEDS}  # in place of local_steps
BATCH_SIZES: Mapping[str, Callable[..., speeds.BatchSizes]] = {"budget": speeds.batch_budget}


def _counted(schedule: optax.Schedule) -> optax.Schedule:
    """A schedule that sees the round's number as a float: some mix it with one, which strict types forbid."""
    return lambda count: schedule(jnp.asarray(count, jnp.float32))


def _cosine(init: float, rounds: int, alpha: float = 0.0) -> optax.Schedule:
    return _counted(optax.cosine_decay_schedule(init, rounds, alpha))


def _cubic(end: float, rounds: int, first: int = 0) -> optax.Schedule:
    return _counted(optax.polynomial_schedule(0.0, end, 3, rounds, first))


def _exponential(init: float, decay: float, rounds: int = 1, staircase: bool = False) -> optax.Schedule:
    return _counted(optax.exponential_decay(init, rounds, decay, staircase=staircase))


def _linear(init: float, end: float, rounds: int) -> optax.Schedule:
    return _counted(optax.linear_schedule(init, end, rounds))


def _warmup_cosine(peak: float, warmup: int, rounds: int, end: float = 0.0) -> optax.Schedule:
    return _counted(optax.warmup_cosine_decay_schedule(0.0, peak, warmup, rounds, end))


SCHEDULES: Mapping[str, Callable[..., optax.Schedule]] = {
    "cosine": _cosine,
    "cubic": _cubic,
    "exponential": _exponential,
    "linear": _linear,
    "warmup_cosine": _warmup_cosine,
}


_FRACTIONS = ("b1", "b2", "beta1", "beta2", "decay", "momentum")


def _checked(optimizer: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """Refuses what optax would only stumble over in the first round, or never."""

    @functools.wraps(optimizer)
    def build(*args, **kwargs):
        for name, value in inspect.signature(optimizer).bind(*args, **kwargs).arguments.items():
            if isinstance(value, str):
                checks.number(name, value)
            if name == "learning_rate" and not callable(value) and not isinstance(value, jax.Array):  # of a schedule
                checks.positive("the learning rate", value, finite=True)
            if name in _FRACTIONS and value is not None:
                checks.fraction(name, value, zero=True)
        return optimizer(*args, **kwargs)

    return build


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adagrad": _checked(optax.adagrad),
    "adam": _checked(optax.adam),
    "adamw": _checked(optax.adamw),
    "adaptive_gradient_clip": clipping.adaptive_gradient_clip,
    "add_decayed_weights": optax.add_decayed_weights,
    "auto_clip": clipping.auto_clip,
    "clip_by_global_norm": clipping.clip_by_global_norm,
    "clip_by_layer_norm": lambda max_norm: clipping.clip(max_norm, scope=clipping.layer()),
    "clip_by_value": clipping.clip_by_value,
    "delta_clip": clipping.delta_clip,
    "fedadagrad": _checked(fc.fedopt.fedadagrad),
    "fedadam": _checked(fc.fedopt.fedadam),
    "fedyogi": _checked(fc.fedopt.fedyogi),
    "normalised": clipping.normalised,
    "proximal": fc.local.proximal,
    "prune": compression.prune,
    "rmsprop": _checked(optax.rmsprop),
    "sgd": _checked(optax.sgd),
    "smoothed_clip": clipping.smoothed_clip,
    "two_sided_clip": clipping.two_sided_clip,
    "u_clip": lambda max_norm: clipping.u_clip(clipping.clip_by_global_norm(max_norm)),
    "yogi": _checked(optax.yogi),
    "z_clip": clipping.z_clip,
}


def server_tx(text: str, values: Mapping[str, Any] = spec.NO_VALUES) -> optax.GradientTransformation:
    """``"adam(0.01)"``: the server's optimiser; a schedule counts rounds."""
    return optax.chain(*_optimizers(text, "--server", SCHEDULES, values))


def client_tx(text: str, values: Mapping[str, Any] = spec.NO_VALUES) -> Callable[[Any], optax.GradientTransformation]:
    """``"clip_by_global_norm(1.0)|sgd(cosine(0.1, 100))"``: a client's optimiser; a schedule counts rounds."""

    def at(round: Any) -> optax.GradientTransformation:
        rates = {name: _at_round(schedule, round) for name, schedule in SCHEDULES.items()}
        return optax.chain(*_optimizers(text, "--client", rates, values))

    at(jnp.zeros((), jnp.int32))  # says at once what is wrong with the text
    return at


def _optimizers(
    text: str, flag: str, schedules: Mapping[str, Callable[..., Any]], values: Mapping[str, Any]
) -> list[optax.GradientTransformation]:
    chain = spec.build(text, OPTIMIZERS, flag, nested=schedules, values=values)
    if not any("learning_rate" in inspect.signature(OPTIMIZERS[c.name]).parameters for c in spec.parse(text, flag)):
        raise InvalidInput(f'{flag}: the chain needs an optimiser, such as sgd in "clip_by_global_norm(1.0)|sgd(0.1)".')
    return chain


def behind_optimizer(text: str, flag: str) -> list[str]:
    """The names of the clips that stand behind the optimiser of a flag, and so bound steps, not gradients."""
    names = [call.name for call in spec.parse(text, flag)]
    steps = [name for name in names if "learning_rate" in inspect.signature(OPTIMIZERS[name]).parameters]
    return [name for name in names[names.index(steps[0]) :] if "clip" in name or name == "normalised"]


def _at_round(schedule: Callable[..., optax.Schedule], round: Any) -> Callable[..., Any]:
    return functools.wraps(schedule)(lambda *args, **kwargs: schedule(*args, **kwargs)(round))


def describe() -> str:
    """Every component with its arguments, for ``--help``."""
    groups: dict[str, Mapping[str, Callable[..., Any]]] = {
        "--task": TASKS,
        "--algorithm": ALGORITHMS,
        "--client, --server": OPTIMIZERS,
        "schedules, in place of a learning rate": SCHEDULES,
        "--uplink": UPLINKS,
        "mechanisms, in gaussian(mechanism=...)": MECHANISMS,
        "compressors, in --uplink and --downlink": COMPRESSORS,
        "--downlink": DOWNLINKS,
        "--reducer": REDUCERS,
        "--sampler": SAMPLERS,
        "speeds, in samplers and budgets": SPEEDS,
        "in place of local_steps": {"budget": speeds.budget},
        "in place of a number in --batch_size": BATCH_SIZES,
    }
    lines = ["Components:"]
    for group, registry in groups.items():
        lines.append(f"  {group}")
        lines += [
            f"    {name}({', '.join(_argument(p) for p in _parameters(make))})" for name, make in registry.items()
        ]
    return "\n".join(lines)


def _parameters(make: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(make).parameters.values() if p.name != "cohort_size"]


def _argument(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
