"""What secure sums cost: accuracy, difference to the clipped mean, bytes and seconds; and the protocol by itself.

  python benchmarks/secure.py [--rounds=100] [--only=training,protocol,sparse]

Training is the digits default (9,610 parameters, cohorts of 8 of 11 clients) on one device, all with the same cohorts,
batches and clip; three seeds. The table has the mean accuracy on held-out examples; the largest difference of a
parameter to that of the clipped mean after one round; what a client sends in a round; and the processor's seconds of a
round, all threads together, without its compilation. The protocol is timed on 16-bit messages of 100,000 elements, and
on a sparse graph beside the full one: for a tenth of the clients that may work for the server and a tenth silent.
"""

import argparse
import time

import jax
import numpy as np
import optax

import fedjax_clip as fc
from fedjax_clip import uplink

COHORT, BOUND = 8, 0.5
CLIP = uplink.clip_by_global_norm(BOUND)


def variants() -> dict[str, tuple[fc.uplink.Uplink, fc.reduce.Reducer]]:
    """By name, what crosses the wire and how it is added."""
    plain, threshold = fc.reduce.modular_sum(COHORT), fc.reduce.modular_sum(COHORT, COHORT)
    masked = fc.secure.pairwise_masks(COHORT)

    def on_grid(link: fc.uplink.Uplink) -> fc.uplink.Uplink:
        return uplink.chain(CLIP, link)

    return {
        "clipped mean, float32": (CLIP, fc.reduce.fixed_mean(COHORT)),
        "grid of 32 bits": (on_grid(uplink.integer_grid(32)), plain),
        "grid of 16 bits": (on_grid(uplink.integer_grid(16)), plain),
        "grid of 16 bits, pairwise masks": (on_grid(uplink.integer_grid(16)), masked),
        "grid of 8 bits": (on_grid(uplink.integer_grid(8)), plain),
        "grid of 8 bits, rotated": (on_grid(uplink.integer_grid(8, rotate=True)), plain),
        "CKKS": (CLIP, fc.secure.ckks_mean(COHORT)),
        "Gaussian, z = 0.1": (on_grid(uplink.gaussian(0.1)), fc.reduce.fixed_mean(COHORT)),
        "discrete Gaussian, z = 0.1, 16 bits": (on_grid(uplink.discrete_gaussian(0.1, 16)), threshold),
        "Skellam, z = 0.1, 16 bits": (on_grid(uplink.skellam(0.1, 16)), threshold),
    }


def sent(name: str, row: dict[str, float], size: int) -> float:
    """Bytes that a client sends in a round, with what only the host sees."""
    if name == "CKKS":
        return sum(map(len, fc.secure.Ckks(COHORT).encrypt(np.zeros(size, np.float32))))
    if "masks" in name:
        return fc.secure.aggregate(np.zeros((COHORT, size), np.uint16), 6)[1].bytes_up(0)
    return row["bytes_up"] / row["clients"]


def training(rounds: int) -> None:
    """The table of trainings."""
    task = fc.tasks.digits()
    client_tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))
    evaluate = fc.evaluator(task.per_example_loss, {"examples": task.evaluation["examples"]})
    params = task.init(jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(params))
    first = None
    print(f"| {size:,} parameters, {rounds} rounds | accuracy | difference | bytes up | CPU s a round |")
    print("|---|---|---|---|---|")
    for name, (link, reducer) in variants().items():
        algorithm = fc.fedavg(task.per_example_loss, client_tx, uplink=link, reducer=reducer)

        def train(rounds: int, seed: int = 0, algorithm: fc.extend.Algorithm = algorithm) -> fc.Result:
            options = {"cohort_size": COHORT, "clients_per_chunk": 1, "devices": jax.local_devices()[:1]}
            return fc.train(algorithm, task.data, params, rounds=rounds, seed=seed, rounds_per_dispatch=1, **options)

        one = np.concatenate([np.ravel(x) for x in jax.tree.leaves(train(1).params)])
        first = one if first is None else first
        began = time.process_time()
        results = [train(rounds, seed) for seed in range(3)]
        seconds = (time.process_time() - began) / (3 * rounds)
        accuracy = np.mean([evaluate(result.params)["examples/accuracy"] for result in results])
        bytes_up = sent(name, results[0].history[-1], size)
        apart = np.abs(one - first).max()
        print(f"| {name} | {accuracy:.4f} | {apart:.1e} | {bytes_up:,.0f} | {seconds:.4f} |", flush=True)


def protocol(size: int = 100_000) -> None:
    """The table of the protocol: all parties' seconds together, in one thread."""
    print("\n| clients | threshold | silent | bytes up, of which the message | CPU s, all parties |")
    print("|---|---|---|---|---|")
    for n in (10, 30, 100):
        for silent in (0, n // 10):
            messages = np.random.default_rng(0).integers(0, 2**16, (n, size), np.uint16)
            threshold = -(-2 * n // 3)
            began = time.process_time()
            total, seen = fc.secure.aggregate(messages, threshold, np.arange(n) >= silent)
            seconds = time.process_time() - began
            assert np.array_equal(total, messages[silent:].sum(0, dtype=np.uint16))
            up, message = seen.bytes_up(n - 1), messages[0].nbytes
            print(f"| {n} | {threshold} | {silent} | {up:,} ({message / up:.0%}) | {seconds:.2f} |", flush=True)


def sparse(size: int = 10_000) -> None:
    """The table of sparse graphs."""
    print("\n| clients | neighbours, threshold | bytes up, beside the message | CPU s, all parties |")
    print("|---|---|---|---|")
    for n in (100, 200, 300):
        messages = np.random.default_rng(0).integers(0, 2**16, (n, size), np.uint16)
        for near in (None, fc.secure.neighbourhood(n, 0.1, 0.1)):
            began = time.process_time()
            total, seen = fc.secure.aggregate(messages, -(-2 * n // 3), np.arange(n) >= n // 10, neighbours=near)
            seconds = time.process_time() - began
            assert np.array_equal(total, messages[n // 10 :].sum(0, dtype=np.uint16))
            graph = "all" if near is None else f"{near.size}, {near.threshold}"
            print(f"| {n} | {graph} | {seen.bytes_up(n - 1) - messages[0].nbytes:,} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", default="training,protocol,sparse")
    arguments = parser.parse_args()
    if "training" in arguments.only:
        training(arguments.rounds)
    if "protocol" in arguments.only:
        protocol()
    if "sparse" in arguments.only:
        sparse()
