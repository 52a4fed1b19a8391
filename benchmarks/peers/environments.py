"""A virtual environment for each peer, made once and kept."""

import dataclasses
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Peer:
    """What a peer needs: ``requirements`` for pip, and the oldest Python that it runs on."""

    module: str
    requirements: tuple[str, ...]
    python: tuple[int, int] = (3, 11)


TORCH = "torch==2.13.0"
PEERS = {
    "fedjax_clip": Peer("fedjax_clip", (f"-e{REPOSITORY}",)),
    "fedjax_clip_20": Peer("fedjax_clip_20", (f"-e{REPOSITORY}",)),
    "jax_loop": Peer("jax_loop", (f"-e{REPOSITORY}",)),
    "torch_loop": Peer("torch_loop", ("numpy", TORCH)),
    "torch_loop_1": Peer("torch_loop_1", ("numpy", TORCH)),
    "fedjax": Peer("fedjax", ("fedjax==0.0.17", "jax==0.10.2")),
    "pfl": Peer("pfl", ("pfl[pytorch]==0.6.0", TORCH)),
    "fedlab": Peer("fedlab", ("fedlab==1.3.0", TORCH)),
}


class NotInstalled(Exception):
    """Says why a peer is left out."""


def python_of(name: str, root: pathlib.Path, base: str = sys.executable) -> str:
    """The interpreter of a peer's environment under ``root``, which is made if it is missing.

    Peers that need the same packages share an environment.

    Raises:
      NotInstalled: pip cannot install the peer, or Python is too old for it.
    """
    peer = PEERS[name]
    version = subprocess.run([base, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    if tuple(map(int, version.stdout.split())) < peer.python:
        raise NotInstalled(f"needs Python {peer.python[0]}.{peer.python[1]}")
    owner = next(n for n, p in PEERS.items() if p.requirements == peer.requirements)
    home = root.absolute() / owner
    python, stamp = home / "bin" / "python", home / ".installed"
    wanted = "\n".join([base, *peer.requirements])
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"Installing {' '.join(peer.requirements)} (once)", file=sys.stderr, flush=True)
        subprocess.run([base, "-m", "venv", "--clear", home], check=True)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip failed"]
            raise NotInstalled(errors[-1][:300])
        stamp.write_text(wanted)
    return str(python)
