"""The charts of a page: one run's metrics in different colours, or a colour for each of several runs."""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.page import svg
from experiments.page.results import Run, compared, worst_tenth
from experiments.page.svg import Line
from fedjax_clip import plots
from fedjax_clip.data.labels import label

SETS = {
    "examples": "held-out examples",
    "clients": "held-out clients",
    "examples_average": "held-out examples, average model",
    "clients_average": "held-out clients, average model",
}
MEANINGS = {
    "auroc": "area under the ROC curve, how often a positive example scores above a negative one",
    "ece": "expected calibration error, 0 at best",
    "probability": "mean of the predicted probabilities of class 1",
    "rmse_of_biases": "what the biases alone reach",
    "rmse_of_closed_form": "what the closed-form solution reaches",
    "rmse_of_mean": "what the training mean reaches",
}
HOW = {
    "": ("", ""),
    "mean": (", mean over clients", " d1"),
    "worst": (", worst client", " d2"),
    "worst_tenth": (", worst tenth of clients", " d3"),
}
LOGARITHMIC = ("loss", "thresholds", "norms before the clip")


def style(number: int) -> str:
    """Eight colours, then the same ones dashed."""
    return f"c{number % 8}" + (f" d{number // 8 % 4}" if number >= 8 else "")


def evaluated(runs: Sequence[Run]) -> dict[str, list[str]]:
    """``{metric: [set, ...]}`` of all evaluations: that of ``--metric`` first, then the accuracy."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row if key.startswith("eval/"))
    found: dict[str, list[str]] = {}
    for key in keys:
        if len(parts := key.split("/")) == 3:  # of more, it is one client's
            found.setdefault(parts[2], []).append(parts[1])
    where, chosen = runs[0].metric
    first = chosen, compared(chosen, found)[0], "accuracy", "loss"
    found = {metric: sorted(sets, key=lambda name: name != where) for metric, sets in found.items()}
    return dict(sorted(found.items(), key=lambda item: [item[0] != metric for metric in first]))


def meanings(runs: Sequence[Run]) -> str:
    """Explanations of evaluations whose names are not self-explanatory."""
    found = evaluated(runs)
    known = {k: v for k, v in MEANINGS.items() if any(name == k or name.startswith(f"{k}_") for name in found)}
    told = "".join(f" {name}: {meaning}." for name, meaning in known.items())
    over_clients = any(compared(name, found)[1] for name in found)
    return told + " Of a score, mean, worst and worst tenth are of the clients." * over_clients


def curves(runs: Sequence[Run]) -> Iterator[str]:
    """Each metric over the rounds: held-out examples and held-out clients apart, and training beside them."""
    if len(runs) == 1:
        yield from _curves_of(runs[0])
        return
    for metric, sets in evaluated(runs).items():
        for name in sets:
            lines = [Line(run.name, *run.series(f"eval/{name}/{metric}"), style(i), True) for i, run in enumerate(runs)]
            title = f"{label(metric)}, {_set(name)}"
            yield svg.chart(title, lines, "round", label(metric), log=metric in LOGARITHMIC)
    lines = [Line(run.name, *run.series("loss"), style(i)) for i, run in enumerate(runs)]
    yield svg.chart("loss in training, before each step", lines, "round", "loss", log=True)
    lines = [Line(run.name, *run.series("update_norm"), style(i)) for i, run in enumerate(runs)]
    yield svg.chart("norm of the server's update", lines, "round", "norm", log=True)


def _curves_of(run: Run) -> Iterator[str]:
    """The curves of one run; the mean over clients and the worst client are in the chart of their score."""
    found = evaluated([run])
    for metric in dict.fromkeys(compared(name, found)[0] for name in found):
        lines = [Line("training", *run.series(metric), "train")]
        for how, (words, dashes) in HOW.items():
            key = f"{metric}_{how}" if how else metric
            for i, name in enumerate(found.get(key, ())):
                lines.append(Line(_set(name) + words, *run.series(f"eval/{name}/{key}"), style(i) + dashes, True))
        log = metric in LOGARITHMIC
        yield svg.chart(label(metric), lines, "round", label(metric), log=log, seams=run.seams)
    lines = [Line("‖aggregate‖", *run.series("update_norm"), style(2))]
    yield svg.chart("norm of the server's update", lines, "round", "norm", log=True, seams=run.seams)


def clients(runs: Sequence[Run]) -> Iterator[str]:
    """Every client's score at the end, from the worst to the best."""
    for place, name in enumerate(dict.fromkeys(key.split("/")[0] for run in runs for key in run.clients)):
        metric = next(run.primary(name) for run in runs if run.primary(name))
        lines = []
        for i, run in enumerate(runs):
            if f"{name}/{metric}" in run.clients and run.served(name, metric).size:
                label, css = (run.name, style(i)) if len(runs) > 1 else ("worst tenth", style(place))
                lines.append(_ranked(run, name, metric, label, css))
        title = f"{metric} of each client, {_set(name)}"
        yield svg.chart(title, lines, "clients, worst first (%)", metric, x_range=(0, 100), shade=(0, 10))


