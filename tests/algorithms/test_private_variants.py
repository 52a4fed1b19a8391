"""Private variants of algorithms against an oracle written from their papers: groups, FedExP, SCAFFOLD, memories."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import private as oracle

import fedjax_clip as fc
from fedjax_clip import privacy, uplink

N, DIM, LR = 5, 4, 0.1
RNG = np.random.default_rng(3)
TARGETS = RNG.normal(size=(N, DIM)).astype("f4") * 3
DATA = fc.FederatedData({"a": TARGETS, "scale": np.arange(1, N + 1, dtype="f4")}, np.arange(N + 1))
START = np.zeros(DIM, "f4")
CLIP, FIXED = uplink.clip_by_global_norm, fc.reduce.fixed_mean(3)


def loss(params, batch, key):
    """Client i: (i + 1) / 2 ||x - a_i||^2, so that its gradient is (i + 1) (x - a_i)."""
    return 0.5 * batch["scale"] * jnp.sum(jnp.square(params - batch["a"]), axis=-1)


def gradient(i):
    return lambda y: (i + 1) * (np.asarray(y, np.float64) - TARGETS[i])


def cohort(round):
    return [(2 * round) % N, (2 * round + 1) % N, (2 * round + 3) % N]


SAMPLER = fc.data.sampling.Sampler(lambda sizes, seed, round: np.array(cohort(round)))


def train(algorithm, rounds=4, **options):
    return fc.train(algorithm, DATA, jnp.asarray(START), rounds=rounds, sampler=SAMPLER, **options)


@pytest.mark.parametrize("equal", [False, True])
def test_quantiles_by_group_are_the_papers(equal):
    groups = fc.clipping.groups({"head": "head", "body": "body"})
    allocation = "equal" if equal else "global"
    link = uplink.quantile_clip(1.5, 0.6, 0.3, scope=groups, allocation=allocation)
    updates = [
        {"body": RNG.normal(size=3).astype("f4") * s, "head": RNG.normal(size=2).astype("f4")} for s in (0.1, 1, 9)
    ]
    key = jax.random.key(0)
    ctx = uplink.Context(key, key, jnp.int32(0), jnp.float32(1), 4.0)
    bounds = link.init(updates[0])
    sent = [link.encode(u, bounds, (), ctx) for u in updates]
    mean = jax.tree.map(lambda *xs: sum(xs) / 4, *(message for message, _, _ in sent))
    report = fc.extend.metrics.finish(jax.tree.map(lambda *xs: sum(xs), *(r for _, _, r in sent)))
    update, moved, seen = link.decode(mean, bounds, report, ctx._replace(weight=jnp.float32(3)))
    wanted, after = oracle.quantile_by_group(updates, dict.fromkeys(updates[0], 1.5), 0.6, 0.3, 4, equal)
    for name in wanted:
        np.testing.assert_allclose(update[name], wanted[name], rtol=1e-5, atol=1e-6)
        assert float(moved[name]) == pytest.approx(after[name], rel=1e-5)
        assert float(seen[f"threshold/{name}"]) == 1.5
    std = oracle.noise_std({k: float(c) for k, c in bounds.items()}, 0.7, 4, equal)
    bound = float(link.promises.bound(bounds, updates[0]))
    for name, wanted_std in std.items():
        assert 0.7 * bound / 4 * (float(bounds[name]) if equal else 1) == pytest.approx(wanted_std)


def test_the_noise_on_bits_of_groups_costs_what_one_bits_does():
    groups = fc.clipping.groups({"head": "head", "body": "body"})
    link = uplink.quantile_clip(1.0, 0.5, rate=1.0, bits_noise=2.0, scope=groups)
    report = {f"{kind}/{name}": jnp.float32(0.5) for kind in ("within", "norm") for name in ("head", "body")}

    @jax.vmap
    def moved(key):
        ctx = uplink.Context(key, key, jnp.int32(-1), jnp.float32(3), 8.0)
        one = {"head": jnp.ones(1), "body": jnp.ones(1)}
        bounds = link.decode(one, link.init(one), report | {"clipped": jnp.float32(1)}, ctx)[1]
        return -jnp.log(jnp.stack([bounds["head"], bounds["body"]]))

    noise = np.asarray(moved(jax.random.split(jax.random.key(1), 20_000))) * 8
    np.testing.assert_allclose(noise.std(axis=0), oracle.bits_std(2.0, 2), rtol=0.03)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.04
    z = privacy.together((*link.promises.noise_multipliers, 1.2))
    assert z == pytest.approx(oracle.two_mechanisms(2 * 2.0, 1.2))
    assert privacy.split(z, 2.0) == pytest.approx(1.2)


@pytest.mark.parametrize("denominator", [None, 4])
def test_fedexps_step_is_the_papers(denominator):
    updates = [RNG.normal(size=DIM).astype("f4") for _ in range(3)]
    link = uplink.fedexp(None if denominator is None else 0.0, epsilon=0.01)
    key = jax.random.key(0)
    ctx = uplink.Context(key, key, jnp.int32(0), jnp.float32(3), denominator, jnp.float32(9))
    reports = [link.encode(u, (), (), ctx)[2] for u in updates]
    report = fc.extend.metrics.finish(jax.tree.map(lambda *xs: sum(xs), *reports))
    mean = sum(updates) / (3 if denominator is None else denominator)
    update, _, metrics = link.decode(jnp.asarray(mean), (), report, ctx)
    wanted, eta = oracle.fedexp_step(updates, denominator, 0.01)
    np.testing.assert_allclose(update, wanted, rtol=1e-5, atol=1e-6)
    assert float(metrics["extrapolation"]) == pytest.approx(eta, rel=1e-5)
    assert eta > 1
    three = jax.tree.map(lambda x: 3 * x, reports[0])
    alike = link.decode(jnp.asarray(updates[0]), (), fc.extend.metrics.finish(three), ctx)
    np.testing.assert_array_equal(alike[0], updates[0])  # who agrees makes no longer step


def test_the_noise_on_fedexps_squares_is_in_proportion_to_the_square_of_the_bound():
    link = uplink.fedexp(5.0, epsilon=1.0)

    @jax.vmap
    def eta(key):
        ctx = uplink.Context(key, key, jnp.int32(-1), jnp.float32(0), 8.0, jnp.float32(2))
        return link.decode(jnp.zeros(2), (), {"squares": jnp.int32(0)}, ctx)[2]["extrapolation"]

    found = np.asarray(eta(jax.random.split(jax.random.key(2), 20_000)))
    noise = found[found > 1] * 2  # squares / 2, of nobody: the noise alone, where it is large
    std = 5.0 * 2.0**2 / 8
    for level in (2.5, 3.0, 5.0):
        tail = np.sum(noise > level) / len(found)
        assert tail == pytest.approx(0.5 * math.erfc(level / std / math.sqrt(2)), abs=0.012)


def test_private_scaffold_without_noise_is_the_oracles_and_without_a_clip_scaffold():
    def private(clip_update, clip_change, z=0.0):
        links = [uplink.chain(CLIP(c), uplink.gaussian(z)) for c in (clip_update, clip_change)]
        return fc.scaffold(loss, optax.sgd(LR), optax.sgd(0.7), uplink=links[0], variate_uplink=links[1], reducer=FIXED)

    result = train(private(0.2, 1.5), local_epochs=2)
    x, c, own = START.astype(float), np.zeros(DIM), {i: np.zeros(DIM) for i in range(N)}
    for round in range(4):
        steps = {i: [gradient(i)] * 2 for i in cohort(round)}
        x, c, own = oracle.dp_scaffold_round(x, c, own, steps, LR, 0.7, N, 0.2, 1.5, denominator=3)
    np.testing.assert_allclose(result.params, x, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(result.state.server.own, c, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(result.state.clients.own, [own[i] for i in range(N)], rtol=2e-5, atol=1e-5)
    plain = fc.scaffold(loss, optax.sgd(LR), optax.sgd(0.7), reducer=FIXED)
    np.testing.assert_allclose(train(private(1e9, 1e9)).params, train(plain).params, rtol=5e-7)
    noisy = train(private(0.2, 1.5, 2.0), rounds=1).history[0]
    assert noisy["uplink/1/noise_std"] == pytest.approx(2.0 * 0.2 / 3)
    assert noisy["uplink/part1/1/noise_std"] == pytest.approx(2.0 * 1.5 / 3)
    multipliers = private(0.2, 1.5, 2.0).parts.uplink.promises.noise_multipliers
    assert privacy.together(multipliers) == pytest.approx(oracle.two_mechanisms(2.0, 2.0))


def test_private_scaffold_for_records_has_variates_of_noised_gradients():
    clipped = fc.scaffold(
        loss, optax.sgd(LR), gradient=fc.local.private_gradient(0.5, 0.0), reducer=fc.reduce.uniform_mean()
    )
    result = train(clipped)
    x, c, own = START.astype(float), np.zeros(DIM), {i: np.zeros(DIM) for i in range(N)}
    for round in range(4):
        steps = {i: [lambda y, i=i: oracle.clip(gradient(i)(y), 0.5)] for i in cohort(round)}
        x, c, own = oracle.dp_scaffold_round(x, c, own, steps, LR, 1.0, N)
    np.testing.assert_allclose(result.params, x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.state.server.own, c, rtol=1e-4, atol=1e-5)


def sgd2m(z):
    link = uplink.chain(uplink.memory(fc.clipping.clip_by_global_norm(0.8), 0.6, 0.5), uplink.gaussian(z))
    return fc.fedsgd(loss, optax.sgd(1.0), optax.sgd(LR), uplink=link, reducer=FIXED)


def test_private_clip21_sgd2m_is_the_oracles():
    result = train(sgd2m(0.0))
    x, g = START.astype(float), np.zeros(DIM)
    u, v = ({i: np.zeros(DIM) for i in range(N)} for _ in range(2))
    for round in range(4):
        grads = {i: gradient(i) for i in cohort(round)}
        u, v = dict(u), dict(v)
        # The library steps by g after the exchange of the same round, along -g of updates -grad.
        x, g, u, v = oracle.dp_clip21_sgd2m_round(x, g, u, v, grads, 0.8, 0.6, 0.5, LR, N, 3)
    np.testing.assert_allclose(result.params, x, rtol=2e-5, atol=1e-6)


def test_private_normec_is_the_oracles():
    link = uplink.chain(uplink.memory(fc.clipping.smoothed_clip(0.4, 2.0)), uplink.gaussian(0.0))
    result = train(fc.fedsgd(loss, optax.sgd(1.0), optax.sgd(LR), uplink=link, reducer=FIXED))
    x, g, v = START.astype(float), np.zeros(DIM), {i: np.zeros(DIM) for i in range(N)}
    for round in range(4):
        grads = {i: gradient(i) for i in cohort(round)}
        x, g, v = oracle.dp_alpha_normec_round(x, g, v, grads, 2.0, 0.4, LR, N, 3)
    np.testing.assert_allclose(result.params, x, rtol=2e-5, atol=1e-6)


def test_a_private_memorys_noise_is_in_proportion_to_its_clip():
    row = train(sgd2m(2.0), rounds=1).history[0]
    assert row["uplink/1/noise_std"] == pytest.approx(2.0 * 0.8 / 3)


@pytest.mark.parametrize(("z", "rounds", "delta"), [(2.0, 1, 1e-3), (4.0, 10, 1e-5)])
def test_epsilon_worked_by_hand(z, rounds, delta):
    """Everyone in every round: all rounds are one Gaussian mechanism, whichever variant sends the messages."""
    multipliers = {
        "memory": sgd2m(z).parts.uplink.promises.noise_multipliers,
        "by layer": uplink.chain(
            uplink.at_client(fc.clipping.clip(0.5, scope=fc.clipping.layer())), uplink.gaussian(z)
        ).promises.noise_multipliers,
    }
    by_hand = oracle.gaussian_epsilon(z, rounds, delta)
    for found in multipliers.values():
        spent = privacy.epsilon(privacy.together(found), privacy.Separated(1), N, rounds, delta, "pld")
        assert spent == pytest.approx(by_hand, rel=1e-3)
    both = privacy.together((z * math.sqrt(2), z * math.sqrt(2)))  # SCAFFOLD's two links
    assert privacy.epsilon(both, privacy.Separated(1), N, rounds, delta, "pld") == pytest.approx(by_hand, rel=1e-3)
