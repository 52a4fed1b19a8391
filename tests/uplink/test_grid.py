"""Integers that a server may add: rounding, room, rotation and the clients' own noise, against NumPy and the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from dp_accounting.rdp import compute_epsilon
from problems import COHORTS, Run, assert_close, assert_identical, parameters, population, softmax_loss

import fedjax_clip as fc
from experiments.config import privacy as flags
from fedjax_clip import privacy, uplink
from fedjax_clip.data import sampling
from fedjax_clip.reduce import modular_sum
from fedjax_clip.uplink import Context, discrete, grid

FALSE_ALARM = 1e-6  # of each statistical test below, for a right implementation
SIZE = 100_000
SGD, CLIP = optax.sgd(0.2), uplink.clip_by_global_norm(1.0)


def assert_distributed(x, log_weight, stddev):
    """Chi-squared over 40 bins of about the same weight, against ``exp(log_weight(k))`` normalised."""
    k = np.arange(-int(9 * stddev) - 9, int(9 * stddev) + 10)
    weight = np.exp(log_weight(k.astype(np.float64)))
    edges = np.unique(np.round(stddev * scipy.stats.norm.ppf(np.linspace(0, 1, 41)[1:-1])))
    expected = np.bincount(np.searchsorted(edges, k), weight / weight.sum(), len(edges) + 1)
    found = np.bincount(np.searchsorted(edges, x), minlength=len(edges) + 1)
    assert scipy.stats.chisquare(found, expected * len(x)).pvalue > FALSE_ALARM


def test_discrete_gaussian_noise_has_its_distribution():
    draw = jax.jit(lambda stddev: discrete.discrete_gaussian(jax.random.key(0), (SIZE,), stddev))
    for stddev in (0.3, 0.6, 2.5, 40.0, 3000.0):
        x = np.asarray(draw(stddev))
        assert_distributed(x, lambda k, s=stddev: -np.square(k) / (2 * s**2), stddev)
        with pytest.raises(AssertionError):  # it would find a tail that is off by 4%
            assert_distributed(x, lambda k, s=1.04 * stddev: -np.square(k) / (2 * s**2), stddev)
    assert np.abs(draw(1.0)).max() > 3.5
    assert not np.any(draw(0.0))


def test_skellam_noise_has_its_distribution():
    draw = jax.jit(lambda variance: discrete.skellam(jax.random.key(0), (SIZE,), variance))
    for variance in (0.2, 7.0, 99.0, 101.0, 900.0, 4e4):
        x = np.asarray(draw(variance))
        with np.errstate(divide="ignore"):
            assert_distributed(x, lambda k, v=variance: np.log(scipy.special.ive(np.abs(k), v)), math.sqrt(variance))
    assert not np.any(draw(0.0))


def context(key=0, cohort=8, threshold=6, weight=8):
    key = jax.random.key(key)
    bound = jnp.float32(0.5)
    return Context(key, key, jnp.int32(0), jnp.float32(weight), float(cohort), bound, threshold=threshold)


def send(link, updates, ctx=None):
    """Every client's message, their modular sum, and what the server makes of it."""
    ctx = ctx or context(weight=len(updates))

    def encode(update, number):
        return link.encode(update, (), (), ctx._replace(key=jax.random.fold_in(ctx.key, number)))[0]

    messages = jax.jit(jax.vmap(encode))(updates, jnp.arange(len(updates)))
    total = np.sum(np.asarray(messages), 0, dtype=np.uint32)
    mean, _, metrics = jax.jit(lambda total: link.decode(total, (), {}, ctx))(total)
    return np.asarray(messages), np.asarray(mean), metrics


