"""Small generated problems whose answers are known."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fedjax_clip import models
from fedjax_clip.core import checks
from fedjax_clip.data import partition
from fedjax_clip.data.population import FederatedData
from fedjax_clip.tasks.base import Task, check_positive, classifier, make, regressor


def linear_regression(num_clients: int = 100, noise: float = 0.1, seed: int = 0) -> Task:
    """y = 2x + 1 + noise over ``num_clients`` clients of 10 examples: must end near weight 2, bias 1.

    Args:
      num_clients: M.
      noise: standard deviation of the noise on y.
      seed: of the data.

    Raises:
      InvalidInput: no clients, a negative noise.

    Example:
      >>> task = fc.tasks.linear_regression(num_clients=10)
    """
    check_positive(num_clients=num_clients)
    checks.within("noise", noise, 0, 1e30)
    rng = np.random.default_rng(checks.seed("seed", seed))
    x = rng.uniform(-1, 1, (10 * num_clients, 1)).astype(np.float32)
    y = (2 * x[:, 0] + 1 + noise * rng.normal(size=len(x))).astype(np.float32)
    return _regression({"x": x, "y": y}, num_clients, models.MLP((), 1))


def mlp_regression(num_clients: int = 20, seed: int = 0) -> Task:
    """sin(3x) on clients that each see one stretch of the axis; for Adam and 10 local epochs.

    Args:
      num_clients: M, of 40 examples each.
      seed: of the data.

    Raises:
      InvalidInput: no clients.

    Example:
      >>> task = fc.tasks.mlp_regression()
    """
    check_positive(num_clients=num_clients)
    rng = np.random.default_rng(checks.seed("seed", seed))
    centre = np.repeat(np.linspace(-0.9, 0.9, num_clients), 40)
    x = (centre + 0.1 * rng.normal(size=centre.shape))[:, None].astype(np.float32)
    y = (np.sin(3 * x[:, 0]) + 0.05 * rng.normal(size=len(x))).astype(np.float32)
    return _regression({"x": x, "y": y}, num_clients, models.MLP((32,), 1))


def relu_classifier(num_clients: int = 10, seed: int = 0) -> Task:
    """A 10-100-10 ReLU network on ten Gaussian classes in ten dimensions, with Dirichlet(1) label skew.

    Args:
      num_clients: M, of 200 examples on average.
      seed: of the data and of the split.

    Raises:
      InvalidInput: no clients.

    Example:
      >>> task = fc.tasks.relu_classifier()
    """
    check_positive(num_clients=num_clients)
    rng = np.random.default_rng(checks.seed("seed", seed))
    y = rng.integers(10, size=200 * num_clients).astype(np.int32)
    x = (2.0 * np.eye(10)[y] + 0.5 * rng.normal(size=(len(y), 10))).astype(np.float32)
    data = partition.dirichlet({"x": x, "y": y}, num_clients, alpha=1.0, seed=seed)
    train, examples = data.split_examples(0.2, seed)
    model = models.MLP((100,), 10)
    return make(train, {"examples": examples}, model, classifier(model))


def two_nodes() -> Task:
    """Distributed gradient descent on two nodes: 0.5 (w - 3)^2 and 0.5 (w + 1)^2, whose optimum is w = 1.

    Example:
      >>> task = fc.tasks.two_nodes()
    """
    data = FederatedData.from_clients(
        {name: {"x": np.zeros((1, 1), np.float32), "y": np.full(1, y, np.float32)} for name, y in (("a", 3), ("b", -1))}
    )

    def per_example_loss(params, batch, key):
        return 0.5 * (params["w"] - batch["y"]) ** 2

    return Task(data, {"examples": data}, lambda key: {"w": jnp.zeros((), jnp.float32)}, per_example_loss)


def _regression(examples: dict[str, np.ndarray], num_clients: int, model: nn.Module) -> Task:
    owner = np.repeat(np.arange(num_clients), len(examples["y"]) // num_clients)
    train, held_out = FederatedData.from_assignment(examples, owner).split_examples(0.2)
    return make(train, {"examples": held_out}, model, regressor(model))
