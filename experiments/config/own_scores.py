"""The scores of ``--scores``: functions of one's own over the values of a held-out set."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import fedjax_clip as fc
from experiments.config import spec
from experiments.config.components import Components, Make, later
from fedjax_clip import tasks
from fedjax_clip.core.keys import seeded
from fedjax_clip.core.loss import example_values
from fedjax_clip.core.types import InvalidInput

Score = Callable[[Mapping[str, np.ndarray], fc.FederatedData], dict[str, float]]


def added(task: tasks.Task, text: str) -> tasks.Task:
    """The task with the scores of ``--scores`` beside its own.

    Args:
      task: its own ``summarise``, if any, comes first.
      text: such as ``"my_module.gini()|my_module.worst('accuracy')"``; each function takes ``(values, data)`` before
        the arguments that are written, as ``Task.summarise`` does.

    Raises:
      InvalidInput: a name of no function of ``--import``'s.
    """
    for call in spec.parse(text, "--scores"):
        if "." not in call.name:
            raise InvalidInput(
                f'--scores: "{call.name}" is not from a module of yours: write my_module.{call.name}() for the '
                f"function {call.name}(values, data) of my_module.py, and --import=my_module."
            )
    own = spec.build(text, Components(Callable, {}, _score), "--scores")
    if not own:
        return task
    first = task.summarise or (lambda values, data: {})

    def summarise(values: Mapping[str, np.ndarray], data: fc.FederatedData) -> dict[str, float]:
        found = dict(first(dict(values), data))
        for score in own:
            scores = score(values, data)
            if taken := [name for name in scores if name in found or name in values]:
                raise InvalidInput(f"--scores: {taken[0]!r} is measured already: choose another name.")
            found |= scores
        return found

    _try(task, summarise)
    if isinstance(task.summarise, tasks.OverClients):
        return dataclasses.replace(task, summarise=_Compared(**vars(task.summarise), whole=summarise))
    return dataclasses.replace(task, summarise=summarise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compared(tasks.OverClients):
    """A summary that compares clients as the task's does, and has further scores of the whole set, ``whole``."""

    whole: Score

    def __call__(self, values: Mapping[str, np.ndarray], data: fc.FederatedData) -> dict[str, float]:
        return self.whole(values, data)


def _try(task: tasks.Task, summarise: Score) -> None:
    """Calls the scores on made-up values, so that what is wrong with them is said before anything is written."""
    for data in task.evaluation.values():
        one = jax.tree.map(lambda x: x[:1], data.examples)

        def values(key: Any, batch: Any) -> dict[str, Any]:
            return example_values(task.per_example_loss, task.init(key), batch, None, 1)

        draws = np.random.default_rng(0).uniform(size=data.num_examples)
        names = jax.eval_shape(values, seeded(0), one)
        summarise({name: draws.astype(x.dtype) for name, x in names.items()}, data)


def _score(make: Make) -> Callable[..., Score]:
    """``(own arguments) -> score``, whose result is checked."""
    name, takes = make.__name__, list(inspect.signature(make).parameters)
    if len(takes) < 2:
        raise InvalidInput(f"--scores: {name} must take (values, data), not ({', '.join(takes)}).")
    own = later(make, 2)

    def build(*args: Any, **kwargs: Any) -> Score:
        score = own(*args, **kwargs)

        def checked(values: Mapping[str, np.ndarray], data: fc.FederatedData) -> dict[str, float]:
            found = score(values, data)
            if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
                raise InvalidInput(f"--scores: {name} must return {{name: number}}, not {type(found).__name__}.")
            for key, x in found.items():
                if np.ndim(x) or not np.issubdtype(np.asarray(x).dtype, np.number):
                    raise InvalidInput(f"--scores: {name} must return numbers, and {key!r} is {x!r}.")
            return {key: float(x) for key, x in found.items()}

        return checked

    return functools.wraps(own)(build)
