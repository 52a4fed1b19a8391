"""Convolutions in a loop: a training step of the EMNIST CNN, its single products, and clients under ``vmap``.

  python benchmarks/conv.py step products vmap     # or one of them
  taskset -c 0 python benchmarks/conv.py step      # one core

Every table's rows take turns within each lap, so that a drifting machine slows all alike; medians of milliseconds and,
after them, ratios to the first row. PyTorch takes part where it is installed.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import optax

from fedjax_clip.models import CNN, conv_general_dilated

BATCHES, BATCH_SIZE, STEPS, LAPS = 5, 20, 5, 9
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(BATCHES, BATCH_SIZE, 28, 28, 1)).astype(np.float32)
LABELS = RNG.integers(62, size=(BATCHES, BATCH_SIZE)).astype(np.int32)


class PlainCNN(nn.Module):
    """The same network of Flax's own layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), padding="VALID", name="Conv_0")(x))
        x = nn.relu(nn.Conv(64, (3, 3), padding="VALID", name="Conv_1")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(62, name="Dense_1")(nn.relu(nn.Dense(128, name="Dense_0")(x)))


def compare(title: str, runs: dict[str, tuple[Callable[[], object], int]]) -> None:
    """Prints the median time of each run, divided by its number of repetitions inside."""
    clock = time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run, _ in runs.values():
        run()
    for _ in range(LAPS):
        for name, (run, inside) in runs.items():
            start = clock()
            run()
            times[name].append((clock() - start) / inside * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    print(f"\n{title}\n{'':44s}{'median ms':>10s}{'min':>9s}{'ratio':>8s}")
    for name, median in medians.items():
        print(f"  {name:42s}{median:10.3f}{min(times[name]):9.3f}{median / first:8.2f}", flush=True)


def compiled(function: Callable, *args: object) -> Callable[[], object]:
    program = jax.jit(function).lower(*args).compile()
    args = jax.device_put(args)
    return lambda: jax.block_until_ready(program(*args))


def optimiser() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))


def one_step(model: nn.Module, params, x, y):
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    tx = optimiser()
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    return optax.apply_updates(params, updates)


def steps(model: nn.Module, params, x, y, number: int = STEPS):
    return jax.lax.fori_loop(0, number, lambda i, p: one_step(model, p, x[i % BATCHES], y[i % BATCHES]), params)


def torch_steps() -> tuple[Callable[[], object], int] | None:
    try:
        import torch
    except ImportError:
        return None
    from torch import nn as layers

    convolutions = (layers.Conv2d(1, 32, 3), layers.ReLU(), layers.Conv2d(32, 64, 3), layers.ReLU())
    head = (layers.Flatten(), layers.Linear(9216, 128), layers.ReLU(), layers.Linear(128, 62))
    model = layers.Sequential(*convolutions, layers.MaxPool2d(2), *head).to(memory_format=torch.channels_last)
    x, y = torch.tensor(IMAGES).permute(0, 1, 4, 2, 3).contiguous(), torch.tensor(LABELS).long()
    tx, loss = torch.optim.SGD(model.parameters(), 0.1), layers.CrossEntropyLoss()

    def run():
        for i in range(STEPS):
            tx.zero_grad()
            loss(model(x[i % BATCHES].to(memory_format=torch.channels_last)), y[i % BATCHES]).backward()
            layers.utils.clip_grad_norm_(model.parameters(), 1.0)
            tx.step()

    return run, STEPS


def step() -> None:
    ours, plain = CNN(62), PlainCNN()
    params = ours.init(jax.random.key(0), IMAGES[0])
    runs = {
        "Conv, in a loop": (compiled(functools.partial(steps, ours), params, IMAGES, LABELS), STEPS),
        "Conv, no loop": (compiled(functools.partial(one_step, ours), params, IMAGES[0], LABELS[0]), 1),
        "nn.Conv, no loop": (compiled(functools.partial(one_step, plain), params, IMAGES[0], LABELS[0]), 1),
        "nn.Conv, in a loop": (compiled(functools.partial(steps, plain, number=1), params, IMAGES, LABELS), 1),
    }
    if (torch := torch_steps()) is not None:
        runs["PyTorch, channels last"] = torch
    compare(f"One step of the EMNIST CNN, batch {BATCH_SIZE}", runs)


def clients() -> None:
    model = CNN(62)
    params = model.init(jax.random.key(0), IMAGES[0])
    runs = {}
    for width in (1, 2, 5, 10):
        x, y = (np.broadcast_to(a, (width, *a.shape)) for a in (IMAGES, LABELS))
        mapped = jax.vmap(functools.partial(steps, model), (None, 0, 0))
        runs[f"vmap over {width}"] = (compiled(mapped, params, x, y), STEPS * width)
    compare("One client's step among several under vmap", runs)


def products() -> None:
    shapes = {
        "20x26x26x32 by 3x3x32x64": ((20, 26, 26, 32), (3, 3, 32, 64), (1, 1)),
        "20x28x28x1 by 3x3x1x32": ((20, 28, 28, 1), (3, 3, 1, 32), (1, 1)),
        "20x32x32x3 by 5x5x3x64, strides 2": ((20, 32, 32, 3), (5, 5, 3, 64), (2, 2)),
        "20x16x16x32 by 3x3x32x64, strides 2": ((20, 16, 16, 32), (3, 3, 32, 64), (2, 2)),
        "20x16x16x64 by 1x1x64x64": ((20, 16, 16, 64), (1, 1, 64, 64), (1, 1)),
    }
    for shape, (x, w, strides) in shapes.items():
        x, w = (RNG.normal(size=size).astype(np.float32) for size in (x, w))
        runs = {}
        for product in ("forward", "to the input", "to the kernel"):
            for name, lowering in (("ours", "auto"), ("lax", "xla")):
                conv = functools.partial(
                    conv_general_dilated,
                    window_strides=strides,
                    padding="VALID",
                    dimension_numbers=CHANNELS_LAST,
                    lowering=lowering,
                )
                runs[f"{product}, {name}"] = looped(
                    product, conv, x, w, 1 if "kernel, lax" in f"{product}, {name}" else 3
                )
        compare(shape + ", in a loop", runs)


def looped(product: str, conv: Callable, x, w, number: int) -> tuple[Callable[[], object], int]:
    dy = RNG.normal(size=jax.eval_shape(conv, x, w).shape).astype(np.float32)

    def one(x, w, dy):
        if product == "forward":
            return conv(x, w)
        if product == "to the input":
            return jax.vjp(lambda x: conv(x, w), x)[1](dy)[0]
        return jax.vjp(lambda w: conv(x, w), w)[1](dy)[0]

    def body(i, args):  # every argument changes, or XLA would take the work out of the loop
        little = jax.lax.optimization_barrier(one(*args)).ravel()[0] * 1e-20
        return tuple(a.at[(0,) * a.ndim].add(little) for a in args)

    return compiled(lambda *args: jax.lax.fori_loop(0, number, body, args), x, w, dy), number


if __name__ == "__main__":
    tables = {"step": step, "products": products, "vmap": clients}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=tables, default=list(tables))
    for table in parser.parse_args().tables:
        tables[table]()
