"""The secret: its generator, its file, and attacks on the noise and the cohorts of a run from all that it publishes."""

import base64
import copy
import dataclasses
import functools
import json
import os
import pathlib
import pickle
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from problems import assert_close, assert_identical, population
from test_draws import assert_uniform
from test_run import kills  # noqa: F401 (a fixture)

import fedjax_clip as fc
from experiments import privacy, run, rundir
from fedjax_clip import files, keys, secret, tree
from fedjax_clip.data import draws
from fedjax_clip.dispatch import Dispatcher
from fedjax_clip.privacy import Secret
from fedjax_clip.uplink import discrete

SECRET = Secret.of_seed(7)
KEY = np.arange(32, dtype=np.uint8)


def words(text):
    return np.frombuffer(bytes.fromhex(text.replace(" ", "").replace("\n", "")), "<u4")


# RFC 8439, section 2.3.2 and appendix A.1 (test vectors 1, 2, 3 and 5): key, counter, nonce, block.
VECTORS = (
    (
        bytes(range(32)).hex(),
        1,
        "000000090000004a00000000",
        """10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e
        d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e""",
    ),
    (
        "00" * 32,
        0,
        "00" * 12,
        """76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7
        da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586""",
    ),
    (
        "00" * 32,
        1,
        "00" * 12,
        """9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed
        29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f""",
    ),
    (
        "00" * 31 + "01",
        1,
        "00" * 12,
        """3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a
        8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0""",
    ),
    (
        "00" * 32,
        0,
        "00" * 11 + "02",
        """c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7
        8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d""",
    ),
)


@pytest.mark.parametrize("vector", VECTORS, ids=range(len(VECTORS)))
def test_the_block_is_that_of_rfc_8439(vector):
    key, counter, nonce, block = vector
    found = keys.block(words(key), jnp.array([counter], jnp.uint32), words(nonce))
    np.testing.assert_array_equal(found[0], words(block))


def stream(key, nonce, count):
    """The key stream of another implementation (OpenSSL's), from counter 0 on."""
    state = Cipher(algorithms.ChaCha20(key.tobytes(), bytes(4) + np.array(nonce, "<u4").tobytes()), None)
    return np.frombuffer(state.encryptor().update(bytes(4 * count)), "<u4")


def test_bits_children_and_folds_are_streams_of_nonces_of_their_own():
    key = keys.chacha(KEY.view("<u4"))
    np.testing.assert_array_equal(jax.random.bits(key, (7, 100), jnp.uint32).ravel(), stream(KEY, (0, 0, 0), 700))
    np.testing.assert_array_equal(
        jax.random.bits(key, (37,), jnp.uint8), stream(KEY, (0, 0, 0), 10).view(np.uint8)[:37]
    )
    children = np.asarray(jax.random.key_data(jax.random.split(key, (2, 3)))).reshape(6, 8)
    np.testing.assert_array_equal(children, stream(KEY, (1, 0, 0), 96).reshape(6, 16)[:, :8])
    folded = jax.random.key_data(jax.random.fold_in(key, 2**32 - 1))
    np.testing.assert_array_equal(folded, stream(KEY, (2, 2**32 - 1, 0), 8))
    assert jax.random.bits(key, (0,)).shape == (0,)


def test_all_of_jax_random_takes_such_a_key_and_vmap_changes_nothing():
    key = SECRET.key()
    assert keys.threefry(key) is key
    draw = jax.jit(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), (5,), jnp.float32))
    together = jax.vmap(draw, (None, 0))(key, jnp.arange(3, dtype=jnp.int32))
    np.testing.assert_array_equal(together, [draw(key, jnp.int32(i)) for i in range(3)])
    np.testing.assert_array_equal(jax.lax.map(lambda i: draw(key, i), jnp.arange(3, dtype=jnp.int32)), together)
    normals = np.asarray(jax.random.normal(key, (100_000,), jnp.float32), float)
    moments = [np.mean(normals**k) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.08)  # five standard errors of the fourth
    assert_uniform(np.bincount(jax.random.bits(key, (100_000,), jnp.uint32) >> 24, minlength=256))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(draw(key, jnp.int32(1)), together[1])
        wide = stream(SECRET.words(), (0, 0, 0), 10).view("<u8")
        np.testing.assert_array_equal(jax.random.bits(key, (5,), jnp.uint64), wide)
        assert jax.random.key(2**40 + 3, impl=keys.CHACHA20).shape == ()


