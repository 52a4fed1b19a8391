"""Federated statistics, and imbalance and quality of data, against NumPy on the pooled examples."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fedjax_clip as fc
from fedjax_clip.data import quality, statistics

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def populations(draw, missing=True):
    """Ragged clients; columns of any float32 numbers, ties and gaps among them; labels 0 to 2."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    shape = sum(sizes), draw(st.integers(1, 3))
    numbers = st.floats(-(2.0**40), 2.0**40, width=32) | st.sampled_from([0.0, -0.0, 1.0, 2.0**-140])
    x = draw(hnp.arrays(np.float32, shape, elements=numbers))
    if missing:
        x[draw(hnp.arrays(bool, shape))] = np.nan
    y = draw(hnp.arrays(np.int32, shape[0], elements=st.integers(0, 2)))
    return fc.FederatedData({"x": x, "y": y}, np.concatenate([[0], np.cumsum(sizes)]))


def columns(data):
    """The values that there are of each column."""
    return [x[~np.isnan(x)].astype(np.float64) for x in data.examples["x"].T]


@QUICK
@given(populations())
def test_federated_moments_are_those_of_the_pool(data):
    present, mean, std = statistics.moments(data)
    for i, x in enumerate(columns(data)):
        assert present[i] == len(x)
        scale = np.abs(x).max(initial=1e-30)
        np.testing.assert_allclose(mean[i], x.mean() if len(x) else 0, atol=1e-12 * scale)
        np.testing.assert_allclose(std[i], x.std() if len(x) else 0, atol=1e-12 * scale)


@QUICK
@given(populations(), st.floats(0, 1))
def test_federated_quantiles_are_values_of_the_pool(data, q):
    for found, x in zip(statistics.quantiles(data, [q])[0], columns(data)):
        if not len(x):
            assert np.isnan(found)
            continue
        expected = np.sort(x)[max(1, int(np.ceil(q * len(x)))) - 1]
        assert found == expected


