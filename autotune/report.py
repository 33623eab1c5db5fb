"""What ``profile`` shows: its table, its figures and what became faster or slower, made from profile.json alone."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from autotune import plots
from autotune.cases import row_name
from autotune.measure import doubts
from autotune.tables import Table, megabytes, number, percent, spread, times

Row = dict[str, Any]
PATHS = ("ours", "naive")


def _group(row: Row) -> str:
    return row["operator"] if row["kind"] == "operator" else row["model"]


def _shape(row: Row) -> str:
    return f"{row['model']} {row['shape']}".strip() if row["kind"] == "operator" else row["shape"]


def _setting(record: Row) -> str:
    settings = record["settings"]
    return f"{record['machine']['device']} · {settings['dtype']} · batch {settings['batch']}"


def table(record: Row) -> Table:
    """One line per operator, shape and pass, then per model, size and pass; a failed one says so."""
    settings, speed = record["settings"], record["copy_gigabytes_per_second"]
    headings = ["what", "shape", "pass", "ours, ms", "p20 to p80", "naive, ms", "p20 to p80", "speed-up"]
    headings += ["peak, ours MB", "naive MB", "of floor"]
    notes = [
        "Medians of runs that take turns, after outputs and gradients were compared.",
        "naive: every window unfolded or gathered; for depthwise_conv2d, PyTorch's own convolution.",
        "peak: the most memory that a call holds at once, beyond its inputs and weights.",
        "of floor: floor / our time; the floor moves each input and output once, at a copy's speed"
        + (f", {speed:.3g} GB/s." if speed else "."),
    ]
    if any(row["kind"] == "model" for row in record["rows"]):
        notes.append(f"{_what_models(record)}.")
    rows = [[f"`{_group(row)}`", _shape(row), row["pass"], *_cells(row)] for row in record["rows"]]
    return Table(headings, rows, 3, f"{_setting(record)} · our path: {settings['implementation']}", notes)


def _what_models(record: Row) -> str:
    return f"Models: {record['settings']['image']}, {record['settings']['weights']} weights"


def _cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return ["failed"]
    cells = [cell for path in PATHS for cell in (number(row[path]["p50_ms"]), spread(row[path]))]
    peaks = [megabytes(row[path]["peak_bytes"]) for path in PATHS]
    return [*cells, times(row["speed_up"]), *peaks, percent(row["floor"]["fraction"]) if "floor" in row else "–"]


def show(record: Row) -> None:
    """Print the table, what speaks against its times, and what failed."""
    console = Console(highlight=False)
    table(record).show()
    for warning in warnings(record):
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for row in record["rows"]:
        if row["status"] != "ok":
            console.print(f"[red]failed[/] {escape(row_name(row) + ': ' + row['message'])}", soft_wrap=True)


def warnings(record: Row) -> list[str]:
    """What speaks against trusting the record's times."""
    timed = [[row[path] for path in PATHS] for row in record["rows"] if row["status"] == "ok"]
    return doubts(record["other_cores"], record["machine"]["cpu_count"], timed)


def fingerprint(record: Row) -> str:
    """Of the content of a file: figures carry it, so that anybody can tell which numbers they show."""
    return "sha256:" + hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


# ---- figures


