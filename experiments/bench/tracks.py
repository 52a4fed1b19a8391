"""ClipBench's problems."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_clip as fc
from experiments.bench.core.problem import Measure, Run, Track
from experiments.bench.core.tuning import Range
from fedjax_clip import models, tasks
from fedjax_clip.core.keys import seeded
from fedjax_clip.core.types import InvalidInput


def _one_each(**fields: Any) -> fc.FederatedData:
    """Clients of one example each."""
    arrays = {name: np.asarray(values, np.float32) for name, values in fields.items()}
    return fc.FederatedData(arrays, np.arange(len(next(iter(arrays.values()))) + 1))


def _quartic_loss(params, batch, key):
    x = params["x"]
    push = 0.0 if key is None else batch["noise"] * jax.random.uniform(key, batch["c"].shape, minval=-1.0)
    return x**4 - 3 * x**3 + batch["c"] * x**2 + x + push * x


def _quartic_gap(params, examples):
    """``mean_i f_i(x) - min`` as a polynomial in x - optimum: a difference of two values is lost in float32."""
    optimum, mean = examples["optimum"][0], jnp.mean(examples["c"])
    e = params["x"] - optimum
    return (6 * optimum**2 - 9 * optimum + mean) * e**2 + (4 * optimum - 3) * e**3 + e**4


def _quartic_distance(params, examples):
    return jnp.abs(params["x"] - examples["optimum"][0])


def _ranges(client_lr: tuple[float, float], threshold: tuple[float, float]) -> dict[str, Range]:
    return {"client_lr": Range(*client_lr), "threshold": Range(*threshold), "server_lr": Range(0.1, 10.0)}


def _quartics(name: str, coefficients: Any, noise: float, start: Callable[[int], float], **options: Any) -> Track:
    """``f_i(x) = x^4 - 3 x^3 + c_i x^2 + x``, and noise ~ U(-noise, noise) on every gradient."""
    slope = [4, -9, 2 * float(np.mean(coefficients)), 1]
    optimum = float(np.max(np.roots(slope).real))  # the right one of two valleys, and the deeper
    same = np.ones(len(coefficients))
    return Track(
        name,
        _one_each(c=coefficients, noise=noise * same, optimum=optimum * same),
        _quartic_loss,
        lambda seed: {"x": np.float32(start(seed))},
        {"gap": Measure(_quartic_gap, max(1, options["rounds"] // 10)), "distance": Measure(_quartic_distance)},
        work=fc.extend.LocalWork(batch_size=1, steps=8, shuffle=False),
        **options,
    )


def quartic(heterogeneity: float, noise: float = 1.0, start: float = 1.0) -> Track:
    """Two clients whose quartics differ in ``H x^2`` against ``-2 H x^2``.

    Source: Crawshaw, Bao and Liu (2023), "EPISODE", the synthetic problem of its experiments.
    """
    return _quartics(
        f"quartic, H={heterogeneity:g}",
        (heterogeneity, -2 * heterogeneity),
        noise,
        lambda seed: start,
        ranges=_ranges((1e-5, 0.1), (0.1, 100.0)),
        rounds=500,
        cohort_size=2,
    )


def quartic_far(heterogeneity: float = 4.0) -> Track:
    """The same from 50 to 100 in place of 1: curvature grows with the square of x, so that plain steps must be tiny."""
    return dataclasses.replace(
        quartic(heterogeneity),
        name="quartic_far",
        start=lambda seed: {"x": np.float32(np.random.default_rng(seed).uniform(50, 100))},
        ranges=_ranges((1e-6, 0.1), (1.0, 1e4)),
    )


def client_sampling(heterogeneity: float = 4.0, rounds: int = 1000) -> Track:
    """Eight quartics, two of them drawn in each round; no other noise."""
    return _quartics(
        "client_sampling",
        -heterogeneity * np.linspace(-1, 2, 8),
        0.0,
        lambda seed: 1.0,
        ranges=_ranges((1e-5, 0.05), (0.1, 100.0)),
        rounds=rounds,
        cohort_size=2,
    )


def three_numbers(numbers: Sequence[float] = (3.0, -3.0, -3.0), rounds: int = 1500) -> Track:
    """``f_i(x) = (x - a_i)^2 / 2`` from anywhere between -3 and 3: what is left in the end is the clip's bias."""
    optimum = float(np.mean(numbers))
    return Track(
        "three_numbers",
        _one_each(a=numbers),
        lambda params, batch, key: 0.5 * (params["x"] - batch["a"]) ** 2,
        lambda seed: {"x": np.float32(np.random.default_rng(seed).uniform(-3, 3))},
        {"distance": Measure(lambda params, _: jnp.abs(params["x"] - optimum))},
        ranges=_ranges((3e-3, 1.0), (0.1, 30.0)),
        rounds=rounds,
        cohort_size=len(numbers),
        work=fc.extend.LocalWork(batch_size=1, steps=1, shuffle=False),
        resolution=1e-4,
    )


