"""Pictures of a run."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedjax_clip.core.metrics import higher_is_better
from fedjax_clip.data.labels import drawable, label
from fedjax_clip.training.loop import Row

TRAIN, EXAMPLES, CLIENTS = "#7f7f7f", "#1f77b4", "#d95f02"

# panel title -> [(metric, label, colour)]
_PANELS: dict[str, list[tuple[str, str, str]]] = {
    "loss": [
        ("loss", "training, before each step", TRAIN),
        ("eval/examples/loss", "held-out examples", EXAMPLES),
        ("eval/clients/loss", "held-out clients", CLIENTS),
    ],
    "accuracy": [
        ("accuracy", "training, before each step", TRAIN),
        ("eval/examples/accuracy", "held-out examples", EXAMPLES),
        ("eval/clients/accuracy", "held-out clients", CLIENTS),
    ],
    "norm of the server's update": [("update_norm", "‖aggregate‖", "#1b9e77")],
    "fraction clipped": [
        ("clipped_steps", "local steps", "#7570b3"),
        ("uplink/clipped", "clients' updates", "#e7298a"),
    ],
}
_LOGARITHMIC = ("loss", "norm of the server's update")


def curves(rows: Sequence[Row], title: str = "") -> Figure:
    """Plots loss, accuracy, update norm and clipped fraction over rounds, if the rows have them.

    With a clock (``fc.data.clock``), accuracy over simulated time too. A dashed line marks where a run went on from
    another one.

    Args:
      rows: rows of ``fc.train``'s history.
      title: over the whole figure.

    Example:
      >>> fc.plots.curves(result.history).savefig("curves.png")  # in a notebook: after %matplotlib inline
    """
    named = {name: lines for name, lines in _PANELS.items() if any(_series(rows, key)[0].size for key, _, _ in lines)}
    panels = [(name, lines, rows, "round") for name, lines in named.items()]
    if rows and "simulated_seconds" in rows[-1]:
        name = "accuracy" if "accuracy" in named else "loss"
        timed = [row | {"round": row["simulated_seconds"]} for row in rows]
        panels.append((f"{name} over simulated time", named[name], timed, "seconds"))
    columns = 2 if len(panels) > 1 else 1
    height = 3.0 * -(-len(panels) // columns) + 0.5
    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    figure.suptitle(drawable(title), fontsize=9, family="monospace")
    for index, (name, lines, shown, unit) in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, index + 1)
        _panel(axes, name, shown, lines)
        axes.set_xlabel(unit)
        if name.startswith(_LOGARITHMIC) and any(np.any(_series(rows, key)[1] > 0) for key, _, _ in lines):
            axes.set_yscale("log")
        else:
            axes.set_ylim(*((-0.02, 1.02) if name == "fraction clipped" else (None, 1.02)))
    return figure


# what a row's names begin with -> title of the panel
_CLIPPING = {
    "fraction clipped": ("clipped_steps", "clipped_clients", "step_clipped", "uplink/clipped", "example_clipped"),
    "thresholds": ("step_threshold", "uplink/threshold", "example_threshold"),
    "norms before the clip": ("step_norm", "uplink/norm", "client_norm", "example_norm"),
    "bias of the aggregate (1: none)": ("uplink/bias",),
}


def clipping(rows: Sequence[Row], title: str = "") -> Figure | None:
    """Plots the clips' fractions, thresholds, norms and bias over rounds; ``None`` without a clip.

    Each clip, and each group of a clip, has its own line.

    Args:
      rows: rows of ``fc.train``'s history.
      title: over the whole figure.

    Example:
      >>> fc.plots.clipping(result.history).savefig("clipping.png")
    """

    panels = clipping_metrics(rows)
    if "fraction clipped" not in panels:
        return None
    figure = Figure(figsize=(10.4, 3.0 * -(-len(panels) // 2) + 0.5), layout="constrained")
    figure.suptitle(drawable(title), fontsize=9, family="monospace")
    for index, (name, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, index + 1)
        _panel(axes, name, rows, [(key, label(key), f"C{i}") for i, key in enumerate(lines)])
        axes.set_xlabel("round")
        if name == "fraction clipped":
            axes.set_ylim(-0.02, 1.02)
        if name in ("thresholds", "norms before the clip"):
            axes.set_yscale("log")
    return figure


def clipping_metrics(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The metrics of clips, by panel: ``{"fraction clipped": ["clipped_steps", ...], ...}``.

    Args:
      rows: rows of ``fc.train``'s history.

    Example:
      >>> fc.plots.clipping_metrics(result.history)["thresholds"]  # ["step_threshold"]
    """
    keys = {key: None for row in rows for key in row}
    panels = {
        name: [key for key in keys if _unnumbered(key).startswith(starts) and _series(rows, key)[0].size]
        for name, starts in _CLIPPING.items()
    }
    return {name: found for name, found in panels.items() if found}


def _unnumbered(key: str) -> str:
    """``step_0/norm`` and ``uplink/1/norm`` as ``step_norm`` and ``uplink/norm``, without the clip's position."""
    return re.sub(r"(?<=/)\d+/", "", re.sub(r"_\d+/", "_", key))


