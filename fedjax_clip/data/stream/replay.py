"""Replay buffers: a client keeps a few examples whose life has ended, and trains on them together with new ones.

Which ones it keeps depends on hashes of (seed, client, example) and on the rounds in which lives end. So a buffer is a
rule like all others: it moves the end of some lives.
"""

import dataclasses

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import draws
from fedjax_clip.data.lives import ENDLESS
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.stream.rules import labels_of

_KEPT = 2**31 + 13  # separates this random stream from those of samplers, clocks and other rules


def reservoir(data: FederatedData, capacity: int, seed: int = 0) -> FederatedData:
    """Each client keeps ``capacity`` of its old examples: a uniform sample of all whose life has ended.

    Each old example has a random number, and the buffer holds those with the smallest ones. That has the distribution
    of reservoir sampling, and each example is in the buffer for one span of rounds. Old and new examples are shuffled
    together in each pass, so a buffer as large as the new data gives batches that are old by half.

    Apply it after the rules that end lives by class or by time. Apply ``clients(..., end=...)`` after it: a client that
    leaves takes its buffer along.

    Args:
      data: a stream.
      capacity: the most old examples that a client keeps.
      seed: of the sample.

    Returns:
      The stream in which kept examples live on.

    Raises:
      InvalidInput: a population in which all examples stay; a capacity below 1.

    Example:
      >>> stream = fc.data.stream.classes(data, groups=2, every=50)
      >>> kept = fc.data.stream.reservoir(stream, capacity=5)
      >>> old = (stream.lives[:, 1] == 50) & (kept.lives[:, 1] > 50)
      >>> int(np.add.reduceat(old.astype(int), data.offsets[:-1]).max())
      5

    Source: Vitter (1985), "Random Sampling with a Reservoir"; Chaudhry et al. (2019), "On Tiny Episodic Memories in
    Continual Learning", for its use.
    """
    return _keep(data, capacity, None, seed)


def balanced(data: FederatedData, capacity: int, label: str = "y", seed: int = 0) -> FederatedData:
    """Each client keeps ``capacity`` of its old examples, as many of each class as possible.

    As ``reservoir``, but when the buffer overflows, examples of the classes that have the most are dropped.

    Args:
      data: a stream.
      capacity: the most old examples that a client keeps.
      label: the field that holds the classes.
      seed: of the sample within a class.

    Returns:
      The stream in which kept examples live on.

    Raises:
      InvalidInput: as ``reservoir``; no such field, or one that holds no whole numbers.

    Example:
      >>> stream = fc.data.stream.balanced(fc.data.stream.classes(data, groups=5, every=20), capacity=10)

    Source: Prabhu et al. (2020), "GDumb: A Simple Approach that Questions Our Progress in Continual Learning",
    Algorithm 1.
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    return _keep(data, capacity, labels_of(data, label), seed)


def _keep(data: FederatedData, capacity: int, labels: np.ndarray | None, seed: int) -> FederatedData:
    checks.kind("data", data, FederatedData, "a FederatedData")
    capacity, seed = checks.count("capacity", capacity), checks.seed("seed", seed)
    if data.lives is None:
        raise InvalidInput(
            "A replay buffer holds old examples, and these stay for ever: apply fc.data.stream.classes first."
        )
    start, end = data.lives.T
    owner = np.repeat(np.arange(data.num_clients), data.sizes)
    place = np.arange(data.num_examples) - data.offsets[owner]
    rank = draws.uniform(seed, _KEPT, owner, place)
    kind = np.zeros(data.num_examples, np.int64) if labels is None else labels
    after, held = end.copy(), np.zeros(0, np.int64)
    for round in np.unique(end[(start < end) & (end < ENDLESS)]):
        candidates = np.concatenate([held, np.flatnonzero((end == round) & (start < end))])
        order = candidates[np.lexsort((rank[candidates], kind[candidates], owner[candidates]))]
        if labels is not None:  # first everybody's first of each class, then the second ones ...
            turn = _place(np.stack([owner[order], kind[order]]))
            order = order[np.lexsort((rank[order], turn, owner[order]))]
        kept = _place(owner[order][None]) < capacity
        after[order[~kept]], held = round, order[kept]
    after[held] = ENDLESS
    return dataclasses.replace(data, lives=np.stack([start, after], axis=1))


def _place(groups: np.ndarray) -> np.ndarray:
    """``0, 1, ...`` within each run of equal columns of ``groups`` ``[G, n]``."""
    number = np.arange(groups.shape[1])
    new = np.any(groups[:, 1:] != groups[:, :-1], axis=0)
    first = np.concatenate([[True], new]) if groups.shape[1] else np.zeros(0, bool)
    return number - np.maximum.accumulate(np.where(first, number, 0))
