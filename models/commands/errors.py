"""The one exception that a command shows as a single line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["CommandError", "input_errors"]


class CommandError(Exception):
    """What the user gave cannot be used: the message is shown without a traceback, and the exit code is 2."""


@contextmanager
def input_errors() -> Iterator[None]:
    """Around checks of what the user gave: turns the errors with which functions refuse input into ``CommandError``."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error
