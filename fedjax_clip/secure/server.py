"""The server of the protocol, and the protocol as a reducer."""

import dataclasses
import functools
import os
from collections.abc import Collection

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.reduce import Reducer, majority, on_host, secure_threshold
from fedjax_clip.secure.client import Client, Keys, too_few
from fedjax_clip.secure.graph import Neighbourhood, check_neighbourhood, harary
from fedjax_clip.secure.sharing import SHARE, agree, expand, join, signed


@dataclasses.dataclass
class Transcript:
    """Everything that the server sees of one sum.

    Attributes:
      keys: ``{client: public keys}``.
      sealed: ``{(from, to): bytes}``, shares that only the receiver can read.
      masked: ``{client: array}``, the messages under masks.
      confirmed: ``{client: signature}`` of the survivors, who are those of ``masked``.
      revealed: ``{client: {of: share}}``.

    Example:
      >>> total, transcript = fc.secure.aggregate(np.ones((5, 3), np.uint32), threshold=4)
      >>> transcript.masked[0].shape  # what the server saw of client 0
      (3,)
    """

    keys: dict[int, Keys] = dataclasses.field(default_factory=dict)
    sealed: dict[tuple[int, int], bytes] = dataclasses.field(default_factory=dict)
    masked: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    confirmed: dict[int, bytes] = dataclasses.field(default_factory=dict)
    revealed: dict[int, dict[int, int]] = dataclasses.field(default_factory=dict)

    def bytes_up(self, client: int) -> int:
        """The bytes that one client has sent: keys, sealed shares, masked message, signature, revealed shares."""
        sealed = sum(len(text) for (sender, _), text in self.sealed.items() if sender == client)
        masked = self.masked[client].nbytes if client in self.masked else 0
        signature = len(self.confirmed.get(client, b""))
        return (
            sum(map(len, self.keys[client])) + sealed + masked + signature + SHARE * len(self.revealed.get(client, ()))
        )


def aggregate(
    messages: np.ndarray,
    threshold: int,
    came: Collection[bool] | None = None,
    answered: Collection[bool] | None = None,
    neighbours: Neighbourhood | None = None,
) -> tuple[np.ndarray, Transcript]:
    """The sum of the messages that arrived, modulo their type, by the whole protocol among n clients.

    Exact to the last bit. If a client shares its keys and then falls silent, t survivors reveal their shares of its
    masking key, and the server removes its masks from the sum. Signing keys and their registry are drawn afresh, in
    place of a trusted third party's.

    Args:
      messages: ``[n, d]`` unsigned integers, of all clients.
      threshold: t, more than n / 2; fewer survivors cannot open a sum.
      came: bool ``[n]``, the clients whose masked message arrives; all by default.
      answered: bool ``[n]``, the clients that also answer in the last step, to open the sum; all that came by default.
      neighbours: of a sparse graph, which the server draws; the full graph by default.

    Returns:
      ``(sum [d], transcript)``.

    Raises:
      InvalidInput: messages of another type; fewer than t clients at a stage, or in a neighbourhood of a sparse graph;
        a neighbourhood whose threshold is below 2.

    Example:
      >>> total, _ = fc.secure.aggregate(np.ones((5, 3), np.uint32), threshold=4)

    Source: Bonawitz et al. (2017), Figure 4; Bell et al. (2020), Algorithm 2.
    """
    if messages.dtype.kind != "u" or messages.ndim != 2:
        raise InvalidInput(f"Messages must be [n, d] unsigned integers, not {messages.dtype} {messages.shape}.")
    n = len(messages)
    threshold, neighbours = secure_threshold(n, threshold), check_neighbourhood(neighbours)
    arrived = np.ones(n, bool) if came is None else np.asarray(came, bool)
    opening = arrived if answered is None else arrived & np.asarray(answered, bool)
    for count in (arrived.sum(), opening.sum()):
        if count < threshold:
            raise InvalidInput(too_few(count, threshold))

    identities = [Ed25519PrivateKey.generate() for _ in range(n)]
    registry = {u: key.public_key().public_bytes_raw() for u, key in enumerate(identities)}
    graph = [frozenset(range(n)) - {u} for u in range(n)] if neighbours is None else harary(n, neighbours.size)
    session = os.urandom(16)

    def client(u: int) -> Client:
        near = None if neighbours is None else (graph[u], neighbours)
        return Client(u, threshold, identities[u], registry, session, near)

    seen, clients = Transcript(), [client(u) for u in range(n)]
    seen.keys = {u: clients[u].advertise() for u in range(n)}
    for u in range(n):
        shares = clients[u].share({v: seen.keys[v] for v in sorted({u, *graph[u]})})
        seen.sealed |= {(u, v): text for v, text in shares.items()}
    for u in np.flatnonzero(arrived).tolist():
        seen.masked[u] = clients[u].mask(messages[u], {v: seen.sealed[v, u] for v in graph[u]})
    survivors = set(seen.masked)
    seen.confirmed = {u: clients[u].confirm(survivors) for u in np.flatnonzero(opening).tolist()}
    for u in seen.confirmed:
        seen.revealed[u] = clients[u].reveal({v: seen.confirmed[v] for v in graph[u] if v in seen.confirmed})
    return unmask(seen, threshold if neighbours is None else neighbours.threshold), seen


