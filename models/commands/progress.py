"""Progress on stderr: a bar on a terminal; elsewhere one line every so often, for the log of a long run."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Bar", "console", "event_writer"]

Self = TypeVar("Self", bound="Bar")
console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


class Bar:
    """``with Bar(total) as bar``: call ``advance`` after each step and ``say`` for a line that stays."""

    def __init__(self, total: int, done: int = 0, *, shown: bool = True, seconds: float = 30.0) -> None:
        """Without a terminal, a line every ``seconds``; ``shown`` is False in all processes but the first."""
        self.total, self.done, self.shown, self.seconds = total, done, shown, seconds
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        drawn = shown and console.is_terminal
        self._bar = Progress(*columns, TextColumn("{task.description}"), console=console) if drawn else None
        self._last = time.monotonic()

    def __enter__(self: Self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("", total=self.total, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def describe(self, told: str) -> None:
        """What is being done, beside the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=escape(told))

    def advance(self, count: int, told: str) -> None:
        """``count`` more are done; ``told`` is how it stands."""
        self.done += count
        self.describe(told)
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif self.shown and time.monotonic() - self._last >= self.seconds:
            self._last = time.monotonic()
            self.say(f"[{self.done}/{self.total}] {told}")

    def say(self, line: str) -> None:
        if self.shown:
            console.print(line, markup=False)


def event_writer(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which leaves out what a killed run wrote after ``step``; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    except Exception as error:  # an installation that does not fit must not end a training
        console.print(f"note: TensorBoard is left out, it cannot be imported: {error}", markup=False)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
