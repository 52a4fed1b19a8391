"""A run's directory by itself; what binaries do with it is tested with them."""

import pytest

import fedjax_clip as fc
from experiments.config import rundir


def test_a_system_that_locks_no_files_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(rundir, "fcntl", None)  # as it is on Windows
    with pytest.raises(fc.InvalidInput, match="Linux or macOS"), rundir.RunDirectory(tmp_path / "run", {}):
        pass
    assert not (tmp_path / "run").exists()
