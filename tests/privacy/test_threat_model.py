"""The threat model names tests that exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs" / "threat-model.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page)
    assert len(named) > 20
    for file, test in named:
        (path,) = (ROOT / "tests").rglob(file)
        text = path.read_text()
        assert not test or re.search(rf"^def {test}\(", text, re.M), f"{file}::{test}"
