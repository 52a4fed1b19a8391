"""Twenty drills: one of several processes is killed at a random moment, all end, and the same command resumes.

  python benchmarks/drills.py
  python benchmarks/drills.py --drills=4 --seed=1

Half of the drills start the processes by ``experiments.launch``, which ends the others. The other half start each by
itself, as on several hosts whose launcher does nothing: then the others must notice. Half train FedAvg and half
SCAFFOLD, in two processes or four. A drill passes if all processes end within 60 seconds, each survivor (or the
launcher) says why, and the same command ends with the bits of a run that nobody disturbed.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import kills

sys.path.insert(0, str(kills.REPOSITORY))
from experiments import launch

LIMIT = 60.0  # seconds until all must have ended
REASONS = ("another process has ended", "Terminating process because the JAX distributed service", "so all were ended")
ALGORITHMS = ("fedavg", "scaffold")


@dataclasses.dataclass
class Processes:
    """A run in several processes, which have begun.

    Attributes:
      started: what was started, and may be waited for: the processes, or their launcher.
      numbers: the process IDs of the processes.
    """

    started: list[subprocess.Popen[str]]
    logs: list[pathlib.Path]
    numbers: list[int]


def start(workdir: pathlib.Path, count: int, launched: bool, *flags: str) -> Processes:
    """Starts a run in ``count`` processes of one device."""
    command = [sys.executable, "-m", "experiments.run", *kills.FLAGS, *flags, f"--workdir={workdir}", "--devices=1"]
    port = launch.free_port()
    if launched:
        commands = [[sys.executable, "-m", "experiments.launch", f"--processes={count}", "--", *command]]
    else:
        commands = [[*command, f"--distributed=127.0.0.1:{port},{count},{i}"] for i in range(count)]
    logs = [workdir.with_name(f"{workdir.name}.{time.monotonic_ns()}.{i}") for i in range(len(commands))]
    started = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as file:
            started.append(subprocess.Popen(command, cwd=kills.REPOSITORY, stdout=file, stderr=file, text=True))
    if not launched:
        return Processes(started, logs, [process.pid for process in started])
    children = pathlib.Path(f"/proc/{started[0].pid}/task/{started[0].pid}/children")
    while len(found := children.read_text().split()) < count:
        time.sleep(0.01)
    return Processes(started, logs, [int(number) for number in found])


def finish(workdir: pathlib.Path, count: int, launched: bool, *flags: str) -> bool:
    """Runs it to its end; whether it ended well."""
    running = start(workdir, count, launched, *flags)
    for process, log in zip(running.started, running.logs, strict=True):
        if process.wait(300) != 0:
            print(f"exit code {process.returncode}:\n{log.read_text()}", file=sys.stderr)
    return not any(process.returncode for process in running.started)


def drill(workdir: pathlib.Path, count: int, launched: bool, rng: random.Random, *flags: str) -> tuple[str, float, str]:
    """Kills one process; returns ``(who and when, seconds until all had ended, what is wrong with that)``."""
    running, began = start(workdir, count, launched, *flags), time.monotonic()
    victim = rng.randrange(count)
    if rng.random() < 0.7:
        rows, beyond = rng.randrange(1, kills.ROUNDS), rng.uniform(0, 0.05)
        while kills.count_rows(workdir) < rows and all(p.poll() is None for p in running.started):
            time.sleep(0.001)
        time.sleep(beyond)
    else:
        time.sleep(rng.uniform(0, 12))
    when = f"process {victim} after {time.monotonic() - began:.1f} s, {kills.count_rows(workdir)} rows"
    with contextlib.suppress(ProcessLookupError):  # it may be done
        os.kill(running.numbers[victim], signal.SIGKILL)
    killed, wrong = time.monotonic(), ""
    for process in running.started:
        try:
            process.wait(max(0.0, killed + LIMIT - time.monotonic()))
        except subprocess.TimeoutExpired:
            wrong = f"did not end within {LIMIT:.0f} s"
            process.kill()
            process.wait()
    seconds = time.monotonic() - killed
    for i, (process, log) in enumerate(zip(running.started, running.logs, strict=True)):
        survived = launched or i != victim
        if survived and process.returncode and not any(reason in log.read_text() for reason in REASONS):
            wrong = wrong or f"process {i} said nothing (exit code {process.returncode})"
            print(log.read_text(), file=sys.stderr)
    return when, seconds, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, failed = random.Random(given.seed), 0
    print("| drill | run | killed | all ended after | resumed to the same bits | wrong |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        expected = {}
        kinds = list(itertools.product(ALGORITHMS, (2, 4), (False, True)))
        for i in range(given.drills):
            algorithm, count, launched = kinds[i % len(kinds)]
            flags = (f"--algorithm={algorithm}",)
            if (algorithm, count) not in expected:
                undisturbed = pathlib.Path(root) / f"undisturbed-{algorithm}-{count}"
                assert finish(undisturbed, count, True, *flags)
                expected[algorithm, count] = kills.outcome(undisturbed)
            workdir = pathlib.Path(root) / str(i)
            when, seconds, wrong = drill(workdir, count, launched, rng, *flags)
            same = finish(workdir, count, launched, *flags)
            same = same and kills.outcome(workdir) == expected[algorithm, count]
            failed += bool(wrong) or not same
            how = f"{algorithm}, {count} processes, {'launched' if launched else 'alone'}"
            print(f"| {i + 1} | {how} | {when} | {seconds:.1f} s | {'yes' if same else 'NO'} | {wrong} |", flush=True)
    print(f"\n{given.drills - failed} of {given.drills} drills passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
