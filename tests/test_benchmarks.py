"""The comparison with peers runs, and peers do the same work. No times are tested."""

import json
import pathlib
import subprocess
import sys

RUN = pathlib.Path(__file__).parents[1] / "benchmarks" / "peers" / "run.py"


def test_peers_agree(tmp_path):
    peers = ["fedjax_clip", "jax_loop"]
    arguments = ["--tiny", "--here", "--tasks=M,L", f"--peers={','.join(peers)}", "--laps=1", "--devices=2"]
    done = subprocess.run(
        [sys.executable, RUN, *arguments, f"--out={tmp_path / 'table'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "table.md").read_text()
    assert all(f"| {task} | {peer} | " in done.stdout for task in "ML" for peer in peers)
    entries = json.loads((tmp_path / "table.json").read_text())["entries"]
    assert [e["error"] for e in entries] == [None] * 4
    assert all(e["difference"] < 1e-4 for e in entries)
    assert [len(e["laps"]) for e in entries] == [1] * 4
