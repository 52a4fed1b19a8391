"""Secure aggregation by pairwise masks: the server learns a sum, and no message. The protocol runs on the host.

X25519 agrees on keys, HKDF-SHA256 derives them, and ChaCha20 expands them to masks. ChaCha20-Poly1305 seals the Shamir
shares that clients exchange through the server. Ed25519 signs keys and the set of survivors. In a simulation all
parties run in one process; ``fc.deploy.Member`` is a party of its own. The registry of signing keys is trusted.

Needs the extra ``secure``.
"""

import importlib
from typing import Any

from fedjax_clip.core.types import InvalidInput

try:
    import cryptography  # noqa: F401
except ImportError:
    raise InvalidInput("Secure aggregation needs cryptography: pip install 'fedjax_clip[secure]'.") from None

from fedjax_clip.secure.client import Client, Keys, Stage
from fedjax_clip.secure.graph import Neighbourhood, harary, neighbourhood
from fedjax_clip.secure.server import Transcript, aggregate, pairwise_masks, unmask
from fedjax_clip.secure.sharing import agree, expand, join, split

__all__ = [
    "Ckks",
    "Client",
    "Keys",
    "Neighbourhood",
    "Stage",
    "Transcript",
    "aggregate",
    "agree",
    "ckks_mean",
    "expand",
    "harary",
    "join",
    "neighbourhood",
    "pairwise_masks",
    "split",
    "unmask",
]


def __getattr__(name: str) -> Any:
    if name in ("Ckks", "ckks_mean"):  # TenSEAL, which the masks do not need
        return getattr(importlib.import_module("fedjax_clip.secure.ckks"), name)
    raise AttributeError(f"module 'fedjax_clip.secure' has no attribute {name!r}")
