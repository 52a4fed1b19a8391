"""The page of run directories: what it says, that it needs nothing else, and what it refuses."""

import functools
import html.parser
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest

from experiments.config import rundir
from experiments.page import page, panels, results, svg
from fedjax_clip import plots
from fedjax_clip.data import partition
from fedjax_clip.data.population import FederatedData

REPOSITORY = pathlib.Path(__file__).parents[2]
ACCURACIES = np.array([0.9, np.nan, 0.2, 1.0, 0.5, 0.8, 0.7, 0.6, 0.95, 0.85, 0.3, 0.4])  # client 1 has no finite one


def make(directory, rows=(), **config):
    """A run directory of three rounds, as ``experiments.run`` leaves it."""
    directory.mkdir(parents=True)
    config = {"task": "digits", "algorithm": "fedavg", "client": "sgd(0.1)", "seed": 0} | config
    record = {"config": config, "about": "12 clients", "versions": {"jax": "0.10"}, "devices": ["cpu:0"]}
    (directory / "config.json").write_text(json.dumps(record))
    row = {"loss": 2.0, "clients": 4.0, "dropped": 1.0, "bytes_down": 2e6, "bytes_up": 1e6, "seconds": 0.5}
    row |= {"clipped_steps": 0.25, "step_threshold": 1.0, "update_norm": 0.1, "simulated_seconds": 100.0}
    rows = rows or [
        {"round": r, **row, "simulated_seconds": 100.0 * r} | ({} if r == 2 else {"eval/clients/accuracy": 0.3 * r})
        for r in (1.0, 2.0, 3.0)
    ]
    (directory / "metrics.jsonl").write_text("".join(rundir._line(row) for row in rows) + '{"round": 4, "lo')
    names = np.array([f"c{i}" for i in range(12)])
    scores = {"clients/accuracy": ACCURACIES, "clients/client": names, "clients/examples": np.arange(12)}
    np.savez(directory / "clients.npz", **scores)
    return directory


@pytest.fixture
def cli(binaries):
    return functools.partial(binaries, "report")


