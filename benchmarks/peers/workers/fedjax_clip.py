"""fedjax_clip itself, through ``fc.train``: one call trains until the parameters are asked for."""

import functools

import jax
import numpy as np
import optax

import fedjax_clip as fc
from workers.jax_model import max_pool, per_example_loss
from workers.paused import Paused


class Peer:
    """Holds ``fc.train`` up between laps in its ``should_stop``, which is asked when a dispatch is done."""

    def __init__(self, task, devices, rounds_per_dispatch=1):
        jax.config.update("jax_num_cpu_devices", devices)
        self.task, self.rounds_per_dispatch = task, rounds_per_dispatch
        self.data = fc.FederatedData({"x": task.x, "y": task.y}, task.offsets)
        client_tx = optax.chain(fc.clipping.clip_by_global_norm(task.clip), optax.sgd(task.lr))
        self.algorithm = fc.fedavg(loss(task), client_tx)
        self.server = to_model(task)
        self.paused = Paused(self._train)

    def run(self, rounds):
        self.paused.run(rounds)

    def params(self):
        self.paused.stop()
        return from_model(self.task, jax.tree.map(np.asarray, self.server))

    def _train(self, first_round, after_round):
        def on_round(row):
            self.paused.count += 1

        self.server = fc.train(
            self.algorithm,
            self.data,
            self.server,
            rounds=10**6,
            sampler=fc.data.sampling.Sampler(lambda sizes, seed, round: self.task.cohort(first_round + round)),
            batch_size=self.task.batch,
            shuffle=False,
            on_round=on_round,
            should_stop=after_round,
            rounds_per_dispatch=self.rounds_per_dispatch,
        ).params


def loss(task, conv=None):
    """The task's loss in the library's form; ``conv`` is the CNN's convolution, by default the library's own."""
    if task.name not in ("C", "CP"):
        return lambda params, batch, key: per_example_loss(task.name, params, batch["x"], batch["y"])
    model = cnn(conv or (jax.lax.conv_general_dilated if task.name == "CP" else fc.models.conv_general_dilated))

    def per_example(params, batch, key):
        return optax.losses.softmax_cross_entropy_with_integer_labels(model.apply(params, batch["x"]), batch["y"])

    return per_example


def cnn(conv):
    """The CNN in Flax, with this convolution."""
    import flax.linen as nn

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = functools.partial(nn.Conv, kernel_size=(3, 3), padding="VALID", conv_general_dilated=conv)
            x = nn.relu(layer(32, name="layer0")(x))
            x = nn.relu(layer(64, name="layer1")(x))
            x = max_pool(x).reshape(x.shape[0], -1)
            x = nn.relu(nn.Dense(128, name="layer2")(x))
            return nn.Dense(62, name="layer3")(x)

    return CNN()


def to_model(task):
    """The task's initial weights as the model's parameters."""
    if task.name not in ("C", "CP"):
        return task.params
    return {"params": {f"layer{i}": {"kernel": task.params[f"w{i}"], "bias": task.params[f"b{i}"]} for i in range(4)}}


def from_model(task, params):
    """The model's parameters under the task's names."""
    if task.name not in ("C", "CP"):
        return params
    layers = params["params"]
    kernels = {f"w{i}": layers[f"layer{i}"]["kernel"] for i in range(4)}
    return kernels | {f"b{i}": layers[f"layer{i}"]["bias"] for i in range(4)}
