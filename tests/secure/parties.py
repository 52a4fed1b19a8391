"""Honest clients of a secure sum, brought as far as a test wants them."""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import fedjax_clip as fc
from fedjax_clip.secure import Stage

secure = fc.secure
MESSAGES = np.arange(35, dtype=np.uint32).reshape(5, 7)


def party(n, threshold, neighbours=None):
    """Clients that know each other's signing keys."""
    identities = [Ed25519PrivateKey.generate() for _ in range(n)]
    registry = {u: key.public_key().public_bytes_raw() for u, key in enumerate(identities)}
    near = [
        None if neighbours is None else (graph, neighbours[1]) for graph in (neighbours[0] if neighbours else registry)
    ]
    return [secure.Client(u, threshold, identities[u], registry, b"7", near[u]) for u in range(n)]


def brought_to(stage, clients):
    """Honest steps up to a stage; what the server has by then."""
    seen = secure.Transcript(keys={c.number: c.advertise() for c in clients})
    if stage is not Stage.SHARE:
        for c in clients:
            seen.sealed |= {(c.number, v): text for v, text in c.share(seen.keys).items()}
    if stage in (Stage.CONFIRM, Stage.REVEAL):
        seen.masked = {c.number: c.mask(MESSAGES[c.number], inbox(seen, c.number)) for c in clients}
    if stage is Stage.REVEAL:
        seen.confirmed = {c.number: c.confirm(range(len(clients))) for c in clients}
    return seen


def inbox(seen, u):
    return {v: text for (v, to), text in seen.sealed.items() if to == u}


def others(signed, u):
    return {v: text for v, text in signed.items() if v != u}
