"""Compares clipping rules, each tuned with the same number of trials, and says who wins where.

  python -m experiments.bench.clip --quick --rules=fedavg,celgc,episode
  python -m experiments.bench.clip --tracks=quartic,quartic_far,three_numbers,heavy_tails,client_sampling
  python -m experiments.bench.clip
  python -m experiments.bench.clip --import=my_module --rules=celgc,my_module.fedexp

A rule of your own is a function in a module of your own, named with a dot: an algorithm ``(loss, client_tx)``, or
``(loss, client_tx, server_tx)``; an algorithm ``(loss, point)`` of the knobs ``point["client_lr"]`` and
``point["threshold"]``; or ``(threshold)``, which returns an optax transform for each local step, or a link. Further
arguments are written behind the name, ``my_module.fedexp(epsilon=0.01)``; a threshold that is given is not tuned.

The working directory gets results.jsonl (a line for each track and rule, with all its trials), report.md, and a picture
of each track. If a benchmark is stopped in any way, the same command continues it. A changed pair runs again: a rule
whose program changed (by its entry, the library or JAX), a problem with another program, start, data or cohorts,
another range, or another number of seeds or trials.
"""

import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments.bench import tracks as problems
from experiments.bench.core import command, grid, picture
from experiments.bench.core.problem import Track, sized
from experiments.bench.core.standing import QUARTERS, Standing, ranks
from experiments.bench.core.table import table
from experiments.bench.rules import RULES, named
from experiments.bench.tracks import TRACKS

KNOBS = "client_lr", "threshold", "server_lr"


def define_flags() -> None:
    """Defines the flags."""
    command.define_flags("runs/clipbench", "Few rounds, seeds and trials")
    flags.DEFINE_list("tracks", None, "Problems to compare on; by default all whose data are here.")
    command.define_names("rules", None, "Rules to compare, functions of --import's among them; by default all.")
    flags.DEFINE_integer(
        "trials", None, "Points of its knobs that each rule may try, an even number; by default the track's."
    )


def main(values: flags.FlagValues, should_stop: command.ShouldStop) -> None:
    """Runs what the flags say."""
    # Otherwise a second run would report the time to read a cached program, not to compile it.
    jax.config.update("jax_enable_compilation_cache", False)
    rules = list(RULES) if values.rules is None else values.rules
    bench(values.tracks, rules, values.trials, values.workdir, values.quick, should_stop)


def bench(
    tracks: Sequence[str] | None,
    rules: Sequence[str],
    trials: int | None,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: command.ShouldStop = lambda: False,
) -> int:
    """Runs each rule on each track, unless the working directory has it already, and writes the report.

    ``None`` runs all tracks whose data are here; a line says what each other track lacks.

    Returns:
      The number of pairs of a track and a rule that ran.

    Raises:
      InvalidInput: an unknown track or rule, no even number of trials, or a directory that cannot be written.
    """
    if tracks is not None:
        command.check_names("--tracks", "track", tracks, TRACKS)
    compared = named(rules, RULES)
    chosen = sized(problems.build(tracks, TRACKS), trials, quick)
    return grid.compare(chosen, compared, workdir, lambda found: report(found, quick), draw, should_stop)


def report(standings: grid.Standings, quick: bool) -> str:
    """The report in Markdown: who wins where, then a table for each track."""
    lines = ["# ClipBench", "", "**Who wins where**" + (" (quick: too few rounds to say)" if quick else ""), ""]
    winners = []
    for track, rows in standings:
        first, *rest = rows
        winner = "nobody" if first.diverged else first.name
        equal = ", ".join(r.name for r in rest if r.equals(first, len(rest))) or "–"
        lost = ", ".join(r.name for r in rows if r.diverged) or "–"
        winners.append([track.name, winner, f"{track.measure} {first.value()}", equal, lost])
    lines += [*table(["track", "first", "measure", "not told apart from it", "diverged"], winners), "", *HOW]
    for track, rows in standings:
        lines += ["", f"## {track.name}", "", f"![{track.name}]({picture.file_name(track.name)}.png)", ""]
        lines += [_sentences(track), "", *_table(track, rows)]
    return "\n".join(lines) + "\n"


