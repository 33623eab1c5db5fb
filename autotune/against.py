"""``profile --against``: what became faster or slower than an earlier run of the same lines on the same machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from autotune.report import number

__all__ = ["differences", "earlier_rows", "table"]

Row = dict[str, Any]
COLOURS = {"slower": "red", "faster": "green"}


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['name']} {row['pass']}"


def earlier_rows(path: Path, record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Row]:
    """Name -> row of an earlier profile.json, of the lines that were timed.

    Raises:
        ValueError: the file is no profile.json, was measured in another way than ``record`` will be, or has none of
            the lines ``names``.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        rows = {_name(row): row for row in earlier["rows"] if row["status"] == "ok" and row["ours"]["p20_ms"] >= 0}
        facts = [("device", earlier["machine"]["device"], record["machine"]["device"])]
        settings = earlier["settings"], record["settings"]
        facts += [(name, *(setting[name] for setting in settings)) for name in ("dtype", "batch", "implementation")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is none"
        raise ValueError(f"--against must be a profile.json that can be read, {path} cannot: {reason}") from None
    for name, then, now in facts:
        if then != now:
            raise ValueError(f"--against must be measured as this run is; {name} was {then}, and is {now} here")
    if not set(names) & set(rows):
        raise ValueError(f"--against must hold a line that this run measures, {path} has none of them")
    return rows


def differences(rows: Sequence[Row], earlier: Mapping[str, Row], threshold: float) -> list[Row]:
    """A line per row that both runs timed: ``change`` of our median, ``control`` of the naive path's.

    ``verdict`` is ``slower`` or ``faster`` only where the change is beyond the threshold and the ranges from p20 to p80
    do not overlap; otherwise ``same``.
    """
    found = []
    for row in rows:
        before = earlier.get(_name(row))
        if row["status"] != "ok" or before is None:
            continue
        then, now = before["ours"], row["ours"]
        verdict = "same"
        if now["p50_ms"] > then["p50_ms"] * (1 + threshold) and now["p20_ms"] > then["p80_ms"]:
            verdict = "slower"
        elif then["p50_ms"] > now["p50_ms"] * (1 + threshold) and then["p20_ms"] > now["p80_ms"]:
            verdict = "faster"
        spans = {name: {key: times[f"{key}_ms"] for key in ("p20", "p50", "p80")} for name, times in
                 (("then", then), ("now", now))}  # fmt: skip
        change, control = (row[path]["p50_ms"] / before[path]["p50_ms"] - 1 for path in ("ours", "naive"))
        found.append({"name": _name(row), **spans, "change": change, "control": control, "verdict": verdict})
    return found


def table(found: Sequence[Row], source: str, threshold: float) -> Table:
    """What changed first, the rest below it."""
    shown = Table(
        title=f"Our path against {escape(source)}",
        title_justify="left",
        caption=f"slower, faster: by more than {threshold:.0%}, and p20 to p80 of the two runs do not overlap.\n"
        "naive: how much the naive path's median changed, which tells a machine that is busy from a change of ours.",
        caption_justify="left",
        box=box.HORIZONTALS,
    )
    shown.add_column("")
    for heading in ("then, ms", "p20 to p80", "now, ms", "p20 to p80", "change", "naive", ""):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(found, key=lambda row: row["verdict"] == "same"):
        cells = []
        for run in (row["then"], row["now"]):
            cells += [number(run["p50"]), f"{number(run['p20'])} to {number(run['p80'])}"]
        colour = COLOURS.get(row["verdict"], "default")
        verdict = f"[{colour}]{row['verdict']}[/]"
        shown.add_row(escape(row["name"]), *cells, f"{row['change']:+.0%}", f"{row['control']:+.0%}", verdict)
    return shown
