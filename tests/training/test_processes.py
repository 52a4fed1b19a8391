"""Two processes, with two devices each, train one model by the library alone."""

import os
import pathlib
import pickle
import socket
import subprocess
import sys

import joined
import pytest
from problems import ENTRIES, assert_close, assert_identical, parameters

import fedjax_clip as fc

PROCESSES = 2
SECONDS = 480  # until a run that hangs has failed; it takes 20 on two idle cores


def run(scenario, directory):
    """What each process saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, joined.__file__, str(PROCESSES)]
    paths = os.pathsep.join(str(path) for path in pathlib.Path(__file__).parents[1:3])
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": {**os.environ, "PYTHONPATH": paths}}
    started = [
        subprocess.Popen([*command, str(n), address, str(directory), scenario], **options) for n in range(PROCESSES)
    ]
    try:
        told = [process.communicate(timeout=SECONDS)[0].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * PROCESSES, "\n".join(told)
    return [pickle.loads((directory / f"{scenario}.{n}").read_bytes()) for n in range(PROCESSES)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    return directory, run("train", directory)


def rows(history):
    return [{name: value for name, value in row.items() if name not in ("seconds", "wasted_steps")} for row in history]


@pytest.mark.parametrize("name", joined.TRAINED)
def test_two_processes_train_as_one_does(name, trained):
    directory, (first, second) = trained
    (state, history), (_, half), (resumed, rest) = first[name]
    assert_identical(second[name], first[name])
    assert_identical(resumed, state)
    assert rows([*half, *rest]) == rows(history)

    algorithm = ENTRIES[name]()
    data, common = joined.problem(algorithm)
    alone = fc.train(algorithm, data, parameters(), **common)
    assert_close(joined.seen(alone)[0], state)
    assert_close(rows(alone.history), rows(history))
    continued = fc.train(algorithm, data, parameters(), checkpoints=directory / f"{name}, half", **common)
    assert_close(joined.seen(continued)[0], state)


SENTENCES = {
    "seed": "The processes differ in seed: 0 (process 0), 1 (process 1)",
    "data": "The processes differ in the values of field 'y': value 1 (process 0), value 2 (process 1)",
    "params": "The processes differ in the initial parameters ['w']: ",
    "secret": "The processes differ in secret: value 1 (process 0), value 2 (process 1)",
    "directory": "is not seen by process 1. Name one directory that all hosts share",
    "devices": "equally many devices each, not 2 of process 0, 1 of process 1",
    "debug": "debug=True runs in one process",
}


def test_what_processes_do_not_agree_on_ends_all_of_them_with_a_sentence(tmp_path):
    first, second = run("differ", tmp_path)
    for name, sentence in SENTENCES.items():
        assert sentence in first[name], first[name]
        assert first[name].startswith("InvalidInput: ")
        assert second[name] == first[name].replace(f"{tmp_path}/0", f"{tmp_path}/1")
    for name, error, sentence in (
        ("rounds", "InvalidInput", "rounds must be a whole number of at least 1, not 0."),
        ("on_round", "ValueError", "the disk is full"),
        ("evaluate", "ValueError", "no such score"),
    ):
        assert second[name] == f"{error}: {sentence}"
        assert first[name] == f"InvalidInput: Process 1 of 2 ended: {sentence}"
    assert "cannot be written" in first["file"]
    assert "Process 0 of 2 ended: " in second["file"]
    assert first["should_stop"] == second["should_stop"] == 1
    assert first["resumed"] == second["resumed"] == 3
    assert (first["alone"], second["alone"]) == (1, 2)
    assert first["rows"] == second["rows"] == 2


def test_a_population_is_opened_in_parts(tmp_path):
    first, second = run("parts", tmp_path)
    assert_identical(second["trained"], first["trained"])
    algorithm = ENTRIES["fedavg"]()
    data, common = joined.problem(algorithm)
    alone = fc.train(algorithm, data, parameters(), **common)
    assert_close(joined.seen(alone)[0], first["trained"][0])
    assert first["twice"] == second["twice"]
    assert "Client '0' is opened by processes 0, 1: each must be opened by one." in first["twice"]
    assert "Client '3' has y=99" in second["label"]
    assert "Process 1 of 2 ended: Client '3' has y=99" in first["label"]
    assert "differ in whether data is opened in parts: False (process 0), True (process 1)" in first["whole"]
    assert "must be a whole population" in first["alone"]
