"""What may lie on a disk: files that promise more than there is memory for, and damage of a byte or of a whole file."""

import functools
import gc
import gzip
import io
import os
import random
import shutil
import struct
import zipfile

import numpy as np
import pytest

import fedjax_clip as fc
from experiments import registry, spec
from fedjax_clip import checkpoint as checkpoint_module
from fedjax_clip import sources
from fedjax_clip.checkpoint import Checkpoints


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
        sources.read_npz(tmp_path / "f.npy")


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


STATE = fc.State(
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
        forging.setattr(checkpoint_module, "_keyed", lambda leaves: {"0": np.zeros((2**21, 7)), "1": np.zeros(5, "i4")})
        Checkpoints(tmp_path).save(1, STATE)
    monkeypatch.setattr(Checkpoints, "_read", functools.partialmethod(only_the_record, Checkpoints._read))
    with pytest.raises(fc.InvalidInput, match="is corrupt and cannot be read. Remove it to start afresh"):
        Checkpoints(tmp_path).restore(STATE)


def only_the_record(self, read, step, item, *how):
    assert item == "record"
    return read(self, step, item, *how)
