"""What may lie on a disk: files that promise more than there is memory for, and damage of a byte or of a whole file."""

import contextlib
import errno
import gc
import gzip
import io
import os
import random
import shutil
import struct
import sys
import threading
import types
import zipfile

import numpy as np
import pytest

import fedjax_clip as fc
from experiments.config import registry, rundir, spec
from fedjax_clip.core import files
from fedjax_clip.data import sources
from fedjax_clip.data.sources import archives
from fedjax_clip.training import checkpoint as checkpoint_module
from fedjax_clip.training.checkpoint import Checkpoints


def member(shape, body, descr="<f8"):
    """An array of an .npz file as its head has it."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": shape})
    return head.getvalue() + body


def archive(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(f"{name}.npy", content)
    return path


def endless(path, size):
    """A file of so many zero bytes that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.fixture
def small_machine(monkeypatch):
    """A machine of 1 MiB, so that nothing here has to be large; what is allocated is bounded, too."""
    monkeypatch.setattr(os, "sysconf", lambda name: 1024)
    empty = np.empty

    def bounded(shape, *args, **kwargs):
        assert np.prod(shape) < 2**24
        return empty(shape, *args, **kwargs)

    monkeypatch.setattr(np, "empty", bounded)


@pytest.mark.usefixtures("small_machine")
def test_sizes_are_looked_at_before_anything_is_allocated(tmp_path):
    ten, huge = member((10,), bytes(80)), member((10**12,), bytes(80))
    (tmp_path / "letters").mkdir()
    endless(tmp_path / "letters/a.txt", 2**40)
    large = "GiB, and the machine has 0 of memory"
    cases = {
        f"npz('{archive(tmp_path / 'a.npz', x=huge, y=ten)}')": "x.npy promises 8,000,000,000,000 bytes and has 80",
        f"npz('{archive(tmp_path / 'b.npz', x=member((10, 10**11), bytes(80)), y=ten)}')": "and has 80",
        f"npz('{archive(tmp_path / 'c.npz', x=member((2**21,), bytes(2**21), '|u1'))}')": large,  # 2 kB that unpack so
        f"npz('{endless(tmp_path / 'd.npz', 2**40)}')": large,
        f"csv('{endless(tmp_path / 'e.csv', 2**40)}', 'y')": large,
        f"text_files('{tmp_path / 'letters'}')": large,
        f"mnist(directory='{tmp_path}')": "0.json does not hold digits",
    }
    (tmp_path / "src/digits").mkdir(parents=True)
    endless(tmp_path / "src/digits/0.json", 2**40)
    for text, words in cases.items():
        with pytest.raises(fc.InvalidInput) as error:
            spec.one(text, registry.TASKS, "--task")
        assert words in str(error.value), (text, str(error.value))
    (tmp_path / "f.npy").write_bytes(huge)
    with pytest.raises(fc.InvalidInput, match="holds one bare array"):
        archives.read_npz(tmp_path / "f.npy")


@pytest.mark.usefixtures("small_machine")
def test_a_packed_file_is_read_no_further_than_its_head_says(tmp_path):
    head = bytes([0, 0, 8, 1])
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(head + struct.pack(">I", 3) + bytes(2**22))
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + struct.pack(">III", 3, 28, 28) + bytes(3 * 28 * 28))
    with pytest.raises(fc.InvalidInput, match="not an idx file of bytes with 1 axes"):
        sources.fashion_mnist("train", tmp_path)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + struct.pack(">III", 2**31, 2**31, 2**31))
    with pytest.raises(fc.InvalidInput, match="GiB, and the machine has 0 of memory"):
        sources.fashion_mnist("train", tmp_path)


