"""PrivacyBench on very little: it runs, resumes, and says what its noise is worth."""

import json
import math
import pathlib

import generated
import pytest

import fedjax_clip as fc
from experiments.bench import privacy as privacybench
from experiments.bench.mechanisms import MECHANISMS, sampled_by

DOCS = pathlib.Path(__file__).parents[3] / "docs"
REPLAYED = ("gaussian in bins", "bands in bins")  # solved to 1e-2


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    generated.install(tmp_path / "generated", monkeypatch)


def test_a_quick_bench_tunes_writes_a_page_and_finds_it_again(pictures, tmp_path):
    names, epsilons = ["tree", "records"], [2.0, math.inf]
    assert privacybench.bench(names, epsilons, None, tmp_path / "bench", quick=True) == 4
    page = (tmp_path / "bench" / "report.md").read_text()
    assert "ε = 2 | ε = none" in page
    assert all(f"| {name} |" in page for name in names)
    assert (tmp_path / "bench" / "accuracy.png").stat().st_size > 1000
    entries = [json.loads(line) for line in (tmp_path / "bench" / "results.jsonl").read_text().splitlines()]
    assert [len(entry["trials"]) for entry in entries] == [4] * 4  # alike for all
    assert {entry["rule"] for entry in entries} == {f"{name}, epsilon {e:g}" for name in names for e in epsilons}
    assert all(set(entry["best"]) == {"client_lr", "threshold"} for entry in entries)
    assert [entry["config"]["fixed"]["noise"] > 0 for entry in entries] == [True, False] * 2
    assert privacybench.bench(names, epsilons, None, tmp_path / "bench", quick=True) == 0


def test_trials_are_not_judged_on_what_the_result_is(pictures):
    track = privacybench.problem(quick=True)
    assert not {run.seed for run in track.tuning} & {run.seed for run in track.measuring}
    pages = [set(map(bytes, runs[0].judged["x"])) for runs in (track.tuning, track.measuring)]
    trained = set(map(bytes, track.data.examples["x"]))
    assert not pages[0] & (pages[1] | trained)


@pytest.mark.parametrize("name", MECHANISMS)
def test_each_mechanisms_noise_is_worth_its_epsilon(pictures, name):
    """By the library's own accounting of the very algorithm, not of what the bench meant."""
    private, track = MECHANISMS[name], privacybench.problem(quick=True)
    sampler, clients, delta = private.sampler(track.cohort_size), track.data.num_clients, 1e-2
    z = private.noise(2.0, sampled_by(track, private), delta)
    run = {"num_clients": clients, "rounds": track.rounds, "delta": delta}
    algorithm = private.algorithm(track.loss, {"client_lr": 0.5, "threshold": 1.0, "noise": z}, track)
    if name == "records":
        spent = fc.privacy.record_epsilons(z, track.data, track.work, sampler, track.rounds, delta).max()
    elif name == "local":  # any change of a client's data moves its update by twice the bound
        spent = fc.privacy.epsilon(z / 2, sampler, **run)
    else:
        spent = fc.privacy.epsilon(algorithm, sampler, params=track.start(0), **run)
    assert (1.9 if name in REPLAYED else 1.99) < spent <= 2


def test_the_page_of_privacy_quotes_the_report():
    """Accuracies at epsilon 1, and without noise."""
    report, page = ((DOCS / name).read_text() for name in ("privacybench/report.md", "privacy.md"))
    rows = {cells[1].strip(): cells for line in report.splitlines() if "±" in line for cells in [line.split("|")]}
    head = next(line for line in report.splitlines() if line.startswith("| mechanism | epsilon is for")).split("|")
    at = {name: head.index(f" ε = {name} ") for name in ("1", "none")}
    quoted = [line for line in page[page.index("## The cost of privacy") :].splitlines() if line.startswith("| `")]
    names = [line.split("`")[1] for line in quoted]
    assert set(names) == set(MECHANISMS) - set(privacybench.SLOW) == set(rows)
    for name, line in zip(names, quoted, strict=True):
        assert line.split("|")[-2].strip() == rows[name][at["1"]].strip()
    assert f"(none: {rows['gaussian'][at['none']].split()[0]})" in page

    def ends(name):
        centre, half = map(float, rows[name][at["1"]].split("±"))
        return centre - half, centre + half

    in_turn = ends("gaussian in turn")
    for better in ("banded", "banded inverse", "blt", "gaussian in bins", "gaussian"):
        assert ends(better)[0] > in_turn[1]  # what the page says of them
    for no_better in ("tree", "bands in bins"):
        assert ends(no_better)[0] < in_turn[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"names": ["gausian"]}, "did you mean 'gaussian'"),
        ({"trials": 3}, "even number"),
        ({"epsilons": [0.0]}, "--epsilons"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, sentence, tmp_path):
    given = {"names": ["tree"], "epsilons": [1.0], "trials": None, "workdir": tmp_path / "new"} | options
    with pytest.raises(fc.InvalidInput, match=sentence):
        privacybench.bench(**given)
    assert not (tmp_path / "new").exists()
