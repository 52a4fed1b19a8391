"""Clients in processes of their own, by Flower: the parameters of fc.train, bytes, a killed client, TLS.

Flower has an environment of its own (`make flower`), because it needs an older protobuf than the tests' environment has.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import fedjax_clip as fc

pytest.importorskip("flwr", reason="Flower has an environment of its own: make flower")
FLOWER = pathlib.Path(__file__).parents[2] / "examples" / "flower"
sys.path.append(str(FLOWER))
import federation  # noqa: E402 (it is an example, in no package)
import prepare  # noqa: E402
import problem  # noqa: E402

long = pytest.mark.skipif(os.environ.get("FEDJAX_CLIP_FLOWER") != "all", reason="make flower runs it")

SEED, BATCH = 0, 20


def flower(directory, algorithm, clients, *flags):
    """The rows and the parameters of a run."""
    prepare.write(directory, algorithm, clients, clients, SEED, BATCH, own_secrets=False)
    command = [sys.executable, FLOWER / "federation.py", directory, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            out, err = running.communicate()
        except BaseException:
            running.terminate()  # it ends what it has started; a kill would leave all that running
            raise
    assert not running.returncode, err[-2000:]
    with np.load(directory / "server" / "params.npz") as arrays:
        return [json.loads(line) for line in out.splitlines()], [arrays[name] for name in arrays.files]


def simulated(algorithm, clients, rounds, gone=None):
    """fc.train on the same cohorts; from the second round on without the client that is gone."""
    everyone = np.arange(clients)

    def sample(sizes, seed, round):
        return everyone if round == 0 or gone is None else everyone[everyone != gone]

    given = {"rounds": rounds, "batch_size": BATCH, "seed": SEED, "clients_per_chunk": 1}
    sampler = fc.data.sampling.Sampler(sample, cohort_size=clients)
    data = prepare.population(clients)
    return fc.train(problem.algorithm(algorithm), data, problem.params(), sampler=sampler, **given)


def check(algorithm, rows, params, result, fused=False):
    """To the bit by the programs that users run (make flower); those of other tests may be fused differently.

    ``fused``: where four clients share a program, XLA fuses SCAFFOLD's corrected step in another way, seen at 1e-9.
    """
    atol = 1e-6 if os.environ.get("FEDJAX_CLIP_TEST_XLA") != "optimized" else 1e-8 if fused else 0
    trips = 5 if algorithm == "masks" else 1
    for x, y in zip(params, jax.tree.leaves(result.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)
    for row, wanted in zip(rows, result.history, strict=True):
        if not row["dropped"]:
            assert row["bytes_up"] == wanted["bytes_up"] == row["traffic"]["up"]
            assert row["bytes_down"] == wanted["bytes_down"] == row["traffic"]["down"]
        assert 0 < row["flower"] < 300 * trips * row["asked"]  # what Flower's records add


def test_two_clients_in_two_rounds(tmp_path):
    """The short form: SCAFFOLD, whose clients keep a state from one process to the next."""
    rows, params = flower(tmp_path / "run", "scaffold", 2, "--rounds=2", "--tls")
    check("scaffold", rows, params, simulated("scaffold", 2, 2))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A SuperLink and four SuperNodes for all algorithms, and a function that runs one. Directories are links."""
    here = tmp_path_factory.mktemp("four")
    names = ["server", *(f"client-{c}" for c in range(4))]

    def run(algorithm, rounds):
        prepare.write(here / algorithm, algorithm, 4, 4, SEED, BATCH, own_secrets=False)
        for name in names:
            (here / name).unlink()
            (here / name).symlink_to(here / algorithm / name)
        running.run(rounds, 120.0)
        end = time.monotonic() + 900
        while not running.done:
            assert not running.ended, running.complaint()
            assert time.monotonic() < end, "the run does not end"
            time.sleep(0.2)
        with np.load(here / "server" / "params.npz") as arrays:
            return running.rows, [arrays[name] for name in arrays.files]

    for name in names:
        (here / name).symlink_to(here)
    with federation.started(here) as running:
        yield run


@long
@pytest.mark.parametrize("algorithm", problem.NAMES)
def test_four_clients(algorithm, four):
    rounds = 2 if algorithm == "masks" else 3  # of five trips each
    check(algorithm, *four(algorithm, rounds), simulated(algorithm, 4, rounds), fused=algorithm == "scaffold")


@long
def test_a_killed_client_is_the_rounds_dropped_and_the_run_goes_on(tmp_path):
    rows, params = flower(
        tmp_path / "run", "scaffold", 4, "--rounds=3", "--kill=2@1", "--seconds=90"
    )  # the first one compiles
    assert [row["dropped"] for row in rows] == [0, 1, 1]
    check("scaffold", rows, params, simulated("scaffold", 4, 3, gone=2), fused=True)