def unmask(seen: Transcript, threshold: int) -> np.ndarray:
    """The server's last step: computes the sum from its own view.

    Args:
      seen: of all rounds.
      threshold: t, the number of shares that give a secret back.

    Raises:
      InvalidInput: too few shares of a client's secret.

    Example:
      >>> total, transcript = fc.secure.aggregate(np.ones((5, 3), np.uint32), threshold=4)
      >>> fc.secure.unmask(transcript, threshold=4).tolist()
      [5, 5, 5]
    """
    total = functools.reduce(np.add, seen.masked.values())
    partners: dict[int, list[int]] = {v: [] for v in seen.keys}
    for u, v in seen.sealed:
        if v in seen.masked:
            partners[u].append(v)
    for v in seen.keys:
        if v not in seen.masked and not partners[v]:
            continue
        shares = {u + 1: opened[v] for u, opened in seen.revealed.items() if v in opened}
        if len(shares) < threshold:
            raise InvalidInput(f"Of client {v}'s secret: {too_few(len(shares), threshold)}")
        secret = join(dict(list(shares.items())[:threshold]))
        if v in seen.masked:
            total = total - expand(secret, total)
            continue
        key = X25519PrivateKey.from_private_bytes(secret)
        for u in partners[v]:  # remove the masks that u agreed on with the silent v
            total = total - signed(u, v, expand(agree(key, seen.keys[u].masking), total))
    return total


def pairwise_masks(cohort_size: int, threshold: int | None = None, neighbours: Neighbourhood | None = None) -> Reducer:
    """``fc.reduce.modular_sum`` by the real protocol: the same bits, with keys and masks, at the protocol's cost.

    Messages go to the host in each round. A client whose message was dropped counts as silent.

    Args:
      cohort_size, threshold: as for ``fc.reduce.modular_sum``.
      neighbours: of a sparse graph, from ``fc.secure.neighbourhood``. It is cheaper for hundreds of clients, and
        protects from an honest-but-curious server only. Rounds with no more clients than a neighbourhood take the full
        graph.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.5), fc.uplink.integer_grid(16))
      >>> algorithm = fc.fedavg(per_example_loss, client_tx, uplink=uplink, reducer=fc.secure.pairwise_masks(8))

    Source: Bonawitz et al. (2017), Figure 4; Bell et al. (2020), Algorithm 2.
    """
    threshold, neighbours = secure_threshold(cohort_size, threshold), check_neighbourhood(neighbours)

    def protocol(messages: np.ndarray, came: np.ndarray) -> np.ndarray:
        n = len(messages)
        near = neighbours if neighbours is not None and neighbours.size < n - 1 else None
        return aggregate(messages, majority(n, threshold), came, neighbours=near)[0]

    return on_host(protocol, cohort_size, threshold, modular=True)._replace(hides="pairwise_masks")
