"""Fixtures of the binaries' tests."""

import functools

import pytest


@pytest.fixture
def cli(binaries):
    """``experiments.run``, unless a file has a ``cli`` of its own."""
    return functools.partial(binaries, "run")
