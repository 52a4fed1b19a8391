"""What ClipBench found: how each rule stands on each track, as a table and as a picture."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.bench.standings import QUARTERS, Standing, ranks
from experiments.bench.tracks import Track

KNOBS = "client_lr", "threshold", "server_lr"


def report(standings: Sequence[tuple[Track, Sequence[Standing]]], quick: bool) -> str:
    """The report in Markdown: who wins where, then a table for each track."""
    lines = ["# ClipBench", "", "**Who wins where**" + (" (quick: too few rounds to say)" if quick else ""), ""]
    lines += ["| track | first | measure | not told apart from it | diverged |", "|---|---|---|---|---|"]
    for track, rows in standings:
        first, *rest = rows
        winner = "nobody" if first.diverged else first.name
        equal = ", ".join(r.name for r in rest if r.equals(first, len(rest))) or "–"
        lost = ", ".join(r.name for r in rows if r.diverged) or "–"
        lines.append(f"| {track.name} | {winner} | {measure(track)} {first.value()} | {equal} | {lost} |")
    lines += ["", *HOW]
    for track, rows in standings:
        lines += ["", f"## {track.name}", "", f"![{track.name}]({file_name(track)}.png)", "", describe(track)]
        others = list(track.measures)[1:]
        head = ["rank", "rule", measure(track), "to the first", *others, *KNOBS, "at an end"]
        head = [*head, "failed", "near", "gradients", "B up", "B down", "s a run", "compile s", "clips"]
        head += [f"best trial by quarter of the threshold's range: {measure(track)}"]
        lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for rank, row in zip(ranks(rows), rows, strict=True):
            failed, near, half = row.tried()
            cells = [rank, row.name, row.value(), compared(row, rows), *(f"{row.other(k):.4g}" for k in others)]
            cells += [*map(row.knob, KNOBS), row.ends() or "–", f"{failed} of {len(row.entry['trials'])}"]
            cells += [f"{near} of {half}", f"{row.rule.gradients(track.steps)}"]
            cells += [f"{row.traffic(k):,.0f}" for k in ("bytes_up", "bytes_down")]
            cells += [f"{row.entry['run_seconds']:.2g}", f"{row.entry['compile_seconds']:.1f}"]
            lines.append("| " + " | ".join([*cells, row.rule.note.replace("|", "\\|"), _profile(row)]) + " |")
    return "\n".join(lines) + "\n"


HOW = [
    "**How.** On a track each rule has the same number of trials, each of which is a point of its own knobs: half of "
    "them are spread over the knobs' ranges, half around the best of those (`experiments/bench/tuning.py`). FedAvg "
    "spends all of them on its rate. The best trial is measured on other runs: on other seeds, and for `digits` and "
    "`fashion_mnist` on clients or pictures that no trial has seen.",
    "",
    "**Scores** are means over the measuring runs, geometric means of errors. Brackets are 95% intervals. A run has "
    "diverged if any update of it was not finite, or its error ended over a million; such a rule has no rank. Ranks "
    "are those of the digits shown.",
    "",
    "**To the first**: the difference of accuracies (ratio of errors) to the first rule, run by run, and its 95% "
    "interval, corrected by Bonferroni for all comparisons with it. *Not told apart*: it holds 0 (1).",
    "",
    "**At an end**: knobs whose best value stands in the outer 5% of their range, so that a better one may lie "
    "outside. *Failed*: trials that diverged. *Near*: trials of the first half within a factor of two (2% of accuracy) "
    "of the best trial: the more, the easier to tune. The last column is of the tuning runs, not of the measuring.",
    "",
    "**Costs**: gradients on one batch, and bytes, of a client and round; processor seconds of one whole run, on a "
    "machine with other work.",
]


def describe(track: Track) -> str:
    """The track's numbers, in sentences."""
    window = track.measures[measure(track)].window
    over = f" over the last {window} rounds" if window > 1 else ""
    ranges = ", ".join(f"`{k}` {r.low:g} to {r.high:g}" for k, r in track.ranges.items())
    return (
        f"{track.rounds} rounds, {track.cohort_size} of {track.data.num_clients} clients in each. Measure: "
        f"{measure(track)}{over}, on {len(track.measuring)} runs; knobs chosen by {track.trials} trials on "
        f"{len(track.tuning)} others. "
        f"Ranges: {ranges}."
    )


