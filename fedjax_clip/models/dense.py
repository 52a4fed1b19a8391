"""Dense layers whose frozen kernel takes 8 or 4 bits a number."""

import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks, tree
from fedjax_clip.core.quantised import Quantised
from fedjax_clip.core.types import Array, InvalidInput, Params


class Dense(nn.Dense):
    """``flax.linen.Dense``, whose kernel may be ``Quantised``: then it becomes numbers inside the product.

    Example:
      >>> layer = fc.models.Dense(3)
      >>> params = layer.init(key, np.zeros((1, 4)))
    """

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        kept = self.get_variable("params", "kernel") if self.has_variable("params", "kernel") else None
        if not isinstance(kept, Quantised):
            return super().__call__(inputs)
        inputs = jnp.asarray(inputs, self.dtype)
        dtype = inputs.dtype
        y = _product(inputs, kept)
        return y + self.get_variable("params", "bias").astype(dtype) if self.use_bias else y


def _product(x: Array, kept: Quantised) -> Array:
    """``x W``, one half of W's rows after the other, so that only a half of one matrix is ever there as numbers.

    XLA would make the numbers of all layers before a loop over steps, or keep them from a forward pass to its backward
    pass: in a loop of their own, and again in the backward pass, it does neither.
    """
    groups = kept.scale.shape[0]
    if groups % 2:
        return x @ kept.dense(x.dtype)
    halves = [a.reshape(2, groups // 2, -1) for a in (kept.scale, kept.offset)]
    if kept.bits == 8:
        halves.append(kept.values.reshape(2, -1, kept.values.shape[1]))

    @jax.checkpoint
    def half(i: Array, x: Array, scale: Array, offset: Array, values: Array | None = None) -> Array:
        q = kept.values >> (4 * i).astype(jnp.uint8) & 15 if values is None else values
        return x @ Quantised(q, scale, offset, 8).dense(x.dtype)

    def add(y: Array, of: tuple[Array, ...]) -> tuple[Array, None]:
        return y + half(*of), None

    parts = jnp.moveaxis(x.reshape(*x.shape[:-1], 2, -1), -2, 0)
    zeros = jnp.zeros((*x.shape[:-1], kept.shape[1]), x.dtype)
    return jax.lax.scan(add, zeros, (jnp.arange(2, dtype=jnp.int32), parts, *halves))[0]


def quantised(params: Params, bits: int = 8, pattern: str = r"kernel$", group: int = 32) -> Params:
    """A model's parameters with the kernels of its ``fc.models.Dense`` layers in few bits, to stay frozen.

    In each group of rows and each column the numbers between the least and the largest become ``2^bits`` levels, to the
    nearest: an error of at most ``(max - min) / 2 / (2^bits - 1)``, and that of float16 for the two ends.

    Args:
      params: pytree of parameters.
      bits: 8 or 4.
      pattern: regular expression, searched in the names of parameters. A matrix with an odd number of rows stays
        as it is.
      group: rows that share a scale; their largest common divisor where it does not divide a matrix's rows.

    Raises:
      InvalidInput: other bits, a pattern that finds no matrix.

    Example:
      >>> layer = fc.models.Dense(3)
      >>> params = layer.init(key, np.ones((1, 4)))
      >>> small = fc.models.quantised(params)
      >>> bool(np.abs(layer.apply(params, np.ones(4)) - layer.apply(small, np.ones(4))).max() < 0.02)
      True

    Source: Dettmers et al. (2023), "QLoRA", for the use; the form is GGUF's Q4_1.
    """
    if bits not in (4, 8):
        raise InvalidInput(f"bits must be 4 or 8, not {bits!r}.")
    checks.pattern("pattern", pattern)
    checks.count("group", group)
    names = [name for name, _ in tree.named_leaves(params)]
    leaves, structure = jax.tree.flatten(params)
    found = [
        bool(re.search(pattern, name)) and np.ndim(x) == 2 and x.shape[0] % 2 == 0 for name, x in zip(names, leaves)
    ]
    if not any(found):
        raise InvalidInput(f"The pattern {pattern!r} finds no matrix among the parameters {', '.join(names)}.")
    return jax.tree.unflatten(structure, [_few_bits(x, bits, group) if few else x for x, few in zip(leaves, found)])


def _few_bits(x: Any, bits: int, group: int) -> Quantised:
    x = np.asarray(x, np.float32)
    rows, columns = x.shape
    grouped = x.reshape(-1, math.gcd(rows, group), columns)
    offset = grouped.min(1).astype(np.float16)
    low = offset.astype(np.float32)
    scale = ((grouped.max(1) - low) / (2**bits - 1)).astype(np.float16)
    step = np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
    q = np.clip(np.rint((grouped - low[:, None]) / step), 0, 2**bits - 1).astype(np.uint8).reshape(rows, columns)
    values = q if bits == 8 else q[: rows // 2] | (q[rows // 2 :] << 4)
    return Quantised(values, scale, offset, bits)
