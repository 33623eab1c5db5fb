"""One style for every figure: notebooks, ``profile`` and the README draw with these few functions.

Colours are Okabe and Ito's, told apart by colour-blind readers; each contender has a marker of its own as well, so
nothing rests on colour alone. Sizes are chosen for a README, which shows a figure some 800 pixels wide.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kernels.files import atomic_write

COLOURS = {
    "ours": "#0072B2",
    "naive": "#D55E00",
    "compiled": "#E69F00",
    "peer": "#009E73",
    "floor": "#555555",
    "guide": "#B8B8B8",
}
MARKERS = {"ours": "o", "naive": "s", "compiled": "D", "peer": "^", "floor": "|"}

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=[COLOURS[name] for name in ("ours", "naive", "peer", "compiled")]),
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 7,
}


def style() -> AbstractContextManager[None]:
    """``with style():`` draws in the style; nothing outside the block changes."""
    return mpl.rc_context(STYLE)


def grid(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of ``width`` × ``height`` inches with its rows × columns axes, to be made inside ``style()``.

    It belongs to no window and needs no closing.
    """
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish(figure: Figure, title: str, device: str) -> Figure:
    """The title above, and below it what every figure must tell: the device it was measured on. To be called last.

    Either takes a line of its own where a legend needs the place, and smaller letters where it is too long. Then the
    layout is settled once: a notebook would settle it again at every drawing, for seconds.
    """
    heading = figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    note = figure.supxlabel(device, x=0.99, ha="right", fontsize=10, color=COLOURS["floor"], linespacing=1.7)
    figure.draw_without_rendering()
    legends = [legend.get_window_extent() for legend in figure.legends]
    for text, apart, size in ((heading, "\n{}", 14), (note, "{}\n", 10)):
        box = text.get_window_extent()
        if any(box.overlaps(legend) for legend in legends):
            text.set_text(apart.format(text.get_text()))
        text.set_fontsize(min(size, size * 0.98 * figure.bbox.width / box.width))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def save(figure: Figure, path: Path, source: str | None = None) -> Path:
    """Write a PNG, whole or not at all; ``source`` says inside the file what it was drawn from."""
    # Without the version of matplotlib inside, the same numbers give the same file.
    metadata = {"Software": None, "Source": source}
    atomic_write(path, lambda file: figure.savefig(file, format="png", metadata=metadata))
    return path


@dataclass(frozen=True)
class Comparison:
    """One line of a comparison: what the contenders needed, and perhaps the least that anyone could need."""

    group: str
    label: str
    ours: float
    naive: float
    floor: float | None = None
    compiled: float | None = None


def comparison_figure(
    panels: Sequence[tuple[str, str, Sequence[Comparison]]],
    *,
    title: str,
    contender: str = "naive",
    device: str,
    ours: str = "ours",
) -> Figure:
    """Dumbbells on a logarithmic axis: how far ours lies left of the nearest other is the ratio, written beside each.

    Args:
        panels: of each panel, side by side: heading, what is compared (with its unit; less is better), and lines.
            All panels have the same lines in the same order.
        title: of the figure.
        contender: what ours is compared with.
        device: where it was measured.
        ours: how the legend calls it.
    """
    lines = panels[0][2]
    positions, group_starts = _positions(lines)
    with style():
        height = 1.7 + 0.27 * (positions[-1] + 1)
        figure, ((*axes,),) = grid(1, len(panels), max(9.0, 3.6 + 3.2 * len(panels)), height)
        for axis, (heading, quantity, comparisons) in zip(axes, panels, strict=True):
            _draw_panel(axis, positions, comparisons)
            axis.set_title(heading)
            axis.set_xlabel(f"{quantity}  (less is better)")
            axis.set_yticks(positions, [line.label if axis is axes[0] else "" for line in lines])
        left: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        for name, position in group_starts:
            axes[0].annotate(name, (0, position - 0.85), (-6, 0), va="center", fontweight="bold", **left)
        handles, labels = axes[0].get_legend_handles_labels()
        names = {"naive": contender, "ours": ours}
        labels = [names.get(label, label) for label in map(str, labels)]
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels))
        return finish(figure, title, device)


def _positions(lines: Sequence[Comparison]) -> tuple[list[float], list[tuple[str, float]]]:
    """Where each line goes, top to bottom, with room for a heading above each group; and each group's first line."""
    positions: list[float] = []
    starts: list[tuple[str, float]] = []
    cursor = -1.0
    for group, members in groupby(lines, attrgetter("group")):
        cursor += 1.1
        starts.append((group, cursor + 1))
        for _ in members:
            cursor += 1
            positions.append(cursor)
    return positions, starts


# Of a panel: what the legend calls it, size, and depth. Ours is above naive and smaller: where both are equal, each
# still shows.
SERIES = {
    "floor": ("memory floor", 110, 2),
    "ours": ("ours", 40, 4),
    "naive": ("naive", 62, 3),
    "compiled": ("naive, compiled", 46, 3),
}


def _draw_panel(axis: Axes, positions: Sequence[float], comparisons: Sequence[Comparison]) -> None:
    lines = list(zip(comparisons, positions, strict=True))
    axis.set_xscale("log")
    ours, naive = ([getattr(line, name) for line in comparisons] for name in ("ours", "naive"))
    axis.hlines(positions, ours, naive, color=COLOURS["guide"], linewidth=2.5, zorder=1)
    for name, (label, size, depth) in SERIES.items():
        known = [(getattr(line, name), y) for line, y in lines if getattr(line, name) is not None]
        if known:
            look: dict[str, Any] = {"marker": MARKERS[name], "color": COLOURS[name], "s": size, "zorder": depth}
            look |= {"linewidths": 2.2} if name == "floor" else {}
            axis.scatter(*zip(*known, strict=True), label=label, **look)
    for line, position in lines:
        ratio = min(line.naive, line.compiled or line.naive) / line.ours
        text = f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:.0f}×"
        winner = "floor" if text == "1.0×" else "ours" if ratio > 1 else "naive"
        place = max(line.ours, line.naive, line.compiled or 0), position
        bold: dict[str, Any] = {"va": "center", "fontsize": 10, "fontweight": "bold", "color": COLOURS[winner]}
        axis.annotate(text, place, (8, 0), textcoords="offset points", **bold)
    least, most = axis.get_xlim()
    axis.set_xlim(least, most * (most / least) ** 0.16)  # room for the ratios
    axis.set_ylim(max(positions) + 0.8, -0.5)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Powers of ten alone would leave a short axis with one number.
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if most / least > 100 else (1, 2, 5), numticks=8))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x")
