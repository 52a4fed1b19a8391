"""ClipBench's problems."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_clip as fc
from fedjax_clip import models, tasks
from fedjax_clip.keys import seeded
from fedjax_clip.typing import Params, PerExampleLoss


@dataclasses.dataclass(frozen=True)
class Measure:
    """``mean of of(params, examples) over the last window rounds``, after each round's step."""

    of: Callable[[Params, Any], Any]
    window: int = 1


@dataclasses.dataclass(frozen=True)
class Track:
    """A problem on which rules are compared.

    Attributes:
      name: as the report has it.
      data, loss: the clients and what they minimise.
      start: ``seed -> params``.
      measures: what is measured, by name; rules are ranked by the first.
      thresholds: the grid, for rules that have none of their own.
      client_lr, rounds, cohort_size, work: of the training.
      accuracy: whether more is better.
      median: whether the middle one of the seeds counts, not their mean.
      random: whether seeds differ at all.
      fewest_seeds: with fewer, intervals would say nothing.
      resolution: errors below it are none.
      sampler: ``cohort_size -> sampler``.
      width: how many clients train side by side; all of them by default.
    """

    name: str
    data: fc.FederatedData
    loss: PerExampleLoss
    start: Callable[[int], Params]
    measures: Mapping[str, Measure]
    thresholds: Sequence[float]
    client_lr: float
    rounds: int
    cohort_size: int
    work: fc.LocalWork
    accuracy: bool = False
    median: bool = False
    random: bool = True
    fewest_seeds: int = 1
    resolution: float = 1e-6
    sampler: Callable[[int], fc.sampling.Sampler] = fc.sampling.uniform
    width: int | None = None

    def quick(self) -> "Track":
        """The same on few rounds."""
        rounds = min(self.rounds, 40)
        measures = {k: Measure(m.of, min(m.window, rounds // 4)) for k, m in self.measures.items()}
        return dataclasses.replace(self, rounds=rounds, measures=measures, fewest_seeds=1)


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


def _quartics(name: str, coefficients: Any, noise: float, start: float, window: int, **options: Any) -> Track:
    """``f_i(x) = x^4 - 3 x^3 + c_i x^2 + x``, and noise ~ U(-noise, noise) on every gradient."""
    slope = [4, -9, 2 * float(np.mean(coefficients)), 1]
    optimum = float(np.max(np.roots(slope).real))  # the right one of two valleys, and the deeper
    same = np.ones(len(coefficients))
    return Track(
        name,
        _one_each(c=coefficients, noise=noise * same, optimum=optimum * same),
        _quartic_loss,
        lambda seed: {"x": np.float32(start)},
        {"gap": Measure(_quartic_gap, window), "distance": Measure(_quartic_distance)},
        thresholds=(0.625, 1.25, 2.5, 5.0, 10.0, 20.0, 40.0),
        **options,
    )


def quartic(heterogeneity: float, noise: float = 1.0, start: float = 1.0) -> Track:
    """Two clients whose quartics differ in ``H x^2`` against ``-2 H x^2``.

    Source: Crawshaw, Bao and Liu (2023), "EPISODE", the synthetic problem of its experiments.
    """
    work = fc.LocalWork(batch_size=1, steps=8, shuffle=False)
    coefficients = (heterogeneity, -2 * heterogeneity)
    options = {
        "client_lr": 0.01,
        "rounds": 500,
        "cohort_size": 2,
        "work": work,
        "random": noise > 0,
        "fewest_seeds": 10,
    }
    return _quartics(f"quartic, H={heterogeneity:g}", coefficients, noise, start, window=50, **options)


def client_sampling(heterogeneity: float = 4.0, client_lr: float = 0.002, rounds: int = 1000) -> Track:
    """Eight quartics, two of them drawn in each round; no other noise."""
    work = fc.LocalWork(batch_size=1, steps=8, shuffle=False)
    coefficients = -heterogeneity * np.linspace(-1, 2, 8)
    options: dict[str, Any] = {
        "client_lr": client_lr,
        "rounds": rounds,
        "cohort_size": 2,
        "work": work,
        "fewest_seeds": 10,
    }
    return _quartics("client_sampling", coefficients, 0.0, 1.0, window=rounds // 4, **options)


def three_numbers(numbers: Sequence[float] = (3.0, -3.0, -3.0), client_lr: float = 0.05, rounds: int = 1500) -> Track:
    """``f_i(x) = (x - a_i)^2 / 2`` from 0: all that is left in the end is the clip's bias."""
    optimum = float(np.mean(numbers))
    return Track(
        "three_numbers",
        _one_each(a=numbers),
        lambda params, batch, key: 0.5 * (params["x"] - batch["a"]) ** 2,
        lambda seed: {"x": np.float32(0)},
        {"distance": Measure(lambda params, _: jnp.abs(params["x"] - optimum))},
        thresholds=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
        client_lr=client_lr,
        rounds=rounds,
        cohort_size=len(numbers),
        work=fc.LocalWork(batch_size=1, steps=1, shuffle=False),
        random=False,
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
        u, v = jax.random.uniform(key, (2, *shape), minval=jnp.finfo(jnp.float32).tiny)
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
        thresholds=(0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2),
        client_lr=0.05,
        rounds=rounds,
        cohort_size=5,
        work=fc.LocalWork(batch_size=1, steps=10, shuffle=False),
        median=True,
        fewest_seeds=6,  # the extremes of six are a 97% interval of their median
    )


def digits() -> Track:
    """Handwritten digits by the form on which they were written; accuracy on forms that never train."""
    task = tasks.digits()
    held_out = task.evaluation["clients"].examples

    def accuracy(params, examples):
        return jnp.mean(task.per_example_loss(params, held_out, None)[1]["accuracy"])

    return Track(
        "digits",
        task.data,
        task.per_example_loss,
        lambda seed: task.init(seeded(seed)),
        {"accuracy": Measure(accuracy, window=10)},
        thresholds=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        client_lr=0.1,
        rounds=100,
        cohort_size=8,
        work=fc.LocalWork(batch_size=20),
        accuracy=True,
        fewest_seeds=5,
    )


def fashion_mnist() -> Track:
    """6000 pictures of Fashion-MNIST dealt to 50 clients of skewed labels; accuracy on 2000 test pictures."""
    examples = {k: x[:6000] for k, x in fc.sources.fashion_mnist("train").items()}
    test = {k: x[:2000] for k, x in fc.sources.fashion_mnist("test").items()}
    model = models.MLP((32,), 10)
    loss = tasks.classifier(model)
    return Track(
        "fashion_mnist",
        fc.partition.dirichlet(examples, num_clients=50, alpha=0.1, seed=0),
        loss,
        lambda seed: model.init(seeded(seed), jnp.zeros((1, 28, 28, 1))),
        {"accuracy": Measure(lambda params, _: jnp.mean(loss(params, test, None)[1]["accuracy"]), window=10)},
        thresholds=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        client_lr=0.1,
        rounds=60,
        cohort_size=10,
        work=fc.LocalWork(batch_size=20, steps=5),
        accuracy=True,
        fewest_seeds=5,
    )


TRACKS: dict[str, Callable[[], list[Track]]] = {
    "quartic": lambda: [quartic(1.0), quartic(4.0)],
    "three_numbers": lambda: [three_numbers()],
    "heavy_tails": lambda: [heavy_tails()],
    "client_sampling": lambda: [client_sampling()],
    "digits": lambda: [digits()],
    "fashion_mnist": lambda: [fashion_mnist()],
}
