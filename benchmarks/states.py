"""SCAFFOLD on a million clients: its states on disk, killed at random moments, and beside states in memory.

  python benchmarks/states.py              1,000,000 clients x 10,000 parameters, which are 37 GiB of states
  python benchmarks/states.py --kills=20   and the run again, killed by SIGKILL 20 times
  python benchmarks/states.py --laps=5     and 20,000 clients, with the states on disk and in memory in turns

Each client has two examples, whose features are drawn in the loss. Peak memory is that of the training process. The
hash is over the parameters, the server's state and the states of all clients that took part.
"""

import argparse
import hashlib
import json
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import optax
from memory import peak_kib

import fedjax_clip as fc
from fedjax_clip.training import states

EVERY = 20  # rounds between checkpoints


def work(clients: int, size: int, cohort: int, rounds: int, directory: str, on_disk: bool) -> None:
    """One training; prints what it took in JSON."""
    if on_disk:
        states.MEMORY_BYTES = 0
    data = fc.FederatedData({"number": np.arange(2 * clients, dtype=np.int32)}, np.arange(0, 2 * clients + 1, 2))

    def loss(params, batch, key):
        def features(number):
            return jax.random.normal(jax.random.key(number), (size,))

        x = jax.vmap(features)(batch["number"])
        return 0.5 * (x @ params["w"] - x[:, 0]) ** 2 / size

    sampler, ends = fc.data.sampling.uniform(cohort), [time.perf_counter()]

    def on_round(row):
        ends.append(time.perf_counter())
        print(end=".", file=sys.stderr, flush=True)

    result = fc.train(
        *(fc.scaffold(loss, optax.sgd(0.1)), data, {"w": np.zeros(size, np.float32)}),
        rounds=rounds,
        sampler=sampler,
        batch_size=1,
        checkpoints=directory,
        checkpoint_every=EVERY,
        on_round=on_round,
    )
    found, kept = hashlib.sha256(), states.of(result.state.clients)
    for leaf in jax.tree.leaves(result.state.server):
        found.update(np.asarray(leaf).tobytes())
    seen = np.unique(np.concatenate([sampler.sample(data.sizes, 0, r) for r in range(rounds)]))
    for ids in np.array_split(seen, max(1, len(seen) // cohort)):
        for leaf in jax.tree.leaves(kept.gather(ids)):
            found.update(leaf.tobytes())
    seconds = np.diff(ends)
    after = np.arange(rounds - len(seconds), rounds) % EVERY == 0  # a round's row comes before its checkpoint
    print(
        json.dumps(
            {
                "round": float(np.median(seconds[~after])) if np.any(~after) else 0.0,
                "checkpoint": float(np.median(seconds[after][1:])) if np.sum(after) > 1 else 0.0,
                "peak": peak_kib() / 1024,
                "clients": len(seen),
                "hash": found.hexdigest(),
            }
        )
    )


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, "--work", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(*arguments: object) -> dict:
    told, errors = (process := start(*arguments)).communicate()
    assert process.returncode == 0, errors
    return json.loads(told)


def disk_mib(directory: pathlib.Path) -> float:
    """What the files in a directory take on disk."""
    return sum(512 * path.stat().st_blocks for path in directory.rglob("*")) / 2**20


def killed(kills: int, rng: random.Random, *arguments: object) -> dict:
    """The same training, killed at random moments and begun again until it is done."""
    for i in range(kills):
        process = start(*arguments)
        assert process.stderr is not None
        rounds = len(process.stderr.read(rng.randrange(2 * EVERY)))  # comes when so many rounds are done
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        saved = [int(p.name) for p in pathlib.Path(str(arguments[4])).glob("*") if p.name.isdigit()]
        print(f"kill {i + 1} after {rounds} rounds: checkpoints {sorted(saved)}", flush=True)
    return finished(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"clients": 10**6, "size": 10**4, "cohort": 100, "rounds": 400, "kills": 0, "laps": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        *counts, directory, on_disk = asked.work
        work(*map(int, counts), directory=directory, on_disk=on_disk == "True")
        return
    shape = asked.clients, asked.size, asked.cohort, asked.rounds
    with tempfile.TemporaryDirectory() as root:
        began, directory = time.perf_counter(), pathlib.Path(root) / "undisturbed"
        whole = finished(*shape, directory, True)
        took = time.perf_counter() - began
        print(
            f"{asked.clients:,} clients x {asked.size:,}, {asked.rounds} rounds of {asked.cohort}: {took:.0f} s, "
            f"{1000 * whole['round']:.1f} ms a round, {1000 * whole['checkpoint']:.0f} ms a round with a checkpoint, "
            f"peak {whole['peak']:.0f} MiB, {disk_mib(directory):.0f} MiB on disk for {whole['clients']:,} clients",
            flush=True,
        )
        if asked.kills:
            again = killed(asked.kills, random.Random(0), *shape, pathlib.Path(root) / "killed", True)
            print(f"after {asked.kills} kills: {'the same bits' if again['hash'] == whole['hash'] else 'DIFFERENT'}")
            assert again["hash"] == whole["hash"]
        laps: dict[bool, list[dict]] = {True: [], False: []}
        for lap in range(2 * asked.laps):
            on_disk, path = lap % 2 == 0, pathlib.Path(root) / str(lap)
            laps[on_disk].append(finished(min(asked.clients, 20_000), *shape[1:], path, on_disk))
            laps[on_disk][-1]["disk"] = disk_mib(path)
            assert laps[on_disk][-1]["hash"] == laps[True][0]["hash"]
        for name in ("round", "checkpoint", "peak", "disk") if asked.laps else ():
            disk, memory = (statistics.median(lap[name] for lap in laps[where]) for where in (True, False))
            print(f"{name}: {disk:.4g} with states on disk, {memory:.4g} in memory: {disk / memory:.2f} times")


if __name__ == "__main__":
    main()