def compared(row: Standing, rows: Sequence[Standing]) -> str:
    """The difference or ratio to the first, with its corrected interval."""
    first = rows[0]
    if row is first or row.diverged:
        return "–"
    mean, low, high = row.against(first, len(rows) - 1)
    if row.track.accuracy:
        return f"{-mean:+.4f} [{-high:+.4f}, {-low:+.4f}]"
    return "×" + "{:.3g} [{:.3g}, {:.3g}]".format(*(math.exp(min(x, 700)) for x in (mean, low, high)))


def _profile(row: Standing) -> str:
    cells = ((low, high, "–" if cost is None else _short(row, cost)) for low, high, cost in row.profile())
    return ", ".join(f"{low:g}–{high:g}: {shown}" for low, high, shown in cells)


def _short(row: Standing, cost: float) -> str:
    return f"{1 - cost:.3f}" if row.track.accuracy else f"{math.exp(cost):.3g}"


def draw(track: Track, rows: Sequence[Standing]) -> Any:
    """Scores with their intervals, and beside each the best trial in each quarter of the threshold's range."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.27 * len(rows)), layout="constrained")
    axes, table = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    places = -np.arange(len(rows))
    ranked = [(y, row) for y, row in zip(places, rows, strict=True) if not row.diverged]
    for y, row in ranked:
        values = 1 - row.costs if track.accuracy else np.exp(row.costs)
        best = row is rows[0] or row.equals(rows[0], len(rows) - 1)
        colour = "tab:blue" if best else "0.45"
        axes.plot(values, np.full(len(values), y), "|", color=colour, alpha=0.5, ms=5)
        axes.plot(row.score, y, "o", color=colour, ms=5)
    for y, row in zip(places, rows, strict=True):
        if row.diverged:
            axes.plot(1.0, y, "x", color="tab:red", transform=axes.get_yaxis_transform(), clip_on=False)
    axes.set_yticks(places, [row.name for row in rows], fontsize=8)
    if not track.accuracy and ranked:
        axes.set_xscale("log")
    elif ranked:
        axes.set_xlim(left=max(0.0, rows[0].score - 0.2))
    axes.set_xlabel(measure(track))
    axes.set_title(f"{track.name}: measured (blue: not told apart from the first)", fontsize=9, loc="left")
    axes.grid(alpha=0.25)

    lost = np.full((len(rows), QUARTERS), np.nan)
    for i, row in enumerate(rows):
        found = [cost for _, _, cost in row.profile()]
        known = [cost for cost in found if cost is not None]
        for j, cost in enumerate(found):
            if cost is not None:
                lost[i, j] = cost - min(known)
                table.text(j, places[i], _short(row, cost), ha="center", va="center", fontsize=7)
    most = 0.2 if track.accuracy else math.log(100)
    colours = matplotlib.colormaps["viridis_r"].copy()
    extent = (-0.5, QUARTERS - 0.5, places[-1] - 0.5, 0.5)
    table.imshow(lost, cmap=colours, vmin=0, vmax=most, alpha=0.5, aspect="auto", extent=extent)
    table.set_xticks(range(QUARTERS), ["lowest", "", "", "highest"][:QUARTERS], fontsize=8)
    table.set_xlabel("quarter of the threshold's range")
    table.set_title("tuning: best trial there (bright: as good as its best)", fontsize=9, loc="left")
    for panel in (axes, table):
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def measure(track: Track) -> str:
    """What rules are ranked by."""
    return next(iter(track.measures))


def file_name(track: Track) -> str:
    """Of a track's picture, without its ending."""
    return "".join(c if c.isalnum() else "_" for c in track.name).replace("__", "_")
