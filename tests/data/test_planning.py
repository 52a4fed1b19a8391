"""Plans: every example as often as it should be, and the same work wherever a client lands."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_clip as fc
from fedjax_clip.data.planning import _round_up, wasted_steps


def numbered(sizes):
    """A population whose examples are their own numbers."""
    return fc.FederatedData({"n": np.arange(sum(sizes))}, np.concatenate([[0], np.cumsum(sizes)]))


def rows_of(cohort, device, slot):
    """``[steps][examples]``: what a client trains on, padding left out."""
    first, steps = cohort.first[device, slot], cohort.num_steps[device, slot]
    batches, weight = cohort.batches["n"][device], cohort.example_weight[device]
    return [batches[r][weight[r] > 0].tolist() for r in range(first, first + steps)]


def by_client(cohort):
    places = np.argwhere(cohort.ids >= 0)
    return {int(cohort.ids[d, s]): rows_of(cohort, d, s) for d, s in places}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_plan_holds_every_example_once_an_epoch_whoever_sits_where(data):
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    population = numbered(sizes)
    ids = data.draw(st.permutations(range(len(sizes))))[: data.draw(st.integers(1, len(sizes)))]
    batch_size, epochs = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    devices, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    work = fc.extend.LocalWork(batch_size, epochs)
    cohort = fc.extend.plan(population, np.array(ids), work, seed=1, round=2, num_devices=devices, width=width)

    assert cohort.ids.shape[0] == devices
    assert cohort.ids.shape[1] % width == 0
    assert np.all(np.diff((cohort.ids < 0).astype(int), axis=1) >= 0)  # empty slots come last
    plans = by_client(cohort)
    assert sorted(plans) == sorted(ids)
    for id, rows in plans.items():
        own = list(range(population.offsets[id], population.offsets[id + 1]))
        per_epoch = -(-len(own) // batch_size)
        assert len(rows) == epochs * per_epoch
        for e in range(epochs):
            epoch = rows[e * per_epoch : (e + 1) * per_epoch]
            assert sorted(sum(epoch, [])) == own
            assert all(len(row) == batch_size for row in epoch[:-1])
    alone = {}
    for id in ids:
        alone |= by_client(fc.extend.plan(population, np.array([id]), work, seed=1, round=2))
    assert plans == alone
    for device, slot in np.argwhere(cohort.ids >= 0):
        assert cohort.weight[device, slot] == sizes[cohort.ids[device, slot]]


def test_local_steps_go_on_into_further_epochs():
    rows = by_client(fc.extend.plan(numbered([5]), np.array([0]), fc.extend.LocalWork(2, steps=7), seed=0, round=0))[0]
    assert [len(row) for row in rows] == [2, 2, 1, 2, 2, 1, 2]
    assert sorted(sum(rows[:3], [])) == sorted(sum(rows[3:6], [])) == list(range(5))


def test_orders_differ_between_epochs_rounds_clients_and_seeds():
    def order(seed=0, round=0, id=0, epoch=0):
        plan = fc.extend.plan(numbered([40, 40]), np.array([id]), fc.extend.LocalWork(40, 2), seed=seed, round=round)
        return [n - 40 * id for n in by_client(plan)[id][epoch]]

    orders = [order(), order(seed=1), order(round=1), order(id=1), order(epoch=1)]
    assert len({tuple(o) for o in orders}) == len(orders)


def test_without_shuffling_examples_keep_their_order():
    plan = fc.extend.plan(numbered([5]), np.array([0]), fc.extend.LocalWork(2, shuffle=False), seed=0, round=0)
    assert by_client(plan)[0] == [[0, 1], [2, 3], [4]]


def test_devices_finish_together_on_log_normal_clients():
    rng = np.random.default_rng(0)
    sizes = np.clip(np.exp(rng.normal(np.log(60) - 0.32, 0.8, 1000)), 1, 600).astype(int)
    population, waste = numbered(sizes), []
    shapes = set()
    for round in range(50):
        ids = fc.data.sampling.uniform(50).sample(sizes, 0, round)
        plan = fc.extend.plan(
            population, ids, fc.extend.LocalWork(20), seed=0, round=round, num_devices=2, population=population.examples
        )
        load = plan.num_steps.sum(1)
        waste.append(wasted_steps(plan))
        np.testing.assert_allclose(waste[-1], 1 - load.mean() / load.max(), atol=1e-12)
        shapes.add(plan.batches.shape)
    assert np.mean(waste) < 0.01
    assert len(shapes) <= 3


@given(st.integers(0, 10**6))
def test_rows_are_rounded_up_by_less_than_half(rows):
    assert max(rows, 1) <= _round_up(rows) <= max(1.5 * rows, 1)


def test_an_empty_cohort_is_all_padding():
    plan = fc.extend.plan(numbered([3, 4]), np.array([], int), fc.extend.LocalWork(2), seed=0, round=0, num_devices=2)
    assert np.all(plan.ids == -1)
    assert np.all(plan.example_weight == 0)


def test_packed_batches_hold_what_the_indices_point_at():
    population = numbered([5, 3, 9])
    ids, options = np.array([2, 0]), {"seed": 0, "round": 1, "num_devices": 2}
    packed = fc.extend.plan(population, ids, fc.extend.LocalWork(4), **options)
    resident = fc.extend.plan(population, ids, fc.extend.LocalWork(4), population=population.examples, **options)
    np.testing.assert_array_equal(population.examples["n"][resident.batches], packed.batches["n"])
    jax.tree.map(np.testing.assert_array_equal, packed.example_weight, resident.example_weight)


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"epochs": 0}, {"steps": -1}, {"batch_size": 2.5}, {"epochs": None}]
)
def test_work_that_makes_no_sense_is_refused(bad):
    with pytest.raises(fc.InvalidInput, match="whole number of at least 1"):
        fc.extend.LocalWork(**bad)


def test_epochs_and_steps_are_two_ways_to_say_it():
    with pytest.raises(fc.InvalidInput, match="local_epochs and local_steps both say"):
        fc.extend.LocalWork(epochs=2, steps=3)


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (fc.extend.LocalWork(steps=lambda ids, seed: 0 * ids), r"local_steps.ids, seed. must be .* at least 1, not 0"),
        (fc.extend.LocalWork(steps=lambda ids, seed: 1.5 + ids), "2 whole numbers, not float64"),
        (fc.extend.LocalWork(steps=lambda ids, seed: ids[:1]), "2 whole numbers, not int64 of shape .1,."),
        (fc.extend.LocalWork(fc.data.speeds.BatchSizes(lambda ids, seed: 9 + ids, 8)), "between 1 and 8, not 9"),
    ],
)
def test_functions_of_clients_give_numbers_that_can_be(work, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        fc.extend.plan(numbered([3, 4]), np.array([0, 1]), work, seed=0, round=0)


def test_a_chunk_waits_for_its_longest_client():
    plan = fc.extend.plan(numbered([4, 2, 1, 1]), np.arange(4), fc.extend.LocalWork(1), seed=0, round=0, width=2)
    assert wasted_steps(plan) == 1 - 8 / (2 * 4 + 2 * 1)
