"""Noise of which no bit tells what it was added to: the attack on floating point, exact sums, and the distribution."""

import decimal
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from compiling import OPTIMIZED
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Run, assert_identical, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import uplink
from fedjax_clip.core.keys import seeded
from fedjax_clip.uplink import Context, alias, discrete, lattice, mechanism
from fedjax_clip.uplink.base import encoded

FALSE_ALARM = 1e-6  # of each statistical test below, for a right implementation
C, N = 0.5, 8
CLIP = uplink.clip_by_global_norm(C)


def context(key, bound=C):
    return Context(key, key, jnp.int32(-1), jnp.float32(N), denominator=float(N), bound=jnp.float32(bound))


def released(link, updates, key):
    """What the world sees of these updates ``[n, d]``: encoded, added up by a fixed mean, decoded."""
    reducer, ctx = fc.reduce.fixed_mean(float(N)), context(key)
    messages = jax.vmap(lambda u, k: link.encode(u, (), (), ctx._replace(key=k))[0])(
        updates, jax.random.split(key, len(updates))
    )
    acc = reducer.add(reducer.zero(messages[0], None), messages, jnp.ones(len(updates)))
    return link.decode(reducer.finish(acc, None), (), {}, ctx)[0]


# ------------------------------------------------------------------------------------------- the attack


def normals():
    """All values that ``jax.random.normal`` takes in float32, in order: 2^23 of them."""
    uniform = np.arange(2**23, dtype=np.uint32) | np.float32(1).view(np.uint32)
    low = np.nextafter(np.float32(-1), np.float32(0))
    u = np.maximum(low, (uniform.view(np.float32) - 1) * (np.float32(1) - low) + low)
    return np.unique(np.asarray(jax.jit(lambda u: np.float32(np.sqrt(2)) * jax.lax.erf_inv(u))(u)))


def excluded(output, candidate, std, support):
    """Whether some coordinate of the output is no ``fl(candidate + fl(std v))`` for any v of the noise's values."""
    place = np.searchsorted(support, (output.astype(np.float64) - candidate) / std)
    near = np.clip(place[:, None] + np.arange(-40, 41), 0, len(support) - 1)
    made = candidate[:, None] + np.float32(std) * support[near]
    return not np.all(np.any(made == output[:, None], axis=1))


def test_the_least_bits_of_floating_point_noise_exclude_the_wrong_sum_and_those_of_the_lattice_do_not():
    """Mironov (2012): 650 numbers at z = 1, one release. float32 noise, as it was, excludes the wrong hypothesis."""
    support, rng, std = normals(), np.random.default_rng(0), np.float32(1.0 * C / N)
    link, trials, dim = uplink.gaussian(1.0), 40, 650
    release = jax.jit(lambda updates, key: released(link, updates, key))
    step = float(lattice.lattice(C, 1.0, N).step) / N
    wrong_excluded, in_floats, on_lattice = 0, [0, 0], set()
    for trial in range(trials):
        updates = rng.normal(size=(N, dim)).astype(np.float32)
        updates *= C / np.linalg.norm(updates, axis=1, keepdims=True)
        with_it, without = (updates[:k].sum(0) / np.float32(N) for k in (N, N - 1))
        floats = with_it + std * np.asarray(jax.random.normal(jax.random.key(trial), (dim,)))
        assert not excluded(floats, with_it, std, support)
        wrong_excluded += excluded(floats, without, std, support)
        # The same adversary, with either hypothesis true, before a release on the lattice: both are treated alike.
        for truth, present in enumerate((N, N - 1)):
            output = np.asarray(release(updates[:present], jax.random.key(trial)))
            in_floats[truth] += excluded(output, with_it, std, support)
            # One who knows the lattice: is there noise, in whole steps, that makes this output of this sum?
            whole = np.round(output.astype(np.float64) / step).astype(np.int64)
            on_lattice.add(bool(np.all(np.float32(whole) * np.float32(step) == output)))
            assert np.abs(whole).max() < 2**31
    assert wrong_excluded == trials
    assert in_floats[0] == in_floats[1]
    assert on_lattice == {True}  # whatever was sent: integers, as many steps from each sum as noise reaches