def vectors(n, dim, norm=0.5, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim))
    return (norm * x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_messages_are_neighbouring_integers_and_their_mean_is_right(bits):
    link, x = uplink.integer_grid(bits), vectors(8, 50)
    messages, mean, metrics = send(link, x)
    levels, step = link.promises.grid(50, 8.0, 6).levels, float(metrics["step"])
    assert messages.dtype == f"uint{bits}"
    assert step == pytest.approx(0.5 / levels)
    steps = messages.view(f"int{bits}").astype(np.float64)
    assert np.abs(steps - x.astype(np.float64) / step).max() < 1 + 1e-5 * levels
    np.testing.assert_allclose(mean, steps.sum(0) * step / 8, rtol=1e-5, atol=1e-7)
    assert levels == min((2 ** (bits - 1) - 1 - 30) // 30, 2**20)  # room for floor(8 + 6 sqrt(8) + 6) = 30 clients


def test_rounding_has_no_bias():
    x = np.broadcast_to(np.float32([0.1, -0.03, 0.007]), (20_000, 3))
    messages, _, metrics = send(uplink.integer_grid(8), x, context(cohort=8))
    steps, exact = messages.view(np.int8).astype(np.float64), x[0].astype(np.float64) / float(metrics["step"])
    part = exact - np.floor(exact)
    error = (steps.mean(0) - exact) / np.sqrt(part * (1 - part) / len(x))
    assert np.abs(error).max() < scipy.stats.norm.isf(FALSE_ALARM / 6)


@pytest.mark.parametrize(
    "link", [uplink.integer_grid(16), uplink.integer_grid(16, rotate=True), uplink.integer_grid(8)]
)
def test_sums_of_as_many_as_there_is_room_for_do_not_wrap(link):
    """The worst case: all send the same vector; without rotation, all of it in one element."""
    room = link.promises.grid(300, 8.0, 6).room
    one = np.zeros((room, 300), np.float32)
    one[:, 3] = -0.5
    _, mean, metrics = send(link, one)
    assert metrics["aborted"] == 0
    assert mean[3] == pytest.approx(-0.5 * room / 8, rel=0.02)
    _, mean, metrics = send(link, np.concatenate([one, one[:1]]))
    assert metrics["aborted"] == 1
    assert not mean.any()


@pytest.mark.parametrize("dim", [1, 7, 300])
def test_rotations_keep_lengths_and_flatten(dim):
    key = jax.random.key(1)
    matrix, back = jax.jit(
        lambda xs: (jax.vmap(lambda x: grid._rotated(x, key))(xs), jax.vmap(lambda x: grid._rotated_back(x, key))(xs))
    )(jnp.eye(dim))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-5)
    np.testing.assert_allclose(back, matrix.T, atol=1e-6)
    power = 2 ** int(math.log2(dim))
    np.testing.assert_allclose(jax.jit(grid.hadamard)(jnp.eye(power)[0]), np.full(power, power**-0.5), rtol=1e-6)
    spike = jnp.abs(matrix).max()  # every row is a rotated unit vector
    assert spike <= min(1, math.sqrt(2 * math.log(2 * dim**2 / FALSE_ALARM) / power)) + 1e-5


def inflated(levels, dim):
    """Kairouz, Liu and Steinke (2021), equation 4, at beta = e^(-1/2)."""
    one = math.sqrt(2 * math.log(1 / math.exp(-0.5)))
    bound = levels**2 + dim / 4 + one * (levels + math.sqrt(dim) / 2)
    return math.sqrt(min(bound, (levels + math.sqrt(dim)) ** 2))


@pytest.mark.parametrize("dim", [3, 4000])
def test_rounded_norms_are_within_the_inflated_bound(dim):
    """Of coarse steps, where it binds; against the paper's formula."""
    layout = uplink.discrete_gaussian(0.0, 16).promises.grid(dim, 100.0, 60)
    assert layout.l2 == pytest.approx(inflated(layout.levels, dim), rel=2e-5)
    assert layout.l1 == pytest.approx(layout.l2 * min(math.sqrt(dim), layout.l2), rel=1e-6)
    levels = 5.0
    most = inflated(levels, dim)
    x = jnp.asarray(vectors(1, dim, norm=levels)[0])
    rounded = jax.jit(jax.vmap(lambda key, most: grid._rounded(x, key, most), in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 100)
    assert np.linalg.norm(np.asarray(rounded(keys, most), np.float64), axis=1).max() <= most * (1 + 1e-6)
    tight = np.linalg.norm(np.asarray(rounded(keys, levels), np.float64), axis=1)  # few roundings are that small
    assert tight.max() <= levels * (1 + 1e-6)


@pytest.mark.parametrize(("make", "bits"), [(uplink.discrete_gaussian, 32), (uplink.skellam, 16)])
def test_the_sum_carries_the_noise_that_the_threshold_needs(make, bits):
    z, n, threshold, dim = 1.3, 8, 6, 6000
    link = make(z, bits)
    layout = link.promises.grid(dim, float(n), threshold)
    _, mean, metrics = send(link, np.zeros((n, dim), np.float32))
    std = z * inflated(layout.levels, dim) * math.sqrt(n / threshold) * 0.5 / layout.levels / n
    assert metrics["noise_std"] == pytest.approx(std, rel=1e-4)
    assert metrics["noise_multiplier"] == pytest.approx(z * math.sqrt(n / threshold), rel=1e-5)
    assert scipy.stats.kstest(mean / std, "norm").pvalue > FALSE_ALARM
    below = scipy.stats.chi2(dim).cdf(np.sum(np.square(mean / std, dtype=np.float64)))
    assert FALSE_ALARM < below < 1 - FALSE_ALARM
    # each client its own, and no two rounds' the same
    messages, other, _ = send(link, np.zeros((2, dim), np.float32), context(key=1, weight=6))
    assert np.any(messages[0] != messages[1])
    assert np.any(other != mean)


def test_a_traced_noise_multiplier_gives_the_same_grid():
    def layout(z):
        return uplink.skellam(z, 16, True).promises.grid(650, 8.0, 6)[:4]

    assert_close(jax.jit(layout)(1.2), jax.tree.map(np.float32, layout(1.2)))


def fedavg(*links, reducer=None, make=fc.fedavg, **options):
    return make(softmax_loss, SGD, uplink=uplink.chain(*links), reducer=reducer, **options)


SUM = modular_sum(3)


def test_rounds_are_those_of_the_clipped_mean_and_masks_change_no_bit():
    """One client of three sends what is not finite, and drops out."""
    data = population()
    x = data.examples["x"].copy()
    x[data.offsets[1] : data.offsets[2]] = np.inf
    data = fc.FederatedData({**data.examples, "x": x}, data.offsets)

    def rounds(*links, reducer):
        return Run(fedavg(*links, reducer=reducer), data).rounds(parameters(), COHORTS[:1])

    mean, encrypted = rounds(CLIP, reducer=fc.reduce.fixed_mean(3)), rounds(CLIP, reducer=fc.secure.ckks_mean(3))
    assert_close(encrypted[0].params, mean[0].params, atol=1e-6)

    links = CLIP, uplink.integer_grid(16)
    plain, masked = rounds(*links, reducer=SUM), rounds(*links, reducer=fc.secure.pairwise_masks(3))
    assert_identical(masked, plain)
    assert plain[2][0]["dropped"] == 1
    assert plain[2][0]["bytes_up"] == mean[2][0]["bytes_up"] / 2
    assert_close(plain[0].params, mean[0].params, atol=3 * plain[2][0]["uplink/1/step"])
    assert np.any(plain[0].params["w"] != mean[0].params["w"])


def test_fewer_clients_than_the_threshold_stay_closed():
    message, reducer = jnp.full((2, 3), 7, jnp.uint16), modular_sum(3)
    acc = reducer.zero(message[0], fc.reduce.Roster(jnp.arange(3), None))
    assert not np.any(reducer.finish(reducer.add(acc, message * jnp.uint16([[1], [0]]), jnp.array([1.0, 0.0])), None))
    assert np.all(reducer.finish(reducer.add(acc, message, jnp.array([1.0, 0.5])), None) == 14)
    _, mean, metrics = send(uplink.integer_grid(), vectors(5, 9), context(threshold=6, weight=5))
    assert metrics["aborted"] == 1
    assert not mean.any()


def train(link):
    return Run(fedavg(link), population()).rounds(parameters(), COHORTS[:1])


GRID, SCAFFOLD = uplink.integer_grid(), fc.scaffold


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: fedavg(GRID, reducer=SUM), "put a clip"),
        (lambda: fedavg(uplink.skellam(1.0), reducer=SUM), "put a clip"),
        (lambda: uplink.chain(CLIP, uplink.relative_to_last(), GRID), "put a clip"),
        (lambda: uplink.chain(CLIP, uplink.local_gaussian(1.0), GRID), "end the uplink on discrete_gaussian"),
        (lambda: uplink.chain(CLIP, GRID, uplink.gaussian(1.0)), "end the uplink on discrete_gaussian"),
        (lambda: uplink.chain(CLIP, GRID, CLIP), "move integer_grid, .* to the chain's end"),
        (lambda: uplink.chain(CLIP, GRID, uplink.skellam(1.0)), "a second grid"),
        (lambda: uplink.chain(uplink.quantile_clip(0.1), uplink.skellam(1.0)), "bits_noise=cohort_size / 20"),
        (lambda: fedavg(CLIP, GRID), "only a modular sum"),
        (lambda: fedavg(CLIP, GRID, reducer=fc.reduce.weighted_mean()), "make modular_sum the reducer"),
        (lambda: fedavg(CLIP, GRID, reducer=fc.reduce.centered_mean(1.0)), "only a modular sum"),
        (lambda: fedavg(CLIP, GRID, reducer=fc.secure.ckks_mean(3)), "only a modular sum"),
        (lambda: fedavg(CLIP, reducer=SUM), "integer_grid\\(\\) last in the uplink"),
        (lambda: fedavg(CLIP, reducer=fc.secure.pairwise_masks(3)), "integer_grid\\(\\) last in the uplink"),
        (lambda: fedavg(CLIP, GRID, reducer=SUM, make=SCAFFOLD), "take fedavg or fedsgd"),
        (lambda: fedavg(CLIP, GRID, reducer=SUM, make=fc.fedbuff, max_staleness=1), "by their staleness"),
        (lambda: uplink.with_bias(uplink.chain(CLIP, GRID)), "take the grid out of it"),
        (lambda: send(uplink.integer_grid(8), vectors(1, 3), context(cohort=200)), "more bits, or rotate=True"),
        (lambda: send(uplink.skellam(40.0, 8), vectors(1, 3)), "clients and their noise"),
        (lambda: uplink.integer_grid(12), "8, 16 or 32 bits"),
        (lambda: uplink.skellam(-1.0), "noise_multiplier"),
        (lambda: modular_sum(3, threshold=4), "more than the cohort"),
        (lambda: modular_sum(2.5), "cohort_size must be a whole number"),
        (lambda: privacy.distributed(uplink.chain(CLIP, GRID), parameters(), SUM), "No noise on a grid"),
        (lambda: epsilon(uplink.skellam(1.0), accountant="pld"), "accountant='rdp'"),
        (lambda: epsilon(uplink.discrete_gaussian(0.1, 8)), "under 1/2"),
    ],
)
def test_what_has_no_meaning_is_refused_when_it_is_built(build, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        build()


def epsilon(link, sampler=None, rounds=10, accountant="rdp"):
    curve = privacy.distributed(uplink.chain(CLIP, link), parameters(), modular_sum(8))
    return privacy.epsilon(curve, sampler or sampling.poisson(8), 100, rounds, 1e-3, accountant)


def paper_skellam(order, l2, l1, mu):
    extra = min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))
    return order * l2**2 / (2 * mu) + extra


