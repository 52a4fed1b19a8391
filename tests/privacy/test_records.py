"""DP-SGD at the clients: noise on each step, and what it is worth to a record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from problems import parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import privacy
from fedjax_clip.data import sampling

FALSE_ALARM = 1e-6  # of each statistical test below, for a right implementation
BOUND, Z = 0.3, 1.5
DATA = population()
BATCH = jax.tree.map(lambda x: x[:4], DATA.examples)


@jax.jit
def many_gradients(noise_multiplier, weights, keys):
    gradient = fc.local.private_gradient(BOUND, noise_multiplier)
    return jax.vmap(lambda key: gradient(softmax_loss, parameters(), BATCH, weights, key)[0])(keys)


def gradients(noise_multiplier, weights, draws=2000):
    keys = jax.vmap(jax.random.key)(np.arange(draws))
    out = many_gradients(jnp.float32(noise_multiplier), jnp.asarray(weights), keys)
    return np.concatenate([x.reshape(draws, -1) for x in jax.tree.leaves(out)], axis=1)


def clipped_mean(weights):
    """By hand: of the examples that are there, each clipped, alike whatever it weighs."""
    x, y, w = np.asarray(BATCH["x"], np.float64), np.asarray(BATCH["y"]), parameters()["w"]
    exp = np.exp(x @ w)
    error = exp / exp.sum(1, keepdims=True) - np.eye(3)[y]
    each = np.concatenate([error[:, None], x[:, :, None] * error[:, None]], axis=1).reshape(4, -1)  # b, then w
    each *= np.minimum(1, BOUND / np.linalg.norm(each, axis=1, keepdims=True))
    return each[np.asarray(weights) > 0].mean(0)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (2.0, 0.5, 0.0, 1.0)])
def test_a_step_is_the_clipped_mean_plus_noise_of_the_clips_own_bound(weights):
    np.testing.assert_allclose(gradients(0.0, weights)[0], clipped_mean(weights), atol=1e-6)
    noise = (gradients(Z, weights) - clipped_mean(weights)) / (Z * BOUND / np.count_nonzero(weights))
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > FALSE_ALARM

    def pvalue(scale):
        below = scipy.stats.chi2(noise.size).cdf(np.sum(np.square(noise / scale)))
        return 2 * min(below, 1 - below)

    assert pvalue(1) > FALSE_ALARM
    assert max(pvalue(0.96), pvalue(1.04)) < FALSE_ALARM
    worst = np.abs(np.corrcoef(noise.T) - np.eye(noise.shape[1])).max()  # coordinates do not share their noise
    assert scipy.stats.norm.sf(worst * np.sqrt(len(noise))) * noise.shape[1] ** 2 > FALSE_ALARM


@pytest.mark.parametrize(
    ("work", "passes"),
    [
        (fc.extend.LocalWork(4), lambda size: 1),
        (fc.extend.LocalWork(4, epochs=3), lambda size: 3),
        (fc.extend.LocalWork(None, epochs=2), lambda size: 2),
        (fc.extend.LocalWork(4, steps=3), lambda size: -(-3 // -(-size // 4))),  # steps over the steps of a pass
    ],
)
def test_each_client_is_charged_for_its_own_passes(work, passes):
    sampler, rounds = sampling.uniform(2), 7
    drawn = np.concatenate([sampler.sample(DATA.sizes, 3, r) for r in range(rounds)])
    expected = []
    for client, size in enumerate(DATA.sizes):
        uses = np.sum(drawn == client) * passes(int(size))
        expected.append(privacy.epsilon(Z, sampling.uniform(1), 1, int(uses), 1e-5) if uses else 0)
    assert len(set(expected)) > 2
    actual = privacy.record_epsilons(Z, DATA, work, sampler, rounds, 1e-5, seed=3)
    np.testing.assert_allclose(actual, expected)


def test_a_secret_runs_cohorts_are_counted_and_not_the_public_seeds():
    """Else a client that the run drew seven times is charged for the three of another run."""
    secret, sampler, spent = privacy.Secret.of_seed(5), sampling.uniform(2), []
    drawn = np.concatenate([sampler.draw(DATA.sizes, secret.seed(), r) for r in range(9)])
    for client in range(DATA.num_clients):
        uses = int(np.sum(drawn == client))
        spent.append(privacy.epsilon(Z, sampling.uniform(1), 1, uses, 1e-5) if uses else 0)
    counted = privacy.record_epsilons(Z, DATA, fc.extend.LocalWork(4), sampler, 9, 1e-5, secret=secret)
    np.testing.assert_allclose(counted, spent)
    assert np.any(counted != privacy.record_epsilons(Z, DATA, fc.extend.LocalWork(4), sampler, 9, 1e-5))


def test_batches_of_a_clients_own_size_are_counted():
    own = fc.extend.LocalWork(fc.data.speeds.BatchSizes(lambda ids, seed: np.full(len(ids), 4), 4), epochs=2)
    about = DATA, fc.extend.LocalWork(4, epochs=2), sampling.uniform(2), 5, 1e-5
    expected = privacy.record_epsilons(Z, *about)
    np.testing.assert_allclose(privacy.record_epsilons(Z, about[0], own, *about[2:]), expected)


@pytest.mark.parametrize("work", [fc.extend.LocalWork(4, epochs=2), fc.extend.LocalWork(4, steps=5)])
def test_a_record_is_used_no_more_often_than_it_is_charged_for(work):
    ids = np.arange(DATA.num_clients)
    cohort = fc.extend.plan(DATA, ids, work, seed=0, round=0, population=DATA.examples)
    used = np.bincount(np.asarray(cohort.batches)[np.asarray(cohort.example_weight) > 0], minlength=DATA.num_examples)
    for client in ids:
        once = privacy.record_epsilons(Z, DATA, work, sampling.uniform(6), 1, 1e-5)[client]
        most = used[DATA.offsets[client] : DATA.offsets[client + 1]].max()
        assert once == pytest.approx(privacy.epsilon(Z, sampling.uniform(1), 1, int(most), 1e-5))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fc.local.private_gradient(0.0, 1.0), "positive"),
        (lambda: fc.local.private_gradient(1.0, -1.0), "noise_multiplier"),
        (lambda: privacy.record_epsilons(1.0, DATA, fc.extend.LocalWork(4), lambda: None, 3, 1e-5), "clock"),
        (lambda: privacy.record_epsilons(1.0, DATA, fc.extend.LocalWork(4), sampling.uniform(2), 3, 1.5), "delta"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(call, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        call()
