"""Compares what compression costs in accuracy and saves in bytes: every compressor, at several sizes.

  python -m experiments.commbench --quick --families=none,top_k
  python -m experiments.commbench --tracks=digits
  python -m experiments.commbench

The working directory gets results.jsonl (a line for each track and entry), report.md, and a picture of each track.
Stopped in any way, the same command goes on from there. Bytes are those of the metrics, which are those of real codes.
"""

import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import tqdm
from absl import flags

import fedjax_clip as fc
from experiments import binary, privacy, registry, rundir, spec
from experiments.clipbench import Results, check_names
from experiments.clipbench_lanes import fingerprint, probe
from experiments.clipbench_report import file_name, interval
from experiments.clipbench_tracks import TRACKS, Track
from experiments.rules import Rule
from fedjax_clip import checks, files

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
LAST = 3  # evaluations that are averaged
EVERY = 5  # rounds from one to the next


def define_flags() -> None:
    """Defines the flags; not on import, for other binaries have flags of the same names."""
    flags.DEFINE_list("tracks", ["digits", "fashion_mnist"], "Problems to compare on; those whose data are here.")
    flags.DEFINE_list("families", None, "Families of compressors to compare; by default all.")
    flags.DEFINE_integer("seeds", 3, "Seeds of each entry.")
    flags.DEFINE_string("workdir", "runs/commbench", "Where results and report are written.")
    flags.DEFINE_boolean("quick", False, "Few rounds and one seed: to see that it runs.")


def main() -> None:
    """Runs what the flags say."""
    values = flags.FLAGS
    binary.configure_jax(1)
    stopping = binary.Stopping()
    families = list(FAMILIES) if values.families is None else values.families
    bench(values.tracks, families, values.seeds, values.workdir, values.quick, stopping)
    stopping.leave()


