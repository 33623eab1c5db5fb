"""Files that a reader, or a run after a kill, finds whole: the old content or the new one, never half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["check_parent", "read_lines", "read_state", "write_json", "write_lines", "write_state"]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())  # else a power cut could leave the new name with no content
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    _write(path, lambda file: file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def write_lines(path: Path, rows: list[Any]) -> None:
    """One JSON value a line."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    _write(path, lambda file: file.write_text(text, encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    """What ``write_lines`` or appending wrote; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]


def write_state(path: Path, state: dict[str, Any]) -> None:
    _write(path, lambda file: torch.save(state, file))


def read_state(path: Path) -> dict[str, Any]:
    """What ``write_state`` wrote, on the CPU. ValueError for any other file; code in it is not run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed file can make the reader fail in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a training state that can be read: {reason}") from error
    if not isinstance(state, dict) or not {"step", "settings"} <= state.keys():
        raise ValueError(f"{path} is not a training state: it has no step and no settings")
    return state


def check_parent(path: Path, option: str) -> None:
    """ValueError naming ``option`` unless a file can be put at ``path``."""
    if path.is_dir():
        raise ValueError(f"{option} must name a file, {path} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}")
