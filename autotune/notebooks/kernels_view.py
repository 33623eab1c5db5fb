"""Notebook 04: the dynamic kernels of a model, drawn over the photograph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from autotune import plots
from autotune.notebooks.recording import (
    Call,
    contmix_affinity,
    contmix_kernels,
    covering_windows,
    involution_kernels,
    involution_window,
    outlook_kernel,
)
from autotune.notebooks.session import Model, Session, finish, grid, without_ticks
from kernels.windows import Window

__all__ = ["POINTS", "contmix_figure", "involution_figure", "kernel_sum_figure", "outlook_figure", "place"]

POINT_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7")


def place(kernel: Tensor, window: Window, position: tuple[int, int], size: Sequence[int]) -> np.ndarray:
    """A kernel [K, K] where it acts: [H, W], masked outside the window of the output at ``position``."""
    canvas = np.ma.masked_all(size)
    rows, columns = (window.neighbours(length, axis)[position[axis]] for axis, length in enumerate(size))
    for row, values in zip(rows.tolist(), kernel.tolist(), strict=True):
        for column, value in zip(columns.tolist(), values, strict=True):
            if 0 <= row < size[0] and 0 <= column < size[1]:
                canvas[row, column] = value
    return canvas


@dataclass(frozen=True)
class Point:
    """A place in the picture, from 0 to 1 down and to the right, and what is there."""

    name: str
    down: float
    right: float

    def position(self, size: Sequence[int]) -> tuple[int, int]:
        """The entry of a map of that size that covers the place."""
        return int(self.down * size[0]), int(self.right * size[1])


POINTS = (
    Point("spectacles", 0.28, 0.58),
    Point("star", 0.09, 0.13),
    Point("ribbons", 0.915, 0.77),
    Point("background", 0.35, 0.97),
)


@dataclass(frozen=True)
class Column:
    """One column of a figure with a row for each point: maps that cover the picture, masked where there is nothing.

    ``scale`` names the colour bar; columns with the same name share it. ``signed`` puts 0 at its centre.
    """

    heading: str
    maps: list[np.ndarray]
    scale: str
    signed: bool = False


@dataclass(frozen=True)
class View:
    """The part of the picture that a panel shows: ``reach`` entries around ``centre`` on a map of ``size``."""

    centre: tuple[int, int]
    size: Sequence[int]
    reach: int


def involution_figure(call: Call, model: Model, pixels: np.ndarray, session: Session, groups: int = 4) -> Figure:
    """The kernels of the first groups at every point, over the part of the picture on which they act."""
    weight, window = _drawable(involution_kernels(call)), involution_window(call)
    (height, width), source = weight.shape[-2:], call.arguments["x"].shape[-2:]
    size = (height, width)
    positions = [point.position(size) for point in POINTS]
    columns = [
        Column(
            f"group {group + 1} of {weight.shape[0]}",
            [place(weight[group, :, :, row, column], window, (row, column), source) for row, column in positions],
            "weight (no unit)",
            signed=True,
        )
        for group in range(min(groups, weight.shape[0]))
    ]
    rows_apart, columns_apart = window.stride
    views = [
        View((row * rows_apart, column * columns_apart), source, window.kernel_size[0]) for row, column in positions
    ]
    title = f"Involution: {window.kernel_size[0]}×{window.kernel_size[1]} kernels on the {size[0]}×{size[1]} map"
    return _rows_of_points(pixels, columns, title, f"{model.title} · {session.label}", views=views)


def contmix_figure(call: Call, model: Model, pixels: np.ndarray, session: Session, head: int = 0) -> Figure:
    """At every point the affinity to the 7×7 context, and the small and the large kernel made from it."""
    affinity = _drawable(contmix_affinity(call))[head]
    size, side = affinity.shape[:2], affinity.shape[-1]
    positions = [point.position(size) for point in POINTS]
    maps = [affinity[position].numpy() for position in positions]
    columns = [Column(f"affinity to {side}×{side} context", maps, "affinity", signed=True)]
    for weights in contmix_kernels(call):
        weight = _drawable(weights)[head]
        kernel_size = weight.shape[-1]
        window = Window.neighborhood((kernel_size, kernel_size))
        maps = [place(weight[position] * kernel_size**2, window, position, size) for position in positions]
        columns.append(Column(f"{kernel_size}×{kernel_size} kernel", maps, "weight × K²: 1 is a plain mean"))
    title = f"ContMix: a glance at the whole image makes two kernels, on the {size[0]}×{size[1]} map"
    note = f"{model.title}, head {head + 1} of {call.arguments['query'].shape[1]} · {session.label}"
    return _rows_of_points(pixels, columns, title, note)


def outlook_figure(call: Call, model: Model, pixels: np.ndarray, session: Session, heads: int = 4) -> Figure:
    """What every point takes of its neighbours, over all windows that cover it."""
    size = tuple(call.arguments["value"].shape[1:3])
    total = call.arguments["logits"].shape[3]
    positions = [point.position(size) for point in POINTS]
    kernels_at = [_drawable(outlook_kernel(call, *position)) for position in positions]
    columns = [
        Column(
            f"head {head + 1} of {total}",
            [np.ma.masked_equal(kernel[head].numpy(), 0) for kernel in kernels_at],
            "weight, summed over the windows",
        )
        for head in range(min(heads, total))
    ]
    views = [View(position, size, 2 * call.arguments["kernel_size"] - 1) for position in positions]
    counts = [len(covering_windows(call, *position)) for position in positions]
    notes = [f"{count} window{'s' * (count > 1)}" for count in counts]
    title = f"Outlook attention: what a token takes of its neighbours, on the {size[0]}×{size[1]} map"
    return _rows_of_points(pixels, columns, title, f"{model.title} · {session.label}", views=views, notes=notes)


def kernel_sum_figure(calls: Sequence[Call], model: Model, pixels: np.ndarray, session: Session) -> Figure:
    """Σ_k of every pixel's kernel, the mean over groups, for the first involution of each map size."""
    first: dict[int, Call] = {}
    for call in calls:
        first.setdefault(call.output.shape[-1], call)
    with plots.style():
        columns = 3
        rows = math.ceil((1 + len(first)) / columns)
        figure, axes = grid(rows, columns, 3.5 * columns, 3.2 * rows + 0.6)
        without_ticks(axes[0][0]).imshow(pixels)
        axes[0][0].set_title("photograph")
        for axis in axes.flat[1 + len(first) :]:
            axis.remove()
        for axis, (side, call) in zip(axes.flat[1:], first.items(), strict=False):
            weight = _drawable(involution_kernels(call))
            image = without_ticks(axis).imshow(weight.sum((1, 2)).mean(0), cmap="cividis")
            axis.set_title(f"{side}×{side}, K = {weight.shape[1]}")
            figure.colorbar(image, ax=axis, shrink=0.7, pad=0.03, ticks=MaxNLocator(3), label="sum of weights")
        return finish(
            figure, "Every pixel's involution kernel, as its sum over the window", f"{model.title} · {session.label}"
        )


