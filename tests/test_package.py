"""The package as a whole: its layers, its names, its weight, its memory, and what the README promises."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import fedjax_clip as fc

REPOSITORY = pathlib.Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()

# Each may import from those in the layers before it, so there is no circle.
LAYERS = [
    {"core"},
    {"clipping", "compression", "placement", "reduce"},
    {"uplink", "data"},
    {"attacks", "local"},
    {"algorithms", "models"},
    {"secure", "training"},
    {"deploy", "privacy", "tasks", "plots", "sinks"},
    {"adapters", "clusters", "drift", "export", "extend", "fair", "personal"},
    {"__init__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted((REPOSITORY / "fedjax_clip").rglob("*.py"))


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedjax_clip":
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "experiments":
            yield "experiments"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_only_point_down(path):
    parts = path.relative_to(REPOSITORY / "fedjax_clip").with_suffix("").parts
    for name in imports_of(path):
        assert name == parts[0] or RANK[name] < RANK[parts[0]], f"{path} imports fedjax_clip.{name}"


def test_clients_are_mapped_and_reduced_in_two_files_only():
    mapping = re.compile(r"jax\.(vmap|pmap|shard_map|lax\.(psum|all_gather|scan))\b")
    package = REPOSITORY / "fedjax_clip"
    users = {str(p.relative_to(package)) for p in MODULES if mapping.search(p.read_text())}
    examples = {"local/gradients.py", "training/evaluation.py"}
    trainings = {"training/lanes.py", "privacy/canaries.py"}
    large = {"models/llama.py", "models/dense.py"}  # token by token; half of a matrix by half
    reducers = {"core/exact.py", "reduce/base.py", "reduce/modular.py", "reduce/stack.py"}
    rounds = {"core/cohort.py", "algorithms/exchange.py", "training/placement.py"}
    assert users <= rounds | reducers | examples | trainings | large


def public_names():
    for name in fc.__all__:
        value = getattr(fc, name)
        yield f"fc.{name}", value
        if inspect.ismodule(value):
            for member, thing in vars(value).items():
                if not member.startswith("_") and getattr(thing, "__module__", None) == value.__name__:
                    yield f"fc.{name}.{member}", thing


def test_every_public_name_has_a_docstring():
    missing = [name for name, thing in public_names() if not inspect.getdoc(thing)]
    assert not missing


def test_importing_is_light_and_touches_no_device():
    heavy = ("flax", "matplotlib", "orbax", "scipy", "sklearn", "tensorflow", "tensorflow_datasets", "torch")
    code = f"""
import sys, fedjax_clip
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was started"
found = [name for name in {heavy} if name in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=REPOSITORY)


def test_memory_does_not_grow_with_the_cohort():
    def peak(cohort_size):
        command = [sys.executable, "benchmarks/memory.py", str(cohort_size)]
        return float(subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, text=True).stdout)

    assert peak(20_000) < 1.5 * peak(20)


def test_the_readme_example_runs_as_written(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 15
    scope = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["result"].history[-1]["eval/clients/accuracy"] > 0.9


def test_the_readme_names_files_that_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"`((?:fedjax_clip|experiments|docs|colab)/[^`*]*)`", README
    ):
        if not target.startswith("http"):
            assert (REPOSITORY / target).exists(), target


def test_the_surface_is_small_and_nothing_in_it_hides_a_module():
    assert len(fc.__all__) <= 35  # the 35th, placement, is what a user of several devices needs
    for path in MODULES:
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        if parts[-1] == "__init__" or not path.read_text():
            continue
        module = importlib.import_module(".".join(parts))
        parent = importlib.import_module(".".join(parts[:-1]))
        assert getattr(parent, parts[-1], module) is module, f"{'.'.join(parts)} is hidden by a thing of its name"
