"""Draws the picture of the README, clip x track, from the tables of docs/clipbench/report.md.

  python benchmarks/clip_by_track.py docs/clip_by_track.png

A cell shows how far a rule ends behind the best rule of its track: the logarithm of the ratio of their errors, where 1
is a factor of 100, or the difference of their accuracies, where 1 is 0.1. ClipBench itself is not run again.
"""

import math
import pathlib
import re
import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

REPORT = pathlib.Path(__file__).parents[1] / "docs" / "clipbench" / "report.md"
UNCLIPPED = ("fedavg", "fedavg_server", "scaffold", "unclipped_memory")


def measured(text: str) -> tuple[dict[str, dict[str, float]], set[tuple[str, str]]]:
    """``{track: {rule: distance to the best}}``, NaN where a rule diverged, and the pairs that equal the best."""
    distances: dict[str, dict[str, float]] = {}
    equal = set()
    for section in text.split("\n## ")[1:]:
        track = section.splitlines()[0]
        rows = [line.split(" | ") for line in section.splitlines() if re.match(r"\| (\d+=?|–) \|", line)]
        scores = {row[1]: re.search(r"[\d.]+(e-?\d+)?", row[2]) for row in rows if "diverged" not in row[2]}
        values = {rule: float(score[0]) for rule, score in scores.items() if score}
        accuracy = "Measure: accuracy" in section
        best = next(iter(values.values()))  # the table is sorted
        distances[track] = {row[1]: math.nan for row in rows}
        for rule, value in values.items():
            distances[track][rule] = (best - value) / 0.1 if accuracy else math.log(value / best, 100)
    for line in text.split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0] in distances:
            equal |= {(cells[0], rule) for rule in [cells[1], *cells[3].split(", ")]}
    return distances, equal


def draw(path: str) -> None:
    """Writes the picture."""
    distances, equal = measured(REPORT.read_text())
    tracks = list(distances)
    means = {
        rule: np.mean([1.0 if math.isnan(d) else min(d, 1.0) for t in tracks for d in [distances[t][rule]]])
        for rule in distances[tracks[0]]
    }
    rules = sorted(means, key=means.__getitem__)
    table = np.array([[distances[track][rule] for rule in rules] for track in tracks])
    colours = plt.get_cmap("viridis_r").copy()
    colours.set_bad("0.25")
    figure, axes = plt.subplots(figsize=(12, 4.3), layout="constrained")
    image = axes.imshow(table, vmin=0, vmax=1, cmap=colours, aspect="auto")
    axes.set_xticks(range(len(rules)), rules, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
    for label, rule in zip(axes.get_xticklabels(), rules, strict=True):
        label.set_color("tab:red" if rule in UNCLIPPED else "black")
    axes.set_yticks(range(len(tracks)), tracks)
    for i, track in enumerate(tracks):
        for j, rule in enumerate(rules):
            if math.isnan(table[i, j]):
                axes.text(j, i, "×", color="white", ha="center", va="center")
            elif (track, rule) in equal:
                axes.text(j, i, "●", color="black", fontsize=7, ha="center", va="center")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.01)
    bar.ax.set_yticklabels(["best", "error ×10, or\naccuracy −0.05", "error ×100, or\naccuracy −0.10"], fontsize=8)
    axes.set_title("● not told apart from the best    × diverged    red: no clip", fontsize=10, loc="left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(sys.argv[1])
