"""What the files of a results folder say: the tables of ``bench`` and the suite's summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from autotune.tables import Table, number, percent, spread, times

Row = dict[str, Any]
CEILINGS = ("copy_bytes_per_second", "bf16_operations_per_second", "fp32_operations_per_second")


class Results:
    """The content of a results folder; what is missing is empty."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.environment, self.tests = self.load("environment.json"), self.load("tests.json")
        self.operators, self.models = (self.load(name).get("rows", []) for name in ("bench.json", "models.json"))

    def load(self, name: str) -> Row:
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def ceilings_told(found: dict[str, float]) -> str:
    copy, bf16, fp32 = (found[name] / 1e12 for name in CEILINGS)
    return (
        f"a copy moves {copy:.2f} TB/s, a bfloat16 matrix product reaches {bf16:.0f} TFLOP/s and float32 arithmetic "
        f"{fp32:.1f} TFLOP/s."
    )


def tables(results: Results) -> Iterator[Table]:
    """The operators and the models; a row without numbers has its state and the reason."""

    def rows(found: list[Row], cells: Callable[[Row], list[str]]) -> list[list[str]]:
        return [
            [row["name"], row["pass"], *cells(row)]
            if row["status"] == "ok"
            else [f"{row['name']}: {row.get('message', '')}", row["pass"], row["status"]]
            for row in found
        ]

    ratios = ["naive", "compiled", "unfused"]
    if results.operators:
        headings = ["", "pass", "ours, ms", "p20 to p80", "as a graph", "of floor", *ratios]
        title = "Operators: ours, and how many times as long the others take"
        yield Table(headings, rows(results.operators, lambda row: _operator_cells(row, ratios)), 2, title)
    if results.models:
        headings = ["", "pass", "ours, images/s", "ms, p20 to p80", "compiled, images/s", "naive / ours"]
        title = "Models: images per second, and ratios of time"
        yield Table(headings, rows(results.models, _model_cells), 2, title)


def _operator_cells(row: Row, ratios: Sequence[str]) -> list[str]:
    ours, graph = row["contenders"]["ours"], row.get("graph", {}).get("ours", {})
    cells = [number(ours["p50_ms"]), spread(ours), number(graph.get("p50_ms")), percent(row["floor"]["fraction"])]
    return [*cells, *(times(row["speed_up"].get(name)) for name in ratios)]


def _model_cells(row: Row) -> list[str]:
    ours, compiled = (row["contenders"].get(name, {}) for name in ("ours", "compiled"))
    speeds = number(ours["images_per_second"]), spread(ours), number(compiled.get("images_per_second"))
    return [*speeds, times(row["speed_up"].get("naive"))]


def summary(folder: Path, phases: Sequence[Row]) -> str:
    """summary.md: the phases, the tests, everything measured, and all that failed, was skipped or left out."""
    results = Results(folder)
    machine = results.environment.get("machine", {})
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "python", "driver") if machine.get(name)]
    parts = [
        f"# {machine.get('device', 'unknown device')}",
        " · ".join([*versions, f"commit {machine.get('commit')}", str(machine.get("date"))]),
        "Medians. Every result was checked before it was timed."
        if machine.get("device_type") == "cuda"
        else "A trial of the command without a GPU: the numbers below say nothing.",
    ]
    if ceilings := results.environment.get("ceilings"):
        parts.append(f"Ceilings: {ceilings_told(ceilings)}")
    if launch := results.environment.get("launch_microseconds"):
        parts.append(f"A tuned launch takes the host {number(launch['added'])} µs more than Triton's own.")
    done = [[p["name"], p["status"], f"{p['seconds']:.0f}", p.get("message", "")] for p in phases]
    parts.append(Table(("phase", "state", "seconds", ""), done, 4).markdown())
    if results.tests:
        counts = ", ".join(f"{count} {name}" for name, count in results.tests["counts"].items())
        told = f"Tests: {counts or 'none ran'}{'' if results.tests['complete'] else ' (cut short)'}."
        parts.append("\n".join([told, *(f"- {failure}" for failure in results.tests["failures"])]))
    for table in tables(results):
        parts += [table.title + ".", table.markdown()]
    left_out = [
        f"- left out: {row['name']} {row['pass']}, {name}: {reason}"
        for row in (*results.operators, *results.models)
        for name, reason in row.get("left_out", {}).items()
    ]
    return "\n\n".join([*parts, *(["\n".join(left_out)] if left_out else [])]) + "\n"