@pytest.mark.parametrize("noise", ["local", "record"])
def test_clients_own_noise_leaves_whole_steps_only(noise):
    if noise == "local":
        out = uplink.local_gaussian(1.0).encode(jnp.full(650, 0.01), (), (), context(jax.random.key(0)))[0]
        step = lattice.lattice(C, 1.0, 1).step
    else:
        data = population()
        batch, weights = jax.tree.map(lambda x: x[:4], data.examples), jnp.ones(4)
        gradient = fc.local.private_gradient(C, 1.0)
        made, _ = jax.jit(lambda key: gradient(softmax_loss, parameters(), batch, weights, key))(jax.random.key(0))
        out, step = made["w"], lattice.lattice(C, 1.0, 4).step / 4
    whole = np.round(np.asarray(out, np.float64) / float(step))
    np.testing.assert_array_equal(np.float32(whole) * np.float32(step), out)


# ------------------------------------------------------------------------------------- the distribution


def test_tails_are_a_gaussians_as_far_as_eighty_million_draws_reach():
    """float32 noise ends at 5.22 standard deviations: 14 of these draws lie farther, and none would, once in 1e6."""
    std, table = lattice.WIDTH, alias.gaussian_table(float(lattice.WIDTH))
    edges = np.ceil(std * np.array([-5.22, -4.5, -4, -3, -1, 0, 1, 3, 4, 4.5, 5.22])).astype(int)

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def counts(key):
        both = [x.reshape(2**11, 2**11) for x in alias.draw(key, 2**22, table, 2)]
        beyond = sum(jnp.sum(jnp.stack([jnp.sum(x >= e, 0, jnp.int32) for e in edges.tolist()]), 1) for x in both)
        return beyond, sum(jnp.sum(jnp.sum(x & 1, 0)) for x in both)

    beyond, odd = zip(*(counts(jax.random.key(i)) for i in range(10)), strict=True)
    total = 20 * 2**22
    found = -np.diff([total, *np.sum(beyond, 0, dtype=np.int64), 0])
    expected = -np.diff([1, *scipy.stats.norm.sf((edges - 0.5) / std), 0]) * total
    assert scipy.stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue > FALSE_ALARM
    assert found[0] + found[-1] > 0  # a right implementation fails once in 3e6
    assert abs(np.sum(odd, dtype=np.int64) - total / 2) < 5 * math.sqrt(total) / 2  # the lowest bit is a fair coin


