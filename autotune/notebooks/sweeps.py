"""Notebook 01: throughput and peak memory of every operator over resolution, kernel size, channels and batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure

from autotune import sweeps
from autotune.comparison import Settings
from autotune.notebooks.session import Session, Table
from autotune.report import number
from autotune.sweeps import AXES, Point, Shape

__all__ = ["AXES", "OPERATORS", "Operator", "Point", "Shape", "summary", "sweep", "sweep_figure"]


@dataclass(frozen=True)
class Operator:
    """The shape an operator is swept through, and the values that each axis takes."""

    base: Shape
    values: Mapping[str, tuple[int, ...]]
    full_base: Shape
    full_values: Mapping[str, tuple[int, ...]]


def _operator(kernel_sizes: tuple[int, ...], *, kernel_size: int = 7, side: int = 28) -> Operator:
    sides = tuple(side // 2 * factor for factor in (1, 2, 4))
    values = {"size": sides, "channels": (32, 64, 128), "batch": (1, 2, 4), "kernel_size": kernel_sizes}
    full = {
        "size": (14, 28, 56, 112),
        "channels": (64, 128, 256, 512),
        "batch": (8, 32, 128),
        "kernel_size": kernel_sizes,
    }
    return Operator(Shape(side, kernel_size, 64, 1), values, Shape(56, kernel_size, 128, 32), full)


OPERATORS: dict[str, Operator] = {
    "involution2d": _operator((3, 7, 11)),
    "na2d_av": _operator((3, 7, 13)),
    "na2d_qk": _operator((3, 7, 13)),
    "na2d_softmax_av": _operator((3, 7, 13)),
    "contmix2d": _operator((7, 9, 13)),
    "outlook_attention2d": _operator((3, 5, 7), kernel_size=3),
    "depthwise_conv2d": _operator((7, 13, 17)),
}


def sweep(
    name: str, session: Session, *, backward: bool = False, seconds: float | None = None, min_runs: int | None = None
) -> dict[str, list[Point]]:
    """Measure an operator along every axis through its base shape: axis -> points; both paths must agree beforehand."""
    operator = OPERATORS[name]
    base, values = (operator.full_base, operator.full_values) if session.full else (operator.base, operator.values)
    seconds = (0.5 if session.full else 0.02) if seconds is None else seconds
    min_runs = min_runs or (3 if session.full else 2)
    settings = Settings(session.device, session.dtype, seconds=seconds, min_runs=min_runs)
    return sweeps.measure_points(name, base, {axis: values[axis] for axis in AXES}, settings, backward=backward)


def sweep_figure(name: str, points: Mapping[str, list[Point]], session: Session, *, backward: bool = False) -> Figure:
    """Throughput above, peak memory below; a column per axis."""
    return sweeps.sweep_figure(name, points, session.label, backward=backward)


def summary(sweeps: Mapping[str, Mapping[str, list[Point]]]) -> Table:
    """Least and largest speed-up and saving of memory over all points, by operator."""
    rows = []
    for name, found in sweeps.items():
        points = [point for along in found.values() for point in along]
        speed = [point.naive_seconds / point.ours_seconds for point in points]
        memory = [point.naive_bytes / point.ours_bytes for point in points if point.naive_bytes and point.ours_bytes]
        rows.append([f"`{name}`", *(f"{number(min(v))} to {number(max(v))}×" if v else "–" for v in (speed, memory))])
    return Table(("operator", "naive time / ours", "naive peak memory / ours"), rows)
