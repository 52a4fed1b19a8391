"""The page that classifies a drawn digit, in a headless Chromium."""

import json
import shutil

import browser
import jax
import numpy as np
import optax
import pytest
from browser import REPOSITORY, WAIT

import fedjax_clip as fc
from fedjax_clip import tasks


@pytest.mark.skipif(browser.missing() != "", reason=browser.missing())
@pytest.mark.filterwarnings("ignore")  # of jax2onnx
def test_a_drawn_digit_is_classified_in_a_browser(tmp_path):
    pytest.importorskip("jax2onnx")
    task = tasks.digits()
    algorithm = fc.fedavg(task.per_example_loss, optax.sgd(0.3))
    result = fc.train(algorithm, task.data, task.init(jax.random.key(0)), rounds=20)
    model = tasks.Model(task.predictor, result.params)
    shutil.copytree(REPOSITORY / "docs/browser", tmp_path / "site")
    fc.export.onnx(model, tmp_path / "site/digits.onnx")
    with browser.opened(tmp_path / "site", tmp_path / "profile") as (page, address):
        page.ask("Page.navigate", url=f"{address}?ort=/ort/")
        text = "document.getElementById('status')?.textContent"
        said = page.run(WAIT.format(found=f"{text} && !{text}.startsWith('Loading') && {text}"))
        assert said.startswith("Ready"), said
        turns = np.linspace(-np.pi / 2, 1.5 * np.pi, 25)
        drawings = {
            "0": [(0.5 + 0.22 * np.cos(a), 0.5 + 0.35 * np.sin(a)) for a in turns],
            "1": [(0.5, 0.1 + 0.1 * i) for i in range(9)],
        }
        for digit, points in drawings.items():
            page.run("document.getElementById('clear').click()")
            page.draw(points)
            assert page.run(WAIT.format(found="document.getElementById('digit').value")) == digit
        x = task.evaluation["clients"].examples["x"][:1]
        code = (
            f"import('./digits.js').then((page) => page.classify(Float32Array.from({json.dumps(x.ravel().tolist())})))"
        )
        np.testing.assert_allclose(page.run(code), model.predict(x).probability[0], atol=1e-5)