@pytest.mark.parametrize("stddev", [0.4, 5.3, 1024.0])
def test_a_table_is_the_discrete_gaussian_to_its_ninety_fifth_bit(stddev):
    table = alias.gaussian_table(stddev)
    capacity, columns = 1 << 32 * alias.WORDS, table.columns
    words = table.thresholds.astype(object)
    own = sum(words[i] << 32 * (alias.WORDS - 1 - i) for i in range(alias.WORDS))
    masses = own.copy()
    for column, other in enumerate(table.aliases.tolist()):
        masses[other] += capacity - own[column]
    assert masses.sum() == columns * capacity
    with decimal.localcontext(decimal.Context(prec=60)):
        width = 2 * decimal.Decimal(stddev) ** 2
        half = [(-decimal.Decimal(k * k) / width).exp() for k in range(columns // 2 + 1)]
        weights = half[:0:-1] + half[:-1]
        total = sum(weights)
        distance = sum(abs(decimal.Decimal(int(m)) / (columns * capacity) - w / total) for m, w in zip(masses, weights))
        assert distance / 2 < decimal.Decimal(2) ** -95


def test_what_the_docstring_says_of_smoothing_holds():
    """A sum over the integers of a Gaussian of standard deviation 2 depends on its centre by 1e-34 and less."""
    assert lattice.WIDTH / math.sqrt(1 + lattice.SPREAD**2) >= lattice.SMOOTH
    with decimal.localcontext(decimal.Context(prec=60)):

        def total(centre, stddev):
            width = 2 * decimal.Decimal(stddev) ** 2
            return sum((-((k - decimal.Decimal(centre)) ** 2) / width).exp() for k in range(-40, 41))

        sums = [total(centre, 2) for centre in (0, 0.125, 0.5, 0.8)]
        assert max(sums) / min(sums) - 1 < decimal.Decimal("3e-34")
        # And so x1 + k x2 is a discrete Gaussian: here of standard deviation 6 and k = 2, where the same number is 3e-63.
        narrow = {k: (-decimal.Decimal(k * k) / 72).exp() for k in range(-100, 101)}
        made = {m: sum(narrow[m - 2 * k] * narrow[k] for k in range(-40, 41)) for m in range(20)}
        ratios = [made[m] / (-decimal.Decimal(m * m) / 360).exp() for m in range(20)]
        assert max(ratios) / min(ratios) - 1 < decimal.Decimal("1e-9")  # what the sum of 81 terms leaves out


def test_later_words_decide_where_earlier_ones_are_equal(monkeypatch):
    """With words of two bits in place of 32, a quarter of the draws is undecided after each."""
    monkeypatch.setattr(alias, "_bits", lambda key, size: jax.random.bits(key, (size,), jnp.uint32) & 3)
    numbers = np.array([37, 0, 63, 22])  # in base 4, thresholds out of 64
    table = alias.Table(
        np.stack([numbers >> 4, numbers >> 2 & 3, numbers & 3]).astype(np.uint32), np.array([1, 2, 3, 0])
    )
    x = np.asarray(alias.draw(jax.random.key(0), 200_000, table._replace(aliases=table.aliases.astype(np.int32)))[0])
    masses = numbers.astype(float)
    np.add.at(masses, table.aliases, 64 - numbers)
    found = np.bincount(x + 2, minlength=4)
    assert scipy.stats.chisquare(found, masses / masses.sum() * len(x)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_any_generators_bits_will_do(impl):
    """``jax.random.poisson`` takes Threefry's only."""
    key = jax.random.key(3, impl=impl)
    noise = lattice.noise(key, jnp.zeros(5000), lattice.lattice(1.0, 1.0, N))
    assert scipy.stats.kstest(np.asarray(noise) / 523266.0, "norm").pvalue > FALSE_ALARM
    for x, std in ((discrete.skellam(key, (5000,), 9.0), 3), (discrete.discrete_gaussian(key, (5000,), 30.0), 30)):
        below = scipy.stats.chi2(5000).cdf(np.sum(np.square(np.asarray(x, np.float64) / std)))
        assert FALSE_ALARM < below < 1 - FALSE_ALARM


# ------------------------------------------------------------------------------------------ exact sums


def test_a_sum_has_the_same_bits_in_any_order_chunks_and_places():
    rng = np.random.default_rng(0)
    messages = rng.integers(-(2**31), 2**31, (24, 5), dtype=np.int32)  # so that it wraps around
    weights = (np.arange(24) % 5 > 0).astype(np.float32)
    expected = np.sum(messages[weights > 0], 0, dtype=np.int32)
    reducer = fc.reduce.fixed_mean(7.0)

    def total(rows, width):
        acc = reducer.zero(jnp.asarray(messages[0]), None)
        for first in range(0, len(rows), width):
            chosen = rows[first : first + width]
            acc = reducer.add(acc, jnp.asarray(messages[chosen]), jnp.asarray(weights[chosen]))
        return acc

    for width in (1, 3, 24):
        for rows in (np.arange(24), rng.permutation(24)):
            assert_identical(np.asarray(reducer.finish(total(rows, width), None)), expected)
    by_device = jax.tree.map(lambda *x: jnp.stack(x), *(total(np.arange(24)[d::4], 2) for d in range(4)))
    together = jax.vmap(lambda acc: reducer.finish(acc, "devices"), axis_name="devices")(by_device)
    assert_identical(np.asarray(together), np.broadcast_to(expected, (4, 5)))


def test_real_numbers_are_divided_as_ever_and_integers_are_not():
    reducer, messages = fc.reduce.fixed_mean(4.0), {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2), jnp.int32)}
    acc = reducer.add(reducer.zero(jax.tree.map(lambda x: x[0], messages), None), messages, jnp.ones(3))
    out = reducer.finish(acc, None)
    assert (out["a"][0], out["b"][0], out["b"].dtype) == (0.75, 3, jnp.int32)
    other = fc.reduce.uniform_mean()
    acc = other.add(other.zero({"b": messages["b"][0]}, None), {"b": messages["b"]}, jnp.ones(3))
    assert other.finish(acc, None)["b"][0] == 1.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=6, max_size=6),
    st.sampled_from([1e-3, 0.3, 7.0, 1e4]),
    st.sampled_from([0.2, 1.0, 40.0]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_truncation_lengthens_nothing_and_a_clipped_message_has_no_more_steps_than_its_bound(x, bound, z, dtype):
    with np.errstate(over="ignore"):
        x = jnp.asarray(np.array(x, np.float32)).astype(dtype)
    clipped, steps = clipped_steps(x, jnp.float32(bound), jnp.float32(z))
    counted = [int(s) for s in np.asarray(steps)]
    on = lattice.lattice(bound, z, N)
    assert sum(s * s for s in counted) <= Fraction(float(on.levels)) ** 2
    for s, value in zip(counted, np.asarray(clipped, np.float64), strict=True):
        assert abs(s) * float(on.step) <= abs(value)
        assert abs(s) * float(on.step) >= abs(value) * (1 - 0.01) - float(on.step)


@jax.jit
def clipped_steps(x, bound, z):
    clipped, _ = fc.clipping.clip_by_global_norm(bound).update(x, fc.clipping.clip_by_global_norm(bound).init(x))
    clipped = jnp.where(jnp.isfinite(clipped), clipped, 0)
    return clipped, lattice.truncated(clipped, lattice.lattice(bound, z, N))


@pytest.mark.parametrize("z", [1e-5, 0.01, 1.0, 300.0])
@pytest.mark.parametrize("n", [1, 8, 1000, 10**5])
def test_a_cohorts_sum_and_its_noise_fit_and_the_noise_is_what_was_asked_for(n, z):
    on = lattice.lattice(C, z, n)
    most = float(on.levels) * (n + 6 * math.sqrt(n)) + alias.REACH * lattice.WIDTH * (1 + int(on.spread))
    assert most < 2**31
    floor = lattice.WIDTH / lattice.ROOM * (math.sqrt(n) + 3) ** 2
    assert float(on.stddev) == pytest.approx(max(z, floor) * C, rel=1e-5)
    if 1000 * n < 2**31 * z / lattice.WIDTH:  # the error of truncation is under a thousandth of the noise
        assert n / (float(on.stddev / on.step)) < 2e-3 * max(1, n / 1000)


def test_a_traced_multiplier_gives_the_same_bits_and_zero_no_noise():
    updates, key = jnp.asarray(np.random.default_rng(0).normal(size=(N, 40)), jnp.float32) / 20, jax.random.key(0)
    made = jax.jit(jax.vmap(lambda z: released(uplink.gaussian(z), updates, key)))(jnp.array([0.0, 0.3, 2.0]))
    for z, out in zip((0.3, 2.0), made[1:], strict=True):
        assert_identical(np.asarray(out), np.asarray(jax.jit(lambda z=z: released(uplink.gaussian(z), updates, key))()))
    np.testing.assert_allclose(made[0], updates.mean(0), atol=2e-7)
    assert_identical(np.asarray(released(uplink.gaussian(0.0), updates, key)), np.asarray(updates.sum(0) / N))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_parameters_of_other_types_get_the_same_noise(dtype):
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        update, key = {"w": jnp.full((5, 3), 0.05, dtype), "b": jnp.full(3, 0.05, dtype)}, seeded(0)
        ctx, link = context(key), uplink.gaussian(1.0)
        encode = jax.jit(lambda update: tuple(encoded(link, update, (), (), ctx)[0]))
        message, *said = encode(update)
        assert {x.dtype for x in jax.tree.leaves(message)} == {jnp.dtype("int32")}
        assert said[0] == 18 * jnp.dtype(dtype).itemsize  # what a client sends
        decode = jax.jit(lambda message: link.decode(message, (), {}, ctx)[0])
        whole = encode({k: np.asarray(x, np.float32) for k, x in update.items()})[0]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), decode(message), decode(whole))
        local = jax.jit(lambda update: uplink.local_gaussian(1.0).encode(update, (), (), ctx)[0])(update)
        assert {x.dtype for x in jax.tree.leaves(local)} == {jnp.dtype(dtype)}


