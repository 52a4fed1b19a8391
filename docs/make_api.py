"""Writes docs/api/: every public name of fedjax_clip, from its docstring.

  python docs/make_api.py           writes the pages
  python docs/make_api.py --check   exits with 1 if a page is not what would be written

Public are the names of ``fc.__all__``, what the modules among them hold, and the public methods of their classes.
"""

import ast
import functools
import inspect
import pathlib
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import fedjax_clip as fc

DIRECTORY = pathlib.Path(__file__).parent / "api"
WIDTH = 100

# The page of a part of the package (what follows ``fedjax_clip.`` in the module that defines a name), in reading order.
PAGES = {
    "Training and evaluation": ("training", "evaluation", "checkpoint"),
    "Algorithms": ("algorithms", "fedopt"),
    "Local work": ("local", "per_example"),
    "Clipping a step": ("clipping",),
    "Clipping what a client sends": ("uplink",),
    "Compression": ("compression",),
    "Aggregation and attacks": ("reduce", "attacks"),
    "Secure sums": ("secure", "homomorphic"),
    "Data and cohorts": ("data",),
    "Tasks and models": ("tasks", "models", "convolution"),
    "Pictures": ("plots",),
    "Building blocks": ("typing", "cohort", "exchange", "metrics", "placement", "tree"),
}
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example", "Source")


def public_names() -> dict[str, Any]:
    """``{"fc.train": function, ...}``: everything public once, under its shortest name; modules are not among them."""
    found: dict[str, Any] = {}
    modules: dict[str, types.ModuleType] = {}
    for name in fc.__all__:
        thing = getattr(fc, name)
        (modules if inspect.ismodule(thing) else found)[f"fc.{name}"] = thing
    taken = {id(thing) for thing in found.values()}
    for path, module in modules.items():
        for name in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]):
            thing = getattr(module, name)
            own = hasattr(module, "__all__") or getattr(thing, "__module__", None) == module.__name__
            if own and callable(thing) and id(thing) not in taken:
                found[f"{path}.{name}"] = thing
                taken.add(id(thing))
    return found


def page_of(name: str, thing: Any) -> str:
    """The title of the page on which a name stands."""
    defined = name if isinstance(thing, functools.partial) else thing.__module__
    part = defined.split(".")[1]
    return next((title for title, parts in PAGES.items() if part in parts), "Building blocks")


def methods(thing: type) -> dict[str, Any]:
    """The public methods and properties of a class that say something of themselves."""
    own = {name: value for name, value in vars(thing).items() if not name.startswith("_")}
    own = {name: getattr(value, "__func__", getattr(value, "func", value)) for name, value in own.items()}
    return {name: value for name, value in own.items() if inspect.isfunction(value) and value.__doc__}


def sections(docstring: str) -> tuple[str, dict[str, str]]:
    """The prose of a docstring, and its sections by name."""
    head = re.compile(rf"^({'|'.join(SECTIONS)}):(?=[ \n]|$) ?", re.MULTILINE)
    prose, *rest = head.split(inspect.cleandoc(docstring))
    return prose.strip(), {name: textwrap.dedent(text).strip("\n") for name, text in zip(rest[::2], rest[1::2])}


def signature(name: str, thing: Any) -> str:
    """How a function is called, or what a class holds, as written in its source."""
    if isinstance(thing, functools.partial):
        return f"{name} = functools.partial({thing.func.__name__}, {', '.join(f'{k}=...' for k in thing.keywords)})"
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None:
            given = [f"{ast.unparse(n.target)}" + (f"={ast.unparse(n.value)}" if n.value else "") for n in fields]
            return _call(name, given, "")
        node = init
    assert isinstance(node, ast.FunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    return _call(name, [a for a in _arguments(node.args) if a.split(":")[0] not in ("self", "cls")], returns)


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(positional, defaults, strict=True):
        yield _argument(argument, default)
    if arguments.vararg:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _argument(argument, default)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else "")


def _call(name: str, arguments: list[str], returns: str) -> str:
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= WIDTH or not arguments:
        return line
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){returns}"


def entry(name: str, thing: Any, level: int = 2) -> str:
    """One name: heading, signature, prose, sections."""
    prose, found = sections(thing.__doc__ or "")
    parts = [f"{'#' * level} `{name}`", f"```python\n{signature(name.split('.')[-1], thing)}\n```", _prose(prose)]
    for section, text in found.items():
        if section == "Example":
            parts.append(f"```python\n{text}\n```")
        elif section in ("Returns", "Source"):
            parts.append(f"**{section}.** {_prose(text)}")
        else:
            parts.append(f"**{section}**\n\n{_items(text)}")
    if inspect.isclass(thing):
        parts += [entry(f"{name}.{method}", value, level + 1) for method, value in methods(thing).items()]
    return "\n\n".join(parts)


def _items(text: str) -> str:
    """``name: text`` lines, with their continuations, as a list."""
    joined = re.sub(r"\n +", " ", text)
    items = [re.sub(r"^([\w*, ]+): ", r"`\1`: ", line) for line in joined.splitlines() if line]
    return "\n".join(f"- {_prose(item)}" for item in items)


def _prose(text: str) -> str:
    return text.replace("``", "`")


def pages() -> dict[str, str]:
    """``{file name: text}``, the index among them."""
    names = public_names()
    index = [
        "# API reference",
        "",
        "Made from the docstrings by `python docs/make_api.py`; `import fedjax_clip as fc`.",
    ]
    files = {}
    for title in PAGES:
        here = {name: thing for name, thing in names.items() if page_of(name, thing) == title}
        if not here:
            continue
        file = re.sub(r"\W+", "-", title.lower()) + ".md"
        files[file] = "\n\n".join([f"# {title}", *(entry(name, thing) for name, thing in here.items())]) + "\n"
        index += ["", f"## [{title}]({file})", "", "| name | is |", "|---|---|"]
        for name, thing in here.items():
            first = _prose((thing.__doc__ or "").split("\n\n")[0]).replace("\n", " ").replace("|", "\\|")
            anchor = re.sub(r"[^\w-]", "", name.lower())
            index.append(f"| [`{name}`]({file}#{anchor}) | {re.sub(' +', ' ', first).strip()} |")
    return {"README.md": "\n".join(index) + "\n", **files}


def main() -> None:
    """Writes the pages, or checks them."""
    wanted = pages()
    found = {path.name: path.read_text() for path in DIRECTORY.glob("*.md")}
    if "--check" in sys.argv:
        stale = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        sys.exit(f"run: python docs/make_api.py ({', '.join(stale)})" if stale else 0)
    DIRECTORY.mkdir(exist_ok=True)
    for name in found.keys() - wanted.keys():
        (DIRECTORY / name).unlink()
    for name, text in wanted.items():
        (DIRECTORY / name).write_text(text)


if __name__ == "__main__":
    main()
