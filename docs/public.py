"""What is public: the names that the API reference shows, and whose examples the tests run.

Public is what ``fc.__all__`` names, the rooms beside it, what these modules name in theirs, and so on. Each thing
counts once, under its shortest name.
"""

import ast
import functools
import inspect
import sys
import types
from collections import deque
from typing import Any

import fedjax_clip as fc

ROOMS = (
    "adapters",
    "clusters",
    "drift",
    "export",
    "fair",
    "personal",
    "sinks",
)  # modules that ``fc`` has without naming them in ``__all__``, which stays small


@functools.cache
def modules() -> dict[str, types.ModuleType]:
    """``{"fc": ..., "fc.uplink": ...}``: ``fc`` and the modules that it names, directly or through others."""
    found, new = {}, deque([("fc", fc), *((f"fc.{room}", getattr(fc, room)) for room in ROOMS)])
    while new:
        path, module = new.popleft()
        if module not in found.values():
            found[path] = module
            new.extend((f"{path}.{name}", thing) for name, thing in _named(module) if inspect.ismodule(thing))
    return found


@functools.cache
def names() -> dict[str, Any]:
    """``{"fc.train": ..., "fc.uplink.gaussian": ...}``: all that is public but modules, by its shortest name."""
    found: dict[str, Any] = {}
    taken: set[int] = set()
    for path, module in modules().items():
        for name, thing in _named(module):
            if not inspect.ismodule(thing) and id(thing) not in taken:
                found[f"{path}.{name}"] = thing
                taken.add(id(thing))
    return found


def _named(module: types.ModuleType) -> list[tuple[str, Any]]:
    """What a module names in ``__all__`` or, without one, the functions and classes that are its own."""
    if hasattr(module, "__all__"):
        return [(name, getattr(module, name)) for name in module.__all__]
    return [(n, t) for n, t in vars(module).items() if n[0] != "_" and getattr(t, "__module__", "") == module.__name__]


def methods(thing: type) -> dict[str, Any]:
    """The public methods and properties of a class that say something of themselves."""
    own = {name: value for name, value in vars(thing).items() if not name.startswith("_")}
    for attribute in ("__func__", "func", "fget"):  # class methods, cached properties, properties
        own = {name: getattr(value, attribute, value) for name, value in own.items()}
    return {name: value for name, value in own.items() if inspect.isfunction(value) and value.__doc__}


def described(thing: Any) -> bool:
    """Whether a thing has a docstring of its own: a function, a class, or a partial that was given one."""
    return inspect.isfunction(thing) or inspect.isclass(thing) or isinstance(thing, functools.partial)


def value(name: str) -> str:
    """What a constant or a type alias is set to, as the library's source has it."""
    last = name.rpartition(".")[2]
    for module in [m for path, m in sys.modules.items() if path.startswith("fedjax_clip.")]:
        for node in ast.parse(inspect.getsource(module)).body if getattr(module, last, None) is not None else ():
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == last for target in targets):
                return ast.unparse(node.value)
    return "..."
