"""Pairwise masks between real clients: five trips, and keys that never leave their clients.

The protocol is ``fc.secure``'s. A client's part may run in a process for each trip; between them its secrets lie in a
file of its own. Needs the extra ``secure``.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedjax_clip.core import checks, files
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.deploy import wire
from fedjax_clip.deploy.artefact import Forms
from fedjax_clip.reduce import majority
from fedjax_clip.secure import Client, Keys, Transcript, unmask

if TYPE_CHECKING:
    from fedjax_clip.deploy.server import Leaves, Note, Send, Traffic

STEPS = ("advertise", "share", "mask", "confirm", "reveal")
SHARE = 33  # bytes of a revealed share


class Member:
    """A client's part of secure sums, with its signing key and the registry of all clients' public ones.

    Args:
      number: of the client.
      directory: for its secrets between two trips; readable by it alone.
      identity: its signing key.
      registry: ``{client: public key}``, from a party that all clients trust, not from the server.

    Example:
      >>> from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
      >>> identity = Ed25519PrivateKey.generate()
      >>> member = fc.deploy.Member(0, "site-0", identity, {0: identity.public_key().public_bytes_raw()})
    """

    def __init__(
        self,
        number: int,
        directory: str | os.PathLike[str],
        identity: Ed25519PrivateKey,
        registry: Mapping[int, bytes],
    ):
        self.number, self.identity, self.registry = number, identity, dict(registry)
        self._file: pathlib.Path = files.expanded(directory) / "masks.json"

    def answer(self, note: Mapping[str, Any], forms: Forms, session: str, work: Callable[[], np.ndarray]) -> "Note":
        """One step of a sum.

        Args:
          note: of the server.
          forms: of the artefact, which says how many clients a sum has at least.
          session: names the sum; each one is used once.
          work: trains, and returns the message ``[d]``.

        Raises:
          InvalidInput: what ``fc.secure.Client`` refuses; a sum that this client has taken part in before.
        """
        ask, round = note["ask"], checks.count("The round", note["round"], 0)
        held = json.loads(self._file.read_text()) if self._file.exists() else {"round": -1, "client": None}
        if ask == "advertise":
            if round <= held["round"]:
                raise InvalidInput(
                    f"Client {self.number} has taken part in the sum of round {held['round']}, and is asked for round "
                    f"{round}: a second sum of a round would reveal what the first one hides."
                )
            threshold = int(majority(checks.count("clients", note["clients"], 2), forms.threshold))
            client = Client(self.number, threshold, self.identity, self.registry, session.encode())
        elif round != held["round"] or held["client"] is None:
            raise InvalidInput(f"Client {self.number} has no part in a sum of round {round}.")
        else:
            client = Client.restored(str(held["client"]), self.identity, self.registry)
        self._keep(round, None)  # whatever happens in this step, it does not happen twice
        out = self._step(client, note, work)
        self._keep(round, None if ask == "reveal" else client.saved())
        return out

    def _step(self, client: Client, note: Mapping[str, Any], work: Callable[[], np.ndarray]) -> "Note":
        if note["ask"] == "advertise":
            return {"keys": list(client.advertise())}
        if note["ask"] == "share":
            roster = {c: Keys(*note["keys"][3 * i : 3 * i + 3]) for i, c in enumerate(note["roster"])}
            shares = client.share(roster)
            return {"to": list(shares), "shares": list(shares.values())}
        if note["ask"] == "mask":
            return {"masked": wire.pack([client.mask(work(), dict(zip(note["from"], note["shares"], strict=True)))])}
        if note["ask"] == "confirm":
            return {"signature": client.confirm(note["survivors"])}
        opened = client.reveal(dict(zip(note["from"], note["signatures"], strict=True)))
        return {"of": list(opened), "opened": [share.to_bytes(SHARE) for share in opened.values()]}

    def _keep(self, round: int, client: str | None) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(self._file) as file:
            os.chmod(file.name, 0o600)
            file.write(json.dumps({"round": round, "client": client}).encode())


def summed(
    forms: Forms, ids: list[int], notes: "Mapping[int, Note]", send: "Send"
) -> "tuple[dict[int, Leaves], Traffic]":
    """The server's part of one sum: it learns the sum, which it writes down as the first survivor's message.

    The others' messages are zeros: a modular sum of these is the sum, to the bit.

    Args:
      forms: of the artefact.
      ids: of the clients that are asked.
      notes: of the round, for those that train.
      send: see ``Rounds.run``.

    Returns:
      ``(read, traffic)``; nothing is read if the sum stays closed.
    """
    from fedjax_clip.deploy.server import Traffic

    threshold = int(majority(len(ids), forms.threshold))
    round, seen, protocol = next(iter(notes.values()))["round"], Transcript(), 0
    reports: dict[int, list[np.ndarray]] = {}
    reported = 0

    def trip(ask: str, said: "Mapping[int, Note]") -> "dict[int, Note]":
        nonlocal protocol
        sent = {c: {"ask": ask, "round": round, "artefact": notes[c]["artefact"], **note} for c, note in said.items()}
        protocol += sum(_size(note) for note in said.values() if ask != "mask")
        return dict(send(sent))

    try:
        for c, answer in trip("advertise", {c: {"clients": len(ids)} for c in ids}).items():
            seen.keys[c] = Keys(*answer["keys"])
            protocol += _size(answer)
        roster = {"roster": list(seen.keys), "keys": [part for keys in seen.keys.values() for part in keys]}
        for c, answer in trip("share", dict.fromkeys(seen.keys, roster)).items():
            seen.sealed |= {(c, v): text for v, text in zip(answer["to"], answer["shares"], strict=True)}
            protocol += _size({"shares": answer["shares"]})
        sharing = sorted({u for u, _ in seen.sealed})
        inboxes = {v: {u: seen.sealed[u, v] for u in sharing if u != v} for v in sharing}
        protocol += sum(len(text) for inbox in inboxes.values() for text in inbox.values())
        asked = {v: notes[v] | {"from": list(box), "shares": list(box.values())} for v, box in inboxes.items()}
        (kind, *_), size = {name for piece in forms.message for name, _ in piece.arrays}, _elements(forms)
        for c, answer in trip("mask", asked).items():
            try:
                (vector,) = wire.unpack(answer["masked"], [(kind, (size,))], "A masked message")
                reports[c] = wire.unsqueezed(answer["report"], forms.sent_report, "A report")
            except (KeyError, InvalidInput):
                continue
            seen.masked[c] = vector
            reported += len(answer["report"])
        survivors = {"survivors": sorted(seen.masked)}
        for c, answer in trip("confirm", dict.fromkeys(seen.masked, survivors)).items():
            seen.confirmed[c] = answer["signature"]
            protocol += _size(answer)
        signed = {"from": list(seen.confirmed), "signatures": list(seen.confirmed.values())}
        for c, answer in trip("reveal", dict.fromkeys(seen.confirmed, signed)).items():
            shares = zip(answer["of"], answer["opened"], strict=True)
            seen.revealed[c] = {v: int.from_bytes(share) for v, share in shares}
            protocol += _size({"opened": answer["opened"]})
        total = unmask(seen, threshold)
    except (KeyError, InvalidInput, StopIteration):  # too few are left, or somebody lies: the sum stays closed
        return {}, Traffic(protocol=protocol, reports=reported)
    up = sum(vector.nbytes for vector in seen.masked.values())
    parts = np.split(total, np.cumsum([_count(shape) for piece in forms.message for _, shape in piece.arrays])[:-1])
    shapes = [shape for piece in forms.message for _, shape in piece.arrays]
    whole = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    zeros = [np.zeros_like(x) for x in whole]
    first = min(seen.masked)
    read = {c: (whole if c == first else zeros, reports[c]) for c in seen.masked}
    return read, Traffic(up=up, reports=reported, protocol=protocol)


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _elements(forms: Forms) -> int:
    return sum(_count(shape) for piece in forms.message for _, shape in piece.arrays)


def _size(note: Mapping[str, Any]) -> int:
    """The bytes of a note's secrets and signatures; client numbers are the transport's."""
    values = [x for value in note.values() for x in (value if isinstance(value, list) else [value])]
    return sum(len(x) for x in values if isinstance(x, bytes))
