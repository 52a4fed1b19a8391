"""A matrix in 8 or 4 bits a number."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_clip.core.types import Array, PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale", "offset"), meta_fields=("bits",))
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A matrix ``[m, n]`` as ``scale q + offset``, with q in ``[0, 2^bits)`` and both numbers for each group of rows.

    Attributes:
      values: uint8 ``[m, n]``, or ``[m / 2, n]`` of two times four bits: the lower ones are the first half of the rows.
      scale, offset: float16 ``[m / group, n]``.
      bits: 8 or 4.

    Example:
      >>> small = fc.models.quantised({"kernel": np.ones((4, 3))}, bits=4)["kernel"]
      >>> small.shape, small.values.nbytes
      ((4, 3), 6)
    """

    values: Any
    scale: Any
    offset: Any
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows * 8 // self.bits, columns

    def dense(self, dtype: Any = jnp.float32) -> Array:
        """The matrix."""
        q = self.values
        if self.bits == 4:
            q = jnp.concatenate([q & 15, q >> 4])
        rows, columns = self.shape
        grouped = q.reshape(self.scale.shape[0], -1, columns).astype(dtype)
        x = grouped * self.scale[:, None].astype(dtype) + self.offset[:, None].astype(dtype)
        return x.reshape(rows, columns)


def is_quantised(x: Any) -> bool:
    """Whether this is such a matrix, which then counts as one leaf."""
    return isinstance(x, Quantised)


def dense(tree: PyTree) -> PyTree:
    """The pytree with all such matrices as float32."""
    return jax.tree.map(lambda x: x.dense() if is_quantised(x) else x, tree, is_leaf=is_quantised)