STATE = fc.extend.State(
    {"w": np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32), "b": np.arange(5, dtype=np.int32)}, (), {}
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of ``STATE``."""
    directory = tmp_path_factory.mktemp("good")
    Checkpoints(directory).save(1, STATE)
    return directory


def damages(content):
    """What a disk or a person may make of a file's bytes: ``None`` if it is deleted."""
    rng = random.Random(len(content))
    places = [rng.randrange(len(content)) for _ in range(3)] if content else []
    flipped = [content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :] for i in places]
    return [None, b"", content[: len(content) // 2], b"garbage", content[::-1], *flipped]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_each_damage_of_a_checkpoint_is_refused_or_changes_no_bit(checkpoint, tmp_path, caplog):
    caplog.set_level("CRITICAL")  # what Orbax logs of it
    outcomes = set()
    for file in sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file()):
        for number, content in enumerate(damages((checkpoint / file).read_bytes())):
            copy = shutil.copytree(checkpoint, tmp_path / f"{file.name}{number}")
            (copy / file).unlink() if content is None else (copy / file).write_bytes(content)
            try:
                step, found = Checkpoints(copy).restore(STATE)
            except fc.InvalidInput as error:
                outcomes.add(str(error).split(str(copy))[1].split(":")[0])
            else:
                assert step == 1
                assert {k: x.tobytes() for k, x in found.server.items()} == {
                    k: x.tobytes() for k, x in STATE.server.items()
                }
                outcomes.add("the same")
            shutil.rmtree(copy)
    gc.collect()  # reads that Orbax has given up complain now, and not in another test
    assert outcomes <= {
        "/1 is corrupt and cannot be read. Remove it to start afresh, there being no earlier one.",
        "/1 is corrupt",
        "the same",
    }
    assert len(outcomes) > 1


def test_a_checkpoint_of_zeros_without_end_is_refused_before_they_are_read(tmp_path, monkeypatch):
    with monkeypatch.context() as forging:  # its record is that of STATE, its array takes a thousand times the memory
        forging.setattr(
            checkpoint_module, "_keyed", lambda leaves, left_out: {"0": np.zeros((2**21, 7)), "1": np.zeros(5, "i4")}
        )
        Checkpoints(tmp_path).save(1, STATE)
    read, items = Checkpoints._read, []
    monkeypatch.setattr(Checkpoints, "_read", lambda self, *what: items.append(what[1]) or read(self, *what))
    with pytest.raises(fc.InvalidInput, match="is corrupt and cannot be read. Remove it to start afresh"):
        Checkpoints(tmp_path).restore(STATE)
    assert items == ["record"]


def test_a_kill_in_the_middle_of_a_checkpoints_write_leaves_the_one_before(checkpoint, tmp_path, monkeypatch):
    """Orbax writes beside and renames: whatever a kill leaves there, of any length, is no checkpoint."""
    for number, size in enumerate((0, 1, 3, 8)):
        copy = shutil.copytree(checkpoint, tmp_path / str(number))
        half = shutil.copytree(checkpoint / "1", copy / f"2.orbax-checkpoint-tmp-{number}")
        for file in sorted(p for p in half.rglob("*") if p.is_file())[size:]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        kept = Checkpoints(copy)  # one: each removes what is half written, by a thread
        assert kept.restore(STATE)[0] == 1
        kept.save(2, STATE)
        step, found = kept.restore(STATE)
        assert (step, found.server["w"].tobytes()) == (2, STATE.server["w"].tobytes())


ROW = {"loss": 1.0, "clients": 2.0, "dropped": 0.0, "seconds": 0.1, "update_norm": 1.0, "clipped_steps": 0.5}
CONFIG = {"task": "digits", "algorithm": "fedavg", "client": "sgd(0.1)"}
WHOLE = {"config.json", "metrics.jsonl", "params.npz", "clients.npz", "curves.png", "clipping.png", "tensorboard"}


def run_of_two_rounds(path):
    """What ``experiments.run`` does with a directory, without its training; goes on where it was."""
    with rundir.RunDirectory(path, CONFIG, rounds=2) as directory:
        for number in range(len(directory.rows()) + 1, 3):
            directory.add({"round": float(number), **ROW})
        directory.finish({"w": np.ones(3)}, {"examples/loss": np.ones(2)})


@pytest.mark.parametrize("writes", range(7))
def test_a_disk_that_is_full_after_so_many_writes_is_one_sentence_and_the_same_command_goes_on(
    writes, tmp_path, monkeypatch
):
    replacing, done = files.replacing, []

    @contextlib.contextmanager
    def full(path):
        with replacing(path) as file:
            yield file
            if len(done) == writes:
                raise OSError(errno.ENOSPC, "No space left on device")
        done.append(path.name)

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with monkeypatch.context() as patched:
        patched.setattr(files, "replacing", full)
        if writes < 6:
            with pytest.raises(
                fc.InvalidInput, match="here cannot be written: No space left on device. What was saved"
            ):
                run_of_two_rounds(tmp_path / "here")
        else:
            run_of_two_rounds(tmp_path / "here")
    assert len(done) == writes
    run_of_two_rounds(tmp_path / "here")
    assert {path.name for path in (tmp_path / "here").iterdir()} == WHOLE
    assert [row["round"] for row in rundir.read_rows(tmp_path / "here")] == [1, 2]


def test_each_damage_of_a_run_directorys_files_is_refused_or_made_good(tmp_path, monkeypatch):
    for picture in ("curves", "clipping"):  # quick ones
        drawn = types.SimpleNamespace(axes=[picture])
        monkeypatch.setattr(fc.plots, picture, lambda rows, title, drawn=drawn: drawn)
    monkeypatch.setattr(rundir, "save_picture", lambda path, figure: files.write(path, figure.axes[0]))
    good = tmp_path / "good"
    run_of_two_rounds(good)
    outcomes = set()
    for name in sorted(WHOLE - {"tensorboard"}):
        for number, content in enumerate(damages((good / name).read_bytes())):
            copy = shutil.copytree(good, tmp_path / f"{name}{number}")
            (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
            try:
                run_of_two_rounds(copy)
            except fc.InvalidInput as error:
                outcomes.add((name, "\n" in str(error)))
            else:
                assert [row["round"] for row in rundir.read_rows(copy)] == [1, 2]
                for kept in ("params.npz", "clients.npz"):
                    assert (copy / kept).read_bytes() == (good / kept).read_bytes()
    assert outcomes == {("config.json", False), ("metrics.jsonl", False)}
