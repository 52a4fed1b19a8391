"""Scores of incremental learning: what a model still knows of earlier phases of a stream."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput


def accuracies(history: Sequence[Mapping[str, float]], metrics: Sequence[str], ends: Sequence[int]) -> np.ndarray:
    """The matrix of accuracies of a run's phases: ``R[i, j]`` is that of phase j's set after phase i.

    Args:
      history: the rows of the run, such as ``result.history`` or those of ``metrics.jsonl``.
      metrics: ``[T]`` names of the phases' scores, such as ``"eval/from_50/accuracy"``, in the order of the phases.
      ends: ``[T]`` rounds after which the phases end, as many as rows say: with phases of 50 rounds ``[50, 100, 150]``.

    Returns:
      float64 ``[T, T]``.

    Raises:
      InvalidInput: no such row, or one without such a score: an evaluation must take place at the end of each phase.

    Example:
      >>> history = [{"round": 50.0, "eval/a/accuracy": 0.9, "eval/b/accuracy": 0.0},
      ...            {"round": 100.0, "eval/a/accuracy": 0.4, "eval/b/accuracy": 0.8}]
      >>> fc.data.stream.accuracies(history, ["eval/a/accuracy", "eval/b/accuracy"], [50, 100]).tolist()
      [[0.9, 0.0], [0.4, 0.8]]
    """
    if len(metrics) != len(ends) or not metrics:
        raise InvalidInput(f"Each phase has a metric and an end: {len(metrics)} metrics do not fit {len(ends)} ends.")
    rows = {int(row["round"]): row for row in history}
    for end in ends:
        for name in metrics:
            if name not in rows.get(int(end), {}):
                raise InvalidInput(
                    f"The history has no {name!r} after round {end}: let eval_every divide the rounds in which phases "
                    "end."
                )
    return np.array([[rows[int(end)][name] for name in metrics] for end in ends], np.float64)


def average_accuracy(matrix: np.ndarray) -> float:
    """The mean accuracy over all phases' sets after the last phase: ``1/T sum_j R[T, j]``.

    Args:
      matrix: ``[T, T]`` of ``accuracies``.

    Raises:
      InvalidInput: no square matrix.

    Example:
      >>> round(fc.data.stream.average_accuracy(np.array([[0.9, 0.0], [0.4, 0.8]])), 3)
      0.6

    Source: Lopez-Paz and Ranzato (2017), "Gradient Episodic Memory for Continual Learning", section 2: ACC.
    """
    return float(_square(matrix, 1)[-1].mean())


def backward_transfer(matrix: np.ndarray) -> float:
    """How later phases changed the accuracy of earlier ones: ``1/(T-1) sum_{j<T} (R[T, j] - R[j, j])``.

    Negative values are forgetting.

    Args:
      matrix: ``[T, T]`` of ``accuracies``, T at least 2.

    Raises:
      InvalidInput: no square matrix, or one phase only.

    Example:
      >>> fc.data.stream.backward_transfer(np.array([[0.9, 0.0], [0.4, 0.8]]))
      -0.5

    Source: Lopez-Paz and Ranzato (2017), "Gradient Episodic Memory for Continual Learning", section 2: BWT.
    """
    matrix = _square(matrix, 2)
    return float(np.mean(matrix[-1, :-1] - np.diag(matrix)[:-1]))


def forgetting(matrix: np.ndarray) -> float:
    """How far each earlier phase is below its best: ``1/(T-1) sum_{j<T} (max_{l<T} R[l, j] - R[T, j])``.

    Args:
      matrix: ``[T, T]`` of ``accuracies``, T at least 2.

    Raises:
      InvalidInput: no square matrix, or one phase only.

    Example:
      >>> fc.data.stream.forgetting(np.array([[0.9, 0.0], [0.4, 0.8]]))
      0.5

    Source: Chaudhry et al. (2018), "Riemannian Walk for Incremental Learning", section 3: F.
    """
    matrix = _square(matrix, 2)
    return float(np.mean(matrix[:-1, :-1].max(axis=0) - matrix[-1, :-1]))


def _square(matrix: np.ndarray, least: int) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < least:
        raise InvalidInput(f"The matrix must be [T, T] with T at least {least}, not {checks.shown(matrix.shape)}.")
    return matrix
