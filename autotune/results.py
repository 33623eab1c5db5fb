"""What the files of a results folder say: the tables of ``bench`` and the suite's summary.

A folder holds what ``make gpu`` leaves (environment.json, tests.json, bench.json, models.json), kernels.json (the time
of every kernel by itself, written by predicted/measure.py) and ncu.json (counters of Nsight Compute); all but the first
may be missing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autotune.tables import Table, number, percent, times

Row = dict[str, Any]
CEILINGS = ("copy_bytes_per_second", "bf16_operations_per_second", "fp32_operations_per_second")
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


class Folder:
    """The content of a results folder, with the times of kernels by case and pass, in microseconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment, self.tests = self.load("environment.json"), self.load("tests.json")
        self.operators, self.models = (self.load(name).get("rows", []) for name in ("bench.json", "models.json"))
        # They were measured in turns, so that none is left out, and are read one operator after the other.
        order = list(dict.fromkeys(row["operator"] for row in self.operators))
        self.operators.sort(key=lambda row: (-row.get("batch", 0), order.index(row["operator"])))
        self.kernels, self.counters = self.load("kernels.json"), self.load("ncu.json")
        timed = [row for row in self.kernels.get("rows", []) if "kernels" in row]
        self.launched = {(row["case"], row["pass"]): row["kernels"] for row in timed}

    def load(self, name: str) -> Row:
        """A file's content, empty where it is missing."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def timed(self, kind: str | None = None) -> list[Row]:
        return [row for row in self.operators if row["status"] == "ok" and kind in (None, row["pass"])]

    def microseconds(self, case: str, kind: str, *, own: bool = False) -> float | None:
        """Sum of what a case launches in a pass; ``own``: of this project's kernels alone."""
        if kind == "forward+backward":
            parts = [self.microseconds(case, name, own=own) for name in ("forward", "backward")]
            return None if None in parts else math.fsum(part for part in parts if part is not None)
        if (case, kind) not in self.launched:
            return None
        return math.fsum(k["microseconds"] for k in self.launched[case, kind] if not own or _is_ours(k["kernel"]))

    def as_predicted(self, row: Row) -> bool:
        """Whether a case launched as many of our kernels as are predicted: otherwise its code has changed."""
        launched = self.launched.get((row["case"], row["pass"]), [])
        return sum(_is_ours(kernel["kernel"]) for kernel in launched) == row["launches"]

    def beside(self, row: Row) -> float | None:
        """Of a row of bench.json: the sum of the kernels, where kernels.json has its shape."""
        side = re.search(r"@(\d+)²", row["shape"])
        if side is None or row["batch"] != 128:
            return None
        return self.microseconds(CASES[row["operator"]].format(side[1]), row["pass"])

    def unreached(self) -> str:
        """The operators of which no row was measured, as words."""
        measured = {row["operator"] for row in self.timed()}
        return listed(
            [f"`{name}`" for name in dict.fromkeys(r["operator"] for r in self.operators) if name not in measured]
        )


def _is_ours(kernel: str) -> bool:
    """Triton's kernels have plain names; those of PyTorch and of its libraries are C++ or name their machine code."""
    return re.fullmatch(r"\w+_kernel", kernel) is not None and not re.search("cutlass|nvjet|xmma", kernel)


def gpu_milliseconds(row: Row, contender: str) -> float | None:
    """Of a contender of bench.json, in a CUDA graph where the row has one, as the row's speed-ups compare them."""
    return row.get("graph", row["contenders"]).get(contender, {}).get("p50_ms")


def microseconds(milliseconds: float | None) -> str:
    value = None if milliseconds is None else 1000 * milliseconds
    return f"{value:,.0f}" if value and value >= 1000 else number(value)


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def ceilings_told(found: dict[str, float]) -> str:
    copy, bf16, fp32 = (found[name] / 1e12 for name in CEILINGS)
    return (
        f"a copy moves {copy:.2f} TB/s, a bfloat16 matrix product reaches {bf16:.0f} TFLOP/s and float32 arithmetic "
        f"{fp32:.1f} TFLOP/s."
    )


