"""Examples that live on a device, in rows that it gathers without a copy."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core.types import Array, Batch, PyTree

LANES = {"tpu": 128}  # elements of a row in a tile of a TPU's memory; other platforms store arrays without tiles


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["shapes"])
@dataclasses.dataclass(frozen=True)
class Resident:
    """N examples as flat rows, of which ``resident[index]`` gathers a batch.

    A TPU stores arrays in tiles. Before it gathers from images ``[N, 28, 28, 1]`` it copies all N of them to another
    layout, in every step. Rows of whole tiles are gathered where they lie. On a CPU or GPU a row has no padding.

    Attributes:
      rows: pytree of ``[N, F]``, one row an example, F a multiple of the platform's lanes; ``[N]`` for fields of one
        number.
      shapes: an example's shape in each field, in the order of the leaves.

    Example:
      >>> resident = Resident.of({"x": np.zeros((5, 28, 28)), "y": np.arange(5)}, platform="tpu")
      >>> resident.rows["x"].shape, resident[np.array([3, 1])]["x"].shape
      ((5, 896), (2, 28, 28))
    """

    rows: PyTree
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, examples: PyTree, platform: str = "cpu") -> "Resident":
        """These examples ``[N, ...]`` in the platform's rows: views of the arrays, or copies where rows are padded."""
        if isinstance(examples, cls):
            return examples
        shapes = tuple(np.shape(x)[1:] for x in jax.tree.leaves(examples))
        return cls(jax.tree.map(lambda x: _row(x, LANES.get(platform, 1)), examples), shapes)

    def __getitem__(self, index: Array | np.ndarray) -> Batch:
        """The examples of these numbers, ``[*index.shape, ...]``."""
        rows, treedef = jax.tree.flatten(self.rows)
        return jax.tree.unflatten(treedef, [_take(x, index, shape) for x, shape in zip(rows, self.shapes, strict=True)])


def _row(x: Any, lanes: int) -> Any:
    if np.ndim(x) < 2:
        return x
    size = math.prod(x.shape[1:])
    flat = x.reshape(len(x), size)
    spare = -size % lanes
    return np.pad(flat, ((0, 0), (0, spare))) if spare else flat


def _take(rows: Any, index: Array | np.ndarray, shape: tuple[int, ...]) -> Array:
    taken = jnp.asarray(rows)[index]
    return taken[..., : math.prod(shape)].reshape(index.shape + shape) if shape else taken
