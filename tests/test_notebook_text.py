"""What the notebooks' text says: each number is computed here, and the first cell finds the package on any runtime."""

import functools
import glob
import importlib.metadata
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import types

import jupytext
import numpy as np
import pytest
from test_notebooks import CHIPS, ROOT, SCRIPTS

import fedjax_clip as fc
from experiments.bench import tracks
from experiments.bench.core.standing import QUARTERS

WORDS = {
    2: "two",
    3: "three",
    4: "four",
    5: "five",
    6: "six",
    8: "eight",
    10: "ten",
    12: "twelve",
    2000: "two thousand",
}
COUNTED = r"\b(?:four|five|six|seven|eight|nine|ten|eleven|twelve|fourteen|hundred|thousand|quarter|fifth)\b"


@functools.cache
def cells(stem, kind):
    return [cell.source for cell in jupytext.read(ROOT / f"colab/{stem}.py").cells if cell.cell_type == kind]


def literal(stem, pattern):
    """The Python value that a pattern's group finds in the notebook's code."""
    found = re.findall(pattern, "\n".join(cells(stem, "code")))
    assert found, (stem, pattern)
    return eval(found[0], {"np": np})


def quickstart():
    digits = fc.data.sources.digits()
    height, width = digits.examples["x"].shape[1:3]
    fraction = literal("quickstart", r"split_examples\(([\d.]+)")
    training, held_out = digits.split_clients(literal("quickstart", r"split_clients\(([\d.]+)"), seed=0)
    clip, rate = map(float, re.findall(r"norm\(([\d.]+)\), optax.sgd\(([\d.]+)\)", code("quickstart"))[0])
    thresholds = literal("quickstart", r"if SHORT else (\[[^\]]*np.inf\])")
    rates, seeds = literal("quickstart", r"learning_rates = (\[.*\])"), literal("quickstart", r"SHORT else (\[0, .*\])")
    low, high = rates
    assert (low, seeds) == (rate, list(range(len(seeds))))
    same = high * thresholds[0] / low
    assert any(np.isclose(same, x) for x in thresholds)
    assert fraction == 1 / 5
    return [
        f"{digits.num_examples} digits of {height} × {width} pixels, written on {digits.num_clients} forms",
        f"hold out {WORDS[held_out.num_clients]} forms whole, and a fifth of the examples",
        f"longer than {clip:g} down to length {clip:g}",
        f"{literal('quickstart', r'cohort_size.: (.+?),')} of the {training.num_clients} clients go once over their "
        f"examples, {literal('quickstart', r'batch_size.: (.+?),')} at a time",
        f"The same training at {WORDS[len(thresholds)]} thresholds",
        f"at {WORDS[round(high / low)]} times as much, with {WORDS[len(seeds)]} seeds each",
        f"the {WORDS[len(thresholds) * len(rates)]} algorithms",
        f"At learning rate {low:g} clipping",
        f"At learning rate {high:g} it decides",
        f"Learning rate {high:g} at threshold {thresholds[0]:g} does what {low:g} at {same:g} does",
        "that is 0 on all inputs has no gradient",
    ]


def code(stem):
    return "\n".join(cells(stem, "code"))


def on_tpu():
    counts = sorted({literal("on_tpu", r'"CPU_DEVICES", "(\d+)"'), *map(int, CHIPS)})
    assert counts == [1, 4, 8]  # how tests/test_notebooks.py runs it
    clients, classes = literal("on_tpu", r"if SHORT else (2000)"), literal("on_tpu", r"rng.integers\((\d+)")
    alpha = literal("on_tpu", r"alpha=([\d.]+)")
    return [
        f"A slice such as v5e-{counts[1]} or v5e-{counts[2]} shows {WORDS[counts[1]]} or {WORDS[counts[2]]}",
        "one chip: v5e-1 or v6e-1",
        f"{WORDS[clients].capitalize()} clients, each with some tens of points of {WORDS[classes]} Gaussian classes, and "
        f"not all classes: Dirichlet({alpha:g})",
        f"the closer {WORDS[counts[2]]} chips come to {WORDS[counts[2]]} times the speed",
        f"has run on {counts[0]}, {counts[1]} and {counts[2]} host devices",
    ]


