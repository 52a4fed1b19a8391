"""How the loops of a round are compiled: of known length or not, with small arrays together or apart."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core.tree import FEW, SMALL
from fedjax_clip.core.types import Array, PyTree

Buckets = tuple[tuple[int, int], ...]
WASTE = 0.05  # of the local steps, which buckets may add
MOST_BUCKETS = 4  # each is a loop of its own, so the program grows with them


class Loops(NamedTuple):
    """How the loops of a round are compiled. The default is for a CPU: loops end with the last client and step.

    A GPU starts a kernel for each array that a step updates, however small, and asks the host at each turn whether a
    loop goes on, unless the compiler knows the loop's length.

    Attributes:
      packed: whether a loop carries its small arrays as one vector for each type.
      buckets: ``((chunks, steps), ...)``: so many first chunks of clients take so many local steps, and so on. A client
        with fewer steps computes the others in vain. ``()``: ``plan_rounds`` has to find them; ``None``: unknown.
      whole: whether all planned rounds are run.

    Example:
      >>> Loops(packed=True, buckets=((10, 5),))
      Loops(packed=True, buckets=((10, 5),), whole=False)
    """

    packed: bool = False
    buckets: Buckets | None = None
    whole: bool = False


def buckets(steps: Sequence[int] | np.ndarray, most: float, like: Buckets = ()) -> Buckets | None:
    """Loop lengths for chunks of clients that take up to so many steps, or ``None`` if they would waste too much.

    Args:
      steps: ``[K]`` of each chunk of clients, the longest first.
      most: the number of steps that all buckets together may have.
      like: buckets of an earlier plan, which are taken again if they serve, so that nothing is compiled. If they do
        not, the result serves both plans where it may: so the plans of a run soon share their buckets.

    Example:
      >>> buckets([5, 5, 5, 4, 1], most=21)
      ((4, 5), (1, 1))
    """
    before = np.array([turns for chunks, turns in like for _ in range(chunks)], int)
    before = np.pad(before[: len(steps)], (0, max(0, len(steps) - len(before))))
    if like and _size(like) == before.sum() <= most and np.all(before >= steps):
        return like
    return _joined(np.maximum(before, steps), most) or _joined(steps, most)


def _joined(steps: Sequence[int] | np.ndarray, most: float) -> Buckets | None:
    found = [(1, int(turns)) for turns in steps if turns > 0]
    while len(found) > 1:
        added = [(a[1] - b[1]) * b[0] for a, b in itertools.pairwise(found)]  # by joining a bucket with the next
        place = int(np.argmin(added))
        if added[place] and _size(found) + added[place] > most:
            break
        found[place : place + 2] = [(found[place][0] + found[place + 1][0], found[place][1])]
    return tuple(found) if 0 < len(found) <= MOST_BUCKETS and _size(found) <= most else None


def _size(buckets: Sequence[tuple[int, int]]) -> int:
    return sum(chunks * turns for chunks, turns in buckets)


def packing(
    like: PyTree, beside: PyTree = ()
) -> tuple[Callable[[PyTree], list[Array]], Callable[[list[Array]], PyTree]]:
    """Functions from trees like this one to fewer arrays, and back.

    All scalars of a type become one vector. So do its other small arrays if they are more than ``FEW``: a compiler may
    read an array of its own within a matrix product, but has to cut a part out of a vector.

    Args:
      like: pytree of arrays or numbers.
      beside: arrays that the same loop updates. Scalars become as long as the shortest vector of them that is long
        enough, because a GPU updates arrays of one shape in one kernel.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, like))
    lengths = [x.size for x in jax.tree.leaves(beside) if jnp.ndim(x) == 1]
    kinds: dict[Any, list[int]] = {}
    for place, x in enumerate(leaves):
        kinds.setdefault((x.dtype, x.ndim == 0) if x.size <= SMALL else place, []).append(place)
    groups = [group for group in kinds.values() if len(group) > (1 if leaves[group[0]].ndim == 0 else FEW)]
    ends = [np.cumsum([leaves[i].size for i in group]) for group in groups]
    alone = [i for i in range(len(leaves)) if all(i not in group for group in groups)]

    def vector(parts: list[Array]) -> Array:
        joined = jnp.concatenate([x.ravel() for x in parts])
        longer = [n for n in lengths if n > joined.size]
        return jnp.pad(joined, (0, min(longer) - joined.size)) if longer and parts[0].ndim == 0 else joined

    def pack(tree: PyTree) -> list[Array]:
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
        return [vector([leaves[i] for i in group]) for group in groups] + [leaves[i] for i in alone]

    def unpack(arrays: list[Array]) -> PyTree:
        parts = dict(zip(alone, arrays[len(groups) :], strict=True))
        for group, end, joined in zip(groups, ends, arrays):
            pieces = zip(group, jnp.split(joined, end)[: len(group)], strict=True)
            parts |= {i: piece.reshape(leaves[i].shape) for i, piece in pieces}
        return jax.tree.unflatten(structure, [parts[i] for i in range(len(leaves))])

    return pack, unpack
