"""What a run begins with: another run's state (--init), or its parameters (--init_params)."""

import hashlib
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import fedjax_clip as fc
from experiments.config import distributed, lock, rundir
from fedjax_clip.core import files, tree
from fedjax_clip.core.types import InvalidInput, Params
from fedjax_clip.training import going_on

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "init",
    None,
    "A run directory whose run goes on in this new one, maybe with more examples, other clients or other settings. The "
    "server and clients that stayed keep their states. --rounds counts the earlier rounds, too.",
)
flags.DEFINE_string("init_params", None, "A run directory whose params.npz training begins with; all else begins anew.")


class Origin(NamedTuple):
    """What a run begins with.

    Attributes:
      params: the initial parameters.
      state: to go on from; ``None`` if all else begins anew.
      record: for ``config.json``: where it comes from, with a hash. Empty if it comes from nowhere.
      rows: of the earlier rounds.
    """

    params: Params
    state: fc.extend.State | None = None
    record: Mapping[str, Any] = types.MappingProxyType({})
    rows: Sequence[fc.extend.Row] = ()

    def sentence(self, row: fc.extend.Row) -> str:
        """What carries over and what is new.

        Args:
          row: the first one.
        """
        where = self.record["init"]["directory"]
        kept, new, gone = (f"{row[f'clients_{name}']:.0f}" for name in ("kept", "new", "gone"))
        return (
            f"--init: goes on after round {row['went_on_from']:.0f} of {where}, with its server's "
            f"state and that of {kept} clients that stayed; {new} new clients begin afresh, and {gone} are gone."
        )


def check() -> None:
    """Refuses flags that contradict each other.

    Raises:
      InvalidInput: both flags; a run that claims an epsilon.
    """
    if FLAGS.init is not None and FLAGS.init_params is not None:
        raise InvalidInput("--init takes over the parameters, too: leave --init_params out.")
    for name in ("init", "init_params"):
        if FLAGS[name].value is not None and FLAGS.delta is not None:
            raise InvalidInput(
                f"--{name}: the epsilon of --delta is of this run's rounds alone, and {FLAGS[name].value} may have "
                f"learned from the same people: leave --{name} or --delta out."
            )


def read(algorithm: fc.extend.Algorithm, params: Params) -> Origin:
    """What the flags ask for.

    Args:
      algorithm: of this run.
      params: initial parameters of its model.

    Raises:
      InvalidInput: a directory without a run, without checkpoints, or of another model.
    """
    name = "init" if FLAGS.init is not None else "init_params"
    if FLAGS[name].value is None:
        return Origin(params)
    path = files.expanded(str(FLAGS[name].value))
    if not (path / "config.json").exists():
        raise InvalidInput(f"--{name}: {path} holds no run: name a run directory of experiments.run.")
    return _whole(path, algorithm, params) if name == "init" else _parameters(path, params)


def _whole(path: pathlib.Path, algorithm: fc.extend.Algorithm, params: Params) -> Origin:
    if not any(p.name.isdecimal() for p in (path / "checkpoints").glob("*")):
        raise InvalidInput(
            f"--init: {path} has no checkpoints, as a private run that is complete: take its parameters, "
            f"--init_params={path}."
        )
    if distributed.alone() and (path / ".lock").exists():
        try:
            os.close(lock.taken(path / ".lock"))
        except BlockingIOError:
            raise InvalidInput(f"--init: {path} is in use by another run: wait for its end, or stop it.") from None
    state = fc.extend.Checkpoints(path / "checkpoints").state(algorithm, params)
    if state.rounds >= FLAGS.rounds:
        raise InvalidInput(
            f"--rounds={FLAGS.rounds} counts the {state.rounds} rounds of --init={path}: ask for more than that."
        )
    rows = rundir.read_rows(path)[: state.rounds]
    if len(rows) < state.rounds:
        raise InvalidInput(f"--init: {path / 'metrics.jsonl'} lacks rows of rounds that are done: put the file back.")
    record = {"directory": str(path), "round": state.rounds, "hash": going_on.digest(state)}
    return Origin(state.server.params, state, {"init": record}, rows)


def _parameters(path: pathlib.Path, params: Params) -> Origin:
    file = files.regular(path / "params.npz")
    found, wanted = rundir.read_params(path), tree.flatten_with_names(params)
    for name in dict.fromkeys([*wanted, *found]):
        has, needs = (f"{x[name].dtype}{list(x[name].shape)}" if name in x else "no" for x in (found, wanted))
        if has != needs:
            raise InvalidInput(f"--init_params: {file} is of another model: it has {has} {name}, not {needs}.")
    leaves = [found[name] for name in wanted]
    record = {"directory": str(path), "hash": hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()}
    begin = jax.tree.unflatten(jax.tree.structure(params), [np.asarray(x) for x in leaves])
    return Origin(begin, record={"init_params": record})
