"""The secret: its file, its way through a training, and a search of seeds for the noise."""

import copy
import dataclasses
import functools
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, assert_identical, population
from statistical import assert_uniform

import fedjax_clip as fc
from fedjax_clip.core import keys, secret
from fedjax_clip.data import draws
from fedjax_clip.privacy import Secret
from fedjax_clip.training import loop
from fedjax_clip.training.identity import fingerprint
from fedjax_clip.training.planner import Planner

SECRET = Secret.of_seed(7)


def test_a_secret_shows_nothing_of_itself():
    hidden = Secret.fresh()
    assert repr(hidden) == f"{hidden}" == "<a secret>"
    assert "known" in repr(SECRET)
    assert "known" not in repr(hidden)
    assert repr(hidden.seed()) == f"{hidden.seed()}" == "<a secret seed>"
    for leaking in (pickle.dumps, copy.copy, copy.deepcopy):
        for thing in (hidden, hidden.seed()):
            with pytest.raises(fc.InvalidInput, match="not pickled or copied"):
                leaking(thing)
    with pytest.raises(fc.InvalidInput, match="32 bytes"):
        Secret(b"short")
    derived = [hidden.commitment, hidden.seed(), hidden.words().tobytes(), hidden._content]
    assert len({bytes(x, "utf-8") if isinstance(x, str) else bytes(x) for x in derived}) == 4
    assert (
        Secret.of_seed(3).commitment == Secret.of_seed(3).commitment != hidden.commitment != Secret.fresh().commitment
    )


def test_a_kept_secret_is_a_file_of_its_owner_only(tmp_path):
    file = tmp_path / "secret.key"
    (tmp_path / "secret.key.new").write_bytes(b"of a process that was killed")
    kept = Secret.kept(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret.key"]
    assert Secret.kept(file).commitment == kept.commitment
    file.chmod(0o640)
    with pytest.raises(fc.InvalidInput, match=r"can be read by others \(mode 640\)"):
        Secret.kept(file)
    file.chmod(0o600)
    for content in (b"", b"x" * 31, b"x" * 33):
        file.write_bytes(content)
        with pytest.raises(fc.InvalidInput, match="no file of 32 bytes"):
            Secret.kept(file)
    file.rename(tmp_path / "other")
    file.symlink_to(tmp_path / "other")
    with pytest.raises(fc.InvalidInput, match="cannot be read or made: Too many levels of symbolic links"):
        Secret.kept(file)
    secret.remove(file)
    os.mkfifo(file)
    with pytest.raises(fc.InvalidInput, match="no file of 32 bytes"):
        Secret.kept(file)
    secret.remove(file)
    secret.remove(file)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with pytest.raises(fc.InvalidInput, match="cannot be read or made: No such file"):
        Secret.kept(tmp_path / "nowhere" / "secret.key")


def test_secret_cohorts_have_the_distribution_of_public_ones():
    seeds = [Secret.of_seed(i).seed() for i in range(3)]
    sizes = np.arange(1, 21)

    def counts(sampler, rounds=1500):
        drawn = [sampler.draw(sizes, seed, r) for seed in seeds for r in range(rounds)]
        return np.bincount(np.concatenate(drawn), minlength=20), np.array([len(ids) for ids in drawn])

    for sampler in (
        fc.data.sampling.uniform(3),
        fc.data.sampling.uniform(15),
        fc.data.sampling.available(4, period=1, duty=1.0),
    ):
        each, size = counts(sampler)
        assert_uniform(each)
        assert set(size) == {sampler.cohort_size or 4}
    each, size = counts(fc.data.sampling.poisson(5))
    assert_uniform(each)
    assert abs(size.mean() - 5) < 0.15
    assert abs(size.var() - 20 * 0.25 * 0.75) < 0.4
    each, _ = counts(fc.data.sampling.by_size(2, replacement=True))
    assert_uniform(each / sizes * sizes.mean())
    clock = fc.data.clock.buffered(
        fc.data.sampling.uniform(3), fc.data.speeds.lognormal(), buffer_size=2, concurrency=4
    )
    world = clock_world(sizes, seeds[0]), clock_world(sizes, seeds[0]), clock_world(sizes, seeds[1])
    turns = [[fc.data.clock.Timeline(clock, w)[r].ids.tolist() for r in range(5)] for w in world]
    assert turns[0] == turns[1] != turns[2]


def clock_world(sizes, seed):
    return fc.data.clock.World(sizes, lambda ids: np.ones(len(ids)), 0, seed)


def test_draws_are_64_bits_of_shake_and_a_longer_one_begins_as_a_shorter_one():
    seed = SECRET.seed()
    long = draws.mix(seed, 3, 1, np.arange(1000))
    assert long.dtype == np.uint64
    np.testing.assert_array_equal(draws.mix(seed, 3, 1, np.array([7, 999, 0])), long[[7, 999, 0]])
    assert len({*long.tolist(), *draws.mix(seed, 3, np.arange(1000)).tolist()}) == 2000
    assert draws.uniform(seed, 3, np.arange(0)).size == 0
    assert 0 <= draws.uniform(seed, 3, np.arange(10**5)).min() < draws.uniform(seed, 3, np.arange(10**5)).max() < 1
    np.testing.assert_array_equal(draws.uniform(3, 1, np.arange(4)), draws.mix(3, 1, np.arange(4)) / 2.0**32)


def test_a_sampler_that_cannot_take_a_secret_says_so():
    sampler = fc.data.sampling.Sampler(lambda sizes, seed, round: np.random.default_rng(seed + round).choice(9, 3))
    with pytest.raises(fc.InvalidInput, match="must take 32 bytes for its seed"):
        sampler.draw(np.ones(9), SECRET.seed(), 1)
    assert len(fc.data.sampling.round_robin(3).draw(np.ones(9), SECRET.seed(), 1)) == 3


# Through a training.
def squared(params, batch, key):
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]) ** 2


