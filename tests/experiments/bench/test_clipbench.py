"""ClipBench as its user meets it: the binary, its report, what it runs again and what it refuses."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import optax
import pytest
from generated import write_fashion_mnist

import fedjax_clip as fc
from experiments.bench import clip as clipbench
from experiments.bench import tracks
from experiments.bench.core import grid, lanes, problem
from experiments.bench.core.results import Results
from experiments.bench.core.rule import Rule
from experiments.bench.core.tuning import Range
from experiments.bench.rules import RULES
from experiments.config import outside
from fedjax_clip.clipping import shapes

REPOSITORY = pathlib.Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def compiled_as_all_tests_are(monkeypatch, unrendered):
    monkeypatch.setattr(lanes, "FAST", {})


def test_a_new_rule_is_in_the_report_by_itself_and_nothing_runs_twice(tmp_path, monkeypatch):
    def half(loss, point):
        return RULES["celgc"].build(loss, point | {"threshold": point["threshold"] / 2})

    monkeypatch.setitem(RULES, "half", Rule(half, note="half of the threshold"))
    arguments = {"tracks": ["three_numbers"], "rules": ["celgc", "half"], "trials": 4, "quick": True}
    assert clipbench.bench(workdir=tmp_path, **arguments) == 2
    report = (tmp_path / "report.md").read_text()
    assert [line for line in report.splitlines() if "| half |" in line and "half of the threshold" in line]
    assert (tmp_path / "three_numbers.png").read_bytes().startswith(b"\x89PNG")

    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    halved, celgc = json.loads(lines[1]), json.loads(lines[0])
    assert halved["rule"] == "half"
    assert halved["trials"] != celgc["trials"]
    assert len(halved["trials"]) == len(celgc["trials"]) == 4
    assert clipbench.bench(workdir=tmp_path, **arguments) == 0
    assert (tmp_path / "results.jsonl").read_text() == "".join(lines)
    assert (tmp_path / "report.md").read_text() == report

    (tmp_path / "results.jsonl").write_text(lines[0] + lines[1][:-20])  # killed while it wrote
    assert clipbench.bench(workdir=tmp_path, **arguments, should_stop=lambda: True) == 0
    assert clipbench.bench(workdir=tmp_path, **arguments) == 1
    again = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert again[1]["measured"] == halved["measured"]
    shorter = dataclasses.replace(tracks.three_numbers(rounds=30), measuring=problem.MEASURING[:3], trials=4)
    cells = grid.cells(problem.sized([shorter], 2), {"celgc": RULES["celgc"]})  # of other numbers
    found = grid.fill(Results(tmp_path), cells)
    assert (found.done, len(found.entries[0]["trials"])) == (1, 2)


def test_what_has_changed_runs_again(tmp_path, monkeypatch):
    """A rule that computes something else, be it for its entry or for the library; data; but not a note."""

    def run_again():
        return clipbench.bench(["three_numbers"], ["celgc"], 2, tmp_path, quick=True)

    celgc, hard = RULES["celgc"], shapes.hard
    assert run_again() == 1
    monkeypatch.setitem(RULES, "celgc", dataclasses.replace(celgc, note="other words", passes=2))
    assert run_again() == 0
    monkeypatch.setattr(shapes, "hard", lambda: lambda norm, threshold: 0.9 * hard()(norm, threshold))
    assert (run_again(), run_again()) == (1, 0)
    monkeypatch.setattr(shapes, "hard", lambda: lambda norm, threshold: 0.8 * hard()(norm, threshold))
    assert run_again() == 1
    monkeypatch.setitem(tracks.TRACKS, "three_numbers", lambda: [tracks.three_numbers((3, -3, -4))])
    assert run_again() == 1


def row_of(report, track, rule):
    """Its cells, by the head of the table."""
    section = report[report.index(f"## {track}\n") :]
    head = next(line for line in section.splitlines() if line.startswith("| rank |"))
    line = re.search(rf"^\| [^|]* \| {rule} \|.*$", section, re.M).group()
    return dict(zip(*([cell.strip() for cell in re.split(r"(?<!\\)\|", x)[1:-1]] for x in (head, line)), strict=True))


def test_digits_are_learnt_with_a_clip_and_without(tmp_path):
    clipbench.bench(["digits"], ["celgc", "fedavg"], 4, tmp_path, quick=True)
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"^\| digits \| (celgc|fedavg) \|", report, re.M)
    for rule in ("celgc", "fedavg"):
        row = row_of(report, "digits", rule)
        assert float(row["accuracy"].split()[0]) > 0.6, row  # chance is 0.1
        assert row["B up"] == row["B down"] == "38,440"


def test_fashion_mnist_is_a_track_where_it_is_there(tmp_path, monkeypatch, capsys):
    read = fc.data.sources.fashion_mnist
    monkeypatch.setattr(fc.data.sources, "fashion_mnist", functools.partial(read, directory=tmp_path))
    few = {name: tracks.TRACKS[name] for name in ("three_numbers", "fashion_mnist")}
    monkeypatch.setattr(clipbench, "TRACKS", few)
    with pytest.raises(fc.InvalidInput, match="apt-get install dataset-fashion-mnist"):
        clipbench.bench(["fashion_mnist"], ["celgc"], 2, tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()
    assert clipbench.bench(None, ["celgc"], 2, tmp_path / "out", quick=True) == 1
    missing = [line for line in capsys.readouterr().err.splitlines() if "Without the track fashion_mnist" in line]
    assert len(missing) == 1
    assert "apt-get install dataset-fashion-mnist" in missing[0]

    for split in ("train", "t10k"):
        write_fashion_mnist(tmp_path, split, 200)
    assert clipbench.bench(None, ["celgc"], 2, tmp_path / "out", quick=True) == 1
    assert row_of((tmp_path / "out" / "report.md").read_text(), "fashion_mnist", "celgc")


def test_what_diverges_is_shown(tmp_path, monkeypatch):
    def of(low, high):
        return Rule(
            lambda loss, p: fc.fedavg(loss, optax.sgd(p["client_lr"])), ("client_lr",), {"client_lr": Range(low, high)}
        )

    monkeypatch.setattr(clipbench, "RULES", {"blow_up": of(0.01, 1e5), "never": of(1e3, 1e5)})
    clipbench.bench(["three_numbers"], ["blow_up", "never"], 4, tmp_path, quick=True)
    report = (tmp_path / "report.md").read_text()
    assert (row_of(report, "three_numbers", "never")["distance"], report.count("nobody")) == ("diverged in 2 of 2", 0)
    rows = {name: row_of(report, "three_numbers", name) for name in ("blow_up", "never")}
    assert (rows["never"]["rank"], rows["never"]["failed"], rows["blow_up"]["rank"]) == ("–", "4 of 4", "1")
    summary = next(line for line in report.splitlines() if line.startswith("| three_numbers |"))
    assert summary.startswith("| three_numbers | blow_up |")
    assert summary.endswith("| never |")


@pytest.mark.parametrize(
    ("flag", "culprit"),
    [
        ("--rules=celgc,episod", "episod"),
        ("--tracks=quartics", "quartics"),
        ("--trials=0", "--trials"),
        ("--trials=5", "even"),
    ],
)
def test_bad_input_ends_in_a_sentence(flag, culprit, tmp_path):
    if flag.startswith("--rules"):
        command = [sys.executable, "-m", "experiments.bench.clip", flag, f"--workdir={tmp_path / 'out'}"]
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert culprit in done.stderr
        assert "did you mean 'episode'?" in done.stderr
        assert not (tmp_path / "out").exists()
        return
    name, value = flag[2:].split("=")
    arguments = {"tracks": ["quartic"], "rules": ["celgc"], "trials": 2}
    with pytest.raises(fc.InvalidInput, match=culprit):
        clipbench.bench(**(arguments | {name: [value] if name == "tracks" else int(value)}), workdir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(fc.InvalidInput, match="cannot be written"):
        clipbench.bench(["quartic"], ["celgc"], 2, tmp_path / "file" / "out")
    (tmp_path / "results.jsonl").write_text("not a result\n")
    with pytest.raises(fc.InvalidInput, match="something else"):
        clipbench.bench(["quartic"], ["celgc"], 2, tmp_path)


def test_the_advice_quotes_the_report():
    """``track rule value`` in docs/choosing-a-clip.md is what docs/clipbench/report.md says.

    ``track rule COLUMN=value`` is another cell of the row, ``track rule@from–to value`` the best trial of a quarter.
    """
    text = " ".join((REPOSITORY / "docs" / "choosing-a-clip.md").read_text().split())
    report = (REPOSITORY / "docs" / "clipbench" / "report.md").read_text()
    value = r"[≤ \d.e+-]+|\d+ of \d+|diverged in \d+ of \d+"
    quoted = re.findall(rf"`([a-z_]+(?:, H=\d)?) ([a-z_0-9]+)(@[\d.–]+)?(?: ([a-z_B ]+)=)? ?({value})`", text)
    assert len(quoted) > 40
    names = {name.split(",")[0] for name in tracks.TRACKS}
    spans = [span for span in text.split("`")[1::2] if re.match(r"[a-z_]+(, H=\d)? [a-z]", span)]
    of_tracks = [span for span in spans if re.split("[, ]", span)[0] in names]
    assert len(quoted) == len(of_tracks), of_tracks
    for track, rule, quarter, column, value in quoted:
        row = row_of(report, track, rule)
        if quarter:
            pairs = list(row.values())[-1].split(", ")
            assert f"{quarter[1:]}: {value}" in pairs, (track, rule, quarter)
        elif column:
            assert row[column] == value, (track, rule, column)
        else:
            found = list(row.values())[2].split(" [")[0]
            assert found == value, (track, rule, found)


OWN = """
import fedjax_clip as fc
import optax


