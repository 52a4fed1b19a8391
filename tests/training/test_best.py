"""The best model, when to stop, and the average model beside it."""

import numpy as np
import optax
import pytest
from problems import assert_identical

import fedjax_clip as fc
from fedjax_clip.training import best

DATA = fc.FederatedData({"x": np.arange(6.0, dtype=np.float32)}, [0, 2, 6])
PARAMS = {"x": np.zeros((), np.float32)}


def loss(params, batch, key):
    return (params["x"] - batch["x"]) ** 2


AVERAGING = fc.fedavg(loss, optax.sgd(0.1), optax.chain(optax.sgd(1.0), fc.fedopt.average(0.5)))
SCORES = [0.1, 0.4, float("nan"), 0.4, 0.3, 0.6, 0.2, 0.9]  # after each round


def train(rounds, kept, directory=None, algorithm=AVERAGING):
    seen = []

    def evaluate(params):  # twice after each round: of the model, and of its average
        seen.append(params)
        return {"score": SCORES[evaluate.done // 2] + (evaluate.done % 2) * 0.05, "loss": 1.0}

    evaluate.done = 0

    def count(row):
        evaluate.done = 2 * int(row["round"])

    def evaluating(params):
        told = evaluate(params)
        evaluate.done += 1
        return told

    done = 0 if directory is None else fc.extend.Checkpoints(directory).newest() or 0
    evaluate.done = 2 * done
    result = fc.train(
        *(algorithm, DATA, PARAMS), rounds=rounds, best=kept, evaluate=evaluating, eval_every=1, on_round=count,
        checkpoints=directory, checkpoint_every=3,
    )  # fmt: skip
    return result, seen


def test_training_stops_when_patience_ends_and_the_best_model_is_kept(tmp_path):
    kept = fc.extend.Best("score", patience=3)
    result, seen = train(8, kept)
    assert [row["round"] for row in result.history] == [1, 2, 3, 4, 5]
    assert (float(result.best.value), int(result.best.round)) == (0.4, 2)
    assert_identical(result.best.params, seen[2])  # of round 2, the model itself
    assert float(result.params["x"]) != float(result.best.params["x"])

    # Stopped after round 3 and resumed, it waits as long; and when it has ended, the same call does nothing.
    train(3, kept, tmp_path)
    resumed, _ = train(8, kept, tmp_path)
    assert_identical(resumed.best, result.best)
    assert_identical(resumed.state[:2], result.state[:2])
    again, _ = train(8, kept, tmp_path)
    assert again.history == []
    assert_identical(again.best, result.best)
    more, _ = train(8, kept._replace(patience=4), tmp_path)
    assert (int(more.best.round), more.history[-1]["round"]) == (8, 8)


def test_the_average_is_scored_beside_the_model_and_may_be_the_best():
    result, seen = train(4, fc.extend.Best("eval/average/score"))
    row = result.history[1]
    assert (row["eval/score"], row["eval/average/score"]) == (0.4, 0.45)
    assert_identical(result.best.params, seen[3])
    assert_identical(fc.fedopt.averaged(result.state.server), seen[-1])
    assert result.state.server.params["x"] != seen[-1]["x"]


def test_what_cannot_be_compared_is_refused():
    for kept, words in (
        (fc.extend.Best("scores"), "best=scores is not measured; there is score, loss"),
        (fc.extend.Best("score", 0), "best: patience must be a whole number of at least 1, not 0"),
        ("score", "best must be an fc.extend.Best"),
    ):
        with pytest.raises(fc.InvalidInput) as error:
            train(2, kept)
        assert words in str(error.value)
    with pytest.raises(fc.InvalidInput, match="best compares models by score, which is an evaluation's: give evaluate"):
        fc.train(AVERAGING, DATA, PARAMS, rounds=1, best=fc.extend.Best("score"))


def test_a_loss_is_best_when_it_is_low_and_the_first_of_equals_counts():
    kept = best.begin(PARAMS)
    for round, value in enumerate([float("nan"), 2.0, 1.0, 1.0, 3.0], 1):
        kept = best.seen(fc.extend.Best("loss"), kept, {"round": round, "eval/loss": value}, {"eval/loss": round})
    assert (float(kept.value), int(kept.round), kept.params, int(kept.since)) == (1.0, 3, 3, 2)
