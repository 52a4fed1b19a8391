"""What bad clients do, by the formulas of the papers, and that honest ones stay as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from problems import Run, assert_close, assert_identical, clipped_sgd, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import attacks, reduce, uplink
from fedjax_clip.reduce import Roster

N, BAD = 7, [2, 31]
IDS = np.array([13, 2, 40, 7, 5, 31, 11], np.int32)
HONEST = ~np.isin(IDS, BAD)
ROWS = np.argsort(IDS)  # the order in which a stack has them


CONTEXT = fc.uplink.Context(jax.random.key(0), jax.random.key(9), jnp.int32(0), jnp.float32(1))


def messages(seed=0):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(N, 3, 2)).astype(np.float32), "b": rng.normal(size=(N, 4)).astype(np.float32)}


def sent(attack, values, weights=None):
    """All messages as the reducer gets them: ``[N, ...]``, in the order of the clients."""
    everything = reduce.stacking(lambda stack: stack.messages)
    reducer = attack(everything)
    weights = np.ones(N, np.float32) if weights is None else weights
    acc = reducer.zero(jax.tree.map(lambda x: x[0], values), Roster(IDS, jax.random.key(0)))
    return reducer.finish(reducer.add(acc, values, jnp.asarray(weights)), None)


def test_those_who_collude_send_what_the_papers_say():
    values = messages()
    good, few = int(HONEST.sum()), len(BAD)
    s = N // 2 + 1 - few
    z = scipy.stats.norm.ppf((good - s) / good)
    assert z > 0.2
    expected = {
        "alie": lambda x: x[HONEST].mean(0) - z * x[HONEST].std(0),
        "alie, 1.5": lambda x: x[HONEST].mean(0) - 1.5 * x[HONEST].std(0),
        "ipm": lambda x: -0.1 * x[HONEST].mean(0),
        "mimic": lambda x: x[IDS == 7][0],
    }
    made = {
        "alie": lambda reducer: attacks.alie(reducer, BAD),
        "alie, 1.5": lambda reducer: attacks.alie(reducer, BAD, 1.5),
        "ipm": lambda reducer: attacks.ipm(reducer, BAD),
        "mimic": lambda reducer: attacks.mimic(reducer, BAD, target=7),
    }
    for name, attack in made.items():
        got = sent(attack, values)
        for key, x in values.items():
            want = np.where(HONEST.reshape(-1, *[1] * (x.ndim - 1)), x, expected[name](x))[ROWS]
            np.testing.assert_allclose(got[key], want, rtol=1e-5, atol=1e-6)
            assert_identical(got[key][HONEST[ROWS]], jnp.asarray(x[ROWS][HONEST[ROWS]]))


def test_a_bad_client_that_does_not_take_part_sends_nothing():
    values, weights = messages(), np.float32(IDS != 31)
    values = jax.tree.map(lambda x: np.where((IDS != 31).reshape(-1, *[1] * (x.ndim - 1)), x, 0), values)
    got = sent(lambda reducer: attacks.ipm(reducer, BAD), values, weights)
    order = np.argsort(np.where(IDS == 31, 100, IDS))
    assert not np.any(got["b"][-1])  # absent, and so last
    np.testing.assert_allclose(got["b"][0], -0.1 * values["b"][HONEST].mean(0), rtol=1e-5)
    assert_identical(got["b"][1:-1], jnp.asarray(values["b"][order][1:-1]))
    assert attacks.ipm(fc.reduce.fixed_mean(5), BAD).denominator == 5


def test_links_change_what_bad_clients_send_and_nothing_else():
    update = {"w": jnp.array([[3.0, -4.0]]), "b": jnp.array([12.0])}
    norm = lambda x: np.sqrt(sum(np.sum(np.square(v)) for v in x.values()))  # noqa: E731

    def encoded(link, client):
        ctx = fc.uplink.Context(jax.random.key(client), jax.random.key(9), jnp.int32(client), jnp.float32(1))
        return link.encode(update, (), (), ctx)[0]

    links = {
        attacks.sign_flip([1, 4]): lambda x: assert_identical(x, jax.tree.map(jnp.negative, update)),
        attacks.scaling([1, 4], 10.0): lambda x: assert_close(x, jax.tree.map(lambda v: 10 * v, update)),
        attacks.constant([1, 4], 6.0): lambda x: assert_close(x, jax.tree.map(lambda v: 0 * v + 6 / 3**0.5, update)),
    }
    for link, check in links.items():
        check(encoded(link, 4))
        assert_identical(encoded(link, 3), update)
    one, other = (encoded(attacks.noise([1, 4], 0.1), client) for client in (1, 4))
    assert 0 < norm(one) < 1
    assert np.any(one["w"] != other["w"])  # each client's own
    draws = attacks.noise([0], 0.1).encode(jnp.zeros(4000), (), (), CONTEXT)[0] / 0.1
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-6  # which is how often it fails by chance
    assert np.isnan(encoded(attacks.constant([1], np.nan), 1)["b"]).all()
    assert_identical(encoded(attacks.sign_flip([]), 0), update)


def test_not_a_number_is_dropped_and_huge_values_meet_the_reducer():
    def algorithm(norm, reducer=None):
        link = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.2), attacks.constant([4], norm))
        return fc.fedavg(softmax_loss, clipped_sgd, uplink=link, reducer=reducer or fc.reduce.uniform_mean())

    run = Run(algorithm(1.0), population())
    server, clients = run.start(parameters())
    cohort = jax.tree.map(lambda x: x[0], run.cohort([4, 1, 3], 0, clients))
    either = {
        False: jax.jit(lambda norm: algorithm(norm).round(server, cohort, jax.random.key(0))),
        True: jax.jit(lambda norm: algorithm(norm, reduce.median()).round(server, cohort, jax.random.key(0))),
    }

    def first_round(norm, robust=False):
        after, _, metrics = either[robust](norm)
        return metrics["dropped"], np.abs(after.params["w"]).max()

    for norm in (np.nan, np.inf, 1e20):
        dropped, largest = first_round(norm)
        assert dropped == 1
        assert largest < 10
    dropped, largest = first_round(1e18)
    assert dropped == 0
    assert largest > 1e16
    dropped, largest = first_round(1e18, robust=True)
    assert dropped == 0
    assert largest < 10


def test_data_attacks_touch_the_bad_clients_only():
    data = population()
    labels = data.examples["y"]
    bad = np.isin(np.repeat(np.arange(6), data.sizes), [1, 4])
    flipped = attacks.label_flip(data, [1, 4], num_classes=3).examples["y"]
    np.testing.assert_array_equal(flipped, np.where(bad, 2 - labels, labels))

    half = attacks.backdoor(data, [1, 4], features=[0, 3], value=9.0, target=2, fraction=0.5, seed=1)
    hit = half.examples["x"][:, 0] == 9
    assert 0 < hit.sum() < bad.sum()
    assert not np.any(hit & ~bad)
    assert np.all(half.examples["x"][hit][:, [0, 3]] == 9)
    assert np.all(half.examples["y"][hit] == 2)
    untouched = ~hit
    np.testing.assert_array_equal(half.examples["x"][untouched], data.examples["x"][untouched])
    np.testing.assert_array_equal(half.examples["x"][:, 1:3], data.examples["x"][:, 1:3])
    assert np.all(data.examples["x"] != 9)  # the data given stay as they are

    judged = attacks.triggered(data, [0, 3], 9.0, target=2)
    assert judged.num_examples == np.sum(labels != 2)
    assert np.all(judged.examples["y"] == 2)
    assert np.all(judged.examples["x"][:, [0, 3]] == 9)


def test_a_backdoor_is_learned_and_a_trimmed_mean_keeps_it_out():
    """One client of six, its update scaled so that the mean is its own: the pattern means class 0 then."""
    data, pattern = population(sizes=(40,) * 6), {"features": [3], "value": 6.0, "target": 1}
    poisoned = attacks.backdoor(data, [5], fraction=0.7, **pattern)
    sets = {"backdoor": attacks.triggered(data, **pattern)}
    success = {}
    for name, reducer in (("mean", fc.reduce.uniform_mean()), ("trimmed", reduce.trimmed_mean(1))):
        algorithm = fc.fedavg(softmax_loss, clipped_sgd, uplink=attacks.scaling([5], 6.0), reducer=reducer)
        options = {"rounds": 10, "local_steps": 5, "evaluate": fc.evaluator(softmax_loss, sets), "eval_every": 10}
        success[name] = fc.train(algorithm, poisoned, parameters(), **options).history[-1]["eval/backdoor/accuracy"]
    assert success["mean"] > 0.9
    assert success["trimmed"] < 0.7


@pytest.mark.parametrize(
    "make",
    [
        lambda: attacks.sign_flip(3),
        lambda: attacks.sign_flip([-1]),
        lambda: attacks.scaling([0.5]),
        lambda: attacks.noise([0], -1.0),
        lambda: attacks.label_flip(population(), [6], 3),
        lambda: attacks.backdoor(population(), [0], [4], 1.0, 0),
        lambda: attacks.backdoor(population(), [0], [0], 1.0, 0, fraction=1.5),
        lambda: attacks.mimic(reduce.median(), [0, 1], target=1),
        lambda: attacks.mimic(reduce.median(), [0, 1], target=-1),
        lambda: attacks.alie(reduce.median, [0, 1]),
        lambda: attacks.ipm(uplink.identity(), [0, 1]),
    ],
)
def test_attacks_that_cannot_be_are_refused(make):
    with pytest.raises(fc.InvalidInput):
        make()


def test_clients_that_there_are_not_are_refused_when_training_begins():
    median, clip, six = reduce.median(), uplink.clip_by_global_norm(1.0), population()

    def of_the_weights(loss, client_tx, **parts):
        return fc.partially_frozen(fc.fedavg(loss, client_tx, **parts), "^b$")

    def begin(link=None, reducer=None, make=fc.fedavg):
        algorithm = make(softmax_loss, clipped_sgd, uplink=link, reducer=reducer)
        return fc.train(algorithm, six, parameters(), rounds=1, cohort_size=2)

    for parts, number in (
        ({"link": attacks.sign_flip((0, 99))}, 99),
        ({"link": uplink.chain(clip, attacks.noise([6]))}, 6),
        ({"link": uplink.memory(attacks.scaling([7]))}, 7),
        ({"reducer": attacks.alie(median, (50, 60))}, 60),
        ({"reducer": reduce.norm_bounded(1.0, attacks.mimic(median, [0], target=77))}, 77),
        ({"reducer": reduce.bucketing(attacks.ipm(reduce.fltrust(8), [0]))}, 8),
        ({"link": attacks.sign_flip([9]), "make": fc.scaffold}, 9),
        ({"link": attacks.sign_flip([8]), "make": of_the_weights}, 8),
    ):
        with pytest.raises(fc.InvalidInput, match=f"names client {number}, .* there are 6, numbered from 0"):
            begin(**parts)
    assert len(begin(attacks.sign_flip([0, 5])).history) == 1