@pytest.mark.parametrize("variance", [0.5, 90.0])
def test_skellam_noise_is_drawn_from_such_a_key_too(variance):
    x = np.asarray(jax.jit(lambda key: discrete.skellam(key, (20_000,), variance))(SECRET.key()), float)
    kurtosis = np.mean(x**4) / np.mean(x**2) ** 2 - 3
    np.testing.assert_allclose([x.mean() / x.std(), x.var() / variance], [0, 1], atol=0.05)
    assert abs(kurtosis - 1 / variance) < 0.3 + 1 / variance / 2


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

    for sampler in (fc.sampling.uniform(3), fc.sampling.uniform(15), fc.sampling.available(4, period=1, duty=1.0)):
        each, size = counts(sampler)
        assert_uniform(each)
        assert set(size) == {sampler.cohort_size or 4}
    each, size = counts(fc.sampling.poisson(5))
    assert_uniform(each)
    assert abs(size.mean() - 5) < 0.15
    assert abs(size.var() - 20 * 0.25 * 0.75) < 0.4
    each, _ = counts(fc.sampling.by_size(2, replacement=True))
    assert_uniform(each / sizes * sizes.mean())
    clock = fc.clock.buffered(fc.sampling.uniform(3), fc.speeds.lognormal(), buffer_size=2, concurrency=4)
    world = clock_world(sizes, seeds[0]), clock_world(sizes, seeds[0]), clock_world(sizes, seeds[1])
    turns = [[fc.clock.Timeline(clock, w)[r].ids.tolist() for r in range(5)] for w in world]
    assert turns[0] == turns[1] != turns[2]


def clock_world(sizes, seed):
    return fc.clock.World(sizes, lambda ids: np.ones(len(ids)), 0, seed)


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
    sampler = fc.sampling.Sampler(lambda sizes, seed, round: np.random.default_rng(seed + round).choice(9, 3))
    with pytest.raises(fc.InvalidInput, match="must take 32 bytes for its seed"):
        sampler.draw(np.ones(9), SECRET.seed(), 1)
    assert len(fc.sampling.round_robin(3).draw(np.ones(9), SECRET.seed(), 1)) == 3


# ---- Through a training


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
    return fc.fedavg(squared, optax.sgd(0.1), uplink=fc.uplink.chain(*links), reducer=fc.fixed_mean(N))


def train(noise=8.0, rounds=1, kind="gaussian", **options):
    options = {"sampler": fc.sampling.poisson(N), "seed": 40_000} | options
    return fc.train(algorithm(noise, kind), data(), START, rounds=rounds, **options)


@functools.cache
def replay():
    """All that an attacker needs: one round of the algorithm in which nobody takes part, so that noise alone is left."""
    kept = fc.training.client_states(algorithm(), START, 1)
    nobody = fc.plan(fc.FederatedData(SHAPED, [0, 1]), np.zeros(0, int), fc.LocalWork(1), seed=0, round=0, state=kept)
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
            known = np.stack([Secret.of_seed(int(g)).words() for g in part]) if way == "known" else None
            noise = replay()[0](part.astype(np.uint32)) if known is None else replay()[1](public_seed, known)
            left = published - np.asarray(noise)
            found = np.flatnonzero(np.linalg.norm(left, axis=1) <= 0.3 * CLIENTS / N)
            hits += [(way, int(part[i]), left[i]) for i in found]
    return hits


