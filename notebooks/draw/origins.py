"""The picture that notebook 00 opens with: where the weights of each operator come from, and what they multiply."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from autotune import plots

SIDE, OUTPUT = 14, (5, 9)  # the map, and the position whose output is computed
SOURCE, VALUES = "#E69F00", "#0072B2"


class Panel(NamedTuple):
    """Squares (row, column, side, alpha) of what the weights are computed from, and of what they multiply."""

    title: str
    formula: str
    words: str
    sources: list[tuple[int, int, int, float]]
    windows: list[tuple[int, int, int]]


def _panels() -> list[Panel]:
    row, column = OUTPUT
    regions = [(2 * i, 2 * j, 2, 0.45) for i in range(7) for j in range(7)]
    tokens = [(i, j, 1, 0.55) for i in range(SIDE) for j in range(SIDE)]
    centres = [(row - 1 + i, column - 1 + j) for i in (0, 2) for j in (0, 2)]  # of windows that are 2 apart
    near = (row - 2, column - 2, 5)
    return [
        Panel("convolution", "w = parameters", "no pixel: learned once,\nthe same everywhere", [], [near]),
        Panel("involution", "w = W · x[i]", "the pixel itself", [(row, column, 1, 0.9)], [near]),
        Panel(
            "outlook attention",
            "w = softmax(A · x̄)",
            "the centre of each window\nthat covers the pixel",
            [(i, j, 2, 0.75) for i, j in centres],
            [(i - 1, j - 1, 3) for i, j in centres],
        ),
        Panel(
            "ContMix",
            "w = softmax(P · (q[i] · r) + b)",
            "the pixel, compared with\n7×7 means of the image",
            [*regions, (row, column, 1, 0.9)],
            [near],
        ),
        Panel(
            "self-attention", "w = softmax(q[i] · k)", "the pixel, compared\nwith every pixel", tokens, [(0, 0, SIDE)]
        ),
    ]


def _map(axis: Axes) -> None:
    for line in range(SIDE + 1):
        axis.plot((0, SIDE), (line, line), color="#d8d8d8", linewidth=0.6, zorder=0)
        axis.plot((line, line), (0, SIDE), color="#d8d8d8", linewidth=0.6, zorder=0)
    axis.plot(OUTPUT[1] + 0.5, OUTPUT[0] + 0.5, "o", color="white", markeredgecolor="black", markersize=7, zorder=5)
    axis.set(xlim=(-0.4, SIDE + 0.4), ylim=(SIDE + 0.4, -0.4), aspect="equal")
    axis.axis("off")


def origins_figure() -> Figure:
    """Above, orange: what the weights for one output (the dot) are computed from. Below, blue: what they multiply."""
    panels, random = _panels(), np.random.default_rng(2)
    with plots.style():
        figure, axes = plots.grid(2, len(panels), 13, 6.4)
        for (above, below), panel in zip(axes.T, panels, strict=True):
            _map(above)
            _map(below)
            for row, column, side, alpha in panel.sources:
                square = Rectangle(
                    (column, row), side, side, facecolor=(SOURCE, alpha), edgecolor="white", linewidth=side
                )
                above.add_patch(square)
            if not panel.sources:
                above.text(
                    SIDE / 2, 11, "parameters", ha="center", va="center", fontsize=12,
                    bbox={"facecolor": SOURCE, "alpha": 0.6, "edgecolor": "none", "boxstyle": "round,pad=0.5"},
                )  # fmt: skip
            for top, left, side in panel.windows:
                for index in np.ndindex(side, side):
                    shade = random.uniform(0.08, 0.75 if len(panel.windows) == 1 else 0.4)
                    below.add_patch(
                        Rectangle((left + index[1], top + index[0]), 1, 1, facecolor=VALUES, alpha=shade, linewidth=0)
                    )
                below.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=VALUES, linewidth=1.6))
            above.set_title(f"{panel.title}\n\n", fontsize=14, fontweight="bold", loc="center")
            above.text(SIDE / 2, -0.6, panel.words, ha="center", va="bottom", fontsize=11)
            below.set_title(f"↓  {panel.formula}", fontsize=12, fontweight="normal", loc="center")
        note = "orange: what the weights of the dot's output are computed from · blue: what they multiply, darker: more"
        return plots.finish(figure, "Where do the weights come from?", note)
