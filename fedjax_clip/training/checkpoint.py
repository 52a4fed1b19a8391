"""Saving and resuming a run, through Orbax."""

import copy
import hashlib
import json
import pathlib
import re
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from fedjax_clip.core import checks, files, tree
from fedjax_clip.core.types import Algorithm, InvalidInput, Params, PyTree
from fedjax_clip.training import best as kept
from fedjax_clip.training import identity, states
from fedjax_clip.training.processes import ALONE, Processes
from fedjax_clip.training.state import Members, State

MEMBERS = "members.json"


class Checkpoints:
    """Checkpoints of a run in a directory; each appears whole or not at all.

    Each holds a hash of every array, checked on reading, and the run's identity: model, algorithm and data.

    Args:
      directory: where the checkpoints lie; created by the first save.
      keep: how many of the newest checkpoints to keep.
      mode: permissions of a new directory: 0o700 hides the clients' states from other users.

    Raises:
      InvalidInput: a directory that cannot be written; a checkpoint that is damaged or of another run.

    Example:
      >>> result = fc.train(algorithm, data, params, rounds=10, checkpoints=fc.extend.Checkpoints("runs/mine"))
    """

    def __init__(self, directory: files.PathLike, keep: int = 2, mode: int = 0o777):
        self.directory = files.expanded(directory).absolute()
        self.keep, self.mode = checks.count("keep", keep), checks.count("mode", mode, 0, 0o777)
        try:
            str(self.directory).encode()
        except UnicodeEncodeError:  # Orbax takes UTF-8 only
            raise InvalidInput(
                f"{str(self.directory)!a} is not UTF-8: choose another name for the directory."
            ) from None
        self._manager: Any = None
        self._known: Members | None = None
        self._hash = ""
        self.processes = ALONE

    def shared_by(self, processes: Processes) -> "Checkpoints":
        """The same checkpoints, of a run of several processes."""
        shared = copy.copy(self)
        shared._manager, shared.processes = None, processes
        return shared

    def newest(self) -> int | None:
        """Rounds done at the newest checkpoint, or ``None`` if there is none."""
        return max(self._steps(), default=None)

    def restore(self, template: State) -> tuple[int, State] | None:
        """The newest checkpoint as ``(rounds done, state)``, or ``None`` if there is none.

        Args:
          template: a state of the same run: of its structure, shapes, types and identity.

        Raises:
          InvalidInput: a checkpoint that is damaged or of another run.
        """
        if (step := self.newest()) is None:
            return None
        record = self._record(step)
        identity.check(f"The checkpoint {self.directory / str(step)}", record["run"], template.run)
        return step, self._restored(step, record, template, "Name another directory, or remove this one.")

    def state(self, algorithm: Algorithm, params: Params) -> State:
        """The newest state, for another run to go on from: ``fc.train(..., state=...)``.

        Args:
          algorithm: of that run.
          params: its initial parameters, or any of their shapes; parameters that do not train must be that run's.

        Raises:
          InvalidInput: no checkpoint; one that is damaged, or of another model or algorithm.

        Example:
          >>> saved = fc.extend.Checkpoints("runs/mine")
          >>> result = fc.train(algorithm, data, params, rounds=10, checkpoints=saved)
          >>> result = fc.train(algorithm, data, params, rounds=20, state=saved.state(algorithm, params))
        """
        if not self.directory.is_dir() or (step := self.newest()) is None:
            raise InvalidInput(f"{self.directory} holds no checkpoint to go on from.")
        path, record = self.directory / str(step), self._record(step)
        try:
            members = self._members(record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"No run can go on from {path}: {self.directory / MEMBERS}, which names its clients, is damaged or "
                "missing."
            ) from error
        if (was := record["run"].get("algorithm")) != (kind := identity.kind(algorithm)):
            raise InvalidInput(
                f"The checkpoint {path} is of {was}, not {kind}: go on with {was}, or begin anew from its parameters."
            )
        best = () if "best" not in record["run"] else kept.begin(jax.tree.map(np.asarray, params))
        clients = states.alike(algorithm, params, len(members.weights))
        state = State(algorithm.init(params), clients, record["run"], members, step, best)
        cure = (
            "If the data has other features or classes than that run's, begin anew from its parameters, or grow its "
            "state in Python by fc.extend.grown(state, algorithm, params)."
        )
        return self._restored(step, record, state, cure)

    def _record(self, step: int) -> dict[str, Any]:
        """The record of a checkpoint, checked."""
        path = self.directory / str(step)
        files.check_fits(path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        try:
            record = self._read(step, "record", "JsonRestore")
            if record["digest"] != _digest_of_record(record):
                raise ValueError("the record's hash differs")
        except Exception as error:  # Orbax raises whatever its layers raise
            raise InvalidInput(self._damaged(step)) from error
        return record

    def _restored(self, step: int, record: dict[str, Any], template: State, cure: str) -> State:
        """The state of a checkpoint.

        Args:
          step: rounds done.
          record: of the checkpoint.
          template: a state of its structure, shapes and types.
          cure: what to do if it is of others.
        """
        path, clients = self.directory / str(step), template.clients
        on_disk = any(name.startswith("clients") and shape[:1] == [0] for name, shape, *_ in record["leaves"])
        if on_disk:
            template = template._replace(clients=states.layout(clients))
        names, leaves = _named(template)
        asked = [[name, list(x.shape), str(x.dtype)] for name, x in zip(names, leaves)]
        for saved, wanted in zip([leaf[:3] for leaf in record["leaves"]], asked):
            if saved != wanted:
                (has, shape, kind), (want, size, type) = saved, wanted
                raise InvalidInput(
                    f"The checkpoint {path} is of another model or algorithm: it has {kind}{shape} {has}, where "
                    f"{type}{size} {want} is needed. {cure}"
                )
        if len(record["leaves"]) != len(asked):
            raise InvalidInput(
                f"The checkpoint {path} is of another model or algorithm: it has {len(record['leaves'])} arrays, not "
                f"{len(asked)}. {cure}"
            )
        try:
            # Before reading: a file of endless zeros takes no room on disk, and would fill the memory.
            left_out = set(record.get("left_out", ()))
            like = _keyed(leaves, left_out)
            if _shapes_on_disk(path / "arrays") != {name: x.shape for name, x in like.items()}:
                raise ValueError("the arrays are not those of the record")
            found = self._read(step, "arrays", "StandardRestore", like) if like else {}
            arrays = [np.array(found[str(i)]) if str(i) in like else x for i, x in enumerate(leaves)]
        except Exception as error:
            raise InvalidInput(self._damaged(step)) from error
        for i, ((name, *_, digest), array) in enumerate(zip(record["leaves"], arrays)):
            if identity.digest(array) != digest:
                raise InvalidInput(self._other_model(step, name) if i in left_out else self._damaged(step, name))
        server, found, best = jax.tree.unflatten(jax.tree.structure(_parts(template)), arrays)
        if on_disk:
            rows = states.OnDisk(clients, self.place(), self.processes)
            kept = self._steps()
            with self.processes.together():
                try:
                    rows.restore(step, kept)
                except (OSError, ValueError) as error:
                    raise InvalidInput(self._damaged(step)) from error
            found = rows.tree
        return template._replace(server=server, clients=found, run=record["run"], rounds=step, best=best)

    def save(self, round: int, state: State, frozen: str = "") -> None:
        """Saves the state after ``round`` rounds; returns when it is on disk.

        Args:
          round: rounds done.
          state: to save.
          frozen: regular expression: parameters that do not train. Only their hashes are saved; who restores has them.
        """
        import orbax.checkpoint as ocp

        manager, clients = self._open(), states.of(state.clients)
        if isinstance(clients, states.OnDisk):
            if clients.directory != self.place():
                raise InvalidInput(
                    f"{clients} cannot be saved to {self.directory}: give these checkpoints to fc.train."
                )
            clients.save(round)
            state = state._replace(clients=states.layout(clients.tree))
        names, leaves = _named(state)
        described = [[n, list(x.shape), str(x.dtype), identity.digest(x)] for n, x in zip(names, leaves)]
        record: dict[str, Any] = {"run": dict(state.run), "leaves": described}
        if state.members is not None:
            record["members"] = self._keep(state.members)
        left_out = _left_out(state, frozen) if frozen else ()
        record |= {"left_out": sorted(left_out)} if left_out else {}
        record["digest"] = _digest_of_record(record)
        items = {"record": ocp.args.JsonSave(record)}
        if kept := _keyed(leaves, left_out):
            items["arrays"] = ocp.args.StandardSave(kept)
        manager.save(round, args=ocp.args.Composite(**items), force=True)
        manager.wait_until_finished()
        if isinstance(clients, states.OnDisk):
            clients.spare(self._steps())

    def _keep(self, members: Members) -> str:
        """Writes whose states the checkpoints have, once for all of them; the file's hash."""
        if self._known is not members:
            names = None if members.names is None else list(members.names)
            text = json.dumps({"names": names, "weights": members.weights.tolist()})
            self._known, self._hash = members, _hash(text)
            if self.processes.number == 0 and not (
                (path := self.directory / MEMBERS).exists() and _hash(path.read_text()) == self._hash
            ):
                files.write(path, text)
        return self._hash

    def _members(self, record: dict[str, Any]) -> Members:
        text = files.regular(self.directory / MEMBERS).read_text()
        if _hash(text) != record["members"]:
            raise ValueError("it is of another run")
        told = json.loads(text)
        return Members(told["names"], np.asarray(told["weights"], np.float64))

    def place(self) -> pathlib.Path:
        """The directory of clients' states that are too large for memory; made if it is missing."""
        self._open()
        path = self.directory / "clients"
        path.mkdir(self.mode, exist_ok=True)
        return path

    def _steps(self) -> list[int]:
        if not self.directory.exists():
            return []
        self._open().reload()  # another process may have saved
        return list(self._open().all_steps())

    def _read(self, step: int, item: str, how: str, *like: Any) -> Any:
        import orbax.checkpoint as ocp

        return self._open().restore(step, args=ocp.args.Composite(**{item: getattr(ocp.args, how)(*like)}))[item]

    def _damaged(self, step: int, name: str = "") -> str:
        earlier = [s for s in self._steps() if s < step]
        cure = f"to go on from round {max(earlier)}" if earlier else "to start afresh, there being no earlier one"
        what = f": {name} is not what was saved" if name else " and cannot be read"
        return f"The checkpoint {self.directory / str(step)} is corrupt{what}. Remove it {cure}."

    def _other_model(self, step: int, name: str) -> str:
        return (
            f"The checkpoint {self.directory / str(step)} leaves out {name}, which does not train, and the run that is "
            "to go on has another one: begin with the model that that run began with."
        )

    def _open(self) -> Any:
        if self._manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, enable_async_checkpointing=False, cleanup_tmp_directories=True, create=True
            )
            try:
                self.directory.mkdir(self.mode, parents=True, exist_ok=True)
                self._manager = ocp.CheckpointManager(self.directory, options=options)
            except OSError as error:
                raise InvalidInput(f"Checkpoints cannot be written to {self.directory}: {error.strerror}.") from error
        return self._manager


