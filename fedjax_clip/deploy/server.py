"""The server of real clients: it samples, asks, and makes one step of the answers that came."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core.types import InvalidInput, Params, PyTree, Row, Server
from fedjax_clip.deploy import wire
from fedjax_clip.deploy.artefact import Artefact
from fedjax_clip.deploy.client import Note
from fedjax_clip.deploy.halves import Halves

Send = Callable[[dict[int, Note]], Mapping[int, Note]]  # one trip: notes to clients, and the answers that came
Leaves = tuple[list[np.ndarray], list[np.ndarray]]  # of a message, and of a report


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes of one round on the wire, both ways, without what the transport adds.

    Attributes:
      down, up: of the model and the messages: what a row reports as ``bytes_down`` and ``bytes_up``.
      links: of what the links need of the server, such as a clip's bound and the round's number.
      reports: of the clients' weights and metrics.
      protocol: of a secure sum's keys, shares and signatures, both ways.

    Example:
      >>> fc.deploy.Traffic(down=240, up=240)
      Traffic(down=240, up=240, links=0, reports=0, protocol=0)
    """

    down: int = 0
    up: int = 0
    links: int = 0
    reports: int = 0
    protocol: int = 0


class Rounds:
    """The rounds of a run, at the server. It keeps the server's state, and of each client the last round it counted.

    Args:
      halves: of the algorithm.
      artefact: the clients' half.
      params: initial parameters.
      examples: as for ``exported``.

    Attributes:
      server: the server's state.
      traffic: of the last round.

    Example:
      >>> rounds = fc.deploy.Rounds(halves, artefact, params, data.examples)
      >>> sites = {c: fc.deploy.Site(artefact, c, data.client(c), f"site-{c}") for c in (0, 3)}
      >>> row = rounds.run([0, 3], lambda notes: {c: sites[c].answer(note) for c, note in notes.items()})
      >>> row["round"], row["clients"], row["bytes_up"] == rounds.traffic.up
      (1.0, 2.0, True)
    """

    def __init__(self, halves: Halves, artefact: Artefact, params: Params, examples: PyTree):
        self.halves, self.artefact = halves, artefact
        self.server: Server = halves.algorithm.init(params)
        self.traffic = Traffic()
        self._counted: dict[int, int] = {}
        self._sent = halves.shapes(params, examples, artefact.forms.batch_size)
        names = [path[0].key for path, _ in jax.tree.leaves_with_path(self._sent.report)]
        self._moving = {1 + i for i, name in enumerate(names) if name in ("clients", "uplink", "weight")} | {0}

    @property
    def params(self) -> Params:
        """The model's parameters after the rounds so far."""
        return self.server.params

    def run(self, ids: Sequence[int], send: Send) -> Row:
        """One round with these clients.

        Args:
          ids: of the clients of the round.
          send: takes a note for each client, and returns the answers that came. A client without an answer is the
            round's ``dropped``. It is called once, or five times for a secure sum.

        Returns:
          The round's row, as ``fc.train``'s.
        """
        if self.artefact.forms.masked:
            from fedjax_clip.deploy import masks  # which needs cryptography

            read, said = masks.summed(self.artefact.forms, list(ids), self.notes(ids), send)
        else:
            answers = send({c: {"ask": "train"} | note for c, note in self.notes(ids).items()})
            read, said = self._read(ids, answers)
        return self._step(list(ids), read, said)

    def notes(self, ids: Sequence[int]) -> dict[int, Note]:
        """What each client is sent in this round; all but ``counted`` is the same for all."""
        forms, leaves = self.artefact.forms, jax.tree.leaves(self.server)
        note: Note = {
            "round": int(self.server.round),
            "artefact": self.artefact.sha256,
            "shared": wire.pack(jax.tree.leaves(self.halves.begin(self.server))),
            "links": wire.pack([leaves[place] for place in forms.links]),
        }
        self.traffic = Traffic(down=len(ids) * len(note["shared"]), links=len(ids) * len(note["links"]))
        return {c: note | {"counted": self._counted.get(c, -1)} for c in ids}

    def _read(self, ids: Sequence[int], answers: Mapping[int, Note]) -> tuple[dict[int, Leaves], Traffic]:
        """What came and can be read; the rest is as if it had not come."""
        forms, read, up, reports = self.artefact.forms, {}, 0, 0
        for client in ids:
            try:
                message, report = answers[client]["message"], answers[client]["report"]
                told = wire.unsqueezed(report, forms.sent_report, "A report")
                if not all(np.isfinite(x).all() for place, x in zip(forms.told, told) if place in self._moving):
                    continue
                read[client] = wire.read(message, forms.message), told
            except (KeyError, TypeError, InvalidInput):
                continue
            up, reports = up + sum(map(len, message)), reports + len(report)
        return read, Traffic(up=up, reports=reports)

    def _step(self, ids: list[int], read: Mapping[int, Leaves], said: Traffic) -> Row:
        sent, structure = jax.tree.flatten(self._sent)
        places = max(2, len(ids))
        arrays = [np.zeros((places, *x.shape), x.dtype) for x in sent]
        forms, split = self.artefact.forms, len(jax.tree.leaves(self._sent.message))
        for slot, client in enumerate(ids):
            if client not in read:
                continue
            message, report = read[client]
            for array, x in zip(arrays, message):
                array[slot] = x
            untold = set(range(len(forms.report))) - set(forms.told)
            lost = np.array(np.nan)
            for place, x in [*zip(forms.told, report), *((place, lost) for place in untold)]:
                if arrays[split + place].dtype.kind == "f" or place not in untold:
                    arrays[split + place][slot] = x
        whole = jax.tree.unflatten(structure, arrays)
        here = np.arange(places) < len(ids)
        came = np.array([client in read for client in ids] + [False] * (places - len(ids)))
        whole.report["asked"] = here.astype(np.float32)
        if forms.quiet:
            whole.report["dropped"] = np.zeros(places, np.float32)
        whole.report["dropped"] = np.where(here & ~came, 1, whole.report["dropped"]).astype(np.float32)
        numbers = np.array(ids + [-1] * (places - len(ids)), np.int32)
        round = int(self.server.round)
        self.server, metrics = self.halves.finish(self.server, jnp.asarray(numbers), whole)
        row = {name: float(x) for name, x in metrics.items()}
        if forms.quiet:
            row = {name: x for name, x in row.items() if not np.isnan(x)} | {"bytes_up": float(said.up)}
        if not row.get("too_few"):
            self._counted |= dict.fromkeys(read, round)
        self.traffic = dataclasses.replace(said, down=self.traffic.down, links=self.traffic.links)
        return {"round": float(round + 1), **row}