def bench(
    tracks: Sequence[str],
    families: Sequence[str],
    seeds: int,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Runs each entry on each track, unless the working directory has it already, and writes the report.

    Returns:
      How many pairs of a track and an entry were run.

    Raises:
      fc.InvalidInput: an unknown track or family, no seeds, or a directory that cannot be written.
    """
    check_names("--tracks", "track", tracks, TRACKS)
    check_names("--families", "family", families, FAMILIES)
    checks.count("--seeds", seeds)
    results = Results(files.expanded(workdir))
    chosen = []
    for name in dict.fromkeys(tracks):
        try:
            chosen += TRACKS[name]()
        except fc.InvalidInput as error:
            print(f"Without the track {name}: {error}", file=sys.stderr)
    entries = [text for family in dict.fromkeys(families) for text in FAMILIES[family]]
    programs, problems = {text: program(probe(), text) for text in entries}, {t.name: program(t, "") for t in chosen}
    pairs = [
        (t, text, config(t, seeds, quick) | {"program": programs[text], "problem": problems[t.name]})
        for t in chosen
        for text in entries
    ]
    todo = [pair for pair in pairs if results.find(*pair) is None]
    done = 0
    for track, text, entry in tqdm.tqdm(todo, unit="entry", dynamic_ncols=True):
        if should_stop():
            break
        results.add({"track": track.name, "rule": text, "config": entry, **run(track, text, entry)})
        done += 1
    standings = []
    for track in chosen:
        found = {text: results.find(t, text, c) for t, text, c in pairs if t is track}
        if rows := [Standing(text, entry) for text, entry in found.items() if entry]:
            standings.append((track, rows))
            picture = results.path / f"{file_name(track)}.png"
            rundir.save_picture(picture, draw(track, rows))
    files.write(results.path / "report.md", report(standings, quick))
    print(f"{done} run, {len(pairs) - len(todo)} found; see {results.path / 'report.md'}")
    return done


def config(track: Track, seeds: int, quick: bool) -> dict[str, Any]:
    """What an entry depends on."""
    return {
        "version": fc.__version__,
        "rounds": 10 if quick else track.rounds,
        "cohort_size": track.cohort_size,
        "client_lr": track.client_lr,
        "seeds": 1 if quick else seeds,
    }


def program(track: Track, text: str) -> str:
    """A hash of all that is computed: an entry of another is run again."""
    return fingerprint(track, Rule(lambda loss, threshold, client_lr, num_clients: build(track, text)))


def build(track: Track, text: str) -> fc.Algorithm:
    """FedAvg with plain SGD and what the entry says."""
    up, _, down = (part.strip() for part in text.partition(">"))
    algorithm = fc.fedavg(track.loss, optax.sgd(track.client_lr), uplink=privacy.chain(up, None))
    if down:
        algorithm = spec.one(down, registry.DOWNLINKS, "--downlink", registry.COMPRESSORS)(algorithm)
    return algorithm


def run(track: Track, text: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of each seed, and bytes for a client and round: up, down, and at the entropy bound."""
    algorithm = build(track, text)
    (name, measure), *_ = track.measures.items()
    accuracy = jax.jit(lambda params: measure.of(params, track.data.examples))
    outcome: dict[str, list[float]] = {k: [] for k in ("accuracy", "up", "up_entropy", "down", "down_entropy")}
    for seed in range(config["seeds"]):
        result = fc.train(
            algorithm,
            track.data,
            track.start(seed),
            rounds=config["rounds"],
            cohort_size=track.cohort_size,
            batch_size=track.work.batch_size,
            local_steps=track.work.steps,
            seed=seed,
            evaluate=lambda params: {name: accuracy(params)},
            eval_every=EVERY,
            devices=jax.local_devices()[:1],
            clients_per_chunk=1,
        )
        rows = result.history
        asked = sum(row["clients"] + row["dropped"] for row in rows)
        outcome["accuracy"].append(float(np.mean([r[f"eval/{name}"] for r in rows if f"eval/{name}" in r][-LAST:])))
        for way in ("up", "down"):
            outcome[way].append(sum(row[f"bytes_{way}"] for row in rows) / asked)
            entropy = (row.get(f"bytes_{way}_entropy", row[f"bytes_{way}"]) for row in rows)
            outcome[f"{way}_entropy"].append(sum(entropy) / asked)
    return {"measured": {k: [x if np.isfinite(x) else None for x in v] for k, v in outcome.items()}}


class Standing:
    """What came of an entry: accuracy with its 95% interval over seeds, and mean bytes."""

    def __init__(self, text: str, entry: Mapping[str, Any]):
        self.text = text or "nothing"
        self.family = next(name for name, texts in FAMILIES.items() if text in texts)
        self.measured = {k: np.array(v, float) for k, v in entry["measured"].items()}
        self.accuracy, self.low, self.high = (float(x[0]) for x in interval(self.measured["accuracy"][None], False))

    def bytes(self, name: str) -> float:
        """Mean over seeds."""
        return float(self.measured[name].mean())


def report(standings: Sequence[tuple[Track, Sequence[Standing]]], quick: bool) -> str:
    """The report in Markdown: a table for each track, by bytes up."""
    lines = ["# CommBench", "", "Accuracy against bytes" + (" (quick: too few rounds to say)." if quick else ".")]
    for track, rows in standings:
        plain = next((row for row in rows if row.text == "nothing"), None)
        lines += ["", f"## {track.name}", "", f"![{track.name}]({file_name(track)}.png)", ""]
        lines += [
            f"{track.rounds} rounds of FedAvg, {track.cohort_size} of {track.data.num_clients} clients in each, "
            f"client's rate {track.client_lr:g}. Accuracy: mean of the last {LAST} evaluations, {EVERY} rounds apart, "
            "and its 95% interval over seeds. Bytes: of the codes, for a client and round; beside them what an ideal "
            "coder of the symbols' frequencies would take.",
            "",
            "| --uplink > --downlink | accuracy | lost | up, B | entropy bound | down, B | up and down, less by |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in sorted(rows, key=lambda row: -row.bytes("up") - row.bytes("down")):
            cells = [f"`{row.text}`", f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]"]
            cells += ["–" if plain is None else f"{plain.accuracy - row.accuracy:+.3f}"]
            cells += [f"{row.bytes(k):,.0f}" for k in ("up", "up_entropy", "down")]
            if plain is None:
                cells.append("–")
            else:
                ways = [f"{plain.bytes(k) / row.bytes(k):.3g}×" for k in ("up", "down")]
                cells.append(", ".join(ways))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(track: Track, rows: Sequence[Standing]) -> Any:
    """Accuracy against the bytes that a client sends in a round."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["tab20"](range(20))
    families = [name for name in FAMILIES if name != "downlink"]
    for colour, family in zip(colours, families):
        mine = sorted((r for r in rows if r.family == family), key=lambda r: r.bytes("up"))
        if not mine:
            continue
        for remembered, style in ((False, "o-"), (True, "s--")):
            some = [r for r in mine if r.text.startswith(("error_feedback", "ef21")) == remembered]
            if not some:
                continue
            x, y = [r.bytes("up") for r in some], [r.accuracy for r in some]
            error = [[r.accuracy - r.low for r in some], [r.high - r.accuracy for r in some]]
            label = family + " with memory" * remembered
            axes.errorbar(x, y, error, fmt=style, color=colour, label=label, ms=5, lw=1, elinewidth=0.6, capsize=2)
    axes.set_xscale("log")
    if track.accuracy:
        best = max(row.accuracy for row in rows)
        axes.set_ylim(best - 0.1, best + 0.03)
        lost = [row.bytes("up") for row in rows if row.accuracy < best - 0.1]
        edge = axes.get_xaxis_transform()
        axes.plot(lost, np.zeros(len(lost)), "x", color="black", transform=edge, clip_on=False)
    axes.set_title(f"{track.name}    squares: with a memory, crosses: below", fontsize=10, loc="left")
    axes.set_xlabel("bytes up, a client and round")
    axes.set_ylabel(next(iter(track.measures)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7.5, frameon=False)
    return figure


def describe() -> str:
    """All families and their entries, for ``--help``."""
    rows = [f"    {name:<14} {', '.join(text or 'nothing' for text in texts)}" for name, texts in FAMILIES.items()]
    return "\n".join(["Families:", *rows])


if __name__ == "__main__":
    define_flags()
    binary.run(main, __doc__ or "", describe)
