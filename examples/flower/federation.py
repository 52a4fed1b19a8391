"""Runs a prepared directory on this machine: a SuperLink, a SuperNode for each client, and the app.

``python examples/flower/federation.py DIRECTORY --rounds=3`` talks over the loopback. ``--tls`` makes certificates and
keys, and lets in the nodes alone whose keys were registered. In earnest each process runs on a machine of its own, by
the commands that this file starts (docs/real-clients.md).
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

APP = pathlib.Path(__file__).parent
BIN = pathlib.Path(sys.executable).parent


class Federation:
    """The processes of a run. ``kill`` ends a client at once, as a power cut does.

    Args:
      directory: of ``prepare.py``.
      tls: whether the SuperLink has a certificate, and knows its nodes by their keys.
    """

    def __init__(self, directory: pathlib.Path, tls: bool = False):
        self.directory, self.tls = directory.resolve(), tls
        self.clients = sorted(self.directory.glob("client-*"))
        self.logs = self.directory / "logs"
        self.logs.mkdir(exist_ok=True)
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # Flower starts programs of its own by name
            "FLWR_HOME": str(self.directory / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds; 1 by default
            "JAX_PLATFORMS": "cpu",
        }
        self.port, *self.ports = _free(1 + len(self.clients))
        self.processes: dict[str, subprocess.Popen] = {}
        self.runs = 0

    def start(self) -> None:
        """Starts the SuperLink and all SuperNodes."""
        home = self.directory / "flwr"
        home.mkdir(exist_ok=True)
        trust = f'root-certificates = "{self._pki("ca.crt")}"' if self.tls else "insecure = true"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        )
        link = ["flower-superlink", "--host=127.0.0.1", f"--port={self.port}", *self._link_security()]
        self._process("superlink", *link, "--disable-runtime-dependency-installation")
        _wait(lambda: _listens(self.port), 60, "The SuperLink does not listen")
        for number, (home, port) in enumerate(zip(self.clients, self.ports)):
            if self.tls:
                self._flwr("supernode", "register", str(self._pki(f"client-{number}.pub")), "here")
            self._process(
                f"client-{number}",
                *("flower-supernode", f"--superlink=127.0.0.1:{self.port}", f"--port={port}", "--host=127.0.0.1"),
                *self._node_security(number),
                f'--node-config=site="{home}"',
            )

    def run(self, rounds: int, seconds: float) -> None:
        """Starts the app, which ends by itself; ``done`` says when."""
        said = f'server="{self.directory / "server"}" rounds={rounds} seconds={seconds:.1f}'
        told = self._flwr("run", str(APP), "here", "--run-config", said, "--format=json")
        self.runs += 1
        self.number = json.loads(told[told.index("{") : told.rindex("}") + 1])["run-id"]

    @property
    def rows(self) -> list[dict]:
        """The rows of the rounds so far."""
        file = self.directory / "server" / "rows.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def done(self) -> bool:
        """Whether the run has written its parameters."""
        return (self.directory / "server" / "params.npz").exists()

    @property
    def ended(self) -> bool:
        """Whether the server's app has ended, done or not."""
        return (self.logs / "superlink.log").read_text().count("Finished task") == self.runs

    def complaint(self) -> str:
        """The end of what the server's app has said."""
        return self._flwr("log", self.number, "here", "--show")[-3000:]

    def kill(self, client: int) -> None:
        """Ends one client's processes, without a word to the server."""
        process = self.processes.pop(f"client-{client}")
        _end(process, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """Ends all processes."""
        for process in self.processes.values():
            _end(process, signal.SIGTERM)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            _end(process, signal.SIGKILL)  # what it has started, too
            process.wait()

    def _pki(self, name: str) -> pathlib.Path:
        return self.directory / "keys" / name

    def _link_security(self) -> list[str]:
        if not self.tls:
            return ["--insecure"]
        files = {"ca-certfile": "ca.crt", "certfile": "superlink.crt", "keyfile": "superlink.key"}
        return [*(f"--ssl-{name}={self._pki(file)}" for name, file in files.items()), "--enable-supernode-auth"]

    def _node_security(self, number: int) -> list[str]:
        if not self.tls:
            return ["--insecure"]
        key = self._pki(f"client-{number}.key")
        return [f"--root-certificates={self._pki('ca.crt')}", f"--auth-supernode-private-key={key}"]

    def _process(self, name: str, program: str, *arguments: str) -> None:
        with (self.logs / f"{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                [BIN / program, *arguments],
                **{"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL},
                env=self.environment,
                start_new_session=True,
            )

    def _flwr(self, *arguments: str) -> str:
        done = subprocess.run([BIN / "flwr", *arguments], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: flwr {' '.join(arguments[:2])} failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        return done.stdout


@contextlib.contextmanager
def started(directory: pathlib.Path, tls: bool = False) -> Iterator[Federation]:
    """A federation that runs within the block."""
    federation = Federation(directory, tls)
    try:
        federation.start()
        yield federation
    finally:
        federation.stop()


def _free(count: int) -> list[int]:
    """Ports of the loopback that nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _wait(ready: Callable[[], bool], seconds: float, complaint: str) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            sys.exit(f"error: {complaint} after {seconds:g} seconds: its logs say why.")
        time.sleep(0.1)


def _end(process: subprocess.Popen, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path, help="what prepare.py has written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="that the server waits for the answers of a trip")
    parser.add_argument("--kill", help="CLIENT@ROUNDS: a client that is killed once so many rounds are done")
    parser.add_argument("--tls", action="store_true", help="certificates, and nodes known by their keys")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for all")
    given = parser.parse_args()
    if not (given.directory / "server" / "plan.json").exists():
        parser.error(f"{given.directory} was not prepared: python examples/flower/prepare.py {given.directory}")
    victim, after = map(int, given.kill.split("@")) if given.kill else (None, 0)
    if given.tls:
        import keys

        keys.write(given.directory / "keys", len([*given.directory.glob("client-*")]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped."))  # and the other processes with it
    with started(given.directory, given.tls) as federation:
        federation.run(given.rounds, given.seconds)
        shown, end = 0, time.monotonic() + given.limit
        while not federation.done and not federation.ended and time.monotonic() < end:
            for row in federation.rows[shown:]:
                print(json.dumps(row), flush=True)
                shown += 1
            if victim is not None and shown >= after:
                federation.kill(victim)
                victim = None
            time.sleep(0.2)
        for row in federation.rows[shown:]:
            print(json.dumps(row), flush=True)
        if not federation.done:
            sys.exit(f"{federation.complaint()}\nerror: The run was not done: {federation.logs} says more.")


if __name__ == "__main__":
    main()
