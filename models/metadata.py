"""What a weight file says of itself: its model, the images it was trained for, the classes it tells apart.

``finetune`` writes it into the header of a .safetensors file, each entry as JSON under its own name.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open

from models.checks import integers, number, one_of
from models.weight_files import is_safetensors, reason_of

MARK, VERSION = "dynamic_kernels", "1"


@dataclass(frozen=True)
class Metadata:
    """How a model was built and what it was shown.

    Args:
        model: its name, as for ``create_model``.
        model_args: what its function was given, but for the number of classes.
        size: height and width of its images, in pixels.
        crop_pct: share of an image's shorter side that the test crop takes.
        interpolation: "bilinear" or "bicubic".
        mean: of each channel, in 0..1.
        std: of each channel.
        classes: a name for every class.

    Raises:
        TypeError, ValueError: an entry of another type or out of range; the message begins with its name.
    """

    model: str
    model_args: dict[str, Any]
    size: tuple[int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, kind in (("model", str), ("model_args", dict), ("mean", tuple), ("std", tuple), ("classes", tuple)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        integers("size", self.size, 2, 1, 1 << 15)
        number("crop_pct", self.crop_pct, 0.01, 2.01)
        one_of("interpolation", self.interpolation, ("bilinear", "bicubic"))
        one_of("len(mean)", len(self.mean), (1, 3))
        one_of("len(std)", len(self.std), (len(self.mean),))
        for mean, std in zip(self.mean, self.std, strict=True):
            number("mean", mean, -10, 10)
            number("std", std, 1e-6, 1e3)
        if not all(isinstance(name, str) for name in self.classes):
            raise TypeError(f"classes must be strings, got {self.classes!r}")

    def header(self) -> dict[str, str]:
        """Entries of a .safetensors header. TypeError where model_args hold more than plain values."""
        return {MARK: VERSION, **{name: json.dumps(value) for name, value in asdict(self).items()}}

    def options(self) -> dict[str, Any]:
        """Keyword arguments with which ``create_model`` builds the model again."""
        return {**self.model_args, "num_classes": len(self.classes)}

    def apply_to(self, model: Any) -> None:
        """Makes this the configuration of one of ``models``, in timm's words; class names where they are as many."""
        config = {name: value for name, value in model.pretrained_cfg.items() if name != "label_names"} | {
            "input_size": (model.in_chans, *self.size),
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "num_classes": len(self.classes),
        }
        if model.in_chans in (1, len(self.mean)):
            config |= {"mean": self.mean, "std": self.std}
        if model.num_classes == len(self.classes):
            config["label_names"] = list(self.classes)
        model.pretrained_cfg = config

    def __str__(self) -> str:
        seen = f"{self.size[0]}×{self.size[1]} pixels, crop {self.crop_pct}, {self.interpolation}"
        return f"{self.model}, {seen}, {len(self.classes)} classes"


def read_metadata(path: str | os.PathLike[str]) -> Metadata | None:
    """What the file says of itself; None where it says nothing, as files of any other format, or does not exist.

    Raises:
        ValueError: it says what cannot be.
    """
    path = Path(path)
    if not os.path.isfile(path) or not is_safetensors(path):
        return None
    try:
        with safe_open(path, "pt") as opened:
            header = opened.metadata() or {}
    except Exception as error:  # a malformed file can make the reader fail in any way
        raise ValueError(f"checkpoint: {path} {reason_of(error)}") from error
    if MARK not in header:
        return None
    if header[MARK] != VERSION:
        raise ValueError(f"checkpoint: the header of {path} is of version {header[MARK]!r}, not {VERSION}")
    try:
        entries: dict[str, Any] = {known.name: json.loads(header[known.name]) for known in fields(Metadata)}
        entries |= {name: tuple(value) for name, value in entries.items() if isinstance(value, list)}
        return Metadata(**entries)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"checkpoint: the header of {path} is damaged: {type(error).__name__}: {error}") from error
