"""The leaderboard: every method trains on every problem, lines are kept, tuned apart, and the same when run again."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

import fedjax_clip as fc
from experiments.bench import leaderboard
from experiments.bench.contests import CONTESTS, start
from experiments.bench.methods import METHODS


@functools.cache
def made(name, several):
    contest = CONTESTS[name]()
    return contest, start(contest, 0, several)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_with_numbers_that_are_traced(name):
    """On digits, and on the two classes of heart disease, where its loss can."""
    method = METHODS[name]
    for problem in ("digits rotated", "heart"):
        contest, params = made(problem, method.several)
        if method.classifies and contest.calibrated is None:
            continue
        ids, work = [np.arange(contest.cohort)], fc.extend.LocalWork(contest.batch_size, steps=contest.steps)
        cohorts = fc.extend.plan_rounds(contest.data, ids, work, seed=0, first_round=0)
        cohort = jax.tree.map(lambda x: x[0, 0], cohorts)

        def one(point, params, cohort=cohort, contest=contest):
            algorithm = method.build(contest, point)
            state = jax.tree.map(lambda x: x[None].repeat(contest.cohort, 0), algorithm.init_client(params))
            cohort = fc.extend.Cohort(**{**vars(cohort), "state": state})
            begun = algorithm.init(params)
            return begun, *algorithm.round(begun, cohort, jax.random.key(0))

        point = {knob: jax.ShapeDtypeStruct((), np.float32) for knob in method.knobs}
        begun, server, _, metrics = jax.eval_shape(one, point, params)
        assert jax.tree.structure(server.params) == jax.tree.structure(begun.params)
        assert {"loss", "accuracy", "bytes_up"} <= metrics.keys()


def test_lines_are_kept_and_run_again_to_the_same_digest(tmp_path, capsys):
    def bench(*methods):
        return leaderboard.bench(["digits rotated"], methods, 2, tmp_path, quick=True)

    assert bench("fedavg", "ditto") == 2
    (tmp_path / "results.jsonl").write_text((tmp_path / "results.jsonl").read_text() + '{"track": "digi')  # a kill
    assert bench("fedavg", "ditto") == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["rule"] for line in lines] == ["fedavg", "ditto"]
    for line in lines:
        assert len(line["trials"]) == 2
        assert set(line["measured"]) == set(leaderboard.MEASURES)
        assert [len(x) for x in line["measured"].values()] == [2, 2, 2]
        assert line["digest"] == leaderboard.digest(line)
        assert not set(line["config"]["tuning"]) & set(line["config"]["measuring"])
    report = (tmp_path / "report.md").read_text()
    assert "## digits rotated" in report
    assert report.count("| ditto |") == 1
    assert "Not run: digits by form, " in report
    leaderboard.again(tmp_path, 1)
    assert "the same digest" in capsys.readouterr().out
    lines[0]["digest"] = lines[1]["digest"] = "other"
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(fc.InvalidInput, match="1 of 1 lines gave another digest"):
        leaderboard.again(tmp_path, 1)


def test_the_page_of_the_site_is_of_its_lines():
    page = pathlib.Path(__file__).parents[3] / "docs" / "leaderboard"
    lines = [json.loads(line) for line in (page / "results.jsonl").read_text().splitlines()]
    assert all(line["digest"] == leaderboard.digest(line) for line in lines)
    found = {problem: [line for line in lines if line["track"] == problem] for problem in CONTESTS}
    assert leaderboard.report(found, notes(found), lines[0]["config"]) == (page / "report.md").read_text()
    assert {line["rule"] for line in found["digits by form"]} == set(METHODS)


def notes(found):
    return {problem: CONTESTS[problem]().note for problem, entries in found.items() if entries}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: leaderboard.bench(["digit"], ["fedavg"], 2, path), "--problems: unknown problem 'digit'"),
        (lambda path: leaderboard.bench(["heart"], ["dito"], 2, path), "did you mean 'ditto'"),
        (lambda path: leaderboard.bench(["heart"], ["fedavg"], 0, path), "--trials must be a whole number"),
        (lambda path: leaderboard.again(path, 1), "--again: .* has no results: run the leaderboard first"),
    ],
)
def test_bad_input_is_one_sentence(call, words, tmp_path):
    with pytest.raises(fc.InvalidInput, match=words):
        call(tmp_path)


def test_help_names_every_problem_and_method():
    told = leaderboard.describe()
    assert all(name in told for name in (*CONTESTS, *METHODS))
    assert "four groups of clients" in told


def test_every_problem_has_what_its_note_says():
    """Held-out examples of clients that train, and new clients where there are enough."""
    for name, make in CONTESTS.items():
        contest = make()
        assert contest.note
        assert contest.cohort <= contest.data.num_clients
        known = {contest.data.name(c) for c in range(contest.data.num_clients)}
        assert {
            contest.evaluation["examples"].name(c) for c in range(contest.evaluation["examples"].num_clients)
        } <= known
        if name != "heart":
            new = contest.evaluation["clients"]
            assert known.isdisjoint(new.name(c) for c in range(new.num_clients))
