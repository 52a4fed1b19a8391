"""A run's files by themselves: its directory, its lock, its arrays and its checkpoints."""

import fcntl

import numpy as np
import pytest

import fedjax_clip as fc
from experiments.config import lock, rundir
from fedjax_clip.core import files, tree
from fedjax_clip.training.checkpoint import Checkpoints


def test_a_system_that_locks_no_files_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "fcntl", None)  # as it is on Windows
    with pytest.raises(fc.InvalidInput, match="Linux or macOS"), rundir.RunDirectory(tmp_path / "run", {}):
        pass
    assert not (tmp_path / "run").exists()


def test_two_parameters_of_one_name_are_refused_before_training():
    with pytest.raises(fc.InvalidInput, match="Two arrays are called 'a/b', since a key has '/' in it: rename one"):
        tree.flatten_with_names({"a": {"b": np.zeros(2)}, "a/b": np.zeros(2)})


def test_parameters_may_be_called_as_the_arguments_of_savez(tmp_path):
    files.write_npz(tmp_path / "x.npz", {"file": np.ones(2), "allow_pickle": np.zeros(1)})
    with np.load(tmp_path / "x.npz") as arrays:
        assert {name: x.tolist() for name, x in arrays.items()} == {"file": [1, 1], "allow_pickle": [0]}


def test_a_home_directory_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rundir.RunDirectory("~/here", {}).path == tmp_path / "here"


def test_a_file_is_replaced_whole_and_a_link_by_itself(tmp_path):
    thesis, link = tmp_path / "thesis", tmp_path / "link"
    thesis.write_text("mine")
    link.symlink_to(thesis)
    files.write(link, "new")
    assert (thesis.read_text(), link.read_text(), link.is_symlink()) == ("mine", "new", False)
    with pytest.raises(ZeroDivisionError), files.replacing(link) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert link.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "thesis"}
    link.unlink()
    link.symlink_to(thesis)
    with pytest.raises(OSError, match="symbolic link"):
        rundir.appending(link)


def test_who_waited_for_a_lock_that_is_removed_takes_the_new_one(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(file, operation):
        calls.append(file)
        if len(calls) == 1:  # another run ended in between
            (tmp_path / "here/.lock").unlink()
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with rundir.RunDirectory(tmp_path / "here", {}):
        assert (tmp_path / "here/.lock").exists()
        with pytest.raises(fc.InvalidInput, match="in use by another run"), rundir.RunDirectory(tmp_path / "here", {}):
            pass
    assert len(calls) == 3
    assert not (tmp_path / "here").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):

    state = fc.extend.State({"w": np.zeros(3, np.float32)}, (), {})
    Checkpoints(tmp_path).save(1, state)
    assert Checkpoints(tmp_path).restore(state)[0] == 1
    for other in ({"w": np.zeros(4, np.float32)}, {"v": np.zeros(3, np.float32)}, {"w": np.zeros(3, np.int32)}):
        with pytest.raises(fc.InvalidInput, match="another model"):
            Checkpoints(tmp_path).restore(fc.extend.State(other, (), {}))
