"""Show every tuned config: those of the user's store and those that ship with the package.

Entries that launches pass over are shown with the reason: tuned with another Triton, for kernels that have changed
since, or nothing the kernel offers. They do no harm; tuning again replaces them.
"""

import argparse
import json
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from autotune.tables import Table, settings_text
from autotune.tunables import StoredEntry, stored_entries
from kernels.tuning.store import Store, shipped_folder, user_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", metavar="NAME", help='only of this GPU, as in: --gpu "NVIDIA H200" (default: all)')
    parser.add_argument("--json", action="store_true", help="print the entries as JSON instead of a table")


def _rows(entries: Iterable[StoredEntry], gpu: str | None) -> list[dict[str, Any]]:
    """Every entry and why launches pass it over, None where they use it."""
    rows, used = list[dict[str, Any]](), dict[tuple[str, str], str]()
    for stored in entries:
        unused = stored.found if isinstance(stored.found, str) else None
        asked = gpu or stored.gpu  # entries of the store come first
        if unused is None and (asked, stored.key) in used:
            unused = {"store": "the user's store has one", "shipped": "its own file has one"}[used[asked, stored.key]]
        elif unused is None:
            used[asked, stored.key] = stored.source
        times = {name: stored.entry.get(name) for name in ("milliseconds", "heuristic_milliseconds")}
        rows.append(stored.place | times | {"unused": unused})
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    cells = []
    for row in rows:
        config = row["config"]
        config = settings_text(config) if isinstance(config, dict) else repr(config)
        state = "used" if row["unused"] is None else f"not used: {row['unused']}"
        times = (row[name] for name in ("milliseconds", "heuristic_milliseconds"))
        times = [f"{time:.4f}" if isinstance(time, float) else "–" for time in times]
        cells.append([row["gpu"], row["source"], row["key"], config, state, *times])
    headings = ["GPU", "from", "problem", "config", "state", "ms", "heuristic, ms"]
    return Table(headings, cells, 5, "Tuned configs")


def run(arguments: argparse.Namespace) -> int:
    """0, also where there is nothing to show or a file cannot be read: that is reported, not a failure."""
    folders = {"store": str(user_folder()), "shipped": str(shipped_folder())}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = _rows(stored_entries(arguments.gpu), arguments.gpu)
    messages = [str(warning.message) for warning in caught]
    if arguments.json:
        print(json.dumps({"folders": folders, "entries": rows, "messages": messages}, indent=1))
        return 0
    if rows:
        _table(rows).show()
    else:
        gpu = arguments.gpu
        whose = "" if gpu is None else f" for {gpu} ({Store(user_folder(), gpu).path.name})"
        print(f"Nothing is tuned{whose}: every launch uses its kernel's heuristic.")
    for name, folder in folders.items():
        print(f"{name}: {folder}")
    for message in messages:
        print(f"warning: {message}")
    return 0