def _ranked(run: Run, name: str, metric: str, label: str, css: str) -> Line:
    values, names, sizes = (run.clients[f"{name}/{key}"] for key in (metric, "client", "examples"))
    order = run.served(name, metric)
    percent = 100 * (np.arange(len(order)) + 0.5) / len(order)
    few = order[: svg.MOST_DOTS]
    notes = [f"client {names[c]}, {sizes[c]} examples: {svg.number(values[c])}" for c in few]
    return Line(label, percent, values[order], css, True, notes, worst_tenth(values[order], metric))


def clipping(runs: Sequence[Run]) -> Iterator[str]:
    """The clips' fractions, thresholds, norms and bias; with several runs, one chart for each metric."""
    found = [plots.clipping_metrics(run.rows) for run in runs]
    titles = dict.fromkeys(title for panel in found if "fraction clipped" in panel for title in panel)
    for title in titles:
        log, unit = title in LOGARITHMIC, title.split(" ")[0].removesuffix("s")
        y_range = (0.0, 1.0) if title == "fraction clipped" else None
        keys = dict.fromkeys(key for panel in found for key in panel.get(title, ()))
        if len(runs) == 1:
            lines = [Line(label(key), *runs[0].series(key), style(i)) for i, key in enumerate(keys)]
            yield svg.chart(title, lines, "round", unit, log=log, y_range=y_range, seams=runs[0].seams)
            continue
        for key in keys:
            lines = [Line(run.name, *run.series(key), style(i)) for i, run in enumerate(runs)]
            yield svg.chart(f"{title}: {label(key)}", lines, "round", unit, log=log, y_range=y_range)


def cost(runs: Sequence[Run]) -> Iterator[str]:
    """The leading metric against bytes sent, against simulated time, and against epsilon."""
    metrics = evaluated(runs)
    if not metrics:
        return
    metric, sets = next(iter(metrics.items()))
    sets = sets if len(runs) == 1 else sets[:1]
    for title, spent, units in (
        ("bytes sent, both ways", _bytes_sent, svg.byte_unit),
        ("simulated time", _simulated, svg.time_unit),
        ("epsilon", _epsilon, lambda most: (1.0, "spent so far")),
    ):
        costs = [spent(run) for run in runs]
        if not (most := max(np.nanmax(c, initial=0) for c in costs)) > 0:
            continue
        scale, unit = units(most)
        lines = []
        for i, (run, c) in enumerate(zip(runs, costs, strict=True)):
            for j, name in enumerate(sets):
                y = np.array([row.get(f"eval/{name}/{metric}", np.nan) for row in run.rows])
                label, css = (_set(name), style(j)) if len(runs) == 1 else (run.name, style(i))
                lines.append(Line(label, c / scale, y, css, True))
        where = f", {_set(sets[0])}," if len(runs) > 1 else ""
        yield svg.chart(
            f"{metric}{where} against {title}", lines, f"{title} ({unit})", metric, log=metric in LOGARITHMIC
        )


def _bytes_sent(run: Run) -> np.ndarray:
    return run.cumulative("bytes_down", "bytes_up")


def _simulated(run: Run) -> np.ndarray:
    return np.array([row.get("simulated_seconds", np.nan) for row in run.rows])


def _epsilon(run: Run) -> np.ndarray:
    return np.array([row.get("epsilon", np.nan) for row in run.rows])


def _set(name: str) -> str:
    return SETS.get(name, name)
