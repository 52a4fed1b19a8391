"""How near a round comes to what the machine allows, and what it costs besides.

  python benchmarks/limit.py [--only=machine,share,dispatch,waste,population,width,memory] [--devices=2] [--laps=5]

  machine     what the machine's own rates of arithmetic and memory traffic would allow a round of M and C
  share       a round of task M or L against the same local steps in a bare loop, with no federation around them
  dispatch    task L by the number of rounds in a dispatch, against the same arithmetic by hand
  waste       steps that train nobody, and shapes (so compilations), on log-normal clients
  population  a round of 50 clients from a population of a thousand and of a million
  width       task M by the number of clients that a device trains at once
  memory      peak memory by the size of the cohort

Tasks are those of ``peers/tasks.py``. Times are medians of laps that alternate between the sides of a comparison.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parent / "peers"))
import tasks
from workers.fedjax_clip import loss, to_model
from workers.jax_model import per_example_loss

import fedjax_clip as fc
from fedjax_clip.data.planning import wasted_steps
from fedjax_clip.training import planner


def alternating(sides: dict[str, Callable[[], float]], laps: int) -> dict[str, float]:
    """Median seconds of each side, measured in turn; the first lap, which compiles, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for lap in range(laps + 1):
        for name, side in sides.items():
            took = side()
            if lap:
                seconds[name].append(took)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def print_table(title: str, seconds: dict[str, float]) -> None:
    """Milliseconds, and ratios to the first."""
    least = next(iter(seconds.values()))
    for name, s in seconds.items():
        print(f"{title}  {name:<46} {1e3 * s:9.3f} ms   {s / least:.2f}", flush=True)


