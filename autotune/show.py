"""Show every tuned config: those of the user's store and those that ship with the package.

Entries that launches pass over are shown with the reason: tuned with another Triton, for kernels that have changed
since, or nothing the kernel offers. They do no harm; tuning again replaces them.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autotune.tunables import StoredEntry, find_tunables, stored_entries, why_unused
from kernels.tuning.choose import Launcher
from kernels.tuning.store import Store, shipped_folder, user_folder

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", metavar="NAME", help='only of this GPU, as in: --gpu "NVIDIA H200" (default: all)')
    parser.add_argument("--json", action="store_true", help="print the entries as JSON instead of a table")


def _known() -> dict[str, Launcher] | None:
    """The kernels by name; None where Triton is not installed, and so nothing says what holds."""
    try:
        return find_tunables()
    except ImportError:
        return None


def _row(stored: StoredEntry, known: dict[str, Launcher] | None, in_store: set[tuple[str, str]]) -> dict[str, Any]:
    if known is None:
        unused = "Triton is not installed here"
    else:
        unused = why_unused(stored.key, stored.entry, known)
    if unused is None and stored.source == "shipped" and (stored.gpu, stored.key) in in_store:
        unused = "the user's store has one"
    return {
        "gpu": stored.gpu,
        "source": stored.source,
        "key": stored.key,
        **{name: _plain(stored.entry.get(name)) for name in ("config", "milliseconds", "heuristic_milliseconds")},
        "unused": unused,
    }


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: NaN and infinity as words, and what is nested beyond reason not at all."""
    try:
        return json.loads(json.dumps(value), parse_constant=str)
    except RecursionError:
        return "nested too deeply to be shown"


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="Tuned configs", title_justify="left")
    shown.add_column("GPU")
    shown.add_column("from")
    shown.add_column("problem", overflow="fold")
    shown.add_column("config", overflow="fold")
    for heading in ("ms", "heuristic, ms"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("state", overflow="fold")
    group = None
    for row in rows:
        if (row["gpu"], row["source"]) != group:
            shown.add_section()
            group = row["gpu"], row["source"]
        config = row["config"]
        shown.add_row(
            _shown(row["gpu"]),
            row["source"],
            _shown(row["key"]),
            _shown(" ".join(f"{n}={v}" for n, v in config.items()) if isinstance(config, dict) else repr(config)),
            *(_milliseconds(row[name]) for name in ("milliseconds", "heuristic_milliseconds")),
            "[green]used[/]" if row["unused"] is None else f"[yellow]not used[/]: {_shown(row['unused'])}",
        )
    return shown


def _milliseconds(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1e15) else "–"


def _shown(text: str, longest: int = 400) -> str:
    """A text from a file, which may hold anything: in one line, of bearable length, without commands.

    What is not printable, as a terminal's escape sequences and lone surrogates, is written as Python writes it.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return escape(text if len(text) <= longest else f"{text[:longest]}…")


def run(arguments: argparse.Namespace) -> int:
    """0, also where there is nothing to show or a file cannot be read: that is reported, not a failure."""
    console = Console(highlight=False)
    folders = {"store": str(user_folder()), "shipped": str(shipped_folder())}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entries = list(stored_entries(arguments.gpu))
    messages = [str(warning.message) for warning in caught]
    known = _known()
    in_store = {
        (stored.gpu, stored.key)
        for stored in entries
        if stored.source == "store" and known is not None and why_unused(stored.key, stored.entry, known) is None
    }
    rows = [_row(stored, known, in_store) for stored in entries]
    if arguments.json:
        print(json.dumps({"folders": folders, "entries": rows, "messages": messages}, indent=1))
        return 0
    if rows:
        console.width = max(console.width, 140)
        console.print(_table(rows))
    else:
        whose = (
            "" if arguments.gpu is None else f" for {arguments.gpu} ({Store(user_folder(), arguments.gpu).path.name})"
        )
        console.print(f"Nothing is tuned{_shown(whose)}: every launch uses its kernel's heuristic.")
    for name, folder in folders.items():
        console.print(f"{name}: {_shown(folder, 10_000)}", soft_wrap=True)
    for message in messages:
        console.print(f"[red]warning:[/] {_shown(message, 10_000)}", soft_wrap=True)
    return 0