def clinic():
    """Three clinics of different size, each lacking other values, with an outlier in the second."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3)).astype(np.float32) + np.array([0, 50, -3], np.float32)
    x[:10, 0] = np.nan
    x[rng.random(60) < 0.3, 1] = np.nan
    x[20, 2] = 1e6
    y = (rng.random(60) < 0.2).astype(np.int32)
    return fc.FederatedData({"x": x, "y": y}, np.array([0, 10, 35, 60]), ["a", "b", "c"])


def test_preparation_is_that_of_the_pooled_training_examples():
    train, held_out = clinic().split_examples(0.25)
    steps = quality.winsorise(0.05), quality.impute(), quality.standardise(slice(3))
    done = quality.prepare([train, held_out], *steps)
    x = train.examples["x"].astype(np.float64)
    low, high = (np.nanquantile(x, q, axis=0, method="inverted_cdf") for q in (0.05, 0.95))
    for before, after in zip((train, held_out), done, strict=True):
        clipped = np.clip(x, low, high)
        own = np.clip(before.examples["x"].astype(np.float64), low, high)
        missing = np.isnan(own)
        mean = np.nanmean(clipped, axis=0)
        filled_train = np.where(np.isnan(clipped), mean, clipped)
        filled = (np.where(missing, mean, own) - filled_train.mean(0)) / filled_train.std(0)
        expected = np.concatenate([filled, missing[:, [0, 1]]], axis=1)  # the third column misses nothing
        np.testing.assert_allclose(after.examples["x"], expected, atol=2e-5)
        np.testing.assert_array_equal(after.offsets, before.offsets)
    assert done[0].examples["x"].dtype == np.float32


def test_no_row_leaves_a_hospital_and_the_sums_alone_decide(monkeypatch):
    """What a client sends has one shape whatever it holds, and the server computes from the totals alone."""
    data, honest, sent, totals = clinic(), statistics.federated_sums, [], []

    def recording(data, message):
        sent.extend(message(data.client(c)) for c in range(data.num_clients))
        totals.append(honest(data, message))
        return totals[-1]

    def replayed(data, message):
        return next(answers)

    steps = quality.winsorise(0.05), quality.impute(), quality.standardise(slice(3))
    monkeypatch.setattr(statistics, "federated_sums", recording)
    (expected,) = quality.prepare([data], *steps)
    sizes = {np.shape(part) for message in sent for part in (message if isinstance(message, tuple) else (message,))}
    assert sizes == {(3,), (2, 3)}  # numbers of columns; no client has so many examples

    answers = iter(totals)
    monkeypatch.setattr(statistics, "federated_sums", replayed)
    other = dataclasses.replace(data, examples={**data.examples, "x": np.zeros_like(data.examples["x"])})
    fitted, population = [], other
    for step in steps:
        fitted.append(step(population))  # on rows that have nothing to do with the totals
    for apply in fitted:
        data = apply(data)
    np.testing.assert_array_equal(data.examples["x"], expected.examples["x"])


def test_rows_cannot_pass_for_sums():
    with pytest.raises(fc.InvalidInput, match="Client 'b' sends"):
        statistics.federated_sums(clinic(), lambda examples: examples["x"])


@QUICK
@given(populations(missing=False))
def test_class_weights_make_classes_weigh_alike(data):
    y = data.examples["y"]
    local = quality.weigh_classes(data, 3, per_client=True)
    np.testing.assert_allclose(local.client_weights, data.sizes)
    for c in range(data.num_clients):
        rows = slice(*data.offsets[c : c + 2])
        weights = np.bincount(y[rows], local.weights[rows], 3)
        present = np.bincount(y[rows], minlength=3) > 0
        np.testing.assert_allclose(weights[present], data.sizes[c] / present.sum())
    if len(np.unique(y)) == 3:
        weighed = quality.weigh_classes(data, 3)
        np.testing.assert_allclose(np.bincount(y, weighed.weights), len(y) / 3)
        again = quality.weigh_classes(weighed, 3)
        np.testing.assert_allclose(again.weights, weighed.weights**2)


def rows_of(data, client):
    return [tuple(row) for row in np.column_stack([data.client(client)["x"], data.client(client)["y"]]).tolist()]


@QUICK
@given(populations(missing=False), st.booleans(), st.integers(0, 3))
def test_resampling_keeps_what_it_promises(data, per_client, seed):
    y = data.examples["y"]
    total = np.bincount(y, minlength=3)
    if not per_client and not total.all():
        return
    for resample, more in ((quality.oversample, True), (quality.undersample, False)):
        after = resample(data, 3, per_client=per_client, seed=seed)
        assert after.num_clients == data.num_clients
        for c in range(data.num_clients):
            before_counts = np.bincount(data.client(c)["y"], minlength=3)
            counts = np.bincount(after.client(c)["y"], minlength=3)
            np.testing.assert_array_equal(counts > 0, before_counts > 0)
            assert set(rows_of(after, c)) <= set(rows_of(data, c))
            if more:
                assert set(rows_of(after, c)) == set(rows_of(data, c))
            present = before_counts[before_counts > 0]
            if per_client:
                assert set(counts[counts > 0]) == {present.max() if more else present.min()}
            else:
                ratio = (total.max() if more else total.min()) / total
                np.testing.assert_array_equal(
                    counts, np.where(counts > 0, np.maximum(1, np.round(ratio * before_counts)), 0)
                )


def test_oversampling_spreads_repetitions_evenly_and_by_seed():
    data = fc.FederatedData({"y": np.array([0] * 7 + [1] * 3), "i": np.arange(10)}, np.array([0, 10]))
    copies = [np.bincount(quality.oversample(data, 2, seed=s).examples["i"])[7:] for s in range(8)]
    assert all(sorted(c.tolist()) == [2, 2, 3] for c in copies)
    assert len({tuple(c.tolist()) for c in copies}) > 1


def test_label_noise_hits_as_many_as_asked_of_those_asked():
    y = np.repeat(np.arange(4), 2500).astype(np.int32)
    data = fc.FederatedData({"y": y}, np.array([0, 5000, 10_000]))
    noisy = quality.flip_labels(data, 0.3, 4, clients=[1], seed=3).examples["y"]
    np.testing.assert_array_equal(noisy[:5000], y[:5000])
    flipped = noisy[5000:] != y[5000:]
    assert abs(flipped.mean() - 0.3) < 0.03
    shifts = np.bincount((noisy[5000:] - y[5000:])[flipped] % 4, minlength=4)
    assert shifts[0] == 0
    assert shifts[1:].min() > 0.8 * flipped.sum() / 3
    assert noisy.dtype == np.int32
    assert np.all(quality.flip_labels(data, 1.0, 4).examples["y"] != y)
    np.testing.assert_array_equal(quality.flip_labels(data, 0.0, 4).examples["y"], y)


def test_corruption_hits_as_many_values_as_asked():
    data = fc.FederatedData({"x": np.ones((4000, 5), np.float32)}, np.array([0, 2000, 4000]))
    dropped = quality.drop_values(data, 0.2, clients=[0]).examples["x"]
    assert abs(np.isnan(dropped[:2000]).mean() - 0.2) < 0.02
    assert not np.isnan(dropped[2000:]).any()
    outliers = quality.add_outliers(data, 0.1, scale=50.0).examples["x"]
    assert set(np.unique(outliers)) == {1.0, 50.0}
    assert abs((outliers == 50).mean() - 0.1) < 0.01
    assert np.all(np.abs(np.corrcoef(outliers.T) - np.eye(5)) < 0.1)  # columns are hit independently
    clean = quality.prepare([quality.add_outliers(data, 0.004, scale=50.0)], quality.winsorise(0.01))[0]
    np.testing.assert_array_equal(clean.examples["x"], data.examples["x"])


def bad_calls():
    data = clinic()
    empty = dataclasses.replace(data, examples={**data.examples, "x": data.examples["x"] * [1, np.nan, 1]})
    return {
        "an all-missing column": (lambda: quality.impute()(empty), "Column 1 of 'x' is missing at every client"),
        "an absent class": (lambda: quality.weigh_classes(data, 3), "Class 2 of 'y' occurs at no client"),
        "an absent class to repeat": (
            lambda: quality.oversample(data, 3, per_client=False),
            "Class 2 of 'y' occurs at no client",
        ),
        "a label out of range": (lambda: quality.weigh_classes(data, 1), "Client '[abc]' has the label 1"),
        "an unknown field": (lambda: quality.standardise(field="z")(data), "no field 'z'"),
        "an unknown label": (lambda: quality.weigh_classes(data, 2, "label"), "no field 'label'"),
        "labels of fractions": (lambda: quality.weigh_classes(data, 2, "x"), "whole numbers"),
        "a tail over a half": (lambda: quality.winsorise(0.6), "between 0 and 0.5, not 0.6"),
        "a rate over 1": (lambda: quality.drop_values(data, 2.0), "between 0 and 1, not 2.0"),
        "a quantile over 1": (lambda: statistics.quantiles(data, [1.5]), "between 0 and 1"),
        "one class to flip": (
            lambda: quality.flip_labels(data.take(np.flatnonzero(data.examples["y"] == 0)), 0.1, 1),
            "two",
        ),
        "integers to spoil": (lambda: quality.drop_values(data, 0.1, "y"), "must hold floats"),
        "float64 to sort": (lambda: statistics.quantiles(empty, [0.5]), "must hold float32"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_is_one_sentence(case):
    call, words = bad_calls()[case]
    with pytest.raises(fc.InvalidInput, match=words):
        call()