def figures(record: Row) -> dict[str, Figure]:
    """File name -> figure; only those for which there are measurements."""
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    operators = [row for row in rows if row["kind"] == "operator"]
    models = [row for row in rows if row["kind"] == "model"]
    passes, counts = dict.fromkeys(row["pass"] for row in operators), Counter(row["name"] for row in operators)
    # Panels side by side share their lines: those of which every pass succeeded.
    by_pass = [
        (kind, [row for row in operators if row["pass"] == kind and counts[row["name"]] == len(passes)])
        for kind in passes
    ]
    times = [(kind, "time, ms", _times(found)) for kind, found in by_pass]
    memories = [(kind, "peak memory, MB", _memories(found)) for kind, found in by_pass]
    both = [("time of an image", "time, ms", _times(models, record["settings"]["batch"]))]
    both.append(("peak memory", "beyond weights and images, MB", _memories(models)))
    other = "naive (depthwise: PyTorch's)"
    plans = [
        ("profile_operators.png", "Operators: time of a call", other, times),
        ("profile_memory.png", "Operators: peak memory of a call, beyond its inputs", other, memories),
        ("profile_models.png", _what_models(record), "naive", both),
    ]
    drawn = {}
    for file, title, contender, panels in plans:
        if panels := [panel for panel in panels if panel[2]]:
            drawn[file] = plots.comparison_figure(panels, title=title, contender=contender, device=_setting(record))
    return drawn


def _label(row: Row) -> str:
    return _shape(row) if row["kind"] == "operator" else f"{row['shape']} {row['pass']}"


def _times(rows: Sequence[Row], images: int = 1) -> list[plots.Comparison]:
    lines = []
    for row in rows:
        ours, naive = (row[path]["p50_ms"] / images for path in PATHS)
        lines.append(plots.Comparison(_group(row), _label(row), ours, naive, row.get("floor", {}).get("ms")))
    return lines


def _memories(rows: Sequence[Row]) -> list[plots.Comparison]:
    """Nothing where the device cannot tell its peak memory."""
    known = [row for row in rows if None not in [row[path]["peak_bytes"] for path in PATHS]]
    return [plots.Comparison(_group(r), _label(r), *(r[path]["peak_bytes"] / 1e6 for path in PATHS)) for r in known]


# ---- against an earlier run


def earlier_rows(path: Path, record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Row]:
    """Name -> row of an earlier profile.json, of the lines that were timed.

    Raises:
        ValueError: the file cannot be read as a profile.json, was measured in another way than ``record`` will be, or
            has none of the lines ``names``.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        rows = {row_name(row): row for row in earlier["rows"] if row["status"] == "ok" and row["ours"]["p20_ms"] >= 0}
        facts = [("device", earlier["machine"]["device"], record["machine"]["device"])]
        settings = earlier["settings"], record["settings"]
        facts += [(name, *(setting[name] for setting in settings)) for name in ("dtype", "batch", "implementation")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is something else"
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
        before = earlier.get(row_name(row))
        if row["status"] != "ok" or before is None:
            continue
        then, now = ({f"p{n}": run["ours"][f"p{n}_ms"] for n in (20, 50, 80)} for run in (before, row))
        verdict = "same"
        for word, slow, fast in (("slower", now, then), ("faster", then, now)):
            if slow["p50"] > fast["p50"] * (1 + threshold) and slow["p20"] > fast["p80"]:
                verdict = word
        change, control = (row[path]["p50_ms"] / before[path]["p50_ms"] - 1 for path in PATHS)
        facts = {"name": row_name(row), "then": then, "now": now, "change": change, "control": control}
        found.append(facts | {"verdict": verdict})
    return found


def against_table(found: Sequence[Row], source: str, threshold: float) -> Table:
    """What changed first, the rest below it."""
    rows = []
    for row in sorted(found, key=lambda row: row["verdict"] == "same"):
        cells = []
        for run in (row["then"], row["now"]):
            cells += [number(run["p50"]), f"{number(run['p20'])} to {number(run['p80'])}"]
        rows.append([row["name"], *cells, f"{row['change']:+.0%}", f"{row['control']:+.0%}", row["verdict"]])
    notes = [
        f"slower, faster: by more than {threshold:.0%}, and p20 to p80 of the two runs do not overlap.",
        "naive: how much the naive path's median changed, which tells a machine that is busy from a change of ours.",
    ]
    headings = ["", "then, ms", "p20 to p80", "now, ms", "p20 to p80", "change", "naive", ""]
    return Table(headings, rows, 1, f"Our path against {source}", notes)
