"""Names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

__all__ = ["class_names", "imagenet_classes"]


def imagenet_classes() -> list[str]:
    """A short name for each of ImageNet-1k's classes, in the published order, each name once."""
    return resources.files("models").joinpath("data/imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


def class_names(count: int, file: str | Path | None = None, known: Sequence[str] | None = None) -> list[str]:
    """Names for ``count`` classes: the lines of ``file``, else ``known``, else ImageNet's for 1000, else numbers.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another number of lines.
    """
    if file is None and known is not None and len(known) == count:
        return list(known)
    if file is None:
        return imagenet_classes() if count == 1000 else [str(label) for label in range(count)]
    names = Path(file).read_text(encoding="utf-8", errors="surrogateescape").splitlines()  # as file names may be
    if len(names) != count:
        raise ValueError(f"--classes must have a line for each of the model's {count} classes, {file} has {len(names)}")
    return names