def _panel(axes: Any, title: str, rows: Sequence[Row], lines: Sequence[tuple[str, str, str]]) -> None:
    for key, name, colour in lines:
        x, y = _series(rows, key)
        if not x.size:
            continue
        sparse = key.startswith("eval/")
        end = drawable(f"{name} ({y[-1]:.3g})")
        axes.plot(x, y, color=colour, lw=1.8 if sparse else 1.1, marker="o" if sparse else None, ms=3, label=end)
    # The legend lies above the curves, not to hide them; in one column if two are wider than the axes.
    columns = 2 if max((len(line.get_label()) for line in axes.lines), default=0) < 38 else 1
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.01), ncols=columns, borderaxespad=0, fontsize=7.5, frameon=False
    )
    axes.set_title(title, fontsize=10, loc="left", pad=8 + 12 * -(-len(axes.lines) // columns))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for before, row in itertools.pairwise(rows):
        if "went_on_from" in row:
            axes.axvline(before["round"], color="0.4", lw=0.9, ls="--")


def _series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [
        (row["round"], row[key]) for row in rows if abs(row.get(key, np.nan)) < 1e300 and abs(row["round"]) < 1e300
    ]
    rounds, values = np.array(points).reshape(-1, 2).T
    return rounds, values


def sweep(
    points: Mapping[str, Sequence[float] | np.ndarray],
    values: Mapping[int, Sequence[float]],
    metric: str,
    title: str = "",
) -> Figure:
    """A heat map of the means over a grid's first two hyper-parameters, or the metric against each hyper-parameter.

    Each cell takes the best value of all further hyper-parameters; a frame marks the best cell. For a single
    hyper-parameter, or points that are not a grid, each hyper-parameter has a panel, with a dot for every seed and
    fold.

    Args:
      points: ``{name: [P]}``.
      values: of each point by number, over seeds and folds; see ``fc.sweeping.values``.
      metric: the metric's name, which says whether more is better.
      title: over the whole figure.

    Example:
      >>> points = fc.sweeping.grid(lr=[0.1, 1.0], clip=[0.5, 1.0, 2.0])
      >>> losses = [0.9, 0.8, 0.7, 0.6, 0.4, 0.5]
      >>> fc.plots.sweep(points, dict(enumerate(losses)), "eval/examples/loss").savefig("sweep.png")
    """
    ticks = [np.unique(np.asarray(x)) for x in points.values()]
    cells = {tuple(float(x[p]) for x in list(points.values())[:2]) for p in values}
    is_grid = len(ticks) > 1 and len(cells) == len(ticks[0]) * len(ticks[1])
    panels = 1 if is_grid else len(points)
    size = (1.6 + 0.75 * len(ticks[0]), 1.4 + 0.5 * len(ticks[1])) if is_grid else (5.2 * panels, 4.0)
    figure = Figure(figsize=(max(5.2, size[0]), max(3.0, size[1])), layout="constrained")
    figure.suptitle(drawable(title), fontsize=9, family="monospace")
    axes = [figure.add_subplot(1, panels, k + 1) for k in range(panels)]
    if is_grid:
        _heat_map(figure, axes[0], points, ticks, values, metric)
        return figure
    for axis, (name, x) in zip(axes, points.items()):
        order = sorted(values, key=lambda p, x=x: x[p])  # type: ignore[misc]
        axis.plot([x[p] for p in order for _ in values[p]], [v for p in order for v in values[p]], ".", ms=4, alpha=0.5)
        axis.plot([x[p] for p in order], [np.mean(values[p]) for p in order], "o-" if panels == 1 else "o", ms=4)
        axis.set_xscale(_scale(x))
        axis.set_yscale(_scale([v for p in order for v in values[p]]) if metric.endswith("loss") else "linear")
        axis.set_xlabel(drawable(name))
        axis.set_ylabel(drawable(label(metric)))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _scale(x: Sequence[float] | np.ndarray) -> str:
    """Logarithmic for positive values over more than a decade."""
    finite = np.asarray(x)[np.isfinite(x)]
    return "log" if finite.size and finite.min() > 0 and finite.max() > 10 * finite.min() else "linear"


def _heat_map(figure: Figure, axis: Any, points: Any, ticks: Any, values: Any, metric: str) -> None:
    (x_name, x), (y_name, y) = list(points.items())[:2]
    better = max if higher_is_better(metric) else min
    mean = np.full((len(ticks[1]), len(ticks[0])), np.nan)
    for p, seen in values.items():
        cell = int(np.searchsorted(ticks[1], y[p])), int(np.searchsorted(ticks[0], x[p]))
        here = [v for v in (mean[cell], float(np.mean(seen))) if np.isfinite(v)]
        mean[cell] = better(here) if here else np.nan
    image = axis.imshow(mean, origin="lower", aspect="auto", cmap="viridis" if better is max else "viridis_r")
    middle = np.nanmean([np.nanmin(mean), np.nanmax(mean)]) if np.isfinite(mean).any() else 0.0
    for (row, column), value in np.ndenumerate(mean):
        dark = (value < middle) == (better is max)
        text = f"{value:.3g}" if np.isfinite(value) else "✕"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    if np.isfinite(mean).any():
        row, column = np.unravel_index((np.nanargmax if better is max else np.nanargmin)(mean), mean.shape)
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d95f02", lw=2.5))
    axis.set_xticks(range(len(ticks[0])), [f"{v:.3g}" for v in ticks[0]])
    axis.set_yticks(range(len(ticks[1])), [f"{v:.3g}" for v in ticks[1]])
    axis.set_xlabel(drawable(x_name))
    axis.set_ylabel(drawable(y_name))
    figure.colorbar(image, ax=axis, label=drawable(label(metric)))
