"""What a GPU's folder of notebooks/results shows on the pages: its tables, made from its files alone.

A folder holds what ``make gpu`` leaves (environment.json, tests.json, bench.json, models.json), kernels.json (the time
of every kernel by itself, written by predicted/measure.py) and ncu.json (counters of Nsight Compute); all but the first
may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from autotune.bench_operators import PASSES
from autotune.report import number, percent
from autotune.targets import Results

__all__ = ["Folder", "folders", "joined", "microseconds", "readme", "sections", "table", "timed"]

Row = dict[str, Any]
OTHERS = ("naive", "compiled", "unfused")
# Names of cases in kernels.json and in the predictions, by operator.
CASES = {
    "involution2d": "involution.{}.last",
    "involution2d_generate": "generate.{}.last",
    "na2d_av": "av.{}",
    "na2d_qk": "qk.{}",
    "na2d_softmax_av": "softmax_av.{}",
    "contmix2d": "contmix.{}",
    "outlook_attention2d": "outlook.{}",
    "depthwise_conv2d": "depthwise.{}.last",
}
HOST_BOUND = 2.0  # a call that takes this many times as long as its work on the GPU waits for the host


class Folder(Results):
    """The content of a results folder, with the times of kernels by case and pass, in microseconds."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.kernels, self.counters = self._load("kernels.json"), self._load("ncu.json")
        timed = [row for row in self.kernels.get("rows", []) if "kernels" in row]
        self.launched = {(row["case"], row["pass"]): row["kernels"] for row in timed}

    def microseconds(self, case: str, kind: str, *, own: bool = False) -> float | None:
        """Sum of what a case launches in a pass; ``own``: of this project's kernels alone."""
        if kind == "forward+backward":
            parts = [self.microseconds(case, name, own=own) for name in ("forward", "backward")]
            return None if None in parts else sum(part for part in parts if part is not None)
        if (case, kind) not in self.launched:
            return None
        return sum(k["microseconds"] for k in self.launched[case, kind] if not own or _is_ours(k["kernel"]))

    def beside(self, row: Row) -> float | None:
        """Of a row of bench.json: the sum of the kernels, where kernels.json has its shape."""
        side = re.search(r"@(\d+)²", row["shape"])
        known = side is not None and row["batch"] == 128
        return self.microseconds(CASES[row["operator"]].format(side[1]), row["pass"]) if side and known else None


def _is_ours(kernel: str) -> bool:
    """Triton's kernels have plain names; those of PyTorch and of its libraries are C++ or name their machine code."""
    return re.fullmatch(r"\w+_kernel", kernel) is not None and not re.search("cutlass|nvjet|xmma", kernel)


def folders(results: Path) -> list[Folder]:
    """Of the GPUs that were measured."""
    found = [Folder(path.parent) for path in sorted(results.glob("*/environment.json"))]
    return [folder for folder in found if folder.environment["machine"]["device_type"] == "cuda"]


def table(headings: Sequence[str], words: int, rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """A table whose first ``words`` columns hold words, the others numbers."""
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * words}{'---:|' * (len(headings) - words)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _milliseconds(row: Row, contender: str) -> float | None:
    """Of a contender of bench.json, in a CUDA graph where the row has one, as the row's speed-ups compare them."""
    return row.get("graph", row["contenders"]).get(contender, {}).get("p50_ms")


def microseconds(milliseconds: float | None) -> str:
    value = None if milliseconds is None else 1000 * milliseconds
    return f"{value:,.0f}" if value and value >= 1000 else number(value)


# ---- what was measured where, and what was not


def _machine(folder: Folder) -> Iterator[str]:
    machine, ceilings = folder.environment["machine"], folder.environment["ceilings"]
    copy = ceilings["copy_bytes_per_second"] / 1e12
    rates = [ceilings[f"{name}_operations_per_second"] / 1e12 for name in ("bf16", "fp32")]
    yield (
        f"**{machine['device']}**, driver {machine['driver']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"commit {machine['commit'][:12]}, {machine['date'][:10]}. On it a copy moves {copy:.2f} TB/s, a bfloat16 "
        f"matrix product reaches {rates[0]:.0f} TFLOP/s and float32 arithmetic {rates[1]:.1f} TFLOP/s."
    )


def _reached(folder: Folder) -> Iterator[str]:
    """What there was time for."""
    parts = []
    for kind, what in (("operators", "rows of operators"), ("models", "rows of models")):
        rows = folder.rows(kind)
        parts.append(f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} {what}")
    text = f"The run measured {' and '.join(parts)}"
    if missing := _unreached(folder):
        text += f"; it had no time to compare {_listed(missing)} with anything"
    yield f"{text}."
    if folder.tests:
        counts = folder.tests["counts"]
        told = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if name in counts)
        ended = "" if folder.tests["complete"] else " before their time was over"
        yield f"Of the tests {told}{ended}."
    summary = f"{folder.path.name}/summary.md"
    yield f"[{summary}]({summary}) names every row and test that was skipped or failed."


