"""``autotune.sweep``: throughput and peak memory of an operator along any of its axes, beside the naive path."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from autotune import plots, timing
from autotune.comparison import Settings, measure_operator
from autotune.contest import data_frame, html_table
from autotune.report import number, percent
from autotune.workloads import Workload, workload_of
from kernels import tolerances
from kernels.backend import BACKENDS, resolve

__all__ = ["AXES", "Point", "Shape", "Sweep", "measure_points", "sweep", "sweep_figure"]

AXES = {
    "size": "side of the map, pixels",
    "kernel_size": "kernel size K, pixels",
    "channels": "channels",
    "batch": "batch, images",
}


@dataclass(frozen=True)
class Shape:
    """What is swept: ``channels`` in all, ``size`` × ``size`` positions."""

    size: int
    kernel_size: int
    channels: int
    batch: int


@dataclass(frozen=True)
class Point:
    """One measured shape: seconds and peak bytes of both paths, and the least that anyone could need of either.

    ``floor_seconds`` is the time in which a copy of the same size moves every input and output once, ``floor_bytes``;
    ``output_bytes`` the memory of the result alone.
    """

    shape: Shape
    ours_seconds: float
    naive_seconds: float
    floor_seconds: float
    ours_bytes: int | None
    naive_bytes: int | None
    output_bytes: int
    floor_bytes: int
    operations: int

    @property
    def pixels(self) -> int:
        return self.shape.batch * self.shape.size**2


@dataclass(frozen=True)
class Sweep:
    """What ``sweep`` found: ``points`` maps each axis to its measured shapes."""

    operator: str
    backward: bool
    points: dict[str, list[Point]]
    device: str
    dtype: str
    threads: int
    label: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One per axis and value, seconds in milliseconds."""
        return [
            {
                "axis": axis,
                **asdict(point.shape),
                "ours_ms": 1000 * point.ours_seconds,
                "naive_ms": 1000 * point.naive_seconds,
                "speed_up": point.naive_seconds / point.ours_seconds,
                "of_floor": point.floor_seconds / point.ours_seconds,
                "ours_peak_bytes": point.ours_bytes,
                "naive_peak_bytes": point.naive_bytes,
            }
            for axis, points in self.points.items()
            for point in points
        ]

    def plot(self) -> Figure:
        """Log-log, throughput above and peak memory below, a column per axis."""
        return sweep_figure(self.operator, self.points, self.label, backward=self.backward)

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON, written to a file as well where ``path`` names one."""
        record = {"operator": self.operator, "backward": self.backward, "label": self.label, "rows": self.rows}
        if path is not None:
            timing.write_json(Path(path), record)
        return json.dumps(record, indent=2, ensure_ascii=False)

    def to_pandas(self) -> Any:
        """The rows as a DataFrame. ImportError where pandas is not installed."""
        return data_frame(self.rows)

    def _cells(self) -> list[list[str]]:
        return [
            [
                f"{row['axis']} = {row[row['axis']]}",
                number(row["ours_ms"]),
                number(row["naive_ms"]),
                f"{number(row['speed_up'])}×",
                percent(row["of_floor"]),
            ]
            for row in self.rows
        ]

    def _repr_html_(self) -> str:
        return html_table(f"{self.operator} · {self.label}", HEADINGS, self._cells(), [])

    def __repr__(self) -> str:
        lines = [HEADINGS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


HEADINGS = ("shape", "ours, ms", "naive, ms", "speed-up", "of floor")


def sweep(
    operator: str,
    over: Mapping[str, Iterable[int]],
    *,
    size: int = 28,
    kernel_size: int = 7,
    channels: int = 64,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    backward: bool = False,
    seconds: float = 0.1,
    min_runs: int = 3,
) -> Sweep:
    """Measure an operator along axes through one shape, after ours and the naive path were found to agree.

    Args:
        operator: its name in ``kernels``.
        over: axis (``size``, ``kernel_size``, ``channels``, ``batch``) -> the values it takes.
        size, kernel_size, channels, batch: the shape, from which one axis at a time departs.
        dtype: by default bfloat16 on a GPU and float32 elsewhere.
        device: by default a GPU if there is one.
        backend: our path.
        backward: forward and backward.
        seconds: spent on timing each shape.
        min_runs: runs of each path that are made even where that takes longer.

    Raises:
        ValueError: an argument is not what it must be; nothing was measured then.
        DisagreementError: the two paths compute different things at a shape.
    """
    if not isinstance(over, Mapping) or not over or not set(over) <= set(AXES):
        raise ValueError(f"over must map some of {', '.join(AXES)} to values, got {over!r}")
    values = {axis: list(numbers) for axis, numbers in over.items()}
    if empty := [axis for axis, numbers in values.items() if not numbers]:
        raise ValueError(f"over must have a value for {empty[0]}, there is none")
    place = timing.best_device() if device is None else torch.empty(0, device=device).device
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    if dtype not in tolerances.GRADIENT:
        raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    resolve(backend, torch.empty(0, device=place))
    base = Shape(size, kernel_size, channels, batch)
    settings = Settings(place, dtype, backend, seconds=seconds, min_runs=min_runs)
    points = measure_points(operator, base, values, settings, backward=backward)
    precision = str(dtype).removeprefix("torch.")
    label = f"{timing.device_name(place)} · {precision}"
    return Sweep(operator, backward, points, place.type, precision, torch.get_num_threads(), label)


def measure_points(
    operator: str, base: Shape, values: Mapping[str, Sequence[int]], settings: Settings, *, backward: bool
) -> dict[str, list[Point]]:
    """Axis -> points, each shape measured once. ValueError before any is, where the operator does not take one."""
    along = {axis: [replace(base, **{axis: value}) for value in numbers] for axis, numbers in values.items()}
    workloads: dict[Shape, Workload] = {}
    for shape in dict.fromkeys(shape for shapes in along.values() for shape in shapes):
        size = (shape.size, shape.size)
        workloads[shape] = workload_of(
            operator, batch=shape.batch, channels=shape.channels, size=size, kernel_size=shape.kernel_size
        )
    measured = {shape: _measure(workload, shape, settings, backward) for shape, workload in workloads.items()}
    return {axis: [measured[shape] for shape in shapes] for axis, shapes in along.items()}


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
        moved,
        row["operations"],
    )


def sweep_figure(name: str, points: Mapping[str, list[Point]], label: str, *, backward: bool = False) -> Figure:
    """Throughput above, peak memory below; a column per axis."""
    with plots.style():
        figure, axes = plots.grid(2, len(points), max(8, 3 * len(points)), 5, sharey="row")
        for column, (axis_name, found) in enumerate(points.items()):
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
            memory.set_xlabel(AXES[axis_name])
            speed.set_title(_held(found[0].shape, axis_name), fontsize=10, fontweight="normal")
        axes[0][0].set_ylabel("throughput, 10⁶ pixels/s\n(more is better)")
        axes[1][0].set_ylabel("peak memory, MB\n(less is better)")
        handles, _ = axes[0][0].get_legend_handles_labels()
        naive = "naive (PyTorch's convolution)" if name == "depthwise_conv2d" else "naive (unfold)"
        limits = "limit: a copy as large / the output alone"
        place = (
            "outside upper right" if len(points) == len(AXES) else "outside lower left"
        )  # beside the title, or below
        figure.legend(handles, ["ours", naive, limits], loc=place, ncols=3)
        return plots.finish(figure, f"{name}, {'forward+backward' if backward else 'forward'}", label)


def _megabytes(number: int | None) -> float:
    return float("nan") if number is None else number / 1e6


def _held(shape: Shape, varied: str) -> str:
    """What stays fixed along an axis."""
    texts = {
        "size": f"{shape.size}²",
        "kernel_size": f"K = {shape.kernel_size}",
        "channels": f"{shape.channels} channels",
        "batch": f"batch {shape.batch}",
    }
    return ", ".join(text for name, text in texts.items() if name != varied)


def _curves(axis: Axes, values: list[int], **curves: list[float]) -> None:
    for name, heights in curves.items():
        style: dict[str, Any] = {"linestyle": "--", "linewidth": 1.6}
        if name != "floor":  # ours above naive and smaller: where both are equal, each shows
            over = name == "ours"
            style = {"marker": plots.MARKERS[name], "markersize": 6 if over else 9, "zorder": 3 if over else 2}
        axis.plot(values, heights, color=plots.COLOURS[name], label=name, **style)
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(values, [str(value) for value in values])
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 150 * low else (1,), numticks=8))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(which="major")