def test_noise_is_recovered_by_a_search_of_seeds_and_not_from_a_secret():
    """F1 of 7d26893: a run's noise is a function of a seed of 32 bits, and clipped updates are much smaller."""
    guesses = np.arange(2**16)
    ((_, guess, left),) = recovered(train().params["w"], 40_000, guesses, ["public"])  # the old way: no secret
    assert guess == 40_000
    np.testing.assert_allclose(left, train(noise=0.0).params["w"], atol=1e-5)
    known = Secret.of_seed(54_321)  # what --private_seed makes, and is said not to be private
    ((_, guess, left),) = recovered(train(secret=known).params["w"], 40_000, guesses, ["known"])
    assert guess == 54_321
    np.testing.assert_allclose(left, train(noise=0.0, secret=known).params["w"], atol=1e-5)
    assert recovered(train(secret=Secret.fresh()).params["w"], 40_000, guesses) == []


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

    reducer = fc.Reducer(roster, lambda acc, messages, weights: acc, lambda acc, axis: {"w": acc}, True)
    here = fc.plan(population(), np.array([4, 1, 3]), fc.LocalWork(4), seed=0, round=0)
    here = jax.tree.map(lambda x: x[0], here)
    rows = []
    for hidden in (None, SECRET.words(), SECRET.key(), Secret.of_seed(8).words()):
        there = dataclasses.replace(here, secret=hidden)
        key = jax.random.key(5)
        out, _, _, metrics = fc.exchange(client_fn, seen, reducer, {"w": jnp.zeros(())}, (), there, key)
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
    return fc.metrics.Mean.of(bits(key), jnp.ones(()))


def test_a_secret_run_resumes_to_the_same_bits_and_refuses_another_secret(tmp_path):
    def saved(rounds, hidden):
        checkpoints = fc.checkpoint.Checkpoints(tmp_path)
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


def test_local_noise_is_each_clients_own_and_changes_with_neither_width_nor_place():
    wide, narrow = (train(4.0, kind="local_gaussian", secret=SECRET, clients_per_chunk=width) for width in (1, 5))
    assert_close(wide.params, narrow.params)
    public = train(4.0, kind="local_gaussian")
    assert np.linalg.norm(public.params["w"] - wide.params["w"]) > 0.1


def test_blocks_of_rounds_and_of_a_start_carry_it():
    dispatcher = Dispatcher(
        algorithm(), data(), fc.sampling.uniform(N), fc.LocalWork(), jax.local_devices(), 0, 3, secret=SECRET
    )
    for block in (dispatcher.plan(range(2)), dispatcher._sent(range(1), [fc.clock.Turn(np.arange(4), None, {})])):
        np.testing.assert_array_equal(block.cohorts.secret[0], np.tile(SECRET.words(), (3, 1)))
    public = Dispatcher(algorithm(), data(), fc.sampling.uniform(N), fc.LocalWork(), jax.local_devices(), 0, 3)
    assert public.plan(range(2)).cohorts.secret is None
    for r in range(3):
        assert dispatcher.turns[r].ids.tolist() == fc.sampling.uniform(N).draw(data().sizes, SECRET.seed(), r).tolist()


# ---- Through the binary

PRIVATE = (
    *("--task=linear_regression(num_clients=6)", "--cohort_size=3", "--sampler=poisson", "--delta=0.01"),
    "--uplink=quantile_clip(0.5, bits_noise=2.0)|gaussian(2.0)",
)


@pytest.fixture
def cli(binaries):
    return functools.partial(binaries, "run")


def forms(hidden):
    """Every way in which 32 bytes may stand in a file: whole, or any eight of them in a row by themselves."""
    for big in (False, True):
        numbers = np.frombuffer(hidden, ">u4" if big else "<u4")
        swapped = numbers.astype("<u4").tobytes()
        for size in (8, 32):
            part = swapped[:size]
            yield from (part, part.hex().encode(), part.hex().upper().encode(), part[::-1])
            yield base64.b64encode(part).rstrip(b"=")[:-1]
        for joined in (b",", b", ", b" ", b"\n", b" \n", b",\n      "):
            yield joined.join(b"%d" % n for n in numbers[:2])
        yield b"%d" % int.from_bytes(swapped, "little")