def sweeps():
    digits = fc.data.sources.digits()
    _, held_out = digits.split_clients(literal("sweeps", r"split_clients\(([\d.]+)"), seed=0)
    folds = literal("sweeps", r"folds.clients\(data, (\d+)\)")
    assert (folds, literal("sweeps", r"halving=(\d+)")) == (4, 2)
    return [
        f"the {digits.num_clients} forms on which they were written are the clients. "
        f"{WORDS[held_out.num_clients].capitalize()} forms are held out",
        f"Hold out a quarter of the forms, train on the others, and do that {WORDS[folds]} times",
        f"the mean of {WORDS[folds]} trainings",
    ]


def large_models_lora():
    roles, steps = literal("large_models_lora", r"min\((\d+)"), literal("large_models_lora", r"2 if SHORT else (8)")
    clip = literal("large_models_lora", r"clip_by_global_norm\(([\d.]+)\)")
    return [f"{roles} roles a round, {steps} steps of Adam at each, gradients clipped at norm {clip:g}"]


def choosing_a_clip():
    numbers = tracks.three_numbers().data.examples["a"].tolist()
    optimum, shown = np.mean(numbers), [f"{n:g}".replace("-", "−") for n in numbers]
    pulls = np.linspace(-5, 5, 10_001)
    stops = pulls[np.abs(sum(np.clip(pulls - n, -1, 1) for n in numbers)).argmin()]  # where clipped gradients cancel
    quartic, far, tails, digits = tracks.quartic(4.0), tracks.quartic_far(), tracks.heavy_tails(), tracks.digits()
    starts = [float(far.start(seed)["x"]) for seed in range(200)]
    assert 50 <= min(starts) < 52
    assert 98 < max(starts) <= 100
    (dimensions,) = tails.start(0)["x"].shape
    rules = re.findall(r"^compare\((tracks\.\w+)", code("choosing_a_clip"), re.MULTILINE)
    everybody = fc.data.sources.digits().num_clients
    training = digits.data.num_clients
    folds = {tuple(run.clients.tolist()) for run in digits.tuning}
    assert len({len(fold) for fold in folds}) == 1
    df = inspect.signature(tracks.heavy_tails).parameters["df"].default
    assert QUARTERS == 4
    return [
        "the best trial in each quarter of the threshold's range",
        f"{WORDS[len(dict.fromkeys(rules))]} problems that tell clipping rules apart",
        f"takes {WORDS[len(dict.fromkeys(rules))]} of ClipBench's problems",
        f"{', '.join(shown)}. Each minimises",
        f"has its minimum at {optimum:g}".replace("-", "−"),
        f"At threshold 1 it stops where the clipped pulls balance, a distance of {abs(stops - optimum):.2g} away",
        f"{WORDS[quartic.steps]} local steps, noise on every gradient",
        f"The paper's rate is {literal('choosing_a_clip', r'client_lr.: (0[.]01)')}",
        f"from a start between 50 and 100 in place of {quartic.start(0)['x']:g}",
        f"at the largest that they bear {far.rounds} rounds are too few",
        f"Quadratics in {WORDS[dimensions]} dimensions with Student-t noise of {df} degrees of freedom",
        f"all {WORDS[tails.steps]} steps of `clipped_update`",
        f"{WORDS[training].capitalize()} forms train and {WORDS[everybody - training]} others are measured. Knobs are tuned "
        f"on {WORDS[len(folds)]} folds of the {WORDS[training]}",
    ]


TEXTS = {f.__name__: f for f in (quickstart, on_tpu, sweeps, large_models_lora, choosing_a_clip)}


@pytest.mark.parametrize("stem", [script.stem for script in SCRIPTS])
def test_every_number_of_the_text_is_computed(stem):
    text = " ".join(" ".join(cells(stem, "markdown")).split())
    for claim in TEXTS[stem]():
        assert claim.lower() in text.lower(), claim
        text = re.sub(re.escape(claim), "", text, flags=re.IGNORECASE)
    text = re.sub(r"`[^`]*`|\$[^$]*\$", "", text)  # code and formulas
    assert re.findall(rf".{{0,30}}(?:\d|{COUNTED}).{{0,30}}", text, re.IGNORECASE) == []


# The first cell


def first_cell(stem):
    return cells(stem, "code")[0]


def test_all_notebooks_begin_alike():
    assert len({first_cell(script.stem) for script in SCRIPTS}) == 1


