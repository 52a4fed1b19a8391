"""Runs tests/laws/devices on eight host devices, in a process of its own: their number is fixed when JAX starts."""

import os
import pathlib
import subprocess
import sys


def test_on_eight_host_devices(request):
    tests, sample = pathlib.Path(__file__).parent, f"--sample={request.config.getoption('--sample')}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", sample, tests / "devices"],
        env=os.environ | {"FEDJAX_CLIP_TEST_DEVICES": "8"},
        cwd=tests.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
