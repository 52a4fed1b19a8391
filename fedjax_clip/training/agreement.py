"""What the processes of a run must agree on before they compute together: else one would wait for the others."""

import functools
import hashlib
import importlib.metadata
import pathlib
import secrets
import time

import jax
import numpy as np

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.training import going_on, identity
from fedjax_clip.training.evaluation import Evaluator
from fedjax_clip.training.processes import Processes
from fedjax_clip.training.settings import Evaluate, Settings

PACKAGES = ("jax", "jaxlib", "numpy", "optax")
PATIENCE = 15.0  # seconds until all must see a file that one process has written: a network file system may take some
ONE_DIRECTORY = "Name one directory that all hosts share, on a network file system."


def check(run: Settings, known: identity.Identity) -> None:
    """Ends all processes of a run with one sentence, unless they agree on all that it depends on.

    Args:
      run: the settings.
      known: the run's identity, if it was computed already.

    Raises:
      InvalidInput: other code, data, settings or devices; checkpoints in a directory that they do not share.
    """
    if run.processes.count == 1:
        return
    known = known or identity.identify(run.algorithm, run.data, run.sampler, run.work, run.seed)
    run.processes.agree(facts(run) | known)
    if run.data.own is not None:
        check_parts(run)
    if (directory := getattr(run.checkpoints, "directory", None)) is not None:
        share(run.processes, directory, getattr(run.checkpoints, "mode", 0o777))
    if (newest := getattr(run.checkpoints, "newest", None)) is not None:
        run.processes.agree({"the round of the newest checkpoint": str(newest())}, ONE_DIRECTORY)


def check_parts(run: Settings) -> None:
    """Ends all processes with one sentence unless each client is opened by one of them."""
    held = run.processes.gather(run.data.own)
    if (wrong := np.flatnonzero(held.sum(0) != 1)).size:
        who = np.flatnonzero(held[:, wrong[0]]).tolist()
        told = f"by processes {', '.join(map(str, who))}" if who else "by no process"
        raise InvalidInput(f"Client {run.data.name(int(wrong[0]))!r} is opened {told}: each must be opened by one.")


def facts(run: Settings) -> dict[str, str]:
    """What must be the same in all processes besides a run's identity, by names that appear in the error."""
    settings = {
        "rounds": run.rounds,
        "eval_every": run.eval_every if run.evaluate is not None else None,
        "checkpoint_every": run.checkpoint_every if run.checkpoints is not None else None,
        "clients_per_chunk": run.clients_per_chunk,
        "rounds_per_dispatch": run.rounds_per_dispatch,
        "non_finite": run.non_finite,
        "jax_enable_x64": bool(jax.config.jax_enable_x64),  # type: ignore[attr-defined]
        "whether data is opened in parts": run.data.own is not None,
        "devices": ", ".join(map(str, run.devices)),
        "evaluate": _told(run.evaluate),
    }
    hidden = {
        "the code of fedjax_clip": _code(),
        "the state to go on from": "" if run.state is None else going_on.digest(run.state),
        "secret": "" if run.secret is None else run.secret.commitment,
        **{
            f"the initial parameters {jax.tree_util.keystr(path)}": identity.digest(np.asarray(x))
            for path, x in jax.tree.leaves_with_path(run.params)
        },
    }
    return {
        **{f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES},
        **{name: identity.hashed(value) for name, value in hidden.items()},
        **{name: str(value) for name, value in settings.items()},
    }


def _told(evaluate: Evaluate | None) -> str:
    """What is evaluated, as far as it can be compared."""
    if not isinstance(evaluate, Evaluator):
        return "None" if evaluate is None else "a function"
    return ", ".join(f"{name} of {data.num_examples} examples" for name, data in evaluate.sets.items())


@functools.cache
def _code() -> str:
    """A hash of the library's source files."""
    root, found = pathlib.Path(__file__).parents[1], hashlib.blake2b(digest_size=16)
    for file in sorted(root.rglob("*.py")):
        found.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def share(processes: Processes, directory: pathlib.Path, mode: int = 0o777) -> None:
    """Ends all processes with one sentence unless this is one directory to all: what the first writes, all must see.

    Args:
      processes: those that call this together.
      directory: created if it does not exist.
      mode: permissions of a new directory.

    Raises:
      InvalidInput: a directory that cannot be written, or that is another one in some process.
    """
    file = directory / f".shared-{processes.first(secrets.token_hex(8))}"
    with processes.together():
        if processes.number == 0:
            try:
                directory.mkdir(mode, parents=True, exist_ok=True)
                file.touch(0o600)
            except OSError as error:
                raise InvalidInput(f"{directory} cannot be written: {error.strerror}.") from error
    deadline = time.monotonic() + PATIENCE
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [str(process) for process, sees in enumerate(processes.gather(seen)) if not sees]
    if processes.number == 0:
        file.unlink(missing_ok=True)
    if blind:
        raise InvalidInput(
            f"What process 0 writes to {directory} is not seen by process{'es' * (len(blind) > 1)} "
            f"{', '.join(blind)}. {ONE_DIRECTORY}"
        )
