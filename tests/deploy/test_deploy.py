"""Rounds cut at the wire: the parameters, rows and bytes of fc.train, and clients that fail, lie or hold other files."""

import functools
import json
import os

import jax
import numpy as np
import optax
import pytest
from problems import EVERYTHING, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import deploy

SEED, ROUNDS, COHORT, BATCH = 3, 2, 4, 6  # so that all clients take one or two steps: one compilation
DATA, PARAMS = population(), parameters()
LIKE = {"x": np.zeros((2, 4), np.float32), "y": np.zeros(2, np.int32)}
SAMPLER = fc.data.sampling.uniform(COHORT)
SGD = optax.sgd(0.3)
CLIP = fc.uplink.clip_by_global_norm(0.5)


def made(name):
    mean, uniform = fc.reduce.exact_mean(), fc.reduce.exact_mean(weighted=False)
    coded = {
        "qsgd": fc.compression.qsgd(4, coding="runs"),
        "eden": fc.compression.eden(2),  # opened with the client's own key
    }
    if name in coded:
        link = fc.uplink.chain(CLIP, fc.uplink.compress(coded[name]))
        return fc.fedavg(softmax_loss, SGD, uplink=link, reducer=mean)
    return {
        "fedavg": lambda: fc.fedavg(softmax_loss, SGD, reducer=mean),
        "scaffold": lambda: fc.scaffold(
            softmax_loss, optax.chain(fc.clipping.clip_by_global_norm(1.0), SGD), reducer=uniform
        ),
        "scaffold of codes": lambda: fc.scaffold(
            *(softmax_loss, SGD),
            uplink=fc.uplink.error_feedback(fc.compression.top_k(0.3)),
            variate_uplink=fc.uplink.compress(fc.compression.sign()),
            reducer=uniform,
        ),
        "clip21": lambda: fc.fedsgd(
            *(softmax_loss, optax.sgd(1.0), optax.sgd(0.1)),
            uplink=fc.uplink.memory(fc.clipping.clip_by_global_norm(0.5)),
            reducer=uniform,
        ),
        "quantile": lambda: fc.fedavg(softmax_loss, SGD, uplink=fc.uplink.quantile_clip(0.1), reducer=mean),
        "local noise": lambda: fc.fedavg(
            softmax_loss, SGD, uplink=fc.uplink.chain(CLIP, fc.uplink.local_gaussian(0.5)), reducer=uniform
        ),
        "masks": lambda: fc.fedavg(
            *(softmax_loss, SGD),
            uplink=fc.uplink.chain(CLIP, fc.uplink.integer_grid(16)),
            reducer=fc.secure.pairwise_masks(COHORT, 3),
        ),
    }[name]()


def simulated(algorithm, sampler=SAMPLER):
    given = {"rounds": ROUNDS, "sampler": sampler, "batch_size": BATCH, "seed": SEED}
    return fc.train(algorithm, DATA, PARAMS, **given, clients_per_chunk=1, devices=jax.devices()[:1])


@functools.cache
def halves(name):
    algorithm = made(name)
    cut = deploy.Halves(algorithm, deploy.Population(DATA.num_clients, float(DATA.client_weights.sum())), SEED)
    return cut, deploy.exported(cut, PARAMS, LIKE, fc.extend.LocalWork(BATCH), own_secrets=False)


