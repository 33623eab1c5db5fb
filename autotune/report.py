"""What ``profile`` shows: its table and its figures, both made from the content of a profile.json alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from autotune import plots

__all__ = ["busy", "figures", "fingerprint", "number", "percent", "table", "unsteady", "warnings"]

Row = dict[str, Any]
PATHS = ("ours", "naive")
# (p80 − p20) / p50 from which a time is marked, and the share of the machine's cores that others may take unsaid.
WIDE_SPREAD = 0.2
BUSY_SHARE = 0.1


def number(value: float | None) -> str:
    """Three digits that matter; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def percent(fraction: float) -> str:
    """Whole per cents, and below one of them two more digits."""
    return f"{fraction:.0%}" if fraction >= 0.01 else f"{fraction:.2%}"


def _group(row: Row) -> str:
    return row["operator"] if row["kind"] == "operator" else row["model"]


def _shape(row: Row) -> str:
    return f"{row['model']} {row['shape']}".strip() if row["kind"] == "operator" else row["shape"]


def _peaks(row: Row) -> list[float | None]:
    """Megabytes."""
    peaks = (row[path]["peak_bytes"] for path in PATHS)
    return [None if peak is None else peak / 1e6 for peak in peaks]


def _setting(record: Row) -> str:
    settings = record["settings"]
    return f"{record['machine']['device']} · {settings['dtype']} · batch {settings['batch']}"


