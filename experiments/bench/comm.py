"""Compares what compression costs in accuracy and saves in bytes: every compressor, at several sizes.

  python -m experiments.bench.comm --quick --families=none,top_k
  python -m experiments.bench.comm --tracks=digits
  python -m experiments.bench.comm

Each entry has the same number of trials for its learning rate, on folds of the clients, and is measured on others.
The working directory gets results.jsonl (a line for each track and entry), report.md, and a picture of each track.
Stopped in any way, the same command goes on from there. Bytes are those of the metrics, which are those of real codes.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from absl import flags

import fedjax_clip as fc
from experiments.bench.contest import build_tracks, contest
from experiments.bench.entries import check_names
from experiments.bench.report import compared, file_name, measure
from experiments.bench.rules import RATE, Rule
from experiments.bench.standings import Standing, interval
from experiments.bench.tracks import TRACKS, Track
from experiments.config import binary, privacy, registry, rundir, spec
from fedjax_clip.core import files
from fedjax_clip.core.types import PerExampleLoss

NOTHING = "nothing"  # what no compression is called

# Each entry as --uplink has it, or as --downlink behind ">".
FAMILIES: Mapping[str, Sequence[str]] = {
    "none": ("",),
    "floats": ("floats(16)",),
    "qsgd": (
        "qsgd(8, bucket=512)",
        "qsgd(4, bucket=512)",
        "qsgd(4, bucket=512, coding='huffman')",
        "qsgd(2, bucket=512, coding='runs')",
    ),
    "uniform": ("uniform(8)", "uniform(4)", "uniform(2)"),
    "rotated": ("rotated(uniform(4))", "rotated(uniform(2))", "rotated(uniform(1))"),
    "eden": ("eden(4)", "eden(2)", "eden(1)"),
    "sign": ("sign()", "error_feedback(sign())"),
    "terngrad": ("terngrad(bucket=512)", "terngrad(bucket=512, coding='huffman')"),
    "kmeans": (
        "error_feedback(kmeans(16))",
        "error_feedback(kmeans(4))",
        "error_feedback(kmeans(4, coding='huffman'))",
    ),
    "top_k": (
        "top_k(0.1)",
        "top_k(0.01)",
        "error_feedback(top_k(0.1))",
        "error_feedback(top_k(0.01))",
        "error_feedback(top_k(0.001))",
        "error_feedback(top_k(0.1, values=qsgd(4, bucket=64)))",
        "error_feedback(top_k(0.01, values=sign()))",
        "ef21(top_k(0.01))",
    ),
    "random_k": (
        "random_k(0.1)",
        "random_k(0.01)",
        "error_feedback(random_k(0.1, unbiased=False))",
        "error_feedback(random_k(0.01, unbiased=False))",
    ),
    "threshold": ("error_feedback(threshold(0.003))", "error_feedback(threshold(0.03))"),
    "power_sgd": ("error_feedback(power_sgd(4))", "error_feedback(power_sgd(1))"),
    "count_sketch": ("count_sketch(5, 800, k=400)", "count_sketch(5, 800, k=40)", "count_sketch(5, 200, k=10)"),
    "downlink": (
        "> difference(qsgd(8, bucket=512))",
        "> difference(qsgd(4, bucket=64))",
        "> difference(top_k(0.01))",
        "> model(uniform(8, bucket=512))",
        "> model(uniform(4, bucket=512))",
        "eden(1) > difference(eden(4, unbiased=False))",
    ),
}
TRIALS = 14  # of the rate alone: seven of a wide range, seven about the best of them


def define_flags() -> None:
    """Defines the flags; not on import, for other binaries have flags of the same names."""
    flags.DEFINE_list("tracks", ["digits", "fashion_mnist"], "Problems to compare on.")
    flags.DEFINE_list("families", None, "Families of compressors to compare; by default all.")
    flags.DEFINE_integer("trials", TRIALS, "Learning rates that each entry may try, an even number.")
    flags.DEFINE_string("workdir", "runs/commbench", "Where results and report are written.")
    flags.DEFINE_boolean("quick", False, "Few rounds, seeds and trials: to see that it runs.")


def main() -> None:
    """Runs what the flags say."""
    values = flags.FLAGS
    binary.configure_jax(1)
    stopping = binary.Stopping()
    families = list(FAMILIES) if values.families is None else values.families
    bench(values.tracks, families, values.trials, values.workdir, values.quick, stopping)
    stopping.leave()


def bench(
    tracks: Sequence[str],
    families: Sequence[str],
    trials: int,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Runs each entry on each track, unless the working directory has it already, and writes the report.

    A line says of each track whose data are not here what it lacks.

    Returns:
      How many pairs of a track and an entry were run.

    Raises:
      fc.InvalidInput: an unknown track or family, no even number of trials, or a directory that cannot be written.
    """
    check_names("--tracks", "track", tracks, TRACKS)
    check_names("--families", "family", families, FAMILIES)
    entries = {text or NOTHING: rule(text) for family in dict.fromkeys(families) for text in FAMILIES[family]}
    chosen = build_tracks(None, {name: TRACKS[name] for name in dict.fromkeys(tracks)})
    found = contest(chosen, entries, trials, workdir, quick, should_stop)
    for track, rows in found.standings:
        rundir.save_picture(found.path / f"{file_name(track)}.png", draw(track, rows))
    files.write(found.path / "report.md", report(found.standings, quick))
    return found.done