def members(directory):
    """The part of each client in secure sums; a registry that no server writes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    keys = [Ed25519PrivateKey.generate() for _ in range(DATA.num_clients)]
    registry = {c: key.public_key().public_bytes_raw() for c, key in enumerate(keys)}
    return [deploy.Member(c, directory / str(c), key, registry) for c, key in enumerate(keys)]


def deployed(name, directory, silent=lambda round, client, ask: False):
    """The rounds by clients that are made afresh for each note, as Flower makes processes; ``(rounds, rows)``."""
    cut, artefact = halves(name)
    artefact.save(directory / "client.zip")
    artefact = deploy.Artefact.load(directory / "client.zip")
    rounds = deploy.Rounds(cut, artefact, PARAMS, LIKE)
    parts = members(directory) if artefact.forms.masked else [None] * DATA.num_clients

    def send(notes):
        answers = {}
        for client, note in notes.items():
            if not silent(note["round"], client, note["ask"]):
                site = deploy.Site(artefact, client, DATA.client(client), directory / str(client), member=parts[client])
                answers[client] = site.answer(note)
        return answers

    rows = [rounds.run(SAMPLER.sample(DATA.sizes, SEED, r).tolist(), send) for r in range(ROUNDS)]
    return rounds, rows


def without(client, round=0):
    """The cohorts of ``SAMPLER`` without a client in one round."""

    def sample(sizes, seed, now):
        ids = SAMPLER.sample(sizes, seed, now)
        return ids[ids != client] if now == round else ids

    return SAMPLER._replace(sample=sample)


def assert_same(left, right):
    """To the bit if the programs are those that users run: two programs that are not optimised may fuse differently."""
    exactly = os.environ.get("FEDJAX_CLIP_TEST_XLA") == "optimized"
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=0 if exactly else 1e-6)


SOME = ["scaffold of codes", "clip21", "eden"]  # the others send less
ALL = [*SOME, "fedavg", "scaffold", "quantile", "qsgd"]


@pytest.mark.parametrize("name", ALL if EVERYTHING else SOME)
def test_real_clients_train_as_the_simulation(name, tmp_path):
    result = simulated(made(name))
    rounds, rows = deployed(name, tmp_path)
    assert_same(rounds.params, result.params)
    assert_same(rounds.server, result.state.server)
    for row, wanted in zip(rows, result.history, strict=True):
        assert set(row) == set(wanted) - {"seconds", "wasted_steps"}
        for key, x in row.items():
            np.testing.assert_allclose(x, wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)
    assert rounds.traffic.up == rows[-1]["bytes_up"]
    assert rounds.traffic.down == rows[-1]["bytes_down"]


def test_a_client_under_its_own_noise_tells_no_metrics(tmp_path):
    result = simulated(made("local noise"))
    rounds, rows = deployed("local noise", tmp_path)
    assert_same(rounds.params, result.params)
    assert "loss" not in rows[-1]
    assert "client_norm/p50" not in rows[-1]
    assert rows[-1]["clients"] == COHORT
    assert rows[-1]["bytes_up"] == result.history[-1]["bytes_up"]


@pytest.mark.parametrize("gone", ["", "mask", "confirm"])
def test_masked_sums_are_the_simulations(gone, tmp_path):
    """One of four clients may be silent from any step on; before its masked message, it is as if it had not come."""
    first = SAMPLER.sample(DATA.sizes, SEED, 0).tolist()
    steps = ("advertise", "share", "mask", "confirm", "reveal")

    def silent(round, client, ask):
        return bool(gone) and round == 0 and client == first[1] and steps.index(ask) >= steps.index(gone)

    sampler = without(first[1]) if gone == "mask" else SAMPLER
    result = simulated(made("masks"), sampler)
    rounds, rows = deployed("masks", tmp_path, silent)
    assert_same(rounds.params, result.params)
    assert rows[0]["dropped"] == (gone == "mask")
    assert rounds.traffic.up == rows[-1]["bytes_up"] == result.history[-1]["bytes_up"]
    if not gone:  # no secret of a sum that is over is left
        assert {json.loads(file.read_text())["client"] for file in tmp_path.rglob("masks.json")} == {None}


def test_a_client_that_is_killed_is_that_rounds_dropped_and_keeps_its_state(tmp_path):
    victim = SAMPLER.sample(DATA.sizes, SEED, 0).tolist()[0]
    rounds, rows = deployed("scaffold", tmp_path, lambda round, client, ask: round == 0 and client == victim)
    result = simulated(made("scaffold"), without(victim))
    assert_same(rounds.params, result.params)
    assert [row["dropped"] for row in rows] == [1, 0]
    assert rows[0]["clients"] == COHORT - 1
    assert rows[0]["asked"] == COHORT  # it was sent the model, which counts


def test_an_answer_that_never_arrived_leaves_no_state_behind(tmp_path):
    """A client that trained in round 0 and whose answer was lost goes on from where it was."""
    cut, artefact = halves("scaffold")
    lost = SAMPLER.sample(DATA.sizes, SEED, 0).tolist()[0]
    rounds = deploy.Rounds(cut, artefact, PARAMS, LIKE)
    for r in range(ROUNDS):

        def send(notes, r=r):
            sites = {c: deploy.Site(artefact, c, DATA.client(c), tmp_path / str(c)) for c in notes}
            answers = {c: sites[c].answer(note) for c, note in notes.items()}
            if r == 0:
                del answers[lost]
            return answers

        rounds.run(SAMPLER.sample(DATA.sizes, SEED, r).tolist(), send)
    assert_same(rounds.params, simulated(made("scaffold"), without(lost)).params)


def test_what_cannot_be_read_is_as_if_it_had_not_come(tmp_path):
    cut, artefact = halves("qsgd")
    ids = SAMPLER.sample(DATA.sizes, SEED, 0).tolist()

    def send(notes):
        answers = {c: deploy.Site(artefact, c, DATA.client(c), tmp_path).answer(note) for c, note in notes.items()}
        return answers | {ids[0]: {"message": [b"\0"], "report": b"no report"}, ids[1]: {}}

    rounds = deploy.Rounds(cut, artefact, PARAMS, LIKE)
    assert rounds.run(ids, send)["dropped"] == 2


def refusal(call):
    with pytest.raises(fc.InvalidInput) as caught:
        call()
    return str(caught.value)


def test_a_site_refuses_other_data_and_another_artefact(tmp_path):
    _, artefact = halves("qsgd")
    notes = deploy.Rounds(*halves("qsgd"), PARAMS, LIKE).notes([0])
    wide = {"x": np.zeros((3, 5), np.float32), "y": np.zeros(3, np.int32)}
    assert "the artefact's program takes" in refusal(lambda: deploy.Site(artefact, 0, wide, tmp_path))
    assert "there is no 6" in refusal(lambda: deploy.Site(artefact, 6, DATA.client(0), tmp_path))
    site = deploy.Site(artefact, 0, DATA.client(0), tmp_path)
    assert "give both the same file" in refusal(lambda: site.train(notes[0] | {"artefact": "0" * 64}))
    assert "both sides need the same artefact" in refusal(lambda: site.train(notes[0] | {"shared": b"0"}))
    assert "not in its protocol" in refusal(lambda: site.answer(notes[0] | {"ask": "reveal"}))
    assert "has not the form of one" in refusal(lambda: site.answer({"ask": "train"}))
    (tmp_path / "other.zip").write_bytes(b"no archive")
    assert "is no client's artefact" in refusal(lambda: deploy.Artefact.load(tmp_path / "other.zip"))


def test_algorithms_that_one_trip_cannot_serve_are_refused():
    population = deploy.Population(6, 34.0)
    with_start = fc.episode_plus(softmax_loss, SGD, threshold=1.0)
    assert "queries all clients before round 1" in refusal(lambda: deploy.Halves(with_start, population))
    sketched = fc.fedavg(softmax_loss, SGD, uplink=fc.uplink.error_feedback(fc.uplink.power_sgd(1)))
    asking = fc.episode(softmax_loss, SGD, threshold=1.0)
    assert "asks its clients before" in refusal(lambda: deploy.Halves(asking, population).begin(asking.init(PARAMS)))
    cut = deploy.Halves(sketched, population)
    work = fc.extend.LocalWork(BATCH)
    big = {"w": np.zeros((4, 3), np.float32), "b": np.zeros(3, np.float32)}
    assert "does not say what travels" in refusal(lambda: deploy.exported(cut, big, LIKE, work))
    wrapped = fc.compressed_broadcast(made("fedavg"), fc.compression.qsgd(8))
    assert "its broadcast" in refusal(lambda: deploy.Halves(wrapped, population))
