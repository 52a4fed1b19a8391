"""A client of the protocol: a state machine that checks the server's statements."""

import enum
import functools
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.secure.graph import Neighbourhood, check_neighbourhood
from fedjax_clip.secure.sharing import SHARE, agree, expand, signed, split, verified


class Stage(enum.Enum):
    """The stage of a client. Each of its methods belongs to one stage; after a refusal the stage is ``OVER``.

    Example:
      >>> fc.secure.Stage.ADVERTISE
    """

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    CONFIRM = "confirm"
    REVEAL = "reveal"
    OVER = "over"


class Keys(NamedTuple):
    """A client's public keys in one sum.

    Attributes:
      sealing: its public key of X25519 for shares.
      masking: its public key of X25519 for masks.
      signature: of both, with the client's signing key in the registry.

    Example:
      >>> from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
      >>> identity = Ed25519PrivateKey.generate()
      >>> client = fc.secure.Client(0, 2, identity, {0: identity.public_key().public_bytes_raw()}, session=b"round 7")
      >>> len(client.advertise().masking)
      32
    """

    sealing: bytes
    masking: bytes
    signature: bytes


def _in(stage: Stage, then: Stage) -> Callable[[Callable], Callable]:
    """Lets a method run in its stage only. After any error the client takes no further part."""

    def wrap(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(self: "Client", *args: Any) -> Any:
            here, self.stage = self.stage, Stage.OVER
            if here is not stage:
                now = "its part in this sum is over" if here is Stage.OVER else f"its next step is to {here.value}"
                raise InvalidInput(
                    f"Client {self.number} is asked to {stage.value}, and {now}: each step comes once, in the order "
                    "advertise, share, mask, confirm, reveal, and none after a refusal."
                )
            try:
                result = method(self, *args)
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as fault:
                if isinstance(fault, InvalidInput):
                    raise
                raise InvalidInput(
                    f"What client {self.number} was told in order to {stage.value} has not the form of it: {fault}."
                ) from None
            self.stage = then
            return result

        return call

    return wrap


class Client:
    """One client in one sum: two key pairs, a seed, and the messages that it has received.

    It goes through ``advertise``, ``share``, ``mask``, ``confirm``, ``reveal``, each once and in this order. It checks
    every statement of the server before it uses it, and takes no further part after the first lie. It opens only a sum
    of at least ``threshold`` clients, including itself, if t clients have signed that they open the same sum.

    If ``2 t > n + k``, a malicious server with k colluding clients learns one sum only, of at least t - k other
    clients. An honest-but-curious server may collude with any k < t clients. With ``neighbours`` the first guarantee
    does not hold, because the server draws the graph.

    Args:
      number: from 0.
      threshold: t, the fewest clients whose sum it helps to open; more than half of the roster.
      identity: its long-term signing key.
      registry: ``{client: public signing key}`` of all possible participants, from a party that all clients trust.
      session: a name of this sum that the server cannot use twice, such as the round's number in bytes. It makes
        signatures of one sum invalid in another.
      neighbours: of a sparse graph, ``(numbers of its neighbours, Neighbourhood)``; all clients by default.

    Attributes:
      stage: the next step.

    Raises:
      InvalidInput: (by every method) a step out of order; a refused statement of the server, by name.

    Example:
      >>> from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
      >>> identity = Ed25519PrivateKey.generate()
      >>> client = fc.secure.Client(0, 2, identity, {0: identity.public_key().public_bytes_raw()}, session=b"round 7")
      >>> keys = client.advertise()

    Source: Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine Learning", Figure 4
    with the steps of the malicious setting, and Theorem 6.5 for t. Bell et al. (2020), "Secure Single-Server
    Aggregation with (Poly)Logarithmic Overhead", Algorithm 2, for ``neighbours``.
    """

    def __init__(
        self,
        number: int,
        threshold: int,
        identity: Ed25519PrivateKey,
        registry: Mapping[int, bytes],
        session: bytes,
        neighbours: tuple[Collection[int], Neighbourhood] | None = None,
    ):
        self.number = checks.client_number("number", number)
        self.threshold = checks.count("threshold", threshold, 2)
        self.stage = Stage.ADVERTISE
        self._identity, self._registry, self._session = identity, dict(registry), session
        self._sealing, self._masking = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = os.urandom(32)
        graph, near = (None, None) if neighbours is None else neighbours
        self._near = None if graph is None else {self.number, *graph}
        near = check_neighbourhood(near)
        self._shares_needed = threshold if near is None else near.threshold

    def saved(self) -> str:
        """All of this client's secrets and what it has heard, as JSON: keep it as you keep its signing key.

        A process that ends between two steps goes on by ``restored``. Delete it after the last step, and never go on
        from one text twice: the client would open two sums.
        """
        heard: dict[str, Any] = {
            name: getattr(self, name) for name in ("_own", "_roster", "_shares", "_survivors") if name in vars(self)
        }
        if "_survivors" in heard:
            heard["_survivors"] = sorted(heard["_survivors"])
        said = {
            "number": self.number,
            "threshold": self.threshold,
            "stage": self.stage.value,
            "session": self._session,
            "sealing": self._sealing.private_bytes_raw(),
            "masking": self._masking.private_bytes_raw(),
            "seed": self._seed,
            "near": None if self._near is None else sorted(self._near),
            "shares_needed": self._shares_needed,
            **heard,
        }
        return json.dumps(said, default=bytes.hex)

    @classmethod
    def restored(cls, text: str, identity: Ed25519PrivateKey, registry: Mapping[int, bytes]) -> "Client":
        """The client that was ``saved``.

        Args:
          text: of ``saved``.
          identity, registry: as before.

        Example:
          >>> from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
          >>> identity = Ed25519PrivateKey.generate()
          >>> registry = {0: identity.public_key().public_bytes_raw()}
          >>> client = fc.secure.Client(0, 2, identity, registry, session=b"round 7")
          >>> keys = client.advertise()
          >>> fc.secure.Client.restored(client.saved(), identity, registry).stage
          <Stage.SHARE: 'share'>
        """
        said = json.loads(text)
        client = cls(said["number"], said["threshold"], identity, registry, bytes.fromhex(said["session"]))
        client.stage = Stage(said["stage"])
        client._sealing, client._masking = (
            X25519PrivateKey.from_private_bytes(bytes.fromhex(said[name])) for name in ("sealing", "masking")
        )
        client._seed, client._shares_needed = bytes.fromhex(said["seed"]), said["shares_needed"]
        client._near = None if said["near"] is None else set(said["near"])
        if "_own" in said:
            client._own = Keys(*map(bytes.fromhex, said["_own"]))
        if "_roster" in said:
            client._roster = {int(v): Keys(*map(bytes.fromhex, keys)) for v, keys in said["_roster"].items()}
        if "_shares" in said:
            client._shares = {int(v): bytes.fromhex(shares) for v, shares in said["_shares"].items()}
        if "_survivors" in said:
            client._survivors = frozenset(said["_survivors"])
        return client

    @_in(Stage.ADVERTISE, Stage.SHARE)
    def advertise(self) -> Keys:
        """Round 0: its public keys, signed."""
        sealing, masking = (key.public_key().public_bytes_raw() for key in (self._sealing, self._masking))
        self._own = Keys(sealing, masking, self._identity.sign(self._of_keys(sealing, masking)))
        return self._own

    @_in(Stage.SHARE, Stage.MASK)
    def share(self, roster: Mapping[int, Keys]) -> dict[int, bytes]:
        """Round 1: sealed shares of the masking key and of the seed, for each other client.

        Refused: a roster without this client, with fewer than t clients, with so many that t is not a majority, with a
        repeated key, or with a key that its owner has not signed.
        """
        self._check_roster(roster)
        self._roster = dict(roster)
        points = [v + 1 for v in roster]
        keys = split(self._masking.private_bytes_raw(), self._shares_needed, points)
        seeds = split(self._seed, self._shares_needed, points)
        plain = {v: k.to_bytes(SHARE) + s.to_bytes(SHARE) for v, k, s in zip(roster, keys, seeds, strict=True)}
        self._shares = {self.number: plain.pop(self.number)}
        return {v: self._box(v).encrypt(_nonce(self.number, v), text, self._session) for v, text in plain.items()}

    @_in(Stage.MASK, Stage.CONFIRM)
    def mask(self, message: np.ndarray, inbox: Mapping[int, bytes]) -> np.ndarray:
        """Round 2: its message under its own mask and one mask for each client whose shares arrived, modulo its type.

        Refused: shares of fewer than t clients (including itself), shares of a client that is not in the roster, shares
        changed on the way.
        """
        message = np.asarray(message)
        if message.dtype.kind != "u":
            raise InvalidInput(f"A message must be of unsigned integers, not {message.dtype}.")
        self._known("The inbox", inbox, set(self._roster) - {self.number})
        self._enough("shares in its inbox", len(inbox) + 1, self._shares_needed)
        for v, text in inbox.items():
            self._shares[v] = self._opened(v, text)
        total = message + expand(self._seed, message)
        for v in inbox:
            total += signed(self.number, v, expand(agree(self._masking, self._roster[v].masking), message))
        return total

    @_in(Stage.CONFIRM, Stage.REVEAL)
    def confirm(self, survivors: Collection[int]) -> bytes:
        """Round 3: its signature of the only set of survivors whose sum it will open.

        Refused: a set of fewer than t clients, without this client, or with a client whose shares never arrived.
        """
        self._survivors = frozenset(survivors)
        known = set(self._roster) if self._near is None else self._near
        heard = set(self._shares) if self._near is None else set(self._shares) | (set(self._registry) - known)
        self._known("The survivors", self._survivors, heard)
        if self.number not in self._survivors:
            raise InvalidInput(f"The survivors lack client {self.number}: it does not open a sum that it is not in.")
        self._enough("survivors", len(self._survivors), self.threshold)
        self._enough("surviving neighbours", len(self._survivors & self._shares.keys()), self._shares_needed)
        return self._identity.sign(self._of_survivors())

    @_in(Stage.REVEAL, Stage.OVER)
    def reveal(self, signatures: Mapping[int, bytes]) -> dict[int, int]:
        """Round 4: the share of each survivor's seed, and the share of each other client's key; never both.

        Refused: fewer than t signatures (including its own) of the survivors that it has confirmed itself.
        """
        self._known("The signatures", signatures, self._survivors & self._shares.keys())
        for v, signature in signatures.items():
            if not self._agrees(v, signature):
                raise InvalidInput(f"Client {v} has not signed the survivors that client {self.number} was told of.")
        self._enough("signatures of the survivors", len({self.number, *signatures}), self._shares_needed)
        halves = {v: (text[:SHARE], text[SHARE:]) for v, text in self._shares.items()}
        return {v: int.from_bytes(halves[v][v in self._survivors]) for v in halves}

    def _check_roster(self, roster: Mapping[int, Keys]) -> None:
        self._known("The roster", roster, self._registry.keys() if self._near is None else self._near)
        if roster.get(self.number) != self._own:
            raise InvalidInput(f"The roster lacks client {self.number}, or has other keys for it.")
        self._enough("clients in the roster", len(roster), self._shares_needed)
        self._check_majority(len(roster))
        self._check_distinct(roster)
        for v, keys in roster.items():
            if not self._authentic(v, keys):
                raise InvalidInput(f"The keys that the roster has for client {v} are not signed by it for this sum.")

    def _check_majority(self, count: int) -> None:
        if self._near is None and 2 * self.threshold <= count:
            raise InvalidInput(
                f"A threshold of {self.threshold} is no majority of the {count} clients in the roster, so a server "
                "that lies could open two sums: take a higher threshold."
            )

    def _check_distinct(self, roster: Mapping[int, Keys]) -> None:
        public = [key for keys in roster.values() for key in keys[:2]]
        if len(set(public)) < len(public):
            raise InvalidInput("The roster has the same key twice: each client has two of its own.")

    def _authentic(self, v: int, keys: Keys) -> bool:
        return verified(self._registry[v], keys.signature, self._of_keys(keys.sealing, keys.masking))

    def _agrees(self, v: int, signature: bytes) -> bool:
        return verified(self._registry[v], signature, self._of_survivors())

    def _opened(self, v: int, text: bytes) -> bytes:
        try:
            return self._box(v).decrypt(_nonce(v, self.number), text, self._session)
        except (InvalidTag, TypeError, ValueError):
            raise InvalidInput(
                f"The shares from client {v} to client {self.number} were changed on the way, or are of another pair."
            ) from None

    def _known(self, what: str, clients: Iterable[int], known: Collection[int]) -> None:
        strangers = sorted(set(clients) - set(known))
        if strangers:
            raise InvalidInput(
                f"{what} hold client {strangers[0]}, of whom client {self.number} has no keys or shares: invented, or "
                "not in this sum."
            )

    def _enough(self, what: str, count: int, needed: int) -> None:
        if count < needed:
            raise InvalidInput(f"Client {self.number} has {count} {what}. {too_few(count, needed)}")

    def _of_keys(self, sealing: bytes, masking: bytes) -> bytes:
        return b"".join((b"keys", len(self._session).to_bytes(4), self._session, sealing, masking))

    def _of_survivors(self) -> bytes:
        numbers = b"".join(v.to_bytes(6) for v in sorted(self._survivors))
        return b"".join((b"survivors", len(self._session).to_bytes(4), self._session, numbers))

    def _box(self, v: int) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(agree(self._sealing, self._roster[v].sealing))


def too_few(count: int, threshold: int) -> str:
    """The sentence for a sum that stays closed."""
    return f"{count} clients are left, fewer than the threshold of {threshold}: their sum stays closed."


def _nonce(sender: int, receiver: int) -> bytes:
    return sender.to_bytes(6) + receiver.to_bytes(6)
