"""Components written as text: ``clip_by_global_norm(1.0)|sgd(0.1, momentum=0.9)``, read without running any of it.

A chain is ``name(value, key=value)`` joined by ``|``; a bare ``name`` is ``name()`` and empty text an empty chain.
A value is a number (also ``inf`` and ``nan``), text in quotes, True, False, None, a tuple or list of values, a nested
component ``name(...)``, or a placeholder ``{name}``, which gets its value when the chain is built. A dotted name is
looked up in the modules that ``--import`` gives (see ``outside``).
"""

import ast
import dataclasses
import difflib
import inspect
import math
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from experiments.config.components import Components
from fedjax_clip.core.types import InvalidInput

Registry = Mapping[str, Callable[..., Any]]
NONE_NESTED: Registry = types.MappingProxyType({})
NO_VALUES: Mapping[str, Any] = types.MappingProxyType({})
MAX_LENGTH = 10_000


@dataclasses.dataclass(frozen=True)
class Call:
    """``name(*args, **kwargs)``; an argument may be a ``Call`` or contain some."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Placeholder:
    """``{name}``, whose value comes later."""

    name: str


def parse(text: str, flag: str) -> list[Call]:
    """The calls of the chain ``text``, without looking up or running anything.

    Example:
      >>> parse("clip(1.0)|sgd(cosine(0.1, rounds=100))", "--client")[1].args
      (Call(name='cosine', args=(0.1,), kwargs={'rounds': 100}),)

    Raises:
      InvalidInput: text that is not such a chain; the message quotes the bad piece.
    """
    text = text.strip()
    if not text:
        return []
    if len(text) > MAX_LENGTH:
        raise InvalidInput(f"{flag}: {_quote(text)} has {len(text)} characters; at most {MAX_LENGTH} are read.")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidInput(f"{flag}: {_quote(text)} has bytes that are not UTF-8: give the file another name.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            node = ast.parse(text, mode="eval").body
        if ast.get_source_segment(text, node) != text:  # parentheses around it, or a comment behind it
            raise InvalidInput(f"{flag}: {_quote(text)} is more than a chain {_FORM}.")
        return _Reader(text, flag).chain(node)
    except InvalidInput:
        raise
    except (RecursionError, MemoryError):
        raise InvalidInput(f"{flag}: {_quote(text)} is nested too deeply.") from None
    except (SyntaxError, ValueError, Warning) as error:
        reason, *_ = str(getattr(error, "msg", None) or error).split(";")
        raise InvalidInput(f"{flag}: cannot read {_quote(text)}: {reason}.") from None


def build(
    text: str,
    registry: Registry,
    flag: str,
    nested: Registry = NONE_NESTED,
    values: Mapping[str, Any] = NO_VALUES,
) -> list[Any]:
    """Calls the components that ``text`` names, left to right.

    Args:
      text: a chain, as in ``parse``.
      registry: the components that the chain may name.
      flag: the source of the text, for error messages.
      nested: the components that an argument may name.
      values: of the placeholders.

    Example:
      >>> build("int('7')|float(2)", {"int": lambda text: int(text), "float": lambda x: float(x)}, "--numbers")
      [7, 2.0]

    Raises:
      InvalidInput: an unknown name or argument, a missing argument, or one that the component itself refuses.
    """
    return [_construct(call, registry, flag, nested, values) for call in parse(text, flag)]


def one(
    text: str,
    registry: Registry,
    flag: str,
    nested: Registry = NONE_NESTED,
    values: Mapping[str, Any] = NO_VALUES,
) -> Any:
    """As ``build``, where there must be exactly one component."""
    calls = parse(text, flag)
    if len(calls) != 1:
        raise InvalidInput(f"{flag}: exactly one component is needed, not {len(calls)} (valid: {_names(registry)}).")
    return _construct(calls[0], registry, flag, nested, values)


def placeholders(text: str, flag: str) -> set[str]:
    """The names of all ``{name}`` in a chain."""

    def names(value: Any) -> set[str]:
        if isinstance(value, Call):
            value = [*value.args, *value.kwargs.values()]
        if isinstance(value, Placeholder):
            return {value.name}
        return set().union(*map(names, value)) if isinstance(value, list | tuple) else set()

    return names(parse(text, flag))


_FORM = "name(value, key=value)|name(...)"


@dataclasses.dataclass(frozen=True)
class _Reader:
    text: str
    flag: str

    def chain(self, node: ast.expr) -> list[Call]:
        links: list[Call] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            links.append(self.call(node.right))
            node = node.left
        return [self.call(node), *reversed(links)]

    def call(self, node: ast.expr) -> Call:
        called = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name, kwargs = _dotted(called.func), {}
        if not name:
            self.refuse(node)
        for keyword in called.keywords:
            if keyword.arg is None or keyword.arg in kwargs:
                self.refuse(keyword)
            kwargs[keyword.arg] = self.value(keyword.value)
        return Call(name, tuple(self.value(x) for x in called.args), kwargs)

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | None | int() | str() as constant):
                if isinstance(constant, int) and constant >= 2**63:
                    raise InvalidInput(
                        f"{self.flag}: the number {_quote(str(constant))} is too large: 2**63 is the limit."
                    )
                return constant
            case ast.Constant(value=float() as number) if math.isfinite(number):  # 1e999 is not: write inf
                return number
            case ast.Name(id="inf" | "nan" as name):
                return float(name)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                number = self.value(operand)
                if isinstance(number, bool) or not isinstance(number, int | float):
                    self.refuse(node)
                return -number if isinstance(sign, ast.USub) else number
            case ast.Tuple(elts=items):
                return tuple(self.value(x) for x in items)
            case ast.List(elts=items):
                return [self.value(x) for x in items]
            case ast.Name() | ast.Attribute() | ast.Call():
                return self.call(node)
            case ast.Set(elts=[ast.Name(id=name)]):
                return Placeholder(name)
        self.refuse(node)

    def refuse(self, node: ast.expr | ast.keyword) -> NoReturn:
        piece = _quote(ast.get_source_segment(self.text, node) or self.text)
        raise InvalidInput(f"{self.flag}: {piece} cannot stand here; a chain is written {_FORM}, text in quotes.")


def _dotted(node: ast.expr) -> str:
    """``"my_module.fedexp"`` of the node of such a name; empty for any other."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=module, attr=name):
            return f"{_dotted(module)}.{name}" if _dotted(module) else ""
    return ""


