"""A real client: it holds its own examples and state, and answers the server's messages."""

import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fedjax_clip.core import checks, files, keys
from fedjax_clip.core.types import InvalidInput, PyTree
from fedjax_clip.data.planning import own_batches
from fedjax_clip.data.population import LEAST_WEIGHT, MOST_WEIGHT
from fedjax_clip.deploy import wire
from fedjax_clip.deploy.artefact import Artefact

if TYPE_CHECKING:
    from fedjax_clip.deploy.masks import Member

Note = dict[str, Any]  # what one side sends the other: names to numbers, text, bytes, or lists of bytes


class Site:
    """One client's machine: its number, its examples, and a directory in which it keeps its state.

    The state is that of the algorithm (SCAFFOLD's variate, Clip21's memory, an error that is fed back). A new state
    becomes the client's own when the server says that it has counted the message of that round; otherwise it is
    forgotten, as ``fc.train`` forgets it.

    Args:
      artefact: of ``fc.deploy.exported``.
      number: of the client, from 0.
      examples: pytree of arrays ``[n, ...]``, its own.
      directory: for its state; no other client may use it.
      weights: ``[n]`` example weights; ones by default.
      member: its part of secure sums, with its signing key.

    Raises:
      InvalidInput: examples of other fields, shapes or types than the artefact's; a number that is no client's.

    Example:
      >>> site = fc.deploy.Site(artefact, 3, data.client(3), "site-3")
      >>> note = fc.deploy.Rounds(halves, artefact, params, data.examples).notes([3])[3]
      >>> [len(piece) for piece in site.train(note)["message"]]  # 10 and 640 floats
      [40, 2560]
    """

    def __init__(
        self,
        artefact: Artefact,
        number: int,
        examples: PyTree,
        directory: str | os.PathLike[str],
        weights: np.ndarray | None = None,
        member: "Member | None" = None,
    ):
        self.artefact, self.number = artefact, checks.client_number("The client's number", number)
        self.member = member
        self.directory = files.expanded(directory)
        forms = artefact.forms
        if self.number >= forms.num_clients:
            raise InvalidInput(f"Clients are numbered from 0 to {forms.num_clients - 1}, so there is no {self.number}.")
        fields = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(examples)}
        given = {name: wire.form(x[0]) if x.ndim and len(x) else wire.form(x) for name, x in fields.items()}
        if given != forms.examples or len({len(x) for x in fields.values()}) != 1:
            raise InvalidInput(
                f"Client {number}'s examples are {given}, and the artefact's program takes {forms.examples}."
            )
        self.examples = list(fields.values())
        self.size = len(self.examples[0])
        self.weights = np.ones(self.size, np.float32) if weights is None else np.asarray(weights)
        if self.weights.shape != (self.size,) or not np.all(
            (self.weights >= LEAST_WEIGHT) & (self.weights <= MOST_WEIGHT)
        ):
            raise InvalidInput(
                f"Client {number} needs a weight between 1e-12 and 1e12 for each of its {self.size} examples."
            )

    @property
    def weight(self) -> float:
        """Of the client in an average: the sum of its example weights."""
        return float(self.weights.sum(dtype=np.float64))

    def answer(self, note: Mapping[str, Any]) -> Note:
        """The answer to any note of the server: ``note["ask"]`` says which.

        Raises:
          InvalidInput: a note that this client does not answer.
        """
        try:
            masked = self.artefact.forms.masked
            if note["ask"] == "train" and not masked:
                return self.train(note)
            if note["ask"] in ("advertise", "share", "mask", "confirm", "reveal") and masked:
                return self._masked(note)
            raise InvalidInput(f"Client {self.number} is asked to {note['ask']}, which is not in its protocol.")
        except (KeyError, TypeError) as fault:
            raise InvalidInput(f"The server's note has not the form of one: {type(fault).__name__} {fault}.") from None

    def train(self, note: Mapping[str, Any]) -> Note:
        """A round at this client.

        Args:
          note: ``round``, ``counted`` (the last round in which the server counted this client, -1 before), ``artefact``
            (its SHA-256), ``shared`` and ``links`` (bytes).

        Returns:
          ``message`` (a list of bytes, whose lengths a round reports as ``bytes_up``) and ``report`` (bytes).

        Raises:
          InvalidInput: a note of another artefact or form.
        """
        message, report = self._worked(note)
        return {"message": wire.written(message, self.artefact.forms.message), "report": self._told(report)}

    def _masked(self, note: Mapping[str, Any]) -> Note:
        """A step of a secure sum."""
        if self.member is None:
            raise InvalidInput(
                f"Client {self.number} has no signing key and no registry of the others' keys, which a secure sum "
                "needs: give Site a member=fc.deploy.Member(...)."
            )
        reports: list[bytes] = []

        def work() -> np.ndarray:
            message, report = self._worked(note)
            reports.append(self._told(report))
            return np.concatenate([x.ravel() for x in message])

        session = f"{self.artefact.sha256}/{note['round']}"
        answer = self.member.answer(note, self.artefact.forms, session, work)
        return answer | ({"report": reports[0]} if reports else {})

    def _worked(self, note: Mapping[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The leaves of the message and of the report; the new state waits until the server has counted the client."""
        forms = self.artefact.forms
        if note["artefact"] != self.artefact.sha256:
            raise InvalidInput(
                f"The server runs the artefact {str(note['artefact'])[:12]}, and client {self.number} holds "
                f"{self.artefact.sha256[:12]}: give both the same file."
            )
        round = checks.count("The round", note["round"], 0)
        links = iter(wire.unpack(note["links"], forms.sent_links, "What the links need"))
        server = [
            next(links) if place in forms.links else np.zeros(shape, name)
            for place, (name, shape) in enumerate(forms.server)
        ]
        shared = wire.unpack(note["shared"], forms.shared, "What the server broadcasts")
        batches, weights, steps = self._batches(round)
        client = np.int32(self.number), np.float32(self.weight), np.int32(steps)
        key = np.asarray(jax.random.key_data(keys.seeded(forms.seed)))
        state = self._state(checks.count("counted", note["counted"], -1))
        secret = np.frombuffer(self._secret(), "<u4").astype(np.uint32)
        made = self.artefact.call(server, shared, batches, weights, state, client, key, secret)
        message, report, kept = jax.tree.map(np.asarray, made)
        self._keep(round, state, kept)
        return message, report

    def _batches(self, round: int) -> tuple[list[np.ndarray], np.ndarray, int]:
        """This round's batches ``[T, B, ...]``, two at least, and the number of those that count."""
        forms = self.artefact.forms
        places, live = own_batches(self.size, self.number, forms.work, seed=forms.seed, round=round)
        steps = len(places)
        rows = max(2, steps)
        places, live = (np.concatenate([x, np.zeros((rows - steps, *x.shape[1:]), x.dtype)]) for x in (places, live))
        weights = np.where(live, self.weights[places], 0).astype(np.float32)
        return [x[places] for x in self.examples], weights, steps

    def _secret(self) -> bytes:
        """This client's own secret, made when it is first needed; nothing if it draws from the seed."""
        if not self.artefact.forms.secret:
            return b""
        file = self.directory / "secret.key"
        if not file.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            with files.replacing(file) as out:
                os.chmod(out.name, 0o600)
                out.write(os.urandom(4 * keys.WORDS))
        return file.read_bytes()

    def _told(self, report: list[np.ndarray]) -> bytes:
        forms = self.artefact.forms
        if forms.quiet:  # whether it counts, and not how many examples it has
            report = [np.asarray(report[0] > 0, np.float32), *report[1:]]
        return wire.squeezed([report[place] for place in forms.told])

    @property
    def _file(self) -> pathlib.Path:
        return self.directory / "state.npz"

    def _state(self, counted: int) -> list[np.ndarray]:
        """What this client keeps, after the rounds in which the server counted it."""
        if not self.artefact.state or not self._file.exists():
            return self.artefact.state
        with np.load(self._file) as held:
            if str(held["artefact"]) != self.artefact.sha256:
                raise InvalidInput(
                    f"{self._file} is the state of another artefact's client: give this one a new directory."
                )
            kept = held["new" if int(held["round"]) == counted else "old"].tobytes()
        return wire.unpack(kept, self.artefact.forms.state, f"The state in {self._file}")

    def _keep(self, round: int, old: list[np.ndarray], new: list[np.ndarray]) -> None:
        if not old:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        packed = {name: np.frombuffer(wire.pack(x), np.uint8) for name, x in (("old", old), ("new", new))}
        told = {"round": np.array(round), "artefact": np.array(self.artefact.sha256)}
        files.write_npz(self._file, told | packed)
