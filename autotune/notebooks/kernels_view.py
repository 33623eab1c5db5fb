"""Notebook 04: the dynamic kernels of a model, taken from the very calls it makes, drawn over the photograph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import kernels
from autotune import plots
from autotune.notebooks.session import Model, Session, finish, grid, without_ticks
from kernels.reference import rpb_logits
from kernels.windows import Window

__all__ = [
    "Call",
    "contmix_affinity",
    "contmix_figure",
    "contmix_kernels",
    "involution_figure",
    "outlook_figure",
    "outlook_kernel",
    "place",
    "recorded_calls",
]

OPERATORS = ("involution2d", "contmix2d", "outlook_attention2d")
POINT_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class Call:
    """One call of a public operator: its name, every argument by name, and what it returned."""

    operator: str
    arguments: dict[str, Any]
    output: Tensor


@contextmanager
def recorded_calls(operators: Sequence[str] = OPERATORS) -> Iterator[list[Call]]:
    """Collect what models pass to ``kernels.<operator>`` inside the block, and what they get back, in order.

    Models call operators through the package ``kernels``, whose entries are replaced here for the time of the block; not
    for use while other threads run models.
    """
    calls: list[Call] = []

    def recorder(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(function)

        def recording(*arguments: Any, **options: Any) -> Tensor:
            output = function(*arguments, **options)
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            calls.append(Call(name, dict(bound.arguments), output))
            return output

        return recording

    originals = {name: getattr(kernels, name) for name in operators}
    for name, function in originals.items():
        setattr(kernels, name, recorder(name, function))
    try:
        yield calls
    finally:
        for name, function in originals.items():
            setattr(kernels, name, function)


def contmix_affinity(call: Call) -> Tensor:
    """Σ_c query[c, n] · key[c, l], the affinity of every position to each region of the context: [B, G, H, W, √L, √L]."""
    affinity = torch.einsum("bgchw,bgcl->bghwl", call.arguments["query"], call.arguments["key"])
    side = round(affinity.shape[-1] ** 0.5)
    return affinity.unflatten(-1, (side, side))


def contmix_kernels(call: Call) -> list[Tensor]:
    """The kernels that ContMix never stores, for each of its sizes: [B, G, H, W, K, K], each summing to 1."""
    arguments, sizes = call.arguments, call.arguments["kernel_sizes"]
    affinity = contmix_affinity(call).flatten(-2)
    logits = F.linear(affinity, arguments["proj_weight"], arguments["proj_bias"]).split([k * k for k in sizes], -1)
    height, width = affinity.shape[2:4]
    found = []
    for size, logit, rpb in zip(sizes, logits, arguments["rpb"], strict=True):
        bias = rpb_logits(rpb, height, width, Window.neighborhood((size, size)))
        found.append((logit + bias).softmax(-1).unflatten(-1, (size, size)))
    return found


def covering_windows(call: Call, row: int, column: int) -> list[tuple[int, int]]:
    """The windows (i, j) of an outlook attention that cover the token at (row, column)."""
    arguments = call.arguments
    size, stride, padding = (arguments[name] for name in ("kernel_size", "stride", "padding"))
    along = [
        [i for i in range(count) if 0 <= place - (i * stride - padding) < size]
        for place, count in ((row, arguments["logits"].shape[1]), (column, arguments["logits"].shape[2]))
    ]
    return [(i, j) for i in along[0] for j in along[1]]


def outlook_kernel(call: Call, row: int, column: int) -> Tensor:
    """What the output token at (row, column) takes of every value token, over all windows that cover it: [B, heads, H, W].

    Sums to the number of those windows (1, 2 or 4 for K = 3, stride 2), less where a window looks past the border.
    """
    arguments = call.arguments
    size, stride, padding = (arguments[name] for name in ("kernel_size", "stride", "padding"))
    height, width = arguments["value"].shape[1:3]
    attention = (arguments["logits"] * arguments["scale"]).softmax(-1)
    # With room around it for what lies outside, which is cut off at the end.
    out = attention.new_zeros(attention.shape[0], attention.shape[3], height + 2 * size, width + 2 * size)
    for i, j in covering_windows(call, row, column):
        top, left = i * stride - padding, j * stride - padding
        target = (row - top) * size + column - left
        rows, columns = (slice(first + size, first + 2 * size) for first in (top, left))
        out[:, :, rows, columns] += attention[:, i, j, :, target].unflatten(-1, (size, size))
    return out[:, :, size : size + height, size : size + width]


def place(kernel: Tensor, window: Window, position: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
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
    size: tuple[int, int]
    reach: int


def involution_figure(call: Call, model: Model, pixels: np.ndarray, session: Session, groups: int = 4) -> Figure:
    """The kernels of the first groups at every point, over the part of the picture on which they act."""
    weight = _drawable(call.arguments["weight"])
    size, source = weight.shape[-2:], tuple(call.arguments["x"].shape[-2:])
    kernel_size = (weight.shape[1], weight.shape[2])
    stride = call.arguments["stride"]
    window = Window(kernel_size, (stride, stride), (kernel_size[0] // 2, kernel_size[1] // 2))
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
    views = [View((row * stride, column * stride), source, kernel_size[0]) for row, column in positions]
    title = f"Involution: {kernel_size[0]}×{kernel_size[1]} kernels on the {size[0]}×{size[1]} map"
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
        first.setdefault(call.arguments["weight"].shape[-1], call)
    with plots.style():
        figure, axes = grid(1, 1 + len(first), 2.9 * (1 + len(first)), 3.4)
        without_ticks(axes[0][0]).imshow(pixels)
        axes[0][0].set_title("photograph")
        for axis, (side, call) in zip(axes[0][1:], first.items(), strict=True):
            total = _drawable(call.arguments["weight"]).sum((1, 2)).mean(0)
            image = without_ticks(axis).imshow(total, cmap="cividis")
            size = call.arguments["weight"].shape[2]
            axis.set_title(f"{side}×{side}, K = {size}")
            figure.colorbar(image, ax=axis, shrink=0.7, pad=0.03, ticks=MaxNLocator(3))
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
