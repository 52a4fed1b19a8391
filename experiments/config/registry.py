"""The names that flags may use, and their functions: read from the library, and by hand where a flag differs."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

import fedjax_clip as fc
from experiments.config.algorithms import ALGORITHMS
from experiments.config.components import Components, Make, filled, later, read
from experiments.config.optimisers import OPTIMIZERS, SCHEDULES, clip_by_layer_norm
from fedjax_clip import attacks, clipping, compression, reduce, sinks, tasks, uplink
from fedjax_clip.compression import Compressor
from fedjax_clip.core.types import Algorithm, InvalidInput
from fedjax_clip.data import clock, sampling, speeds, stream
from fedjax_clip.reduce import Reducer
from fedjax_clip.uplink import Uplink, mechanism


@functools.wraps(tasks.stream)
def _stream(*args: Any, **kwargs: Any) -> tasks.Task:
    return tasks.stream(*args, **kwargs)


SINKS = Components(  # a bar of progress is there anyway
    Callable, read(sinks, sinks.Sink, without=("several", "progress")), functools.partial(filled, config=None)
)

# Left out: functions of data, which no flag can write.
_TASKS = read(tasks, tasks.Task, without=("classification", "ratings", "stream"))
TASKS = Components(tasks.Task, {**_TASKS, "stream": _stream})
RULES = Components(
    Callable, read(stream, fc.FederatedData, without=("between", "drift")), functools.partial(later, count=1)
)
vars(_stream)["nested"] = Components((tasks.Task, Callable), {**TASKS, **RULES})


# Samplers and clocks

SPEEDS = Components(speeds.Speeds, read(speeds, speeds.Speeds))
STEPS = Components(Callable, {"budget": speeds.budget})  # in place of a number
BATCH_SIZES = Components(speeds.BatchSizes, {"budget": speeds.batch_budget})  # in place of a number


def _buffered(speeds: Any, concurrency: int, dropout: float = 0.0, *, cohort_size: int) -> clock.Clock:
    """Clients answer at their own speed; ``cohort_size`` answers make a round."""
    asked = sampling.uniform(cohort_size)
    return clock.buffered(asked, speeds, buffer_size=cohort_size, concurrency=concurrency, dropout=dropout)


def _synchronous(
    speeds: Any, select: int | None = None, deadline: float = math.inf, dropout: float = 0.0, *, cohort_size: int
) -> clock.Clock:
    """Rounds of the first ``cohort_size`` answers of ``select`` sampled clients."""
    if select is not None and select < cohort_size:
        raise InvalidInput(f"select must be at least the cohort's size, {cohort_size}, not {select}.")
    asked = sampling.uniform(cohort_size if select is None else select)
    return clock.synchronous(asked, speeds, keep=cohort_size, deadline=deadline, dropout=dropout)


SAMPLERS: Mapping[str, Make] = {
    **read(sampling, sampling.Sampler),
    "buffered": _buffered,
    "synchronous": _synchronous,
}


def samplers(cohort_size: int) -> Components:
    """The samplers with the cohort's size filled in."""
    fit = functools.partial(filled, cohort_size=cohort_size)
    return Components((sampling.Sampler, clock.Clock), SAMPLERS, fit)


# Links

COMPRESSORS = Components(Compressor, read(compression, Compressor))
MECHANISMS = Components(mechanism.Mechanism, read(mechanism, mechanism.Mechanism))


def _auto_clip(percent: float = 10.0, window: int = 1000) -> Uplink:
    """Clips to a percentile of the client's own past updates, which it keeps."""
    return uplink.at_client(clipping.auto_clip(percent, window), keep_state=True)


def _by_leaf(compressor: Compressor) -> Uplink:
    """Compresses each leaf separately, not all as one vector."""
    return uplink.compress(compressor, by_leaf=True)


def _clip21(max_norm: float, momentum: float = 1.0, step: float = 1.0) -> Uplink:
    """Clips the difference from the client's earlier messages (Clip21)."""
    return uplink.memory(clipping.clip_by_global_norm(max_norm), momentum, step)


def _ef21(compressor: Compressor, momentum: float = 1.0, step: float = 1.0) -> Uplink:
    """Compresses the difference from the client's earlier messages (EF21)."""
    return uplink.memory(uplink.compress(compressor), momentum, step)


def _normec(beta: float, alpha: float = 1.0) -> Uplink:
    """As ``clip21``, with a smoothed clip (NormEC)."""
    return uplink.memory(clipping.smoothed_clip(beta, alpha))


def _quantile_clip(
    initial: float = 0.1,
    target_unclipped_quantile: float = 0.5,
    rate: float = 0.2,
    bits_noise: float | None = None,
    by_layer: bool = False,
    allocation: Literal["global", "equal"] = "global",
) -> Uplink:
    """Clips updates at a bound that follows a quantile of their norms."""
    scope = clipping.layer() if by_layer else None
    return uplink.quantile_clip(initial, target_unclipped_quantile, rate, bits_noise, scope, allocation)