def operators_table(folder: Folder) -> Table:
    """Medians of calls, of their work on the GPU alone (as a graph, and the sum of the kernels), and of the others."""
    rows = []
    for row in folder.timed():
        graph, eager = row.get("graph", {}).get("ours", {}).get("p50_ms"), row["contenders"]["ours"]["p50_ms"]
        of_commit = f" ({row['commit'][:7]})" if "commit" in row else ""  # another than the folder's
        shape = f"{row['model']} {row['shape']}{of_commit}"
        cells = [f"`{row['operator']}`", shape, row["pass"], microseconds(graph)]
        cells += [number(folder.beside(row)), microseconds(eager)]
        cells += [microseconds(row["floor"]["ms"]), percent(row["floor"]["fraction"])]
        for name in OTHERS:
            time = gpu_milliseconds(row, name)
            cells.append("–" if time is None else f"{microseconds(time)} ({times(row['speed_up'][name])})")
        rows.append(cells)
    headings = ["operator", "shape", "pass", "GPU, µs", "kernels, µs", "call, µs", "floor, µs", "of floor"]
    return Table([*headings, *(f"{name}, µs" for name in OTHERS)], rows, 3, "Operators")


def models_table(folder: Folder) -> Table:
    found = [row for row in folder.models if row["status"] == "ok"]
    names = ("ours", "naive", "compiled", "peer", "peer_compiled")
    paths = [name for name in names if any(name in row["contenders"] for row in found)]
    rows = []
    for row in found:
        speeds = [row["contenders"].get(name, {}).get("images_per_second") for name in paths]
        peaks = [row["contenders"].get(name, {}).get("peak_bytes") for name in ("naive", "ours")]
        beside = f" beside {row['peer']}" if row.get("peer") else ""
        where = [f"`{row['name']}`{beside}", "×".join(map(str, row["size"])), row["pass"], str(row["batch"])]
        memory = times(peaks[0] / peaks[1] if peaks[0] and peaks[1] else None)
        told = ["–" if speed is None else f"{speed:,.0f}" for speed in speeds]
        rows.append([*where, *told, times(row["speed_up"].get("naive")), memory])
    told = [f"{name.replace('_', ' ')}, images/s" for name in paths]
    headings = ["model", "size", "pass", "batch", *told, "speed-up"]
    return Table([*headings, "peak memory, naive / ours"], rows, 3, "Models")


def tables(folder: Folder) -> Iterator[Table]:
    """The operators and the models, where any was measured."""
    yield from (table for table in (operators_table(folder), models_table(folder)) if table.rows)


def incidents(folder: Folder) -> Iterator[str]:
    """What failed, was skipped or left out, and why."""
    for row in (*folder.operators, *folder.models):
        if row["status"] != "ok":
            yield f"{row['status']}: {row['name']} {row['pass']}: {row.get('message', '')}"
        for name, reason in row.get("left_out", {}).items():
            yield f"left out: {row['name']} {row['pass']}, {name}: {reason}"


def summary(folder: Path, phases: Sequence[Row]) -> str:
    """summary.md: the phases, the tests, everything measured, and all that failed, was skipped or left out."""
    results = Folder(folder)
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
    if done:
        parts.append(Table(("phase", "state", "seconds", ""), done, 4).markdown())
    if results.tests:
        counts = ", ".join(f"{count} {name}" for name, count in results.tests["counts"].items())
        told = f"Tests: {counts or 'none ran'}{'' if results.tests['complete'] else ' (cut short)'}."
        parts.append("\n".join([told, *(f"- {failure}" for failure in results.tests["failures"])]))
    for table in tables(results):
        parts += [f"{table.title}.", table.markdown()]
    return "\n\n".join(filter(None, [*parts, "\n".join(f"- {told}" for told in incidents(results))])) + "\n"
