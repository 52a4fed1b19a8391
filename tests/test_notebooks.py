"""The notebooks: each agrees with the script it is made from, and runs from top to bottom."""

import json
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from problems import EVERYTHING

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "colab").glob("*.py"))
PICTURES = {"quickstart": 4}
notebooks = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert {path.stem for path in SCRIPTS} == {path.stem for path in (ROOT / "colab").glob("*.ipynb")} != set()


@notebooks
def test_notebook_agrees_with_its_script(script):
    path = script.with_suffix(".ipynb")
    notebook, derived = nbformat.read(path, as_version=4), jupytext.read(script)
    nbformat.validate(notebook)
    remedy = f"run: jupytext --update --to ipynb {script.relative_to(ROOT)}"
    assert _cells(notebook) == _cells(derived), remedy
    assert notebook.metadata.jupytext.formats == derived.metadata.jupytext.formats == "ipynb,py:percent"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "Clear the outputs: they do not diff."


# Each notebook says how many host devices it wants. ``make strict`` also runs on_tpu on one chip and on four.
CHIPS = ("1", "4")
DEVICES = [(script, "") for script in SCRIPTS] + [(ROOT / "colab/on_tpu.py", n) for n in CHIPS if EVERYTHING]


@pytest.mark.parametrize(("script", "devices"), DEVICES, ids=lambda x: getattr(x, "stem", x))
def test_notebook_runs(script, devices, tmp_path, monkeypatch):
    kernel = tmp_path / "jupyter" / "kernels" / "this"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "this", "language": "python"}))
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # an accelerator may be held by the tests themselves
    monkeypatch.setenv("FEDJAX_CLIP_SHORT", "1")
    if devices:
        monkeypatch.setenv("CPU_DEVICES", devices)
    (tmp_path / "work").mkdir()

    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    NotebookClient(
        notebook,
        kernel_name="this",
        timeout=120,
        resources={"metadata": {"path": str(tmp_path / "work")}},
    ).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    shown = [output.data for output in outputs if "data" in output]
    unseen = [
        data["text/plain"] for data in shown if "<Figure" in data.get("text/plain", "") and "image/png" not in data
    ]
    assert unseen == [], "A figure is shown as its repr."
    assert sum("image/png" in data for data in shown) >= PICTURES.get(script.stem, 1)


def _cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]