def _as_link(make: Make) -> Make:
    """``make``, with compressors and clips converted to links."""

    @functools.wraps(make)
    def build(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        if isinstance(made, Compressor):
            return uplink.compress(made)
        return uplink.at_client(made) if isinstance(made, optax.GradientTransformation) else made

    return build


# Left out: links with another spelling in a flag, and arguments that are not text.
_OTHERWISE = ("at_client", "by_group", "chain", "compress", "identity", "memory", "on_parts", "stateless", "with_bias")
UPLINKS = Components(
    Uplink,
    {
        **COMPRESSORS,
        **read(uplink, Uplink, without=_OTHERWISE),
        # Left out: functions of a function, and ambiguous names.
        **read(attacks, Uplink, without=("replaced", "noise", "constant")),
        "auto_clip": _auto_clip,
        "by_leaf": _by_leaf,
        "clip21": _clip21,
        "clip_by_layer_norm": clip_by_layer_norm,
        "ef21": _ef21,
        "normec": _normec,
        "quantile_clip": _quantile_clip,
    },
    _as_link,
)
IN_UPLINKS = Components((Uplink, Compressor, mechanism.Mechanism), {**UPLINKS, **COMPRESSORS, **MECHANISMS})
NOISES = ("discrete_gaussian", "gaussian", "skellam")  # noise on the sum, for which ``--target_epsilon`` can solve


def uplinks(noise_multiplier: float | None) -> Components:
    """The links, with this noise for a link of ``NOISES`` without a number."""
    noises = {name: functools.partial(UPLINKS[name], noise_multiplier) for name in NOISES}
    return Components(Uplink, UPLINKS if noise_multiplier is None else {**UPLINKS, **noises}, _as_link)


def _difference(compressor: Compressor) -> Callable[[Algorithm], Algorithm]:
    """Sends the compressed difference from the last model."""
    return lambda algorithm: fc.compressed_broadcast(algorithm, compressor)


def _model(compressor: Compressor) -> Callable[[Algorithm], Algorithm]:
    """Sends the compressed model."""
    return lambda algorithm: fc.compressed_broadcast(algorithm, compressor, relative=False)


DOWNLINKS = Components(Callable, {"difference": _difference, "model": _model})


# Reducers


def _ckks_mean(*, cohort_size: int) -> Reducer:
    """A mean of encrypted messages."""
    return fc.secure.ckks_mean(cohort_size)


def _fixed_mean(denominator: float | None = None, *, cohort_size: int) -> Reducer:
    """The sum divided by a fixed number, by default the cohort's size."""
    return reduce.fixed_mean(cohort_size if denominator is None else denominator)


def _pairwise_masks(threshold: int | None = None, *, cohort_size: int) -> Reducer:
    """A sum of masked messages; the server learns only the sum."""
    return fc.secure.pairwise_masks(cohort_size, threshold)


# By hand, since ``fc.secure`` needs optional packages.
SECURE: Mapping[str, Make] = {
    "ckks_mean": _ckks_mean,
    "modular_sum": reduce.modular_sum,
    "pairwise_masks": _pairwise_masks,
}
REDUCERS: Mapping[str, Make] = {
    # Left out: functions of a function, and internal ones of the algorithms.
    **read(reduce, Reducer, without=("on_host", "restacked", "stacking", "together")),
    **read(attacks, Reducer, without=("colluding", "strongest")),
    **SECURE,
    "fixed_mean": _fixed_mean,
}


def reducers(cohort_size: int) -> Components:
    """The reducers with the cohort's size filled in."""
    return Components(Reducer, REDUCERS, functools.partial(filled, cohort_size=cohort_size))


def needed_reducer(link: Uplink) -> str:
    """The name of the reducer that a link needs; empty if any will do."""
    if link.promises.noise is uplink.Noise.SERVER:
        return "fixed_mean"
    if link.promises.noise is uplink.Noise.CLIENT:
        return "uniform_mean"
    return "modular_sum" if link.promises.grid else ""


def describe() -> str:
    """Every component with its arguments and a description, for ``--help``."""
    groups: dict[str, Mapping[str, Make]] = {
        "--task": TASKS,
        "rules, in --task=stream(digits(), [...])": RULES,
        "--algorithm": ALGORITHMS,
        "--client, --server": OPTIMIZERS,
        "schedules, in place of a learning rate": SCHEDULES,
        "--uplink": UPLINKS,
        "mechanisms, in gaussian(mechanism=...)": MECHANISMS,
        "compressors, in --uplink and --downlink": COMPRESSORS,
        "--downlink": DOWNLINKS,
        "--reducer": reducers(0),
        "--sampler": samplers(0),
        "speeds, in samplers and budgets": SPEEDS,
        "in place of a number in --local_steps": STEPS,
        "in place of a number in --batch_size": BATCH_SIZES,
        "--sinks": SINKS,
    }
    lines = ["Components:"]
    for group, makers in groups.items():
        lines.append(f"  {group}")
        for name, make in sorted(makers.items()):
            shown = ", ".join(map(_argument, inspect.signature(make).parameters.values()))
            what, *_ = (inspect.getdoc(make) or "").splitlines() or [""]
            lines += [f"    {name}({shown})", f"        {what.replace('``', '')}"]
    return "\n".join(lines)


def _argument(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
