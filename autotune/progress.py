"""Progress on stderr: a bar on a terminal, a line for each step where the output goes to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Steps", "each"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Steps:
    """``with Steps(total) as steps``: call ``begin`` before each step and ``end`` after it."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.name = total, 0, ""
        console = Console(stderr=True, highlight=False)
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("", total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str) -> None:
        self.name = name
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=escape(name))

    def end(self, told: str) -> None:
        """``told`` is what came of it."""
        self.done += 1
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])
        else:
            print(f"[{self.done}/{self.total}] {self.name}: {told}", file=sys.stderr, flush=True)


def each(
    items: Sequence[Item], work: Callable[[Item], Result], name: Callable[[Item], str], told: Callable[[Result], str]
) -> Iterator[Result]:
    """``work(item)`` of every item in turn; ``name`` says what is being done and ``told`` what came of it."""
    with Steps(len(items)) as steps:
        for item in items:
            steps.begin(name(item))
            result = work(item)
            steps.end(told(result))
            yield result
