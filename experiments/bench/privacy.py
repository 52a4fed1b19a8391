"""Accuracy against epsilon, for each way of adding noise, each tuned for each epsilon with the same number of trials.

  python -m experiments.bench.privacy --quick --mechanisms=tree
  python -m experiments.bench.privacy --epsilons=1,8
  python -m experiments.bench.privacy
  python -m experiments.bench.privacy --import=my_module --mechanisms="gaussian,my_module.my_clip()"

A mechanism of your own is a function in a module of your own: ``(threshold)``, which returns a clip of the update with
a promised bound, an optax transform or a link, and Gaussian noise follows it; or ``(rounds)``, which returns a
``fc.uplink.mechanism.Mechanism``. Trials over the learning rate and the clip's bound use other seeds and other pictures
than the result. The working directory gets results.jsonl (a line for each mechanism and epsilon), report.md and a
picture. Stopped in any way, the same command goes on where it was.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib.figure import Figure

import fedjax_clip as fc
from experiments.bench.core import command, grid, picture
from experiments.bench.core.problem import Measure, Run, Track, sized
from experiments.bench.core.results import Results
from experiments.bench.core.standing import Standing, interval
from experiments.bench.core.table import table
from experiments.bench.core.tuning import Range
from experiments.bench.mechanisms import MECHANISMS, Private, named, sampled_by
from fedjax_clip.core.types import InvalidInput

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
SLOW = ("skellam",)  # its noise takes many times as long to draw, so it runs only if named
TRIALS = 16  # of each mechanism at each epsilon: eight in a wide range, eight around the best of them
RATES = {
    "client_lr": Range(0.03, 10.0),
    "threshold": Range(0.03, 3.0),
}  # the bound is one on a gradient: C = lr times it


def define_flags() -> None:
    """Defines the flags."""
    command.define_flags("runs/privacybench", "Few clients and rounds")
    command.define_names(
        "mechanisms",
        None,
        f"Mechanisms to compare, functions of --import's among them; by default all but {SLOW[0]}.",
    )
    shown = ",".join(f"{e:g}" for e in EPSILONS)
    flags.DEFINE_list("epsilons", None, f"Epsilons, inf for no noise; by default {shown}.")
    flags.DEFINE_integer(
        "trials", None, f"Trials of each mechanism at each epsilon, an even number; {TRIALS} by default."
    )


def main(values: flags.FlagValues, should_stop: command.ShouldStop) -> None:
    """Runs what the flags say."""
    try:
        epsilons = EPSILONS if values.epsilons is None else [float(e) for e in values.epsilons]
    except ValueError:
        raise InvalidInput(f"--epsilons: {','.join(values.epsilons)!r} are not numbers.") from None
    names = values.mechanisms or [name for name in MECHANISMS if name not in SLOW]
    bench(names, epsilons, values.trials, values.workdir, values.quick, should_stop)


def problem(quick: bool) -> Track:
    """Fashion-MNIST at 14 x 14 pixels, dealt to clients of 20 pictures; a linear classifier.

    Trials are judged on training pictures that no client has, results on the test pictures.

    Raises:
      InvalidInput: the data are not here.
    """
    clients, size, rounds, judging = (30, 10, 4, 100) if quick else (600, 20, 60, 10_000)

    def halved(split, first, count):
        found = fc.data.sources.fashion_mnist(split)
        x = found["x"][first : first + count].reshape(-1, 14, 2, 14, 2).astype(np.float32).mean((2, 4))
        return {"x": x.reshape(-1, 196) / 255 - 0.25, "y": found["y"][first : first + count]}

    train, test = halved("train", 0, size * clients), halved("test", 0, judging)
    held_out = halved("train", size * clients, judging)

    def loss(params, batch, key):
        logits = batch["x"] @ params["w"] + params["b"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}

    tuning, measuring = (1, 2) if quick else (2, 16)
    return Track(
        "fashion_mnist",
        fc.data.partition.iid(train, clients, seed=0),
        loss,
        lambda seed: {"w": np.zeros((196, 10), np.float32), "b": np.zeros(10, np.float32)},
        {"accuracy": Measure(lambda params, judged: jnp.mean(loss(params, judged, None)[1]["accuracy"]))},
        ranges=RATES,
        rounds=rounds,
        cohort_size=clients // 10,
        work=fc.extend.LocalWork(batch_size=20, steps=1),
        accuracy=True,
        tuning=[Run(1000 + i, judged=held_out) for i in range(tuning)],
        measuring=[Run(i, judged=test) for i in range(measuring)],
        trials=4 if quick else TRIALS,
    )


def bench(
    names: Sequence[str],
    epsilons: Sequence[float],
    trials: int | None,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: command.ShouldStop = lambda: False,
) -> int:
    """Runs each mechanism at each epsilon, unless the working directory has it already, and writes the report.

    Args:
      names, epsilons: the mechanisms and the epsilons to combine.
      trials: pairs of a learning rate and a bound that each mechanism may try at each epsilon; 16 by default.
      workdir, quick, should_stop: as of the other benchmarks.

    Returns:
      The number of pairs of a mechanism and an epsilon that ran.

    Raises:
      InvalidInput: an unknown mechanism, an epsilon that is not positive, no even number of trials, a directory that
        cannot be written.
    """
    compared = named(names)
    if not epsilons or not all(e > 0 for e in epsilons):
        raise InvalidInput("--epsilons must be positive numbers, inf among them if you like.")
    (track,) = sized(map(problem, [quick]), trials)  # which looks at the number of trials before it reads the data
    results = Results(workdir)
    delta = float(f"{track.data.num_clients**-1.1:.0e}")
    cells: list[grid.Cell] = []
    for name in names:
        if should_stop():
            break
        own = sampled_by(track, compared[name])
        noise = [compared[name].noise(e, own, delta) if math.isfinite(e) else 0.0 for e in epsilons]
        made = zip(epsilons, compared[name].rules(own, noise), strict=True)
        cells += grid.cells([own], {f"{name}, epsilon {e:g}": rule for e, rule in made})
    ran = grid.fill(results, cells, should_stop)
    rows = {cell.name: Standing(cell.track, cell.name, cell.rule, e) for cell, e in zip(cells, ran.entries) if e}
    known = {name: [rows.get(f"{name}, epsilon {e:g}") for e in epsilons] for name in names}
    found = {name: [row for row in each if row] for name, each in known.items() if all(each)}
    results.publish(
        report(track, found, compared, epsilons, delta, quick), {"accuracy": draw(found, epsilons)} if found else {}
    )
    return ran.done


Found = dict[str, list[Standing]]


def report(
    track: Track,
    found: Found,
    compared: Mapping[str, Private],
    epsilons: Sequence[float],
    delta: float,
    quick: bool,
) -> str:
    """The page: tables of accuracies, of noise multipliers and of what was tuned, and how to read them."""
    shown = ["none" if math.isinf(e) else f"{e:g}" for e in epsilons]
    left = [name for name in SLOW if name not in found]
    lines = [
        "# PrivacyBench",
        "",
        f"**Accuracy against epsilon**{' (quick: too few rounds to say)' if quick else ''}",
        "",
        "![accuracy against epsilon](accuracy.png)",
        "",
        f"Fashion-MNIST at 14 x 14 pixels, a linear classifier of 1970 parameters, {track.data.num_clients} clients of "
        f"{track.data.sizes[0]} pictures each, {track.cohort_size} expected in each of {track.rounds} rounds, one "
        f"local step; delta is {delta:g}. Each mechanism has {track.trials} trials at each epsilon, over the learning "
        "rate and the bound: half of them spread over their ranges, half around the best of those. Trials run on "
        f"{len(track.tuning)} seeds and are judged on training pictures that no client has. The best pair is run on "
        f"{len(track.measuring)} other seeds. Accuracy on the test split after the last round: their mean and half a "
        "95% interval. The intervals are over seeds, not over tunings: with so few trials, which of two mechanisms is "
        "ahead by 0.02 may be luck. Tuning itself is not counted in epsilon. Epsilons in different units of the second "
        "column are different promises, and no row is better than another for them."
        + "".join(f" `{name}` runs only if it is named: its noise takes many times as long to draw." for name in left),
        "",
    ]
    at = [f"ε = {e}" for e in shown]

    def each(head: Sequence[str], about: Callable[[str], Sequence[str]], cell: Callable[[Standing], str]) -> list[str]:
        rows = [[name, *about(name), *map(cell, standing)] for name, standing in found.items()]
        return table(["mechanism", *head, *at], rows)

    lines += each(
        ["epsilon is for", "cohorts"],
        lambda name: [compared[name].protects, compared[name].sampler.__name__],
        _accuracy,
    )
    lines += ["", "Noise multipliers (of the sum over the bound; of each client's own for `local` and `records`):", ""]
    lines += each(["is"], lambda name: [compared[name].note], lambda row: f"{row.rule.fixed['noise']:.3g}")
    lines += ["", "What was tuned, as learning rate / bound; a star is within 5% of an end of its range:", ""]
    lines += each(
        [], lambda name: [], lambda row: f"{row.knob('client_lr')} / {row.knob('threshold')}{'*' * bool(row.ends())}"
    )
    return "\n".join(lines) + "\n"


def _accuracy(row: Standing) -> str:
    centre, low, _ = interval(row.costs)
    return f"{1 - centre:.3f} ± {centre - low:.3f}"


def draw(found: Found, epsilons: Sequence[float]) -> Figure:
    """Accuracy against epsilon, a line for each mechanism; without noise at the right."""
    figure = picture.figure(9, 5)
    axes = figure.add_subplot()
    finite = [e for e in epsilons if math.isfinite(e)]
    places = [e if math.isfinite(e) else 2 * max(finite, default=1.0) for e in epsilons]
    for colour, (name, standing) in zip(picture.colours(), found.items(), strict=False):
        centre, low, high = 1 - np.array([interval(row.costs) for row in standing]).T
        axes.plot(places, centre, color=colour, marker="o", ms=3, lw=1.4, label=name)
        axes.fill_between(places, low, high, color=colour, alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, ["no noise" if math.isinf(e) else f"{e:g}" for e in epsilons])
    axes.set_xlabel("epsilon")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.25)
    picture.plain(axes)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def describe() -> str:
    """All mechanisms, for ``--help``."""
    return "\n".join(["Mechanisms:", *(f"    {name:<18} {private.note}" for name, private in MECHANISMS.items())])


if __name__ == "__main__":
    define_flags()
    command.run(main, __doc__ or "", describe)
