"""Pictures: figures without a window, in one style."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose panels and legends make room for each other."""
    return Figure(figsize=(width, height), layout="constrained")


def plain(*panels: Axes) -> None:
    """Takes the upper and the right edge off panels."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)


def colours(count: int = 20) -> Any:
    """Colours that are told apart, for the lines of a panel."""
    return matplotlib.colormaps["tab20"](range(count))


def file_name(track: str) -> str:
    """Of a track's picture, without its ending."""
    return "".join(c if c.isalnum() else "_" for c in track).replace("__", "_")
