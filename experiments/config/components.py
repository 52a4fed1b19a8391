"""Groups of functions that flags may name: read from modules, with arguments filled in, all of one kind."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from experiments.config import outside

Make = Callable[..., Any]


class Components(dict[str, Make]):
    """The functions that a flag may name at one place.

    Args:
      kind: the type, or types, that all of them return. A function from outside must return it, too.
      makers: functions by name.
      fit: applied to each function, also one from outside, before a flag calls it; it may fill arguments in.
    """

    def __init__(
        self,
        kind: Any,
        makers: Mapping[str, Make],
        fit: Callable[[Make], Make] = lambda make: make,
    ):
        super().__init__((name, fit(makers[name])) for name in sorted(makers))
        self.kind, self.fit = kind, fit

    def outside(self, name: str, flag: str) -> Make:
        """The function of a dotted name, held to the kind."""
        make = self.fit(outside.told(name, flag))

        @functools.wraps(make)
        def build(*args: Any, **kwargs: Any) -> Any:
            return outside.checked(make(*args, **kwargs), self.kind, name)

        return build


def read(module: Any, kind: type, without: Collection[str] = ()) -> dict[str, Make]:
    """The functions of a module that are annotated to return ``kind``, by name.

    Args:
      module: its ``__all__`` is read, or its own definitions if it has none.
      kind: a type.
      without: names to leave out.
    """
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
    found = {}
    for name in getattr(module, "__all__", own):
        make = vars(module).get(name)  # what is not there yet is a module that needs an extra, such as fc.privacy
        returned = inspect.get_annotations(make).get("return") if inspect.isfunction(make) else None
        if inspect.isclass(returned) and issubclass(returned, kind) and name[0] != "_" and name not in without:
            found[name] = make
    return found


def signed(make: Make, signature: inspect.Signature) -> Make:
    """``make`` itself, which then says that it takes the arguments of ``signature``."""
    vars(make)["__signature__"] = signature
    return make


def filled(make: Make, **known: Any) -> Make:
    """``make`` with the arguments that the binary fills in, which a flag cannot give."""
    signature = inspect.signature(make)
    left = signature.replace(parameters=[p for name, p in signature.parameters.items() if name not in known])

    @functools.wraps(make)
    def build(*args: Any, **kwargs: Any) -> Any:
        given = known | left.bind(*args, **kwargs).arguments
        ordered = {name: given[name] for name in signature.parameters if name in given}
        whole = inspect.BoundArguments(signature, ordered)
        return make(*whole.args, **whole.kwargs)

    return signed(build, left)


def later(make: Make, count: int) -> Make:
    """``make`` whose first ``count`` arguments come later: ``(own arguments) -> (first arguments) -> thing``."""
    signature = inspect.signature(make)
    own = signature.replace(parameters=list(signature.parameters.values())[count:])

    @functools.wraps(make)
    def build(*args: Any, **kwargs: Any) -> Make:
        given = own.bind(*args, **kwargs)
        return lambda *first: make(*first, *given.args, **given.kwargs)

    return signed(build, own)


def defaulted(make: Make, **defaults: Any) -> Make:
    """``make`` with defaults for keyword arguments that the library leaves to its user."""
    signature = inspect.signature(make)
    build = functools.wraps(make)(lambda *args, **kwargs: make(*args, **(defaults | kwargs)))
    shown = [p.replace(default=defaults.get(p.name, p.default)) for p in signature.parameters.values()]
    return signed(build, signature.replace(parameters=shown))
