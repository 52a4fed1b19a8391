"""Kills a short run at random moments, resumes it, and compares with a run that nobody disturbed.

  python benchmarks/kills.py --kills=50
  python benchmarks/kills.py --kills=50 --private     under a claimed epsilon, all from one secret key

Every kill gets a run directory of its own. Most kills come a few milliseconds after a random row of metrics, where
rounds, rows and checkpoints are written; the others at any time from the start of the process.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROUNDS = 40
FLAGS = [
    *("--task=linear_regression(num_clients=20)", "--server=adam(0.05)", "--client=clip_by_global_norm(0.5)|sgd(0.1)"),
    *("--sampler=poisson", f"--rounds={ROUNDS}", "--eval_every=7", "--checkpoint_every=3"),
]
PRIVATE = ("--delta=0.01", "--uplink=clip_by_global_norm(0.5)|gaussian(2.0)", "--private_metrics=exact")
REPOSITORY = pathlib.Path(__file__).parents[1]


def start(workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.run", *FLAGS, *flags, f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def give_key(workdir: pathlib.Path, content: bytes) -> None:
    """Lays a secret key into a new run directory, so that several runs draw the same noise from it."""
    workdir.mkdir()
    with os.fdopen(os.open(workdir / "secret.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def finish(workdir: pathlib.Path, *flags: str) -> str:
    """Runs it to its end, with further ``flags``; returns what it says."""
    process = start(workdir, *flags)
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    return told


def kill(workdir: pathlib.Path, rng: random.Random, *flags: str) -> int:
    """Starts the run, kills it at a random moment; returns the rows that it had written by then."""
    process = start(workdir, *flags)
    if rng.random() < 0.8:
        rows = rng.randrange(1, ROUNDS)
        while process.poll() is None and count_rows(workdir) < rows:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
    else:
        time.sleep(rng.uniform(0, 8))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return count_rows(workdir)


def count_rows(workdir: pathlib.Path) -> int:
    try:
        return (workdir / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def outcome(workdir: pathlib.Path) -> tuple[dict[str, bytes], list[dict]]:
    """The final parameters and all rows, but for their wall-clock times."""
    with np.load(workdir / "params.npz") as arrays:
        params = {name: arrays[name].tobytes() for name in arrays.files}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return params, [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--private", action="store_true")
    arguments = parser.parse_args()
    rng, content = random.Random(arguments.seed), os.urandom(32)
    flags = PRIVATE if arguments.private else ()
    with tempfile.TemporaryDirectory() as root:
        undisturbed = pathlib.Path(root) / "undisturbed"
        if flags:
            give_key(undisturbed, content)
        finish(undisturbed, *flags)
        expected, different = outcome(undisturbed), 0
        assert [row["round"] for row in expected[1]] == list(range(1, ROUNDS + 1))
        for i in range(arguments.kills):
            workdir = pathlib.Path(root) / str(i)
            if flags:
                give_key(workdir, content)
            rows = kill(workdir, rng, *flags)
            finish(workdir, *flags)
            same = outcome(workdir) == expected and not (workdir / "secret.key").exists()
            different += not same
            print(f"kill {i + 1:>3} after {rows:>2} rows: {'the same bits' if same else 'DIFFERENT'}", flush=True)
    print(f"{arguments.kills - different} of {arguments.kills} resumed runs ended with the same bits")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
