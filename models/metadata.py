"""What a weight file says of itself: its model, the images that it was trained for, and its classes.

``finetune`` writes it into the header of a .safetensors file, each entry as JSON under its own name.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open

from models.checks import integers, number, one_of
from models.safe_load import reason_of
from models.weight_files import is_safetensors

MARK, VERSION = "dynamic_kernels", "1"


@dataclass(frozen=True)
class InputFormat:
    """The images that a model was trained for.

    Args:
        size: height and width, in pixels.
        crop_pct: share of an image's shorter side that the test crop takes.
        interpolation: "bilinear" or "bicubic".
        mean: of each channel, in 0..1; its length is the number of channels.
        std: of each channel.

    Raises:
        TypeError, ValueError: an entry of another type or out of range; the message begins with its name.
    """

    size: tuple[int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        integers("size", self.size, 2, 1, 1 << 15)
        number("crop_pct", self.crop_pct, 0.01, 2.01)
        one_of("interpolation", self.interpolation, ("bilinear", "bicubic"))
        for name, least, below in (("mean", -10, 10), ("std", 1e-6, 1e3)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) not in (1, 3) or len(values) != len(self.mean):
                raise ValueError(f"{name} must be 1 or 3 numbers, as many as mean, got {values!r}")
            for value in values:
                number(name, value, least, below)

    def __str__(self) -> str:
        return f"{self.size[0]}×{self.size[1]} pixels, crop {self.crop_pct}, {self.interpolation}"


@dataclass(frozen=True)
class Metadata(InputFormat):
    """How a model was built and what it was shown.

    Args:
        model: its name, as for ``create_model``.
        model_args: the arguments of its function, except for the number of classes.
        classes: a name for every class.
    """

    model: str
    model_args: dict[str, Any]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("model", str), ("model_args", dict), ("classes", tuple)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        if not all(isinstance(name, str) for name in self.classes):
            raise TypeError(f"classes must be strings, got {self.classes!r}")

    def header(self) -> dict[str, str]:
        """Entries of a .safetensors header. TypeError where model_args hold more than plain values."""
        return {MARK: VERSION, **{name: json.dumps(value) for name, value in asdict(self).items()}}

    def options(self) -> dict[str, Any]:
        """Keyword arguments with which ``create_model`` builds the model again."""
        return {**self.model_args, "num_classes": len(self.classes)}

    def apply_to(self, model: Any) -> None:
        """Writes this into ``model.pretrained_cfg``, in timm's words; class names only if their number fits."""
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
        return f"{self.model}, {super().__str__()}, {len(self.classes)} classes"


def read_metadata(path: str | os.PathLike[str]) -> Metadata | None:
    """What the file says of itself; None if it says nothing, has another format or does not exist.

    Raises:
        ValueError: an entry of the header is missing or out of range.
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