def _table(track: Track, rows: Sequence[Standing]) -> list[str]:
    """A row for each rule, the best one first."""
    others = list(track.measures)[1:]
    head = ["rank", "rule", track.measure, "to the first", *others, *KNOBS, "at an end"]
    head += ["failed", "near", "gradients", "B up", "B down", "s a run", "compile s", "clips"]
    head += [f"best trial by quarter of the threshold's range: {track.measure}"]
    shown = []
    for rank, row in zip(ranks(rows), rows, strict=True):
        failed, near, half = row.tried()
        cells = [rank, row.name, row.value(), row.compared(rows[0], len(rows) - 1)]
        cells += [*(f"{row.other(k):.4g}" for k in others), *map(row.knob, KNOBS), row.ends() or "–"]
        cells += [f"{failed} of {len(row.entry['trials'])}", f"{near} of {half}", f"{row.rule.gradients(track.steps)}"]
        cells += [f"{row.traffic(k):,.0f}" for k in ("bytes_up", "bytes_down")]
        cells += [f"{row.entry['run_seconds']:.2g}", f"{row.entry['compile_seconds']:.1f}"]
        shown.append([*cells, row.rule.note, _profile(row)])
    return table(head, shown)


HOW = [
    "**How.** On a track each rule has the same number of trials, each of which is a point of its own knobs: half of "
    "them are spread over the knobs' ranges, half around the best of those (`experiments/bench/core/tuning.py`). "
    "FedAvg spends all of them on its rate. The best trial is measured on other runs: on other seeds, and for "
    "`digits` and `fashion_mnist` on clients or pictures that no trial has seen.",
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


def _sentences(track: Track) -> str:
    """The track's numbers, in sentences."""
    window = track.measures[track.measure].window
    over = f" over the last {window} rounds" if window > 1 else ""
    ranges = ", ".join(f"`{k}` {r.low:g} to {r.high:g}" for k, r in track.ranges.items())
    return (
        f"{track.rounds} rounds, {track.cohort_size} of {track.data.num_clients} clients in each. Measure: "
        f"{track.measure}{over}, on {len(track.measuring)} runs; knobs chosen by {track.trials} trials on "
        f"{len(track.tuning)} others. "
        f"Ranges: {ranges}."
    )


def _profile(row: Standing) -> str:
    cells = ((low, high, "–" if cost is None else _short(row, cost)) for low, high, cost in row.profile())
    return ", ".join(f"{low:g}–{high:g}: {shown}" for low, high, shown in cells)


def _short(row: Standing, cost: float) -> str:
    return f"{1 - cost:.3f}" if row.track.accuracy else f"{math.exp(cost):.3g}"


def draw(track: Track, rows: Sequence[Standing]) -> Figure:
    """Scores with their intervals, and beside each the best trial in each quarter of the threshold's range."""
    figure = picture.figure(11, 1.2 + 0.27 * len(rows))
    axes, quarters = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
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
    axes.set_xlabel(track.measure)
    axes.set_title(f"{track.name}: measured (blue: not told apart from the first)", fontsize=9, loc="left")
    axes.grid(alpha=0.25)

    lost = np.full((len(rows), QUARTERS), np.nan)
    for i, row in enumerate(rows):
        found = [cost for _, _, cost in row.profile()]
        known = [cost for cost in found if cost is not None]
        for j, cost in enumerate(found):
            if cost is not None:
                lost[i, j] = cost - min(known)
                quarters.text(j, places[i], _short(row, cost), ha="center", va="center", fontsize=7)
    most = 0.2 if track.accuracy else math.log(100)
    extent = (-0.5, QUARTERS - 0.5, places[-1] - 0.5, 0.5)
    quarters.imshow(lost, cmap="viridis_r", vmin=0, vmax=most, alpha=0.5, aspect="auto", extent=extent)
    quarters.set_xticks(range(QUARTERS), ["lowest", "", "", "highest"][:QUARTERS], fontsize=8)
    quarters.set_xlabel("quarter of the threshold's range")
    quarters.set_title("tuning: best trial there (bright: as good as its best)", fontsize=9, loc="left")
    picture.plain(axes, quarters)
    return figure


def describe() -> str:
    """All tracks and rules, for ``--help``."""
    rules = [f"    {name:<18} {rule.note}" for name, rule in RULES.items()]
    return "\n".join(["Tracks:", f"    {', '.join(TRACKS)}", "Rules:", *rules])


if __name__ == "__main__":
    define_flags()
    command.run(main, __doc__ or "", describe)
