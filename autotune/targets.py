"""Tables of measured values beside their targets, made from the suite's result files."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

__all__ = ["TARGETS", "Results", "Target", "summary", "tables"]

Row = dict[str, Any]
Measured = tuple[float, str] | None  # the value, and the row it comes from
UNFUSED = ("involution2d", "na2d_av", "na2d_qk", "na2d_softmax_av", "outlook_attention2d")
LARGE = 64e6  # bytes


def number(value: float | None) -> str:
    """Three digits that matter; a dash for what was not measured."""
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class Results:
    """The content of a results folder; what is missing is empty."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.environment, self.tests = self._load("environment.json"), self._load("tests.json")
        self.operators, self.models = self._load("bench.json"), self._load("models.json")

    def _load(self, name: str) -> Row:
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def rows(self, kind: str) -> list[Row]:
        return getattr(self, kind).get("rows", [])

    def measured(self, *names: str, backward: bool = False, floor_bytes: float = 0) -> Iterator[Row]:
        """Rows of the operators (all if none is named) that were timed."""
        wanted = "forward+backward" if backward else "forward"
        for row in self.rows("operators"):
            named = not names or row["operator"] in names
            if row["status"] == "ok" and row["pass"] == wanted and named and row["floor"]["bytes"] >= floor_bytes:
                yield row

    def model(self, name: str, training: bool) -> Row | None:
        wanted = "training" if training else "inference"
        rows = (row for row in self.rows("models") if row["name"] == name and row["pass"] == wanted)
        return next((row for row in rows if row["status"] == "ok"), None)


def _worst(values: Iterator[tuple[float, str]]) -> Measured:
    return min(values, default=None)


def _floor_fraction(results: Results) -> Measured:
    rows = results.measured(*UNFUSED, floor_bytes=LARGE)
    return _worst((row["floor"]["fraction"], row["name"]) for row in rows)


def _backward_fraction(results: Results) -> Measured:
    """Of the backward pass alone: what the two passes take and must move, less the forward's."""
    forward = {row["name"]: row for row in results.measured(*UNFUSED, floor_bytes=LARGE)}
    found = []
    for row in results.measured(*UNFUSED, backward=True):
        if row["name"] in forward:
            first = forward[row["name"]]
            times = [r["floor"]["ms"] / r["floor"]["fraction"] for r in (row, first)]
            if times[0] > times[1]:
                found.append(((row["floor"]["ms"] - first["floor"]["ms"]) / (times[0] - times[1]), row["name"]))
    return _worst(iter(found))


def _speed_up(contender: str, *names: str, backward: bool = False) -> Callable[[Results], Measured]:
    def measure(results: Results) -> Measured:
        rows = results.measured(*names, backward=backward)
        found = ((row["speed_up"].get(contender), row["name"]) for row in rows)
        return _worst((ratio, name) for ratio, name in found if ratio is not None)

    return measure


def _depthwise(backward: bool) -> Callable[[Results], Measured]:
    """Against the faster of PyTorch's two layouts, K of 13 and more."""

    def measure(results: Results) -> Measured:
        rows = results.measured("depthwise_conv2d", backward=backward)
        large = (row for row in rows if int(row["shape"].rpartition("=")[2]) >= 13)
        contenders = ("naive", "channels_first")
        found = (([r["speed_up"][c] for c in contenders if c in r["speed_up"]], r["name"]) for r in large)
        return _worst((min(ratios), name) for ratios, name in found if ratios)

    return measure


def _memory_share(operator_name: str) -> Callable[[Results], Measured]:
    """Peak memory of the unfused chain over ours."""

    def measure(results: Results) -> Measured:
        found = []
        for row in results.measured(operator_name):
            ours, chain = (row["contenders"].get(name, {}).get("peak_bytes") for name in ("ours", "unfused"))
            if ours and chain:
                found.append((chain / ours, row["name"]))
        return _worst(iter(found))

    return measure


def _model(name: str, contender: str, *, training: bool = False) -> Callable[[Results], Measured]:
    def measure(results: Results) -> Measured:
        row = results.model(name, training)
        return None if row is None or contender not in row["speed_up"] else (row["speed_up"][contender], name)

    return measure


