"""``autotune.sweep``: throughput and peak memory of an operator along any of its axes, beside the naive path."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from autotune import plots, timing
from autotune.measure import Settings
from autotune.operators import measure_operator
from autotune.passes import PASSES
from autotune.tables import Found, Table, number, percent
from autotune.tables import times as ratio
from autotune.workloads import Workload, workload_of
from kernels import tolerances
from kernels.backend import BACKENDS, resolve

AXES = {  # what a plot calls it, and what it says where the axis is held
    "size": ("side of the map, pixels", "{}²"),
    "kernel_size": ("kernel size K, pixels", "K = {}"),
    "channels": ("channels", "{} channels"),
    "batch": ("batch, images", "batch {}"),
}
NAN = float("nan")


@dataclass(frozen=True, repr=False)
class Sweep(Found):
    """What ``sweep`` found: a row of ``rows`` for each axis and value.

    It holds the ``axis`` and the shape, milliseconds, peak and output bytes, ``speed_up`` over the naive path,
    ``operations``, and the floor: the time in which a copy moves every input and output once, ``floor_bytes``.
    """

    operator: str
    backward: bool
    device: str
    dtype: str
    threads: int
    label: str

    def table(self) -> Table:
        cells = [
            [f"{row['axis']} = {row[row['axis']]}", number(row["ours_ms"]), number(row["naive_ms"]),
             ratio(row["speed_up"]), percent(row["of_floor"])]
            for row in self.rows
        ]  # fmt: skip
        return Table(
            ["shape", "ours, ms", "naive, ms", "speed-up", "of floor"], cells, 1, f"{self.operator} · {self.label}"
        )

    def plot(self) -> Figure:
        """Log-log, throughput above and peak memory below, a column per axis."""
        axes = dict.fromkeys(row["axis"] for row in self.rows)
        with plots.style():
            figure, grid = plots.grid(2, len(axes), max(8, 3 * len(axes)), 5, sharey="row")
            for (speed, memory), name in zip(grid.T, axes, strict=True):
                rows = [row for row in self.rows if row["axis"] == name]
                values = [row[name] for row in rows]
                pixels = [row["batch"] * row["size"] ** 2 / 1000 for row in rows]
                keys = {"ours": "ours_peak_bytes", "naive": "naive_peak_bytes", "floor": "output_bytes"}
                times = {path: [row[f"{path}_ms"] or NAN for row in rows] for path in keys}
                rates = {path: [p / t for p, t in zip(pixels, found, strict=True)] for path, found in times.items()}
                peaks = {path: [(row[key] or NAN) / 1e6 for row in rows] for path, key in keys.items()}
                _curves(speed, values, rates)
                _curves(memory, values, peaks)
                memory.set_xlabel(AXES[name][0])
                held = ", ".join(text.format(rows[0][other]) for other, (_, text) in AXES.items() if other != name)
                speed.set_title(held, fontsize=10, fontweight="normal")
            grid[0][0].set_ylabel("throughput, 10⁶ pixels/s\n(more is better)")
            grid[1][0].set_ylabel("peak memory, MB\n(less is better)")
            handles, _ = grid[0][0].get_legend_handles_labels()
            naive = "naive (PyTorch's convolution)" if self.operator == "depthwise_conv2d" else "naive (unfold)"
            # Beside the title, or where that has no room, below.
            place = "outside upper right" if len(axes) == len(AXES) else "outside lower left"
            figure.legend(handles, ["ours", naive, "limit: a copy as large / the output alone"], loc=place, ncols=3)
            return plots.finish(figure, f"{self.operator}, {PASSES[self.backward]}", self.label)


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
    axes = over if isinstance(over, Mapping) and all(isinstance(n, Iterable) for n in over.values()) else {}
    if not axes or not set(axes) <= set(AXES):
        raise ValueError(f"over must map some of {', '.join(AXES)} to lists of values, got {over!r}")
    values = {axis: list(numbers) for axis, numbers in axes.items()}
    if empty := [axis for axis, numbers in values.items() if not numbers]:
        raise ValueError(f"over must have a value for {empty[0]}, got none")
    place = timing.best_device() if device is None else torch.empty(0, device=device).device
    dtype = dtype or timing.usual_dtype(place)
    if dtype not in tolerances.GRADIENT:
        raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    resolve(backend, torch.empty(0, device=place))
    base = {"size": size, "kernel_size": kernel_size, "channels": channels, "batch": batch}
    shapes = [(axis, base | {axis: value}) for axis, numbers in values.items() for value in numbers]
    # All are made before any is measured: ValueError where the operator does not take one.
    workloads = {tuple(shape.values()): _workload(operator, **shape) for _, shape in shapes}
    settings = Settings(place, dtype, backend, seconds, min_runs)
    measured = {key: _measure(workload, settings, backward) for key, workload in workloads.items()}
    rows = [{"axis": axis, **shape, **measured[tuple(shape.values())]} for axis, shape in shapes]
    precision, label = timing.precision(dtype), timing.label(place, dtype)
    return Sweep(rows, operator, backward, place.type, precision, torch.get_num_threads(), label)


def _workload(operator: str, size: int, **shape: int) -> Workload:
    return workload_of(operator, size=(size, size), **shape)


def _measure(workload: Workload, settings: Settings, backward: bool) -> dict[str, Any]:
    moved = workload.floor_bytes(settings.dtype, backward=backward)
    copy_ms = timing.copy_milliseconds(settings.device, moved, seconds=settings.seconds / 4)
    settings = dataclasses.replace(settings, ceilings={"copy_bytes_per_second": 1000 * moved / copy_ms})
    row = measure_operator(workload, settings, backward=backward)
    found: dict[str, Any] = {}
    for path in ("ours", "naive"):
        times = row["contenders"].get(path, {})
        found |= {f"{path}_ms": times.get("p50_ms"), f"{path}_peak_bytes": times.get("peak_bytes")}
    found |= {"speed_up": row["speed_up"].get("naive"), "of_floor": row["floor"]["fraction"]}
    found |= {"output_bytes": math.prod(workload.output) * settings.dtype.itemsize, "floor_bytes": moved}
    return found | {"floor_ms": row["floor"]["ms"], "operations": row["floor"]["operations"]}


def _curves(axis: Axes, values: list[int], curves: Mapping[str, list[float]]) -> None:
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
