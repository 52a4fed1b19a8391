"""Membership inference: whether an example was trained on, told from the trained model's loss."""

import jax
import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput, Params, PerExampleLoss
from fedjax_clip.data.population import FederatedData

LEAST_STD = 1e-3  # of a logit, for examples that all shadow models score alike


def losses_of(per_example_loss: PerExampleLoss, params: Params, data: FederatedData) -> np.ndarray:
    """The loss of every example; minus it is the score of the threshold attack: members have low losses.

    Args:
      per_example_loss: of the examples, called without a key, as in evaluation.
      params: the trained model.
      data: the examples to judge, members and others.

    Returns:
      float64 ``[N]``.

    Example:
      >>> scores = -fc.attacks.losses_of(per_example_loss, result.params, data)

    Source: Yeom et al. (2018), "Privacy Risk in Machine Learning", Adversary 2.
    """
    checks.kind("data", data, FederatedData, "a FederatedData")
    out = jax.jit(lambda params, batch: per_example_loss(params, batch, None))(params, data.examples)
    return np.asarray(out[0] if isinstance(out, tuple) else out, np.float64)


def likelihood_ratios(losses: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """LiRA: the log likelihood ratio of each example having been trained on, from models with and without it.

    A loss ``-log p`` becomes the logit ``log(p / (1 - p))``. Each example has a normal distribution over the shadow
    models that trained on it, and another over those that did not, each with its own mean. Standard deviations are
    common to all examples, as the paper advises for few shadow models.

    Args:
      losses: ``[N]`` cross-entropies of the attacked model.
      shadows: ``[S, N]`` of S models, trained like it on other choices of examples.
      inside: bool ``[S, N]``, whether a shadow model trained on an example.

    Returns:
      float64 ``[N]``, larger for members.

    Raises:
      InvalidInput: shapes that do not fit; an example that is in all shadow models, or in none.

    Example:
      >>> inside = np.array([[True, False], [False, True]])
      >>> fc.attacks.likelihood_ratios(np.array([0.1, 2.0]), np.where(inside, 0.1, 2.0), inside) > 0
      array([ True, False])

    Source: Carlini et al. (2022), "Membership Inference Attacks From First Principles", Algorithm 1.
    """
    shadows, inside = np.asarray(shadows, np.float64), np.asarray(inside, bool)
    if shadows.ndim != 2 or inside.shape != shadows.shape or np.shape(losses) != shadows.shape[1:]:
        raise InvalidInput(
            f"likelihood_ratios needs losses [N], shadows and inside [S, N], not {np.shape(losses)}, {shadows.shape} "
            f"and {inside.shape}."
        )
    if np.any(inside.all(0) | ~inside.any(0)):
        raise InvalidInput("likelihood_ratios: every example must be in some shadow models, and not in others.")
    target, logits = _logits(losses), _logits(shadows)

    def log_density(chosen):
        mean = np.sum(np.where(chosen, logits, 0), 0) / chosen.sum(0)
        std = max(float(np.std((logits - mean)[chosen])), LEAST_STD)
        return -0.5 * np.square((target - mean) / std) - np.log(std)

    return log_density(inside) - log_density(~inside)


def separation(scores: np.ndarray, members: np.ndarray, false_positives: float = 0.01) -> dict[str, float]:
    """How well a score tells members from others.

    Args:
      scores: ``[N]``, larger for members.
      members: bool ``[N]``.
      false_positives: the rate of others taken for members, for the last figure.

    Returns:
      ``auc``, 0.5 for a guess; ``advantage``, the largest difference between the rates of true and false positives;
      ``true_positives`` at no more than this rate of false ones.

    Raises:
      InvalidInput: no members, or none but members; shapes that differ.

    Example:
      >>> fc.attacks.separation(np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, True, False, False]))
      {'auc': 1.0, 'advantage': 1.0, 'true_positives': 1.0}

    Source: Yeom et al. (2018), Definition 4 (advantage); Carlini et al. (2022), for the rate at few false positives.
    """
    scores, members = np.asarray(scores, np.float64), np.asarray(members, bool)
    checks.within("separation: false_positives", false_positives, 0, 1)
    if scores.shape != members.shape or scores.ndim != 1 or members.all() or not members.any():
        raise InvalidInput("separation needs scores [N] and members [N], with some members and some others.")
    thresholds = np.append(np.unique(scores), np.inf)
    inside, outside = np.sort(scores[members]), np.sort(scores[~members])
    true, false = (1 - np.searchsorted(s, thresholds) / len(s) for s in (inside, outside))
    below, equal = (np.searchsorted(outside, inside, side=side) for side in ("left", "right"))
    return {
        "auc": float(np.mean(below + equal) / 2 / len(outside)),
        "advantage": float(np.max(true - false)),
        "true_positives": float(np.max(true[false <= false_positives])),
    }


def _logits(losses: np.ndarray) -> np.ndarray:
    losses = np.clip(np.asarray(losses, np.float64), 1e-12, 700)
    return -losses - np.log(-np.expm1(-losses))
