"""Loops of known length, and small arrays that travel together, change no bit of what is trained."""

import dataclasses

import jax
import pytest
from problems import COHORTS, assert_close, assert_identical, entry, parameters, population

import fedjax_clip as fc
from fedjax_clip.core.loops import Loops, buckets
from fedjax_clip.training import planner

# Cohorts of 6, 6 and 4 or 2 steps: the last client computes up to two in vain, and the fourth slot is empty.
RAGGED = Loops(packed=True, buckets=((2, 6), (1, 4)))
NAMES = (
    *("fedavg, dropout", "fedavg, stateful link", "fedavgm, adam locally", "fedavg, every clip", "fedsgd"),
    *("fedavg, on a grid", "scaffold, robust", "episode_plus"),
)


def of(loops):
    return lambda cohort: dataclasses.replace(cohort, loops=loops)


@pytest.mark.parametrize("name", [pytest.param(n, id=f"@{n}") for n in NAMES])
def test_loops_of_known_length_give_the_same_bits(name):
    run = entry(name)
    server, clients, metrics = run.rounds(parameters(), COHORTS)
    known = run.rounds(parameters(), COHORTS, edit=of(RAGGED))
    assert_identical(known[:2], (server, clients))
    assert_close(known[2], metrics)  # a client's examples are summed in another order


def test_chunks_of_known_length_give_the_same_bits():
    run = entry("scaffold", width=2)
    expected = run.rounds(parameters(), COHORTS)
    known = run.rounds(parameters(), COHORTS, edit=of(Loops(packed=True, buckets=((1, 6), (1, 4)))))
    assert_identical(known[:2], expected[:2])


def test_the_length_of_a_known_loop_is_in_the_program():
    run = entry("fedavg")
    for loops, known in ((Loops(), False), (RAGGED, True)):
        cohort = of(loops)(run.cohort(COHORTS[0], 0, run.start(parameters())[1]))
        one = jax.tree.map(lambda x: x[0], cohort)
        text = str(jax.make_jaxpr(run.algorithm.round)(run.start(parameters())[0], one, jax.random.key(0)))
        assert ("while[" not in text) == known


def test_a_run_with_loops_of_known_length_ends_with_the_same_bits(monkeypatch):
    run = entry("fedavg")

    def trained(sizes, **options):
        work = {"cohort_size": 3, "batch_size": 2, "rounds": 6, "rounds_per_dispatch": 3, "devices": jax.devices()[:1]}
        return fc.train(run.algorithm, population(sizes), parameters(), **work, **options)

    even, ragged = (8, 8, 7, 8, 8, 8), (20, 3, 9, 1, 5, 12)
    expected = [trained(sizes) for sizes in (even, ragged)]
    monkeypatch.setattr(planner, "LAUNCHES", {"cpu"})
    for sizes, other in zip((even, ragged), expected, strict=True):
        known = trained(sizes)
        assert_identical(known.state.server, other.state.server)
        assert [row["wasted_steps"] for row in known.history] == [row["wasted_steps"] for row in other.history]


def test_buckets_waste_little_and_stay():
    assert buckets([5, 5, 5, 5], most=21) == ((4, 5),)
    assert buckets([5, 5, 5, 4], most=20) == ((4, 5),)
    assert buckets([5, 5, 5, 4, 1, 0], most=21) == ((4, 5), (1, 1))
    assert buckets([9, 7, 5, 3, 1], most=26) is None  # more loops than are worth their compilation
    assert buckets([5, 5, 4, 4], most=20, like=((4, 5),)) == ((4, 5),)
    assert buckets([6, 5, 5, 4], most=21, like=((4, 5),)) == ((1, 6), (3, 5))
    assert buckets([], most=0) is None
