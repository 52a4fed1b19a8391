"""The average of the server's parameters, as the state of its optimiser has it."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from fedjax_clip.core import tree
from fedjax_clip.core.types import Array, PyTree


class AverageState(NamedTuple):
    """The average of the server's parameters.

    Attributes:
      params: pytree like the parameters.
      rounds: int32 scalar, how many it is of.
    """

    params: PyTree
    rounds: Array


def average_of(server: PyTree) -> PyTree | None:
    """The average that a server's optimiser keeps, if it keeps one."""
    nodes = jax.tree.leaves(getattr(server, "opt_state", ()), is_leaf=lambda x: isinstance(x, AverageState))
    return next((x.params for x in nodes if isinstance(x, AverageState)), None)


def merged(params: PyTree, part: PyTree) -> PyTree:
    """The parameters with those of a part of them, by their names."""
    known = dict(tree.named_leaves(part))
    names = [name for name, _ in tree.named_leaves(params)]
    leaves = [known.get(name, x) for name, x in zip(names, jax.tree.leaves(params))]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def models(params: PyTree, average: PyTree | None) -> dict[Callable[[str], str], PyTree]:
    """The parameters, and those of the average if there is one, by what renames their scores."""
    return {str: params} | ({} if average is None else {renamed: merged(params, average)})


def renamed(score: str) -> str:
    """The name of a score of the average: ``eval/examples_average/loss``, ``eval/average/score``."""
    kind, *rest = score.split("/")
    where, name = (f"{rest[0]}_average", rest[1:]) if len(rest) > 1 else ("average", rest)
    return "/".join([kind, where, *name])
