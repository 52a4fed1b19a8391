"""Whole experiments on an accelerator, what a round of them costs, and where the time goes.

  python benchmarks/device.py                                  # on the GPU or TPU at hand
  python benchmarks/device.py --only=emnist,cifar
  python benchmarks/device.py --tiny                           # on anything, in a minute: only to see that it runs

  emnist    EMNIST-62's CNN, 3400 clients of about 198 images, cohort 10, batch 20, 1 epoch: 1500 rounds, end to end
  cifar     pfl-research's CIFAR-10 benchmark: 1000 clients of 50 images, cohort 50, batch 10, 1 epoch: 1500 rounds
  tasks     tasks M and C of ``peers/`` against a dispatch for each local step, as in FedJAX, and PyTorch's loop
  width     task C by the number of clients trained at once
  conv      task C by the form in which its convolutions are written
  profile   the largest costs of a round of task C, by kernel

Images are random numbers of the right shape and type; only time is measured. The CNN is LEAF's without dropout
(``fc.models.CNN``); pfl-research's is the same. A share of peak is arithmetic (3 times the forward pass's
multiplications and additions) against a large matrix product measured in the same run.
"""

import argparse
import collections
import dataclasses
import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from limit import alternating, library, print_table

sys.path.insert(0, str(pathlib.Path(__file__).parent / "peers"))
import tasks
from workers.fast_conv import conv as patches
from workers.jax_model import per_example_loss

import fedjax_clip as fc
from fedjax_clip.core.convolution import conv_general_dilated

CLIENT_TX = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))


def images(sizes: np.ndarray, shape: tuple[int, ...], classes: int) -> fc.FederatedData:
    """Clients of these sizes with random images of bytes."""
    rng, n = np.random.default_rng(0), int(sizes.sum())
    examples = {"x": rng.integers(256, size=(n, *shape), dtype=np.uint8), "y": rng.integers(classes, size=n)}
    examples["y"] = examples["y"].astype(np.int32)
    return fc.FederatedData(examples, np.concatenate([[0], np.cumsum(sizes)]))


def cnn_loss(model: nn.Module) -> Callable:
    """Cross-entropy of images of bytes."""

    def loss(params, batch, key):
        logits = model.apply(params, batch["x"].astype(jnp.float32) / 255)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return loss


def cnn_flops(shape: tuple[int, ...], classes: int) -> float:
    """Of a training step, per example: forward, and twice that for the two backward products."""
    height, width, channels = shape
    forward = 9 * channels * 32 * (height - 2) * (width - 2) + 9 * 32 * 64 * (height - 4) * (width - 4)
    forward += (height - 4) // 2 * ((width - 4) // 2) * 64 * 128 + 128 * classes
    return 3 * 2 * forward


def matmul_flops(size: int) -> float:
    """Operations a second of a large matrix product, default precision."""
    x = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda x: x @ x)
    seconds = alternating({"": timed(lambda: jax.block_until_ready(product(x)))}, 5)[""]
    return 2 * size**3 / seconds


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """Seconds of a call."""

    def measured() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return measured


def end_to_end(name: str, data: fc.FederatedData, shape: tuple[int, ...], classes: int, arguments, **options) -> None:
    """All rounds from a warm compilation, and the compilation apart."""
    model = fc.models.CNN(classes, (4, 8), 16) if arguments.tiny else fc.models.CNN(classes)
    params = model.init(jax.random.key(0), np.zeros((1, *shape), np.float32))
    algorithm = fc.fedavg(cnn_loss(model), CLIENT_TX)
    rounds = 2 if arguments.tiny else 1500
    options |= {"rounds_per_dispatch": min(rounds, 50)}

    def run(rounds: int) -> float:
        return timed(lambda: fc.train(algorithm, data, params, rounds=rounds, **options))()

    first, second = (run(options["rounds_per_dispatch"]) for _ in range(2))
    total = run(rounds)
    examples = options["cohort_size"] * float(np.mean(data.sizes)) * rounds
    rate = examples * cnn_flops(shape, classes) / total
    peak = matmul_flops(256 if arguments.tiny else 8192)
    print(
        f"{name:<10} {rounds} rounds in {total:.2f} s, {1e3 * total / rounds:.2f} ms a round; compiling "
        f"{first - second:.1f} s more; {rate / 1e12:.3f} TFLOP/s, {rate / peak:.1%} of a matrix product's"
    )


def emnist(arguments: argparse.Namespace) -> None:
    """The benchmark of FedJAX and TFF: Reddi et al. (2021), with 10 clients a round."""
    mean, deviation, clients = 198, 89, 20 if arguments.tiny else 3400
    sigma = np.sqrt(np.log(1 + (deviation / mean) ** 2))
    sizes = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, clients)
    sizes = np.maximum(1, sizes / (20 if arguments.tiny else 1)).astype(int)
    data = images(sizes, (28, 28, 1), 62)
    end_to_end("EMNIST-62", data, (28, 28, 1), 62, arguments, cohort_size=10, batch_size=20)


def cifar(arguments: argparse.Namespace) -> None:
    """The benchmark of pfl-research (Granqvist et al., 2024), iid."""
    clients, cohort, size = (10, 4, 10) if arguments.tiny else (1000, 50, 50)
    data = images(np.full(clients, size), (32, 32, 3), 10)
    end_to_end("CIFAR-10", data, (32, 32, 3), 10, arguments, cohort_size=cohort, batch_size=10)


