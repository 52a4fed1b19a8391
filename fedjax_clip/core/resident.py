"""Examples that live on a device, in rows that it gathers without a copy."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core.types import Array, Batch, PyTree

TILES = {"tpu": (8, 128)}  # rows and lanes in which a platform stores arrays; others store them without tiles


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["like"])
@dataclasses.dataclass(frozen=True)
class Resident:
    """N examples as flat rows, of which ``resident[index]`` gathers a batch.

    A TPU stores arrays in tiles. Before it gathers from images ``[N, 28, 28, 1]`` it copies all N of them to another
    layout, in every step. Rows of whole tiles are gathered where they lie. On a CPU or GPU a row has no padding.

    Attributes:
      rows: pytree of ``[N, F]``, one row an example. On a TPU F is a multiple of 128, numbers ``[N]`` lie in rows of
        128, ``[R, 128]``, and the bits of float32 are held as int32: XLA else copies all of them to bfloat16.
      like: an example's shape and type in each field, in the order of the leaves.

    Example:
      >>> resident = Resident.of({"x": np.zeros((5, 28, 28)), "y": np.arange(5)}, platform="tpu")
      >>> resident.rows["x"].shape, resident.rows["y"].shape, resident[np.array([3, 1])]["x"].shape
      ((5, 896), (8, 128), (2, 28, 28))
    """

    rows: PyTree
    like: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, examples: PyTree, platform: str = "cpu") -> "Resident":
        """These examples ``[N, ...]`` in the platform's rows: views of the arrays, or copies where rows are padded."""
        if isinstance(examples, cls):
            return examples
        like = tuple(jax.ShapeDtypeStruct(np.shape(x)[1:], x.dtype) for x in jax.tree.leaves(examples))
        make = functools.partial(_tiled, tile=TILES[platform]) if platform in TILES else _flat
        return cls(jax.tree.map(make, examples), like)

    @classmethod
    def nbytes(cls, examples: PyTree, platform: str = "cpu") -> int:
        """Bytes that these examples take on a device of the platform, padding included; nothing is copied."""
        rows = jax.eval_shape(lambda x: cls.of(x, platform), examples)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows))

    def __getitem__(self, index: Array | np.ndarray) -> Batch:
        """The examples of these numbers, ``[*index.shape, ...]``."""
        rows, treedef = jax.tree.flatten(self.rows)
        return jax.tree.unflatten(treedef, [_take(x, index, like) for x, like in zip(rows, self.like, strict=True)])


def _flat(x: Any) -> Any:
    return x.reshape(len(x), math.prod(x.shape[1:])) if np.ndim(x) > 1 else x


def _tiled(x: Any, tile: tuple[int, int]) -> Any:
    (rows, lanes), x, host = tile, _flat(x), isinstance(x, np.ndarray)
    pad = np.pad if host else jnp.pad
    if x.ndim == 1:
        x = pad(x, (0, -len(x) % (rows * lanes))).reshape(-1, lanes)
    elif spare := -x.shape[1] % lanes:
        x = pad(x, ((0, 0), (0, spare)))
    if x.dtype != np.float32:
        return x
    return x.view(np.int32) if host else jax.lax.bitcast_convert_type(x, np.int32)


def _take(rows: Any, index: Array | np.ndarray, like: jax.ShapeDtypeStruct) -> Array:
    rows = jnp.asarray(rows)
    if like.shape:
        taken = rows[index][..., : math.prod(like.shape)].reshape(index.shape + like.shape)
    else:
        taken = rows[index] if rows.ndim == 1 else rows[index // rows.shape[1], index % rows.shape[1]]
    held = (taken.dtype, like.dtype) == (np.int32, np.float32)
    return jax.lax.bitcast_convert_type(taken, like.dtype) if held else taken
