"""Clients that take as many steps as their speed allows, and what FedAvg and FedNova make of it."""

import numpy as np
import optax
import pytest

import fedjax_clip as fc
from fedjax_clip.data import clock, sampling, speeds

FLEET = speeds.measured(np.array([8.0, 4.0, 2.0, 0.5]))  # seconds a step


def targets(values):
    """A client for each value a: its loss is (x - a)^2 / 2."""
    return fc.FederatedData.from_clients({f"{i}": {"a": np.float32([a])} for i, a in enumerate(values)})


def half_square(params, batch, key):
    return 0.5 * (params["x"] - batch["a"]) ** 2


def test_steps_are_those_that_fit():
    steps = speeds.budget(FLEET, seconds=8.0, most=12)
    assert steps(np.array([0, 1, 2, 3]), 0).tolist() == [1, 2, 4, 12]
    assert speeds.budget(FLEET, seconds=1.0, most=12)(np.arange(4), 0).tolist() == [1, 1, 1, 2]
    message = speeds.measured(np.array([8.0, 4.0, 2.0, 0.5]), 2.0)
    assert speeds.budget(message, seconds=10.0, most=9)(np.array([2, 3]), 0).tolist() == [4, 9]


def test_plans_give_every_client_its_own_number_of_steps_and_its_staleness():
    data = fc.FederatedData({"n": np.arange(12)}, np.array([0, 3, 4, 10, 12]))
    work = fc.extend.LocalWork(2, steps=speeds.budget(FLEET, 8.0, 12))
    ids = np.array([3, 0, 2])
    cohort = fc.extend.plan(data, ids, work, seed=0, round=5, num_devices=2, staleness=10 * ids)
    seen = cohort.ids >= 0
    assert dict(zip(cohort.ids[seen], cohort.num_steps[seen], strict=True)) == {0: 1, 2: 4, 3: 12}
    assert np.array_equal(cohort.staleness[seen], 10 * cohort.ids[seen])
    assert cohort.staleness.dtype == np.int32
    last = cohort.first[seen] + cohort.num_steps[seen]
    assert np.all(last <= cohort.example_weight.shape[1])
    assert fc.extend.plan(data, ids, work, seed=0, round=5).staleness is None


def test_batches_are_those_that_fit_and_every_example_comes_once_an_epoch():
    """Against a loop in NumPy: SGD on the means of each client's own batches, unshuffled."""
    sizes = speeds.batch_budget(FLEET, seconds=2.0, most=4)  # 1, 2, 4 and, where 16 would fit, 4
    data = fc.FederatedData({"a": np.arange(14, dtype=np.float32)}, np.array([0, 3, 6, 11, 14]))
    work = fc.extend.LocalWork(sizes, epochs=2, shuffle=False)
    ids = np.array([3, 0, 2, 1])
    cohort = fc.extend.plan(data, ids, work, seed=0, round=0, num_devices=2)
    weights = {}
    for d, s in np.argwhere(cohort.ids >= 0):
        rows = slice(cohort.first[d, s], cohort.first[d, s] + cohort.num_steps[d, s])
        weights[int(cohort.ids[d, s])] = cohort.example_weight[d, rows].sum(1).tolist()
    assert weights == {0: [1] * 6, 1: [2, 1] * 2, 2: [4, 1] * 2, 3: [3] * 2}
    assert cohort.example_weight.shape[2] == 4
    assert work.duration(ids, data.sizes, 0).tolist() == [2.0, 1.5, 4.0, 2.0]

    lr, ends = 0.1, []
    for c, size in enumerate([1, 2, 4, 4]):
        a, x = data.client(c)["a"], 0.0
        for batch in 2 * [a[i : i + size] for i in range(0, len(a), size)]:
            x -= lr * (x - batch.mean())
        ends.append(x)
    params = fc.train(
        fc.fedavg(half_square, optax.sgd(lr)),
        data,
        {"x": np.float32(0.0)},
        rounds=1,
        batch_size=sizes,
        local_epochs=2,
        shuffle=False,
    ).params
    np.testing.assert_allclose(params["x"], np.average(ends, weights=data.sizes), rtol=1e-6)


def test_nobody_is_late_who_keeps_to_the_deadline():
    fleet = speeds.lognormal(1.0, 0.1, sigma=0.4)
    steps = speeds.budget(fleet, 6.0, 50)
    here = clock.World(np.full(200, 9), lambda ids: steps(ids, 7), 7)
    timeline = clock.Timeline(clock.synchronous(sampling.uniform(30), fleet, deadline=6.0), here)
    metrics = [timeline[r].metrics for r in range(20)]
    assert not any(m["late"] for m in metrics)
    assert 20 * 5.0 < metrics[-1]["simulated_seconds"] <= 20 * 6.0
    assert len({int(n) for n in steps(np.arange(200), 7)}) > 5


def test_unequal_steps_bias_fedavg_and_not_fednova():
    """On quadratics both have a fixed point in closed form: a step takes a client the fraction lr of its way to a_c.

    After t_c steps it is ``c_c = 1 - (1 - lr)^t_c`` of it: FedAvg ends at the mean of a weighted by c_c, FedNova at
    that weighted by ``c_c / t_c``, which is lr + O(lr^2) whatever t_c. The optimum is the plain mean.
    """
    a, lr = np.array([4.0, 0.0, -1.0, 1.0]), 0.005
    t = np.array([1, 2, 4, 12])

    def end(make):
        return fc.train(
            make(half_square, optax.sgd(lr)),
            targets(a),
            {"x": np.float32(0.0)},
            rounds=900,
            batch_size=1,
            local_steps=speeds.budget(FLEET, 8.0, 12),
            rounds_per_dispatch=100,
        ).params["x"]

    c = 1 - (1 - lr) ** t
    fedavg, fednova = np.sum(c * a) / np.sum(c), np.sum(c / t * a) / np.sum(c / t)
    np.testing.assert_allclose(end(fc.fedavg), fedavg, atol=1e-4)
    np.testing.assert_allclose(end(fc.fednova), fednova, atol=1e-4)
    assert abs(fedavg - a.mean()) > 0.3
    assert abs(fednova - a.mean()) < 0.02


@pytest.mark.parametrize("bad", [{"seconds": 0, "most": 3}, {"seconds": 1.0, "most": 0}, {"seconds": 1.0, "most": 1.5}])
def test_budgets_out_of_range_are_refused(bad):
    for make in (speeds.budget, speeds.batch_budget):
        with pytest.raises(fc.InvalidInput):
            make(FLEET, **bad)
