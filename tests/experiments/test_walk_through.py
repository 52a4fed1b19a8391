"""From a CSV file of five hospitals to a tuned, private model that predicts new patients, in Python and in a browser."""

import csv
import json

import browser
import numpy as np
import pytest

from fedjax_clip import tasks

BOUNDS = "age:0:120;blood:0:300;sex:f,m;died:no,yes"
TASK = f"--task=csv('train.csv', 'died', by='hospital', bounds='{BOUNDS}', held_out_clients=0.2, balance='client')"
RUN = """(async () => {{
  const ort = await import("/ort/ort.wasm.min.mjs");
  Object.assign(ort.env.wasm, {{ wasmPaths: "/ort/", numThreads: 1 }});
  const session = await ort.InferenceSession.create("/model.onnx");
  const x = new ort.Tensor("float32", Float32Array.from({values}.map((v) => v ?? NaN)), {shape});
  return Array.from((await session.run({{ x }})).y.data);
}})()"""


def hospitals(path, sizes, seed):
    """Patients of whom a tenth died, those with much in their blood; a tenth of the values is missing."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "hospital", "age", "blood", "sex", "died"])
        for hospital, size in zip("abcde", sizes):
            blood = rng.normal(100, 20, size)
            died = blood + rng.normal(0, 6, size) > 126
            died[:2] = True, False
            for i in range(size):
                row = [int(rng.integers(20, 90)), f"{blood[i]:.1f}", rng.choice(["f", "m"])]
                row = ["" if rng.random() < 0.1 else value for value in row]
                writer.writerow([f"{hospital}{i}", hospital, *row, "yes" if died[i] else "no"])


def test_five_hospitals_from_a_file_to_a_browser(binaries, tmp_path):
    def done(*arguments):
        code, out, err = binaries(*arguments)
        assert code == 0, err
        return out

    hospitals("train.csv", (20, 60, 150, 300, 600), 0)
    hospitals("new.csv", (5, 5, 5, 5, 5), 1)
    points = "--points=grid(lr=(0.1, 3.0))"
    done("sweep", TASK, "--client=sgd({lr})", points, "--metric=examples/auroc", "--rounds=3", "--workdir=tuned")
    best = (tmp_path / "tuned/best.flags").read_text()
    assert "auroc" in best
    (client,) = [line for line in best.splitlines() if line.startswith("--client=")]
    private = ("--sampler=poisson", "--delta=1e-2", "--target_epsilon=5", "--cohort_size=2")
    uplink = "--uplink=clip_by_global_norm(0.5)|gaussian()"
    out = done("run", TASK, client, *private, uplink, "--rounds=3", "--workdir=run")
    assert "epsilon" in out
    assert json.loads((tmp_path / "run/model.json").read_text())["output"]["classes"] == ["no", "yes"]

    out = done("predict", "run", "new.csv")
    assert "of 25 rows whose died is known: accuracy" in out
    with open("predictions.csv", newline="") as file:
        told = [float(row["probability_yes"]) for row in csv.DictReader(file)]
    model = tasks.load("run")
    np.testing.assert_allclose(model.predict("new.csv").probability[:, 1], told, rtol=1e-6)

    pytest.importorskip("jax2onnx")
    (tmp_path / "site").mkdir()
    done("export", "run", "--to=onnx", "--out=site/model.onnx")
    x = model.encode("new.csv")
    onnxruntime = pytest.importorskip("onnxruntime")
    (found,) = onnxruntime.InferenceSession("site/model.onnx").run(None, {"x": x})
    np.testing.assert_allclose(found[:, 1], told, atol=1e-5)

    if why := browser.missing():
        pytest.skip(f"all but the browser is done: {why}")
    values = [None if np.isnan(v) else v for v in x.ravel().tolist()]
    (tmp_path / "site/index.html").write_text("<!doctype html><title>model</title>")
    with browser.opened(tmp_path / "site", tmp_path / "profile") as (page, address):
        page.ask("Page.navigate", url=address)
        page.run(browser.WAIT.format(found="location.href.startsWith('http') && document.readyState == 'complete'"))
        found = page.run(RUN.format(values=json.dumps(values), shape=json.dumps(x.shape)))
    np.testing.assert_allclose(np.reshape(found, (-1, 2))[:, 1], told, atol=1e-5)
