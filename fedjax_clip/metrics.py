"""Reports that add up: what a client says of its work, summed over clients and devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_clip.typing import Array, Metrics, PyTree


class Mean(NamedTuple):
    """A weighted mean on its way: totals and weights add up over steps, clients and devices."""

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> "Mean":
        """Of ``values`` [B] under ``weights`` [B]; values of weight 0 are not looked at, NaN or not."""
        return cls(jnp.sum(jnp.where(weights > 0, values, 0) * weights), jnp.sum(weights))


def add(x: PyTree, y: PyTree) -> PyTree:
    """Sums two reports."""
    return jax.tree.map(jnp.add, x, y)


def finish(report: PyTree) -> PyTree:
    """Turns each ``Mean`` into its ratio (NaN where nothing was counted) and leaves plain sums as they are."""

    def ratio(x: Any) -> Any:
        return jnp.where(x.weight > 0, x.total / x.weight, jnp.nan) if isinstance(x, Mean) else x

    return jax.tree.map(ratio, report, is_leaf=lambda x: isinstance(x, Mean))


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    """``{"a": 1} -> {"prefix/a": 1}``."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
