"""The files of a training run, each of them found whole after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kernels.files import atomic_write
from models.weight_files import read_safely, reason_of

BEST, LAST, LOG, STATE, LOCK = "best.safetensors", "last.safetensors", "log.jsonl", "state.pt", ".lock"


def write_lines(path: Path, rows: list[Any]) -> None:
    """One JSON value per line."""
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The tables that ``write_lines`` or appending wrote; a last line that a kill cut short is left out.

    Raises:
        ValueError: a line holds anything else.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(True), 1):
        try:
            rows += [dict(json.loads(line))] if line.endswith(b"\n") else []
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged in line {number}") from error
    return rows


def write_state(path: Path, state: dict[str, Any]) -> None:
    atomic_write(path, lambda file: torch.save(state, file))


def read_state(path: Path) -> dict[str, Any]:
    """What ``write_state`` wrote, on the CPU. ValueError for any other file; code in it is not run."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        state = read_safely(path)
    except Exception as error:  # a malformed file can make the reader fail in any way
        raise ValueError(f"{path} {reason_of(error)}") from error
    if not isinstance(state, dict) or not {"step", "settings"} <= state.keys():
        raise ValueError(f"{path} is not a training state: it has no step and no settings")
    return state
