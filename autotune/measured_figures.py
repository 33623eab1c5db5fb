"""Figures of a GPU's folder of notebooks/results, made from its files alone."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from autotune import plots, report
from autotune.measured import Folder, timed

__all__ = ["figures"]

Row = dict[str, Any]


def figures(folder: Folder, predicted: list[Row]) -> dict[str, tuple[Figure, str]]:
    """File name -> figure, and the fingerprint of the records that it shows."""
    drawn: dict[str, tuple[Figure, str]] = {}
    machine = folder.environment["machine"]
    device = f"{machine['device']} · bfloat16 · batch 128 · {machine['date'][:10]}"
    rows = [row for row in timed(folder, "forward") if {"ours", "naive"} <= set(row.get("graph", {}))]
    order = list(dict.fromkeys(row["operator"] for row in rows))
    if rows:
        lines = [_comparison(row) for row in sorted(rows, key=lambda row: order.index(row["operator"]))]
        figure = plots.comparison_figure(
            [("forward, and the gain over the nearest other", "time on the GPU, µs", lines)],
            title="Operators on a GPU",
            device=device,
        )
        drawn["operators.png"] = figure, report.fingerprint(folder.operators)
    panels = [_beside(folder, predicted[0], kind) for kind in ("forward", "backward")] if predicted else []
    if panels and panels[0]:
        figure = plots.comparison_figure(
            [
                (kind, "time of our kernels, µs", lines)
                for kind, lines in zip(("forward", "backward"), panels, strict=True)
            ],
            title="Predicted and measured",
            ours="predicted",
            contender="measured",
            device=device,
        )
        drawn["predicted.png"] = figure, report.fingerprint({"measured": folder.kernels, "predicted": predicted[0]})
    return drawn


def _comparison(row: Row) -> plots.Comparison:
    times = {name: 1000 * found["p50_ms"] for name, found in row["graph"].items()}
    label, floor = f"{row['model']} {row['shape']}", 1000 * row["floor"]["ms"]
    return plots.Comparison(row["operator"], label, times["ours"], times["naive"], floor, times.get("compiled"))


def _beside(folder: Folder, record: Row, kind: str) -> list[plots.Comparison]:
    lines = []
    for row in record["rows"]:
        time = folder.microseconds(row["case"], kind, own=True)
        if row["pass"] == kind and time:
            operator, _, shape = row["case"].partition(".")
            lines.append(plots.Comparison(operator, shape, row["microseconds"], time, floor=row["floor_microseconds"]))
    return lines
