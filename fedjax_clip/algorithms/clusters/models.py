"""What algorithms of several models share: their parameters, what clients send, and what it costs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_clip.algorithms.base import Round
from fedjax_clip.algorithms.exchange import Answer
from fedjax_clip.core import checks, keys, tree
from fedjax_clip.core.types import Algorithm, Array, InvalidInput, Params, PerExampleLoss, PyTree
from fedjax_clip.uplink.base import Uplink
from fedjax_clip.uplink.promises import Wire


class Models(NamedTuple):
    """The parameters of k models.

    Attributes:
      models: pytree like a model's parameters, of ``[k, ...]``.

    Example:
      >>> fc.clusters.stacked(params, 3, jax.random.key(0)).models["w"].shape
      (3, 64, 10)
    """

    models: PyTree

    def of(self, cluster: Array | int) -> Params:
        """The parameters of one model.

        Args:
          cluster: its number.
        """
        return jax.tree.map(lambda x: x[cluster], self.models)


def stacked(params: Params, clusters: int, key: Array, spread: float | Array = 0.1) -> Models:
    """``clusters`` models: the given one, and copies of it with Gaussian noise on each number.

    Args:
      params: pytree, the first model.
      clusters: k.
      key: PRNG key of the noise.
      spread: standard deviation of the noise, at least 0. With 0 all models are alike, and stay so.

    Raises:
      InvalidInput: k that is not a whole number of at least 1, a negative spread.

    Example:
      >>> start = fc.clusters.stacked(params, 3, jax.random.key(0))
      >>> result = fc.train(fc.clusters.ifca(per_example_loss, client_tx, clusters=3), data, start, rounds=2)
    """
    clusters = checks.count("stacked: clusters", clusters)
    checks.within("stacked: spread", spread, 0, finite=True)
    params = tree.as_arrays(params)
    leaves, structure = jax.tree.flatten(params)

    def copies(x, key):
        noise = spread * jax.random.normal(key, (clusters, *x.shape), tree.wide_type(x))
        own = jnp.arange(clusters).reshape(-1, *[1] * x.ndim) > 0
        return jnp.where(own, x[None] + noise.astype(x.dtype), x[None])

    each = jax.random.split(keys.threefry(key), len(leaves))
    return Models(jax.tree.unflatten(structure, [copies(x, k) for x, k in zip(leaves, each)]))


def check_start(now: Round) -> None:
    """Refuses a wrapper that gives the algorithm a part of one model."""
    if not isinstance(now.server.params, Models):
        raise InvalidInput(
            "A wrapper gives this algorithm a part of one model, and it trains several: begin the run with "
            "fc.clusters.stacked(params, clusters, key) for its parameters."
        )


def check_link(name: str, link: Uplink) -> None:
    """Refuses a link whose sums are over all clients."""
    if link.promises.mirrors or link.promises.wire is Wire.SUMS or link.promises.grid is not None:
        raise InvalidInput(
            f"{name} averages each cluster's updates apart, and the uplink adds those of all clients: take the memory, "
            "the sketch or the grid out of the uplink, or fedavg for the algorithm."
        )


def in_its_place(change: Params, cluster: Array, clusters: int) -> tuple[tuple[Models, Array], dict[str, Array]]:
    """``((message, place), report)`` of a client that trained one of the models.

    The message is the change of all models, zero but for this one's; the place is float32 ``[k]``, one 1 among zeros.
    """
    place = (jnp.arange(clusters, dtype=jnp.int32) == cluster).astype(jnp.float32)
    message = Models(jax.tree.map(lambda u: jnp.stack([tree.scaled(p, u) for p in place]), change))
    return (message, place), {f"cluster/{j}": place[j] for j in range(clusters)}


def priced(answer: Answer, link: Uplink, params: Models, clusters: int, down: int | None = None) -> Answer:
    """The answer with the bytes of one model and a number for each message, and of ``down`` models if that is given."""
    one = float(tree.nbytes(params) / clusters)
    bytes_up = {} if link.promises.wire is Wire.PACKS else {"bytes_up": answer.metrics["asked"] * (one + 4)}
    bytes_down = {} if down is None else {"bytes_down": answer.metrics["asked"] * (down * one)}
    return answer._replace(metrics=answer.metrics | bytes_up | bytes_down)


def of_several(
    made: Algorithm, per_example_loss: PerExampleLoss, clusters: int, key: Array, spread: float | Array
) -> Algorithm:
    """The algorithm, whose runs may begin with one model's parameters, of which ``stacked`` makes several."""

    def models(params: Any) -> Models:
        return params if isinstance(params, Models) else stacked(params, clusters, key, spread)

    def first(params: Any) -> Params:
        return params.of(0) if isinstance(params, Models) else params

    return made._replace(
        init=lambda params: made.init(models(params)),
        init_client=lambda params: made.init_client(models(params)),
        loss=lambda params, batch, key: per_example_loss(first(params), batch, key),
    )
