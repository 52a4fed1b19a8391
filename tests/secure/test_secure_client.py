"""A client of a secure sum refuses every lie of the server by name, and takes no further part."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from parties import MESSAGES, brought_to, inbox, others, party

import fedjax_clip as fc
from fedjax_clip.secure import Stage

secure = fc.secure
FOREIGN = party(4, 3)[1].advertise()  # of another registry
LIES = {  # what the server says to client 0 of four, and what the client says to it
    "out of order": (
        Stage.SHARE,
        lambda c, seen: c.confirm({0, 1, 2}),
        "asked to confirm, and its next step is to share",
    ),
    "advertised twice": (Stage.SHARE, lambda c, seen: c.advertise(), "each step comes once"),
    "shared twice": (Stage.MASK, lambda c, seen: c.share(seen.keys), "asked to share, and its next step is to mask"),
    "a second mask": (
        Stage.CONFIRM,
        lambda c, seen: c.mask(MESSAGES[0], inbox(seen, 0)),
        "asked to mask, and its next",
    ),
    "a second set": (
        Stage.REVEAL,
        lambda c, seen: c.confirm({0, 1, 2}),
        "asked to confirm, and its next step is to reveal",
    ),
    "a roster without it": (Stage.SHARE, lambda c, seen: c.share(others(seen.keys, 0)), "lacks client 0"),
    "other keys for it": (Stage.SHARE, lambda c, seen: c.share({**seen.keys, 0: FOREIGN}), "or has other keys for it"),
    "a roster of two": (
        Stage.SHARE,
        lambda c, seen: c.share({v: seen.keys[v] for v in (0, 1)}),
        "2 clients in the roster",
    ),
    "a key twice": (Stage.SHARE, lambda c, seen: c.share({**seen.keys, 2: seen.keys[1]}), "same key twice"),
    "two keys that are one": (
        Stage.SHARE,
        lambda c, seen: c.share({**seen.keys, 1: seen.keys[1]._replace(masking=seen.keys[1].sealing)}),
        "same key twice",
    ),
    "unsigned keys": (Stage.SHARE, lambda c, seen: c.share({**seen.keys, 1: FOREIGN}), "client 1 are not signed by it"),
    "keys of no curve": (
        Stage.SHARE,
        lambda c, seen: c.share({**seen.keys, 1: seen.keys[1]._replace(sealing=b"x")}),
        "not signed by it for this sum",
    ),
    "a stranger in the roster": (
        Stage.SHARE,
        lambda c, seen: c.share({**seen.keys, 9: FOREIGN}),
        "roster hold client 9",
    ),
    "a roster that is none": (Stage.SHARE, lambda c, seen: c.share([1, 2, 3]), "has not the form of it"),
    "keys that are none": (Stage.SHARE, lambda c, seen: c.share({**seen.keys, 1: None}), "has not the form of it"),
    "survivors that are none": (Stage.CONFIRM, lambda c, seen: c.confirm([0, "1", None]), "has not the form of it"),
    "an empty inbox": (
        Stage.MASK,
        lambda c, seen: c.mask(MESSAGES[0], {}),
        "1 shares in its inbox. 1 clients are left",
    ),
    "a thin inbox": (Stage.MASK, lambda c, seen: c.mask(MESSAGES[0], {1: seen.sealed[1, 0]}), "2 shares in its inbox"),
    "an inbox from nowhere": (
        Stage.MASK,
        lambda c, seen: c.mask(MESSAGES[0], {**inbox(seen, 0), 8: b""}),
        "inbox hold client 8",
    ),
    "changed shares": (
        Stage.MASK,
        lambda c, seen: c.mask(
            MESSAGES[0], {**inbox(seen, 0), 1: bytes([seen.sealed[1, 0][0] ^ 1]) + seen.sealed[1, 0][1:]}
        ),
        "from client 1 to client 0 were changed on the way",
    ),
    "swapped shares": (
        Stage.MASK,
        lambda c, seen: c.mask(MESSAGES[0], {**inbox(seen, 0), 1: seen.sealed[2, 0]}),
        "or are of another pair",
    ),
    "its own shares back": (
        Stage.MASK,
        lambda c, seen: c.mask(MESSAGES[0], {**inbox(seen, 0), 1: seen.sealed[0, 1]}),
        "or are of another pair",
    ),
    "no bytes": (Stage.MASK, lambda c, seen: c.mask(MESSAGES[0], {**inbox(seen, 0), 1: None}), "changed on the way"),
    "real numbers": (Stage.MASK, lambda c, seen: c.mask(np.zeros(3), inbox(seen, 0)), "unsigned integers, not float64"),
    "invented survivors": (Stage.CONFIRM, lambda c, seen: c.confirm({0, 98, 99}), "survivors hold client 98"),
    "survivors without it": (Stage.CONFIRM, lambda c, seen: c.confirm({1, 2, 3}), "survivors lack client 0"),
    "few survivors": (Stage.CONFIRM, lambda c, seen: c.confirm({0, 1}), "2 survivors. 2 clients are left"),
    "no signatures": (Stage.REVEAL, lambda c, seen: c.reveal({}), "1 signatures of the survivors"),
    "a stranger's signature": (
        Stage.REVEAL,
        lambda c, seen: c.reveal({**seen.confirmed, 7: b""}),
        "signatures hold client 7",
    ),
    "swapped signatures": (
        Stage.REVEAL,
        lambda c, seen: c.reveal({1: seen.confirmed[2], 2: seen.confirmed[1]}),
        "has not signed the survivors",
    ),
    "no signature": (Stage.REVEAL, lambda c, seen: c.reveal({1: None, 2: b""}), "has not signed the survivors"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_client_refuses_and_takes_no_further_part(lie):
    stage, tell, sentence = LIES[lie]
    clients = party(4, 3)
    seen = brought_to(stage, clients)
    with pytest.raises(fc.InvalidInput, match=sentence):
        tell(clients[0], seen)
    assert clients[0].stage is Stage.OVER
    with pytest.raises(fc.InvalidInput, match="part in this sum is over"):
        clients[0].reveal(seen.confirmed)


def test_survivors_that_were_told_differently_open_nothing():
    """Half the clients hear of one set, half of another: each lacks signatures of its own."""
    clients = party(4, 3)
    brought_to(Stage.CONFIRM, clients)
    told = [{0, 1, 2}, {0, 1, 2}, {0, 2, 3}, {0, 2, 3}]
    signed = {c.number: c.confirm(told[c.number]) for c in clients}
    with pytest.raises(fc.InvalidInput, match="client 2 has not signed|Client 2 has not signed"):
        clients[0].reveal({1: signed[1], 2: signed[2]})
    with pytest.raises(fc.InvalidInput, match="2 signatures of the survivors"):
        clients[1].reveal({0: signed[0]})


def test_one_who_never_shared_cannot_survive():
    """Client 3 is in the roster, and its shares never came: its survival is an invention, too."""
    clients = party(4, 3)
    seen = brought_to(Stage.MASK, clients)
    clients[0].mask(MESSAGES[0], {v: text for v, text in inbox(seen, 0).items() if v != 3})
    with pytest.raises(fc.InvalidInput, match="survivors hold client 3"):
        clients[0].confirm({0, 1, 2, 3})


def test_signatures_of_another_sum_are_worth_nothing():
    clients = party(4, 3)
    clients[1]._session = b"6"
    seen = brought_to(Stage.SHARE, clients)
    with pytest.raises(fc.InvalidInput, match="not signed by it for this sum"):
        clients[0].share(seen.keys)


CURVE = 2**255 - 19

SPELLINGS = {  # of a public key u: other bytes that agree with every private key on the same point
    "the top bit, which is ignored": lambda u: u | 1 << 255,
    "a point of order two added": lambda u: pow(u, -1, CURVE),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_another_spelling_of_a_key_cancels_no_mask(spelling):
    """n = 3, t = 3, k = 1: client 2 advertised client 0's key so, and client 1's two masks took each other away."""
    clients = party(3, 3)
    seen = secure.Transcript(keys={c.number: c.advertise() for c in clients})
    helper, honest = clients[2], seen.keys[0]
    other = SPELLINGS[spelling](int.from_bytes(honest.masking, "little")).to_bytes(32, "little")
    assert other != honest.masking
    drawn = X25519PrivateKey.generate()
    assert len({drawn.exchange(X25519PublicKey.from_public_bytes(key)) for key in (honest.masking, other)}) == 1
    sealing = seen.keys[2].sealing
    seen.keys[2] = helper._own = secure.Keys(sealing, other, helper._identity.sign(helper._of_keys(sealing, other)))
    for c in clients:
        seen.sealed |= {(c.number, v): text for v, text in c.share(seen.keys).items()}
    seen.masked = {c.number: c.mask(MESSAGES[c.number], inbox(seen, c.number)) for c in clients}
    seen.confirmed = {c.number: c.confirm({0, 1, 2}) for c in clients}
    shares = {c.number + 1: c.reveal(others(seen.confirmed, c.number))[1] for c in clients}
    opened = seen.masked[1] - secure.expand(secure.join(shares), seen.masked[1])
    assert not np.array_equal(opened, MESSAGES[1])