def build(name: str, tiny: bool) -> tasks.Task:
    """A task of ``peers/``; ``tiny`` leaves two clients a round, of one batch each."""
    task = tasks.build(name, tiny)
    if not tiny:
        return task
    offsets = task.batch * np.arange(len(task.offsets))
    small = {"x": task.x[: offsets[-1]], "y": task.y[: offsets[-1]], "offsets": offsets}
    return dataclasses.replace(task, cohorts=[c[:2] for c in task.cohorts], **small)


def a_dispatch_a_step(task: tasks.Task) -> Callable[[], float]:
    """Seconds of a round in which each local step of each client is a dispatch of its own."""
    tx = optax.chain(optax.clip_by_global_norm(task.clip), optax.sgd(task.lr))
    params = jax.device_put(task.params)
    clients = [jax.device_put(task.client(c)) for c in task.cohort(0)]

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda p: per_example_loss(task.name, p, x, y).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def add(total, params, weight):
        return jax.tree.map(lambda t, p: t + weight * p, total, params)

    def run() -> None:
        total = jax.tree.map(jnp.zeros_like, params)
        for x, y in clients:
            own, state = params, tx.init(params)
            for start in range(0, len(y), task.batch):
                own, state = step(own, state, x[start : start + task.batch], y[start : start + task.batch])
            total = add(total, own, np.float32(len(y)))
        jax.block_until_ready(total)

    return timed(run)


def torch_loop(task: tasks.Task) -> Callable[[], float] | None:
    """Seconds of a round of PyTorch's loop on the same device, if PyTorch is here and sees it."""
    try:
        import torch
        from workers.torch_loop import Peer
    except ImportError:
        return None
    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        return None
    peer = Peer(task, 2, "cuda" if jax.default_backend() != "cpu" else "cpu")

    def run() -> None:
        peer.run(1)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return timed(run)


def compare(arguments: argparse.Namespace) -> None:
    """One device, whole rounds."""
    for name in ("M", "C"):
        task = build(name, arguments.tiny)
        device = jax.local_devices()[:1]
        rounds = 2 if arguments.tiny else 40
        sides = {
            "fedjax_clip": library(task, rounds, devices=device),
            "fedjax_clip, 10 a dispatch": library(task, rounds, devices=device, rounds_per_dispatch=10),
            "a dispatch a step": a_dispatch_a_step(task),
        }
        if (run := torch_loop(task)) is not None:
            sides["PyTorch"] = run
        print_table(f"tasks      {name}", alternating(sides, arguments.laps))


def width(arguments: argparse.Namespace) -> None:
    """Task C, and what ``auto`` takes."""
    task, rounds = build("C", arguments.tiny), 2 if arguments.tiny else 40
    sides = {"auto": library(task, rounds)}
    widths = (2,) if arguments.tiny else (1, 2, 5, 10)
    sides |= {f"{w} at once": library(task, rounds, clients_per_chunk=w) for w in widths}
    print_table("width      C", alternating(sides, arguments.laps))


def conv(arguments: argparse.Namespace) -> None:
    """Task C, one client at a time and all at once."""
    task, rounds = build("C", arguments.tiny), 2 if arguments.tiny else 20
    forms = {
        "canonical (clients in turn)": functools.partial(conv_general_dilated, lowering="canonical"),
        "patches and matrix products": lambda x, kernel, *args, **kwargs: patches(x, kernel),
        "XLA's own (grouped under vmap)": functools.partial(conv_general_dilated, lowering="xla"),
    }
    if jax.default_backend() == "cpu":
        del forms["XLA's own (grouped under vmap)"]  # minutes a round there; benchmarks/conv.py has it
    sides = {
        f"{name}, {w} at once": library(task, rounds, conv=form, clients_per_chunk=w)
        for name, form in forms.items()
        for w in ((2,) if arguments.tiny else (1, len(task.cohort(0))))
    }
    print_table("conv       C", alternating(sides, arguments.laps))


def profile(arguments: argparse.Namespace) -> None:
    """Totals over a few rounds, by name of the operation, of the busiest plane of the profile."""
    task, rounds = build("C", arguments.tiny), 2 if arguments.tiny else 10
    run = library(task, rounds)
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        on_device = [p for p in planes if p.name.startswith("/device:")] or planes
        totals: collections.Counter[str] = collections.Counter()
        for plane in on_device:
            for line in plane.lines:
                for event in line.events:
                    if not event.name.startswith("$"):  # Python's own stack
                        totals[event.name] += event.duration_ns
    for name, ns in totals.most_common(12):
        print(f"profile    C  {name[:70]:<70} {ns / 1e6 / rounds:8.3f} ms a round")


PARTS = {"emnist": emnist, "cifar": cifar, "tasks": compare, "width": width, "conv": conv, "profile": profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, joined by commas")
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a few rounds of a few clients")
    arguments = parser.parse_args()
    arguments.laps = 1 if arguments.tiny else arguments.laps
    if unknown := set(arguments.only.split(",")) - set(PARTS):
        parser.error(f"There is no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}.")
    device = jax.local_devices()[0]
    print(f"JAX {jax.__version__}, {jax.local_device_count()} {device.device_kind} ({device.platform})")
    for name in arguments.only.split(","):
        PARTS[name](arguments)


if __name__ == "__main__":
    main()