def component(name: str, registry: Registry, flag: str, nested: Registry = NONE_NESTED) -> Callable[..., Any]:
    """The function of a name.

    Raises:
      InvalidInput: a name that stands for none here.
    """
    if "." in name:
        adopted = registry if isinstance(registry, Components) else Components(object, {})
        return adopted.outside(name, flag)
    if not registry:
        raise InvalidInput(f"{flag}: {_quote(name)} is not a value; text is written in quotes.")
    if name not in registry and name in nested:
        raise InvalidInput(f"{flag}: {_quote(name)} goes inside of one of these: {_names(registry)}.")
    if name not in registry:
        hint = f"unknown component {_quote(name)}{_nearest(name, registry)} (valid: {_names(registry)})"
        raise InvalidInput(f"{flag}: {hint}.")
    return registry[name]


def _construct(call: Call, registry: Registry, flag: str, nested: Registry, values: Mapping[str, Any]) -> Any:
    name, make = call.name, component(call.name, registry, flag, nested)
    nested = getattr(make, "nested", nested)  # a component may say what its own arguments may name

    def resolve(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(resolve(x) for x in value)
        if isinstance(value, Placeholder):
            if value.name not in values:
                raise InvalidInput(
                    f"{flag}: {{{value.name}}} has no value; experiments.sweep gives it some in --points."
                )
            return values[value.name]
        return _construct(value, nested, flag, nested, values) if isinstance(value, Call) else value

    _check_arguments(call, inspect.signature(make), flag)
    args, kwargs = resolve(call.args), {k: resolve(v) for k, v in call.kwargs.items()}
    try:
        return make(*args, **kwargs)
    except (TypeError, ValueError, ArithmeticError, OSError) as error:
        sentence = " ".join(str(error).split())
        named = sentence if sentence.startswith((f"{name} ", f"{name}: ")) else f"{name}: {sentence}"
        raise InvalidInput(f"{flag}: {named}") from error


def _check_arguments(call: Call, signature: inspect.Signature, flag: str) -> None:
    parameters = signature.parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    usage = f"{call.name}{inspect.Signature(bare)}"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    kinds = {p.kind for p in parameters}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for key in call.kwargs:
            if key not in named:
                hint = f"has no argument {_quote(key)}{_nearest(key, named)}"
                raise InvalidInput(f"{flag}: {call.name} {hint} (it is {usage}).")
    if inspect.Parameter.VAR_POSITIONAL not in kinds and len(call.args) > len(positional):
        extra = _quote(_show(call.args[len(positional)]))
        raise InvalidInput(f"{flag}: {call.name} has no place for the argument {extra} (it is {usage}).")
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise InvalidInput(f"{flag}: {call.name}: {error} (it is {usage}).") from None


def _show(value: Any) -> str:
    if isinstance(value, Placeholder):
        return f"{{{value.name}}}"
    return f"{value.name}(...)" if isinstance(value, Call) else repr(value)


def _nearest(name: str, valid: Mapping[str, Any] | list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {_quote(close[0])}?" if close else ""


def _names(registry: Registry) -> str:
    return ", ".join(sorted(registry))


def _quote(text: str) -> str:
    shown = repr(text if len(text) <= 80 else f"{text[:77]}...")
    return f'"{shown[1:-1]}"'
