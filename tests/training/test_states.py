"""Clients' states on disk: the bits of those in memory, whatever a run was doing when it was killed."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from problems import assert_identical

import fedjax_clip as fc
from fedjax_clip.core import files
from fedjax_clip.training import rows, states

M, PER = 12, 4
X = np.random.default_rng(0).normal(size=(M * PER, 3)).astype(np.float32)
DATA = fc.FederatedData({"x": X, "y": X[:, 0] + 0.1 * X[:, 1]}, np.arange(0, M * PER + 1, PER))
EVERY, ROUNDS = 2, 7


def loss(params, batch, key):
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]) ** 2


SCAFFOLD = fc.scaffold(loss, optax.sgd(0.1), server_tx=optax.sgd(1.0))


def train(directory=None, rounds=ROUNDS, **options):
    return fc.train(
        *(SCAFFOLD, DATA, {"w": np.zeros(3, np.float32)}),
        rounds=rounds,
        cohort_size=3,
        batch_size=2,
        checkpoints=directory,
        checkpoint_every=EVERY,
        **options,
    )


@pytest.fixture(scope="module")
def in_memory():
    """The parameters and the clients' states after each round."""
    return {rounds: train(rounds=rounds).state[:2] for rounds in range(1, ROUNDS + 1)}


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(states, "MEMORY_BYTES", 0)


def one_byte_changed(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_states_of_any_type_come_back_from_disk_and_absent_clients_write_nothing(tmp_path):
    rng = np.random.default_rng(0)
    of_one = {
        "w": rng.normal(size=(2, 3)).astype(np.float32),
        "half": np.ones(3, ml_dtypes.bfloat16),
        "count": np.int32(3),
        "seen": np.array([True, False]),
        "nothing": np.zeros((0, 4), np.float32),
        "key": np.arange(2, dtype=np.uint32),
    }
    alike = jax.tree.map(lambda x: np.broadcast_to(x, (5, *np.shape(x))), of_one)
    kept = states.InMemory(jax.tree.map(np.array, alike)), rows.OnDisk(alike), rows.OnDisk(alike, tmp_path)
    for ids in np.array([[[[3, 0, -1]], [[4, -1, -1]]], [[[0, 1, 2]], [[3, 4, -1]]]]):
        new = jax.tree.map(lambda x: rng.integers(0, 2, size=(2, 1, 3, *x.shape[1:])).astype(x.dtype), alike)
        for one in kept:
            one.scatter(ids, new)
        again = np.array([2, 2, 0, 4])
        for other in kept[1:]:
            assert_identical(other.gather(again), kept[0].gather(again))
            assert_identical(jax.tree.map(np.asarray, other.tree), kept[0].tree)
    leaf, expected = kept[1].tree["w"], kept[0].tree["w"]
    assert (leaf.shape, leaf.dtype, leaf.ndim, leaf.size, len(leaf)) == ((5, 2, 3), np.float32, 3, 30, 5)
    for key in (2, -1, slice(1, 3), [4, 0], np.arange(5) > 2, (slice(None), 1), (3, 0, 2), ([1, 2], ..., 0), ...):
        np.testing.assert_array_equal(leaf[key], expected[key])
    with pytest.raises(IndexError, match="must be of clients"):
        leaf[..., 0]


def test_only_clients_that_took_part_take_room(tmp_path):
    alike = {"w": np.broadcast_to(np.float32(1), (10**9, 1000))}  # 4 TB
    kept = rows.OnDisk({"w": alike["w"][: 10**6]}, tmp_path)
    kept.scatter(np.array([[7, 999_999]]), {"w": np.zeros((1, 2, 1000), np.float32)})
    assert (tmp_path / "rows").stat().st_size == 2 * 4000
    assert kept.gather(np.array([0, 7]))["w"].sum(axis=1).tolist() == [1000, 0]
    kept.save(1)
    assert (tmp_path / "1.index").stat().st_size < 100


@pytest.mark.usefixtures("on_disk")
def test_a_temporary_file_is_as_good_and_leaves_nothing(in_memory, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = train()
    assert isinstance(result.state.clients.own["w"], rows.Leaf)
    assert_identical(result.state[:2], in_memory[ROUNDS])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(fc.InvalidInput, match=f"states in {tmp_path} cannot be saved to .*: give these checkpoints to"):
        fc.extend.Checkpoints(tmp_path / "saved").save(ROUNDS, result.state)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(
        fc.InvalidInput, match="missing: the clients' states cannot be written there: No such file .* TM"
    ):
        train()


@pytest.mark.usefixtures("on_disk")
def test_a_full_disk_ends_a_run_with_a_sentence(monkeypatch):
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(fc.InvalidInput) as error:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda buffering: full)
        train()
    assert "the clients' states cannot be written there: No space left on device. Set TMPDIR, or" in str(error.value)


class KilledError(Exception):
    pass


def killing(function, after, number, count):
    """The function, which kills the run before or after its call of this number."""

    def call(*args, **options):
        count.append(1)
        if not after and len(count) == number:
            raise KilledError
        out = function(*args, **options)
        if after and len(count) == number:
            raise KilledError
        return out

    return call


WRITES = {
    "a row": (rows.OnDisk, "_place", [1, 8, 11, 17]),
    "rows to disk": (rows.OnDisk, "save", [2, 3]),
    "an index": (files, "replacing", [2, 3]),
    "its name": (files, "sync", [4, 6]),
    "a checkpoint": (fc.extend.Checkpoints, "save", [1, 2, 3]),
    "what it frees": (rows.OnDisk, "spare", [1, 2, 3]),
}


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("write", WRITES)
def test_a_run_killed_at_any_write_resumes_to_the_same_bits(in_memory, tmp_path, monkeypatch, write):
    of, name, numbers = WRITES[write]
    for number in numbers:
        for after in (False, True):
            directory = tmp_path / f"{number} {after}"
            with monkeypatch.context() as patched, pytest.raises(KilledError):
                patched.setattr(of, name, killing(getattr(of, name), after, number, []))
                train(directory)
            assert_identical(train(directory).state[:2], in_memory[ROUNDS])


@pytest.mark.usefixtures("on_disk")
def test_a_killed_process_resumes_to_the_same_bits(in_memory, tmp_path):
    script = (
        "import os, signal, conftest, test_states\n"
        "test_states.states.MEMORY_BYTES = 0\n"
        "kill = lambda row: row['round'] == 6 and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"test_states.train({str(tmp_path)!r}, on_round=kill)\n"
    )
    tests = pathlib.Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests, tests / "training", tests.parent)))
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    resumed = train(tmp_path)
    assert [row["round"] for row in resumed.history] == [5, 6, 7]
    assert_identical(resumed.state[:2], in_memory[ROUNDS])


