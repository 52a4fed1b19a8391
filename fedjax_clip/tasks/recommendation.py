"""Matrix factorisation of ratings with private user factors; each user is a client."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from fedjax_clip import models
from fedjax_clip.core import checks
from fedjax_clip.core.types import PerExampleLoss
from fedjax_clip.data import partition, tables
from fedjax_clip.data.population import FederatedData
from fedjax_clip.data.statistics import federated_sums, moments
from fedjax_clip.tasks.base import Task, check_positive
from fedjax_clip.training.scores import Summary

FITTED = "the mean rating, and counts and biases of items, from exact ratings: give public=True, or a rating's bounds"


def insteval(
    rank: int = 4, l2: float = 20.0, l2_bias: float = 5.0, held_out: float = 0.2, seed: int = 0, public: bool = False
) -> Task:
    """73,421 ratings (1 to 5) of 1128 lecturers by 2972 students of ETH Zurich, who are the clients.

    Arguments as for ``ratings``; ``public`` gives it the scale, as an epsilon needs, and the lecturers count as public.

    Example:
      >>> task = fc.tasks.insteval(rank=4)

    Source: InstEval of the R package lme4 (Bates, Mächler, Bolker and Walker 2015).
    """
    table = tables.rdataset("lme4", "InstEval")
    user, bounds = table["s"].astype(np.int64), (1, 5) if public else None
    return ratings(user, table["d"], table["y"], rank, l2, l2_bias, held_out, seed, bounds)


def movielens(
    rank: int = 8, l2: float = 20.0, l2_bias: float = 5.0, held_out: float = 0.2, seed: int = 0, public: bool = False
) -> Task:
    """100,004 ratings (0.5 to 5) of 9066 films by 671 users, who are the clients: MovieLens "latest small" of 2016.

    Arguments as for ``ratings``; ``public`` gives it the scale, as an epsilon needs, and the films count as public.

    Example:
      >>> task = fc.tasks.movielens()

    Source: Harper and Konstan (2015), "The MovieLens Datasets", as in the R package dslabs.
    """
    table = tables.rdataset("dslabs", "movielens")
    user, bounds = table["userId"].astype(np.int64), (0.5, 5) if public else None
    return ratings(user, table["movieId"], table["rating"], rank, l2, l2_bias, held_out, seed, bounds)


def ratings(
    user: np.ndarray,
    item: np.ndarray,
    rating: np.ndarray,
    rank: int = 8,
    l2: float = 20.0,
    l2_bias: float = 5.0,
    held_out: float = 0.2,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
) -> Task:
    """Matrix factorisation of ratings, ``r ~ mean + b_user + b_item + <p_user, q_item>``, for ``partially_private``.

    With ``private="user"`` users keep ``b_user`` and ``p_user``; items' biases and factors are federated. The biases
    begin at their closed form, from sums that users send. Scores of the held-out ratings: ``rmse``, and for comparison
    that of the mean and of the biases alone.

    Args:
      user, item: ``[N]`` names or whole numbers of users, who are the clients, and of items.
      rating: ``[N]``.
      rank: length of the factors.
      l2, l2_bias: strength of the penalty on a user's and on an item's factors and bias, see ``rating_loss``.
      held_out: fraction of each user's ratings.
      seed: of the split.
      bounds: the least and the greatest rating, public as an epsilon needs; the items then count as public, too. The
        mean is the middle of the bounds, biases begin at 0, and a rating's share of its item's penalty equals that of
        its user's, so clients send no sums.

    Example:
      >>> user, item = np.array(["ann", "ann", "bob", "bob"]), np.array(["film 1", "film 2", "film 1", "film 3"])
      >>> task = fc.tasks.ratings(user, item, np.array([4.0, 2.0, 5.0, 1.0]), rank=2, held_out=0.5)
    """
    check_positive(rank=rank)
    for name, value in (("l2", l2), ("l2_bias", l2_bias)):
        checks.within(name, value, 0, finite=True)
    names, item = np.unique(item, return_inverse=True)
    rating = np.asarray(rating, np.float32)
    if bounds is not None:
        tables.read_bounds({"rating": bounds})  # refuses bad bounds
        rating = np.clip(rating, *bounds)
    given = {"x": item.astype(np.int32), "y": rating, "user": user}
    train, examples = partition.natural(given, "user").split_examples(held_out, seed)
    counts: np.ndarray | None = None
    if bounds is None:
        mean, counts = float(moments(train, "y").mean), item_counts(train, len(names))
        biases, constants = item_biases(train, len(names), l2_bias), baselines(train, examples, len(names))
    else:
        mean, biases = sum(bounds) / 2, np.zeros(len(names))
        constants = {"rmse_of_middle": float(np.sqrt(np.mean(np.square(examples.examples["y"] - mean))))}
    train, examples = (_with_shares(data, train, counts) for data in (train, examples))
    model = models.Factorisation(len(names), rank, mean)

    def init(key):
        leaves = model.init(key, jnp.zeros(1, jnp.int32))["params"]
        return {"params": {**leaves, "item_bias": {"embedding": jnp.asarray(biases[:, None], jnp.float32)}}}

    return Task(
        train,
        {"examples": examples},
        init,
        rating_loss(model, l2, l2_bias),
        _scores(constants),
        fitted="" if bounds else FITTED,
    )


def rating_loss(model: models.Factorisation, l2: float, l2_bias: float) -> PerExampleLoss:
    """Half the squared error and, in training, each rating's share of the penalty.

    Over all ratings the penalty is ``sum_u (l2_bias b_u^2 + l2 |p_u|^2) / 2`` and the same for items: each of a user's
    n ratings adds 1/n of the user's term, and likewise for items. So ``l2`` is the variance of the noise over that of
    the factors.

    Source: Salakhutdinov and Mnih (2008), "Probabilistic Matrix Factorization", equation 4.
    """

    def per_example_loss(params, batch, key):
        predicted = jnp.asarray(model.apply(params, batch["x"]))
        losses = 0.5 * jnp.square(predicted - batch["y"].astype(predicted.dtype))
        if key is None:
            return losses
        leaves = params["params"]
        user = l2_bias * leaves["user_bias"] ** 2 + l2 * jnp.sum(leaves["user"] ** 2)
        factors, bias = (leaves[name]["embedding"][batch["x"]] for name in ("item", "item_bias"))
        item = l2_bias * bias[:, 0] ** 2 + l2 * jnp.sum(jnp.square(factors), axis=-1)
        return losses + (batch["share"][:, 0] * user + batch["share"][:, 1] * item) / 2

    return per_example_loss


def item_counts(train: FederatedData, num_items: int) -> np.ndarray:
    """``[items]`` ratings of each item, from the sums of the users' counts."""
    return federated_sums(train, lambda examples: np.bincount(examples["x"], minlength=num_items))


