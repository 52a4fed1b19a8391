"""Newer defences and optimised attacks beside ``tests/oracles/defences.py``, whoever comes."""

import functools

import jax
import numpy as np
import pytest
from oracles import defences as oracle
from test_robust import IDS, N, flat, fold, matrix, messages, with_absent

import fedjax_clip as fc
from fedjax_clip import attacks, reduce

WHOLE = (np.arange(10),)  # all coordinates of a message


def stack_of(change):
    return change(reduce.stacking(lambda stack: stack.messages))


CASES = {  # ours, the oracle's, f
    "arc": (lambda: reduce.arc(1, reduce.uniform_mean()), lambda x: oracle.arc(x, 1)[0].mean(0)),
    "arc, 2": (lambda: reduce.arc(2, reduce.median()), lambda x: np.median(oracle.arc(x, 2)[0], axis=0)),
    "nnm": (lambda: reduce.nnm(2, reduce.median()), lambda x: np.median(oracle.nnm(x, 2), axis=0)),
    "mda": (lambda: reduce.mda(2), lambda x: oracle.mda(x, 2)[0]),
    "smea": (lambda: reduce.smea(2), lambda x: oracle.smea(x, 2)[0]),
    "caf": (lambda: reduce.caf(2), lambda x: oracle.caf(x, 2)),
    "bulyan": (lambda: reduce.bulyan(1), lambda x: oracle.bulyan(x, 1)[0]),
    "dnc": (lambda: reduce.dnc(2), lambda x: oracle.dnc(x, 2, WHOLE)[0]),
    "dnc, half": (lambda: reduce.dnc(3, fraction=0.5), lambda x: oracle.dnc(x, 3, WHOLE, 0.5)[0]),
    "flame": (reduce.flame, lambda x: oracle.flame(x)[0]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_defence_is_what_its_paper_says_whoever_comes(name):
    make, expected = CASES[name]
    fewest = make().fewest
    for seed, count in enumerate((N, 6, 5, 3)):
        present = np.random.default_rng(seed).permutation(N) < count
        values = with_absent(jax.tree.map(lambda x: x + 1, messages(seed)), present)
        if seed == 0:
            values = jax.tree.map(lambda x: np.where(IDS.reshape(-1, *[1] * (x.ndim - 1)) < 6, -9 * x, x), values)
        rows = np.flatnonzero(present)
        want = expected(matrix(values, rows[np.argsort(IDS[rows])])) if count >= fewest else 0
        got = flat(fold(make, values, present.astype(np.float32), IDS))
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_flame_takes_a_message_of_zeros_for_one_without_an_angle():
    values = {"w": np.concatenate([np.zeros((2, 3)), np.random.default_rng(0).normal(size=(5, 3)) + 2])}
    values = {"w": values["w"].astype(np.float32)}
    got = fold(reduce.flame, values, np.ones(N, np.float32), np.arange(N, dtype=np.int32))["w"]
    np.testing.assert_allclose(got, oracle.flame(values["w"].astype(np.float64))[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["alie", "ipm"])
def test_an_optimised_attack_sends_the_factor_that_harms_most(name):
    optimal, fixed = getattr(attacks, f"optimal_{name}"), getattr(attacks, name)
    bad, few = [2, 31], 2
    factors = 10.0 * 2.0 ** (-0.5 * np.arange(6)[::-1])
    values, everyone = messages(3), np.ones(N, np.float32)
    values = jax.tree.map(lambda x: x + 2, values)
    honest = matrix(values, np.argsort(IDS))[~np.isin(np.sort(IDS), bad)]
    for make, aggregate in (
        (reduce.median, lambda x: np.median(x, axis=0)),
        (reduce.uniform_mean, lambda x: x.mean(0)),
    ):
        _, best = oracle.optimised(getattr(oracle, name), aggregate, honest, few, factors)
        attacked = functools.partial(lambda make: optimal(make(), bad, candidates=6), make)
        told = functools.partial(lambda make, best: fixed(make(), bad, float(best)), make, best)
        got, want = (flat(fold(one, values, everyone, IDS)) for one in (attacked, told))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        harms = [np.linalg.norm(flat(fold(functools.partial(lambda make, z: fixed(make(), bad, z), make, float(z)),
                                          values, everyone, IDS)) - honest.mean(0)) for z in factors[[0, 5]]]  # fmt: skip
        assert np.linalg.norm(got - honest.mean(0)) >= max(harms) - 1e-5


def test_factors_that_mean_nothing_are_refused():
    for make in (
        lambda: attacks.strongest(reduce.median(), [0], lambda stack, honest, z: stack, []),
        lambda: attacks.strongest(reduce.median(), [0], lambda stack, honest, z: stack, [np.inf]),
        lambda: attacks.optimal_alie(reduce.median(), [0], most=0.0),
        lambda: attacks.optimal_ipm(reduce.median(), [0], candidates=0),
        lambda: attacks.optimal_ipm(reduce.median, [0]),
    ):
        with pytest.raises(fc.InvalidInput):
            make()
