"""Robust reducers: NumPy oracles from the papers' formulas, limiting cases, what bad clients can do at most."""

import functools

import jax
import numpy as np
import optax
import pytest
from problems import Run, assert_close, assert_identical, clipped_sgd, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import reduce
from fedjax_clip.reduce import Roster

N, SHAPES = 7, {"a": (3, 2), "b": (4,)}
IDS = np.array([13, 2, 40, 7, 5, 31, 11], np.int32)
KEY = jax.random.key(5)


def messages(seed=0, n=N, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=(n, *shape))).astype(np.float32) for name, shape in SHAPES.items()}


def flat(tree):
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])


def matrix(tree, rows):
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1)[rows] for x in jax.tree.leaves(tree)], axis=1)


@functools.partial(jax.jit, static_argnames=("make", "width"))
def fold(make, values, weights, ids, key=KEY, width=N):
    """What ``make()`` makes of messages that come ``width`` at a time."""
    reducer = make()
    acc = reducer.zero(jax.tree.map(lambda x: x[0], values), Roster(ids, key))
    for i in range(0, len(ids), width):
        acc = reducer.add(acc, jax.tree.map(lambda x, i=i: x[i : i + width], values), weights[i : i + width])
    return reducer.finish(acc, None)


def with_absent(values, present):
    """Absent and dropped clients are zeros, as ``exchange`` has them."""
    return jax.tree.map(lambda x: np.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, 0), values)


def trimmed(x, f):
    b = min(f, (len(x) - 1) // 2)
    return np.sort(x, axis=0)[b : len(x) - b].mean(0)


def krum(x, f, m=1):
    scores = [sum(sorted(((a - b) ** 2).sum() for j, b in enumerate(x) if j != i)[: max(len(x) - f - 2, 1)])
              for i, a in enumerate(x)]  # fmt: skip
    return x[np.argsort(scores, kind="stable")[:m]].mean(0)


def weiszfeld(x, iterations, smoothing):
    v = np.zeros(x.shape[1])
    for _ in range(iterations):
        b = 1 / np.maximum(np.linalg.norm(x - v, axis=1), smoothing)
        v = b @ x / b.sum()
    return v


def clipped(x, threshold):
    return x * np.minimum(1, threshold / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30))


def centered(x, threshold, iterations):
    v = np.zeros(x.shape[1])
    for _ in range(iterations):
        v = v + clipped(x - v, threshold).mean(0)
    return v


ORACLES = {
    "median": (reduce.median, lambda x: np.median(x, axis=0)),
    "trimmed": (lambda: reduce.trimmed_mean(2), lambda x: trimmed(x, 2)),
    "krum": (lambda: reduce.krum(1), lambda x: krum(x, 1)),
    "multi-krum": (lambda: reduce.krum(1, 3), lambda x: krum(x, 1, 3)),
    "geometric": (lambda: reduce.geometric_median(5, 0.01), lambda x: weiszfeld(x, 5, 0.01)),
    "centered": (lambda: reduce.centered_mean(1.5, 3), lambda x: centered(x, 1.5, 3)),
    "bounded": (lambda: reduce.norm_bounded(2.0), lambda x: clipped(x, 2.0).mean(0)),
    "bounded median": (lambda: reduce.norm_bounded(2.0, reduce.median()), lambda x: np.median(clipped(x, 2.0), 0)),
}


