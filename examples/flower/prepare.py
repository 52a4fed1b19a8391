"""Writes what server and clients each need into directories of their own, as if they were other machines.

``python examples/flower/prepare.py DIRECTORY --algorithm=scaffold --clients=4`` makes ``server`` and ``client-0`` ...
In earnest each client writes its own directory: its data and its key exist nowhere else.
"""

import argparse
import json
import pathlib
import shutil

import jax
import numpy as np
import problem

import fedjax_clip as fc
from fedjax_clip import deploy


def population(clients: int) -> fc.FederatedData:
    """Digits of a few clients, of unequal sizes."""
    digits = fc.data.sources.digits().examples
    some = jax.tree.map(lambda x: np.asarray(x)[: 30 * clients], digits)
    return fc.data.partition.dirichlet(some, num_clients=clients, alpha=1.0)


def write(
    directory: pathlib.Path,
    name: str,
    clients: int,
    cohort_size: int,
    seed: int,
    batch_size: int,
    own_secrets: bool | None = None,
) -> None:
    """All directories of a run; ``own_secrets`` as for ``fc.deploy.exported``."""
    data = population(clients)
    work = fc.extend.LocalWork(fc.extend.LocalWork(batch_size).largest_batch(data.sizes))
    halves = deploy.Halves(problem.algorithm(name), deploy.Population(clients, float(data.client_weights.sum())), seed)
    artefact = deploy.exported(halves, problem.params(), problem.examples(), work, own_secrets=own_secrets)
    server = directory / "server"
    server.mkdir(parents=True)
    artefact.save(server / "client.zip")
    shutil.copy(pathlib.Path(problem.__file__), server / "problem.py")
    plan = {"algorithm": name, "sizes": data.sizes.tolist(), "cohort_size": cohort_size, "seed": seed}
    (server / "plan.json").write_text(json.dumps(plan))
    for number in range(clients):
        home = directory / f"client-{number}"
        home.mkdir()
        artefact.save(home / "client.zip")
        np.savez(home / "data.npz", **data.client(number))
        (home / "site.json").write_text(json.dumps({"number": number}))
    if artefact.forms.masked:
        _write_keys(directory, clients)


def _write_keys(directory: pathlib.Path, clients: int) -> None:
    """A signing key for each client, and the registry of the public ones, which no server may write."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    keys = [Ed25519PrivateKey.generate() for _ in range(clients)]
    registry = json.dumps({c: key.public_key().public_bytes_raw().hex() for c, key in enumerate(keys)})
    for number, key in enumerate(keys):
        home = directory / f"client-{number}"
        (home / "signing.key").touch(0o600)
        (home / "signing.key").write_bytes(key.private_bytes_raw())
        (home / "registry.json").write_text(registry)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--algorithm", choices=problem.NAMES, default="fedavg")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--cohort_size", type=int, help="by default all clients")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.directory.exists():
        parser.error(f"{given.directory} exists: name a new directory, nothing is overwritten.")
    size = given.cohort_size or given.clients
    write(given.directory, given.algorithm, given.clients, size, given.seed, given.batch_size)


if __name__ == "__main__":
    main()