def everything(directory):
    """What every file of a run directory holds, but for the key's own; of a checkpoint, its arrays unpacked, too."""
    found = {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != rundir.KEY}
    for arrays in directory.glob("checkpoints/*/arrays"):
        try:
            leaves = jax.tree.leaves(ocp.StandardCheckpointer().restore(arrays.absolute()))
        except Exception:  # a kill left half of it
            continue
        found[str(arrays)] = b"\0".join(np.asarray(x).tobytes() for x in leaves)
    return found


def leaks(directory, content):
    """Files of a run that hold the secret, or anything that is drawn with."""
    hidden = Secret(content)
    needles = {form for x in (content, hidden.words().tobytes(), bytes(hidden.seed())) for form in forms(x)}
    files = everything(directory)
    return [path for path, held in files.items() if any(needle in held for needle in needles)], len(files)


def test_a_leak_would_be_found(tmp_path):
    hidden = Secret.fresh()
    for number, text in enumerate(
        (hidden._content, hidden.words(), hidden.words().tolist(), hidden.seed().hex(), hidden.words().byteswap())
    ):
        content = text.tobytes() if isinstance(text, np.ndarray) else text
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / f"{number}").write_bytes(b"..." + content + b"...")
    assert len(leaks(tmp_path, hidden._content)[0]) == 5
    assert leaks(tmp_path, Secret.fresh()._content)[0] == []


def test_a_private_run_keeps_its_key_until_it_is_complete_and_in_no_other_file(cli, tmp_path, monkeypatch):
    here, made = tmp_path / "here", os.urandom(32)
    monkeypatch.setattr(os, "urandom", lambda size: made[:size] if size == 32 else bytes(size))
    seen = []

    def look(self, row):
        add(self, row)
        seen.append(((here / rundir.KEY).stat().st_mode & 0o777, leaks(here, made)[0]))

    add = rundir.RunDirectory.add
    monkeypatch.setattr(rundir.RunDirectory, "add", look)
    code, out, err = cli(*PRIVATE, "--rounds=4", "--checkpoint_every=1", "--eval_every=2", "--workdir=here")
    assert code == 0, err
    assert seen == [(0o600, [])] * 4
    found, files = leaks(here, made)
    assert (found, files > 4) == ([], True)
    assert {path.name for path in here.iterdir()} == {
        *("config.json", "metrics.jsonl", "params.npz", "report.html", "tensorboard")
    }
    told = dict(re.findall(r"^(epsilon|protects|from|noise|key|assumes) +(.*)$", out, re.MULTILINE))
    assert re.fullmatch(r"\d\.\d{3} at delta 0.01, of this run", told["epsilon"])
    assert told["protects"] == "one client, all its data in all rounds (add or remove)"
    assert "not from the server" in told["from"]
    assert told["noise"] == "the server's, on each round's sum; Poisson cohorts of 3 expected, of 6 clients"
    assert told["key"] == "noise and cohorts come from a secret key of 256 bits, which was removed"
    assert privacy.WITHHELD in told["assumes"]
    page = (here / "report.html").read_text()
    assert "a secret key of 256 bits, which was removed" in page
    before = everything(here)
    code, again, _ = cli(*PRIVATE, "--rounds=4", "--checkpoint_every=1", "--eval_every=2", "--workdir=here")
    assert (code, again) == (0, f"Complete already (4 rounds); remove here to run it again.\n{out}")
    assert everything(here) == before
    code, _, err = cli(*PRIVATE, "--rounds=6", "--eval_every=2", "--workdir=here")
    assert code == 2
    assert "--rounds=6: here is a private run that was complete after 4 rounds" in err
    (here / "params.npz").unlink()
    code, _, err = cli(*PRIVATE, "--rounds=4", "--eval_every=2", "--workdir=here")
    assert "here/secret.key, from which the noise of 4 rounds was drawn, is gone" in err


