"""Optuna's proposals as the lanes of one program."""

import numpy as np
import optax
import pytest

import fedjax_clip as fc
from fedjax_clip.core.types import InvalidInput

optuna = pytest.importorskip("optuna")
SPACE = {"lr": fc.sweeping.Range(0.01, 3.0, log=True), "clip": fc.sweeping.Range(0.1, 2.0)}


@pytest.fixture(scope="module")
def run():
    draws = np.random.default_rng(0)
    x = draws.normal(size=(60, 3)).astype(np.float32)
    data = fc.data.partition.iid({"x": x, "y": x @ np.float32([1, -2, 0.5])}, 6)

    def loss(params, batch, key):
        return (batch["x"] @ params["w"] - batch["y"]) ** 2

    def build(hyper):
        return fc.fedavg(loss, optax.chain(fc.clipping.clip_by_global_norm(hyper["clip"]), optax.sgd(hyper["lr"])))

    def run(points, **options):
        params = {"w": np.zeros(3, np.float32)}
        return fc.sweep(build, points, data, params, loss, {"examples": data}, **{"rounds": 4, **options})

    return run


@pytest.fixture
def study():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def test_the_second_batch_compiles_nothing(run, study, compilations):
    first = fc.sweeping.ask_and_tell(study, SPACE, run, count=4)
    compilations.clear()
    second = fc.sweeping.ask_and_tell(study, SPACE, run, count=4)
    assert compilations == []
    assert len(study.trials) == 8
    for trial, told in zip([*first, *second], study.trials, strict=True):
        assert told.value == trial.metrics["eval/examples/loss"]
        assert told.intermediate_values == {4: told.value}
        assert told.params.keys() == SPACE.keys()
    assert study.best_value == min(t.metrics["eval/examples/loss"] for t in [*first, *second])


def test_a_score_is_that_of_its_own_point(run, study):
    fc.sweeping.ask_and_tell(study, SPACE, run, count=4)
    for told in study.trials:
        (alone,) = run({name: np.array([value] * 4) for name, value in told.params.items()})[:1]
        assert told.value == pytest.approx(alone.metrics["eval/examples/loss"], rel=1e-4)


def test_points_given_up_by_halving_are_pruned(run, study):
    def halved(points):
        return run(points, halving=2, score="eval/examples/loss")

    trials = fc.sweeping.ask_and_tell(study, SPACE, halved, count=4)
    states = [trial.state.name for trial in study.trials]
    assert sorted(states) == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    for number, told in enumerate(study.trials):
        rungs = {t.metrics["round"]: t.metrics["eval/examples/loss"] for t in trials if t.point == number}
        assert told.intermediate_values == rungs


def test_a_point_that_diverges_has_failed(run, study):
    def diverging(points):
        trials = run(points)
        return [t._replace(metrics=t.metrics | {"eval/examples/loss": np.nan}) if t.point == 1 else t for t in trials]

    fc.sweeping.ask_and_tell(study, SPACE, diverging, count=4)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_study_of_the_other_direction_is_refused_before_it_is_asked(run, study):
    with pytest.raises(InvalidInput, match=r'accuracy needs optuna.create_study\(direction="maximize"\)'):
        fc.sweeping.ask_and_tell(study, SPACE, run, score="eval/examples/accuracy")
    both = optuna.create_study(directions=["minimize", "maximize"])
    with pytest.raises(InvalidInput, match="needs optuna.create_study"):
        fc.sweeping.ask_and_tell(both, SPACE, run)
    with pytest.raises(InvalidInput, match="study must be an optuna.Study"):
        fc.sweeping.ask_and_tell("study", SPACE, run)
    assert study.trials == both.trials == []