MAKE = {  # one function each, so that each compiles once
    "mean": fc.reduce.uniform_mean,
    "median": reduce.median,
    "trimmed": ORACLES["trimmed"][0],
    "krum": lambda: reduce.krum(2),
    "geometric": lambda: reduce.geometric_median(100),
    "centered": lambda: reduce.centered_mean(1.0, 3),
    "bounded": lambda: reduce.norm_bounded(1.0),
    "fltrust": lambda: reduce.fltrust(7),
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_reducer_is_what_its_paper_says_whoever_comes(name):
    make, oracle = ORACLES[name]
    for seed, count in enumerate((N, 6, 4, 3, 2, 1)):
        present = np.random.default_rng(seed).permutation(N) < count
        values = with_absent(messages(seed), present)
        weights = np.where(present, 1.0 + seed, 0).astype(np.float32)  # whatever they weigh
        rows = np.flatnonzero(present)
        expected = oracle(matrix(values, rows[np.argsort(IDS[rows])])) if count >= make().fewest else 0
        np.testing.assert_allclose(flat(fold(make, values, weights, IDS)), expected, rtol=3e-5, atol=3e-6)
    nobody = fold(make, jax.tree.map(np.zeros_like, values), np.zeros(N, np.float32), IDS)
    assert not flat(nobody).any()


@pytest.mark.parametrize("name", ["median", "krum", "centered", "bounded", "bucketing", "fltrust", "alie"])
def test_order_chunks_and_absent_clients_change_no_bit(name):
    more = {
        "bucketing": lambda: reduce.bucketing(reduce.geometric_median(2), 2),
        "fltrust": MAKE["fltrust"],
        "alie": lambda: fc.attacks.alie(reduce.median(), [2, 31]),
    }
    make = more.get(name) or ORACLES[name][0]
    present = np.array([1, 1, 0, 1, 1, 1, 1], bool)
    values, weights = with_absent(messages(3), present), present.astype(np.float32)
    expected = fold(make, values, weights, IDS)
    assert flat(expected).any()
    order = np.random.default_rng(1).permutation(N)
    shuffled = jax.tree.map(lambda x: x[order], values), weights[order], IDS[order]
    compare = assert_close if name == "bounded" else assert_identical  # a sum as the messages come
    compare(fold(make, *shuffled), expected)
    compare(fold(make, values, weights, IDS, width=1), expected)
    longer = jax.tree.map(lambda x: np.concatenate([x, np.zeros((2, *x.shape[1:]), x.dtype)]), values)
    absent = np.concatenate([weights, [0, 0]]).astype(np.float32), np.concatenate([IDS, [-1, -1]]).astype(np.int32)
    assert_close(fold(make, longer, *absent, width=N + 2), expected)


def test_limiting_cases():
    values, everyone = messages(4), np.ones(N, np.float32)
    mean = fold(fc.reduce.uniform_mean, values, everyone, IDS)
    assert reduce.trimmed_mean(0).linear
    assert_identical(fold(lambda: reduce.trimmed_mean(0), values, everyone, IDS), mean)
    inner = reduce.krum(1)
    assert reduce.bucketing(inner, 1) is inner
    one = np.float32(IDS == 7)
    alone = fold(MAKE["median"], with_absent(values, one > 0), one, IDS)
    assert_identical(alone, jax.tree.map(lambda x: x[3], values))
    three = np.float32(np.arange(N) < 3)
    nearest = fold(lambda: reduce.krum(0, 5), with_absent(values, three > 0), three, IDS)
    assert_close(nearest, jax.tree.map(lambda x: x[:3].mean(0), values))
    same = jax.tree.map(lambda x: np.repeat(x[:1], N, axis=0), values)
    assert_identical(fold(MAKE["krum"], same, everyone, IDS), jax.tree.map(lambda x: x[0], same))
    assert_identical(fold(reduce.median, same, everyone, IDS), jax.tree.map(lambda x: x[0], same))
    assert_close(fold(lambda: reduce.krum(0, N), values, everyone, IDS), mean)
    assert_close(fold(lambda: reduce.geometric_median(1, 1e6), values, everyone, IDS), mean)
    assert_close(fold(lambda: reduce.centered_mean(np.inf, 1), values, everyone, IDS), mean)
    assert_identical(fold(lambda: reduce.norm_bounded(np.inf), values, everyone, IDS), mean)
    bounded = fold(MAKE["bounded"], values, everyone, IDS)
    assert_close(fold(lambda: reduce.centered_mean(1.0, 1), values, everyone, IDS), bounded)


def test_the_geometric_median_goes_where_its_points_go():
    points = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))

    def at(x):
        return fold(lambda: reduce.geometric_median(100), np.float32(x), np.ones(N, np.float32), IDS)

    middle = np.asarray(at(points), np.float64)
    pulls = (points - middle) / np.linalg.norm(points - middle, axis=1, keepdims=True)
    np.testing.assert_allclose(pulls.sum(0), 0, atol=1e-4)  # the gradient of the sum of distances
    np.testing.assert_allclose(at(points + 3), middle + 3, atol=1e-4)
    np.testing.assert_allclose(at(5 * points), 5 * middle, atol=1e-4)
    np.testing.assert_allclose(at(points @ turn), middle @ turn, atol=1e-4)


