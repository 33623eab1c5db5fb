"""Progress on stderr: a bar on a terminal, elsewhere a line now and then for the log of a long run."""

import time
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.commands import distributed

Self = TypeVar("Self", bound="Bar")
console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def note(text: str) -> None:
    """Prints it once, however many processes run."""
    if distributed.rank() == 0:
        console.print(f"[yellow]note:[/] {escape(text)}")


class Bar:
    """``with Bar(total) as bar``: call ``advance`` after each step and ``say`` for a line that stays."""

    def __init__(self, total: int, done: int = 0, *, shown: bool = True, seconds: float = 30.0) -> None:
        """Without a terminal a line is printed every ``seconds``; ``shown`` is False in all processes but the first."""
        self.total, self.done, self.shown, self.seconds = total, done, shown, seconds
        self.drawn = shown and console.is_terminal
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.description}"), console=console, disable=not self.drawn)
        self._task = self._bar.add_task("", total=total, completed=done)
        self._last = time.monotonic()

    def __enter__(self: Self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.drawn:
            self._bar.stop()

    def begin(self, step: str) -> None:
        """Shows a step that may take minutes as it begins, beside the bar or on a line."""
        self.describe(step)
        if not self.drawn:
            self.say(f"[{self.done + 1}/{self.total}] {step}")

    def describe(self, status: str) -> None:
        """Shows what is being done beside the bar."""
        self._bar.update(self._task, description=escape(status))

    def advance(self, count: int, status: str) -> None:
        """Adds ``count`` to what is done and shows ``status`` beside it."""
        self.done += count
        self._bar.update(self._task, advance=count, description=escape(status))
        if self.shown and not self.drawn and time.monotonic() - self._last >= self.seconds:
            self._last = time.monotonic()
            self.say(f"[{self.done}/{self.total}] {status}")

    def say(self, line: str) -> None:
        if self.shown:
            console.print(line, markup=False)
