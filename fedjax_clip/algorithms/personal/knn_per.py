"""kNN-Per: the server's model, corrected by a client's own examples that look alike to it."""

import jax
import jax.numpy as jnp

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput


def knn_per(
    stored: Array,
    labels: Array,
    queries: Array,
    probabilities: Array,
    *,
    k: int,
    share: float | Array,
    scale: float | Array = 1.0,
) -> Array:
    """Mixes a model's probabilities with the votes of a client's k nearest examples.

    ``share p_knn + (1 - share) p``, with ``p_knn(c)`` in proportion to the sum of ``exp(-d_j / scale)`` over those of
    the k nearest examples that are of class c. ``d_j`` is the Euclidean distance of representations: what the model's
    last layer but one says of an example. Nothing is trained and nothing is sent: a client does this alone, with the
    server's model and its own training examples, and a new client can at once. Ties go to the example stored first.

    Args:
      stored: ``[m, p]``, representations of the client's training examples, m at least k.
      labels: int ``[m]``, their classes, from 0 to C - 1.
      queries: ``[q, p]``, representations to judge.
      probabilities: ``[q, C]``, the model's.
      k: number of neighbours, at least 1.
      share: lambda in [0, 1], of the neighbours; tuned on the client's held-out examples. 0 is the server's model.
      scale: of distances, positive; the paper takes 1.

    Returns:
      ``[q, C]``, rows that add up to 1 if those of ``probabilities`` do.

    Raises:
      InvalidInput: an argument out of range, shapes that do not go together, fewer examples than k.

    Example:
      >>> stored, labels = jnp.array([[0.0], [1.0], [9.0]]), jnp.array([0, 0, 1])
      >>> fc.personal.knn_per(stored, labels, jnp.array([[8.5]]), jnp.array([[0.5, 0.5]]), k=1, share=0.5).tolist()
      [[0.25, 0.75]]

    Source: Marfoq, Neglia, Kameni and Vidal (2022), "Personalized Federated Learning through Local Memorization".
    """
    checks.count("knn_per's k", k)
    checks.within("knn_per's share", share, 0, 1)
    checks.positive("knn_per's scale", scale)
    stored, queries, probabilities, labels = map(jnp.asarray, (stored, queries, probabilities, labels))
    shapes = stored.shape, labels.shape, queries.shape, probabilities.shape
    if [len(shape) for shape in shapes] != [2, 1, 2, 2] or not (
        len(stored) == len(labels) and len(queries) == len(probabilities) and stored.shape[1] == queries.shape[1]
    ):
        raise InvalidInput(f"knn_per takes arrays [m, p], [m], [q, p] and [q, C], not of shapes {shapes}.")
    if len(stored) < k:
        raise InvalidInput(f"knn_per looks for {k} neighbours among {len(stored)} examples: ask for fewer.")

    apart = tree.wide(queries)[:, None] - tree.wide(stored)[None]
    closeness, near = jax.lax.top_k(-jnp.sqrt(jnp.sum(jnp.square(apart), axis=-1)), k)
    weights = jnp.exp((closeness - closeness[:, :1]) / scale)
    votes = jnp.sum(weights[..., None] * jax.nn.one_hot(labels[near], probabilities.shape[1]), axis=1)
    return share * votes / jnp.sum(weights, axis=1, keepdims=True) + (1 - share) * probabilities
