"""The primitives of the protocol: secret shares, key agreement, masks, signatures."""

import functools
import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedjax_clip.core.types import InvalidInput

PRIME = 2**256 + 297  # the first prime above all numbers of 32 bytes
SHARE = 33  # bytes of a number below it


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[int]:
    """Shamir's shares of 32 bytes: any ``threshold`` of them give the secret back, fewer reveal nothing about it.

    Args:
      secret: 32 bytes.
      threshold: t, so that the polynomial has degree t - 1.
      points: distinct positive numbers at which the polynomial is evaluated.

    Example:
      >>> shares = fc.secure.split(b"a secret of exactly 32 bytes ...", threshold=2, points=[1, 2, 3])
      >>> fc.secure.join({1: shares[0], 3: shares[2]})
      b'a secret of exactly 32 bytes ...'

    Source: Shamir (1979), "How to Share a Secret".
    """
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]

    def at(x: int) -> int:
        return functools.reduce(lambda value, c: (value * x + c) % PRIME, reversed(coefficients), 0)

    return [at(x) for x in points]


def join(shares: Mapping[int, int]) -> bytes:
    """The secret from at least ``threshold`` shares, by Lagrange's interpolation at zero.

    Args:
      shares: ``{point: share}``.

    Example:
      >>> shares = fc.secure.split(b"a secret of exactly 32 bytes ...", threshold=2, points=[1, 2, 3])
      >>> fc.secure.join({2: shares[1], 3: shares[2]})
      b'a secret of exactly 32 bytes ...'
    """
    total = 0
    for x, share in shares.items():
        above = below = 1
        for other in shares:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        total += share * above * pow(below, -1, PRIME)
    return (total % PRIME).to_bytes(SHARE)[1:]


def agree(own: X25519PrivateKey, other: bytes) -> bytes:
    """32 bytes that only the owners of both keys know, derived from the keys as they were advertised.

    Several public keys agree with a private key on the same point (X25519 ignores the top bit and a component of small
    order). So both keys go into the derivation. Otherwise a client could advertise a variant of another's key and get
    its masks.

    Args:
      own: a private key.
      other: the other's public key.

    Raises:
      InvalidInput: bytes that are not a public key.

    Example:
      >>> from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
      >>> ann, bob = X25519PrivateKey.generate(), X25519PrivateKey.generate()
      >>> secret = fc.secure.agree(ann, bob.public_key().public_bytes_raw())
      >>> secret == fc.secure.agree(bob, ann.public_key().public_bytes_raw())
      True

    Source: Langley, Hamburg and Turner (2016), RFC 7748, section 7, on keys that are to be derived from.
    """
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(other))
    except (TypeError, ValueError):
        raise InvalidInput("A public key must be 32 bytes, a point of X25519 that is not of small order.") from None
    pair = b"".join(sorted((own.public_key().public_bytes_raw(), other)))
    return HKDF(hashes.SHA256(), 32, None, b"fedjax_clip" + pair).derive(secret)


def expand(seed: bytes, like: np.ndarray) -> np.ndarray:
    """ChaCha20's key stream as an array: a mask.

    Args:
      seed: 32 bytes that have no other use.
      like: an array with the shape and type of the result, in this machine's byte order.

    Example:
      >>> mask = fc.secure.expand(bytes(32), np.zeros(4, np.uint32))
      >>> mask.shape, mask.dtype
      ((4,), dtype('uint32'))
    """
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(like.nbytes))
    return np.frombuffer(stream, like.dtype.newbyteorder("=")).reshape(like.shape)


def signed(u: int, v: int, mask: np.ndarray) -> np.ndarray:
    """The sign of a mask: u adds the mask that v subtracts."""
    return mask if u < v else np.negative(mask)


def verified(public: bytes, signature: bytes, statement: bytes) -> bool:
    """Whether the owner of this Ed25519 key has signed the statement."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, statement)
    except (InvalidSignature, TypeError, ValueError):
        return False
    return True