def test_a_stale_message_gets_shorter_and_stays_whole():
    from fedjax_clip.algorithms.fedbuff import _discounted

    link = _discounted(uplink.gaussian(1.0), 0.5, 5)
    update, ctx = jnp.array([0.3, -0.2, 1e-5]), context(jax.random.key(0))
    fresh, stale = (link.encode(update, (), (), ctx._replace(staleness=jnp.int32(s)))[0].value for s in (0, 3))
    assert_identical(np.asarray(fresh), np.asarray(uplink.gaussian(1.0).encode(update, (), (), ctx)[0]))
    np.testing.assert_array_equal(stale, np.trunc(np.asarray(fresh) / 2))


# --------------------------------------------------------------------------------- noise over the rounds


def rounds_of(made, messages, noise):
    """What a link with this mechanism makes of these sums ``[T, d]`` and this noise, all in whole steps."""
    state, out = lattice.init_correlated(made, messages[0]), []
    step = jax.jit(lambda z, state: lattice.correlated(made, z, state))
    for message, z in zip(messages, noise, strict=True):
        row, state = step(z, state)
        out.append(np.asarray(message + row))
    return np.stack(out).astype(np.int64)


def noise_behind(made, outputs, messages):
    """The independent noise that makes these outputs of these sums: there is exactly one, in whole steps."""
    state, noise = lattice.init_correlated(made, messages[0]), []
    step = jax.jit(lambda z, state: lattice.correlated(made, z, state))
    for output, message in zip(outputs, messages, strict=True):
        past, _ = step(jnp.zeros_like(message), state)
        z = jnp.asarray(output - np.asarray(message), jnp.int32) - past
        _, state = step(z, state)
        noise.append(np.asarray(z))
    return np.stack(noise).astype(np.int64)