def paper_gaussian(order, l2, l1, stddev, n, dim):
    tau = 10 * sum(math.exp(-2 * math.pi**2 * stddev**2 * k / (k + 1)) for k in range(1, n))
    s = stddev * math.sqrt(n)
    first = order / 2 * l2**2 / s**2 + tau * dim
    second = order / 2 * (l2**2 / s**2 + 2 * l1 / s * tau + tau**2 * dim)
    return min(first, second, order / 2 * (l2 / s + tau * math.sqrt(dim)) ** 2)


@pytest.mark.parametrize("noise", ["skellam", "discrete_gaussian"])
def test_epsilon_is_the_papers(noise):
    """Coarse steps, so that what is not Gaussian about the noise counts."""
    link = getattr(uplink, noise)(0.8, bits=8)
    dim, n = 15, 6  # parameters, threshold
    layout = link.promises.grid(dim, 8.0, n)
    l2, stddev = layout.l2, 0.8 * layout.l2 / math.sqrt(n)
    assert l2 > 1.3 * layout.levels
    l1 = l2 * min(l2, math.sqrt(dim))

    def curve(order):
        if noise == "skellam":
            return paper_skellam(order, l2, l1, n * stddev**2)
        return paper_gaussian(order, l2, l1, stddev, n, dim)

    orders = np.arange(2, 20)
    everyone = compute_epsilon(orders, [10 * curve(a) for a in orders.tolist()], 1e-3)[0]
    seen = [math.log(0.92 + 0.08 * math.exp((a - 1) * curve(a))) / (a - 1) for a in orders.tolist()]
    sampled = compute_epsilon(orders, [10 * cost for cost in seen], 1e-3)[0]  # the server knows who takes part
    assert epsilon(link, sampling.poisson(8)) == pytest.approx(sampled, rel=1e-6)
    alone = privacy.distributed(uplink.chain(CLIP, link), parameters(), modular_sum(8))
    assert privacy.epsilon(alone, sampling.uniform(8), 8, 10, 1e-3) == pytest.approx(everyone, rel=1e-6)
    assert everyone > privacy.epsilon(0.8, sampling.uniform(8), 8, 10, 1e-3) * 1.005  # it does count