DIM, CLIENTS, N = 40, 12, 6
SHAPED = {"x": np.zeros((1, DIM), np.float32), "y": np.zeros(1, np.float32)}
START = {"w": np.zeros(DIM, np.float32)}


@functools.cache
def data():
    rng = np.random.default_rng(0)
    fields = {"x": rng.normal(size=(CLIENTS * 5, DIM)), "y": rng.normal(size=CLIENTS * 5)}
    return fc.FederatedData({k: x.astype(np.float32) for k, x in fields.items()}, np.arange(0, CLIENTS * 5 + 1, 5))


@functools.cache
def algorithm(noise=8.0, kind="gaussian"):
    links = fc.uplink.clip_by_global_norm(0.3), getattr(fc.uplink, kind)(noise)
    return fc.fedavg(squared, optax.sgd(0.1), uplink=fc.uplink.chain(*links), reducer=fc.reduce.fixed_mean(N))


def train(noise=8.0, rounds=1, kind="gaussian", **options):
    options = {"sampler": fc.data.sampling.poisson(N), "seed": 4_000} | options
    return fc.train(algorithm(noise, kind), data(), START, rounds=rounds, **options)


@functools.cache
def replay():
    """All that an attacker needs: one round of the algorithm in which nobody takes part, so that noise alone is left."""
    kept = loop.client_states(algorithm(), START, 1)
    nobody = fc.extend.plan(
        fc.FederatedData(SHAPED, [0, 1]), np.zeros(0, int), fc.extend.LocalWork(1), seed=0, round=0, state=kept
    )
    nobody = jax.tree.map(lambda x: x[0], nobody)

    def noise(key, words):
        here = nobody if words is None else dataclasses.replace(nobody, secret=words)
        return algorithm().round(algorithm().init(START), here, key)[0].params["w"]

    public = jax.jit(jax.vmap(lambda seed: noise(keys.seeded(seed), None)))
    secrets = jax.jit(jax.vmap(lambda seed, words: noise(keys.seeded(seed), words), (None, 0)))
    return public, secrets


