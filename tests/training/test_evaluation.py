"""Scores of a set and of each of its clients, against a loop over examples."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from problems import SIZES, parameters, population, softmax_loss

import fedjax_clip as fc

WEIGHTS = np.random.default_rng(2).uniform(0.5, 2, sum(SIZES))
DATA = dataclasses.replace(population(), weights=WEIGHTS)


def by_hand(data, params):
    """Loss and accuracy of each client, one example after the other."""
    weights = np.ones(data.num_examples) if data.weights is None else data.weights
    scores = {"loss": [], "accuracy": []}
    for start, stop in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        sums = np.zeros(3)
        for i in range(start, stop):
            logits = data.examples["x"][i].astype(np.float64) @ params["w"] + params["b"]
            y = data.examples["y"][i]
            loss = np.log(np.exp(logits).sum()) - logits[y]
            sums += weights[i] * np.array([1, loss, logits.argmax() == y])
        scores["loss"].append(sums[1] / sums[0])
        scores["accuracy"].append(sums[2] / sums[0])
    return scores


@pytest.mark.parametrize("batch_size", [1, 5, 34, 1000])
@pytest.mark.parametrize("data", [population(), DATA], ids=["plain", "weighted"])
def test_each_client_is_scored_as_by_hand(data, batch_size):
    params = parameters()
    scores = fc.evaluator(softmax_loss, {"all": data, "few": data.select([4, 2])}, batch_size=batch_size).per_client(
        params
    )
    for name, expected in by_hand(data, params).items():
        np.testing.assert_allclose(scores[f"all/{name}"], expected, rtol=1e-5)
        np.testing.assert_allclose(scores[f"few/{name}"], np.array(expected)[[4, 2]], rtol=1e-5)
    assert {x.shape for name, x in scores.items() if name.startswith("all")} == {(len(SIZES),)}


def test_clients_weighed_by_their_examples_are_the_evaluators_mean():
    evaluate = fc.evaluator(softmax_loss, {"all": DATA}, batch_size=5)
    means, scores = evaluate(parameters()), evaluate.per_client(parameters())
    assert means.keys() == scores.keys()
    for name, mean in means.items():
        np.testing.assert_allclose(np.average(scores[name], weights=DATA.client_weights), mean, rtol=1e-5)


def test_each_client_is_scored_by_the_model_of_its_own():
    algorithm = fc.partially_private(fc.fedavg(softmax_loss, optax.sgd(0.1)), "b")
    own = np.random.default_rng(3).normal(size=(len(SIZES), 3)).astype(np.float32)
    kept = fc.extend.ClientState((), (), {"b": own, "w": None})
    sets = {"few": dataclasses.replace(DATA.select([4, 2]), names=["4", "new"])}  # a stranger begins with the server's
    evaluate = fc.evaluator(softmax_loss, sets, batch_size=5, algorithm=algorithm, population=DATA)
    models = [parameters() | {"b": own[4]}, parameters()]
    expected = [by_hand(sets["few"], model)["loss"][i] for i, model in enumerate(models)]
    np.testing.assert_allclose(evaluate.per_client(parameters(), kept)["few/loss"], expected, rtol=1e-5)


def test_a_client_that_is_not_finite_spoils_no_other():
    x = DATA.examples["x"].copy()
    x[DATA.offsets[-1] - 1] = np.nan  # which also fills up the last batch
    spoiled = dataclasses.replace(DATA, examples={**DATA.examples, "x": x})
    before, after = (
        fc.evaluator(softmax_loss, {"all": d}, batch_size=5).per_client(parameters())["all/loss"]
        for d in (DATA, spoiled)
    )
    assert np.isnan(after[-1])
    np.testing.assert_array_equal(before[:-1], after[:-1])


def test_all_sets_share_one_program():
    calls = []

    def counted(params, batch, key):
        calls.append(jax.tree.map(np.shape, batch))
        return softmax_loss(params, batch, key)

    sets = {"all": DATA, "few": DATA.select([0]), "more": DATA.select([1, 3])}
    evaluate = fc.evaluator(counted, sets, batch_size=5)
    evaluate(parameters())
    evaluate.per_client(parameters(seed=2))
    assert calls == [{"x": (5, 4), "y": (5,)}]


def test_a_loss_that_is_one_number_is_refused():
    with pytest.raises(fc.InvalidInput, match="one loss for each example"):
        fc.evaluator(lambda *args: softmax_loss(*args)[0].mean(), {"all": DATA})(parameters())


def test_held_out_sets_are_populations_of_numbers_that_devices_hold():
    wrapped = {"far": fc.FederatedData({"x": np.zeros((1, 4)), "y": np.array([2**32])}, [0, 1])}
    for sets, sentence in ((DATA, "by name"), ({"few": [1]}, "FederatedData, not list"), (wrapped, "keep as 0")):
        with pytest.raises(fc.InvalidInput, match=sentence):
            fc.evaluator(softmax_loss, sets)


def test_models_of_the_clients_own_need_their_names():
    algorithm = fc.partially_private(fc.fedavg(softmax_loss, optax.sgd(0.1)), "b")
    with pytest.raises(fc.InvalidInput, match="give fc.evaluator the population"):
        fc.evaluator(softmax_loss, {"all": DATA}, algorithm=algorithm)
