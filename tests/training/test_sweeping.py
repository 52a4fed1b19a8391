"""Sweeps: each trial is the training that fc.train gives, from one program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.training import sweeping
from fedjax_clip.training.scores import OverClients
from fedjax_clip.training.sweeping import Range, Trial

SETTINGS = {"rounds": 5, "cohort_size": 3, "batch_size": 2}
HELD_OUT = population((8, 3), seed=7)


def scaffold(hyper):
    """Everything at once: a state at the clients, one in the uplink, traced numbers in all places."""
    client_tx = optax.chain(fc.clipping.clip_by_global_norm(hyper["clip"]), optax.sgd(hyper["lr"]))
    link = fc.uplink.quantile_clip(hyper["clip"], 0.5)
    server_tx = optax.sgd(1.0, momentum=hyper["momentum"])
    return fc.scaffold(softmax_loss, client_tx, server_tx, uplink=link)


def fedavg(hyper):
    client_tx = optax.chain(fc.clipping.clip_by_global_norm(hyper["clip"]), optax.sgd(hyper["lr"]))
    return fc.fedavg(softmax_loss, client_tx)


def start(seed):
    return parameters(seed=seed + 1)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_trial_is_what_train_gives_and_one_program_is_compiled(compilations):
    data = population()
    folds = fc.data.folds.examples(data, 3)  # one client has a single example: it trains in two folds only
    points = sweeping.grid(lr=[0.01, 0.3], clip=[0.1, 1.0], momentum=[0.0, 0.9])
    arguments = scaffold, points, data, start, softmax_loss, {"held": HELD_OUT}
    trials = fc.sweep(*arguments, seeds=(0, 3), folds=folds, points_per_chunk=3, **SETTINGS)
    assert len(compilations) == 1
    assert [t[:3] for t in trials] == [(p, s, f) for p in range(8) for s in (0, 3) for f in range(3)]
    for trial in (trials[11], trials[-1]):
        train, held_out = folds[trial.fold].split(data)
        hyper = {name: float(np.float32(values[trial.point])) for name, values in points.items()}
        sets = {"held": HELD_OUT, "fold": held_out}
        evaluate = fc.evaluator(softmax_loss, sets)
        algorithm = scaffold({**hyper, "num_clients": train.num_clients})
        options = {"seed": trial.seed, "evaluate": evaluate, **SETTINGS}
        (*_, last) = fc.train(algorithm, train, start(trial.seed), **options).history
        close(trial.metrics, {name: x for name, x in last.items() if name not in ("seconds", "wasted_steps")})
    assert len({t.metrics["eval/fold/loss"] for t in trials}) > 40  # points, seeds and folds all tell

    compilations.clear()
    again = fc.sweep(*arguments, seeds=(0, 3), folds=folds, points_per_chunk=3, **SETTINGS)
    assert (len(compilations), again) == (0, trials)


def test_scores_that_are_not_means_and_those_of_an_average_are_as_in_a_run():
    def averaged(hyper):
        client_tx = optax.chain(fc.clipping.clip_by_global_norm(hyper["clip"]), optax.sgd(hyper["lr"]))
        return fc.fedavg(softmax_loss, client_tx, optax.chain(optax.sgd(1.0), fc.fedopt.average(0.8)))

    data, summarise = population(), OverClients(lambda values, data: {"median": np.median(values["loss"])}, ("median",))
    folds, points = fc.data.folds.clients(data, 2), sweeping.grid(lr=[0.1, 0.3], clip=[1.0])
    arguments = averaged, points, data, start, softmax_loss, {"held": HELD_OUT}
    options = {"folds": folds, "score": "eval/fold/median_worst", **SETTINGS, "cohort_size": 2}
    trial = fc.sweep(*arguments, summarise=summarise, **options)[-1]
    train, held_out = folds[1].split(data)
    evaluate = fc.evaluator(softmax_loss, {"held": HELD_OUT, "fold": held_out}, summarise=summarise)
    hyper = {"lr": np.float32(0.3), "clip": np.float32(1.0)}
    (*_, last) = fc.train(averaged(hyper), train, start(0), evaluate=evaluate, **{**SETTINGS, "cohort_size": 2}).history
    close(trial.metrics, {name: x for name, x in last.items() if name not in ("seconds", "wasted_steps")})
    assert {"eval/fold/median_worst", "eval/held/median_mean", "eval/held_average/loss"} <= trial.metrics.keys()
    assert trial.metrics["eval/fold_average/median_worst"] != trial.metrics["eval/fold/median_worst"]


def test_examples_are_judged_by_their_clients_own_models():
    def ditto(hyper):
        return fc.personal.ditto(softmax_loss, optax.sgd(hyper["lr"]), strength=0.3)

    summarise = OverClients(lambda values, data: {"median": np.median(values["loss"])}, ("median",))
    data, held = population().split_examples(0.3)
    folds, points = fc.data.folds.examples(data, 2), sweeping.grid(lr=[0.3])
    options = {**SETTINGS, "cohort_size": 2}
    trial = fc.sweep(
        *(ditto, points, data, start, softmax_loss, {"held": held}), folds=folds, summarise=summarise, **options
    )[-1]
    train, held_out = folds[1].split(data)
    own = {"algorithm": ditto({"lr": np.float32(0.3)}), "population": train, "summarise": summarise}
    evaluate = fc.evaluator(softmax_loss, {"held": held, "fold": held_out}, **own)
    (*_, last) = fc.train(own["algorithm"], train, start(0), evaluate=evaluate, **options).history
    close(trial.metrics, {name: x for name, x in last.items() if name not in ("seconds", "wasted_steps")})


def test_how_many_points_go_at_once_changes_rounding_only():
    points = sweeping.grid(lr=[0.03, 0.1, 0.3, 1.0, 3.0], clip=[0.5])
    alone, chunks = (
        fc.sweep(
            fedavg, points, population(), start, softmax_loss, {"held": HELD_OUT}, points_per_chunk=width, **SETTINGS
        )
        for width in (1, 2)
    )
    for one, other in zip(alone, chunks, strict=True):
        close(one.metrics, other.metrics)


def test_halving_stops_the_worse_early_and_the_others_end_as_without_it_to_the_bits():
    points = sweeping.grid(lr=[0.01, 0.03, 0.1, 0.3, 1.0], clip=[0.5])
    arguments = fedavg, points, population(), start, softmax_loss, {"held": HELD_OUT}
    one_program = {"points_per_chunk": 1, "devices": jax.local_devices()[:1]}  # a width is not for the sweep to choose
    settings = {**SETTINGS, "rounds": 9, "seeds": (0, 1), **one_program}
    score = "eval/held/loss"
    halving = {"halving": 2, "score": score}
    rounds = []
    whole = {t[:3]: t for t in fc.sweep(*arguments, **settings)}
    halved = fc.sweep(*arguments, **settings, **halving, on_rounds=rounds.append)
    stops, kept = sweeping.rungs(9, 5, 2)
    assert (stops, kept) == ([3, 5, 9], [5, 3, 2])
    assert sum(rounds) == 2 * (5 * 3 + 3 * (5 - 3) + 2 * (9 - 5))  # of 2 * 5 * 9
    alive = set(range(5))
    for k, stop in enumerate(stops):
        rung = [t for t in halved if t.metrics["round"] == stop]
        assert {t.point for t in rung} == alive
        assert len(rung) == 2 * kept[k]
        means = {p: np.mean([t.metrics[score] for t in rung if t.point == p]) for p in alive}
        alive = set(sorted(means, key=means.get)[: kept[min(k + 1, 2)]])
    assert all(trial == whole[trial[:3]] for trial in rung)
    assert set(sweeping.rank(halved, score)[:2]) == {t.point for t in rung}

    for dispatches in (3, 13):  # within the first rung, and within the second
        asked, ran = [], []

        def stop_now(asked=asked, dispatches=dispatches):
            asked.append(1)
            return len(asked) == dispatches

        part = fc.sweep(*arguments, **settings, **halving, should_stop=stop_now)
        assert 0 < len(part) < len(halved)
        assert len({t.metrics["round"] for t in part}) == (1 if dispatches == 3 else 2)
        assert fc.sweep(*arguments, **settings, **halving, done=part, on_trial=ran.append) == halved
        assert len(ran) == len(halved) - len(part)


def test_stopped_it_gives_what_is_done_and_goes_on_from_there():
    points = sweeping.grid(lr=[0.03, 0.1, 0.3, 1.0], clip=[0.5])
    arguments = fedavg, points, population(), start, softmax_loss
    settings = {**SETTINGS, "devices": jax.local_devices()[:1], "points_per_chunk": 1}
    asked, rounds = [], []

    def stop():
        asked.append(1)
        return len(asked) == 2

    part = fc.sweep(*arguments, **settings, should_stop=stop)
    assert [t.point for t in part] == [0, 1]
    rest = []
    trials = fc.sweep(*arguments, **settings, done=part, on_trial=rest.append, on_rounds=rounds.append)
    assert [t.point for t in rest] == [2, 3]
    assert sum(rounds) == 2 * SETTINGS["rounds"]
    assert trials == part + rest == fc.sweep(*arguments, **settings)


def test_grids_draws_and_rungs():
    points = sweeping.grid(a=[1, 2], b=[3, 4, 5])
    assert list(zip(points["a"], points["b"])) == [(1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)]
    drawn = sweeping.random(4000, seed=1, a=Range(-1, 3), b=Range(0.01, 1, log=True))
    assert -1 <= drawn["a"].min() < -0.9
    assert 2.9 < drawn["a"].max() <= 3
    np.testing.assert_allclose([drawn["a"].mean(), np.log10(drawn["b"]).mean()], [1, -1], atol=0.06)
    assert np.array_equal(drawn["b"], sweeping.random(4000, seed=1, a=Range(-1, 3), b=Range(0.01, 1, log=True))["b"])
    assert sweeping.rungs(100, 64, 2) == ([13, 25, 50, 100], [64, 32, 16, 8])
    assert sweeping.rungs(100, 64, None) == ([100], [64])
    assert sweeping.rungs(7, 2, 3) == ([7], [2])


def trial(point, value, seed=0, round=10.0, name="eval/x/accuracy"):
    return Trial(point, seed, 0, {"round": round, name: value})


UP = (
    "accuracy",
    "auroc",
    "auroc_worst",
    "auroc/Greece",
    "f1",
    "f1_macro",
    "precision",
    "recall",
    "cosine",
    "r2",
    "bleu",
)
DOWN = (
    "loss",
    "log_loss",
    "logloss",
    "error",
    "rmse",
    "rmse_of_mean",
    "mae",
    "ece",
    "ece_mean",
    "ece/Cleveland",
    "brier",
)
MORE_DOWN = ("perplexity", "cross_entropy", "nll", "bytes_up", "seconds", "cosine_distance", "word_error_rate")


@pytest.mark.parametrize("prefix", ["", "eval/examples/"])
def test_there_is_one_opinion_of_what_is_better(prefix):
    assert [name for name in UP if not fc.extend.metrics.higher_is_better(prefix + name)] == []
    assert [name for name in DOWN + MORE_DOWN if fc.extend.metrics.higher_is_better(prefix + name)] == []


def test_ranks():
    trials = [trial(0, 0.5), trial(1, 0.9), trial(2, np.nan), trial(3, 0.9), trial(4, 1.0, round=5.0)]
    assert sweeping.rank(trials, "eval/x/accuracy") == [1, 3, 0, 2, 4]
    none = [trial(p, np.nan, seed=1) for p in range(2)]  # no point has a number there, so it says nothing
    folds = [trial(0, 0.5), trial(1, 0.9), *none]
    assert sweeping.rank(folds, "eval/x/accuracy") == [1, 0]
    assert sweeping.values(folds, "eval/x/accuracy") == {0: [0.5], 1: [0.9]}
    diverged = [*folds[:2], trial(0, 0.4, seed=1), trial(1, np.nan, seed=1)]
    assert sweeping.rank(diverged, "eval/x/accuracy") == [0, 1]
    losses = [trial(p, v, name="eval/x/loss") for p, v in enumerate([0.5, np.inf, 0.1, np.nan])]
    assert sweeping.rank(losses, "eval/x/loss") == [2, 0, 1, 3]
    seeds = [trial(0, 1.0), trial(0, 0.0, seed=1), trial(1, 0.4), trial(1, 0.4, seed=1)]
    assert sweeping.rank(seeds, "eval/x/accuracy") == [0, 1]
    assert sweeping.values(seeds, "eval/x/accuracy") == {0: [1.0, 0.0], 1: [0.4, 0.4]}


GOOD = {"lr": [0.1], "clip": [1.0]}
CLOCK = fc.data.clock.synchronous(fc.data.sampling.uniform(2), fc.data.speeds.lognormal())


@pytest.mark.parametrize(
    ("points", "options", "sentence"),
    [
        ({"lr": [0.1, 0.2], "clip": [1.0]}, {}, "as many of each"),
        ({"lr": [0.1], "clip": [-1.0]}, {}, "lr=0.1, clip=-1: .*positive number"),
        ({**GOOD, "num_clients": [3]}, {}, "num_clients is no hyper-parameter"),
        ({}, {}, "one or more values"),
        (GOOD, {"rounds": 0}, "rounds must be a whole number of at least 1"),
        (GOOD, {"seeds": ()}, "at least one seed"),
        (GOOD, {"seeds": 3}, "seeds must be a list of them, not int"),
        (GOOD, {"seeds": [2**32]}, "A seed must be a whole number between 0 and 4294967295"),
        (GOOD, {"devices": []}, "one or more different devices"),
        (GOOD, {"points_per_chunk": -1}, "points_per_chunk must be a whole number of at least 1"),
        (GOOD, {"cohort_size": 7}, "larger than the population"),
        (GOOD, {"halving": 1}, "halving must be a whole number of at least 2"),
        (GOOD, {"sampler": fc.data.sampling.uniform(2)}, "give one of them"),
        (GOOD, {"sampler": CLOCK, "cohort_size": None}, "a sweep has no clock"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(points, options, sentence, compilations):
    with pytest.raises(fc.InvalidInput, match=sentence):
        fc.sweep(fedavg, points, population(), start, softmax_loss, **{**SETTINGS, **options})
    assert compilations == []


def test_a_metric_or_a_range_that_is_none():
    with pytest.raises(fc.InvalidInput, match=r"no metric 'los'; there is eval/x/accuracy, round"):
        sweeping.values([trial(0, 1.0)], "los")
    with pytest.raises(fc.InvalidInput, match="lr is drawn from 0 to 1: that is no range above zero"):
        sweeping.random(2, lr=Range(0, 1, log=True))


def test_the_heat_map_shows_each_mean_and_frames_the_best():
    points = sweeping.grid(lr=[0.1, 1.0], clip=[1.0, np.inf])
    values = {0: [0.5, 0.7], 1: [0.2], 2: [np.nan], 3: [0.9]}
    (axis, _) = fc.plots.sweep(points, values, "eval/x/accuracy").axes
    assert {(t.get_position(), t.get_text()) for t in axis.texts} == {
        *(((0, 0), "0.6"), ((0, 1), "0.2"), ((1, 0), "✕"), ((1, 1), "0.9")),
    }
    assert [p.get_xy() for p in axis.patches] == [(0.5, 0.5)]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["1", "inf"]
    (axis, _) = fc.plots.sweep(points, values, "eval/x/loss").axes
    assert [p.get_xy() for p in axis.patches] == [(-0.5, 0.5)]
    assert len(fc.plots.sweep(sweeping.random(4, a=Range(0, 1), b=Range(1, 2)), values, "loss").axes) == 2


def test_hypergradients_through_rounds_are_central_differences():
    """In float64, so that the differences are exact enough to say so."""
    with jax.enable_x64(True):
        data = population((6, 4, 8))
        data = fc.FederatedData({**data.examples, "x": data.examples["x"].astype(np.float64)}, data.offsets)
        params = jax.tree.map(lambda x: x.astype(np.float64), parameters())
        ids = [np.array([0, 1, 2])] * 3
        planned = fc.extend.plan_rounds(data, ids, fc.extend.LocalWork(batch_size=2), seed=0, first_round=0)
        cohorts = jax.tree.map(lambda x: x[0], planned).differentiable()

        @jax.jit
        def validation_loss(hyper):
            algorithm = fedavg(hyper)

            def round(server, cohort):
                return algorithm.round(server, cohort, jax.random.key(0))[0], None

            server, _ = jax.lax.scan(round, algorithm.init(params), cohorts)
            return jnp.mean(softmax_loss(server.params, HELD_OUT.examples, None)[0])

        hyper = {"lr": jnp.float64(0.3), "clip": jnp.float64(0.6)}
        gradient = jax.jit(jax.grad(validation_loss))(hyper)
        for name, x in hyper.items():
            up, down = (validation_loss({**hyper, name: x + h}) for h in (1e-6, -1e-6))
            np.testing.assert_allclose(gradient[name], (up - down) / 2e-6, rtol=1e-3)
            assert abs(gradient[name]) > 1e-3
