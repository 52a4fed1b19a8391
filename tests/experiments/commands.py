"""What tests of the binaries share: a short run, a task of one's own, and what a refusal looks like."""

import pathlib

import numpy as np

REPOSITORY = pathlib.Path(__file__).parents[2]
QUICK = ("--task=linear_regression(num_clients=6)", "--rounds=3", "--cohort_size=3")


def saved(path, **arrays):
    np.savez(path, **arrays)
    return f"--task=npz({str(path)!r})"


def assert_refused(outcome, directory, before, *words):
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert err.count("error:") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert sorted(directory.rglob("*")) == before


def files_below(directory):
    """What each file holds, but for the names of devices and the time."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
