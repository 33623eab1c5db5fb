"""What every notebook starts with: the device and its sizes, the photograph, grids of axes, tables."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import ImageOps
from torch import Tensor, nn

from autotune import timing, workloads
from autotune.plots import finish, grid

__all__ = [
    "CHECKPOINTS_VARIABLE",
    "Model",
    "Session",
    "Table",
    "chosen_checkpoints",
    "committed_gpu_records",
    "finish",
    "grid",
    "load",
    "picture",
    "record_label",
    "start",
    "without_ticks",
]

CHECKPOINTS_VARIABLE = "DYNAMIC_KERNELS_CHECKPOINTS"


@dataclass(frozen=True)
class Session:
    """Where a notebook runs. ``full`` asks for the published sizes; without a GPU small ones keep it below 30 s."""

    device: torch.device
    dtype: torch.dtype
    full: bool

    @property
    def device_name(self) -> str:
        return timing.device_name(self.device)

    @property
    def label(self) -> str:
        """What a figure says of its origin: "NVIDIA H200 · bfloat16"."""
        return f"{self.device_name} · {str(self.dtype).removeprefix('torch.')}"


def start(seed: int = 0) -> Session:
    """Seed everything; a GPU if there is one, in bfloat16 at full sizes, else the CPU in float32 at small ones."""
    torch.manual_seed(seed)
    device = timing.best_device()
    on_gpu = device.type == "cuda"
    return Session(device, torch.bfloat16 if on_gpu else torch.float32, full=on_gpu)


def picture(height: int, width: int | None = None) -> tuple[Tensor, np.ndarray]:
    """The photograph, twice: ImageNet-normalised [1, 3, height, width], and [height, width, 3] in 0..1 to look at."""
    size = (height, width or height)
    photo = workloads.photograph()
    pixels = np.asarray(ImageOps.fit(photo, (size[1], size[0])), dtype=np.float32) / 255
    return workloads.image_batch(photo, size, 1, torch.float32, torch.device("cpu")), pixels


@dataclass(frozen=True)
class Model:
    """A model in evaluation mode, with the words a figure needs about its weights."""

    name: str
    module: nn.Module
    weights: str

    @property
    def title(self) -> str:
        return f"{self.name}, {self.weights}"


def chosen_checkpoints(defaults: Mapping[str, str | None]) -> dict[str, str | None]:
    """The notebook's own choice of models and weight files, or the environment's.

    DYNAMIC_KERNELS_CHECKPOINTS="rednet50=/data/rednet50.pth,volo_d1=/data/d1.pth.tar" replaces, for each family it
    names, the notebook's model of that family.
    """
    chosen = dict(defaults)
    for entry in filter(None, os.environ.get(CHECKPOINTS_VARIABLE, "").split(",")):
        name, separator, path = entry.partition("=")
        if not separator or not path:
            raise ValueError(f"{CHECKPOINTS_VARIABLE} must read NAME=FILE[,NAME=FILE], got {entry!r}")
        name = name.strip()
        chosen = {other: file for other, file in chosen.items() if family(other) != family(name)}
        chosen[name] = path.strip()
    return chosen


def family(name: str) -> str:
    """The first word of a model's name: rednet of rednet50, overlock of overlock_t_reparam."""
    return re.split(r"[\d_]", name)[0]


def load(name: str, checkpoint: str | None = None, *, seed: int = 0) -> Model:
    """The model ``name`` with the weights of a file or address, or with seeded random ones, and it says which.

    Random models are settled on the photograph.
    """
    if checkpoint is None:
        return Model(name, workloads.settled_model(name, picture(224)[0], seed), "random weights")
    import models

    module = models.create_model(name).eval()
    models.load_checkpoint(module, checkpoint)
    return Model(name, module, f"weights of {os.path.basename(checkpoint)}")


def committed_gpu_records(file: str, results: Path | None = None) -> list[dict[str, Any]]:
    """What was measured on GPUs and committed: notebooks/results/<GPU>/``file`` of each; none without a checkout."""
    root = timing.repository_root()
    folder = results or (root and root / "notebooks" / "results")
    paths = sorted(folder.glob(f"*/{file}")) if folder else []
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [record for record in records if record["machine"]["device_type"] == "cuda"]


def record_label(record: Mapping[str, Any]) -> str:
    """What a figure says of a committed record's origin."""
    return f"{record['machine']['device']} · {record['settings']['dtype']} · {record['machine']['date'][:10]}"


def without_ticks(axis: Axes) -> Axes:
    """For pictures: their axes are the picture's own."""
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    return axis


class Table:
    """Rows that a notebook shows as a table, and a terminal as text."""

    def __init__(self, headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        self.headings, self.rows, self.caption = headings, rows, caption

    def _repr_markdown_(self) -> str:
        numbers = [all(re.match(r"[–\d]", row[column]) for row in self.rows) for column in range(len(self.headings))]
        aligned = ["---:" if number else "---" for number in numbers]
        lines = [f"| {' | '.join(row)} |" for row in (self.headings, aligned, *self.rows)]
        return "\n".join([*lines, "", self.caption])

    def __repr__(self) -> str:
        return self._repr_markdown_()