class Runtime:
    """A machine as the first cell sees it; ``commands`` are those that it runs."""

    def __init__(self, directory, monkeypatch, packages=(), modules=(), driver="", chips=()):
        self.commands = []
        named = [types.SimpleNamespace(name=name, version=version) for name, version in dict(packages).items()]
        spec = types.SimpleNamespace(origin="somewhere")
        have = {*modules}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name in have else None)
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: named)
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
        devices, real = {"/dev/vfio/[0-9]*": list(chips), "/dev/accel*": []}, glob.glob
        monkeypatch.setattr(glob, "glob", lambda pattern: devices.get(pattern) or real(pattern))

        def run(command, **options):
            if command[0] == "git":
                (directory / command[-1] / "fedjax_clip").mkdir(parents=True)
            elif command[0] != "nvidia-smi":
                have.update(["fedjax_clip", "optax"])
            self.commands += [command] if command[0] != "nvidia-smi" else []
            return types.SimpleNamespace(stdout=f"{driver}\n")

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.chdir(directory)

    def start(self, repository=""):
        source = first_cell("quickstart")
        assert source.count('REPOSITORY = ""') == 1
        exec(source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), {})
        *others, (*_, wanted) = [[*c[:5], c[5:]] if c[0] == sys.executable else c for c in self.commands] or [[[]]]
        return others, wanted


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    (tmp_path / "content").mkdir()
    return functools.partial(Runtime, tmp_path / "content", monkeypatch)


def clone(path):
    (path / "fedjax_clip").mkdir(parents=True)
    (path / "fedjax_clip/__init__.py").touch()
    return path


def test_an_installed_package_is_taken_as_it_is(runtime):
    assert runtime(modules=["fedjax_clip", "optax"]).start() == ([], [])


def test_a_wheel_that_was_uploaded(runtime, tmp_path):
    for version in ("0.1.0", "0.2.0"):
        (tmp_path / f"content/fedjax_clip-{version}-py3-none-any.whl").touch()
    newest = (tmp_path / "content/fedjax_clip-0.2.0-py3-none-any.whl").as_uri()
    assert runtime().start() == ([], [f"fedjax_clip[experiments] @ {newest}"])


@pytest.mark.parametrize("place", ["fedjax_clip", "..", "other"])
def test_a_clone_beside_the_notebook(runtime, tmp_path, place):
    there = clone((tmp_path / "content" / place).resolve())
    machine = runtime()
    assert machine.start() == ([], [f"fedjax_clip[experiments] @ {there.as_uri()}"])
    assert [os.path.realpath(p) for p in sys.path] == [str(there)]


def test_an_address_in_one_variable(runtime, tmp_path):
    others, wanted = runtime().start("https://example.org/fedjax_clip.git")
    assert others == [["git", "clone", "--quiet", "--depth=1", "https://example.org/fedjax_clip.git", "clone"]]
    assert wanted == [f"fedjax_clip[experiments] @ {(tmp_path / 'content/clone').as_uri()}"]


def test_nothing_is_said_in_a_sentence(runtime):
    with pytest.raises(RuntimeError, match="write the repository's address into REPOSITORY"):
        runtime().start()


@pytest.mark.parametrize(
    ("machine", "jax"),
    [
        ({"packages": {"jax": "0.10.2"}}, []),
        ({"packages": {"jax": "0.10.2", "jax_cuda12_plugin": "0.10.2"}, "driver": "550.54.15"}, []),
        ({"packages": {"jax": "0.9.2", "jax-cuda12-plugin": "0.9.2"}, "driver": "550.54.15"}, ["jax[cuda12]>=0.10"]),
        ({"packages": {"jax": "0.10.2"}, "driver": "580.82.07"}, ["jax[cuda13]>=0.10"]),
        ({"packages": {}, "driver": "NVIDIA-SMI has failed"}, []),
        ({"packages": {"jax": "0.12.0.1", "libtpu": "0.0.30"}, "chips": ["/dev/vfio/0"]}, []),
        ({"packages": {"jax": "0.10.2"}, "chips": ["/dev/vfio/0"]}, ["jax[tpu]>=0.10"]),
    ],
)
def test_jax_is_installed_for_an_accelerator_only_where_it_is_missing(runtime, tmp_path, machine, jax):
    clone(tmp_path / "content/clone")
    assert runtime(**machine).start()[1][1:] == jax
