"""What the processes of a run must agree on before they compute together: else they would wait for each other."""

import functools
import hashlib
import importlib.metadata
import pathlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.training import identity
from fedjax_clip.training.evaluation import Evaluator
from fedjax_clip.training.processes import Processes
from fedjax_clip.training.settings import Settings

PACKAGES = ("jax", "jaxlib", "numpy", "optax")
PATIENCE = (
    15.0  # seconds until a file that one process has written must be seen by all: a network file system may take some
)


def check(run: Settings) -> None:
    """Ends all processes of a run with one sentence, unless they agree on all that it depends on.

    Raises:
      InvalidInput: other code, data, settings or devices; checkpoints in a directory that they do not share.
    """
    if run.processes.count == 1:
        return
    run.processes.agree(facts(run))
    directory = getattr(run.checkpoints, "directory", None)
    if directory is not None:
        share(run.processes, directory, getattr(run.checkpoints, "mode", 0o777))
    newest = getattr(run.checkpoints, "newest", None)
    if newest is not None:
        found = newest()
        run.processes.agree({"the newest checkpoint": "none" if found is None else f"round {found}"}, ONE_DIRECTORY)


ONE_DIRECTORY = "Name one directory that all hosts share, on a network file system."


def facts(run: Settings) -> dict[str, str]:
    """All that must be the same in all processes, by names that appear in the error."""
    names, leaves = (
        zip(*jax.tree.leaves_with_path(run.params), strict=True) if jax.tree.leaves(run.params) else ((), ())
    )
    settings = {
        "rounds": run.rounds,
        "eval_every": run.eval_every if run.evaluate is not None else None,
        "checkpoint_every": run.checkpoint_every if run.checkpoints is not None else None,
        "clients_per_chunk": run.clients_per_chunk,
        "rounds_per_dispatch": run.rounds_per_dispatch,
        "non_finite": run.non_finite,
        "jax_enable_x64": bool(jax.config.jax_enable_x64),  # type: ignore[attr-defined]
    }
    code = {f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    params = {
        f"the initial parameters {jax.tree_util.keystr(name)}": f"blake2b:{identity.digest(np.asarray(x))}"
        for name, x in zip(names, leaves)
    }
    return {
        **code,
        "the code of fedjax_clip": f"blake2b:{_code()}",
        **identity.identify(run.algorithm, run.data, run.sampler, run.work, run.seed),
        **{name: str(value) for name, value in settings.items()},
        "secret": "None" if run.secret is None else f"blake2b:{run.secret.commitment}",
        "evaluate": _evaluation(run.evaluate),
        "devices": ", ".join(map(str, run.devices)),
        **params,
    }


def _evaluation(evaluate: Any) -> str:
    if not isinstance(evaluate, Evaluator):
        return "None" if evaluate is None else "a function"
    sets: Mapping[str, Any] = evaluate.sets
    return ", ".join(f"{name} of {data.num_examples} examples" for name, data in sets.items())


@functools.cache
def _code() -> str:
    """A hash of the library's source files."""
    root, found = pathlib.Path(__file__).parents[1], hashlib.blake2b(digest_size=16)
    for file in sorted(root.rglob("*.py")):
        found.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def share(processes: Processes, directory: pathlib.Path, mode: int = 0o777) -> None:
    """Ends all processes with one sentence unless this is one directory to them all: the first writes, all must see it.

    Args:
      processes: that call this together.
      directory: created if it does not exist.
      mode: permissions of a new directory.

    Raises:
      InvalidInput: a directory that cannot be written, or that is another one in some process.
    """
    token = processes.first(secrets.token_hex(8))
    file = directory / f".shared-{token}"
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
    blind = [str(p) for p, sees in enumerate(processes.gather(seen)) if not sees]
    if processes.number == 0:
        file.unlink(missing_ok=True)
    if blind:
        raise InvalidInput(
            f"What process 0 writes to {directory} is not seen by process{'es' * (len(blind) > 1)} "
            f"{', '.join(blind)}. {ONE_DIRECTORY}"
        )
