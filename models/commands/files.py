"""The files of a training run. Each of them is whole even after a kill."""

import json
from pathlib import Path
from typing import Any

from models.commands.progress import note
from models.safe_load import read_safely, reason_of

BEST, LAST, LOG, STATE, LOCK = "best.safetensors", "last.safetensors", "log.jsonl", "state.pt", ".lock"


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(settings))


def read_state(path: Path) -> dict[str, Any]:
    """The state from which a run continues, on the CPU. ValueError for any other file; code in it is not run."""
    try:
        state = read_safely(path)
    except Exception as error:  # a malformed file can make the reader fail in any way
        raise ValueError(f"it {reason_of(error)}") from error
    if not isinstance(state, dict) or not {"step", "settings"} <= state.keys():
        raise ValueError("it has no step and no settings")
    return state


def event_writer(output: Path, step: int) -> Any:
    """TensorBoard's writer, which leaves out what a killed run wrote after ``step``; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    except Exception as error:  # a broken installation must not end a training
        note(f"TensorBoard is left out, it cannot be imported: {error}")
        return None
    return SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