@pytest.mark.usefixtures("on_disk")
def test_each_kept_checkpoint_can_be_gone_back_to(in_memory, tmp_path):
    first = train(tmp_path, 2)
    train(tmp_path)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [6, 7]
    with pytest.raises(fc.InvalidInput, match="client . is not what was written, .* or another run went on with it"):
        np.asarray(first.state.clients.own["w"])
    shutil.rmtree(tmp_path / "7")
    assert_identical(train(tmp_path, 6).state[:2], in_memory[6])
    assert_identical(train(tmp_path).state[:2], in_memory[ROUNDS])
    size = (tmp_path / "clients/rows").stat().st_size
    assert size <= 2 * M * 12  # superseded rows are used again


@pytest.mark.usefixtures("on_disk")
def test_a_run_keeps_the_form_that_it_began_with(in_memory, tmp_path, monkeypatch):
    train(tmp_path / "disk", 4)
    monkeypatch.setattr(states, "MEMORY_BYTES", 2**30)
    resumed = train(tmp_path / "disk")
    assert isinstance(resumed.state.clients.own["w"], rows.Leaf)
    assert_identical(resumed.state[:2], in_memory[ROUNDS])
    train(tmp_path / "memory", 4)
    monkeypatch.setattr(states, "MEMORY_BYTES", 0)
    assert isinstance(train(tmp_path / "memory").state.clients.own["w"], np.ndarray)


DAMAGE = {
    "an index with another byte": (
        lambda d: one_byte_changed(d / "6.index", 40),
        "6 is corrupt and cannot be read. Rem",
    ),
    "no index": (lambda d: (d / "6.index").unlink(), "Remove it to go on from round 4."),
    "the index of another checkpoint": (lambda d: os.replace(d / "4.index", d / "6.index"), "6 is corrupt"),
    "rows cut off": (lambda d: os.truncate(d / "rows", 24), "6 is corrupt"),
    "no rows": (lambda d: (d / "rows").unlink(), "6 is corrupt"),
}


@pytest.mark.usefixtures("on_disk")
def test_damage_is_told_in_a_sentence(tmp_path):
    train(tmp_path / "whole", 6)
    for name, (damage, words) in DAMAGE.items():
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        damage(tmp_path / name / "clients")
        with pytest.raises(fc.InvalidInput) as error:
            train(tmp_path / name)
        assert words in str(error.value), name
    rows_file = tmp_path / "whole/clients/rows"
    for place in range(0, rows_file.stat().st_size, 12):
        one_byte_changed(rows_file, place)
    with pytest.raises(
        fc.InvalidInput, match="rows: the state of client . is not what was written, so the file is dam"
    ):
        train(tmp_path / "whole")


@pytest.mark.usefixtures("on_disk")
def test_two_runs_in_one_directory_are_refused(in_memory, tmp_path):
    def other(row):
        with pytest.raises(fc.InvalidInput, match=f"{tmp_path} is in use by another run."):
            train(tmp_path)

    assert_identical(train(tmp_path, on_round=other).state[:2], in_memory[ROUNDS])
