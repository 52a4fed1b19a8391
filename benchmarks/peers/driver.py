"""Talks to the peers' processes and lets them run in turn, lap by lap."""

import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import tempfile
from collections.abc import Callable

import numpy as np
import tasks

HERE = pathlib.Path(__file__).resolve().parent
REFERENCE = "fedjax_clip"


class Failed(Exception):
    """A peer that does not run, and its reason."""


class Worker:
    """A peer's process; see ``worker.py``."""

    def __init__(self, python: str, module: str, log: pathlib.Path):
        self.log = log
        path = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, HERE / "worker.py", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
            )

    def ask(self, cmd: str, **arguments: object) -> float:
        """Sends a request; returns its seconds, if it has any."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"cmd": cmd, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(f"exit code {self.process.wait()}: {(self.log.read_text().splitlines() or ['no output'])[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer.get("seconds", 0.0)

    def params(self) -> dict[str, np.ndarray]:
        """The server's parameters now."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(pathlib.Path(folder) / "params.npz")
            self.ask("params", path=path)
            with np.load(path) as arrays:
                return dict(arrays)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


@dataclasses.dataclass
class Entry:
    """One cell of the table; ``error`` says why it is empty.

    ``setup`` and ``first`` are the seconds to the end of the first period of rounds, compilation included;
    ``difference`` is the largest to the reference's parameters then.
    """

    task: str
    peer: str
    laps: list[float] = dataclasses.field(default_factory=list)
    rounds: int = 0
    setup: float = 0.0
    first: float = 0.0
    ratio: float | None = None
    difference: float | None = None
    error: str | None = None

    @property
    def seconds(self) -> float | None:
        """Median seconds a round."""
        return statistics.median(self.laps) if self.laps else None


def measure(
    name: str,
    start: dict[str, Callable[[], Worker]],
    *,
    laps: int,
    lap_seconds: float,
    tiny: bool,
    devices: int,
    say: Callable[[str], None],
) -> list[Entry]:
    """One task, all peers: a first period of rounds whose parameters are compared, then laps in turn.

    A lap is a whole number of the cohorts' periods, so that every lap of every peer does the same work a round.
    """
    entries = {peer: Entry(name, peer) for peer in start}
    workers: dict[str, Worker] = {}
    params: dict[str, dict[str, np.ndarray]] = {}
    period = tasks.period(name)

    def attempt(peer: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Failed as failure:
            entries[peer].error = str(failure)
            say(f"{name} {peer}: left out: {failure}")
            if peer in workers:
                workers.pop(peer).close()

    def prepare(peer: str) -> None:
        entry = entries[peer]
        worker = workers[peer] = start[peer]()
        entry.setup = worker.ask("setup", task=name, tiny=tiny, devices=1 if name == "L" else devices)
        entry.first = entry.setup + period * worker.ask("run", rounds=period)
        params[peer] = worker.params()
        seconds = math.inf
        if entry.first < 20 * lap_seconds:  # else a period is a lap
            worker.ask("run", rounds=period)  # starts loops again that the parameters had ended
            seconds = worker.ask("run", rounds=period)
        entry.rounds = period * max(1, math.ceil(lap_seconds / (period * seconds)))
        say(f"{name} {peer}: ready after {entry.first:.1f} s")

    def lap(peer: str) -> None:
        entries[peer].laps.append(workers[peer].ask("run", rounds=entries[peer].rounds))

    try:
        for peer in start:
            attempt(peer, lambda peer=peer: prepare(peer))
        for i in range(laps):
            for peer in list(workers):
                attempt(peer, lambda peer=peer: lap(peer))
            done = [f"{p} {e.laps[-1]:.4g}" for p, e in entries.items() if p in workers]
            say(f"{name} lap {i + 1}, seconds a round: {', '.join(done)}")
    finally:
        for worker in workers.values():
            worker.close()
    reference = entries.get(REFERENCE)
    if reference is not None and reference.laps:
        for peer, entry in entries.items():
            if entry.error is None:
                entry.ratio = statistics.median(a / b for a, b in zip(entry.laps, reference.laps, strict=True))
                entry.difference = largest_difference(params[peer], params[REFERENCE])
    return list(entries.values())


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Over all parameters; infinite if they are not the same arrays."""
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        return math.inf
    return max(float(np.max(np.abs(a[k] - b[k]))) for k in b)
