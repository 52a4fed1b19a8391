"""Kills a short run at random moments, resumes it, and compares with a run that nobody disturbed.

  python benchmarks/kills.py --kills=50

Every kill gets a run directory of its own. Most kills come a few milliseconds after a random row of metrics, where
rounds, rows and checkpoints are written; the others at any time from the start of the process.
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROUNDS = 40
COMMAND = [
    *(sys.executable, "-m", "experiments.run", "--task=linear_regression(num_clients=20)", "--server=adam(0.05)"),
    *("--client=clip_by_global_norm(0.5)|sgd(0.1)", "--sampler=poisson", f"--rounds={ROUNDS}", "--eval_every=7"),
    "--checkpoint_every=3",
]
REPOSITORY = pathlib.Path(__file__).parents[1]


def start(workdir: pathlib.Path) -> subprocess.Popen:
    command = [*COMMAND, f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(workdir: pathlib.Path) -> None:
    process = start(workdir)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def kill(workdir: pathlib.Path, rng: random.Random, number: signal.Signals = signal.SIGKILL) -> int:
    """Starts the run, sends it a signal at a random moment; returns the rows that it had written by then."""
    process = start(workdir)
    if rng.random() < 0.8:
        rows = rng.randrange(1, ROUNDS)
        while process.poll() is None and count_rows(workdir) < rows:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
    else:
        time.sleep(rng.uniform(0, 8))
    process.send_signal(number)
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
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as root:
        undisturbed = pathlib.Path(root) / "undisturbed"
        finish(undisturbed)
        expected, different = outcome(undisturbed), 0
        assert [row["round"] for row in expected[1]] == list(range(1, ROUNDS + 1))
        for i in range(arguments.kills):
            workdir = pathlib.Path(root) / str(i)
            rows = kill(workdir, rng)
            finish(workdir)
            same = outcome(workdir) == expected
            different += not same
            print(f"kill {i + 1:>3} after {rows:>2} rows: {'the same bits' if same else 'DIFFERENT'}", flush=True)
    print(f"{arguments.kills - different} of {arguments.kills} resumed runs ended with the same bits")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
