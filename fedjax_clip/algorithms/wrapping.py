"""Shared code of the wrappers, which make an algorithm of an algorithm."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from fedjax_clip.algorithms.exchange import ClientFn
from fedjax_clip.core import checks, tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.types import Algorithm, InvalidInput, Params, PyTree


def check_made(wrapper: str, algorithm: Any) -> None:
    """Refuses to wrap an algorithm without ``parts``.

    Args:
      wrapper: its name.
      algorithm: what it is to wrap.

    Raises:
      InvalidInput: says what to give instead.
    """
    checks.kind(f"{wrapper}'s algorithm", algorithm, Algorithm, "one such as fc.fedavg(per_example_loss, client_tx)")
    if algorithm.parts is None:
        raise InvalidInput(
            f"{wrapper} changes what clients train, and this algorithm's round is closed: make the algorithm by "
            "fc.extend.algorithm."
        )


def split_by(name: str, pattern: str, params: Params) -> tuple[PyTree, PyTree]:
    """``(leaves in whose names the pattern is found, the others)``, neither of them empty.

    Raises:
      InvalidInput: a pattern that is found in no leaf or in all of them.
    """
    found, others = tree.split(params, pattern)
    if not jax.tree.leaves(found) or not jax.tree.leaves(others):
        names = ", ".join(name for name, _ in tree.named_leaves(params))
        raise InvalidInput(f"{name}={pattern!r} must be found in some of the parameters, not none or all: {names}.")
    return found, others


def around(cohort: Cohort, change: Callable[[ClientFn], ClientFn]) -> Cohort:
    """The cohort with ``change`` around each client's work, inside the changes of outer wrappers."""
    outer = cohort.around
    return dataclasses.replace(cohort, around=change if outer is None else lambda client_fn: outer(change(client_fn)))