def _named(state: State) -> tuple[list[str], list[np.ndarray]]:
    """Names and arrays of a pytree. Names differ even if a key contains the separator."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_parts(state))
    roots = {0: "server", 1: "clients", 2: "best"}
    names = [roots[path[0].idx] + jax.tree_util.keystr(path[1:]) for path, _ in leaves]
    return names, [np.asarray(leaf) for _, leaf in leaves]


def _parts(state: State) -> tuple[PyTree, PyTree, PyTree]:
    """What of a state are arrays."""
    return state.server, state.clients, state.best


def _left_out(state: State, frozen: str) -> set[int]:
    """The numbers of the parameters that do not train, of the model and of the best one."""
    paths, _ = jax.tree_util.tree_flatten_with_path(_parts(state))
    found = set()
    for i, (path, _) in enumerate(paths):
        of_model = path[0].idx != 1 and len(path) > 2 and getattr(path[1], "name", "") == "params"
        if of_model and re.search(frozen, tree.leaf_name(path[2:])):
            found.add(i)
    return found


def _keyed(leaves: list[np.ndarray], left_out: Collection[int] = ()) -> dict[str, np.ndarray]:
    """The arrays as Orbax takes them: without empty ones, which Orbax cannot store."""
    return {str(i): x for i, x in enumerate(leaves) if x.size and i not in left_out}


def _shapes_on_disk(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """The arrays that Orbax would read, before it reads them."""
    import orbax.checkpoint as ocp

    if not path.exists():
        return {}
    held: Any = ocp.StandardCheckpointHandler().metadata(path)
    return {name: tuple(x.shape) for name, x in getattr(held, "tree", held).items()}


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest_of_record(record: dict[str, Any]) -> str:
    """A hash of the record."""
    told = [record[name] for name in ("run", "leaves", "members", "left_out") if name in record]  # not all have all
    return _hash(json.dumps(told, sort_keys=True))
