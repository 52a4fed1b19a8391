"""The five trips of a secure sum between parties that keep nothing in memory, as Flower's processes keep nothing."""

import types

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import fedjax_clip as fc
from fedjax_clip.deploy import masks, wire
from fedjax_clip.deploy.wire import Group

IDS, SIZE = [4, 0, 3, 1], 15
FORMS = types.SimpleNamespace(
    threshold=3,
    message=[Group([("uint16", (3,))], []), Group([("uint16", (4, 3))], [])],
    sent_report=[("float32", ())],
)
MESSAGES = np.random.default_rng(0).integers(0, 2**16, (6, SIZE)).astype(np.uint16)


@pytest.fixture
def members(tmp_path):
    """What makes a client's part afresh, from its directory, its key and the registry."""
    keys = [Ed25519PrivateKey.generate() for _ in MESSAGES]
    registry = {c: key.public_key().public_bytes_raw() for c, key in enumerate(keys)}
    return lambda c: masks.Member(c, tmp_path / str(c), keys[c], registry)


def summed(members, silent=(), since="advertise", round=0):
    """The server's part; these clients are silent from a step on."""

    def send(notes):
        answers = {}
        for c, note in notes.items():
            if c in silent and masks.STEPS.index(note["ask"]) >= masks.STEPS.index(since):
                continue
            answers[c] = members(c).answer(note, FORMS, f"run/{note['round']}", lambda c=c: MESSAGES[c])
            if note["ask"] == "mask":
                answers[c]["report"] = wire.squeezed([np.float32(1)])
        return answers

    return masks.summed(FORMS, IDS, {c: {"round": round, "artefact": "file"} for c in IDS}, send)


@pytest.mark.parametrize("since", masks.STEPS)
def test_a_client_may_fall_silent_at_any_step(since, members, tmp_path):
    read, traffic = summed(members, silent=[0], since=since)
    came = [c for c in IDS if c != 0 or masks.STEPS.index(since) > masks.STEPS.index("mask")]
    assert sorted(read) == sorted(came)
    total = sum(np.concatenate([x.ravel() for x in message]) for message, _ in read.values())
    np.testing.assert_array_equal(total, MESSAGES[came].sum(0, dtype=np.uint16))
    assert traffic.up == 2 * SIZE * len(came)


def test_a_sum_of_too_few_stays_closed(members):
    assert summed(members, silent=[0, 3], since="mask")[0] == {}


def test_secrets_are_the_clients_alone_and_gone_after_the_sum(members, tmp_path):
    summed(members)
    for c in IDS:
        file = tmp_path / str(c) / "masks.json"
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.read_text() == '{"round": 0, "client": null}'


def test_a_client_takes_part_in_one_sum_of_a_round(members):
    summed(members, round=5)
    for round in (5, 4):
        note = {"ask": "advertise", "round": round, "clients": 4}
        with pytest.raises(fc.InvalidInput, match="a second sum of a round"):
            members(4).answer(note, FORMS, f"run/{round}", lambda: MESSAGES[4])
        assert summed(members, round=round)[0] == {}  # all refuse, and nothing is opened
    assert len(summed(members, round=6)[0]) == len(IDS)