def _launch(results: Results) -> Measured:
    times = results.environment.get("launch_microseconds")
    return None if times is None else (times["added"], "tuned against kernel[grid](...)")


@dataclass(frozen=True)
class Target:
    """One line of the summary. ``unit`` follows the number: "×", "%" (of a fraction), " µs"."""

    what: str
    bound: float
    measure: Callable[[Results], Measured]
    unit: str = "×"
    at_most: bool = False

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{number(value)}{self.unit}"

    def reached(self, value: float) -> bool:
        return (operator.le if self.at_most else operator.ge)(value, self.bound)


AGGREGATIONS = (*UNFUSED, "contmix2d")
TARGETS = (
    Target("unfused forward, moving 64 MB or more: share of the floor", 0.8, _floor_fraction, "%"),
    Target("unfused backward, the same shapes: share of the floor", 0.6, _backward_fraction, "%"),
    Target("forward against eager naive unfold", 10, _speed_up("naive", *AGGREGATIONS)),
    Target("forward against compiled naive unfold", 3, _speed_up("compiled", *AGGREGATIONS)),
    Target("forward and backward against eager naive unfold", 6, _speed_up("naive", *AGGREGATIONS, backward=True)),
    Target("forward and backward against compiled naive", 2, _speed_up("compiled", *AGGREGATIONS, backward=True)),
    Target("contmix2d forward against matmul, projection, na2d_softmax_av", 3, _speed_up("unfused", "contmix2d")),
    Target("contmix2d forward, peak memory of that chain over ours", 5, _memory_share("contmix2d")),
    Target("involution generated inside against span convolution and involution2d", 1.5,
           _speed_up("unfused", "involution2d_generate")),
    Target("depthwise_conv2d, K ≥ 13, forward against PyTorch's better layout", 3, _depthwise(False)),
    Target("depthwise_conv2d, K ≥ 13, forward and backward likewise", 2, _depthwise(True)),
    Target("OverLoCK-T inference against the naive path", 2.5, _model("overlock_t", "naive")),
    Target("OverLoCK-T training step against the naive path", 2, _model("overlock_t", "naive", training=True)),
    Target("RedNet-50 inference against ResNet-50, both compiled", 1, _model("rednet50", "peer_compiled")),
    Target("RedNet-50 inference against ResNet-50, the second aim", 1.3, _model("rednet50", "peer_compiled")),
    Target("OverLoCK-XT inference against ConvNeXt-T, both compiled", 1, _model("overlock_xt", "peer_compiled")),
    Target("OverLoCK-XT training against ConvNeXt-T, both compiled", 1,
           _model("overlock_xt", "peer_compiled", training=True)),
    Target("VOLO-D1 inference against timm's, both compiled", 1.2, _model("volo_d1", "peer_compiled")),
    Target("host time a tuned launch adds to a direct one", 5, _launch, " µs", at_most=True),
)  # fmt: skip