def fedexp(loss, client_tx, server_tx=None):
    \"\"\"FedAvg under another name.\"\"\"
    return fc.fedavg(loss, client_tx, server_tx)


def ditto(loss, client_tx, server_tx=None):
    return fc.personal.ditto(loss, client_tx, server_tx, strength=0.1)


def halved(threshold):
    return fc.clipping.clip_by_global_norm(threshold / 2)


def link(threshold):
    return fc.uplink.clip_by_global_norm(threshold)


def stepwise(loss, point):
    clip = fc.clipping.clip_by_global_norm(point["threshold"])
    return fc.fedavg(loss, optax.chain(clip, optax.sgd(point["client_lr"])))


def number(threshold):
    return fc.clipping.clip_by_global_norm(float(threshold))


def nothing(threshold):
    return 3


def stranger(a, b):
    return a
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module from outside of the repository, imported by ``--import=my_own_rules``."""
    (tmp_path / "my_own_rules.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(outside, "modules", lambda: ["my_own_rules"])
    yield
    sys.modules.pop("my_own_rules", None)


def test_rules_of_ones_own_are_tuned_and_reported_like_the_others(own, tmp_path):
    names = ["celgc", *(f"my_own_rules.{name}" for name in ("fedexp", "halved()", "link", "stepwise"))]
    assert clipbench.bench(["three_numbers"], names, None, tmp_path / "out", quick=True) == 5
    report = (tmp_path / "out" / "report.md").read_text()
    rows = {name: row_of(report, "three_numbers", re.escape(name)) for name in names}
    assert rows["my_own_rules.fedexp"]["clips"] == "FedAvg under another name."
    tuned = {
        name: [knob for knob in ("client_lr", "threshold", "server_lr") if row[knob] != "–"]
        for name, row in rows.items()
    }
    assert list(map(len, tuned.values())) == [2, 2, 2, 3, 2]
    assert "server_lr" in tuned["my_own_rules.fedexp"]
    assert rows["my_own_rules.stepwise"]["distance"] == rows["celgc"]["distance"]  # the same clip in other words
    assert rows["my_own_rules.halved()"]["distance"] != rows["celgc"]["distance"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("my_own_rules.number", "my_own_rules.number makes a Python number of a knob"),
        ("my_own_rules.stranger", r"or \(threshold\), not \(a, b\)"),
        ("my_own_rules.ditto", "the clients of ditto use models of their own: compare them by fc.sweep"),
        ("my_own_rules.nothing", "GradientTransformation or Uplink, not int"),
        ("my_own_rules.row_of", "has no row_of"),
        ("others.rule", "--import=others"),
    ],
)
def test_a_rule_of_ones_own_that_is_none_is_one_sentence(own, name, sentence, tmp_path):
    with pytest.raises(fc.InvalidInput, match=sentence):
        clipbench.bench(["three_numbers"], [name], 2, tmp_path / "out", quick=True)
