"""Progress on stderr: a bar on a terminal, a line for each step where the output goes to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from models.commands.progress import Bar

__all__ = ["Steps", "each"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Steps(Bar):
    """``with Steps(total) as steps``: call ``begin`` before each step and ``end`` after it."""

    def __init__(self, total: int) -> None:
        super().__init__(total, seconds=0)
        self.name = ""

    def begin(self, name: str) -> None:
        self.name = name
        self.describe(name)

    def end(self, outcome: str) -> None:
        self.advance(1, f"{self.name}: {outcome}")


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
