"""Tables of single kernels for the pages: predicted beside measured, what the GPU counted, tuned configs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autotune.measured import Folder, joined, microseconds, table
from autotune.report import number

__all__ = ["predicted_records", "sections"]

Row = dict[str, Any]
PREDICTED_FOR = "NVIDIA_H200"
TELLING = 20.0  # microseconds from which a kernel's counters say more of the kernel than of its start
MANY, FEW = 200, 100  # registers per thread


def _predicted_table(records: Sequence[Row], folder: Folder | None) -> Iterator[str]:
    """A line for each case and pass: floor, what is predicted for each Triton, and what was measured."""
    columns = [{(row["case"], row["pass"]): row["microseconds"] for row in record["rows"]} for record in records]
    headings = ["case", "pass", "predicted bound", "launches", "floor, µs"]
    headings += [f"predicted, Triton {record['triton']}, µs" for record in records]
    headings += ["measured, our kernels, µs", "measured / predicted", "measured, everything, µs"]

    def cells(row: Row) -> list[str]:
        key = row["case"], row["pass"]
        own, everything = (folder.microseconds(*key, own=own) if folder else None for own in (True, False))
        ratio = number(own / row["microseconds"] if own else None)
        found = [number(column.get(key)) for column in columns]
        bound = row["bound_by"].replace("_kernel", "")
        counted = [str(row["launches"]), number(row["floor_microseconds"]), *found]
        return [*key, bound, *counted, number(own), ratio, number(everything)]

    yield from table(headings, 3, map(cells, records[0]["rows"] if records else []))


def _unpredicted_table(records: Sequence[Row], folder: Folder) -> Iterator[str]:
    """A line for each case that was measured and has no prediction."""
    predicted = {row["case"] for record in records for row in record["rows"]}
    headings = ["case", "forward, our kernels, µs", "everything", "backward, our kernels, µs", "everything"]

    def cells(case: str) -> list[str]:
        times = [folder.microseconds(case, k, own=own) for k in ("forward", "backward") for own in (True, False)]
        return [case, *map(number, times)]

    cases = dict.fromkeys(case for case, _ in folder.launched if case not in predicted)
    yield from table(headings, 1, map(cells, cases))


def _ratios_told(record: Row, folder: Folder) -> Iterator[str]:
    """How many times as long as predicted our own kernels take."""
    found = ((folder.microseconds(r["case"], r["pass"], own=True), r["microseconds"]) for r in record["rows"])
    if ratios := sorted(time / predicted for time, predicted in found if time):
        middle, usual = statistics.median(ratios), sum(1.35 <= ratio < 2.05 for ratio in ratios)
        yield (
            f"Our kernels take {ratios[0]:.2f} to {ratios[-1]:.2f} times as long as predicted, {middle:.2f} times in "
            f"the median; {usual} of the {len(ratios)} factors lie between 1.35 and 2.05."
        )
        yield ""


def _counters_table(folder: Folder) -> Iterator[str]:
    """The longest launch of each kernel in a case and pass."""
    headings = ["case", "pass", "kernel", "time, µs", "registers", "warps per scheduler", "occupancy", "issue slots"]
    longest: dict[tuple[str, str, str], Row] = {}
    for row in folder.counters.get("rows", []):
        key = row["case"], row["pass"], row["kernel"]
        if key not in longest or longest[key]["microseconds"] < row["microseconds"]:
            longest[key] = row

    def cells(row: Row) -> list[str]:
        shares = [f"{row[f'{name}_percent']:.0f}%" for name in ("occupancy", "issue_slots", "l1", "l2", "dram")]
        kernel = row["kernel"].strip("_").removesuffix("_kernel")
        counted = [number(row["microseconds"]), str(row["registers"]), f"{row['warps_per_scheduler']:.1f}"]
        return [row["case"], row["pass"], kernel, *counted, *shares]

    yield from table([*headings, "L1", "L2", "DRAM"], 3, map(cells, longest.values()))


def _counters_told(folder: Folder) -> Iterator[str]:
    """What many registers and few do to the warps that are resident and to the issue slots."""
    rows = [row for row in folder.counters.get("rows", []) if row["microseconds"] >= TELLING]

    def told(found: Sequence[Row], field: str) -> str:
        values = sorted(row[field] for row in found)
        digits = 1 if field == "warps_per_scheduler" else 0
        least, most = f"{values[0]:.{digits}f}", f"{values[-1]:.{digits}f}"
        return least if least == most else f"{least} to {most}"

    for limits, words in (((MANY, 256), f"at least {MANY}"), ((0, FEW), f"fewer than {FEW}")):
        some = [row for row in rows if limits[0] <= row["registers"] < limits[1]]
        families: dict[str, list[Row]] = {}
        for row in some:
            families.setdefault(row["case"].partition(".")[0], []).append(row)
        if some:
            issued = ", ".join(f"{told(found, 'issue_slots_percent')} % ({name})" for name, found in families.items())
            warps = told(some, "warps_per_scheduler")
            yield (
                f"Kernels of {TELLING:g} µs and more with {words} registers per thread have {warps} warps per "
                f"scheduler, an occupancy of {told(some, 'occupancy_percent')} %, and issue in {issued} of the cycles."
            )


def _tuned_table(record: Row) -> Iterator[str]:
    """The shipped configs of a GPU: what the heuristic's choice takes, and the tuned one."""
    entries = [(key.split(), entry) for key, entry in record["entries"].items()]
    values: dict[str, dict[str, set[str]]] = {}
    for (kernel, *fields), _ in entries:
        for field in fields:
            name, _, value = field.partition("=")
            values.setdefault(kernel, {}).setdefault(name, set()).add(value)

    def cells(key: list[str], entry: Row) -> list[str]:
        kernel, *fields = key
        # What all of a kernel's problems share says nothing; of a single one everything is told.
        telling = [f for f in fields if len(values[kernel][f.partition("=")[0]]) > 1] or fields
        config = " ".join(f"{name}={value}" for name, value in entry["config"].items())
        heuristic, tuned = entry["heuristic_milliseconds"], entry["milliseconds"]
        times = [microseconds(heuristic), microseconds(tuned), f"{heuristic / tuned:.2f}×"]
        return [f"`{kernel}`", " ".join(telling), config, *times]

    headings = ["kernel", "problem", "tuned config", "heuristic, µs", "tuned, µs", "speed-up"]
    rows = [cells(key, entry) for key, entry in entries if entry.get("heuristic_milliseconds")]
    ratios = [e["heuristic_milliseconds"] / e["milliseconds"] for _, e in entries if e.get("heuristic_milliseconds")]
    if ratios:
        yield (
            f"{record['gpu']}: {len(ratios)} problems; tuning gains {statistics.median(ratios):.2f}× in the median and "
            f"{max(ratios):.2f}× at most, and keeps the heuristic's config in {sum(r == 1 for r in ratios)}."
        )
        yield ""
    yield from table(headings, 3, iter(rows))


def predicted_records(results: Path) -> list[Row]:
    """What predicted/ holds, the newest Triton first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (results / "predicted").glob("*.json")]
    return sorted(records, key=lambda record: [int(part) for part in record["triton"].split(".")], reverse=True)


def sections(measured: Sequence[Folder], predicted: Sequence[Row], shipped: Sequence[Row]) -> dict[str, str]:
    """Section of the page of results -> its text."""
    same = next((folder for folder in measured if folder.path.name == PREDICTED_FOR), None)
    ratios = _ratios_told(predicted[0], same) if same and predicted else iter(())
    return {
        "predicted": "\n".join([*ratios, *_predicted_table(predicted, same)]),
        "gpu kernels": "\n".join(_unpredicted_table(predicted, same)) if same else "",
        "gpu counters": joined(measured, _counters_told, _counters_table),
        "tuned": "\n\n".join("\n".join(_tuned_table(record)) for record in shipped),
    }
