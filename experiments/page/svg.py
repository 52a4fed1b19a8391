"""Line charts as inline SVG: sharp at any size, coloured by the page's style sheet, with no script.

Not Matplotlib's: a chart of 150 rounds takes 23 kB there and 7 kB here, and Matplotlib's has neither the page's dark
mode nor the names of clients under the pointer.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import ticker

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 8, 36
MOST_POINTS = 500  # of a line; of more, the least and the greatest of each stretch are kept
MOST_DOTS = 60
_BYTES = (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")
_SECONDS = (86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "s")


class Line(NamedTuple):
    """One line of a chart.

    Attributes:
      label: in the legend.
      x, y: ``[n]`` points; those that are not finite are left out.
      style: classes of the style sheet, such as ``"c0"``.
      dots: whether points are marked (as far as they are few).
      notes: what a pointer on each dot shows; by default x and y.
      value: in the legend, too; by default the last y.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: str
    dots: bool = False
    notes: Sequence[str] | None = None
    value: float | None = None


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    shade: tuple[float, float] | None = None,
    seams: Sequence[tuple[float, str]] = (),
) -> str:
    """A figure with title, legend and axes; nothing if no line has a point.

    Args:
      title: above it; what is shown.
      lines: in the order of the legend, which says where each ends.
      x_label, y_label: names of the axes, with units.
      log: whether y has a logarithmic scale; points that are not positive are then left out.
      x_range, y_range: ends of the axes, if not those of the lines.
      shade: ``(from x, to x)``, a stretch to point out.
      seams: ``(x, note)``, where a line across marks that a run went on; a pointer on it shows the note.
    """
    lines = [line for line in (_clean(line, log) for line in lines) if len(line.x)]
    if not lines:
        return ""
    xs, ys = (np.concatenate([getattr(line, axis) for line in lines]) for axis in "xy")
    x_low, x_high = x_range or _widened(xs.min(), xs.max(), 0.1 * abs(xs.max()), 0)
    extent = np.log10([ys.min(), ys.max()]) if log else np.array([ys.min(), ys.max()])
    y_low, y_high = y_range or _widened(extent[0], extent[1], 0.1 if log else 0.1 * abs(extent[1]), 0.04)
    y_ticks = _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high)
    left = max(LEFT, round(23 + 6.8 * max((len(_tick(tick)) for tick in y_ticks), default=0)))  # beside the axis's name

    def place(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        across = left + (np.asarray(x) - x_low) / (x_high - x_low) * (WIDTH - left - RIGHT)
        up = ((np.log10(y) if log else np.asarray(y)) - y_low) / (y_high - y_low)
        return across, HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    base, parts = HEIGHT - BOTTOM, []
    if shade is not None:
        (start, end), _ = place(np.array(shade), np.array([1, 1]))
        parts.append(f'<rect class="shade" x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{base - TOP}"/>')
    for seam, note in seams:
        across, _ = place(np.array(seam), np.array(1))
        parts.append(f'<path class="seam" d="M{across:.1f} {TOP}V{base}"><title>{html.escape(note)}</title></path>')
    for tick in y_ticks:
        _, y = place(np.array(0), np.array(tick))
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in _ticks(x_low, x_high):
        at, _ = place(np.array(tick), np.array(1))
        parts.append(f'<path class="axis" d="M{at:.1f} {base}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{base + 16}" text-anchor="middle">{_tick(tick)}</text>')
    parts.append(f'<path class="axis" d="M{left} {base}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{(left + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}')
    parts.append(f'</text><text class="y" transform="translate(11 {(TOP + base) / 2}) rotate(-90)" ')
    parts.append(f'text-anchor="middle">{html.escape(y_label)}{" (log)" if log else ""}</text>')
    parts += [_drawn(line, *place(line.x, line.y)) for line in lines]

    ends = [number(line.y[-1] if line.value is None else line.value) for line in lines]
    legend = "".join(f"<li>{key(x.style)}{html.escape(x.label)} <b>{end}</b></li>" for x, end in zip(lines, ends))
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    caption = f'<figcaption>{html.escape(title)}</figcaption><ul class="legend">{legend}</ul>'
    return f"<figure>{caption}{drawing}</figure>"


def key(style: str) -> str:
    """A short stroke in a line's colour, for a legend."""
    return f'<svg class="key" viewBox="0 0 20 8"><path class="line {style}" d="M1 4H19"/></svg>'


def _clean(line: Line, log: bool) -> Line:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    keep = (np.abs(x) < 1e300) & (np.abs(y) < 1e300) & ((y > 0) | (not log))  # of more, there is no room for an axis
    notes = None if line.notes is None else [note for note, kept in zip(line.notes, keep) if kept]
    return line._replace(x=x[keep], y=y[keep], notes=notes)


def _drawn(line: Line, across: np.ndarray, down: np.ndarray) -> str:
    keep = thinned(down)
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(across[keep], down[keep], strict=True))
    out = f'<path class="line {line.style}" d="M{path}"/>'
    if (line.dots and len(across) <= MOST_DOTS) or len(across) == 1:
        notes = line.notes or [f"{number(x)}: {number(y)}" for x, y in zip(line.x, line.y, strict=True)]
        for x, y, note in zip(across, down, notes, strict=True):
            text = html.escape(f"{line.label}, {note}")
            out += f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{text}</title></circle>'
    return out


def thinned(y: np.ndarray) -> np.ndarray:
    """Which points of a long line to draw: the ends, and the extremes of each stretch, so that no spike is lost."""
    if len(y) <= MOST_POINTS:
        return np.arange(len(y))
    stretches = np.array_split(np.arange(len(y)), MOST_POINTS // 2)
    extremes = [s[[y[s].argmin(), y[s].argmax()]] for s in stretches]
    return np.unique(np.concatenate([[0], *extremes, [len(y) - 1]]))


def _widened(low: float, high: float, alone: float, share: float) -> tuple[float, float]:
    """A range with a share of room at both ends, or with ``alone`` around a single value."""
    room = share * (high - low) if high > low else alone or 1.0
    return float(low - room), float(high + room)


def _ticks(low: float, high: float) -> list[float]:
    values = ticker.MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    room = 1e-9 * (high - low)
    return [float(v) for v in values if low - room <= v <= high + room]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, every k-th where they are many; with 2 and 5 times them where they are few."""
    whole = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    if len(whole) >= 3:
        return [10.0**e for e in whole if e % math.ceil(len(whole) / 5) == 0]
    few = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    found = [x for x in few if low <= math.log10(x) <= high]
    return found if len(found) >= 2 else [t for t in _ticks(10**low, 10**high) if t > 0]


def number(value: float) -> str:
    """Three digits: 0.900, 12.5, 1500, 2.50e-7."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _tick(value: float) -> str:
    """As short as can be: 0.9, 12.5, 1500, 2.5e-7."""
    mantissa, *exponent = number(value).split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return "e".join([mantissa, *exponent])


def byte_unit(count: float) -> tuple[float, str]:
    """A unit for a number of bytes, and its size."""
    return next((size, unit) for size, unit in _BYTES if count >= size or size == 1)


def time_unit(seconds: float) -> tuple[float, str]:
    """A unit for a number of seconds, and its size."""
    return next((size, unit) for size, unit in _SECONDS if seconds >= 2 * size or size == 1)
