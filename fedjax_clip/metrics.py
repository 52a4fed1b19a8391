"""Reports that add up: what a client says of its work, summed over clients and devices."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_clip.typing import Array, InvalidInput, Metrics, PyTree

# What a row of a run's history may hold besides what a loss reports: names, and beginnings of names.
_TAKEN = (
    *("bytes_down", "bytes_down_entropy", "bytes_up", "bytes_up_entropy", "clients", "clipped_clients"),
    *("clipped_round", "clipped_steps", "dropped", "dropped_ids", "examples", "late", "loss", "lost"),
    *("mean_gradient_norm", "round", "seconds", "simulated_seconds", "staleness", "steps", "update_norm"),
    *("variate_norm", "wasted_steps", "weight"),
)
_BEGINNINGS = ("client_norm/", "downlink/", "eval/", "example_", "step_", "uplink/")


def check_names(names: Iterable[Any]) -> None:
    """Refuses names for what a loss reports that are not text, or that a row has a value of its own for."""
    for name in names:
        if not isinstance(name, str):
            raise InvalidInput(f"per_example_loss must report values by names that are text, not {name!r}.")
        if name in _TAKEN or name.startswith(_BEGINNINGS):
            raise InvalidInput(
                f"per_example_loss reports {name!r}, a name that the library fills itself: choose another one. Taken "
                f"are {', '.join(_TAKEN)}, and all that begin with {', '.join(_BEGINNINGS)}."
            )


class Mean(NamedTuple):
    """A weighted mean on its way: totals and weights add up over steps, clients and devices.

    Attributes:
      total: sum of weighted values.
      weight: sum of weights.

    Example:
      >>> Mean.of(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]))  # total 4, weight 2
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> "Mean":
        """Of ``values`` [B] under ``weights`` [B]; values of weight 0 are not looked at, NaN or not."""
        return cls(jnp.sum(jnp.where(weights > 0, values, 0) * weights), jnp.sum(weights))


class Histogram(NamedTuple):
    """How many values fell into each of 128 bins, a quarter of an octave wide, from 2^-20 to 2^12; counts add up.

    Attributes:
      counts: float32 ``[128]``.

    Example:
      >>> Histogram.of(norm).quantile(0.5)
    """

    counts: Array

    @classmethod
    def of(cls, value: Array) -> "Histogram":
        """One value; zero and less fall into the first bin, what is not finite into none."""
        bin = jnp.floor(4 * jnp.log2(jnp.where(value > 0, value, 2.0**-30))) + 80
        here = jnp.arange(128) == jnp.clip(bin, 0, 127)
        return cls(jnp.where(jnp.isfinite(value), here, False).astype(jnp.float32))

    def quantile(self, q: float) -> Array:
        """Within 9% of the quantile, the middle of its bin; NaN of nothing."""
        below = jnp.cumsum(self.counts)
        bin = jnp.sum(below < q * below[-1])
        return jnp.where(below[-1] > 0, 2.0 ** ((bin - 79.5) / 4), jnp.nan)


def add(x: PyTree, y: PyTree) -> PyTree:
    """Sums two reports.

    Args:
      x, y: reports of the same structure.

    Example:
      >>> add({"steps": 1.0}, {"steps": 2.0})  # {"steps": 3.0}
    """
    return jax.tree.map(jnp.add, x, y)


def finish(report: PyTree) -> PyTree:
    """Turns each ``Mean`` into its ratio (NaN where nothing was counted) and leaves plain sums as they are.

    Args:
      report: a dict of sums and ``Mean``s.

    Example:
      >>> finish({"loss": Mean(jnp.float32(4), jnp.float32(2))})  # {"loss": 2.0}
    """

    def ratio(x: Any) -> Any:
        return jnp.where(x.weight > 0, x.total / x.weight, jnp.nan) if isinstance(x, Mean) else x

    return jax.tree.map(ratio, report, is_leaf=lambda x: isinstance(x, Mean))


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    """``{"a": 1} -> {"prefix/a": 1}``.

    Args:
      prefix: put before each name, with a slash.
      metrics: by name.

    Example:
      >>> prefixed("eval", {"loss": 0.5})  # {"eval/loss": 0.5}
    """
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