def table(record: Row) -> Table:
    """One line per operator, shape and pass, then per model, size and pass; a failed one says so."""
    shown = Table(
        title=f"{_setting(record)} · our path: {record['settings']['implementation']}",
        title_justify="left",
        caption=_caption(record),
        caption_justify="left",
        box=box.HORIZONTALS,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in ("", "shape", "pass"):
        shown.add_column(heading, no_wrap=True)
    for heading in (
        "ours\nms",
        "p20 to\np80",
        "naive\nms",
        "p20 to\np80",
        "speed-up\n",
        "peak,\nours MB",
        "peak,\nnaive MB",
        "of\nfloor",
    ):
        shown.add_column(heading, no_wrap=True, justify="right")
    group = shape = None
    for row in record["rows"]:
        if _group(row) != group:
            shown.add_section()
            group, shape = _group(row), None
            first = f"[bold]{escape(group)}[/]"
        else:
            first = ""
        second, shape = ("" if _shape(row) == shape else _shape(row)), _shape(row)
        shown.add_row(first, second, row["pass"].replace("forward", "fwd").replace("backward", "bwd"), *_cells(row))
    return shown


def _cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return ["[red]failed[/]"]
    colour = "green" if row["speed_up"] >= 1 else "red"
    return [
        *(cell for path in PATHS for cell in (number(row[path]["p50_ms"]), _range(row[path]))),
        f"[{colour}]{number(row['speed_up'])}×[/]",
        *(number(peak) for peak in _peaks(row)),
        percent(row["floor"]["fraction"]) if "floor" in row else "",
    ]


def _spread(times: Row) -> float:
    return (times["p80_ms"] - times["p20_ms"]) / times["p50_ms"] if "p20_ms" in times else 0.0


def _range(times: Row) -> str:
    if "p20_ms" not in times:
        return ""
    found = f"{number(times['p20_ms'])} to {number(times['p80_ms'])}"
    return f"[yellow]{found}[/]" if _spread(times) > WIDE_SPREAD else found


def busy(cores: float | None, cpu_count: int | None) -> str | None:
    """A sentence where other processes keep more than a tenth of the cores busy."""
    if cores is None or not cpu_count or cores <= BUSY_SHARE * cpu_count:
        return None
    return f"the machine is busy: other processes take {cores:.1f} of its {cpu_count} cores"


def warnings(record: Row) -> list[str]:
    """What speaks against trusting the record's times."""
    timed = [row for row in record["rows"] if row["status"] == "ok"]
    paths = [[row[path] for path in PATHS if path in row] for row in timed]
    found = busy(record.get("other_cores"), record["machine"].get("cpu_count")), unsteady(paths)
    return [warning for warning in found if warning]


def unsteady(lines: Sequence[Sequence[Row]]) -> str | None:
    """A sentence where lines, each of some contenders' times, have one with a wide spread."""
    wide = sum(any(_spread(times) > WIDE_SPREAD for times in line) for line in lines)
    if not wide:
        return None
    return f"{wide} of {len(lines)} lines vary by more than {WIDE_SPREAD:.0%} of their median (p20 to p80)"


def _caption(record: Row) -> str:
    speed = record["copy_gigabytes_per_second"]
    floor = f", {speed:.3g} GB/s" if speed else ""
    return "\n".join(
        (
            "Medians of runs that take turns, after outputs and gradients were compared.",
            "naive: every window unfolded or gathered; for depthwise_conv2d, PyTorch's own convolution.",
            "peak: the most memory that a call holds at once, beyond its inputs and weights.",
            f"of floor: floor / our time; the floor moves each input and output once, at a copy's speed{floor}.",
            f"Models: {record['settings']['image']}, {record['settings']['weights']} weights.",
        )
    )


def fingerprint(record: Row) -> str:
    """Of the content of a profile.json: figures carry it, so that anybody can tell which numbers they show."""
    return "sha256:" + hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def figures(record: Row) -> dict[str, Figure]:
    """File name -> figure; only those for which there are measurements."""
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    operators = _complete([row for row in rows if row["kind"] == "operator"])
    models = [row for row in rows if row["kind"] == "model"]
    passes = list(dict.fromkeys(row["pass"] for row in operators))
    by_pass = [(name, [row for row in operators if row["pass"] == name]) for name in passes]
    plans = {
        "profile_operators.png": (
            "Operators: time of a call",
            [(name, "time, ms", _times(found)) for name, found in by_pass],
        ),
        "profile_memory.png": (
            "Operators: peak memory of a call, beyond its inputs",
            [(name, "peak memory, MB", _memories(found)) for name, found in by_pass],
        ),
        "profile_models.png": (
            "Models on a photograph (random weights)",
            [
                ("time of an image", "time, ms", _times(models, record["settings"]["batch"])),
                ("peak memory", "beyond weights and images, MB", _memories(models)),
            ],
        ),
    }
    drawn = {}
    for file, (title, panels) in plans.items():
        panels = [panel for panel in panels if panel[2]]
        if panels:
            naive = "naive" if file == "profile_models.png" else "naive (depthwise: PyTorch's)"
            drawn[file] = plots.comparison_figure(panels, title=title, contender=naive, device=_setting(record))
    return drawn


def _complete(operators: Sequence[Row]) -> list[Row]:
    """Those of which every pass succeeded: panels side by side share their lines."""
    passes = {row["pass"] for row in operators}
    counts: dict[str, int] = {}
    for row in operators:
        counts[row["name"]] = counts.get(row["name"], 0) + 1
    return [row for row in operators if counts[row["name"]] == len(passes)]


def _label(row: Row) -> str:
    return _shape(row) if row["kind"] == "operator" else f"{row['shape']} {row['pass']}"


def _times(rows: Sequence[Row], images: int = 1) -> list[plots.Comparison]:
    return [
        plots.Comparison(
            _group(row),
            _label(row),
            *(row[path]["p50_ms"] / images for path in PATHS),
            floor=row["floor"]["ms"] if "floor" in row else None,
        )
        for row in rows
    ]


def _memories(rows: Sequence[Row]) -> list[plots.Comparison]:
    """Nothing where the device cannot tell its peak memory."""
    found = [(row, *_peaks(row)) for row in rows]
    return [
        plots.Comparison(_group(row), _label(row), ours, naive)
        for row, ours, naive in found
        if ours is not None and naive is not None
    ]
