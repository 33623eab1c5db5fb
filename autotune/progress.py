"""Progress on stderr: a bar on a terminal, a line for each step where the output goes to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["each"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    items: Sequence[Item], work: Callable[[Item], Result], name: Callable[[Item], str], told: Callable[[Result], str]
) -> Iterator[Result]:
    """``work(item)`` of every item in turn; ``name`` says what is being done and ``told`` what came of it."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        for count, item in enumerate(items, 1):
            result = work(item)
            print(f"[{count}/{len(items)}] {name(item)}: {told(result)}", file=sys.stderr, flush=True)
            yield result
        return
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(items))
        for item in items:
            progress.update(task, description=escape(name(item)))
            yield work(item)
            progress.advance(task)
