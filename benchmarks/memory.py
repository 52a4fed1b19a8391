"""Peak memory of a process that trains a cohort of this size, in MiB.

  python benchmarks/memory.py 20 && python benchmarks/memory.py 20000

Both processes hold the same population of 20,000 clients; only the cohort differs.
"""

import pathlib
import resource
import sys

import jax
import numpy as np
import optax

import fedjax_clip as fc

NUM_CLIENTS, EXAMPLES, FEATURES = 20_000, 8, 64


def main(cohort_size: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_CLIENTS * EXAMPLES, FEATURES)).astype(np.float32)
    y = rng.integers(10, size=len(x)).astype(np.int32)
    data = fc.FederatedData({"x": x, "y": y}, np.arange(0, len(x) + 1, EXAMPLES))

    def loss(params, batch, key):
        logits = jax.nn.relu(batch["x"] @ params["w1"]) @ params["w2"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    params = {"w1": rng.normal(size=(FEATURES, 128)).astype(np.float32) / 8, "w2": np.zeros((128, 10), np.float32)}
    algorithm = fc.fedavg(loss, optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1)))
    result = fc.train(algorithm, data, params, rounds=2, cohort_size=cohort_size, batch_size=4)
    assert result.history[-1]["clients"] == cohort_size
    print(f"{peak_kib() / 1024:.1f}")


def peak_kib() -> int:
    """Peak memory of this program; ``ru_maxrss`` would begin with its parent's."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main(int(sys.argv[1]))
