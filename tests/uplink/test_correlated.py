"""Noise that depends on earlier rounds: what it is, whom it covers, and what it is worth."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fedjax_clip as fc
from experiments.config import privacy as flags
from fedjax_clip import privacy, uplink
from fedjax_clip.data import sampling
from fedjax_clip.uplink import Context, mechanism
from fedjax_clip.uplink.mechanism import Mechanism

FALSE_ALARM = 1e-6  # of each statistical test below, for a right implementation
COEFFICIENTS = (1.0, 0.5, 0.375)
CLIP = uplink.clip_by_global_norm(0.5)


def tree_nodes(tree: int, rounds: int) -> np.ndarray:
    """``C`` by its definition: row t adds up the rounds of the node that round t completes."""
    matrix = np.zeros((rounds, rounds))
    for t in range(rounds):
        count = t % tree + 1
        size = 1
        while count % (2 * size) == 0:
            size *= 2
        matrix[t, t - size + 1 : t + 1] = 1
    return matrix


def band(rounds: int) -> np.ndarray:
    return sum(c * np.eye(rounds, k=-k) for k, c in enumerate(COEFFICIENTS))


DECAYS, SCALES = (0.75, 0.25), (0.25, 0.5)  # exact in float32
INVERSE = (1.0, -0.5, -0.125)


def buffered(rounds: int) -> np.ndarray:
    """``C = I + sum_i scale_i sum_k decay_i^(k - 1) L^k``, L one step down."""
    down = np.eye(rounds, k=-1)
    parts = [s * down @ np.linalg.inv(np.eye(rounds) - d * down) for d, s in zip(DECAYS, SCALES, strict=True)]
    return np.eye(rounds) + sum(parts)


def banded_inverse(rounds: int) -> np.ndarray:
    return np.linalg.inv(sum(c * np.eye(rounds, k=-k) for k, c in enumerate(INVERSE)))


MECHANISMS = {
    "a tree": (mechanism.tree(16), tree_nodes(16, 11)),
    "trees that begin anew": (mechanism.tree(5), tree_nodes(5, 11)),
    "a tree of one round": (mechanism.tree(1), np.eye(11)),
    "bands": (mechanism.toeplitz(COEFFICIENTS), band(11)),
    "one band": (mechanism.toeplitz([2.0]), 2 * np.eye(11)),
    "buffers": (mechanism.buffered_toeplitz(DECAYS, SCALES), buffered(11)),
    "a banded inverse": (mechanism.banded_inverse(3), banded_inverse(11)),
}
each = pytest.mark.parametrize(("made", "matrix"), MECHANISMS.values(), ids=list(MECHANISMS))


def rows(made: Mechanism, independent) -> np.ndarray:
    """What a mechanism makes of rows of noise, one a round."""
    state, out, step = made.init(jax.tree.map(lambda x: x[0], independent)), [], jax.jit(made.next)
    for t in range(len(jax.tree.leaves(independent)[0])):
        row, after = step(jax.tree.map(lambda x, t=t: x[t], independent), state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        state = after
        out.append(row)
    return jax.tree.map(lambda *xs: np.stack(xs), *out)


@each
def test_noise_is_the_inverse_strategy_times_independent_noise(made, matrix):
    z = {"w": jax.random.normal(jax.random.key(0), (11, 2, 3)), "b": jax.random.normal(jax.random.key(1), (11,))}
    expected = {name: np.tensordot(np.linalg.inv(matrix), x, 1) for name, x in z.items()}
    np.testing.assert_allclose(made.strategy(11), matrix, atol=1e-14)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), rows(made, z), expected)


def test_a_trees_noise_in_a_sum_is_one_draw_for_each_binary_digit():
    z = np.asarray(jax.random.normal(jax.random.key(0), (13, 1)))
    sums = np.cumsum(rows(mechanism.tree(16), z), axis=0)
    np.testing.assert_allclose(sums[6], z[3] + z[5] + z[6], atol=1e-6)  # 7 = 4 + 2 + 1: rounds 1-4, 5-6, 7
    np.testing.assert_allclose(sums[7], z[7], atol=1e-6)
    np.testing.assert_allclose(sums[12], z[7] + z[11] + z[12], atol=1e-6)


def server_noise(link, rounds):
    """What the server adds to means of zeros, round by round."""
    zeros = {"w": jnp.zeros(4000)}
    state, noise = link.init(zeros), []
    for round in range(rounds):
        key = jax.random.key(round)
        ctx = Context(key, key, jnp.int32(-1), jnp.float32(5), denominator=8.0)
        sent, _, report = link.encode(zeros, state, link.init_client(zeros), ctx)
        out, state, metrics = link.decode(sent, state, fc.extend.metrics.finish(report), ctx)
        noise.append(np.asarray(out["w"]))
    return np.stack(noise), float(metrics["1/noise_std"])


def test_a_links_noise_has_the_covariance_of_the_strategy():
    """By a chi-squared test of ``C noise``, whose entries are independent, and one of an inner product."""
    rounds, z = 6, 1.2
    made = mechanism.tree(4)
    noise, std = server_noise(uplink.chain(CLIP, uplink.gaussian(z, mechanism=made)), rounds)
    assert std == pytest.approx(z * 0.5 / 8)
    independent = made.strategy(rounds) @ noise.astype(np.float64) / std

    def pvalue(x, scale):
        below = scipy.stats.chi2(x.size).cdf(np.sum(np.square(x / scale)))
        return 2 * min(below, 1 - below)

    assert pvalue(independent, 1) > FALSE_ALARM
    assert max(pvalue(independent, 0.93), pvalue(independent, 1.07), pvalue(noise / std, 1)) < FALSE_ALARM
    pairs = itertools.combinations(range(rounds), 2)
    largest = max(abs(independent[i] @ independent[j]) / math.sqrt(4000) for i, j in pairs)
    assert scipy.stats.norm.sf(largest) * 30 > FALSE_ALARM


@pytest.mark.parametrize(
    "made",
    [mechanism.tree(1), mechanism.toeplitz([1.0]), mechanism.banded_inverse(1), mechanism.inverse_toeplitz([1.0])],
)
def test_a_strategy_of_ones_is_independent_noise_to_the_last_bit(made):
    noise, std = server_noise(uplink.chain(CLIP, uplink.gaussian(0.7, mechanism=made)), 3)
    expected = server_noise(uplink.chain(CLIP, uplink.gaussian(0.7)), 3)
    assert np.all(noise == expected[0])
    assert std == expected[1]


def test_half_precision_parameters_keep_their_noise_exact():
    """A tree's in whole steps, which it adds and subtracts exactly; others' in float32."""
    for made, dtype in ((mechanism.tree(4), jnp.int32), (mechanism.toeplitz([1.0, 0.5]), jnp.float32)):
        link = uplink.chain(CLIP, uplink.gaussian(1.0, mechanism=made))
        kept = jax.tree.leaves(link.init({"w": jnp.zeros((3, 2), jnp.bfloat16)}))
        assert {x.dtype for x in kept if x.ndim} == {jnp.dtype(dtype)}


def largest_by_hand(matrix, patterns):
    """``max ||C u||`` over these sets of rounds, after each round."""
    moved = [
        [np.linalg.norm(matrix[: t + 1] @ np.isin(np.arange(len(matrix)), p)) for p in patterns] for t in range(11)
    ]
    return np.max(moved, axis=1)


@each
@pytest.mark.parametrize(("clients", "cohort"), [(12, 4), (7, 3), (100, 3), (3, 3)])
def test_round_robins_sensitivity_is_that_of_its_cohorts(made, matrix, clients, cohort):
    sampler = sampling.round_robin(cohort)
    drawn = [sampler.sample(np.ones(clients), 0, r) for r in range(11)]
    patterns = [[r for r in range(11) if i in drawn[r]] for i in range(clients)]
    expected = largest_by_hand(matrix, patterns)
    np.testing.assert_allclose(privacy.sensitivities(made, sampler, clients, 11), expected, rtol=1e-12)
    if clients == cohort:
        np.testing.assert_allclose(privacy.sensitivities(made, sampling.uniform(3), 3, 11), expected, rtol=1e-12)


@each
@pytest.mark.parametrize("separated", [privacy.Separated(4), privacy.Separated(3, most=2), privacy.Separated(11, 1)])
def test_separated_rounds_are_bounded_by_the_worst_pattern(made, matrix, separated):
    patterns = [
        p
        for k in range(1, separated.count(11) + 1)
        for p in itertools.combinations(range(11), k)
        if all(b - a >= separated.rounds for a, b in itertools.pairwise(p))
    ]
    worst = largest_by_hand(matrix, patterns)[-1]
    bound = privacy.sensitivity(made, separated, 100, 11)
    assert bound >= worst * (1 - 1e-6)
    decreasing = np.all(np.diff(matrix[:, 0]) <= 0) and np.array_equal(matrix[1:, 1:], matrix[:-1, :-1])
    apart = not np.any(np.triu(matrix.T @ matrix, separated.rounds))  # a client's rounds do not meet
    if decreasing or apart or separated.most == 1:
        assert bound == pytest.approx(worst, rel=1e-6)
    by_round = privacy.sensitivities(made, separated, 100, 11)
    assert np.all(by_round >= largest_by_hand(matrix, patterns) * (1 - 1e-6))
    assert by_round[-1] == pytest.approx(bound)


def test_one_round_of_each_client_costs_the_depth_of_its_tree():
    depth = privacy.sensitivities(mechanism.tree(1600), sampling.round_robin(100), 342_477, 1600) ** 2
    np.testing.assert_allclose(depth, [math.floor(math.log2(t)) + 1 for t in range(1, 1601)])
    restarted = privacy.sensitivity(mechanism.tree(4), sampling.round_robin(10), 40, 12)
    assert restarted**2 == pytest.approx(3 * 3)  # three epochs of a tree of depth 3


def test_bands_within_the_separation_cost_what_independent_noise_does():
    made = mechanism.banded(rounds=12, bands=4)
    jax.eval_shape(lambda: mechanism.banded(rounds=12, bands=3).init(jnp.zeros(2)))  # built where it is traced
    assert np.linalg.norm(made.strategy(12)[:, 0]) == pytest.approx(1)
    sampler, sizes = sampling.round_robin(10), {"num_clients": 40, "rounds": 12, "delta": 1e-5}
    assert privacy.epsilon(2.0, sampler, mechanism=made, **sizes) == pytest.approx(
        privacy.epsilon(2.0, sampler, **sizes), rel=1e-5
    )
    noise = [np.linalg.norm(np.tri(12) @ np.linalg.inv(m.strategy(12))) for m in (made, mechanism.tree(1))]
    assert noise[0] < 0.75 * noise[1]  # and leave the sums with less noise


def test_buffers_are_as_good_as_the_best_matrix_and_keep_as_few_models():
    """Largest error times sensitivity over 60 rounds, 6 of each client: near bands, far under a tree's and none's."""
    made = mechanism.blt(rounds=60, separation=10, buffers=2)
    assert made.init(jnp.zeros(3)).shape == (2, 3)

    def loss(made):
        strategy = made.strategy(60)
        errors = np.sum((np.tri(60) @ np.linalg.inv(strategy)) ** 2, axis=1)
        return privacy.sensitivity(made, privacy.Separated(10), 600, 60) ** 2 * errors.max()

    assert loss(mechanism.tree(1)) == pytest.approx(360)  # 6 rounds of a client, 60 of noise
    assert loss(made) < 1.1 * loss(mechanism.banded(60, 10)) < 0.4 * loss(mechanism.tree(64))
    assert loss(mechanism.banded_inverse(10)) < 1.15 * loss(mechanism.banded(60, 10))
    assert privacy.sensitivity(made, sampling.round_robin(60), 600, 60) == pytest.approx(
        privacy.sensitivity(made, privacy.Separated(10), 600, 60)
    )


def test_a_banded_inverse_has_the_roots_coefficients():
    """``sqrt(1 - x) = 1 - x/2 - x^2/8 - x^3/16 - 5 x^4/128 ...``; with all of them C is its inverse, 1, 1/2, 3/8 ..."""
    z = np.eye(5, dtype=np.float32)
    np.testing.assert_allclose(rows(mechanism.banded_inverse(5), z)[:, 0], [1, -1 / 2, -1 / 8, -1 / 16, -5 / 128])
    np.testing.assert_allclose(mechanism.banded_inverse(5).strategy(5)[:, 0], [1, 1 / 2, 3 / 8, 5 / 16, 35 / 128])


def test_bands_under_cyclic_samples_cost_what_sampled_rounds_do():
    """Bands of norm 1, as many as groups: a turn of the groups is one Poisson sampled Gaussian (Theorem 4)."""
    made, sampler, run = mechanism.banded(rounds=12, bands=4), sampling.cyclic_poisson(5, 4), (40, 12, 1e-3)
    amplified = privacy.epsilon(1.5, sampler, *run, mechanism=made)
    assert amplified == pytest.approx(privacy.epsilon(1.5, sampling.poisson(20), 40, 3, 1e-3), rel=1e-4)
    assert amplified == pytest.approx(privacy.epsilon(1.5, sampler, *run), rel=1e-4)  # one band, as without a mechanism
    wider = privacy.epsilon(1.5, sampling.cyclic_poisson(5, 3), *run, mechanism=made)  # more bands than groups
    alone = privacy.epsilon(1.5, privacy.Separated(3), *run, mechanism=made)
    assert wider == pytest.approx(alone)
    assert privacy.epsilon(1.5, sampling.cyclic_poisson(10, 4), *run, mechanism=made) == pytest.approx(
        privacy.epsilon(1.5, sampling.round_robin(10), *run, mechanism=made), rel=1e-6
    )  # everyone of a group comes


def test_bins_amplify_any_matrix():
    for made in (None, mechanism.banded_inverse(3), TREE):
        run = {"num_clients": 40, "rounds": 8, "delta": 1e-2, "mechanism": made}
        hidden, known = (
            privacy.epsilon(1.5, make(10), **run) for make in (sampling.balls_in_bins, sampling.round_robin)
        )
        assert 0.3 * known < hidden < 0.9 * known


@each
def test_epsilon_by_round_and_solvers_agree(made, matrix):
    sampler, about = sampling.round_robin(4), {"num_clients": 12, "rounds": 11, "delta": 1e-4, "mechanism": made}
    by_round = privacy.epsilons(3.0, sampler, **about)
    assert by_round.shape == (11,)
    assert np.all(np.diff(by_round) >= 0)
    assert by_round[-1] == pytest.approx(privacy.epsilon(3.0, sampler, **about), rel=1e-12)
    z = privacy.noise_multiplier(2.0, sampler, **about)
    assert privacy.epsilon(z, sampler, **about) <= 2.0 < privacy.epsilon(z - 2e-4, sampler, **about)
    assert privacy.rounds(by_round[6], 3.0, sampler, 12, 1e-4, most=11, mechanism=made) >= 7


QUANTILE = uplink.quantile_clip(0.1, bits_noise=2.0)
TREE = mechanism.tree(4)


def epsilon_of(sampler, made=TREE):
    return privacy.epsilon(1.0, sampler, 50, 10, 1e-5, mechanism=made)


NEGATIVE = Mechanism(TREE.init, TREE.next, lambda rounds: -np.eye(rounds))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: uplink.chain(QUANTILE, uplink.gaussian(1.0, mechanism=TREE)),
            "quantile_clip's bound changes .* put clip",
        ),
        (lambda: uplink.chain(QUANTILE, CLIP, uplink.gaussian(1.0, mechanism=TREE)), "quantile_clip's bound changes"),
        (lambda: uplink.chain(uplink.gaussian(1.0, mechanism=TREE), CLIP), "put a clip"),
        (lambda: uplink.chain(CLIP, uplink.gaussian(1.0), uplink.gaussian(1.0, mechanism=TREE)), "keep one, the last"),
        (lambda: uplink.gaussian(1.0, mechanism=4), "fc.uplink.mechanism.tree"),
        (lambda: mechanism.tree(0), "at least 1"),
        (lambda: mechanism.banded(3, 4), "4 bands are more than the 3 rounds"),
        (lambda: mechanism.toeplitz([0.0, 1.0]), "first positive"),
        (lambda: mechanism.toeplitz([1.0, -0.5]), "none negative"),
        (lambda: epsilon_of(sampling.poisson(5)), "use fc.data.sampling.round_robin"),
        (lambda: epsilon_of(sampling.uniform(5)), "use fc.data.sampling.round_robin"),
        (lambda: epsilon_of(sampling.round_robin(51)), "larger than the population"),
        (lambda: mechanism.inverse_toeplitz([1.0, 0.5]), "others 0 or negative"),
        (lambda: mechanism.inverse_toeplitz([0.0]), "first positive"),
        (lambda: mechanism.banded_inverse(0), "between 1 and"),
        (lambda: mechanism.buffered_toeplitz([1.5], [0.5]), "between 0 and 1"),
        (lambda: mechanism.buffered_toeplitz([0.5, 0.4], [0.5]), "as many scales"),
        (lambda: mechanism.buffered_toeplitz([0.9, 0.8], [0.6, 0.6]), "sum of at most 1"),
        (lambda: mechanism.blt(60, buffers=11), "buffers"),
        (lambda: mechanism.blt(1), "rounds"),
        (lambda: mechanism.blt(60, separation=0), "separation"),
        (lambda: epsilon_of(privacy.Separated(0)), "Separated: rounds"),
        (lambda: epsilon_of(privacy.Separated(3, most=0)), "Separated: most"),
        (lambda: epsilon_of(sampling.round_robin(5), NEGATIVE), "negative entries"),
        (lambda: privacy.sensitivities(TREE, None, 50, 10), "one of fc.data.sampling"),
    ],
)
def test_what_cannot_be_promised_is_refused(build, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        build()


def test_a_target_epsilon_is_solved_for_the_noise_or_for_the_rounds():
    sampler = sampling.round_robin(4)
    tree = "clip_by_global_norm(0.5)|gaussian({}mechanism=tree(8))"
    link, spent = flags.build_uplink(tree.format(""), 3.0, 1e-3, 8, sampler, 12, on_grid=None)
    assert spent.shape == (8,)
    assert 2.99 < spent[-1] <= 3.0
    z = link.promises.noise_multipliers[0]
    _, fewer = flags.build_uplink(tree.format(f"{z}, "), float(spent[5]), 1e-3, 8, sampler, 12, on_grid=None)
    assert len(fewer) >= 6  # as many rounds as cost no more than the first six
    assert fewer[-1] <= spent[5]
    with pytest.raises(fc.InvalidInput, match="allows no round, one costs"):
        flags.build_uplink(tree.format("0.1, "), 3.0, 1e-3, 8, sampler, 12, on_grid=None)
    with pytest.raises(fc.InvalidInput, match="use fc.data.sampling.round_robin"):
        flags.build_uplink(tree.format("1.0, "), None, 1e-3, 8, sampling.uniform(4), 12, on_grid=None)
