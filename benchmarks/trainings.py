"""Thirty trainings in one process: what compiles, and what stays in memory.

  python benchmarks/trainings.py [--trainings=30]

The same algorithm object on other seeds, then a new algorithm for each training. Printed are the programs that each
training compiled and the process's resident memory after it, which must stop growing.
"""

import argparse
import pathlib

import jax
import numpy as np
import optax

import fedjax_clip as fc


def loss(params, batch, key):
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]) ** 2


def resident() -> float:
    """MiB of this process in memory (Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status does not say VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=30, help="of each kind")
    count = parser.parse_args().trainings

    compiled: list[float] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 20)).astype(np.float32)
    data = fc.FederatedData({"x": x, "y": x.sum(1)}, np.arange(0, 601, 30))
    evaluate = fc.evaluator(loss, {"all": data})

    def algorithm() -> fc.extend.Algorithm:
        return fc.fedavg(loss, optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1)))

    same = algorithm()
    for title, make in (("the same algorithm", lambda: same), ("new algorithms", algorithm)):
        programs, memory = [], []
        for seed in range(count):
            compiled.clear()
            params = {"w": np.zeros(20, np.float32)}
            fc.train(make(), data, params, rounds=3, cohort_size=5, seed=seed, evaluate=evaluate)
            programs.append(len(compiled))
            memory.append(resident())
        half = memory[count // 2]
        print(f"{title}: programs {programs}")
        print(f"  MiB {memory[0]:.0f} ... {half:.0f} ... {memory[-1]:.0f}, the second half {memory[-1] - half:+.1f}")


if __name__ == "__main__":
    main()
