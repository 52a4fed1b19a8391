"""Scale-then-privatise: coordinates on a common scale before the clip and the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import COHORTS, Run, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import privacy, uplink
from fedjax_clip.data import sampling

SGD, EPS = optax.sgd(0.2), 0.25


def turn(link, state, update, key=0):
    """One round of one client, whose message is the mean."""
    key = jax.random.key(key)
    ctx = uplink.Context(key, key, jnp.int32(-1), jnp.float32(1), denominator=1.0)
    message, _, report = link.encode(update, state, link.init_client(update), ctx)
    return message, *link.decode(message, state, fc.extend.metrics.finish(report), ctx)


def test_the_scale_follows_the_means_as_written_in_the_paper():
    link = uplink.preconditioned(0.5, EPS)
    v, state = np.zeros(2), link.init({"w": jnp.zeros(2)})
    for update in ([1.0, 4.0], [2.0, 0.0], [-1.0, 8.0]):
        message, mean, state, metrics = turn(link, state, {"w": jnp.array(update)})
        np.testing.assert_allclose(message["w"], np.array(update) / (np.sqrt(v) + EPS), rtol=1e-6)
        np.testing.assert_allclose(mean["w"], update, rtol=1e-6)  # nothing between them: nothing happened
        assert float(metrics["scale"]) == pytest.approx(np.mean(1 / (np.sqrt(v) + EPS)), rel=1e-6)
        v = 0.5 * v + 0.5 * np.square(update)
        np.testing.assert_allclose(state["w"], v, rtol=1e-6)


def test_noise_is_in_proportion_to_a_coordinates_own_size():
    link = uplink.chain(uplink.preconditioned(0.0, EPS), uplink.clip_by_global_norm(2.0), uplink.gaussian(0.5))
    small, large = jnp.full(20_000, 0.25), jnp.full(20_000, 1.75)
    state = ({"s": small**2, "l": large**2}, *link.init({"s": small, "l": large})[1:])
    _, mean, _, _ = turn(link, state, {"s": 0 * small, "l": 0 * large})
    assert np.std(mean["s"]) == pytest.approx(0.5 * 2.0 * 0.5, rel=0.03)  # z C (sqrt(v) + eps)
    assert np.std(mean["l"]) == pytest.approx(0.5 * 2.0 * 2.0, rel=0.03)


def ends(link):
    algorithm = fc.fedavg(softmax_loss, SGD, uplink=link, reducer=fc.reduce.fixed_mean(2.0))
    return Run(algorithm, population()).rounds(parameters(), COHORTS)[0].params


def test_a_large_eps_scales_all_coordinates_alike():
    clip, eps = fc.uplink.clip_by_global_norm, 1e4
    plain, scaled = ends(clip(0.1)), ends(uplink.chain(uplink.preconditioned(0.9, eps), clip(0.1 / eps)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), plain, scaled)
    other = ends(uplink.chain(uplink.preconditioned(0.9, 1e-3), clip(0.1)))
    assert not np.allclose(plain["w"], other["w"], atol=1e-3)


def test_it_costs_no_privacy_and_stands_in_front_of_the_clip():
    scale, clip, noise = uplink.preconditioned(), uplink.clip_by_global_norm(1.0), uplink.gaussian(1.5)
    algorithm = fc.fedavg(softmax_loss, SGD, uplink=uplink.chain(scale, clip, noise), reducer=fc.reduce.fixed_mean(8))
    run = {"sampler": sampling.poisson(8), "num_clients": 40, "rounds": 20, "delta": 1e-3}
    assert privacy.epsilon(algorithm, **run) == privacy.epsilon(1.5, **run)
    for links in ((clip, scale, noise), (clip, noise, scale), (scale, noise)):
        with pytest.raises(fc.InvalidInput, match="put a clip|move the noise last"):
            uplink.chain(*links)
    for wrong in ({"decay": 1.0}, {"eps": 0.0}):
        with pytest.raises(fc.InvalidInput, match="preconditioned"):
            uplink.preconditioned(**wrong)