def heavy_tails(df: float = 1.5, rounds: int = 400) -> Track:
    """``f_i(x) = ||x - b_i||^2 / 2`` in ten dimensions, with Student-t noise of ``df`` degrees on every gradient.

    The b_i are standard normal about 5, which is the optimum in each dimension: at 0 a rule that measures gradients by
    the weights (AGC) would anneal itself. The start is 10. At df <= 2 the noise has no variance.

    Source of the noise: Bailey (1994), "Polar generation of random variates with the t-distribution". It is exact and,
    unlike ``jax.random.t``, has no rejection loop, which would be most of the program.
    """
    centres = np.random.default_rng(0).normal(size=(5, 10))

    def student(key, shape):
        u, v = jax.random.uniform(key, (2, *shape), minval=2.0**-24)  # of a smaller u the noise would be infinite
        return jnp.sqrt(df * (u ** (-2 / df) - 1)) * jnp.cos(2 * jnp.pi * v)

    def loss(params, batch, key):
        x, b = params["x"], batch["b"]
        push = jnp.zeros_like(b) if key is None else student(key, b.shape)
        return 0.5 * jnp.sum((x - b) ** 2, axis=-1) + push @ x

    return Track(
        "heavy_tails",
        _one_each(b=5 + centres - centres.mean(0)),
        loss,
        lambda seed: {"x": np.full(10, 10, np.float32)},
        {"squared distance": Measure(lambda params, _: jnp.sum((params["x"] - 5) ** 2), rounds // 4)},
        ranges=_ranges((3e-4, 0.3), (0.03, 100.0)),
        rounds=rounds,
        cohort_size=5,
        work=fc.extend.LocalWork(batch_size=1, steps=10, shuffle=False),
    )


def digits() -> Track:
    """Handwritten digits by the form on which they were written: 10 forms train, 4 others are measured on.

    Knobs are chosen on five folds of the ten: 8 forms train, 2 are judged.
    """
    everybody = fc.data.sources.digits()
    train, held_out = everybody.split_clients(4 / everybody.num_clients)
    model = models.MLP((128,), 10)
    return _classified(
        "digits",
        train,
        dict(held_out.examples),
        model,
        folds=5,
        rounds=100,
        cohort_size=6,
        work=fc.extend.LocalWork(batch_size=20, steps=6),
    )


def fashion_mnist() -> Track:
    """6000 pictures of Fashion-MNIST dealt to 50 clients of skewed labels, measured on 2000 pictures of the test split.

    Knobs are chosen on five folds of the fifty: 40 clients train, 10 are judged.
    """
    examples = {k: x[:6000] for k, x in fc.data.sources.fashion_mnist("train").items()}
    test = {k: x[:2000] for k, x in fc.data.sources.fashion_mnist("test").items()}
    data = fc.data.partition.dirichlet(examples, num_clients=50, alpha=0.1, seed=0)
    return _classified(
        "fashion_mnist",
        data,
        test,
        models.MLP((32,), 10),
        folds=5,
        rounds=60,
        cohort_size=10,
        work=fc.extend.LocalWork(batch_size=20, steps=5),
    )


def _classified(name: str, train: fc.FederatedData, test: Mapping[str, Any], model: Any, folds: int, **options: Any):
    """A track of classification: knobs are chosen on folds of the training clients, ``test`` is for measuring."""
    loss = tasks.classifier(model)

    def accuracy(params, judged):
        return jnp.average(loss(params, judged, None)[1]["accuracy"], weights=judged["weight"])

    found = []
    for fold in fc.data.folds.clients(train, folds):
        clients, others = (np.unique(np.searchsorted(train.offsets, i, side="right") - 1) for i in fold)
        assert len(clients) + len(others) == train.num_clients
        found.append((clients, {k: x[fold.held_out] for k, x in train.examples.items()}))
    most = max(len(judged["y"]) for judged in [test, *(judged for _, judged in found)])

    def padded(judged):
        rows = np.arange(most)
        weight = (rows < len(judged["y"])).astype(np.float32)
        return {k: x[np.where(weight > 0, rows, 0)] for k, x in judged.items()} | {"weight": weight}

    shape = (1, *train.examples["x"].shape[1:])
    return Track(
        name,
        train,
        loss,
        lambda seed: model.init(seeded(seed), jnp.zeros(shape)),
        {"accuracy": Measure(accuracy, window=10)},
        ranges=_ranges((0.01, 3.0), (0.03, 30.0)),
        accuracy=True,
        tuning=tuple(Run(1000 + i, clients, padded(judged)) for i, (clients, judged) in enumerate(found)),
        measuring=tuple(Run(seed, None, padded(test)) for seed in range(10)),
        trials=32,
        **options,
    )


TRACKS: dict[str, Callable[[], list[Track]]] = {
    "quartic": lambda: [quartic(1.0), quartic(4.0)],
    "quartic_far": lambda: [quartic_far()],
    "three_numbers": lambda: [three_numbers()],
    "heavy_tails": lambda: [heavy_tails()],
    "client_sampling": lambda: [client_sampling()],
    "digits": lambda: [digits()],
    "fashion_mnist": lambda: [fashion_mnist()],
}


def build(names: Sequence[str] | None, registry: Mapping[str, Callable[[], list[Track]]]) -> list[Track]:
    """The tracks of these names; of ``None`` all that can be had, and a line for each other one says what it lacks."""
    if names is not None:
        return [t for name in dict.fromkeys(names) for t in registry[name]()]
    tracks = []
    for name, build in registry.items():
        try:
            tracks += build()
        except InvalidInput as error:
            print(f"Without the track {name}: {error}", file=sys.stderr)
    return tracks