class Reader(html.parser.HTMLParser):
    """Collects tags, addresses and text; fails on tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_says_what_the_run_did_and_needs_nothing_else(cli, tmp_path):
    directory = make(tmp_path / "run", cohort_size=None, uplink="")
    assert cli(directory) == (0, f"wrote {directory / 'report.html'}\n", "")
    text = (directory / "report.html").read_text()
    reader = Reader(text)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert reader.addresses == []
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        xml.etree.ElementTree.fromstring(drawing)
    words = "|".join(reader.words)
    for expected in (
        "accuracy, held-out clients|0.900",
        "updates dropped|3",
        "sent, both ways|9.00 MB",
        "training time|1.50 s",
        "simulated time|5.00 minutes",
        "12 clients",
        "nan (c1)|1.00 (c3)",  # the worst and the best client
        "15|400 kB|200 kB|6.00 MB|3.00 MB",  # clients asked; down and up, a client and in all
        "fraction clipped",
        "accuracy against simulated time",
        "--client|sgd(0.1)",
        "--cohort_size|by default|--uplink|–",
    ):
        assert expected in words, expected


def test_several_runs_are_named_by_the_setting_in_which_they_differ(cli, tmp_path):
    runs = [make(tmp_path / name / "run", client=client) for name, client in (("a", "sgd(0.1)"), ("b", "sgd(3.0)"))]
    assert [run.name for run in results.load(runs)] == ["sgd(0.1)", "sgd(3.0)"]
    runs.append(make(tmp_path / "c" / "other", client="sgd(3.0)", seed=1))
    assert [run.name for run in results.load(runs)] == list(map(str, runs))
    assert [run.name for run in results.load([runs[0], runs[2]])] == ["run", "other"]
    assert cli(*runs, "--out=all.html")[0] == 0
    reader = Reader((tmp_path / "all.html").read_text())
    assert "3 runs compared" in reader.words
    assert [word.strip() for word in reader.words].count(str(runs[0])) > 5
    assert cli(*runs, "--out=all.html")[0] == 0  # a page may be made again


def test_what_a_run_was_told_is_text(tmp_path):
    text = page.build(results.load([make(tmp_path / "run", task="<script>alert(1)</script>", client="a & b")]))
    assert "script" not in Reader(text).tags
    assert "a & b" in Reader(text).words


def test_a_page_explains_the_scores_that_it_has(tmp_path):
    rows = [{"round": 1.0, "loss": 1.0, "clients": 1.0, "seconds": 1.0, "eval/examples/ece_mean": 0.1}]
    text = page.build(results.load([make(tmp_path / "run", rows)]))
    assert "ece: expected calibration error, 0 at best." in text
    assert "auroc" not in text


def with_clients(directory, auroc, **config):
    """A run whose held-out clients have a loss, an accuracy and an AUROC, some without the latter."""
    make(directory, **config)
    auroc = np.array(auroc)
    scores = {"loss": np.linspace(0.1, 1, len(auroc)), "accuracy": np.linspace(1, 0, len(auroc)), "auroc": auroc}
    scores |= {"client": np.array([f"<h{i}>" for i in range(len(auroc))]), "examples": 10 + np.arange(len(auroc))}
    np.savez(directory / "clients.npz", **{f"clients/{name}": x for name, x in scores.items()})
    return directory


def rows_of(text, title):
    """The cells of the table under a title, row by row."""
    part = text[text.index(title) :]
    part = part[: part.index("</table>")]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)]


def test_each_client_has_a_row_and_the_worst_stands_first(tmp_path):
    found = [0.9, np.nan, 0.4, 0.7]
    plain, chosen = (
        with_clients(tmp_path / "a", found),
        with_clients(tmp_path / "b", found, metric="clients/auroc_worst"),
    )
    text = page.build(results.load([plain]))
    rows = rows_of(text, "Each client of held-out clients by accuracy")
    assert rows[0] == ["client", "examples", "accuracy", "auroc", "loss"]
    assert rows[1] == ["&lt;h3&gt;", "13", "0", "0.700", "1.00"]
    text = page.build(results.load([chosen]))
    rows = rows_of(text, "Each client of held-out clients by auroc")
    assert rows[0] == ["client", "examples", "auroc", "accuracy", "loss"]
    assert [row[0][4:6] for row in rows[1:]] == ["h2", "h3", "h0", "h1"]
    assert rows[-1][2] == "–"  # one class: it has no AUROC, and is not the worst
    summary = rows_of(text, "<th>set</th>")[-1]
    assert summary[:4] == ["held-out clients", "auroc", "3 of 4", "0.667"]
    both = rows_of(page.build(results.load([plain, chosen])), "Each client of held-out clients by accuracy")
    assert both[0] == ["client", "examples", "metric=–", "clients/auroc_worst"]
    assert both[1] == ["&lt;h3&gt;", "13", "0", "0"]


def test_of_many_clients_the_worst_have_a_row(tmp_path):
    text = page.build(results.load([with_clients(tmp_path / "a", np.linspace(0, 1, 80), metric="clients/auroc")]))
    rows = rows_of(text, "Each client of held-out clients by auroc, the worst 50 of 80")
    assert len(rows) == 51
    assert rows[50][:3] == ["&lt;h49&gt;", "59", "0.620"]


def test_the_metric_of_a_run_comes_first(tmp_path):
    scores = {"eval/examples/accuracy": 0.9, "eval/examples/auroc": 0.8}
    scores |= {"eval/clients/auroc_worst": 0.6, "eval/examples/auroc_worst": 0.7}
    rows = [{"round": 1.0, "loss": 1.0, "clients": 1.0, "seconds": 1.0, "bytes_up": 1.0} | scores]
    for metric, first in (("clients/auroc_worst", "auroc_worst"), (None, "accuracy")):
        text = page.build(results.load([make(tmp_path / first, rows, metric=metric)]))
        assert re.search(r"<dt>(.*?)</dt>", text)[1].startswith(f"{first}, held-out")
        assert re.search(r"<figcaption>(.*?)</figcaption>", text)[1] == first.removesuffix("_worst")
        assert ("auroc_worst, held-out examples" in text) == (
            first == "auroc_worst"
        )  # else it is in the clients' table
        assert "held-out clients, worst client" in text
        assert f"{first} against bytes sent" in text
    assert list(panels.evaluated(results.load([tmp_path / "auroc_worst"]))["auroc_worst"]) == ["clients", "examples"]


def test_the_worst_tenth_is_of_the_clients_served_worst():
    many = np.linspace(0, 1, 40)
    assert results.worst_tenth(many, "accuracy") == pytest.approx(many[:4].mean())
    assert results.worst_tenth(many, "loss") == pytest.approx(many[-4:].mean())
    assert results.worst_tenth(np.array([0.4, 0.2]), "accuracy") == 0.2
    assert results.worst_first(ACCURACIES, "accuracy")[:3].tolist() == [1, 2, 10]
    assert np.isnan(results.worst_tenth(ACCURACIES, "accuracy"))
    assert results.worst_tenth(many, "f1") == results.worst_tenth(many, "auroc") == many[:4].mean()
    assert results.worst_tenth(many, "ece") == many[-4:].mean()


def test_points_lie_where_their_values_are():
    line = svg.Line("a", np.array([0.0, 5, 10]), np.array([0.0, 1, 4]), "c0", True)
    drawing = svg.chart("t", [line], "x", "y", x_range=(0, 20))
    path = re.findall(r'class="line c0" d="M([\d. L-]+)"', drawing)[-1]
    points = np.array([[float(v) for v in p.split()] for p in path.split("L")])
    across, base = svg.WIDTH - svg.LEFT - svg.RIGHT, svg.HEIGHT - svg.BOTTOM
    np.testing.assert_allclose(points[:, 0], svg.LEFT + across * np.array([0, 0.25, 0.5]), atol=0.06)
    room = (base - svg.TOP) / 1.08  # 4% at both ends
    np.testing.assert_allclose(points[:, 1], base - room * (0.04 + np.array([0, 0.25, 1])), atol=0.06)
    logarithmic = svg.chart("t", [line._replace(y=np.array([0.0, 1, 100]))], "x", "y", log=True)
    assert re.findall(r'"end">([\d.]+)</text>', logarithmic) == ["1", "10", "100"]
    assert logarithmic.count("<circle") == 2  # zero has no place on it
    assert svg.chart("t", [line._replace(y=np.full(3, np.nan))], "x", "y") == ""


def test_a_long_line_keeps_its_spikes():
    y = np.random.default_rng(0).normal(size=100_000)
    y[[777, 60_000]] = 50, -50
    kept = svg.thinned(y)
    assert len(kept) <= svg.MOST_POINTS + 2
    assert {0, 777, 60_000, 99_999} <= set(kept.tolist())


@pytest.mark.parametrize("value", [0, 1, 999.6, 1500, 0.9, 0.0123, 2.5e-7, 3.2e9, -4.5, np.nan, np.inf])
def test_numbers_are_written_to_three_digits(value):
    assert float(svg.number(value)) == pytest.approx(value, rel=5e-3, nan_ok=True)
    assert len(svg.number(value)) <= 8


def assert_refused(outcome, *words):
    code, out, err = outcome
    assert (code, out, err.count("\n")) == (2, "", 1), outcome
    assert err.startswith("error: ")
    for word in words:
        assert word in err


NAMES, SIZES = np.array(["a", "b"]), np.ones(2)
SCORES = {
    "without_names": {"clients/accuracy": SIZES},
    "of_pairs": {"clients/accuracy": np.ones((2, 2)), "clients/client": NAMES, "clients/examples": SIZES},
    "of_words": {"clients/accuracy": NAMES, "clients/client": NAMES, "clients/examples": SIZES},
    "of_nobody": {"clients/accuracy": SIZES[:0], "clients/client": NAMES[:0], "clients/examples": SIZES[:0]},
    "without_scores": {"clients/client": NAMES, "clients/examples": SIZES},
    "named_by_pairs": {name: np.ones((1, 1)) for name in ("clients/accuracy", "clients/client", "clients/examples")},
    "of_truths": {"clients/accuracy": SIZES > 0, "clients/client": NAMES, "clients/examples": SIZES},
}


def test_odd_rows_make_a_page(tmp_path):
    row = {"round": 1.0, "loss": 1e308, "seconds": 1e308, "clients": 1e308, "eval/x": 1.0, "eval/a/b/c/d": 1.0}
    row |= {"eval//": 3.0, "eval/examples/": 4.0, "": 5.0, "client_norm/p": 6.0, "accuracy/": 1e-320}
    assert "training time" in Reader(page.build(results.load([make(tmp_path / "run", [row])]))).words


def test_infinite_scores_make_a_page(tmp_path):
    endless = np.where(np.arange(12) % 2, np.inf, -np.inf)
    names = {"clients/client": np.array([f"c{i}" for i in range(12)]), "clients/examples": np.arange(12)}
    np.savez(make(tmp_path / "run") / "clients.npz", **{"clients/loss": endless} | names)
    page.write(tmp_path / "report.html", [tmp_path / "run"])
    assert any("(c" in word for word in Reader((tmp_path / "report.html").read_text()).words)


def test_names_that_are_no_mathematics_and_no_utf_8_are_drawn(cli, tmp_path):
    title = "csv('a$b$\udcff.csv', target='$\\\\frac{')"
    directory = make(tmp_path / "run", task=title)
    assert cli(directory)[0] == 0
    assert "csv(&#x27;a$b$\\udcff.csv&#x27;" in (directory / "report.html").read_text(encoding="utf-8")
    rows = results.load([directory])[0].rows
    for figure in (plots.curves(rows, title), plots.clipping(rows, title)):
        figure.savefig(io.BytesIO(), format="png")
        assert figure.get_suptitle().replace("\\$", "$").startswith("csv('a$b$")
    data = FederatedData({"y": np.array([0, 1])}, [0, 1, 2], ["$a$", "b$_{"])
    partition.plot(data).savefig(io.BytesIO(), format="png")
    points = {"lr": np.array([1.0, 2.0])}
    plots.sweep(points, {0: [1.0], 1: [2.0]}, "eval/examples/loss", title).savefig(io.BytesIO(), format="png")


def test_fractions_have_an_axis_from_0_to_1_and_metrics_have_words(tmp_path):
    rows = [{"round": r, "clipped_steps": 0.0, "uplink/1/clipped": 1.0, "client_norm/p10": 1e-7} for r in (1.0, 2.0)]
    fractions, norms = plots.clipping(rows).axes
    assert fractions.get_ylim() == plots.curves(rows).axes[-1].get_ylim() == (-0.02, 1.02)
    assert [line.get_label() for line in fractions.lines] == [
        "local steps clipped (0)",
        "client updates clipped, link 2 (1)",
    ]
    assert norms.lines[0].get_label() == "client update norm, 10th percentile (1e-07)"
    drawing = page.build(results.load([make(tmp_path / "run", [row | {"loss": 1.0} for row in rows])]))
    ticks = re.search(r"<figure><figcaption>fraction clipped</figcaption>.*?</figure>", drawing, re.DOTALL)[0]
    assert re.findall(r'"end">([\d.-]+)</text>', ticks) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert "client updates clipped, link 2" in ticks


def test_a_dashed_line_marks_where_a_run_went_on(tmp_path):
    rows = [{"round": float(r), "loss": 1.0 / r} for r in range(1, 5)]
    rows[2]["went_on_from"] = 2.0
    for axes in plots.curves(rows).axes:
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [2.0]


def test_the_name_of_an_axis_stands_beside_its_numbers():
    for value, log in ((1.0, False), (12345.0, False), (-0.00012345, False), (1e-9, True), (2.5e-7, True)):
        line = svg.Line("a", np.arange(3.0), value * np.array([1.0, 1.3, 1.7]), "c0")
        drawing = svg.chart("t", [line], "x", "y", log=log)
        name = float(re.search(r"translate\((\d+) ", drawing)[1])
        for x, text in re.findall(r'<text x="(\d+)" y="[\d.]+" text-anchor="end">([^<]+)<', drawing):
            assert float(x) - 6.5 * len(text) > name + 6


def test_a_page_shows_that_a_table_goes_on(tmp_path):
    text = page.build(results.load([make(tmp_path / "run")]))
    assert re.search(r"\.scroll \{[^}]*background-attachment: local, local, scroll, scroll", text)


def test_nobody_needs_to_read_what_a_binary_prints():
    command = [sys.executable, "-c", "import runpy, sys; sys.argv = ['x', '--help']; "]
    command[-1] += "runpy.run_module('experiments.report', run_name='__main__', alter_sys=True)"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_bad_input_is_one_sentence_and_nothing_is_written(cli, tmp_path):
    good = make(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "thesis.html").write_text("<html>mine</html>")
    (make(tmp_path / "text") / "config.json").write_text("no JSON")
    (make(tmp_path / "list") / "config.json").write_text("[1]")
    (make(tmp_path / "rows") / "metrics.jsonl").write_text("[1]\n")
    (make(tmp_path / "none") / "metrics.jsonl").write_text("")
    (make(tmp_path / "corrupt") / "clients.npz").write_bytes(b"PK\x03\x04 no archive")
    for name, scores in SCORES.items():
        np.savez(make(tmp_path / name) / "clients.npz", **scores)
    (make(tmp_path / "versions") / "config.json").write_text('{"config": {}, "versions": null}')
    (make(tmp_path / "numbers") / "metrics.jsonl").write_text(f'{{"round": 1, "loss": 1{"0" * 400}}}\n')
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/config.json").write_text('{"config": {"points": "grid()"}}')
    (tmp_path / "sweep/results.jsonl").write_text("{}\n")
    for file in ("config.json", "metrics.jsonl", "clients.npz"):  # whoever reads a pipe waits for ever
        (make(tmp_path / f"pipe_{file}") / file).unlink()
        os.mkfifo(tmp_path / f"pipe_{file}" / file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for file in ("config.json", "metrics.jsonl", "clients.npz"):
        assert_refused(cli(f"pipe_{file}"), f"{file} cannot be read")
    for name, content in (("null", "null"), ("deep", "[" * 100_000)):
        (make(tmp_path / name) / "config.json").write_text(content)
    assert_refused(cli("null"), "null/config.json is not a run's configuration")
    assert_refused(cli("deep"), "deep/config.json cannot be read")
    for name in ("null", "deep"):
        shutil.rmtree(tmp_path / name)
    assert_refused(cli(good, "--out=/dev/zero"), "/dev/zero is no file")
    assert_refused(cli("sweep"), "sweep is a sweep's", "table.md and sweep.png", "--flagfile=sweep/best.flags")
    assert_refused(cli(), "Name one run directory")
    assert_refused(cli("nowhere"), "nowhere holds no run: there is no config.json")
    assert_refused(cli("empty"), "empty holds no run")
    assert_refused(cli("thesis.html"), "thesis.html holds no run")
    assert_refused(cli("text"), "text/config.json cannot be read")
    assert_refused(cli("list"), "list/config.json is not a run's configuration")
    assert_refused(cli("rows"), "rows/metrics.jsonl cannot be read")
    assert_refused(cli("none"), "none holds a run without a round")
    assert_refused(cli("corrupt"), "corrupt/clients.npz cannot be read")
    for name in SCORES:
        assert_refused(cli(name), f"{name}/clients.npz cannot be read")
    assert_refused(cli("versions"), "versions/config.json is not a run's configuration")
    assert_refused(cli("numbers"), "numbers/metrics.jsonl cannot be read")
    assert_refused(cli(good, good), "is named twice")
    assert_refused(cli(good, "--out=thesis.html"), "thesis.html is no page of a run")
    assert_refused(cli(good, "--out=/proc/nope/x.html"), "/proc/nope/x.html cannot be written")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_help_shows_how():
    command = [sys.executable, "-m", "experiments.report", "--help"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    assert "--out" in out
    assert "--rounds" not in out
