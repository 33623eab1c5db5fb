"""Types of command-line arguments that name what can be measured; the others are those of ``models.commands``."""

import argparse
import fnmatch
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from models.commands.types import positive

Item = TypeVar("Item")


def matching(items: Sequence[Item], patterns: Sequence[str], name: Callable[[Item], str], option: str) -> list[Item]:
    """The items that any pattern names, in any letter case: the whole name or its first word, a shell pattern for the
    name, or a part of it.

    ValueError, naming ``option``, where a pattern fits none.
    """
    chosen: set[int] = set()
    for given in patterns:
        names, whole = [name(item).lower() for item in items], given.lower()
        pattern = whole if any(character in given for character in "*?[") else f"*{whole}*"
        hits = {index for index, known in enumerate(names) if whole in (known, known.split()[0])}
        hits = hits or {index for index, known in enumerate(names) if fnmatch.fnmatchcase(known, pattern)}
        if not hits:
            known = dict.fromkeys(name(item).split()[0] for item in items)
            raise ValueError(f"{option} must match a name, {given!r} does not; names begin with {', '.join(known)}")
        chosen |= hits
    return [item for index, item in enumerate(items) if index in chosen]


def shape(text: str) -> tuple[int, ...]:
    """Sizes with an x between them, as in 8x64x56x56."""
    return tuple(int(positive(size)) for size in text.lower().split("x"))


def module(text: str) -> nn.Module:
    """PACKAGE.MODULE:NAME, the working directory's included: a module, or what makes one without arguments."""
    if not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"must be PACKAGE.MODULE:NAME, as in mypackage.nets:Net, got {text!r}")
    if "" not in sys.path:  # that of an installed command
        sys.path.insert(0, "")
    try:
        found: Any = pkgutil.resolve_name(text)
        found = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # of the user's code, which may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be imported and made without arguments: {reason}") from None
    if not isinstance(found, nn.Module):
        raise argparse.ArgumentTypeError(f"must name a torch.nn.Module, {text!r} gives {type(found).__name__}")
    return found