def _rows_of_points(
    pixels: np.ndarray,
    columns: Sequence[Column],
    title: str,
    note: str,
    *,
    views: Sequence[View] | None = None,
    notes: Sequence[str] | None = None,
) -> Figure:
    """A row for each point: the photograph with the point marked, then each column's map over a grey photograph."""
    extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
    with plots.style():
        figure, axes = grid(len(POINTS), 1 + len(columns), 2.35 * (1 + len(columns)), 2.35 * len(POINTS) + 1.6)
        images: dict[str, tuple[Any, list[Axes]]] = {}
        for index, (row, point, colour) in enumerate(zip(axes, POINTS, POINT_COLOURS, strict=True)):
            down, right = point.down * pixels.shape[0], point.right * pixels.shape[1]
            without_ticks(row[0]).imshow(pixels)
            row[0].plot(right, down, "o", color=colour, markersize=11, markeredgecolor="white", markeredgewidth=2)
            row[0].set_ylabel(f"{point.name}\n{notes[index]}" if notes else point.name, fontsize=12)
            for axis, column in zip(row[1:], columns, strict=True):
                without_ticks(axis).imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=1, alpha=0.6)
                image = axis.imshow(column.maps[index], extent=extent, alpha=0.85, **_colours(column.scale, columns))
                axis.plot(right, down, "+", color="white", markersize=12, markeredgewidth=3.5)
                axis.plot(right, down, "+", color="black", markersize=10, markeredgewidth=1.5)
                images.setdefault(column.scale, (image, []))[1].append(axis)
                if views:
                    _zoom(axis, views[index], pixels)
        for axis, heading in zip(axes[0], ["photograph", *(column.heading for column in columns)], strict=True):
            axis.set_title(heading, fontsize=11)
        for name, (image, used) in images.items():
            share = 0.6 if len(used) > len(POINTS) else 0.9
            figure.colorbar(image, ax=used, label=name, location="bottom", shrink=share, aspect=30, pad=0.02)
        return finish(figure, title, note)


def _drawable(tensor: Tensor) -> Tensor:
    """The first image's entries, ready for matplotlib."""
    return tensor[0].detach().float().cpu()


def _colours(scale: str, columns: Sequence[Column]) -> dict[str, Any]:
    """Colour map and range that all columns of one scale share."""
    sharing = [column for column in columns if column.scale == scale]
    values = np.concatenate([np.ma.compressed(shown) for column in sharing for shown in column.maps])
    if sharing[0].signed:
        return {"cmap": "PuOr", "norm": CenteredNorm(halfrange=float(np.abs(values).max()))}
    return {"cmap": "viridis", "vmin": values.min(), "vmax": values.max()}


def _zoom(axis: Axes, view: View, pixels: np.ndarray) -> None:
    """Show the view alone; empty beyond the picture."""
    scale = pixels.shape[0] / view.size[0], pixels.shape[1] / view.size[1]
    row, column = ((c + 0.5) * s - 0.5 for c, s in zip(view.centre, scale, strict=True))
    axis.set_xlim(column - view.reach * scale[1], column + view.reach * scale[1])
    axis.set_ylim(row + view.reach * scale[0], row - view.reach * scale[0])