def a_run(cli, directory, size, *flags):
    """A private run on data of its own in ``directory``; what it says."""
    x = np.random.default_rng(size).normal(size=(6 * size, DIM))
    np.savez(directory.with_suffix(".npz"), x=x, y=np.arange(6 * size) % 2, offsets=np.arange(0, 6 * size + 1, size))
    task = f"--task=npz({str(directory.with_suffix('.npz'))!r}, hidden=())", "--cohort_size=2", "--sampler=poisson"
    private = "--delta=0.01", "--uplink=clip_by_global_norm(0.3)|gaussian(8.0)", "--eval_every=2", "--rounds=2"
    code, out, err = cli(*task, *private, *flags, f"--workdir={directory}")
    assert code == 0, err
    return out, err


def updates_in(directory):
    """F1 on a directory: for each whole number in its configuration, the updates' sum if all noise came from it."""
    config = json.loads((directory / "config.json").read_text())["config"]
    task = fc.tasks.npz(re.search("'(.*)'", config["task"])[1], hidden=())
    links = privacy.chain(config["uplink"], None)
    here = fc.fedavg(task.per_example_loss, optax.sgd(0.1), uplink=links, reducer=fc.fixed_mean(config["cohort_size"]))
    start = jax.tree.map(np.asarray, task.init(keys.seeded(config["seed"])))
    with np.load(directory / "params.npz") as arrays:
        published = np.concatenate([arrays[name].ravel() for name in sorted(arrays.files)])
    numbers = {int(n) for n in re.findall(r"\b\d{1,9}\b", json.dumps(config))}
    nobody = fc.sampling.Sampler(lambda sizes, seed, round: np.zeros(0, int))
    for hidden in [None, *map(Secret.of_seed, sorted(numbers))]:
        seeds = sorted(numbers) if hidden is None else [config["seed"]]
        for seed in seeds:
            noise = fc.train(
                here, task.data, start, rounds=2, sampler=nobody, seed=seed, secret=hidden, rounds_per_dispatch=2
            )
            yield np.linalg.norm(
                published - np.concatenate([x.ravel() for _, x in sorted(tree.named_leaves(noise.params))])
            )


def test_withheld_metrics_depend_on_no_data_and_no_draw_and_noise_is_not_recovered(cli, tmp_path):
    """Two runs of one known key, on different data, differ in what epsilon covers, and in nothing else."""
    told = {
        name: a_run(cli, tmp_path / name, size, *flags)
        for name, size, flags in (("a", 4, ["--private_seed=3"]), ("b", 9, ["--private_seed=3"]), ("secret", 4, []))
    }
    rows = {name: rundir.read_rows(tmp_path / name) for name in told}
    files = {name: {path.name for path in (tmp_path / name).iterdir()} for name in told}
    allowed = {"round", "epsilon", "uplink/1/noise_std"}
    assert all(set(row) - {"eval/clients/accuracy", "eval/clients/loss"} == allowed for row in rows["a"])
    for key in allowed:
        assert [row[key] for row in rows["a"]] == [row[key] for row in rows["b"]]
    assert files["a"] == files["b"] == files["secret"] | {"checkpoints"}
    assert "clients.npz" not in files["a"]
    (events,) = (tmp_path / "a" / "tensorboard").iterdir()
    assert b"noise_std" in events.read_bytes()
    assert b"client_norm" not in events.read_bytes()
    assert "examples" not in told["a"][1].splitlines()[0]
    most = 2 * 0.3 * 6 / 2  # two rounds of six clients at most
    for name, found in (("a", True), ("secret", False)):
        said = "not private: its noise can be computed from --private_seed=3"
        assert (said in told[name][0]) == (said in (tmp_path / name / "report.html").read_text()) == found
        assert (min(updates_in(tmp_path / name)) <= most) == found