@pytest.mark.parametrize("evil", ["huge", "opposite", "far apart", "a little"])
def test_bad_clients_move_an_aggregate_by_at_most_what_is_promised(evil):
    values, bad = messages(6), IDS < 6  # two of seven
    forged = {
        "huge": lambda x, rng: np.full_like(x, 1e18),
        "opposite": lambda x, rng: -50 * x,
        "far apart": lambda x, rng: (1e6 * rng.normal(size=x.shape)).astype(np.float32),
        "a little": lambda x, rng: np.broadcast_to(x[~bad].mean(0) - 2 * x[~bad].std(0), x.shape),
    }[evil]
    rng = np.random.default_rng(7)
    values = {k: np.where(bad.reshape(-1, *[1] * (x.ndim - 1)), forged(x, rng), x) for k, x in values.items()}
    honest = matrix(values, np.flatnonzero(~bad))
    size = np.linalg.norm(honest, axis=1).max()

    def of(name):
        return flat(fold(MAKE[name], values, np.ones(N, np.float32), IDS)).astype(np.float64)

    for name in ("median", "trimmed"):
        assert np.all(of(name) >= honest.min(0) - 1e-6)
        assert np.all(of(name) <= honest.max(0) + 1e-6)
    diameter = max(np.linalg.norm(a - b) for a in honest for b in honest)
    chosen = of("krum")
    assert np.linalg.norm(honest - chosen, axis=1).min() <= np.sqrt(N - 2 - 2) * diameter + 1e-5
    assert np.linalg.norm(of("geometric")) <= 2 * 5 / 3 * size
    assert np.linalg.norm(of("centered")) <= 3 + 1e-5
    without = fold(MAKE["bounded"], with_absent(values, ~bad), np.float32(~bad), IDS)
    assert np.linalg.norm(N * of("bounded") - 5 * flat(without)) <= 2 + 1e-5
    trusted = matrix(values, [3])[0]
    aggregate = of("fltrust")
    assert np.linalg.norm(aggregate) <= np.linalg.norm(trusted) + 1e-5
    assert aggregate @ trusted >= 0
    if evil != "a little":
        assert np.linalg.norm(of("mean")) > 3 * size  # and a mean goes where they like


def test_fltrust_weighs_by_the_angle_to_the_root():
    values = messages(8)
    x, root = matrix(values, range(N)), 3
    cosines = x @ x[root] / np.linalg.norm(x, axis=1) / np.linalg.norm(x[root])
    trust = np.where(np.arange(N) == root, 0, np.maximum(cosines, 0))
    assert (trust > 0).sum() >= 2
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.linalg.norm(x[root]) * trust @ units / trust.sum()
    trusted = MAKE["fltrust"]
    everyone = np.ones(N, np.float32)
    np.testing.assert_allclose(flat(fold(trusted, values, everyone, IDS)), expected, rtol=1e-4, atol=1e-6)
    away = np.float32(IDS != 7)
    assert not flat(fold(trusted, with_absent(values, away > 0), away, IDS)).any()


def test_buckets_are_dealt_by_round_and_client():
    values, everyone = messages(9), np.ones(N, np.float32)
    bucketed = lambda: reduce.bucketing(reduce.median(), 3)  # noqa: E731

    def oracle(key):
        hashes = np.array([jax.random.bits(jax.random.fold_in(key, i)) for i in np.sort(IDS)])
        x = matrix(values, np.argsort(IDS))[np.argsort(hashes)]
        return np.median([x[:3].mean(0), x[3:6].mean(0), x[6:].mean(0)], axis=0)

    seen = set()
    for seed in range(4):
        key = jax.random.key(seed)
        aggregate = flat(fold(bucketed, values, everyone, IDS, key))
        np.testing.assert_allclose(aggregate, oracle(key), rtol=1e-5, atol=1e-6)
        seen.add(aggregate.tobytes())
    assert len(seen) > 1