def recovered(published, public_seed, guesses, ways=("public", "known")):
    """``[(way, guess, noiseless update)]``: guesses under which what is left is no larger than clipped updates are."""
    hits = []
    for part in np.array_split(np.asarray(guesses), max(1, len(guesses) // 2**13)):
        for way in ways:
            known = [Secret.of_seed(int(g)).of(fingerprint(data())).words() for g in part] if way == "known" else None
            noise = replay()[0](part.astype(np.uint32)) if known is None else replay()[1](public_seed, np.stack(known))
            left = published - np.asarray(noise)
            found = np.flatnonzero(np.linalg.norm(left, axis=1) <= 0.3 * CLIENTS / N)
            hits += [(way, int(part[i]), left[i]) for i in found]
    return hits


def test_noise_is_recovered_by_a_search_of_seeds_and_not_from_a_secret():
    """F1 of 7d26893: a run's noise is a function of a seed of 32 bits, and clipped updates are much smaller."""
    guesses = np.arange(2**13)
    ((_, guess, left),) = recovered(train().params["w"], 4_000, guesses, ["public"])  # the old way: no secret
    assert guess == 4_000
    np.testing.assert_allclose(left, train(noise=0.0).params["w"], atol=1e-5)
    known = Secret.of_seed(7_654)  # what --private_seed makes, and is said not to be private
    ((_, guess, left),) = recovered(train(secret=known).params["w"], 4_000, guesses, ["known"])
    assert guess == 7_654
    np.testing.assert_allclose(left, train(noise=0.0, secret=known).params["w"], atol=1e-5)
    assert recovered(train(secret=Secret.fresh()).params["w"], 4_000, guesses) == []


def test_what_all_share_stays_public_and_all_else_is_secret():
    """Links' own keys, clients' keys and decode's differ by the secret; the shared key and the roster's do not."""
    seen = fc.uplink.Uplink(
        lambda params: (),
        lambda params: (),
        lambda update, state, kept, ctx: (update, kept, {"own": ctx_bits(ctx.key), "shared": ctx_bits(ctx.round_key)}),
        lambda mean, state, report, ctx: (mean, state, report | {"decode": bits(ctx.key)}),
    )

    def client_fn(shared, client, key):
        return shared, client.state.own, {"work": ctx_bits(key)}

    def roster(message, roster):
        return bits(roster.key)

    reducer = fc.reduce.Reducer(roster, lambda acc, messages, weights: acc, lambda acc, axis: {"w": acc}, True)
    here = fc.extend.plan(population(), np.array([4, 1, 3]), fc.extend.LocalWork(4), seed=0, round=0)
    here = jax.tree.map(lambda x: x[0], here)
    rows = []
    for hidden in (None, SECRET.words(), SECRET.key(), Secret.of_seed(8).words()):
        there = dataclasses.replace(here, secret=hidden)
        key = jax.random.key(5)
        out, _, _, metrics = fc.extend.exchange(client_fn, seen, reducer, {"w": jnp.zeros(())}, (), there, key)
        rows.append(
            {"roster": out["w"]} | {k: metrics[k] for k in ("work", "uplink/own", "uplink/shared", "uplink/decode")}
        )
    plain, raw, typed, other = ({k: float(x) for k, x in row.items()} for row in rows)
    assert raw == typed
    for name in plain:
        assert len({plain[name], raw[name], other[name]}) == (1 if name in ("roster", "uplink/shared") else 3), name


def bits(key):
    return jax.random.uniform(key, (), jnp.float32)


def ctx_bits(key):
    return fc.extend.metrics.Mean.of(bits(key), jnp.ones(()))


def test_a_secret_run_resumes_to_the_same_bits_and_refuses_another_secret(tmp_path):
    def saved(rounds, hidden):
        checkpoints = fc.extend.Checkpoints(tmp_path)
        return train(rounds=rounds, secret=hidden, checkpoints=checkpoints, checkpoint_every=2)

    whole = train(rounds=5, secret=SECRET)
    saved(3, SECRET)
    resumed = saved(5, SECRET)
    assert_identical(resumed.params, whole.params)
    assert [row["clients"] for row in resumed.history] == [row["clients"] for row in whole.history[3:]]
    for other, words in ((Secret.of_seed(8), "with secret="), (None, "without")):
        with pytest.raises(fc.InvalidInput, match=words):
            saved(6, other)
    assert np.any(train(rounds=5, secret=Secret.of_seed(8)).params["w"] != whole.params["w"])
    with pytest.raises(fc.InvalidInput, match=r"secret must be an fc\.privacy\.Secret"):
        train(secret=SECRET.seed())


def test_a_run_that_begins_again_on_other_data_has_other_noise():
    """With the same noise under two sets of data, the difference of two models is that of two exact means."""
    everyone = {"sampler": fc.data.sampling.uniform(CLIENTS), "seed": 1, "rounds": 1}

    def published(noise, scale, secret):
        there = dataclasses.replace(data(), examples=data().examples | {"y": scale * data().examples["y"]})
        return fc.train(algorithm(noise), there, START, secret=secret, **everyone).params["w"]

    exact, seen, private = (
        published(noise, 1, secret) - published(noise, -3, secret)
        for noise, secret in ((0.0, None), (8.0, None), (8.0, SECRET))
    )
    np.testing.assert_allclose(seen, exact, atol=1e-4)  # of a public seed
    assert np.linalg.norm(private - exact) > 10 * np.linalg.norm(exact)
    assert SECRET.of("a").words().tolist() != SECRET.of("b").words().tolist() != SECRET.words().tolist()


def test_a_secret_begins_one_run_and_resumes_it(tmp_path):
    """The difference of two runs of the same noise on other data is what the noise hid."""
    hidden, checkpoints = Secret.fresh(), fc.extend.Checkpoints(tmp_path)
    train(rounds=1, secret=hidden, checkpoints=checkpoints)
    train(rounds=2, secret=hidden, checkpoints=checkpoints)
    with pytest.raises(fc.InvalidInput, match="take another"):
        train(rounds=1, secret=hidden)


def test_local_noise_is_each_clients_own_and_changes_with_neither_width_nor_place():
    wide, narrow = (train(4.0, kind="local_gaussian", secret=SECRET, clients_per_chunk=width) for width in (1, 5))
    assert_close(wide.params, narrow.params)
    public = train(4.0, kind="local_gaussian")
    assert np.linalg.norm(public.params["w"] - wide.params["w"]) > 0.1


def test_blocks_of_rounds_and_of_a_start_carry_it():
    sampler, devices = fc.data.sampling.uniform(N), jax.local_devices()
    planner = Planner(data(), sampler, fc.extend.LocalWork(), devices, 0, 3, secret=SECRET)
    for block in (planner.plan(range(2)), *planner.everyone()):
        np.testing.assert_array_equal(block.cohorts.secret[0], np.tile(SECRET.words(), (3, 1)))
    public = Planner(data(), sampler, fc.extend.LocalWork(), devices, 0, 3)
    assert public.plan(range(2)).cohorts.secret is None
    for r in range(3):
        assert (
            planner.turns[r].ids.tolist() == fc.data.sampling.uniform(N).draw(data().sizes, SECRET.seed(), r).tolist()
        )
