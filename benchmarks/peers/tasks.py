"""What every peer trains: arrays, initial weights and cohorts, from NumPy's seed 0 and nothing else.

Every round: each client of the cohort starts from the server's weights and passes once over its examples in the order
in which they are stored, ``batch`` at a time (a last batch that is not full stays so), with gradients of the batch's
mean loss clipped to global norm ``clip`` and SGD of rate ``lr``; the server takes the average of the clients' weights,
each weighted by its number of examples.

  M   MLP 784-200-200-10, ReLU, cross-entropy; 1000 clients of 60 examples, cohort 50, batch 20, lr 0.1, clip 1
  MR  the same with client sizes log-normal(mean 60, sigma 0.85), clipped to 1..600
  C   EMNIST's CNN: 3x3 convolutions to 32 and 64 channels (no padding), ReLU, max-pool 2, dense 128, ReLU, 62 logits;
      1000 clients of 100 examples, cohort 10, otherwise as M
  CP  C with the framework's own convolution inside the compiled loop (fedjax_clip only)
  L   linear regression in one dimension, squared error; 1000 clients of 10 examples, cohort 100, batch 1 (10 local
      steps), lr 0.01, clip 1: overhead only

Weights are named w0, b0, w1, b1, ...; dense kernels are ``[in, out]``, convolutions ``[height, width, in, out]``, and
pictures are flattened as ``[height, width, channel]``.
"""

import dataclasses

import numpy as np

NAMES = ("M", "MR", "C", "CP", "L")


@dataclasses.dataclass(frozen=True)
class Task:
    """One problem. ``cohorts`` repeat after the last: round r has ``cohorts[r % len(cohorts)]``."""

    name: str
    x: np.ndarray
    y: np.ndarray
    offsets: np.ndarray
    params: dict[str, np.ndarray]
    cohorts: list[np.ndarray]
    batch: int
    lr: float
    clip: float

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client."""
        return np.diff(self.offsets)

    def cohort(self, round: int) -> np.ndarray:
        """The clients of a round."""
        return self.cohorts[round % len(self.cohorts)]

    def client(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of a client, as views."""
        part = slice(self.offsets[number], self.offsets[number + 1])
        return self.x[part], self.y[part]


def period(name: str) -> int:
    """After how many rounds the cohorts repeat; parameters are compared after the first period.

    C's is one round, because the CNN amplifies rounding from round to round.
    """
    return {"M": 10, "MR": 10, "C": 1, "CP": 1, "L": 20}[name]


def build(name: str, tiny: bool = False) -> Task:
    """A task; ``tiny`` keeps its shape but for a small population, for tests."""
    rng = np.random.default_rng(0)
    if name == "L":
        num_clients, cohort, sizes, batch, lr = 1000, 100, np.full(1000, 10), 1, 0.01
    elif name in ("C", "CP"):
        num_clients, cohort, sizes, batch, lr = 1000, 10, np.full(1000, 100), 20, 0.1
    else:
        num_clients, cohort, sizes, batch, lr = 1000, 50, np.full(1000, 60), 20, 0.1
    if name == "MR":
        sizes = np.clip(np.round(60 * np.exp(rng.normal(-(0.85**2) / 2, 0.85, num_clients))), 1, 600).astype(int)
    if tiny:
        num_clients, cohort = 20, 4
        sizes = sizes[:num_clients]
    n = int(sizes.sum())

    if name == "L":
        x = rng.standard_normal((n, 1), dtype=np.float32)
        slopes = 1 + 0.1 * np.repeat(rng.standard_normal(num_clients), sizes)
        y = (slopes * x[:, 0] + 0.5 + 0.1 * rng.standard_normal(n)).astype(np.float32)
        params = {"w0": np.zeros((1, 1), np.float32), "b0": np.zeros(1, np.float32)}
    else:
        x = rng.standard_normal((n, 784), dtype=np.float32)
        layers = [(784, 200), (200, 200), (200, 10)]
        if name in ("C", "CP"):
            layers = [(3, 3, 1, 32), (3, 3, 32, 64), (12 * 12 * 64, 128), (128, 62)]
        y = (x @ rng.standard_normal((784, layers[-1][-1]), dtype=np.float32)).argmax(-1).astype(np.int32)
        x = x.reshape(n, 28, 28, 1) if len(layers) == 4 else x
        params = {}
        for i, shape in enumerate(layers):
            scale = np.float32(np.sqrt(2 / np.prod(shape[:-1])))
            params |= {f"w{i}": scale * rng.standard_normal(shape, dtype=np.float32)}
            params |= {f"b{i}": np.zeros(shape[-1], np.float32)}
    cohorts = [rng.choice(num_clients, cohort, replace=False) for _ in range(period(name))]
    return Task(name, x, y, np.concatenate([[0], np.cumsum(sizes)]), params, cohorts, batch, lr, 1.0)