def test_exact_metrics_are_marked_and_flags_of_privacy_need_a_claim(cli):
    code, out, _ = cli(*PRIVATE, "--rounds=2", "--private_metrics=exact", "--workdir=here")
    assert code == 0
    assert privacy.EXACT in out
    assert privacy.EXACT in pathlib.Path("here/report.html").read_text()
    assert "loss" in json.loads(pathlib.Path("here/metrics.jsonl").read_text().splitlines()[0])
    without = [flag for flag in PRIVATE if "delta" not in flag]
    code, out, _ = cli(*without, "--rounds=2", "--workdir=claims-nothing")
    assert code == 0
    assert "noise              not private: its noise can be computed from --seed=0; --delta" in out
    assert "epsilon" not in out
    for flag in ("--private_seed=3", "--private_metrics=exact"):
        code, _, err = cli(*without, flag)
        assert (code, f"{flag.split('=')[0]} is for runs that claim an epsilon: give --delta, too." in err) == (2, True)


def test_the_epsilon_of_a_deployment_is_not_said_to_be_the_runs_own(cli):
    """F9 of 7d26893: ``noise_cohort=100000`` divides the noise by 33,333, and the last line was ``epsilon 0.9``."""
    links = "--uplink=clip_by_global_norm(0.5)|gaussian(2.0, noise_cohort=100000)"
    code, out, _ = cli(*PRIVATE[:-1], links, "--rounds=2", "--workdir=here")
    assert code == 0
    assert "at delta 0.01, of a deployment with cohorts of 100000, whose noise is simulated; NOT of this run" in out
    row = json.loads(pathlib.Path("here/metrics.jsonl").read_text().splitlines()[0])
    assert "epsilon" not in row
    assert row["deployment_epsilon"] > 0


class Killed(BaseException):
    """A kill, as far as one process can play it."""


def test_killed_while_it_ends_it_is_resumable_or_complete(cli, kills, tmp_path, monkeypatch):  # noqa: F811
    flags = (*PRIVATE, "--rounds=3", "--checkpoint_every=2", "--workdir=here")
    for name in ("whole", "here"):
        kills.give_key(tmp_path / name, b"k" * 32)
    assert cli(*flags[:-1], "--workdir=whole")[0] == 0
    for module, name, key_is_there in ((files, "sync", True), (secret, "remove", True), (shutil, "rmtree", False)):
        with monkeypatch.context() as patched, pytest.raises(Killed):

            def killed(*_, **__):
                raise Killed

            patched.setattr(module, name, killed)
            patched.setattr("sys.argv", ["run", *flags])
            run.FLAGS(["run", *flags])
            run.main()
        assert (tmp_path / "here" / rundir.KEY).exists() == key_is_there
        assert (tmp_path / "here" / "checkpoints").exists()
    code, out, err = cli(*flags)
    assert code == 0, err
    assert "Complete already (3 rounds)" in out
    assert not (tmp_path / "here" / "checkpoints").exists()
    for name in ("params.npz", "metrics.jsonl"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_killed_at_random_moments_it_ends_with_the_same_bits_and_without_its_key(kills, tmp_path):  # noqa: F811
    flags, content, rng = kills.PRIVATE, os.urandom(32), random.Random(0)
    for name in ("killed", "undisturbed"):
        kills.give_key(tmp_path / name, content)
    kills.kill(tmp_path / "killed", rng, *flags)
    assert leaks(tmp_path / "killed", content)[0] == []
    for name in ("killed", "undisturbed"):
        kills.finish(tmp_path / name, *flags)
        assert not (tmp_path / name / rundir.KEY).exists()
        assert not (tmp_path / name / "checkpoints").exists()
        assert leaks(tmp_path / name, content)[0] == []
    assert kills.outcome(tmp_path / "killed") == kills.outcome(tmp_path / "undisturbed")