def library(task: tasks.Task, rounds: int = 12, conv=None, **options) -> Callable[[], float]:
    """Median seconds of a round of ``fc.train`` on a task."""
    data = fc.FederatedData({"x": task.x, "y": task.y}, task.offsets)
    tx = optax.chain(fc.clipping.clip_by_global_norm(task.clip), optax.sgd(task.lr))
    algorithm = fc.fedavg(loss(task, conv), tx)
    sampler = fc.data.sampling.Sampler(lambda sizes, seed, round: task.cohort(round))

    def run() -> float:
        result = fc.train(
            algorithm,
            data,
            to_model(task),
            rounds=rounds,
            sampler=sampler,
            batch_size=task.batch,
            shuffle=False,
            **options,
        )
        return float(np.median([row["seconds"] for row in result.history[rounds // 4 :]]))

    return run


def bare_loop(task: tasks.Task, devices: list[jax.Device]) -> Callable[[], float]:
    """Seconds of the same number of clipped SGD steps on the same batches, one after the other on each device."""
    rows = int(np.sum(-(-task.sizes[task.cohort(0)] // task.batch))) // len(devices)
    examples = np.arange(rows * len(devices) * task.batch) % len(task.x)
    shape = (len(devices), rows, task.batch)
    x, y = (a[examples].reshape(*shape, *a.shape[1:]) for a in (task.x, task.y))
    tx = optax.chain(fc.clipping.clip_by_global_norm(task.clip), optax.sgd(task.lr))
    per_example = loss(task)

    def train(params, x, y):
        def step(i, carry):
            params, state = carry
            batch = {"x": x[i], "y": y[i]}
            grads = jax.grad(lambda p: jnp.mean(per_example(p, batch, None)))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, rows, step, (params, tx.init(params)))[0]

    compiled = jax.pmap(train, axis_name=fc.extend.placement.AXIS, devices=devices)
    x, y = fc.extend.placement.split((x, y), devices)
    params = fc.extend.placement.replicate(to_model(task), devices)

    def run() -> float:
        times = []
        for _ in range(8):
            began = time.perf_counter()
            jax.block_until_ready(compiled(params, x, y))
            times.append(time.perf_counter() - began)
        return float(np.median(times))

    return run


def share(arguments: argparse.Namespace) -> None:
    """Task M against its bare loop, on one device and on all."""
    task = tasks.build("M")
    sides = {}
    for count in sorted({1, arguments.devices}):
        devices = jax.local_devices()[:count]
        sides |= {
            f"bare loop, {count} device(s)": bare_loop(task, devices),
            f"round, {count} device(s)": library(task, devices=devices),
            f"round, {count} device(s), 10 a dispatch": library(task, 20, devices=devices, rounds_per_dispatch=10),
        }
    seconds = alternating(sides, arguments.laps)
    for count in sorted({1, arguments.devices}):
        bare = seconds[f"bare loop, {count} device(s)"]
        for name, s in seconds.items():
            if f", {count} device" in name:
                print(f"share       M  {name:<36} {1e3 * s:8.2f} ms   {bare / s:5.0%} of the bare loop's speed")


def machine(arguments: argparse.Namespace) -> None:
    """What a round of M and C would take if the machine did nothing but its arithmetic, or its memory traffic.

    Arithmetic: three products a layer (two for the first), at the rate of a 1024 x 1024 product. Traffic: six passes
    over the parameters a local step (read in the forward pass; gradient written, read for its norm and read for the
    update; parameters read and written), at the rate of an update of arrays of that size.
    """
    devices = jax.local_devices()[: arguments.devices]

    def rate(work: Callable, x: np.ndarray, amount: float, turns: int = 20) -> float:
        """Amount a second, all devices together."""
        loop = jax.pmap(lambda x: jax.lax.fori_loop(0, turns, lambda i, x: work(x), x), devices=devices)
        held = jax.block_until_ready(loop(np.broadcast_to(x, (len(devices), *x.shape))))
        times = []
        for _ in range(9):
            began = time.perf_counter()
            jax.block_until_ready(loop(held))
            times.append(time.perf_counter() - began)
        return len(devices) * turns * amount / float(np.median(times))

    flops = rate(lambda x: x @ x * 1e-3, np.full((1024, 1024), 1e-3, np.float32), 2 * 1024**3)
    print(f"machine        products {flops / 1e9:.0f} GFLOP/s")
    layers = {"M": (2 * 784 * 200 + 3 * 200 * 200 + 3 * 200 * 10) * 2, "C": 72e6 - 2 * 26 * 26 * 9 * 32}
    for name, per_example in layers.items():
        task = tasks.build(name)
        count = sum(x.size for x in task.params.values())
        passes = rate(lambda x: x * 0.999 + 1e-3, np.ones(count, np.float32), 8 * count)
        sizes = task.sizes[task.cohort(0)]
        arithmetic = per_example * sizes.sum() / flops
        traffic = 6 * 4 * count * np.sum(-(-sizes // task.batch)) / passes
        print(
            f"machine     {name}  arithmetic {1e3 * arithmetic:.1f} ms, traffic {1e3 * traffic:.1f} ms a round "
            f"(arrays of {4 * count / 2**20:.1f} MiB at {passes / 1e9:.0f} GB/s)"
        )


def dispatch(arguments: argparse.Namespace) -> None:
    """Task L on one device, by rounds in a dispatch."""
    task, device = tasks.build("L"), jax.local_devices()[:1]
    sides = {"by hand, 100 rounds in a loop": by_hand(task)}
    sides |= {f"{n} a dispatch": library(task, 400, devices=device, rounds_per_dispatch=n) for n in (1, 10, 100)}
    seconds = alternating(sides, arguments.laps)
    bare = seconds["by hand, 100 rounds in a loop"]
    for name, s in seconds.items():
        print(f"dispatch    L  {name:<36} {1e6 * s:8.0f} us   {1e6 * (s - bare):+.0f} us a round")


def by_hand(task: tasks.Task) -> Callable[[], float]:
    """Seconds of a round of task L's arithmetic alone, 100 in a loop: clients, steps, clip, mean."""
    numbers = np.stack([task.offsets[task.cohort(r)][:, None] + np.arange(10) for r in range(100)]).astype(np.int32)

    @jax.jit
    def rounds(w, b, x, y, numbers):
        def round(r, carry):
            def client(c, total):
                def step(i, wb):
                    n = numbers[r, c, i]
                    error = 2 * (wb[0] * x[n] + wb[1] - y[n])
                    gw, gb = error * x[n], error
                    scale = task.lr * jnp.minimum(1.0, task.clip / jnp.sqrt(gw * gw + gb * gb))
                    return wb[0] - scale * gw, wb[1] - scale * gb

                w1, b1 = jax.lax.fori_loop(0, 10, step, carry)
                return total[0] + w1, total[1] + b1

            w, b = jax.lax.fori_loop(0, numbers.shape[1], client, (jnp.float32(0), jnp.float32(0)))
            return w / numbers.shape[1], b / numbers.shape[1]

        return jax.lax.fori_loop(0, len(numbers), round, (w, b))

    data = jax.device_put((task.x[:, 0], task.y, numbers), jax.local_devices()[0])

    def run() -> float:
        times = []
        for _ in range(4):
            began = time.perf_counter()
            jax.block_until_ready(rounds(np.float32(0), np.float32(0), *data))
            times.append((time.perf_counter() - began) / len(numbers))
        return float(np.median(times))

    return run


def waste(arguments: argparse.Namespace) -> None:
    """Task MR's population, cohorts of 50, planned for all devices."""
    task = tasks.build("MR")
    data = fc.FederatedData({"x": task.x[:, :1]}, task.offsets)
    sampler, wasted, shapes = fc.data.sampling.uniform(50), [], set()
    for r in range(200):
        ids = sampler.sample(data.sizes, 0, r)
        options = {"seed": 0, "round": r, "num_devices": arguments.devices, "population": data.examples}
        plan = fc.extend.plan(data, ids, fc.extend.LocalWork(task.batch), **options)
        wasted.append(wasted_steps(plan))
        shapes.add((plan.ids.shape, plan.batches.shape))
    print(
        f"waste       MR {arguments.devices} devices, 200 rounds: {np.mean(wasted):.2%} of steps, {len(shapes)} shapes"
    )


def population(arguments: argparse.Namespace) -> None:
    """50 clients of 20 examples with 64 features, sampled from memory-mapped populations and packed for each round."""
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        for clients in (1_000, 1_000_000):
            x = np.memmap(f"{folder}/{clients}", np.uint8, "w+", shape=(20 * clients, 64))
            for part in np.split(x, 10):
                part[:] = np.frombuffer(np.random.default_rng(0).bytes(part.size), np.uint8).reshape(part.shape)
            examples = {"x": x, "y": (np.arange(20 * clients) % 10).astype(np.int32)}
            data = fc.FederatedData(examples, np.arange(0, 20 * clients + 1, 20))
            sides[f"{clients:,} clients"] = sampled(data)
        resident, planner.RESIDENT_BYTES = planner.RESIDENT_BYTES, 0
        seconds = alternating(sides, arguments.laps)
        planner.RESIDENT_BYTES = resident
    print_table("population  ", seconds)


def sampled(data: fc.FederatedData) -> Callable[[], float]:
    """Median seconds of a round of an MLP 64-200-200-10 with 50 clients drawn from ``data``."""
    shapes = [(64, 200), (200, 200), (200, 10)]
    params = {f"w{i}": np.full(shape, 0.01, np.float32) for i, shape in enumerate(shapes)}
    params |= {f"b{i}": np.zeros(shape[1], np.float32) for i, shape in enumerate(shapes)}
    tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))
    algorithm = fc.fedavg(lambda p, batch, key: per_example_loss("M", p, batch["x"] / 255, batch["y"]), tx)

    def run() -> float:
        result = fc.train(algorithm, data, params, rounds=60, cohort_size=50, batch_size=20)
        return float(np.median([row["seconds"] for row in result.history[10:]]))

    return run


def width(arguments: argparse.Namespace) -> None:
    """Task M by clients at once."""
    task = tasks.build("M")
    sides = {f"{w} at once": library(task, clients_per_chunk=w) for w in (1, 2, 5, 25)}
    print_table("width       M", alternating(sides, arguments.laps))


def memory(arguments: argparse.Namespace) -> None:
    """See memory.py."""
    script, peaks = pathlib.Path(__file__).with_name("memory.py"), {}
    for cohort in (20, 200, 2_000, 20_000):
        out = subprocess.run([sys.executable, script, str(cohort)], check=True, capture_output=True, text=True).stdout
        peaks[cohort] = float(out)
        print(f"memory         cohort of {cohort:<26,} {peaks[cohort]:8.0f} MiB  {peaks[cohort] / peaks[20]:.2f}")


PARTS = {f.__name__: f for f in (machine, share, dispatch, waste, population, width, memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, joined by commas")
    parser.add_argument("--devices", type=int, default=2, help="XLA host devices")
    parser.add_argument("--laps", type=int, default=5)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    print(f"JAX {jax.__version__}, {arguments.devices} {jax.local_devices()[0].device_kind} device(s)")
    for name in arguments.only.split(","):
        PARTS[name](arguments)


if __name__ == "__main__":
    main()
