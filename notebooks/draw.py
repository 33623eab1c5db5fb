"""What several notebooks share: the photograph and models, tables, committed results, and a model's own calls."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython.display import HTML
from matplotlib.axes import Axes
from PIL import ImageOps
from torch import Tensor, nn

import kernels
import models
from autotune import networks
from autotune.tables import Table
from autotune.timing import label as label

RESULTS = Path(__file__).with_name("results")
DYNAMIC = ("involution2d", "involution2d_generate", "contmix2d", "outlook_attention2d")
Function = Callable[..., Any]


def picture(side: int) -> tuple[Tensor, np.ndarray]:
    """The photograph, twice: ImageNet-normalised [1, 3, side, side], and [side, side, 3] in 0..1 to look at."""
    photo = networks.photograph()
    pixels = np.asarray(ImageOps.fit(photo, (side, side)), dtype=np.float32) / 255
    return networks.image_batch(photo, (side, side), 1, torch.float32, torch.device("cpu")), pixels


def load(name: str, checkpoint: str | None = None) -> tuple[nn.Module, str]:
    """A model with the weights of a file or address, or with seeded random ones, and a title that says which."""
    if checkpoint is None:
        return networks.settled_model(name, picture(224)[0]).eval(), f"{name}, random weights"
    return models.create_model(name, checkpoint=checkpoint).eval(), f"{name}, weights of {os.path.basename(checkpoint)}"


@contextmanager
def around(wrap: Callable[[str, Function], Function], operators: Sequence[str] = DYNAMIC) -> Iterator[None]:
    """Inside the block models call ``wrap(name, operator)`` where they call ``kernels.<name>``; in one thread only."""
    originals = {name: getattr(kernels, name) for name in operators}
    for name, function in originals.items():
        setattr(kernels, name, wrap(name, function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(kernels, name, function)


def committed(file: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """What was measured on GPUs and committed: results/<GPU>/``file`` of each."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob(f"*/{file}"))]
    return [record for record in records if record["machine"]["device_type"] == "cuda"]


def bare(axis: Axes) -> Axes:
    """For pictures: their axes are the picture's own."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return axis


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *notes: str) -> HTML:
    """Rows of text, the first column to the left, with notes below."""
    return HTML(Table(headings, rows, title=title, notes=notes).html())
