"""Types of command-line arguments: those of ``models``, and what names one of the things that can be measured."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TypeVar

from models.commands.types import device, dtype, image_size, positive, seconds, threads

__all__ = ["device", "dtype", "image_size", "matching", "positive", "seconds", "threads"]

Item = TypeVar("Item")


def matching(items: Sequence[Item], patterns: Sequence[str], name: Callable[[Item], str], option: str) -> list[Item]:
    """The items that any pattern names: a shell pattern for the whole name, or a part of it, in any letter case.

    ValueError, naming ``option``, where a pattern fits none.
    """
    chosen: set[int] = set()
    for given in patterns:
        pattern = given.lower() if any(character in given for character in "*?[") else f"*{given.lower()}*"
        hits = {index for index, item in enumerate(items) if fnmatch.fnmatchcase(name(item).lower(), pattern)}
        if not hits:
            known = dict.fromkeys(name(item).split()[0] for item in items)
            raise ValueError(f"{option} must match a name, {given!r} does not; names begin with {', '.join(known)}")
        chosen |= hits
    return [item for index, item in enumerate(items) if index in chosen]
