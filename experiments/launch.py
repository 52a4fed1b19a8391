"""Runs a command as several processes on this machine that train together, as srun or mpirun do on several.

  python -m experiments.launch --processes=4 -- python -m experiments.run --task=mnist
  python -m experiments.launch --processes=2 --devices=2 -- python my_program.py

A program finds the other processes by jax.distributed.initialize(), which reads what is set here: the environment
variables of Open MPI's mpirun. experiments.run and experiments.sweep do so by --distributed=auto, which is added to
their command. Process 0 has the terminal. Lines of the others have their number in front. Signals go to all. If one
process fails, the others are ended, and its exit code is that of the launch.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

MOST_PROCESSES, MOST_DEVICES = 256, 128
GRACE = 10.0  # seconds in which the others may end by themselves when one process has failed
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Arguments(argparse.ArgumentParser):
    """Wrong arguments are one sentence on stderr, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message.removeprefix('argument ')}.", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    doc = argparse.RawDescriptionHelpFormatter
    parser = Arguments(prog="python -m experiments.launch", description=__doc__, formatter_class=doc)
    parser.add_argument("--processes", type=_count(MOST_PROCESSES), required=True, help="how many")
    devices = "devices of each process; by default an equal share of the CPU cores, or one GPU"
    parser.add_argument("--devices", type=_count(MOST_DEVICES), help=devices)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what each process runs, after --")
    asked = parser.parse_args(arguments)
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    if not command:
        parser.error("give the command that each process runs after --, such as: -- python my_program.py")
    try:
        return launch(_joined(command), asked.processes, asked.devices)
    except OSError as error:
        parser.error(f"{command[0]} cannot be started: {error.strerror}")


def launch(command: Sequence[str], processes: int, devices: int | None = None) -> int:
    """Runs a command as several processes until all have ended.

    Args:
      command: what each process runs.
      processes: how many.
      devices: of each process.

    Returns:
      0, or the exit code of the first process that failed: 128 + its signal if it was killed.
    """
    address = f"127.0.0.1:{free_port()}"
    running: list[subprocess.Popen[str]] = []
    lock = threading.Lock()
    with _passing_signals_to(running):
        try:
            for number in range(processes):
                quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
                options: dict[str, Any] = quiet if number else {}
                # In a session of its own, or a Ctrl-C would reach it twice: from the terminal, and from here.
                options |= {"start_new_session": True, "text": True, "errors": "backslashreplace"}
                process = subprocess.Popen(command, env=environment(address, processes, number, devices), **options)
                running.append(process)
            readers = [
                threading.Thread(target=_copy, args=(source, sink, number, lock))
                for number, process in enumerate(running)
                for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
                if source is not None
            ]
            for reader in readers:
                reader.start()
            failed = _first_failure(running)
            if failed is not None:
                _wait(running, GRACE)
            alike = all(failed is not None and process.poll() == failed[1] for process in running)
        finally:
            for process in reversed(running):  # the first, to which the others are connected, last
                process.kill()
            for process in running:
                process.wait()
    for reader in readers:
        reader.join(GRACE)  # what the command has started may hold the pipe open
    if failed is None:
        return 0
    number, code = failed
    if not alike:  # else each has said why it ended
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        print(f"Process {number} of {processes} ended by {how}, and so all were ended.", file=sys.stderr)
    return 128 - code if code < 0 else code


def environment(address: str, processes: int, number: int, devices: int | None) -> dict[str, str]:
    """The environment of one process, in which ``jax.distributed.initialize()`` finds the others.

    Args:
      address: host and port at which process 0 will listen, and no other machine can reach it.
      processes: how many there are.
      number: of this process, from 0.
      devices: of each process; by default an equal share of the CPU cores, or one GPU.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "OMPI_MCA_orte_hnp_uri": f"0.0;tcp://{address}",
        "OMPI_COMM_WORLD_SIZE": str(processes),
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    }
    if devices is not None:
        own["JAX_NUM_CPU_DEVICES"] = str(devices)
        own["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(number * devices + i) for i in range(devices))  # of GPUs
    elif "JAX_NUM_CPU_DEVICES" not in os.environ:
        own["JAX_NUM_CPU_DEVICES"] = str(max(1, cores // processes))
    # Within an allocation of Slurm's, JAX would ask Slurm who is who.
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | own


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _joined(command: Sequence[str]) -> list[str]:
    """The command, with ``--distributed=auto`` for a binary of the project that is not told otherwise."""
    binary = any(argument in ("experiments.run", "experiments.sweep") for argument in command)
    told = any(argument.startswith(("--distributed", "-distributed")) for argument in command)
    return [*command, "--distributed=auto"] if binary and not told else list(command)


def _first_failure(running: Sequence[subprocess.Popen[str]]) -> tuple[int, int] | None:
    """``(number, return code)`` of the first process to fail; ``None`` once all have ended well."""
    while True:
        codes = [process.poll() for process in running]
        for number, code in enumerate(codes):
            if code:
                return number, code
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.02)


def _wait(running: Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Until all have ended, but no longer than this."""
    deadline = time.monotonic() + seconds
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _passing_signals_to(running: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """A block in which signals to this process go to all of these."""

    def pass_on(number: int, frame: object) -> None:
        for process in running:
            process.send_signal(number)  # does nothing once it has ended

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy(source: TextIO, sink: TextIO, number: int, lock: threading.Lock) -> None:
    """Copies a process's lines, with its number in front of each."""
    with source:
        for line in source:
            with lock, contextlib.suppress(OSError, ValueError):  # nobody may read any more
                sink.write(f"[{number}] {line}")
                sink.flush()


def _count(most: int) -> Callable[[str], int]:
    """What reads a whole number between 1 and ``most``."""

    def read(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"give a whole number between 1 and {most}, not {text}")
        return int(text)

    return read


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