def _unreached(folder: Folder) -> list[str]:
    """Operators of which no row was measured."""
    measured = {row["operator"] for row in timed(folder)}
    names = dict.fromkeys(row["operator"] for row in folder.rows("operators"))
    return [f"`{name}`" for name in names if name not in measured]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---- operators and models


def _operator_cells(folder: Folder, row: Row) -> Iterator[str]:
    yield from (f"`{row['operator']}`", f"{row['model']} {row['shape']}", row["pass"])
    graph, eager = row.get("graph", {}).get("ours", {}).get("p50_ms"), row["contenders"]["ours"]["p50_ms"]
    beside, floor = folder.beside(row), row["floor"]
    yield from (microseconds(graph), number(beside), microseconds(eager))
    yield from (microseconds(floor["ms"]), percent(floor["fraction"]))
    for name in OTHERS:
        time = _milliseconds(row, name)
        yield "–" if time is None else f"{microseconds(time)} ({number(row['speed_up'][name])}×)"


def _operators_table(folder: Folder) -> Iterator[str]:
    headings = ["operator", "shape", "pass", "GPU, µs", "kernels, µs", "call, µs", "floor, µs", "of floor"]
    rows = (list(_operator_cells(folder, row)) for row in timed(folder))
    yield from table([*headings, *(f"{name}, µs" for name in OTHERS)], 3, rows)


def timed(folder: Folder, kind: str | None = None) -> list[Row]:
    return [r for r in folder.rows("operators") if r["status"] == "ok" and kind in (None, r["pass"])]


def _host_bound(folder: Folder) -> Iterator[str]:
    """Which calls wait for the host rather than for the GPU."""
    for kind in PASSES:
        rows, found = timed(folder, kind), dict[str, list[str]]()
        for row in rows:
            device = 1000 * row["graph"]["ours"]["p50_ms"] if "graph" in row else folder.beside(row)
            if device and 1000 * row["contenders"]["ours"]["p50_ms"] >= HOST_BOUND * device:
                found.setdefault(f"`{row['operator']}`", []).append(row["shape"])
        if found:
            told = "; ".join(f"{operator} {_listed(shapes)}" for operator, shapes in found.items())
            yield (
                f"The host bounds {sum(map(len, found.values()))} of {len(rows)} eager {kind} calls, which take at "
                f"least {HOST_BOUND:g} times as long as their work on the GPU: {told}."
            )


def _models_table(folder: Folder) -> Iterator[str]:
    headings = [
        "model",
        "size",
        "pass",
        "batch",
        "ours, images/s",
        "naive, images/s",
        "speed-up",
        "peak memory, naive / ours",
    ]

    def cells(row: Row) -> list[str]:
        ours, naive = (row["contenders"].get(name, {}) for name in ("ours", "naive"))
        peaks = naive.get("peak_bytes"), ours.get("peak_bytes")
        memory = f"{number(peaks[0] / peaks[1])}×" if peaks[0] and peaks[1] else "–"
        speeds = [f"{found['images_per_second']:,.0f}" if found else "–" for found in (ours, naive)]
        where = [f"`{row['name']}`", "×".join(map(str, row["size"])), row["pass"], str(row["batch"])]
        return [*where, *speeds, _gain(row, "naive"), memory]

    yield from table(headings, 3, (cells(row) for row in folder.rows("models") if row["status"] == "ok"))


