"""Client metrics: sums and means that add up over steps, clients and devices."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_clip.core import exact, tree
from fedjax_clip.core.types import Array, InvalidInput, Metrics, PyTree

# Names, and prefixes of names, that the library itself uses in a row of a run's history.
_TAKEN = (
    *("bytes_down", "bytes_down_entropy", "bytes_up", "bytes_up_entropy", "clients", "clipped_clients"),
    *(
        "adapter_rank",
        "asked",
        "candidates",
        "clipped_round",
        "clipped_steps",
        "clusters",
        "coin",
        "direction_norm",
        "dropped",
    ),
    *("dropped_ids", "examples", "explored", "largest_weight", "late", "loss", "lost", "mean_gradient_norm"),
    *("personal_loss", "round", "seconds", "simulated_seconds", "staleness", "steps", "too_few", "update_norm"),
    *("variate_norm", "wasted_steps", "weight"),
)
# Those of _TAKEN that an algorithm reports.
_OF_ALGORITHMS = (
    *("adapter_rank", "clipped_round", "clusters", "coin", "direction_norm", "largest_weight", "mean_gradient_norm"),
    "variate_norm",
)
_BEGINNINGS = ("client_norm/", "cluster/", "downlink/", "eval/", "example_", "step_", "uplink/")


def check_names(names: Iterable[Any]) -> None:
    """Refuses names of a loss's metrics that are not text, or that the library uses itself.

    Args:
      names: of the values that the loss reports.

    Raises:
      InvalidInput: such a name; the message lists the names in use.

    Example:
      >>> fc.extend.metrics.check_names(["accuracy", "top5"])
    """
    for name in names:
        if not isinstance(name, str):
            raise InvalidInput(f"per_example_loss must report values by names that are text, not {name!r}.")
        if name in _TAKEN or name.startswith(_BEGINNINGS):
            raise InvalidInput(
                f"per_example_loss reports {name!r}, a name that the library fills itself: choose another one. Taken "
                f"are {', '.join(_TAKEN)}, and all that begin with {', '.join(_BEGINNINGS)}."
            )


def check_own_names(names: Iterable[str], reported: Iterable[str]) -> None:
    """Refuses names of an algorithm's own metrics that the library fills itself, or that the loss reports, too.

    Args:
      names: of the algorithm's own metrics.
      reported: names of the clients' metrics, including the loss's values.

    Raises:
      InvalidInput: such a name.

    Example:
      >>> fc.extend.metrics.check_own_names(["extrapolation"], ["loss", "accuracy"])
    """
    for name in names:
        if name in _TAKEN and name not in _OF_ALGORITHMS:
            raise InvalidInput(
                f"The algorithm reports {name!r} by metrics= of now.step, a name that the library fills itself: choose "
                "another one."
            )
    for name in sorted(set(names) & set(reported) - set(_TAKEN)):
        raise InvalidInput(
            f"per_example_loss reports {name!r}, which this algorithm reports itself: choose another name."
        )


def check_reported(names: Iterable[str], filled: Iterable[str]) -> None:
    """Refuses names of a client function's report that the library would overwrite.

    Args:
      names: of the report.
      filled: names that the exchange fills itself.

    Raises:
      InvalidInput: such a name.

    Example:
      >>> fc.extend.metrics.check_reported(["distance"], ["clients", "weight"])
    """
    filled = {*filled, "round", "seconds"}
    for name in names:
        if name in filled or name.startswith(("client_norm/", "eval/", "uplink/")):
            raise InvalidInput(f"client_fn reports {name!r}, a name that the library fills itself: choose another one.")


def check_numbers(values: Metrics) -> None:
    """Refuses a metric of a round that is not one number; ``dropped_ids`` alone holds several.

    Args:
      values: by name.

    Raises:
      InvalidInput: names the first such metric and its shape.

    Example:
      >>> fc.extend.metrics.check_numbers({"loss": jnp.float32(0.5)})
    """
    for name, x in values.items():
        shape = () if isinstance(x, bool | int | float) else getattr(x, "shape", None)
        if shape != () and name != "dropped_ids":
            found = f"is of type {type(x).__name__}" if shape is None else f"has shape {shape}"
            raise InvalidInput(f'The metric "{name}" of the round {found}: a metric is one number.')


COSTS = re.compile(
    r"\w*(loss|losses|error|errors|mse|mae|mape|entropy|perplexity|distance|divergence)"
    r"|ece|brier|nll|kl|ppl|bpc|wer|cer|fpr|fnr|regret|gap|epsilon|bytes|bits|seconds|hours|dropped|wasted"
)


def higher_is_better(metric: str) -> bool:
    """Whether a higher value of a metric is better: yes, unless its name says that it is a loss, an error or a cost.

    It reads the last two parts of the name, since a client's name may follow the score's.

    Args:
      metric: its name, such as ``"eval/examples/loss"``, ``"auroc_worst"``, ``"ece/Cleveland"``.

    Example:
      >>> [fc.extend.metrics.higher_is_better(name) for name in ("eval/clients/accuracy", "eval/examples/rmse_of_mean")]
      [True, False]
    """
    parts = [set(re.findall("[a-z0-9]+", part.lower())) for part in metric.split("/")]
    return not any(COSTS.fullmatch(word) for part in parts[-2:] for word in part)


class Mean(NamedTuple):
    """An unfinished weighted mean: totals and weights add up over steps, clients and devices.

    Attributes:
      total: sum of weighted values.
      weight: sum of weights.

    Example:
      >>> mean = fc.extend.metrics.Mean.of(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]))
      >>> float(mean.total), float(mean.weight)
      (4.0, 2.0)
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> "Mean":
        """The mean of ``values`` [B] with ``weights`` [B]; values of weight 0 are ignored, even NaN."""
        return jax.tree.map(jnp.sum, cls.each(values, weights))

    @classmethod
    def each(cls, values: Array, weights: Array) -> "Mean":
        """The terms ``[B]`` of the two sums of ``Mean.of``."""
        values = tree.wide(jnp.asarray(values))
        weights = jnp.asarray(weights).astype(values.dtype)
        return cls(jnp.where(weights > 0, values, 0) * weights, weights)


