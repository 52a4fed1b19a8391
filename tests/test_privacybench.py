"""PrivacyBench on very little: it runs, resumes, and says what its noise is worth."""

import json
import math

import generated
import numpy as np
import pytest

import fedjax_clip as fc
from experiments import privacybench


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    generated.install(tmp_path / "generated", monkeypatch)


def test_a_quick_bench_writes_a_page_and_finds_it_again(pictures, tmp_path):
    names, epsilons = ["tree", "records"], [2.0, math.inf]
    assert privacybench.bench(names, epsilons, 2, tmp_path / "bench", quick=True) == 2
    page = (tmp_path / "bench" / "report.md").read_text()
    assert "ε = 2 | ε = none" in page
    assert all(f"| {name} |" in page for name in names)
    assert (tmp_path / "bench" / "accuracy.png").stat().st_size > 1000
    entries = [json.loads(line) for line in (tmp_path / "bench" / "results.jsonl").read_text().splitlines()]
    assert [np.shape(entry["accuracy"]) for entry in entries] == [(2, 2)] * 2
    assert privacybench.bench(names, epsilons, 2, tmp_path / "bench", quick=True) == 0


@pytest.mark.parametrize("name", privacybench.MECHANISMS)
def test_each_mechanisms_noise_is_worth_its_epsilon(pictures, name):
    """By the library's own accounting of what is built, not of what the bench meant."""
    private, track = privacybench.MECHANISMS[name], privacybench.problem(quick=True)
    sampler, clients, delta = private.sampler(track.cohort_size), track.data.num_clients, 1e-2
    z = private.noise(2.0, privacybench.sampled_by(track, private), delta)
    if name == "records":
        spent = fc.privacy.record_epsilons(z, track.data, track.work, sampler, track.rounds, delta).max()
    elif name == "local":  # any change of a client's data moves its update by twice the bound
        spent = fc.privacy.epsilon(z / 2, sampler, clients, track.rounds, delta)
    elif name in ("discrete gaussian", "skellam"):
        link = private.link(z, track)
        curve = fc.privacy.distributed(link, track.start(0), privacybench.reducer(link, track))
        spent = fc.privacy.epsilon(curve, sampler, clients, track.rounds, delta)
    else:
        link = private.link(z, track)
        both = fc.privacy.together(link.promises.noise_multipliers)
        spent = fc.privacy.epsilon(both, sampler, clients, track.rounds, delta, mechanism=link.promises.mechanism)
    assert 1.99 < spent <= 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"names": ["gausian"]}, "unknown 'gausian'"),
        ({"seeds": 0}, "--seeds"),
        ({"epsilons": [0.0]}, "--epsilons"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, sentence, tmp_path):
    given = {"names": ["tree"], "epsilons": [1.0], "seeds": 1, "workdir": tmp_path / "new"} | options
    with pytest.raises(fc.InvalidInput, match=sentence):
        privacybench.bench(**given)
    assert not (tmp_path / "new").exists()