def test_bad_clients_do_not_come_in_by_the_side_door():
    """SCAFFOLD's variates are guarded as the update is: one of client 4's data makes its gradients huge."""
    data = population()
    x = data.examples["x"].copy()
    x[data.offsets[4] : data.offsets[5]] *= 1e6
    poisoned = fc.FederatedData({**data.examples, "x": x}, data.offsets)
    norms = {}
    for name, reducer in (("mean", fc.reduce.uniform_mean()), ("median", reduce.median())):
        run = Run(fc.scaffold(softmax_loss, clipped_sgd, reducer=reducer), poisoned)
        norms[name] = run.rounds(parameters(), [[4, 1, 3]])[2][0]["variate_norm"]
    assert norms["median"] < 10 < 1e4 < norms["mean"]


def test_too_many_bad_clients_are_refused_where_it_is_known():
    for reducer in (reduce.krum(2), reduce.trimmed_mean(3)):
        algorithm = fc.fedavg(softmax_loss, clipped_sgd, reducer=reducer)
        for make in (
            fc.data.sampling.uniform,
            fc.data.sampling.poisson,
            fc.data.sampling.by_size,
            fc.data.sampling.available,
        ):
            with pytest.raises(fc.InvalidInput, match="needs at least 7 clients in a round, not 4: ask for"):
                fc.train(algorithm, population(), parameters(), rounds=1, sampler=make(4))
    reduce.check_cohort(reduce.krum(2), 7)
    assert reduce.bucketing(reduce.krum(1), 2).fewest == 9
    assert fc.reduce.together(reduce.krum(1), fc.reduce.uniform_mean()).fewest == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: reduce.trimmed_mean(-1),
        lambda: reduce.krum(1.5),
        lambda: reduce.krum(1, 0),
        lambda: reduce.geometric_median(0),
        lambda: reduce.geometric_median(3, -1.0),
        lambda: reduce.centered_mean(0.0),
        lambda: reduce.norm_bounded(-1.0),
        lambda: reduce.norm_bounded(1.0, optax.sgd(1.0)),
        lambda: reduce.bucketing(2),
        lambda: reduce.bucketing(reduce.median(), 0),
        lambda: reduce.fltrust(-1),
        lambda: fc.fedavg(
            softmax_loss,
            clipped_sgd,
            uplink=fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(1.0)),
            reducer=reduce.median(),
        ),
    ],
)
def test_what_means_nothing_is_refused_when_it_is_built(make):
    with pytest.raises(fc.InvalidInput):
        make()


def test_a_round_of_too_few_changes_nothing_and_is_counted():
    """Formerly refused if the first cohort was so small, and else accepted, with an aggregate of whoever came."""
    for make in (lambda: reduce.krum(1), lambda: reduce.trimmed_mean(2), lambda: reduce.bucketing(reduce.krum(0), 2)):
        run = Run(fc.scaffold(softmax_loss, clipped_sgd, reducer=make()), population())
        few, kept, metrics = run.rounds(parameters(), [[4, 1, 3], [0, 2], []])
        assert [float(m["too_few"]) for m in metrics] == [1, 1, 1]
        assert_identical(few.params, parameters())
        assert not any(x.any() for x in jax.tree.leaves((few.own, kept)))
        enough, kept, metrics = run.rounds(parameters(), [[4, 1, 3, 0, 5]])
        assert float(metrics[0]["too_few"]) == 0
        assert not np.array_equal(enough.params["w"], parameters()["w"])
        assert any(x.any() for x in jax.tree.leaves(kept))


def test_a_poisson_sample_may_begin_with_too_few():
    data, sampler = population(), fc.data.sampling.poisson(5)
    sizes = [[len(sampler.sample(data.sizes, seed, r)) for r in range(3)] for seed in range(50)]
    seed = next(s for s, of in enumerate(sizes) if of[0] < 5 <= of[1])
    algorithm = fc.scaffold(softmax_loss, clipped_sgd, reducer=reduce.krum(1))
    result = fc.train(algorithm, data, parameters(), rounds=3, sampler=sampler, seed=seed)
    assert [row["too_few"] for row in result.history] == [float(size < 5) for size in sizes[seed]]
    assert [row["update_norm"] > 0 for row in result.history] == [size >= 5 for size in sizes[seed]]
