"""Compares what compression costs in accuracy and saves in bytes: every compressor, at several sizes.

  python -m experiments.bench.comm --quick --families=none,top_k
  python -m experiments.bench.comm --tracks=digits
  python -m experiments.bench.comm
  python -m experiments.bench.comm --import=my_module --families="none,error_feedback(my_module.coarse())"

Each entry has the same number of trials for its learning rate, on folds of the clients, and is measured on other
clients. The working directory gets results.jsonl (a line for each track and entry), report.md, and a picture of each
track. If the benchmark is stopped in any way, the same command continues it. Bytes are counted from real codes.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax
from absl import flags
from matplotlib.figure import Figure

import fedjax_clip as fc
from experiments.bench import tracks as problems
from experiments.bench.core import command, grid, picture
from experiments.bench.core.problem import Track, sized
from experiments.bench.core.rule import RATE, Rule
from experiments.bench.core.standing import Standing, interval
from experiments.bench.core.table import table
from experiments.bench.tracks import TRACKS
from experiments.config import privacy, registry, spec
from fedjax_clip.core.types import PerExampleLoss

NOTHING = "nothing"  # the name of no compression

# Each entry is an --uplink, or after ">" a --downlink.
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
TRIALS = 14  # of the learning rate: seven in a wide range, seven around the best of them


def define_flags() -> None:
    """Defines the flags."""
    command.define_flags("runs/commbench", "Few rounds, seeds and trials")
    flags.DEFINE_list("tracks", ["digits", "fashion_mnist"], "Problems to compare on.")
    command.define_names(
        "families",
        None,
        "Families of compressors to compare, and --uplinks with functions of --import's; by default all.",
    )
    flags.DEFINE_integer("trials", TRIALS, "Learning rates that each entry may try, an even number.")


def main(values: flags.FlagValues, should_stop: command.ShouldStop) -> None:
    """Runs what the flags say."""
    families = list(FAMILIES) if values.families is None else values.families
    bench(values.tracks, families, values.trials, values.workdir, values.quick, should_stop)


def bench(
    tracks: Sequence[str],
    families: Sequence[str],
    trials: int,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: command.ShouldStop = lambda: False,
) -> int:
    """Runs each entry on each track, unless the working directory has it already, and writes the report.

    A line says what each track without data lacks.

    Returns:
      The number of pairs of a track and an entry that ran.

    Raises:
      fc.InvalidInput: an unknown track or family, no even number of trials, or a directory that cannot be written.
    """
    command.check_names("--tracks", "track", tracks, TRACKS)
    command.check_names("--families", "family", families, FAMILIES)
    texts = [text for family in dict.fromkeys(families) for text in FAMILIES.get(family, (family,))]
    entries = {text or NOTHING: rule(text) for text in texts}
    chosen = problems.build(None, {name: TRACKS[name] for name in dict.fromkeys(tracks)})
    chosen = sized(chosen, trials, quick)
    return grid.compare(chosen, entries, workdir, lambda found: report(found, quick), draw, should_stop)


def rule(text: str) -> Rule:
    """An entry as a rule whose only knob is the clients' learning rate."""
    return Rule(lambda loss, point: build(loss, text, point["client_lr"]), RATE, note=text)


def build(loss: PerExampleLoss, text: str, client_lr: Any) -> fc.extend.Algorithm:
    """FedAvg with plain SGD and the entry's compression."""
    up, _, down = (part.strip() for part in text.partition(">"))
    algorithm = fc.fedavg(loss, optax.sgd(client_lr), uplink=privacy.chain(up, None))
    if down:
        algorithm = spec.one(down, registry.DOWNLINKS, "--downlink", registry.COMPRESSORS)(algorithm)
    return algorithm


def report(standings: grid.Standings, quick: bool) -> str:
    """The report in Markdown: a table for each track, by bytes up."""
    lines = ["# CommBench", "", "Accuracy against bytes" + (" (quick: too few rounds to say)." if quick else "."), ""]
    lines += HOW
    for track, rows in standings:
        lines += ["", f"## {track.name}", "", f"![{track.name}]({picture.file_name(track.name)}.png)", ""]
        lines += [
            f"{track.rounds} rounds of FedAvg, {track.cohort_size} of {track.data.num_clients} clients in each, "
            f"{track.steps} local steps. Measure: {track.measure} over the last {track.measures[track.measure].window} "
            f"rounds, on {len(track.measuring)} runs. The rate is the best of {track.trials} trials on "
            f"{len(track.tuning)} other runs, from {track.ranges['client_lr'].low:g} to "
            f"{track.ranges['client_lr'].high:g}."
        ]
        plain = next((row for row in rows if row.name == NOTHING), None)
        equal = [row for row in rows if plain and row.equals(plain, len(rows) - 1)]
        for way in ("up", "down") if equal else ():
            least = min(equal, key=lambda row: row.traffic(f"bytes_{way}"))
            lines.append(f"Fewest bytes {way}, and not told apart from no compression: `{least.name}`.")
        lines += ["", *_table(track, rows, plain)]
    return "\n".join(lines) + "\n"


def _table(track: Track, rows: Sequence[Standing], plain: Standing | None) -> list[str]:
    """A row for each entry, the one of most bytes first."""
    head = ["--uplink > --downlink", track.measure, "to no compression", "rate", "at an end", "failed", "up, B"]
    head += ["entropy bound", "down, B", "up and down, less by", "s a run"]
    shown = []
    for row in sorted(rows, key=lambda row: -row.traffic("bytes_up") - row.traffic("bytes_down")):
        cells = [f"`{row.name}`", row.value(), row.compared(plain or rows[0], len(rows) - 1)]
        cells += [row.knob("client_lr"), row.ends().removeprefix("client_lr ") or "–"]
        cells += [f"{row.tried()[0]} of {track.trials}"]
        cells += [f"{row.traffic(k):,.0f}" for k in ("bytes_up", "bytes_up_entropy", "bytes_down")]
        less = [f"{plain.traffic(k) / row.traffic(k):.3g}×" for k in ("bytes_up", "bytes_down") if plain]
        shown.append([*cells, ", ".join(less) or "–", f"{row.entry['run_seconds']:.2g}"])
    return table(head, shown)


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


def draw(track: Track, rows: Sequence[Standing]) -> Figure:
    """Accuracy against the bytes that a client sends in a round."""
    figure = picture.figure(10, 6)
    axes = figure.add_subplot()
    listed = {text for texts in FAMILIES.values() for text in texts}
    families = {name: texts for name, texts in FAMILIES.items() if name != "downlink"}
    families |= {row.rule.note: (row.rule.note,) for row in rows if row.rule.note not in listed}  # from outside
    for colour, (family, texts) in zip(itertools.cycle(picture.colours()), families.items()):
        mine = sorted((r for r in rows if r.rule.note in texts), key=lambda r: r.traffic("bytes_up"))
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
    axes.set_ylabel(track.measure)
    axes.grid(alpha=0.25)
    picture.plain(axes)
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
    command.run(main, __doc__ or "", describe)
