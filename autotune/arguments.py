"""Types of command-line arguments that several commands take."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

__all__ = ["DTYPES", "device", "dtype", "image_size", "matching", "positive", "seconds"]

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
Item = TypeVar("Item")


def device(text: str) -> torch.device:
    """A device that is there: cpu, cuda, cuda:1."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device present here, got {text!r}: {reason}") from None


def dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DTYPES)}; got {text!r}")
    return DTYPES[text]


def image_size(text: str) -> tuple[int, int]:
    """SIDE or HEIGHTxWIDTH."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 32 for side in sides):
        raise argparse.ArgumentTypeError(f"must be SIDE or HEIGHTxWIDTH, at least 32 pixels each, got {text!r}")
    return int(sides[0]), int(sides[-1])


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


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
