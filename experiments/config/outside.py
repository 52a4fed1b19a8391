"""Components from outside of this repository: ``--import=my_module``, then ``--algorithm="my_module.fedexp()"``.

A flag is text that is parsed without running code. ``--import`` is the only exception, so it is allowed on the command
line only and not in a flag file.
"""

import functools
import importlib
import inspect
import pathlib
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from absl import flags

from fedjax_clip.core.types import InvalidInput

FLAGS = flags.FLAGS


def define_flag() -> None:
    """Defines ``--import`` for a binary."""
    flags.DEFINE_multi_string(
        "import",
        [],
        "Modules of your own, joined by commas. This runs their code. Other flags may then name their functions, as in "
        '--import=my_module --algorithm="my_module.fedexp()". Python finds them in this directory and in $PYTHONPATH.',
    )


def modules() -> list[str]:
    """The names of the modules that ``--import`` gives, each once."""
    given = FLAGS["import"].value or [] if "import" in FLAGS else []
    return list(dict.fromkeys(name.strip() for text in given for name in text.split(",")))


def load() -> None:
    """Imports all modules of ``--import``. Call it after JAX is configured, because a module may use JAX.

    Raises:
      InvalidInput: a module that cannot be imported.
    """
    for name in modules():
        _imported(name)


def find(name: str, flag: str) -> Callable[..., Any]:
    """The function that a dotted name stands for.

    Args:
      name: ``"my_module.fedexp"``.
      flag: the flag that holds the name, for error messages.

    Example:
      >>> find("json.dumps", "--task")
      Traceback (most recent call last):
      ...
      fedjax_clip.core.types.InvalidInput: --task: "json.dumps" is from outside of the library: add --import=json, ...

    Raises:
      InvalidInput: a module that ``--import`` does not name or that cannot be imported, a name that it lacks, or
        something that is not a function.
    """
    module, _, attribute = name.rpartition(".")
    if module not in modules():
        raise InvalidInput(
            f'{flag}: "{name}" is from outside of the library: add --import={module}, which runs the code of that '
            "module, or write text in quotes."
        )
    found = getattr(_imported(module), attribute, None)
    if found is None:
        raise InvalidInput(f"{flag}: the module {module} has no {attribute}.")
    if not callable(found):
        raise InvalidInput(f"{flag}: {name} is not a function but of type {type(found).__name__}.")
    try:
        inspect.signature(found)
    except (TypeError, ValueError):
        raise InvalidInput(f"{flag}: {name} does not say which arguments it takes.") from None
    return found


def told(name: str, flag: str) -> Callable[..., Any]:
    """As ``find``, but any error inside the function becomes one sentence that names the function and the line."""
    found = find(name, flag)

    @functools.wraps(found)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return found(*args, **kwargs)
        except (InvalidInput, jax.errors.ConcretizationTypeError):  # fc.sweep explains the error of a swept number
            raise
        except Exception as error:
            raise InvalidInput(f"{name}: {_said(error)}{place(error)}.") from error

    called.__name__ = name
    return called


def checked(thing: Any, kind: Any, name: str) -> Any:
    """``thing``, the result of an outside function, if it is of the required kind."""
    if not isinstance(thing, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InvalidInput(f"{name} must return a thing of type {kinds}, not {type(thing).__name__}.")
    return thing


def fault(error: BaseException) -> str | None:
    """An error that an imported module raised while it ran, in one sentence; ``None`` if it is not from there."""
    return f"{_said(error)}{where}." if (where := place(error)) else None


def place(error: BaseException) -> str:
    """``" (my_module.py, line 7)"``: the last line of an imported module that an error passed; else nothing."""
    frames = [
        (f, line) for f, line in traceback.walk_tb(error.__traceback__) if f.f_globals.get("__name__") in modules()
    ]
    return f" ({pathlib.Path(frames[-1][0].f_code.co_filename).name}, line {frames[-1][1]})" if frames else ""


def _imported(name: str) -> ModuleType:
    if name.endswith((".py", ".py/")) or not all(part.isidentifier() for part in name.split(".")):
        file = pathlib.PurePath(name)
        if file.suffix == ".py" and file.stem.isidentifier():
            raise InvalidInput(f"--import={name} is a file: write --import={file.stem} for the file {file.name}.")
        raise InvalidInput(f"--import={name} is not the name of a module: write my_module for the file my_module.py.")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise InvalidInput(
                f"--import={name}: there is no module {error.name} here or in $PYTHONPATH: set PYTHONPATH to the "
                "directory that it is in."
            ) from None
        raise InvalidInput(f"--import={name} fails: {_said(error)}{place(error)}.") from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}".rstrip(".")
