"""CommBench: every entry is built, the benchmark resumes, and the page quotes its report."""

import functools
import pathlib
import re

import pytest
from problems import softmax_loss

import fedjax_clip as fc
from experiments.bench import comm as commbench
from fedjax_clip.core.types import InvalidInput


def test_the_benchmark_goes_on_where_it_was_and_its_report_has_all_entries(tmp_path, capsys):
    texts = [text for texts in commbench.FAMILIES.values() for text in texts]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert isinstance(commbench.build(softmax_loss, text, 0.1), fc.extend.Algorithm), text
    run = functools.partial(commbench.bench, ["three_numbers"], ["none", "floats"], 2, tmp_path, quick=True)
    assert run(should_stop=lambda: True) == 0
    assert run() == 2
    assert run() == 0
    report = (tmp_path / "report.md").read_text()
    assert "| `floats(16)` |" in report
    assert "Fewest bytes up" in report
    assert "| 2 | 0 | 4 |" in report  # one number is always the same symbol of its own
    assert (tmp_path / "three_numbers.png").exists()
    with pytest.raises(InvalidInput, match="did you mean 'top_k'"):
        commbench.bench(["three_numbers"], ["topk"], 2, tmp_path)


def test_the_advice_quotes_the_report():
    """```entry` accuracy in N bytes`` and the table's rows in docs/compression.md are of docs/commbench/report.md."""
    docs = pathlib.Path(__file__).parents[3] / "docs"
    text = " ".join((docs / "compression.md").read_text().split())
    text = text[text.index("## Measured choices") : text.index("Sources are in")]
    found: dict[str, list[list[str]]] = {}
    for line in (docs / "commbench" / "report.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            found.setdefault(cells[0].strip("`"), []).append([cells[1].split()[0], cells[6], cells[8]])
    quoted = re.findall(r"`([^`]+)` (0\.\d{4})(?: in ([\d,]+) bytes)?", text)
    rows = re.findall(r"\| `([^`]+)`[^|]* \| ([\d,]+) \| (0\.\d{4}) \|", text)
    quoted += [(entry, accuracy, size) for entry, size, accuracy in rows]
    assert len(quoted) > 25
    for entry, accuracy, size in quoted:
        assert any(accuracy == row[0] and size in ("", *row[1:]) for row in found[entry]), (entry, accuracy, size)
