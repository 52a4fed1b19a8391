"""The oracle of batch normalisation, checked against differences of its own loss and sums done by hand."""

import numpy as np
from oracles import batch_norm


def problem(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w1": (4, 5), "gamma": (5,), "beta": (5,), "w2": (5, 3), "b2": (3,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return params, (rng.normal(size=(7, 4)), rng.integers(3, size=7), np.array([1, 2, 1, 0, 1, 0.5, 1]))


def test_gradient_is_that_of_differences():
    params, batch = problem()
    _, gradient, _ = batch_norm.loss_and_gradient(params, batch)
    for name, x in params.items():
        for place in np.ndindex(x.shape):
            moved = []
            for step in (1e-6, -1e-6):
                there = {**params, name: x.copy()}
                there[name][place] += step
                moved.append(batch_norm.loss_and_gradient(there, batch)[0])
            np.testing.assert_allclose(gradient[name][place], (moved[0] - moved[1]) / 2e-6, rtol=1e-4, atol=1e-8)


def test_an_example_of_weight_0_does_not_exist():
    params, (x, y, w) = problem()
    other = x.copy()
    other[3] = np.nan
    one, two = (batch_norm.loss_and_gradient(params, (x, y, w)) for x in (x, other))
    np.testing.assert_equal(one, two)


def test_statistics_by_hand():
    # One feature of 1 and 3: mean 2, biased variance 1, so the values are -1 and 1, and stats move a tenth of the way.
    params = {
        "w1": np.ones((1, 1)),
        "gamma": np.ones(1),
        "beta": np.zeros(1),
        "w2": np.zeros((1, 2)),
        "b2": np.zeros(2),
    }
    batch = (np.array([[1.0], [3.0]]), np.array([0, 1]), np.ones(2))
    y, _ = batch_norm.normalise(batch[0], params["gamma"], params["beta"], 0.0)
    np.testing.assert_allclose(y[:, 0], [-1, 1])
    _, stats = batch_norm.local(params, {"mean": np.zeros(1), "var": np.ones(1)}, [batch], 0.1, 0.9)
    np.testing.assert_allclose([stats["mean"][0], stats["var"][0]], [0.2, 1.0])
