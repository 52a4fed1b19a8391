"""Fairness: row by row with the oracles, and the limiting cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import fair as oracle
from problems import assert_close
from test_personal import (
    COHORTS,
    LR,
    RUN,
    SIZES,
    START,
    STEPS,
    UNIFORM,
    check,
    flat,
    gradient,
    loss,
    regressions,
    squared,
    trained,
    tree_of,
)

import fedjax_clip as fc


@pytest.mark.parametrize("q", [0.0, 0.5, 2.0])
def test_q_ffl_is_the_oracles(q):
    rows = oracle.qfedavg(START, gradient, loss, COHORTS, STEPS, LR, q)
    check(functools.partial(fc.fair.q_ffl, q=q, rate=LR), rows)


@pytest.mark.parametrize("t", [0.0, 1.5, -1.0])
def test_term_is_the_oracles(t):
    weights = np.array(SIZES)
    rows = oracle.term(START, gradient, loss, COHORTS, STEPS, LR, t, weights=weights)
    check(functools.partial(fc.fair.term, t=t), rows)


@pytest.mark.parametrize(("epsilon", "normalise"), [(0.1, True), (1.0, True), (0.3, False)])
def test_fedmgda_is_the_oracles(epsilon, normalise):
    rows = oracle.fedmgda(*RUN, epsilon, weights=np.array(SIZES), normalise=normalise)
    check(fc.fedavg, rows, reducer=fc.reduce.min_norm(epsilon, normalise))


@pytest.mark.parametrize("seed", range(5))
def test_no_client_loses_along_the_shortest_combination(seed):
    rng = np.random.default_rng(seed)
    stack = {"a": rng.normal(size=(6, 3)).astype(np.float32), "b": rng.normal(size=(6, 2, 2)).astype(np.float32)}
    roster = fc.reduce.Roster(jnp.arange(6), jax.random.key(0))

    def reduced(epsilon):
        reducer = fc.reduce.min_norm(epsilon, normalise=False)
        zero = reducer.zero(jax.tree.map(lambda x: x[0], stack), roster)
        return reducer.finish(reducer.add(zero, stack, jnp.arange(1.0, 7)), None)

    free, mean = reduced(1.0), reduced(0.0)
    along = sum(np.tensordot(stack[k], free[k], stack[k].ndim - 1) for k in stack)
    length = sum(np.sum(x**2) for x in free.values())
    assert np.all(along >= length - 1e-4)
    weights = np.arange(1.0, 7) / 21
    assert_close(mean, jax.tree.map(lambda x: np.tensordot(weights, x, 1).astype(np.float32), stack))


@pytest.mark.parametrize("rate", [0.0, 0.05, 2.0])
def test_afl_is_the_oracles(rate):
    rows = oracle.afl(START, gradient, loss, COHORTS, STEPS, LR, rate)
    server, _, _ = trained(functools.partial(fc.fair.afl, clients=4, rate=rate))
    np.testing.assert_allclose(flat(server.params), rows["x"][-1], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(server.own, rows["lam"][-1], rtol=2e-4, atol=2e-5)


def test_q_zero_and_t_zero_are_fedavg():
    assert_close(
        trained(functools.partial(fc.fair.q_ffl, q=0.0, rate=0.3))[0].params,
        trained(fc.fedavg, reducer=UNIFORM)[0].params,
    )
    assert_close(trained(functools.partial(fc.fair.term, t=0.0))[0].params, trained(fc.fedavg)[0].params)


def test_afl_knows_its_clients_by_their_numbers():
    def afl(clients):
        return fc.fair.afl(squared, optax.sgd(LR), clients=clients, rate=0.05)

    before, after = (dataclasses.replace(regressions(), names=list(names)) for names in ("abcd", "abce"))
    first = fc.train(afl(4), before, tree_of(START), rounds=1, batch_size=2)
    with pytest.raises(fc.InvalidInput, match="the clients have changed: begin a new run"):
        fc.train(afl(4), after, tree_of(START), rounds=2, batch_size=2, state=first.state)
    with pytest.raises(fc.InvalidInput, match="names client 4, and there is none: there are 4"):
        fc.train(afl(5), regressions(), tree_of(START), rounds=1, batch_size=2)
    beyond = fc.train(afl(3), regressions(), tree_of(START), rounds=1, batch_size=2)
    assert beyond.history[0]["dropped"] == 1
    assert np.all(np.isfinite(flat(beyond.params)))
