"""The comparison with peers runs, and peers do the same work. No times are tested."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest
from problems import EVERYTHING

RUN = pathlib.Path(__file__).parents[2] / "benchmarks" / "peers" / "run.py"


def test_peers_agree(tmp_path):
    peers = ["fedjax_clip", "jax_loop"]
    arguments = ["--tiny", "--here", "--tasks=M,L", f"--peers={','.join(peers)}", "--laps=1", "--devices=2"]
    done = subprocess.run(
        [sys.executable, RUN, *arguments, f"--out={tmp_path / 'table'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "table.md").read_text()
    assert all(f"| {task} | {peer} | " in done.stdout for task in "ML" for peer in peers)
    entries = json.loads((tmp_path / "table.json").read_text())["entries"]
    assert [e["error"] for e in entries] == [None] * 4
    assert all(e["difference"] < 1e-4 for e in entries)
    assert [len(e["laps"]) for e in entries] == [1] * 4


def test_peers_get_the_oldest_python_that_is_new_enough(tmp_path, monkeypatch):
    for minor, script in {9: "echo 3 9", 12: "exit 127", 13: "echo 3 13", 14: "echo 3 14"}.items():
        fake = tmp_path / f"python3.{minor}"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
    monkeypatch.syspath_prepend(RUN.parent)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    environments = importlib.import_module("environments")
    base = str(tmp_path / "python3.9")
    assert environments.interpreter(sys.version_info[:2]) == sys.executable
    assert environments.interpreter((3, 9), base) == base
    assert environments.interpreter((3, 12), base) == str(tmp_path / "python3.13")
    with pytest.raises(environments.NotInstalled, match=r"needs Python 3\.15"):
        environments.interpreter((3, 15), base)


def run_script(name, *arguments):
    done = subprocess.run([sys.executable, RUN.parents[1] / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not EVERYTHING, reason="of make strict: it takes half a minute")
def test_what_is_measured_on_accelerators_runs_here_in_small():
    out = run_script("device.py", "--tiny")
    for part in (
        "EMNIST-62  2 rounds",
        "CIFAR-10   2 rounds",
        "tasks      M",
        "tasks      C",
        "width      C",
        "conv       C",
    ):
        assert part in out
    assert "profile    C" in out


@pytest.mark.skipif(not EVERYTHING, reason="of make strict: it takes half a minute")
def test_published_tables_run_on_pictures_of_the_right_shape():
    out = run_script("published.py", "agnostic", "--tiny", "--seeds=1")
    assert all(f"| {method} | " in out for method in ("AFL", "q-FFL, q = 15", "AFL, paper"))
    out = run_script("published.py", "label-skew", "--data=cifar100", "--tiny", "--seeds=1", "--methods=FedAvg,FedPer")
    assert [line.split(" | ")[-1] for line in out.splitlines()[-2:]] == ["31.89 |", "49.63 |"]


def test_the_planner_wastes_at_most_2_percent_on_log_normal_clients():
    out = run_script("limit.py", "--only=waste,dispatch", "--laps=1")
    wasted, shapes = out.splitlines()[1].rsplit(":", 1)[1].split(",")
    assert float(wasted.split("%")[0]) < 2
    assert int(shapes.split()[0]) <= 3
    assert "100 a dispatch" in out


def test_links_are_measured_beside_the_same_training_without_them():
    out = run_script("links.py", "--tiny", "--task=M", "--only=& median()", "--rounds=2")
    assert out.splitlines()[1].startswith("& median() ")
    assert out.count("%") == 4  # more, its interval, the share


def test_telemetry_is_measured_beside_the_same_training_without_it():
    out = run_script("telemetry.py", "--tiny", "--only=all", "--rounds=2")
    assert out.splitlines()[1].startswith("all ")
    assert out.count("%") == 3
