"""The metric that decides, and scores over clients, against what is written by hand."""

import numpy as np
import pytest

import fedjax_clip as fc
from fedjax_clip.training import metric, scores


def test_better_is_higher_or_lower_as_the_name_says_and_nothing_is_worse_than_no_number():
    auroc, loss = metric.Metric("eval/examples/auroc_worst"), metric.Metric("eval/examples/loss")
    assert (auroc.higher_is_better, loss.higher_is_better) == (True, False)
    assert (auroc.better(0.8, 0.7), auroc.better(0.7, 0.8), auroc.better(0.7, 0.7)) == (True, False, False)
    assert (loss.better(0.7, 0.8), loss.better(0.8, 0.7)) == (True, False)
    for of in (auroc, loss):
        assert of.better(0.1, np.nan)
        assert not of.better(np.nan, 0.1)
        assert not of.better(np.nan, np.nan)
    assert loss.cost([2.0, np.nan, np.inf, 1.0]).argsort(kind="stable").tolist() == [3, 0, 1, 2]
    assert auroc.cost([0.5, np.nan, 0.9]).argsort(kind="stable").tolist() == [2, 0, 1]


def test_a_metric_is_named_with_or_without_eval_and_a_wrong_one_lists_those_there_are():
    names = ["eval/examples/loss", "eval/clients/auroc_worst"]
    assert metric.named("clients/auroc_worst", names) == metric.named("eval/clients/auroc_worst", names)
    with pytest.raises(fc.InvalidInput) as error:
        metric.named("examples/auroc", names)
    assert str(error.value) == "--metric=examples/auroc is not measured; there is examples/loss, clients/auroc_worst."
    with pytest.raises(fc.InvalidInput, match="there is none, since nothing is held out"):
        metric.named("examples/auroc", [])


def of_sizes(*sizes):
    data = {"y": np.arange(sum(sizes)) % 2}
    return fc.FederatedData(data, np.cumsum([0, *sizes]), [f"c{i}" for i in range(len(sizes))])


def test_a_client_without_a_score_does_not_count_and_one_that_diverged_is_the_worst():
    def summary(values, data):
        return {"auroc": scores.auroc(values["p"], values["y"]), "error": values["p"].max()}

    compared = scores.OverClients(summary, ("auroc", "error"), each=True)
    data = of_sizes(4, 2, 1, 2)
    y, p = np.array([0, 1, 0, 1, 1, 1, 0, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 0.1])
    row = compared({"p": p, "y": y}, data)
    assert row["auroc/c0"] == 0.75
    assert np.isnan([row["auroc/c1"], row["auroc/c2"]]).all()  # of one class
    assert (row["auroc/c3"], row["auroc_worst"], row["auroc_mean"]) == (0.0, 0.0, 0.375)
    assert row["error_worst_tenth"] == 0.9  # of four, one
    assert (row["error_worst"], row["error_mean"]) == (0.9, pytest.approx((0.4 + 0.6 + 0.7 + 0.9) / 4))
    p[4] = np.inf
    assert compared({"p": p, "y": y}, data)["error_worst"] == np.inf
    alone = scores.OverClients(summary, ("auroc",))({"p": p[4:7], "y": y[4:7]}, of_sizes(2, 1))
    assert np.isnan([alone["auroc_worst"], alone["auroc_mean"]]).all()


def test_what_is_no_score_is_not_compared():
    with pytest.raises(fc.InvalidInput, match="compares 'f1', which is no score; there is loss, auroc"):
        scores.OverClients(lambda values, data: {"auroc": 0.5}, ("f1",))({"loss": np.zeros(2)}, of_sizes(2))


def test_a_diverged_model_has_no_calibration_error():
    assert np.isnan(scores.calibration_error(np.array([0.5, np.nan]), np.array([0, 1])))