def summary(folder: Path, phases: Sequence[Row]) -> str:
    """summary.md: the targets with what was measured, the phases, the tests, all that failed or was skipped."""
    results = Results(folder)
    machine = results.environment.get("machine", {})
    lines = [
        f"# {machine.get('device', 'unknown device')}",
        "",
        " · ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "python", "driver") if machine.get(name))
        + f" · commit {machine.get('commit')} · {machine.get('date')}",
        "",
        "Medians; of several shapes the worst is shown. Every result was checked before it was timed."
        if machine.get("device_type") == "cuda"
        else "A trial of the command without a GPU: the numbers below say nothing about the targets.",
        "",
        "| target | bound | measured | reached | where |",
        "|---|---:|---:|---|---|",
    ]
    for target in TARGETS:
        bound = f"{'≤' if target.at_most else '≥'} {target.text(target.bound)}"
        measured = target.measure(results)
        if measured is None:
            lines.append(f"| {target.what} | {bound} | – | not measured | |")
        else:
            value, where = measured
            reached = "yes" if target.reached(value) else "**no**"
            lines.append(f"| {target.what} | {bound} | {target.text(value)} | {reached} | {where} |")
    ceilings = results.environment.get("ceilings")
    if ceilings:
        copy = ceilings["copy_bytes_per_second"] / 1e12
        rates = [ceilings[f"{name}_operations_per_second"] / 1e12 for name in ("bf16", "fp32")]
        lines += [
            "",
            f"Ceilings: copy {copy:.2f} TB/s, bf16 product {rates[0]:.0f} TFLOP/s, fp32 {rates[1]:.1f} TFLOP/s.",
        ]
    lines += ["", "| phase | state | seconds | |", "|---|---|---:|---|"]
    lines += [f"| {p['name']} | {p['status']} | {p['seconds']:.0f} | {p.get('message', '')} |" for p in phases]
    if results.tests:
        counts = ", ".join(f"{count} {name}" for name, count in results.tests["counts"].items())
        lines += ["", f"Tests: {counts or 'none ran'}{'' if results.tests['complete'] else ' (cut short)'}."]
        lines += [f"- {failure}" for failure in results.tests["failures"]]
    lines += ["", *_incidents(results)]
    return "\n".join(lines).rstrip() + "\n"


def _incidents(results: Results) -> Iterator[str]:
    for kind in ("operators", "models"):
        for row in results.rows(kind):
            if row["status"] != "ok":
                yield f"- {row['status']}: {row['name']} {row['pass']}: {row.get('message', '')}"
            for name, reason in row.get("left_out", {}).items():
                yield f"- left out: {row['name']} {row['pass']}, {name}: {reason}"


def tables(folder: Path) -> Iterator[Table]:
    """What a terminal shows of the operators and of the models."""
    results = Results(folder)
    if results.rows("operators"):
        shown = Table(title="Operators: ours, and how many times as long the others take", title_justify="left")
        for heading in ("", "pass"):
            shown.add_column(heading, overflow="fold")
        for heading in ("ours, ms", "p20 to p80", "as a graph", "of floor", "naive", "compiled", "unfused"):
            shown.add_column(heading, justify="right", no_wrap=True)
        for row in results.rows("operators"):
            shown.add_row(_named(row), row["pass"], *_operator_cells(row))
        yield shown
    if results.rows("models"):
        shown = Table(title="Models: images per second, and ratios of time", title_justify="left")
        for heading in ("", "pass"):
            shown.add_column(heading, overflow="fold")
        for heading in ("ours", "ms, p20 to p80", "compiled", "naive / ours", "peer / ours", "both compiled"):
            shown.add_column(heading, justify="right", no_wrap=True)
        for row in results.rows("models"):
            shown.add_row(_named(row), row["pass"], *_model_cells(row))
        yield shown


def _named(row: Row) -> str:
    """A row's name, and below it why there are no numbers."""
    return escape("\n".join(filter(None, (row["name"], row.get("message")))))


def _state(row: Row) -> list[str]:
    return [f"[{'red' if row['status'] == 'failed' else 'yellow'}]{row['status']}[/]"]


def _spread(times: Row) -> str:
    return f"{number(times['p20_ms'])} to {number(times['p80_ms'])}"


def _operator_cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return _state(row)
    ratios = (row["speed_up"].get(name) for name in ("naive", "compiled", "unfused"))
    ours, graph = row["contenders"]["ours"], row.get("graph", {}).get("ours")
    return [
        number(ours["p50_ms"]),
        _spread(ours),
        number(None if graph is None else graph["p50_ms"]),
        f"{row['floor']['fraction']:.0%}",
        *("–" if ratio is None else f"{number(ratio)}×" for ratio in ratios),
    ]


def _model_cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return _state(row)
    ours, compiled = (row["contenders"].get(name, {}) for name in ("ours", "compiled"))
    ratios = (row["speed_up"].get(name) for name in ("naive", "peer", "peer_compiled"))
    speeds = number(ours["images_per_second"]), _spread(ours), number(compiled.get("images_per_second"))
    return [*speeds, *("–" if ratio is None else f"{number(ratio)}×" for ratio in ratios)]