def test_fine_steps_cost_what_a_gaussian_does():
    fine = epsilon(uplink.skellam(6.0), sampling.round_robin(8), rounds=20)
    assert fine == pytest.approx(privacy.epsilon(6.0, sampling.round_robin(8), 100, 20, 1e-3, "rdp"), rel=1e-3)
    assert epsilon(uplink.skellam(0.0)) == math.inf
    assert epsilon(uplink.skellam(1.0), rounds=0) == 0


@pytest.mark.parametrize("noise", ["skellam", "discrete_gaussian"])
def test_flags_solve_for_the_noise_that_a_target_allows(noise):
    sampler = sampling.poisson(8)

    def solve(links, target, sampler=sampler):
        return flags.build_uplink(links, target, 1e-3, 10, sampler, 100, on_grid)

    def on_grid(link):
        return privacy.distributed(link, parameters(), modular_sum(8))

    clip = "clip_by_global_norm(1.0)|"
    solved, spent = solve(f"{clip}{noise}(bits=16)", 3.0)
    layout = solved.promises.grid(15, 8.0, 6)
    z = float(layout.stddev / layout.l2) * math.sqrt(6)
    assert spent[-1] <= 3.0 < epsilon(getattr(uplink, noise)(z - 2e-4, 16), sampler)
    fine, coarse = (solve(f"{clip}{noise}(bits={bits})", 20.0)[0].promises.grid(15, 8.0, 6) for bits in (16, 8))
    assert coarse.stddev / coarse.l2 > fine.stddev / fine.l2  # coarser steps need more noise
    assert len(solve(f"{clip}{noise}({z}, 16)", float(spent[5]))[1]) in (6, 7)  # the rounds, where noise is given
    for links, target, sentence in (
        (f"{clip}{noise}(bits=8)", 0.1, "give it more bits"),
        (f"quantile_clip(bits_noise=0.1)|{noise}()", 3.0, "put clip_by_global_norm in its place"),
        (f"{clip}integer_grid()", 3.0, "needs one of discrete_gaussian"),
    ):
        with pytest.raises(fc.InvalidInput, match=sentence):
            solve(links, target, sampling.round_robin(8))
    with pytest.raises(fc.InvalidInput, match=f"{noise} has no number: write"):
        flags.chain(f"{clip}{noise}()", None)


def test_what_epsilon_is_for_is_what_neighbours_differ_in():
    clipped = "clip_by_global_norm(1.0)|gaussian(1.0)"
    for links, sampler, words in (
        (clipped, sampling.poisson(8), "(add or remove)"),
        (clipped, sampling.uniform(100), "(zero out: "),
        (clipped, sampling.round_robin(8), "(zero out: "),
        (clipped, sampling.uniform(8), "(replace: "),
        ("clip_by_global_norm(1.0)|skellam(1.0)", sampling.poisson(8), "(zero out: "),
        ("clip_by_global_norm(1.0)|skellam(1.0)", sampling.uniform(8), "(replace: "),
    ):
        link = flags.chain(links, None)
        assert words in flags.protects(link, sampler, 100)
        seen = flags.claim(link, sampler, 100, 1e-5, None, True)["from"]
        assert ("not from the server" in seen) == ("gaussian" in links)
        assert ("not who took part, which a server sees" in seen) == ("skellam" in links)
    seen = flags.claim(link, sampling.round_robin(8), 100, 1e-5, None, True)["from"]
    assert seen == "everyone who sees the sums of all rounds but no message, including the server"