def _host_table(folder: Folder) -> Iterator[str]:
    """Of every run that timed a launch."""
    headings = ["run", "Triton's own launch", "our launcher, config given", "config looked up", "operator's call"]

    def cells(record: Row) -> list[str]:
        times = record["launch_microseconds"]
        columns = [f"{times[name]:.0f}" for name in ("direct", "configured", "tuned", "operator")]
        return [record["machine"]["date"][:16].replace("T", " "), *columns]

    records = [record for record in (folder.counters, folder.environment) if record.get("launch_microseconds")]
    yield from table(headings, 1, (cells(record) for record in records))


# ---- the README


def _readme_cells(folder: Folder, row: Row) -> list[str]:
    both = next((r for r in timed(folder, PASSES[1]) if r["name"] == row["name"]), None)
    call = number(both["contenders"]["ours"]["p50_ms"] if both else None)
    forward, backward = ([_gain(found, name) for name in OTHERS[:2]] for found in (row, both))
    where = [f"`{row['operator']}`", f"{row['model']} {row['shape']}"]
    return [*where, microseconds(_milliseconds(row, "ours")), *forward, call, *backward]


def _gain(row: Row | None, name: str) -> str:
    ratio = row["speed_up"].get(name) if row else None
    return "–" if ratio is None else f"{number(ratio)}×"


def _readme(folder: Folder) -> Iterator[str]:
    """The first shape of each operator, which has its largest map; the range over all; each model."""
    first: dict[str, Row] = {}
    for row in timed(folder, PASSES[0]):
        first.setdefault(row["operator"], row)
    headings = ["operator", "shape", "forward, GPU, µs", "naive", "compiled", "forward+backward, call, ms"]
    cells = (_readme_cells(folder, row) for row in first.values())
    yield from table([*headings, "naive", "compiled"], 2, cells)
    machine, rows = folder.environment["machine"], folder.rows("operators")
    versions = f"torch {machine['torch']}, triton {machine['triton']}, {machine['date'][:10]}"
    yield ""
    yield (
        f"*{machine['device']}, {versions}; bfloat16, batch 128: "
        "each operator's largest map. naive, compiled: how many times as long the form that unfolds takes, eagerly and "
        "compiled by PyTorch.*"
    )
    yield ""
    ranges = []
    for kind in PASSES:
        found = {
            name: [r["speed_up"][name] for r in timed(folder, kind) if name in r["speed_up"]] for name in OTHERS[:2]
        }
        told = " and ".join(f"{number(min(v))} to {number(max(v))} times ({name})" for name, v in found.items() if v)
        if told:
            ranges.append(f"{kind} {told}")
    yield f"Over all {len(timed(folder))} rows that there was time for (of {len(rows)}): {', '.join(ranges)}."
    if missing := _unreached(folder):
        yield f"There was no time to compare {_listed(missing)} with anything."
    both = timed(folder, PASSES[1])
    slower = [row for row in both if row["speed_up"].get("compiled", 1) < 1]
    if slower:
        yield (
            f"At {len(slower)} of {len(both)} shapes the eager forward+backward call is slower than the compiled form: "
            "the host takes longer to launch the kernels than the GPU to run them."
        )
    for row in folder.rows("models"):
        if row["status"] == "ok":
            ours, naive = (row["contenders"][name]["images_per_second"] for name in ("ours", "naive"))
            yield (
                f"`{row['name']}`, {row['pass']} at batch {row['batch']}: {ours:,.0f} images per second, {naive:,.0f} "
                f"on the naive path ({number(row['speed_up']['naive'])}×)."
            )


def readme(measured: Sequence[Folder]) -> str:
    return joined(measured, _readme)


def sections(measured: Sequence[Folder]) -> dict[str, str]:
    """Section of the page of results -> its text."""
    return {
        "gpu": joined(measured, _machine, _reached),
        "gpu operators": joined(measured, _operators_table, _host_bound),
        "gpu models": joined(measured, _models_table),
        "gpu host": joined(measured, _host_table),
    }


def joined(measured: Sequence[Folder], *makers: Callable[[Folder], Iterator[str]]) -> str:
    """What every maker tells of every folder, with an empty line between."""
    return "\n\n".join("\n".join(make(folder)) for folder in measured for make in makers)
