"""Homomorphic aggregation: the server adds real numbers that it cannot read (CKKS, by TenSEAL).

**Threat model:** the clients of a round are protected from an honest-but-curious server without colluding clients. It
learns the sum. All clients of a round hold one secret key, drawn for the round. A malicious server therefore reads
everything: it hands out one client's ciphertext as the sum. A server to whom one client tells the key also reads
everything. If that may happen, take ``fc.secure.pairwise_masks``. TenSEAL lacks threshold keys, which would prevent the
second attack.

**Why sums are rounded:** a CKKS decryption is the message plus an error. Whoever holds both and the ciphertext can
compute the secret key, ``s = (m + e - c0) / c1``. Clients therefore round their messages to a grid whose step is over
twice the largest error of a sum, and round the decrypted sum to the same grid before they reveal it. This always
removes the whole error. The result is the exact sum of the rounded messages, which depends on neither key nor
ciphertexts. (The other remedy floods the error with noise. That noise would be drawn in float64, whose 53 bits do not
hold 40 bits of security beside a message.)

Needs the extra ``secure``.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.reduce import Reducer, on_host, secure_threshold

try:
    import tenseal
except ImportError:
    raise InvalidInput("Homomorphic aggregation needs tenseal: pip install 'fedjax_clip[secure]'.") from None


class Ckks:
    """A secret key of a round's clients, with encryption, addition and decryption.

    Sums need one prime of 60 bits, in rings of degree N = 4096 with 128 bits of security. Numbers are stored at a scale
    of 2^48, and sums stay below 2^10. The error of one ciphertext is at most 21 in each coefficient (SEAL's noise is
    binomial, of 21 bits either way) plus 1/2 by rounding: at worst ``N 21.5 / 2^48`` in each number. A transform in
    float64 adds at most 2^-32. The grid's step is the smallest power of two that is at least twice the sum of n
    ciphertext errors and two transform errors: 2^-27 for 8 clients, 2^-23 for 100. Errors in practice are some 500
    times smaller.

    Args:
      num_clients: n, the most clients in a sum. Elements of their messages are clamped to ``2^10 / n``.

    Attributes:
      step: of the grid.
      limit: the largest element of one client's message.

    Raises:
      InvalidInput: an n that is not a whole number of at least 2, or that leaves no grid (beyond 10^5).

    Example:
      >>> scheme = fc.secure.Ckks(2)
      >>> total = scheme.add([scheme.encrypt(np.array([1.0, 2.0])), scheme.encrypt(np.array([0.5, 0.5]))])
      >>> scheme.decrypt(total).round(3)[:2].tolist()
      [1.5, 2.5]

    Source: Cheon et al. (2017), "Homomorphic Encryption for Arithmetic of Approximate Numbers"; Li and Micciancio
    (2021), "On the Security of Homomorphic Encryption on Approximate Numbers", Section 2 on exact schemes, whose
    decryptions reveal nothing, and Section 3 on approximate ones.
    """

    DEGREE, PRIMES, SCALE, MOST = 4096, (60, 49), 2.0**48, 2.0**10  # SEAL wants a second prime, for keys
    NOISE, FLOAT = 21.5, 2.0**-32

    def __init__(self, num_clients: int):
        n = checks.count("num_clients", num_clients, 2, 10**5)
        self._context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            self.DEGREE,
            coeff_mod_bit_sizes=list(self.PRIMES),
            encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        )
        self._context.global_scale = self.SCALE
        keyless = dict.fromkeys(("save_public_key", "save_secret_key", "save_galois_keys", "save_relin_keys"), False)
        self.public = tenseal.context_from(self._context.serialize(**keyless))  # the server's context
        self.error = n * self.DEGREE * self.NOISE / self.SCALE + 2 * self.FLOAT
        self.step = 2.0 ** math.ceil(math.log2(2 * self.error))
        self.limit = math.floor(self.MOST / n / self.step) * self.step

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """``[d]`` real numbers rounded to whole steps and clamped to the limit; float64."""
        return np.clip(np.rint(x.astype(np.float64) / self.step) * self.step, -self.limit, self.limit)

    def encrypt(self, x: np.ndarray) -> list[bytes]:
        """At a client: ``[d]`` real numbers, rounded, 2048 in a ciphertext."""
        slots, x = self.DEGREE // 2, self.rounded(x)
        parts = [x[i : i + slots] for i in range(0, len(x), slots)]
        return [tenseal.ckks_vector(self._context, part).serialize() for part in parts]

    def add(self, messages: Sequence[Sequence[bytes]]) -> list[bytes]:
        """At the server: the sum of encrypted messages, without the key."""

        def total(parts: Sequence[bytes]) -> bytes:
            vectors = (tenseal.ckks_vector_from(self.public, part) for part in parts)
            return functools.reduce(lambda x, y: x + y, vectors).serialize()

        return [total(parts) for parts in zip(*messages, strict=True)]

    def decrypt(self, message: Sequence[bytes]) -> np.ndarray:
        """At a client: ``[d]``, float64, the exact sum of the rounded messages. Nothing else may leave the client."""
        return np.rint(self._approximate(message) / self.step) * self.step

    def _approximate(self, message: Sequence[bytes]) -> np.ndarray:
        """The decryption with its error, which together with the ciphertext reveals the key."""
        vectors = [tenseal.ckks_vector_from(self._context, part) for part in message]
        return np.concatenate([vector.decrypt() for vector in vectors])


def ckks_mean(cohort_size: int) -> Reducer:
    """``fc.reduce.fixed_mean`` of encrypted messages; the server adds them without the key.

    It protects from an honest-but-curious server without colluding clients. **A malicious server, or one to whom a
    client tells the key, reads every message of the round.** Against these take ``fc.secure.pairwise_masks``.

    Unweighted; each message is rounded to steps of 2^-27 (8 clients; ``fc.secure.Ckks``), so the mean is the plain
    one to half a step. Each round has a fresh key. A round with one client is not opened, and its update is zero.
    Messages go to the host in each round; 2048 numbers make a ciphertext of 66 kB, 8 times their size or more, which
    ``bytes_up`` does not see.

    Args:
      cohort_size: n, the denominator of the sum; 2 or more.

    Raises:
      InvalidInput: a cohort of one client, whose sum is its message. When the algorithm is built: clients that send
        more than the update (SCAFFOLD, Mime ...), which would go in the clear.

    Example:
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, reducer=fc.secure.ckks_mean(8))

    Source: Cheon et al. (2017); Li and Micciancio (2021).
    """
    secure_threshold(cohort_size, None)

    def total(messages: np.ndarray, came: np.ndarray) -> np.ndarray:
        scheme = Ckks(len(messages))
        encrypted = [scheme.encrypt(messages[c]) for c in np.flatnonzero(came)]
        return scheme.decrypt(scheme.add(encrypted)).astype(messages.dtype)

    return on_host(total, cohort_size, threshold=2)._replace(hides="ckks_mean")