def _with_shares(data: FederatedData, train: FederatedData, counts: np.ndarray | None) -> FederatedData:
    """Adds a field ``share [N, 2]``: 1 over the number of training ratings of a rating's user and of its item.

    Without ``counts`` of the items both are the user's.
    """
    own = dict(zip(map(train.name, range(train.num_clients)), train.sizes.tolist(), strict=True))
    of_user = np.repeat([own.get(data.name(c), 1) for c in range(data.num_clients)], data.sizes)
    of_item = of_user if counts is None else np.maximum(counts[data.examples["x"]], 1)
    share = (1 / np.stack([of_user, of_item], axis=1)).astype(np.float32)
    return dataclasses.replace(data, examples={**data.examples, "share": share})


def item_biases(train: FederatedData, num_items: int, damping: float) -> np.ndarray:
    """``b_i = sum (r - mean) / (damping + n_i)`` over an item's ratings, ``[items]``, from sums that users send."""
    mean = float(moments(train, "y").mean)
    total = federated_sums(train, lambda examples: np.bincount(examples["x"], examples["y"] - mean, num_items))
    return total / np.maximum(damping + item_counts(train, num_items), 1e-6)


def baselines(
    train: FederatedData, held_out: FederatedData, num_items: int, damping: tuple[float, float] = (5.0, 5.0)
) -> dict[str, float]:
    """RMSE on held-out ratings of the global mean, and of ``mean + b_item + b_user``.

    ``b_item`` are ``item_biases``; then each user's ``b_u = sum (r - mean - b_i) / (damping + n_u)`` over its own
    ratings, which stays with the user.

    Source: Koren (2010), "Factor in the Neighbors", section 2.1, with smaller dampings, for smaller data.
    """
    mean, item = float(moments(train, "y").mean), item_biases(train, num_items, damping[0])
    own = {}
    for c in range(train.num_clients):
        examples = train.client(c)
        own[train.name(c)] = np.sum(examples["y"] - mean - item[examples["x"]]) / (damping[1] + len(examples["y"]))
    user = np.repeat([own.get(held_out.name(c), 0.0) for c in range(held_out.num_clients)], held_out.sizes)
    x, y = held_out.examples["x"], held_out.examples["y"]
    errors = {"rmse_of_mean": y - mean, "rmse_of_biases": y - mean - item[x] - user}
    return {name: float(np.sqrt(np.mean(np.square(error, dtype=np.float64)))) for name, error in errors.items()}


def _scores(constants: dict[str, float]) -> Summary:
    return lambda values, data: {"rmse": math.sqrt(2 * np.mean(values["loss"], dtype=np.float64)), **constants}