@pytest.mark.parametrize("made", [mechanism.tree(4), mechanism.toeplitz([2.0, 1.0, 0.75])], ids=["tree", "toeplitz"])
def test_correlated_noise_is_in_whole_steps_and_explains_either_sum(made):
    """Under a wrong hypothesis, too, there is noise for the outputs: apart from the true one by C times the difference."""
    rng, (rounds, dim) = np.random.default_rng(0), (7, 300)
    true, wrong = (jnp.asarray(rng.integers(-(10**5), 10**5, (rounds, dim)), jnp.int32) for _ in range(2))
    drawn = np.asarray(lattice.noise(jax.random.key(0), true, lattice.lattice(C, 1.0 / lattice.diagonal(made), N)))
    outputs = rounds_of(made, true, jnp.asarray(drawn))
    np.testing.assert_array_equal(noise_behind(made, outputs, true), drawn)
    strategy = np.asarray(made.strategy(rounds), float) / lattice.diagonal(made)
    moved = noise_behind(made, outputs, wrong) - drawn
    apart = moved - strategy @ (np.asarray(true, np.int64) - np.asarray(wrong, np.int64))
    if made.whole:
        assert not apart.any()
    norm = np.linalg.norm(strategy, 2)
    assert np.linalg.norm(apart) <= 2 * norm * math.sqrt(rounds * dim)


# -------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_record_that_is_not_finite_adds_zero_and_drops_nobody(bad):
    data = population()
    batch = jax.tree.map(lambda x: np.array(x[:4]), data.examples)
    batch["x"][2] = bad
    gradient = fc.local.private_gradient(0.3, 1.0)
    step = jax.jit(lambda weights: gradient(softmax_loss, parameters(), batch, weights, jax.random.key(0))[0])
    spoiled, without = step(jnp.ones(4)), step(jnp.array([1.0, 1.0, 0.0, 1.0]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(4 * x, 3 * y, rtol=1e-6), spoiled, without)
    x = data.examples["x"].copy()
    x[0] = bad
    spoiled = fc.FederatedData({**data.examples, "x": x}, data.offsets)
    algorithm = fc.fedavg(softmax_loss, optax.sgd(0.1), gradient=gradient)
    server, _, history = Run(algorithm, spoiled).rounds(parameters(), [[0, 1]])
    assert history[0]["dropped"] == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(server.params))


@pytest.mark.parametrize("reducer", ["ckks_mean(3)", "norm_bounded(1.0)"])
def test_a_reducer_that_makes_no_exact_sum_is_refused(reducer):
    made = fc.secure.ckks_mean(3) if reducer[0] == "c" else fc.reduce.norm_bounded(1.0, fc.reduce.fixed_mean(3))
    with pytest.raises(fc.InvalidInput, match="make fixed_mean the reducer"):
        fc.fedavg(softmax_loss, optax.sgd(0.1), uplink=uplink.chain(CLIP, uplink.gaussian(1.0)), reducer=made)
    with pytest.raises(fc.InvalidInput, match="move the noise last"):
        uplink.chain(CLIP, uplink.gaussian(1.0), uplink.compress(fc.compression.top_k(0.1)))
    with pytest.raises(fc.InvalidInput, match="exact sum of integers"):
        uplink.gaussian(1.0).decode(jnp.zeros(3), (), {}, context(jax.random.key(0)))
