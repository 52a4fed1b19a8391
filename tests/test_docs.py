"""The documentation: every public name is described, every example runs, every name that a page uses exists."""

import ast
import doctest
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import sys

import pytest

import fedjax_clip as fc

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))
import public  # noqa: E402 (it is in docs/, which is no package)

NAMES = public.names()
ELSEWHERE = {  # pages whose programs need what these tests have
    "scale.md",  # several devices and processes: tests/laws/devices, tests/training/test_processes.py
    "use-a-model.md",  # a run directory, a browser: tests/experiments/test_walk_through.py, test_browser.py
}


def examples():
    """``(name, docstring, names that it may use besides)`` of all that has an example, in the library and its pages."""
    things = [(name, thing, {}) for name, thing in NAMES.items()]
    known = {id(thing) for thing in NAMES.values()}
    for info in pkgutil.walk_packages(fc.__path__, "fedjax_clip."):
        own = vars(importlib.import_module(info.name))  # what is not public uses what its module does
        here = [t for t in own.values() if getattr(t, "__module__", "") == info.name and id(t) not in known]
        things += [(f"{info.name}.{thing.__qualname__}", thing, own) for thing in here if callable(thing)]
    for name, thing, own in things:
        members = public.methods(thing) if inspect.isclass(thing) else {}
        for of, value in {name: thing, **{f"{name}.{member}": value for member, value in members.items()}}.items():
            if ">>> " in (docstring := inspect.getdoc(value) or ""):
                yield pytest.param(docstring, own, id=of)
    for page in sorted(DOCS.rglob("*.md")):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        if blocks and page.name not in ELSEWHERE:
            yield pytest.param("\n".join(map(prompted, blocks)), {}, id=f"docs/{page.relative_to(DOCS)}")


def prompted(block):
    """A program as examples, a statement each; nothing if it is for a framework that is not installed."""
    if ">>> " in block:
        return block
    tree, lines, examples = ast.parse(block), block.splitlines(), []
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        )
        if any(importlib.util.find_spec(name.split(".")[0]) is None for name in filter(None, names)):
            return ""
    for node in tree.body:
        first = min(node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ())), node.lineno)
        examples += [(">>> " if n == first else "... ") + lines[n - 1] for n in range(first, node.end_lineno + 1)]
    return "\n".join(examples) + "\n"


@pytest.fixture(scope="module")
def namespace():
    """What ``docs/namespace.py`` defines, which the site shows."""
    return vars(importlib.import_module("namespace"))


class Checker(doctest.OutputChecker):
    """An example that shows no result is run, and may have one."""

    def check_output(self, want, got, flags):
        return not want or super().check_output(want, got, flags)


@pytest.mark.parametrize(("docstring", "own"), list(examples()))
def test_examples_run(docstring, own, namespace, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(docstring, {**namespace, **own}, request.node.callspec.id, None, None)
    flags, said = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL, []
    runner = doctest.DocTestRunner(Checker(), verbose=False, optionflags=flags)
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_only_what_needs_a_download_is_not_run():
    skipped = {p.id for p in examples() if "+SKIP" in p.values[0]}
    read = re.compile(
        r"fc\.(data\.sources|data\.tables|tasks)\.(\w*mnist|cifar|rdataset|shakespeare\w*|dialogues|tfds|tweets\w*)"
    )
    rest = {name for name in skipped if not read.fullmatch(name)}
    assert rest == {"fc.export.onnx", "docs/tasks/lora.md"}  # jax2onnx is no part of [dev]; the page reads SmolLM2


def test_a_public_name_has_an_example():
    assert [name for name, thing in NAMES.items() if public.described(thing) and ">>> " not in thing.__doc__] == []


def test_a_public_name_says_what_it_is_and_what_it_takes():
    wanting = []
    for name, thing in NAMES.items():
        docstring = inspect.getdoc(thing)
        if public.described(thing) and not docstring.split("\n\n")[0].endswith((".", ":")):
            wanting.append(f"{name}: the first line is no sentence")
        if inspect.isfunction(thing) and not re.search(r"\b([Aa]s|see)( for)? ``", docstring):
            takes = [p for p in inspect.signature(thing).parameters if not re.search(rf"(?<!\w){p}(?!\w)", docstring)]
            wanting += [f"{name}: {parameter} is not described" for parameter in takes]
    assert wanting == []


def test_sections_are_those_of_the_style():
    wanting = []
    for name, thing in NAMES.items():
        titles = re.findall(r"^(\w+):$", inspect.getdoc(thing) or "", re.MULTILINE)
        wanting += [f"{name}: {t}" for t in titles if t not in ("Args", "Attributes", "Returns", "Raises", "Example")]
    assert wanting == []


def test_arguments_are_listed_as_the_style_has_them():
    """``name: text`` or ``name, other: text``, of arguments that there are; what goes on is indented."""
    wanting = []
    for name, thing in NAMES.items():
        section = re.search(r"^Args:\n((?:  .*\n|\n)*)", (inspect.getdoc(thing) or "") + "\n", re.MULTILINE)
        for line in re.findall(r"^  (\S.*)", section.group(1) if section else "", re.MULTILINE):
            listed = re.match(r"((?:\*{0,2}\w+(?:, )?)+): ", line)
            takes = inspect.signature(thing).parameters
            if not listed or not {n.strip("*") for n in listed.group(1).split(", ")} <= set(takes):
                wanting.append(f"{name}: {line}")
    assert wanting == []


def test_names_in_the_documentation_exist():
    """``fc.train`` in a page, a notebook or a docstring is a name of the library."""
    texts = {
        path: path.read_text() for path in [ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "colab").glob("*.py")]
    }
    texts |= {path: path.read_text() for path in (ROOT / "fedjax_clip").rglob("*.py")}
    unknown = set()
    for path, text in texts.items():
        for name in re.findall(r"(?<![\w.])fc(?:\.[A-Za-z_]\w*)+", text):
            thing = fc
            for part in name.split(".")[1:]:
                if not inspect.ismodule(thing):
                    break  # a field of what a function gives, say
                if not hasattr(thing, part):
                    unknown.add(f"{path.relative_to(ROOT)}: {name}")
                    break
                thing = getattr(thing, part)
    assert sorted(unknown) == []


def test_the_binary_runs_what_the_page_writes(binaries, tmp_path, monkeypatch):
    """The algorithm, the clip and the link of "Write an algorithm", from a file outside of the repository."""
    page = (DOCS / "write-an-algorithm.md").read_text()
    blocks = [b for b in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if ">>> " not in b]
    assert max(len(block.splitlines()) for block in blocks) < 30
    (tmp_path / "own").mkdir()
    (tmp_path / "own/my_module.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path / "own")
    quick = ("--import=my_module", "--task=linear_regression(num_clients=6)", "--rounds=2", "--cohort_size=3")
    mine = (
        "--algorithm=my_module.fedexp()",
        "--client=my_module.clip_to_mean(2.0)|sgd(0.1)",
        "--uplink=my_module.signs()",
    )
    code, _, err = binaries("run", *quick, *mine, "--workdir=here")
    sys.modules.pop("my_module")
    assert code == 0, err
    assert "extrapolation" in (tmp_path / "here/metrics.jsonl").read_text()
