"""The picture that opens the README and notebook 00: which inputs an output sums, and where their weights come from.

    python notebooks/results/windows.py

from the repository's root writes windows.png beside this file. It shows no measurement, so nothing else draws it again.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from autotune import plots

SIDE, KERNEL = 11, 5
OUTPUTS = {(7, 8): "#0072b2", (0, 1): "#d55e00"}  # one inside the map, one near its corner
PANELS = (
    ("convolution", "one learned kernel\nfor all pixels", False),
    ("involution\n(RedNet)", "computed from\nthe pixel itself", False),
    ("outlook attention\n(VOLO)", "computed at the centre,\noverlapping windows summed", False),
    ("ContMix\n(OverLoCK)", "pixel × 7×7 summary of\nthe image, then softmax", True),
)


def _start(position: int, clamped: bool) -> int:
    first = position - KERNEL // 2
    return min(max(first, 0), SIDE - KERNEL) if clamped else first


def _weights(panel: int, output: int) -> np.ndarray:
    """Shades of a window's cells: the same for both outputs of a convolution, of their own everywhere else."""
    seed = 7 if panel == 0 else 10 * panel + output
    shades = np.random.default_rng(seed).uniform(0.12, 0.95, (KERNEL, KERNEL))
    return shades / shades.sum() * 9 if panel == 3 else shades


def _draw(axis: Axes, panel: int, clamped: bool) -> None:
    for row in range(SIDE):
        for column in range(SIDE):
            axis.add_patch(Rectangle((column, row), 1, 1, facecolor="#f4f4f4", edgecolor="#c8c8c8", linewidth=0.6))
    for index, ((row, column), colour) in enumerate(OUTPUTS.items()):
        top, left = _start(row, clamped), _start(column, clamped)
        for (i, j), shade in np.ndenumerate(_weights(panel, index)):
            inside = 0 <= top + i < SIDE and 0 <= left + j < SIDE
            place = (left + j, top + i)
            if inside:
                axis.add_patch(Rectangle(place, 1, 1, facecolor=colour, alpha=min(1.0, float(shade)), linewidth=0))
            else:
                axis.add_patch(Rectangle(place, 1, 1, fill=False, hatch="////", edgecolor="#c0c0c0", linewidth=0))
        axis.add_patch(Rectangle((left, top), KERNEL, KERNEL, fill=False, edgecolor=colour, linewidth=2.2))
        axis.plot(column + 0.5, row + 0.5, "o", color="white", markeredgecolor="black", markersize=8)
    axis.set(xlim=(-1.4, SIDE + 0.4), ylim=(SIDE + 3.2, -2.2), aspect="equal")
    axis.axis("off")


def windows_figure() -> Figure:
    """Four panels: the windows of two outputs (dots), shaded by their weights; hatched positions read 0."""
    figure = Figure(figsize=(13, 5))
    axes = figure.subplots(1, len(PANELS))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.86, wspace=0.04)
    for index, (axis, (title, source, clamped)) in enumerate(zip(axes, PANELS, strict=True)):
        _draw(axis, index, clamped)
        axis.set_title(title, fontsize=14, fontweight="bold")
        rule = "clamped: the window slides inward" if clamped else "zero-padded: hatched positions read 0"
        axis.text(SIDE / 2, SIDE + 0.4, f"weights: {source}", ha="center", va="top", fontsize=13)
        axis.text(SIDE / 2, SIDE + 2.3, rule, ha="center", va="top", fontsize=11, color="#555555")
    return figure


if __name__ == "__main__":
    plots.save(windows_figure(), Path(__file__).with_name("windows.png"))