class Histogram(NamedTuple):
    """Counts of values in 512 bins, a quarter of an octave wide, from 2^-64 to 2^64; counts add up.

    That is the range of a Euclidean norm in float32: smaller squares underflow, larger ones overflow. Zero falls into
    the first bin.

    Attributes:
      counts: float32 ``[512]``.

    Example:
      >>> histogram = fc.extend.metrics.Histogram.of(jnp.float32(2.0))
    """

    counts: Array

    @classmethod
    def of(cls, value: Array) -> "Histogram":
        """The histogram of one value; a value that is not finite falls into no bin."""
        bin = jnp.floor(4 * jnp.log2(jnp.where(value > 0, value, 2.0**-64))) + 256
        here = jnp.arange(512, dtype=bin.dtype) == jnp.clip(bin, 0, 511)
        return cls(jnp.where(jnp.isfinite(value), here, False).astype(jnp.float32))

    def quantile(self, q: float) -> Array:
        """The quantile to 9%: the middle of its bin, 0 for the first bin, NaN without values."""
        below = jnp.cumsum(self.counts)
        bin = jnp.sum(below < q * below[-1], dtype=jnp.float32)
        middle = jnp.where(bin > 0, 2.0 ** ((bin - 255.5) / 4), 0)
        return jnp.where(below[-1] > 0, middle, jnp.nan)


def add(x: PyTree, y: PyTree) -> PyTree:
    """Sums two reports.

    Args:
      x, y: reports of the same structure.

    Example:
      >>> float(fc.extend.metrics.add({"steps": 1.0}, {"steps": 2.0})["steps"])
      3.0
    """
    return jax.tree.map(jnp.add, x, y)


class Adder(NamedTuple):
    """How a round's reports are summed over clients, chunks and devices.

    Attributes:
      chunk: ``reports [w, ...] -> part``, of one chunk.
      zero: ``zeros like a part -> total``.
      add: ``(total, part) -> total``.
      finish: ``(total, axis_name) -> report``, over all devices of the mapped axis, if there is one.

    Example:
      >>> fc.extend.metrics.adder(False, 10).chunk({"steps": jnp.array([1.0, 2.0])})["steps"]
      Array(3., dtype=float32)
    """

    chunk: Callable[[PyTree], PyTree]
    zero: Callable[[PyTree], PyTree]
    add: Callable[[PyTree, PyTree], PyTree]
    finish: Callable[[PyTree, str | None], PyTree]


def adder(exactly: bool, clients: int) -> Adder:
    """Sums of reports in floating point, or to the same bits in any order (``core/exact.py``).

    Args:
      exactly: whether in any order.
      clients: how many there are room for on a device.

    Example:
      >>> adder = fc.extend.metrics.adder(True, clients=10)
      >>> parts = [adder.chunk({"loss": jnp.array([x])}) for x in (1e8, 1.0, -1e8)]
      >>> total = adder.zero(parts[0])
      >>> for part in parts:
      ...   total = adder.add(total, part)
      >>> float(adder.finish(total, None)["loss"])  # in float32 it would be 0
      1.0
    """
    if not exactly:

        def chunk(reports):
            return jax.tree.map(lambda x: jnp.sum(x, 0), reports)

        return Adder(chunk, lambda zeros: zeros, add, exact.finished)

    def zero(x):
        return exact.zero(x[0], clients, each=True) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.sum(x, 0)

    def plus(x, total):
        return exact.add(total, x) if isinstance(total, exact.Sum) else total + jnp.sum(x, 0)

    return Adder(
        lambda reports: reports,
        lambda zeros: jax.tree.map(zero, zeros),
        lambda total, part: jax.tree.map(plus, part, total),
        exact.finished,
    )


def finish(report: PyTree) -> PyTree:
    """Turns each ``Mean`` into its ratio (NaN if its weight is 0) and leaves plain sums as they are.

    Args:
      report: a dict of sums and ``Mean`` pairs.

    Example:
      >>> float(fc.extend.metrics.finish({"loss": fc.extend.metrics.Mean(jnp.float32(4), jnp.float32(2))})["loss"])
      2.0
    """

    def ratio(x: Any) -> Any:
        return (
            jnp.where(x.weight > 0, tree.divided(tree.wide(x.total), x.weight), jnp.nan) if isinstance(x, Mean) else x
        )

    return jax.tree.map(ratio, report, is_leaf=lambda x: isinstance(x, Mean))


def without_nan(values: Metrics) -> Metrics:
    """Metrics with infinity in place of NaN under ``jax_debug_nans``, which treats a NaN as an error.

    Args:
      values: by name; NaN if nothing was counted.

    Example:
      >>> fc.extend.metrics.without_nan({"loss": jnp.float32(jnp.nan)})  # the same, unless jax_debug_nans is set
    """
    if not jax.config.jax_debug_nans:  # type: ignore[attr-defined]
        return values
    return {
        name: jnp.where(jnp.isnan(x), jnp.inf, x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x
        for name, x in values.items()
    }


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    """``{"a": 1} -> {"prefix/a": 1}``.

    Args:
      prefix: put before each name, with a slash.
      metrics: by name.

    Example:
      >>> fc.extend.metrics.prefixed("eval", {"loss": 0.5})
      {'eval/loss': 0.5}
    """
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
