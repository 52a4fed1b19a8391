"""Loops of known length, and small arrays that travel together, change no bit of what is trained."""

import dataclasses

import jax
import pytest
from jax.extend.core import jaxprs_in_params
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


def loops_of(jaxpr):
    """``(primitive, number of arrays that it carries)`` of all loops, the innermost last."""
    for equation in jaxpr.eqns:
        inside = list(jaxprs_in_params(equation.params))
        if equation.primitive.name in ("scan", "while"):
            yield equation.primitive.name, len(equation.outvars)
        for one in inside:
            yield from loops_of(one)


def test_a_known_loop_carries_few_arrays():
    run = entry("fedavg")
    found = {}
    for loops in (Loops(), RAGGED):
        server, clients = run.start(parameters())
        one = jax.tree.map(lambda x: x[0], of(loops)(run.cohort(COHORTS[0], 0, clients)))
        found[loops] = list(loops_of(jax.make_jaxpr(run.algorithm.round)(server, one, jax.random.key(0)).jaxpr))
    assert {name for name, _ in found[Loops()]} == {"while"}
    assert {name for name, _ in found[RAGGED]} == {"scan"}
    # A GPU starts a kernel, or a few, for each: the parameters, all scalars in two vectors, loss and accuracy with
    # their weights and the number of examples by their place in the batch, and the loop's counter.
    assert found[RAGGED][-1][1] <= len(parameters()) + 2 + 5 + 1 < found[Loops()][-1][1]


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
    assert buckets([6, 6, 5, 5], most=23, like=((3, 6), (1, 2))) == ((3, 6), (1, 5))  # serves both
    assert buckets([6, 6, 5, 5], most=22, like=((3, 6), (1, 2))) == ((2, 6), (2, 5))
    assert buckets([], most=0) is None
