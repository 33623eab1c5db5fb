"""Kernels at a few places of the photograph, drawn over the pixels on which they act."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from torch import Tensor

from autotune import plots
from kernels.windows import Window

from .common import bare

Position = tuple[int, int]
# What is there -> its place, from 0 to 1 down and to the right, and a colour.
POINTS = {
    "spectacles": (0.28, 0.58, "#E69F00"),
    "star": (0.09, 0.13, "#56B4E9"),
    "ribbons": (0.915, 0.77, "#009E73"),
    "background": (0.35, 0.97, "#CC79A7"),
}


class Column(NamedTuple):
    """A map for each point, which covers the picture and is masked where there is nothing.

    ``scale`` names the colour bar, which columns share; ``signed`` puts 0 at its centre.
    """

    heading: str
    maps: Sequence[np.ndarray]
    scale: str
    signed: bool = False


def positions(size: Sequence[int]) -> list[Position]:
    """The entry of a map of that size which covers each point."""
    return [(int(down * size[0]), int(right * size[1])) for down, right, _ in POINTS.values()]


def place(kernel: Tensor, window: Window, position: Position, size: Sequence[int]) -> np.ndarray:
    """A kernel [K, K] where it acts: [H, W], masked outside the window of the output at ``position``."""
    canvas = np.ma.masked_all(tuple(size))
    rows, columns = (window.neighbours(length, axis)[position[axis]] for axis, length in enumerate(size))
    for row, values in zip(rows.tolist(), kernel.tolist(), strict=True):
        for column, value in zip(columns.tolist(), values, strict=True):
            if 0 <= row < size[0] and 0 <= column < size[1]:
                canvas[row, column] = value
    return canvas


def points_figure(
    pixels: np.ndarray,
    size: Sequence[int],
    columns: Sequence[Column],
    title: str,
    note: str,
    *,
    reach: int | None = None,
    notes: Sequence[str] = ("",) * len(POINTS),
) -> Figure:
    """A row for each point: the photograph, then each column's map over it in grey.

    The marks stand at the centre of the entry of the [``size``] map whose kernel is drawn; ``reach`` shows only that
    many of its entries around it.
    """
    side = pixels.shape[0]
    with plots.style():
        figure, axes = plots.grid(len(POINTS), 1 + len(columns), 2.35 * (1 + len(columns)), 2.35 * len(POINTS) + 1.6)
        images: dict[str, tuple[Any, list[Axes]]] = {}
        for index, (row, (name, (*_, colour)), position) in enumerate(
            zip(axes, POINTS.items(), positions(size), strict=True)
        ):
            down, right = ((entry + 0.5) * side / length for entry, length in zip(position, size, strict=True))
            bare(row[0]).imshow(pixels, extent=(0, side, side, 0))
            row[0].plot(right, down, "o", color=colour, markersize=11, markeredgecolor="white", markeredgewidth=2)
            row[0].set_ylabel(f"{name}\n{notes[index]}".strip(), fontsize=12)
            for axis, column in zip(row[1:], columns, strict=True):
                bare(axis).imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=1, alpha=0.6, extent=(0, side, side, 0))
                image = axis.imshow(
                    column.maps[index], extent=(0, side, side, 0), alpha=0.85, **_colours(column.scale, columns)
                )
                axis.plot(right, down, "+", color="white", markersize=12, markeredgewidth=3.5)
                axis.plot(right, down, "+", color="black", markersize=10, markeredgewidth=1.5)
                images.setdefault(column.scale, (image, []))[1].append(axis)
                if reach is not None:
                    around = (reach + 0.5) * side / size[0]
                    axis.set(xlim=(right - around, right + around), ylim=(down + around, down - around))
        for axis, heading in zip(axes[0], ["photograph", *(column.heading for column in columns)], strict=True):
            axis.set_title(heading, fontsize=11)
        for name, (image, used) in images.items():
            share = 0.6 if len(used) > len(POINTS) else 0.9
            figure.colorbar(image, ax=used, label=name, location="bottom", shrink=share, aspect=30, pad=0.02)
        return plots.finish(figure, title, note)


def _colours(scale: str, columns: Sequence[Column]) -> dict[str, Any]:
    """Colour map and range that all columns of one scale share."""
    sharing = [column for column in columns if column.scale == scale]
    values = np.concatenate([np.ma.compressed(shown) for column in sharing for shown in column.maps])
    if sharing[0].signed:
        return {"cmap": "PuOr", "norm": CenteredNorm(halfrange=float(np.abs(values).max()))}
    return {"cmap": "viridis", "vmin": values.min(), "vmax": values.max()}
