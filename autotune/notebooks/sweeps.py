"""Notebook 01: throughput and peak memory of every operator over resolution, kernel size, channels and batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from autotune import plots, timing, workloads
from autotune.comparison import Settings, measure_operator
from autotune.notebooks.session import Session, Table, finish, grid
from autotune.report import number
from autotune.workloads import Workload

__all__ = ["AXES", "OPERATORS", "Point", "Shape", "summary", "sweep", "sweep_figure"]

AXES = {
    "side": "side of the map, pixels",
    "kernel_size": "kernel size K, pixels",
    "channels": "channels",
    "batch": "batch, images",
}


@dataclass(frozen=True)
class Shape:
    """What is swept: ``channels`` in all, ``side`` × ``side`` positions."""

    side: int
    kernel_size: int
    channels: int
    batch: int


@dataclass(frozen=True)
class Operator:
    """How an operator's workload follows from a shape, and the values that each axis takes."""

    build: Callable[[Shape], Workload]
    base: Shape
    values: Mapping[str, tuple[int, ...]]
    full_base: Shape
    full_values: Mapping[str, tuple[int, ...]]
    heads: int = field(default=4)


def _operator(
    build: Callable[[Shape], Workload], kernel_sizes: tuple[int, ...], *, kernel_size: int = 7, side: int = 28
) -> Operator:
    sides = tuple(side // 2 * factor for factor in (1, 2, 4))
    values = {"side": sides, "channels": (32, 64, 128), "batch": (1, 2, 4), "kernel_size": kernel_sizes}
    full = {
        "side": (14, 28, 56, 112),
        "channels": (64, 128, 256, 512),
        "batch": (8, 32, 128),
        "kernel_size": kernel_sizes,
    }
    return Operator(build, Shape(side, kernel_size, 64, 1), values, Shape(56, kernel_size, 128, 32), full)


def _neighborhood(name: str) -> Callable[[Shape], Workload]:
    def build(s: Shape) -> Workload:
        return workloads.neighborhood(name, "", s.batch, s.channels // 16, 16, (s.side, s.side), s.kernel_size)

    return build


# Groups, heads and the rest as in the models: 16 channels each in RedNet and OverLoCK, 32 in VOLO.
OPERATORS: dict[str, Operator] = {
    "involution2d": _operator(
        lambda s: workloads.involution("", s.batch, s.channels, (s.side, s.side), s.kernel_size, 16), (3, 7, 11)
    ),
    "na2d_av": _operator(_neighborhood("na2d_av"), (3, 7, 13)),
    "na2d_qk": _operator(_neighborhood("na2d_qk"), (3, 7, 13)),
    "na2d_softmax_av": _operator(_neighborhood("na2d_softmax_av"), (3, 7, 13)),
    "contmix2d": _operator(
        lambda s: workloads.contmix("", s.batch, s.channels // 32, 16, (s.side, s.side), (5, s.kernel_size)), (7, 9, 13)
    ),
    "outlook_attention2d": _operator(
        lambda s: workloads.outlook("", s.batch, s.channels // 32, 32, (s.side, s.side), s.kernel_size, 2),
        (3, 5, 7),
        kernel_size=3,
    ),
    "depthwise_conv2d": _operator(
        lambda s: workloads.depthwise("", s.batch, s.channels, (s.side, s.side), s.kernel_size), (7, 13, 17)
    ),
}


@dataclass(frozen=True)
class Point:
    """One measured shape: seconds and peak bytes of both paths, and the least that anyone could need of either.

    ``floor_seconds`` is the time in which a copy of the same size moves every input and output once; ``output_bytes``
    the memory of the result alone.
    """

    shape: Shape
    ours_seconds: float
    naive_seconds: float
    floor_seconds: float
    ours_bytes: int | None
    naive_bytes: int | None
    output_bytes: int

    @property
    def pixels(self) -> int:
        return self.shape.batch * self.shape.side**2


def sweep(
    name: str, session: Session, *, backward: bool = False, seconds: float | None = None, min_runs: int | None = None
) -> dict[str, list[Point]]:
    """Measure an operator along every axis through its base shape: axis -> points; both paths must agree beforehand."""
    operator = OPERATORS[name]
    base, values = (operator.full_base, operator.full_values) if session.full else (operator.base, operator.values)
    seconds = (0.5 if session.full else 0.02) if seconds is None else seconds
    min_runs = min_runs or (3 if session.full else 2)
    settings = Settings(session.device, session.dtype, seconds=seconds, min_runs=min_runs)
    measured: dict[Shape, Point] = {}
    found: dict[str, list[Point]] = {}
    for axis in AXES:
        shapes = [replace(base, **{axis: value}) for value in values[axis]]
        for shape in shapes:
            if shape not in measured:
                measured[shape] = _measure(operator.build(shape), shape, settings, backward)
        found[axis] = [measured[shape] for shape in shapes]
    return found


def _measure(workload: Workload, shape: Shape, settings: Settings, backward: bool) -> Point:
    moved = workload.floor_bytes(settings.dtype, backward=backward)
    # Of this size, not of a large one: small tensors stay in caches, and so does a copy of them.
    speed = timing.copy_bandwidth(settings.device, size=max(4, moved // 2), seconds=settings.seconds / 4)
    row = measure_operator(workload, settings, backward=backward, bytes_per_second=speed)
    return Point(
        shape,
        row["ours"]["p50_ms"] / 1000,
        row["naive"]["p50_ms"] / 1000,
        row["floor"]["ms"] / 1000,
        row["ours"]["peak_bytes"],
        row["naive"]["peak_bytes"],
        math.prod(workload.output) * settings.dtype.itemsize,
    )


def sweep_figure(name: str, points: Mapping[str, list[Point]], session: Session, *, backward: bool = False) -> Figure:
    """Throughput above, peak memory below; a column for each axis of the sweep."""
    with plots.style():
        figure, axes = grid(2, len(AXES), 12, 5, sharey="row")
        for column, (axis_name, label) in enumerate(AXES.items()):
            found = points[axis_name]
            values = [getattr(point.shape, axis_name) for point in found]
            speed, memory = axes[0][column], axes[1][column]
            _curves(
                speed,
                values,
                ours=[point.pixels / point.ours_seconds / 1e6 for point in found],
                naive=[point.pixels / point.naive_seconds / 1e6 for point in found],
                floor=[point.pixels / point.floor_seconds / 1e6 for point in found],
            )
            _curves(
                memory,
                values,
                ours=[_megabytes(point.ours_bytes) for point in found],
                naive=[_megabytes(point.naive_bytes) for point in found],
                floor=[_megabytes(point.output_bytes) for point in found],
            )
            memory.set_xlabel(label)
            speed.set_title(_held(found[0].shape, axis_name), fontsize=10, fontweight="normal")
        axes[0][0].set_ylabel("throughput, 10⁶ pixels/s\n(more is better)")
        axes[1][0].set_ylabel("peak memory, MB\n(less is better)")
        handles, _ = axes[0][0].get_legend_handles_labels()
        naive = "naive (PyTorch's convolution)" if name == "depthwise_conv2d" else "naive (unfold)"
        limits = "limit: a copy as large / the output alone"
        figure.legend(handles, ["ours", naive, limits], loc="outside upper right", ncols=3)
        return finish(figure, f"{name}, {'forward+backward' if backward else 'forward'}", session.label)


def _megabytes(number: int | None) -> float:
    return float("nan") if number is None else number / 1e6


def _held(shape: Shape, varied: str) -> str:
    """What stays fixed along an axis."""
    texts = {
        "side": f"{shape.side}²",
        "kernel_size": f"K = {shape.kernel_size}",
        "channels": f"{shape.channels} channels",
        "batch": f"batch {shape.batch}",
    }
    return ", ".join(text for name, text in texts.items() if name != varied)


def _curves(axis: Axes, values: list[int], **curves: list[float]) -> None:
    for name, heights in curves.items():
        style: dict[str, Any] = (
            {"linestyle": "--", "linewidth": 1.6} if name == "floor" else {"marker": plots.MARKERS[name]}
        )
        axis.plot(values, heights, color=plots.COLOURS[name], label=name, **style)
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(values, [str(value) for value in values])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(which="major")


def summary(sweeps: Mapping[str, Mapping[str, list[Point]]]) -> Table:
    """Least and largest speed-up and saving of memory over all points, by operator."""
    rows = []
    for name, found in sweeps.items():
        points = [point for along in found.values() for point in along]
        speed = [point.naive_seconds / point.ours_seconds for point in points]
        memory = [point.naive_bytes / point.ours_bytes for point in points if point.naive_bytes and point.ours_bytes]
        rows.append([f"`{name}`", *(f"{number(min(v))} to {number(max(v))}×" if v else "–" for v in (speed, memory))])
    return Table(("operator", "naive time / ours", "naive peak memory / ours"), rows)
