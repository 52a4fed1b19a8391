"""The API reference, made while the site is built: a page for each public module, from ``__all__`` and docstrings.

``fc.name`` in double backticks is a link wherever a page or a docstring has it.
"""

import ast
import inspect
import pathlib
import re
import textwrap
import types
from typing import Any

import public
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

PAGES = pathlib.Path(__file__).parent / "api"
NAME = re.compile(r"(?:fc|jax|jnp|optax)(?:\.[A-Za-z_]\w*)+")
ALIASES = {"fc": "fedjax_clip", "jnp": "jax.numpy"}


def signature(thing: Any) -> tuple[str, str] | None:
    """``("(rounds: int = 100)", "Result")`` as the source has it, so that ``PerExampleLoss`` stays a word."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    except (TypeError, OSError, SyntaxError, ValueError):
        return None
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not inits:
            fields = [ast.unparse(n).replace(" = ", "=") for n in node.body if isinstance(n, ast.AnnAssign)]
            return f"({', '.join(fields)})", ""
        node = inits[0]
    if not isinstance(node, ast.FunctionDef):
        return None
    for arguments in (node.args.posonlyargs, node.args.args):
        arguments[:] = [a for a in arguments if a.arg not in ("self", "cls")]
    returns = ast.unparse(node.returns) if node.returns and node.name != "__init__" else ""
    return f"({ast.unparse(node.args)})", returns


def page(path: str, module: types.ModuleType) -> str:
    """A module's page in reStructuredText: what it is, a table of its names, each name."""
    where = path.replace("fc", "fedjax_clip", 1)
    names = {name: thing for name, thing in public.names().items() if name.rpartition(".")[0] == path}
    lines = [path, "=" * len(path), "", f".. automodule:: {where}", "   :no-members:", ""]
    lines += [".. list-table::", "   :widths: 25 75", "", *_row("name", "is")] if names else []
    for name, thing in names.items():
        first = (inspect.getdoc(thing) or "").split("\n\n")[0] if public.described(thing) else "a type or a constant"
        lines += _row(f":py:obj:`{_last(name)} <{where}.{_last(name)}>`", " ".join(first.split()))
    for name, thing in names.items():
        lines += ["", *_entry(f"{where}.{_last(name)}", thing)]
    return "\n".join(lines)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _row(*cells: str) -> list[str]:
    return [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(cells)]


def _entry(target: str, thing: Any) -> list[str]:
    """What autodoc makes of one name."""
    if not public.described(thing):
        return [f".. py:data:: {target}", f"   :value: {public.value(_last(target))}"]
    if not inspect.isclass(thing):
        return [f".. autofunction:: {target}"]
    members = ", ".join(public.methods(thing))
    head = f".. autoexception:: {target}(message)" if issubclass(thing, Exception) else f".. autoclass:: {target}"
    return [head, f"   :members: {members}"] if members else [head]


def write_pages(app: Any) -> None:
    """Writes ``docs/api/``; a page that would stay as it is keeps its date, and Sphinx its copy."""
    files = {f"{path}.rst": page(path, module) for path, module in public.modules().items()}
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob("*"):
        if old.name not in files:
            old.unlink()
    for name, text in files.items():
        if not (PAGES / name).exists() or (PAGES / name).read_text() != text:
            (PAGES / name).write_text(text)


def show_signature(app: Any, what: str, name: str, thing: Any, options: Any, given: str | None, returns: str | None):
    """Sphinx's hook: ``signature`` of functions, classes and methods."""
    return signature(thing) if what in ("function", "method", "class") else None


def name_source(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's hook, before Napoleon: the one section that Google's style lacks."""
    lines[:] = [re.sub(r"^Source: ", "**Source.** ", line) for line in lines]


class LinkNames(SphinxPostTransform):
    """Makes a link of each literal that begins with a name of ours, of JAX or of optax: ``fc.train(...)`` too."""

    default_priority = 5  # before references are resolved

    def run(self, **kwargs: Any) -> None:
        """Wraps the literals of a page."""
        for literal in list(self.document.findall(nodes.literal)):
            name = NAME.match(literal.astext())
            if name is None or isinstance(literal.parent, nodes.reference | addnodes.pending_xref | nodes.title):
                continue
            first, _, rest = name.group().partition(".")
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=f"{ALIASES.get(first, first)}.{rest}",
                refdoc=self.env.docname,
                refexplicit=True,
                refwarn=False,
            )
            literal.replace_self(link)
            link += literal


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-signature", show_signature)
    app.connect("autodoc-process-docstring", name_source, priority=400)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