def rule(text: str) -> Rule:
    """An entry as a rule whose one knob is the clients' rate."""
    return Rule(lambda loss, point: build(loss, text, point["client_lr"]), RATE, note=text)


def build(loss: PerExampleLoss, text: str, client_lr: Any) -> fc.extend.Algorithm:
    """FedAvg with plain SGD and what the entry says."""
    up, _, down = (part.strip() for part in text.partition(">"))
    algorithm = fc.fedavg(loss, optax.sgd(client_lr), uplink=privacy.chain(up, None))
    if down:
        algorithm = spec.one(down, registry.DOWNLINKS, "--downlink", registry.COMPRESSORS)(algorithm)
    return algorithm


def report(standings: Sequence[tuple[Track, Sequence[Standing]]], quick: bool) -> str:
    """The report in Markdown: a table for each track, by bytes up."""
    lines = ["# CommBench", "", "Accuracy against bytes" + (" (quick: too few rounds to say)." if quick else "."), ""]
    lines += HOW
    for track, rows in standings:
        plain = [row for row in rows if row.name == NOTHING]
        least = [
            min((r for r in rows if not r.diverged and r.equals(plain[0], len(rows) - 1)), key=lambda r: r.traffic(way))
            for way in ("bytes_up", "bytes_down")
            if plain
        ]
        lines += ["", f"## {track.name}", "", f"![{track.name}]({file_name(track)}.png)", ""]
        window = track.measures[measure(track)].window
        lines += [
            f"{track.rounds} rounds of FedAvg, {track.cohort_size} of {track.data.num_clients} clients in each, "
            f"{track.steps} local steps. Measure: {measure(track)} over the last {window} rounds, on "
            f"{len(track.measuring)} runs. The rate is the best of {track.trials} trials on {len(track.tuning)} other "
            f"runs, from {track.ranges['client_lr'].low:g} to {track.ranges['client_lr'].high:g}."
        ]
        lines += [
            f"Fewest bytes {way}, and not told apart from no compression: `{row.name}`."
            for way, row in zip(("up", "down"), least)
        ]
        head = ["--uplink > --downlink", measure(track), "to no compression", "rate", "at an end", "failed", "up, B"]
        head += ["entropy bound", "down, B", "up and down, less by", "s a run"]
        lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in sorted(rows, key=lambda row: -row.traffic("bytes_up") - row.traffic("bytes_down")):
            cells = [f"`{row.name}`", row.value(), compared(row, [*plain, *(r for r in rows if r not in plain)])]
            cells += [row.knob("client_lr"), row.ends().removeprefix("client_lr ") or "–"]
            cells += [f"{row.tried()[0]} of {track.trials}"]
            cells += [f"{row.traffic(k):,.0f}" for k in ("bytes_up", "bytes_up_entropy", "bytes_down")]
            ways = [f"{plain[0].traffic(k) / row.traffic(k):.3g}×" for k in ("bytes_up", "bytes_down") if plain]
            cells += [", ".join(ways) or "–", f"{row.entry['run_seconds']:.2g}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


HOW = [
    "**How.** Each entry has the same number of trials for the clients' learning rate: half of them are spread over "
    "its range, half around the best of those. Trials run on folds of the training clients. The best rate is measured "
    "on other seeds, and on clients or pictures that no trial has seen.",
    "",
    "**Accuracy** is a mean over the measuring runs, with its 95% interval. A run has diverged if any update of it was "
    "not finite. *To no compression*: the difference of accuracies, run by run, and its 95% interval, corrected by "
    "Bonferroni for all entries of the track; an entry is told apart where it does not hold 0. *At an end*: the best "
    "rate stands in the outer 5% of its range. *Failed*: trials that diverged.",
    "",
    "**Bytes** are those of the codes, for a client and round; beside them what an ideal coder of the symbols' "
    "frequencies would take. Seconds are processor seconds of one whole run, on a machine with other work.",
]


def draw(track: Track, rows: Sequence[Standing]) -> Any:
    """Accuracy against the bytes that a client sends in a round."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["tab20"](range(20))
    families = [name for name in FAMILIES if name != "downlink"]
    for colour, family in zip(colours, families):
        mine = sorted((r for r in rows if r.rule.note in FAMILIES[family]), key=lambda r: r.traffic("bytes_up"))
        for remembered, style in ((False, "o-"), (True, "s--")):
            some = [r for r in mine if r.name.startswith(("error_feedback", "ef21")) == remembered and not r.diverged]
            if not some:
                continue
            centre, low, high = np.array([_ends(row) for row in some]).T
            label = family + " with memory" * remembered
            style_of = {"color": colour, "label": label, "ms": 5, "lw": 1, "elinewidth": 0.6, "capsize": 2}
            x = [row.traffic("bytes_up") for row in some]
            axes.errorbar(x, centre, (centre - low, high - centre), fmt=style, **style_of)
    axes.set_xscale("log")
    scores = [row.score for row in rows if not row.diverged]
    if track.accuracy and scores:
        axes.set_ylim(max(scores) - 0.1, max(scores) + 0.03)
        lost = [row.traffic("bytes_up") for row in rows if row.diverged or row.score < max(scores) - 0.1]
        edge = axes.get_xaxis_transform()
        axes.plot(lost, np.zeros(len(lost)), "x", color="black", transform=edge, clip_on=False)
    axes.set_title(f"{track.name}    squares: with a memory, crosses: below", fontsize=10, loc="left")
    axes.set_xlabel("bytes up, a client and round")
    axes.set_ylabel(measure(track))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7.5, frameon=False)
    return figure


def _ends(row: Standing) -> tuple[float, float, float]:
    """The score and its 95% interval."""
    centre, low, high = interval(row.costs)
    return (1 - centre, 1 - high, 1 - low) if row.track.accuracy else (np.exp(centre), np.exp(low), np.exp(high))


def describe() -> str:
    """All families and their entries, for ``--help``."""
    rows = [f"    {name:<14} {', '.join(text or NOTHING for text in texts)}" for name, texts in FAMILIES.items()]
    return "\n".join(["Families:", *rows])


if __name__ == "__main__":
    define_flags()
    binary.run(main, __doc__ or "", describe)
