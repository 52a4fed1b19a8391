"""Batch normalisation whose statistics leave padding out."""

from typing import Any

import flax.linen as nn
import jax


class BatchNorm(nn.BatchNorm):
    """``flax.linen.BatchNorm``, parameter for parameter, which takes example weights in place of two flags.

    In training, ``weights [B]``, an example of weight 0 enters no statistic; other weights count alike. Without weights
    it normalises by the running statistics, as in evaluation. The statistics are the collection ``batch_stats``, which
    ``fc.local.with_state`` trains. They move by a tenth of the way to the batch's, in place of Flax's hundredth: local
    steps are few.

    Attributes:
      momentum: m of ``s <- m s + (1 - m) batch``.

    Example:
      >>> layer = fc.models.BatchNorm()
      >>> variables = layer.init(key, np.zeros((6, 3)))
      >>> y, changed = layer.apply(variables, np.ones((6, 3)), np.array([1, 1, 1, 1, 0, 0]), mutable=["batch_stats"])

    Source: Ioffe and Szegedy (2015), Algorithm 1; the running variance is the biased one, as in Flax.
    """

    momentum: float = 0.9
    use_fast_variance: bool = False  # E x^2 - (E x)^2 loses the digits of a feature far from 0

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None = None) -> Any:  # type: ignore[override]
        mask = None if weights is None else (weights > 0).reshape(-1, *[1] * (x.ndim - 1))
        return super().__call__(x, use_running_average=weights is None, mask=mask)
