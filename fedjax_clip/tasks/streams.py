"""A task whose examples and clients come and go by rounds."""

import dataclasses
from collections.abc import Callable, Sequence

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import stream as streams
from fedjax_clip.data.population import FederatedData
from fedjax_clip.tasks.base import Task

MOST_PHASES = 10  # into which a held-out set is divided


def stream(task: Task, rules: Sequence[Callable[[FederatedData], FederatedData]], label: str = "y") -> Task:
    """A stream made of a task: examples and clients come and go by rules, from left to right.

    Each held-out set is divided by the round in which clients first have such examples (``fc.data.stream.phases``):
    ``examples`` becomes ``examples_from_0``, ``examples_from_50`` ... A set of one phase, or of more than ten, stays
    whole.

    Args:
      task: any task.
      rules: functions of the training population, of ``fc.data.stream``. In a flag they are written without it:
        ``stream(digits(), [classes(2, every=50), clients(3, start=100), reservoir(20)])``.
      label: the field that holds the classes.

    Raises:
      InvalidInput: no rules; what a rule refuses.

    Example:
      >>> rules = [lambda data: fc.data.stream.classes(data, groups=2, every=50)]
      >>> sorted(fc.tasks.stream(fc.tasks.digits(), rules).evaluation)
      ['clients_from_0', 'clients_from_50', 'examples_from_0', 'examples_from_50']
    """
    checks.kind("task", task, Task, "a task such as fc.tasks.digits()")
    rules = [rules] if callable(rules) else list(rules)
    if not rules:
        raise InvalidInput("A stream needs a rule, such as classes(groups=2, every=50).")
    data = task.data
    for rule in rules:
        data = rule(data)
    evaluation: dict[str, FederatedData] = {}
    for name, held_out in task.evaluation.items():
        parts = streams.phases(data, held_out, label)
        if len(parts) in range(2, MOST_PHASES + 1):
            evaluation |= {f"{name}_from_{start}": part for start, part in parts.items()}
        else:
            evaluation[name] = held_out
    return dataclasses.replace(task, data=data, evaluation=evaluation)
